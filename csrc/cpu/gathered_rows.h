// Rows of a convolution's operand, the inputs under one output position each, as packed_gemm.cpp copies them: one by
// one, or as parts of lines with their padding.
#pragma once

#include "gathered_gemm.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// `count` numbers, of which the last store may overlap the one before.
template <typename T, typename To>
inline void copy_run(const T* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<To, BFloat16>) {
    std::copy_n(from, count, to);
  } else if (count < kWidth) {
    store(to, load(from, count), count);
  } else {
    for (int64_t i = 0; i + kWidth <= count; i += kWidth) {
      store(to + i, load(from + i));
    }
    store(to + count - kWidth, load(from + count - kWidth));
  }
}

// The rows of the operand of positions first ... first + count - 1, each of `row` numbers, zeros after the last tap.
template <typename T, typename To>
void gather_rows(
    const Positions& positions,
    const T* x,
    const Panels& weights,
    int64_t first,
    int64_t count,
    int64_t row,
    To* operand) {
  const int64_t kernel = positions.kernel, depth = weights.depth, channels = weights.inputs;
  const int64_t width = positions.out_width(), height = positions.out_height();
  for (int64_t p = first; p < first + count; ++p) {
    const int64_t top = p / width % height * positions.stride - positions.padding;
    const int64_t left = p % width * positions.stride - positions.padding;
    // Taps of a line that lie inside.
    const int64_t begin = std::clamp<int64_t>(-left, 0, kernel);
    const int64_t end = std::clamp<int64_t>(positions.width - left, begin, kernel);
    const T* image = x + p / (width * height) * positions.height * positions.width * channels;
    for (int64_t i = 0; i < kernel; ++i, operand += kernel * depth) {
      const int64_t y = top + i;
      if (y < 0 || y >= positions.height || begin == end) {
        std::fill_n(operand, kernel * depth, To(0.0f));
        continue;
      }
      std::fill_n(operand, begin * depth, To(0.0f));
      const T* line = image + (y * positions.width + left) * channels;
      if (depth == channels) {
        copy_run(line + begin * channels, (end - begin) * channels, operand + begin * depth);
      } else {
        for (int64_t t = begin; t < end; ++t) {
          copy_run(line + t * channels, channels, operand + t * depth);
          std::fill_n(operand + t * depth + channels, depth - channels, To(0.0f));
        }
      }
      std::fill_n(operand + end * depth, (kernel - end) * depth, To(0.0f));
    }
    operand = std::fill_n(operand, row - weights.rows(), To(0.0f));
  }
}

// Copies input lines first ... first + count - 1 of an image, which may lie outside, with the padding on both sides.
template <typename T, typename To>
void pad_lines(const Positions& positions, const T* image, int64_t channels, int64_t first, int64_t count, To* to) {
  const int64_t margin = positions.padding * channels, width = positions.width * channels;
  for (int64_t y = first; y < first + count; ++y, to += width + 2 * margin) {
    if (y < 0 || y >= positions.height) {
      std::fill_n(to, width + 2 * margin, To(0.0f));
      continue;
    }
    std::fill_n(to, margin, To(0.0f));
    copy_run(image + y * width, width, to + margin);
    std::fill_n(to + margin + width, margin, To(0.0f));
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
