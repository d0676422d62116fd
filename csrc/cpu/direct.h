// The 3x3 convolution as one matrix product, where output positions are few: in evaluation, where the weights are kept
// in the order in which the product reads them.
//
//   y[p][k] = sum over tap, c of operand[p][tap, c] * weights[tap, c][k]
//
// operand is the input gathered under every position, zeros where a tap lies outside; both are laid out as winograd.h's
// products read them, with channels padded to whole vectors.
#pragma once

#include "epilogues.h"
#include "winograd.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace winograd {

// Output positions of a 3x3 convolution with padding 1, and the input under them.
struct Positions {
  int64_t images, height, width; // of the input
  int64_t stride;

  int64_t out_height() const {
    return (height - 1) / stride + 1;
  }
  int64_t out_width() const {
    return (width - 1) / stride + 1;
  }
  int64_t count() const {
    return images * out_height() * out_width();
  }
  // The input pixel under a position and tap, -1 where it lies outside.
  int64_t pixel(int64_t position, int64_t tap) const {
    const int64_t image = position / (out_height() * out_width());
    const int64_t y = position / out_width() % out_height() * stride + tap / kTaps - 1;
    const int64_t x = position % out_width() * stride + tap % kTaps - 1;
    return y < 0 || y >= height || x < 0 || x >= width ? -1 : (image * height + y) * width + x;
  }
};

inline int64_t direct_depth(const Kernel& kernel) {
  return kTaps * kTaps * round_up(kernel.inputs, kWidth);
}

// to: [group][tap, c][kColumns]
inline void pack_weights(const Kernel& kernel, int64_t group, float* to) {
  const int64_t padded = round_up(kernel.inputs, kWidth), from = group * kColumns;
  const int64_t columns = std::min(kColumns, kernel.outputs - from);
  std::fill_n(to, direct_depth(kernel) * kColumns, 0.0f);
  for (int64_t k = 0; k < columns; ++k) {
    for (int64_t t = 0; t < kTaps * kTaps; ++t) {
      const float* row = kernel.data + (from + k) * kernel.output_stride + kernel.tap[t];
      for (int64_t c = 0; c < kernel.inputs; ++c) {
        to[(t * padded + c) * kColumns + k] = row[c * kernel.input_stride];
      }
    }
  }
}

// Positions first ... first + count - 1 of x [images, height, width, channels], `first` a multiple of kRows.
template <typename T>
inline void gather_positions(
    const Positions& positions,
    const T* x,
    int64_t channels,
    int64_t first,
    int64_t count,
    float* operand) {
  const int64_t padded = round_up(channels, kWidth), depth = kTaps * kTaps * padded;
  for (int64_t p = first; p < first + count; ++p) {
    float* row = operand + p / kRows * depth * kRows + p % kRows * kWidth;
    for (int64_t t = 0; t < kTaps * kTaps; ++t) {
      const int64_t pixel = positions.pixel(p, t);
      float* to = row + t * padded * kRows;
      for (int64_t c = 0; c < channels; c += kWidth, to += kRows * kWidth) {
        if (pixel < 0) {
          store(to, Lanes{});
        } else if (c + kWidth <= channels) {
          store(to, load(x + pixel * channels + c));
        } else {
          store(to, load(x + pixel * channels + c, channels - c));
        }
      }
    }
  }
}

// The outputs of positions first ... first + count - 1 and one column group go to the epilogue.
template <typename Epilogue>
inline void finish_positions(
    const float* product,
    int64_t first,
    int64_t count,
    int64_t channels,
    int64_t from,
    const Epilogue& epilogue) {
  const int64_t columns = std::min(kColumns, channels - from);
  for (int64_t c = 0; c < columns; c += kWidth) {
    const auto run = [&](auto lanes) {
      auto vector = epilogue.vector(from + c, lanes);
      for (int64_t p = 0; p < count; ++p) {
        vector(first + p, (first + p) * channels + from + c, load(product + p * kColumns + c));
      }
      vector.end();
    };
    if (c + kWidth <= columns) {
      run(std::integral_constant<int64_t, kWidth>());
    } else {
      run(columns - c);
    }
  }
}

} // namespace winograd
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
