#include "launch.cuh"

namespace fastres::shortcut {

void run_half(Step step, const Plan& plan, const Problem& p, const Pointers& q, cudaStream_t stream) {
  run<Half>(step, plan, p, q, Launcher{stream});
}

} // namespace fastres::shortcut
