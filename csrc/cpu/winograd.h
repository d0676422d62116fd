// Winograd's convolution, as the operators call it.
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

// How threads share the tiles of the outputs [images, height, width].
template <typename Form>
Chunks chunks_of(int64_t images, int64_t height, int64_t width, const Kernel& kernel);

// The convolution of x with the kernel. With `turned(kernel)`, dy for x and Form::Turned it is the input gradient.
template <typename Form, typename T, typename Epilogue>
void convolve(const Chunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue);

// The operands of a weight gradient.
template <typename T>
struct WeightGradient {
  Source<T> x, dy;
  float* dw; // [outputs][3][3][inputs]
  int64_t inputs, outputs;
};

// dw = the gradient of the weights.
template <typename Form, typename T>
void weight_gradient(const WeightGradient<T>& w);

// Whether 5x5 tiles save a fifth of the multiplications of 4x4 tiles, on an image of such outputs: less would not pay
// for transforms of 7 points, and for their errors.
inline bool prefers_tile5(int64_t height, int64_t width) {
  const auto products = [&](int64_t side, int64_t points) {
    return points * ((height + side - 1) / side) * ((width + side - 1) / side);
  };
  return 5 * products(Tile5::kOut, Tile5::kPoints) <= 4 * products(Tile4::kOut, Tile4::kPoints);
}

// f(a value of the form) for a convolution of such a stride, 1 or 2, and outputs.
template <typename F>
auto with_form(int64_t stride, int64_t height, int64_t width, const F& f) {
  if (stride == 2) {
    return f(Stride2());
  }
  return prefers_tile5(height, width) ? f(Tile5()) : f(Tile4());
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
