// Winograd's convolution, as the operators call it.
#pragma once

#include "small_images.h"

#include <algorithm>
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
Chunks chunks_of(const Form& form, int64_t images, int64_t height, int64_t width, const Kernel& kernel);

// The convolution of x with the kernel. With `turned(kernel)`, dy for x and form.turned() it is the input gradient.
template <typename Form, typename T, typename Epilogue>
void convolve(
    const Form& form,
    const Chunks& chunks,
    const Source<T>& x,
    const Kernel& kernel,
    const Epilogue& epilogue);

// Bytes of the sums of a weight gradient that all threads have of their own.
constexpr int64_t kGradientBytes = 256 * 1024 * 1024;

// The gradient of a 3x3 kernel in memory, [outputs][taps][inputs] or [outputs][inputs][taps]; of a 1x1 kernel `data`.
struct KernelGradient {
  float* data;
  int64_t inputs;
  bool inputs_are_adjacent;

  float* at(int64_t k, int64_t tap, int64_t c) const {
    return data + k * kTaps * kTaps * inputs + (inputs_are_adjacent ? tap * inputs + c : c * kTaps * kTaps + tap);
  }
  int64_t input_stride() const {
    return inputs_are_adjacent ? 1 : kTaps * kTaps;
  }
};

// The operands of a weight gradient.
template <typename T>
struct WeightGradient {
  Source<T> x, dy;
  KernelGradient dw;
  int64_t inputs, outputs;
};

// dw = the gradient of the weights.
template <typename Form, typename T>
void weight_gradient(const Form& form, const WeightGradient<T>& w);

// Products of tiles of one form over an image of such outputs.
template <typename Form>
int64_t products_of(int64_t height, int64_t width) {
  constexpr int64_t side = Form::kOut;
  return Form::points() * ((height + side - 1) / side) * ((width + side - 1) / side);
}

// f(the form) for a convolution of such a stride, 1 or 2, and images. With stride 1 that is 4x4 tiles, but where others
// save a fifth of their multiplications: less would not pay for transforms of 7 points, and their errors.
template <typename F>
auto with_form(int64_t stride, int64_t height, int64_t width, const F& f) {
  if (std::max(height, width) <= SmallImages<>::kSides[stride]) {
    return f(SmallImages<>{static_cast<int>(height), static_cast<int>(width), static_cast<int>(stride)});
  }
  if (stride == 2) {
    return f(Stride2());
  }
  const int64_t of_3 = products_of<Tile3>(height, width), of_5 = products_of<Tile5>(height, width);
  if (5 * std::min(of_3, of_5) > 4 * products_of<Tile4>(height, width)) {
    return f(Tile4());
  }
  return of_3 <= of_5 ? f(Tile3()) : f(Tile5());
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
