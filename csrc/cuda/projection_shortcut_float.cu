#include "launch.cuh"

namespace fastres::shortcut {

void run_float(Step step, const Plan& plan, const Problem& p, const Pointers& q, cudaStream_t stream) {
  run<Float>(step, plan, p, q, Launcher{stream});
}

} // namespace fastres::shortcut
