// Winograd's convolution F(4x4, 3x3), as the operators call it.
#pragma once

#include "winograd_tiles.h"

#include <cstdint>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Bytes of transformed tiles that all threads share, held in the last-level cache.
constexpr int64_t kSharedBytes = 16 * 1024 * 1024;
// Planes a multiple of a page apart would all fall into the same few lines of the L1 cache.
constexpr int64_t kSkew = 64 / sizeof(float);

// How threads share the tiles.
Chunks chunks_of(const Tiles& tiles, const Kernel& kernel);

// The convolution of x with the kernel. With `turned(kernel)` and dy for x it is the input gradient.
template <typename T, typename Epilogue>
void convolve(const Chunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue);

// The operands of a weight gradient.
template <typename T>
struct WeightGradient {
  Tiles tiles;
  Source<T> x;
  const T* dy;
  float* dw; // [outputs][3][3][inputs]
  int64_t inputs, outputs;
};

// dw = the gradient of the weights.
template <typename T>
void weight_gradient(const WeightGradient<T>& w);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
