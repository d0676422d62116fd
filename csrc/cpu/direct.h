// The 3x3 convolution as one matrix product, where output positions are few, in evaluation.
//
//   y[p][k] = sum over tap, c of operand[p][tap, c] * weights[tap, c][k]
//
// operand is the input gathered under every position, zeros where a tap lies outside, laid out as winograd.h's products
// read it, with channels padded to kPanel. The weights are read once, in the order of their memory: packed ones as they
// lie, those of a network a block at a time, which is transposed into the L1 cache and multiplied from there.
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
  return kTaps * kTaps * round_up(kernel.inputs, kPanel);
}

// Weights in other orders have to be copied first.
inline bool product_reads(const Kernel& kernel) {
  return kernel.is_packed() || kernel.inputs_are_adjacent() || kernel.taps_are_adjacent();
}

// A block of weights for kColumns outputs, `depth` rows of kPanel for the first ones and then as many for the second.
class PanelBlock {
public:
  // from[k][i] for i < rows, a multiple of kWidth; of outputs `columns` and of rows `count` are there, others zero.
  void transpose(const Kernel& kernel, const float* from, int64_t columns, int64_t rows, int64_t count) {
    depth_ = rows;
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      float* to = half == 0 ? low() : high();
      const float* block = from + half * kernel.output_stride;
      const int64_t there = std::clamp<int64_t>(columns - half, 0, kWidth);
      const int64_t whole = there == kWidth ? count / kWidth : 0;
      for (int64_t i = 0; i < whole; ++i) {
        for (int64_t k = 0; k < kWidth; ++k) {
          __builtin_prefetch(block + k * kernel.output_stride + i * kWidth + kAhead, 0, 3);
        }
        transpose_rows(block + i * kWidth, kernel.output_stride, 1, to + i * kWidth * kPanel, kPanel);
      }
      for (int64_t i = whole * kWidth; i < rows; ++i) {
        for (int64_t k = 0; k < kWidth; ++k) {
          to[i * kPanel + k] = i < count && k < there ? block[k * kernel.output_stride + i] : 0.0f;
        }
      }
    }
  }
  float* low() {
    return data_.data();
  }
  float* high() {
    return low() + high_vector(depth_);
  }

  // Channels under one tap, where those lie together.
  static constexpr int64_t kRun = 128;

private:
  // Floats, of every output's row, that are fetched before they are needed.
  static constexpr int64_t kAhead = 64;

  alignas(64) std::array<float, std::max<int64_t>(kRun, kTaps * kTaps * kWidth) * kColumns> data_;
  int64_t depth_ = 0;
};

// product [p][kColumns] = `count` positions of operand times the weights of outputs from ... from + kColumns - 1.
inline void multiply_positions(
    const Kernel& kernel,
    int64_t from,
    const float* operand,
    int64_t count,
    float* product) {
  constexpr int taps = kTaps * kTaps;
  const int64_t padded = round_up(kernel.inputs, kPanel), depth = taps * padded;
  const int64_t columns = std::min(kColumns, kernel.outputs - from);
  // `steps` vectors, of which the first is channel c under a tap.
  const auto multiply =
      [&](int64_t tap, int64_t c, auto row, int64_t step, const float* low, const float* high, int64_t steps) {
        constexpr int64_t weight_step = decltype(row)::value == kPanel ? kWidth * kPanel : kPanel;
        for (int64_t p = 0; p < count; p += kRows) {
          with_rows(std::min<int64_t>(kRows, count - p), [&](auto rows) {
            output_product<rows, row>(
                operand + p * depth + (tap * padded + c) * kRows,
                step,
                low,
                high,
                weight_step,
                steps,
                product + p * kColumns,
                tap + c > 0);
          });
        }
      };
  constexpr std::integral_constant<int64_t, kPanel> by_channels{};
  constexpr std::integral_constant<int64_t, taps * kPanel> by_taps{};
  if (kernel.is_packed()) {
    const float* low = kernel.at(from, 0);
    const float* high = kernel.at(from + kWidth, 0);
    for (int64_t i = 0; i < depth; i += PanelBlock::kRun) {
      const int64_t run = std::min(PanelBlock::kRun, depth - i);
      multiply(0, i, by_channels, kRows * kWidth, low + i * kPanel, high + i * kPanel, run / kWidth);
    }
    return;
  }
  PanelBlock block;
  if (kernel.inputs_are_adjacent()) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < padded; c += PanelBlock::kRun) {
        const int64_t run = std::min(PanelBlock::kRun, padded - c);
        block.transpose(kernel, kernel.at(from, c) + kernel.tap[t], columns, run, std::min(run, kernel.inputs - c));
        multiply(t, c, by_channels, kRows * kWidth, block.low(), block.high(), run / kWidth);
      }
    }
    return;
  }
  for (int64_t c = 0; c < kernel.inputs; c += kWidth) {
    const int64_t inputs = std::min(kWidth, kernel.inputs - c);
    block.transpose(kernel, kernel.at(from, c), columns, taps * kWidth, taps * inputs);
    multiply(0, c, by_taps, padded * kRows, block.low(), block.high(), taps);
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
  const int64_t padded = round_up(channels, kPanel), depth = kTaps * kTaps * padded;
  for (int64_t p = first; p < first + count; ++p) {
    float* row = operand + p / kRows * depth * kRows + p % kRows * kWidth;
    for (int64_t t = 0; t < kTaps * kTaps; ++t) {
      const int64_t pixel = positions.pixel(p, t);
      float* to = row + t * padded * kRows;
      for (int64_t c = 0; c < padded; c += kWidth, to += kRows * kWidth) {
        if (pixel < 0 || c >= channels) {
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
