// A convolution's prologue: what norm_act.h makes of the convolution's input is computed where that is read, and never
// written to memory as a whole.
#pragma once

#include "norm_act.h"

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

template <typename T>
using Prologue = ApplyOperands<T>;

// Rows first ... first + count - 1 of it to `to`.
template <typename T, typename Out>
inline void run_prologue(const Prologue<T>& prologue, int64_t first, int64_t count, Out* to) {
  apply_range(ApplyParams<T, Out>{prologue, to, first}, first, first + count);
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres
