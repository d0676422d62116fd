// A convolution's prologue: what norm_act.h makes of the convolution's input is computed where that is read, in
// float32, and never written to memory as a whole.
#pragma once

#include "norm_act.h"

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Input and parameters; `y` and `first_y_row` are the reader's.
template <typename T>
using Prologue = ApplyParams<T, float>;

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres
