#include "launch.cuh"

namespace fastres::shortcut {

void run_bfloat16(Step step, const Plan& plan, const Problem& p, const Pointers& q, cudaStream_t stream) {
  run<BFloat16>(step, plan, p, q, Launcher{stream});
}

} // namespace fastres::shortcut
