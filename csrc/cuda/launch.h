// The steps of projection_shortcut on a CUDA stream, a function for each arithmetic: each is compiled in a file of its
// own, so that the build uses more than one core.
#pragma once

#include "projection_shortcut.h"

#include <cuda_runtime_api.h>

namespace fastres::shortcut {

using Run = void(Step, const Plan&, const Problem&, const Pointers&, cudaStream_t);

// Throw std::runtime_error with the runtime's words where a launch is refused.
Run run_bfloat16, run_half, run_tf32, run_float;

} // namespace fastres::shortcut
