#include "launch.cuh"

namespace fastres::shortcut {

void run_tf32(Step step, const Plan& plan, const Problem& p, const Pointers& q, cudaStream_t stream) {
  run<Tf32>(step, plan, p, q, Launcher{stream});
}

} // namespace fastres::shortcut
