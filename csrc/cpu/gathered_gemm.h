// The 3x3 convolution as one matrix product over gathered rows, which serves few output positions in evaluation.
//
//   y[p][k] = sum over tap, c of operand[p][tap, c] * weights[tap, c][k]
//
// A row of the operand is the input gathered under one position, zeros where a tap lies outside, laid out as the
// products read it (gemm.h), with channels padded to kPanel. The weights, a network's own, are read once, in the order
// of their memory: a block at a time, which is transposed into the L1 cache and multiplied from there. packed_gemm.h is
// for packed ones.
#pragma once

#include "packed_weights.h"

#include <cstdint>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Gathered elements that are worth a thread's start.
constexpr int64_t kGatheredElements = 64 * 1024;

// Output positions of a convolution with a square kernel, and the input under them.
struct Positions {
  int64_t images, height, width; // of the input
  int64_t stride;
  int64_t kernel = kTaps, padding = kTaps / 2;

  int64_t out_height() const {
    return (height + 2 * padding - kernel) / stride + 1;
  }
  int64_t out_width() const {
    return (width + 2 * padding - kernel) / stride + 1;
  }
  int64_t count() const {
    return images * out_height() * out_width();
  }
  // The input pixel under a position and tap, -1 where it lies outside.
  int64_t pixel(int64_t position, int64_t tap) const {
    const int64_t image = position / (out_height() * out_width());
    const int64_t y = position / out_width() % out_height() * stride + tap / kernel - padding;
    const int64_t x = position % out_width() * stride + tap % kernel - padding;
    return y < 0 || y >= height || x < 0 || x >= width ? -1 : (image * height + y) * width + x;
  }
};

// Weights in other orders have to be copied first.
inline bool gemm_reads(const Kernel& kernel) {
  return kernel.inputs_are_adjacent() || kernel.taps_are_adjacent();
}

// The convolution of x [images, height, width, channels].
template <typename T, typename Epilogue>
void gathered_gemm(const Positions& positions, const T* x, const Kernel& kernel, const Epilogue& epilogue);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
