// The forward pass of a convolution in groups, for the operators that have one.
#pragma once

#include "grouped_layout.h"

#include <functional>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

// A part of the outputs: the chunk of that index, and channels first ... first + count - 1.
struct Outputs {
  const Chunk& chunk;
  int64_t index, first, count;
};

// Called for each part as soon as it is written, by the thread that wrote it.
using Finish = std::function<void(const Outputs&)>;

// y = conv(x).
template <typename T>
void convolve(
    const Shape& s,
    const Images<const T>& x,
    const Weights<const float>& weights,
    const Images<T>& y,
    const Finish& finish);

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
