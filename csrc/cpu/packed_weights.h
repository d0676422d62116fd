// A kernel's weights in memory: a 3x3 kernel's with any strides, or packed as [K / 16][tap][C'][16], C' being C or C
// rounded up to 16, which is the order in which the products read them (fastres/ops/packed.py packs). And the loads of
// a part of them into the products' order.
#pragma once

#include "gemm.h"

#include <array>
#include <utility>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

constexpr int kTaps = 3;

// A 3x3 kernel tensor seen as (output channel, input channel, tap), whatever its layout. For the input gradient the
// channels change places and the taps are turned by half a circle. Packed weights have their outputs in groups.
struct Kernel {
  const float* data;
  int64_t outputs, inputs;
  int64_t group_stride; // of kPanel outputs
  int64_t output_stride, input_stride;
  std::array<int64_t, kTaps * kTaps> tap; // offsets

  const float* at(int64_t k, int64_t c) const {
    return data + k / kPanel * group_stride + k % kPanel * output_stride + c * input_stride;
  }
  bool is_packed() const {
    return group_stride != kPanel * output_stride;
  }
  // [k][...][c]: a vector of inputs under one tap lies together.
  bool inputs_are_adjacent() const {
    return input_stride == 1;
  }
  // [k][c][tap]: the nine taps of an input lie together, and those of the next one follow.
  bool taps_are_adjacent() const {
    bool adjacent = input_stride == kTaps * kTaps;
    for (int t = 0; t < kTaps * kTaps; ++t) {
      adjacent = adjacent && tap[t] == t;
    }
    return adjacent;
  }
};

inline Kernel kernel_of(const Tensor& weight) {
  Kernel kernel{
      weight.const_data_ptr<float>(),
      weight.size(0),
      weight.size(1),
      kPanel * weight.stride(0),
      weight.stride(0),
      weight.stride(1),
      {}};
  for (int64_t t = 0; t < kTaps * kTaps; ++t) {
    kernel.tap[t] = t / kTaps * weight.stride(2) + t % kTaps * weight.stride(3);
  }
  return kernel;
}

// The kernel whose convolution with dy is the input gradient: turned by half a circle, its channels exchanged.
inline Kernel turned(Kernel kernel) {
  std::swap(kernel.outputs, kernel.inputs);
  std::swap(kernel.output_stride, kernel.input_stride);
  kernel.group_stride = kPanel * kernel.output_stride;
  std::reverse(kernel.tap.begin(), kernel.tap.end());
  return kernel;
}

// Packed weights [groups of kPanel outputs, an even number][tap, input][kPanel], contiguous, of which `depth` rows,
// zeros after the last input, belong to a tap (fastres/ops/packed.py).
struct Panels {
  const float* data;
  int64_t outputs, inputs, taps, depth;

  int64_t rows() const {
    return taps * depth;
  }
};

// Those of a 3x3 kernel.
inline Kernel packed_kernel(const Panels& panels) {
  Kernel kernel{panels.data, panels.outputs, panels.inputs, panels.rows() * kPanel, 1, kPanel, {}};
  for (int64_t t = 0; t < kTaps * kTaps; ++t) {
    kernel.tap[t] = t * panels.depth * kPanel;
  }
  return kernel;
}

// gathered: [kWidth][tap][kColumns], for input channels from c0 on and output channels from `from` on; what lies
// outside the kernel is zero.
inline void gather_weights(const Kernel& kernel, int64_t from, int64_t c0, float* gathered) {
  constexpr int taps = kTaps * kTaps;
  const int64_t columns = std::min(kColumns, kernel.outputs - from), inputs = std::min(kWidth, kernel.inputs - c0);
  if (inputs < kWidth || columns < kColumns) {
    std::fill_n(gathered, kWidth * taps * kColumns, 0.0f);
  }
  const float* block = kernel.at(from, c0);
  if (kernel.output_stride == 1) {
    // A group of packed weights is as long as a vector, or longer.
    const int64_t together = kernel.is_packed() ? kPanel : columns;
    for (int64_t k = 0; k < columns; k += together) {
      const int64_t size = std::min(together, columns - k);
      for (int64_t c = 0; c < inputs; ++c) {
        for (int t = 0; t < taps; ++t) {
          const float* row = kernel.at(from + k, c0 + c) + kernel.tap[t];
          std::copy(row, row + size, gathered + (c * taps + t) * kColumns + k);
        }
      }
    }
  } else if (kernel.taps_are_adjacent() && inputs == kWidth && columns == kColumns) {
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      transpose_rows(block + half * kernel.output_stride, kernel.output_stride, taps, gathered + half, kColumns);
    }
  } else if (kernel.inputs_are_adjacent() && inputs == kWidth && columns == kColumns) {
    for (int t = 0; t < taps; ++t) {
      for (int64_t half = 0; half < kColumns; half += kWidth) {
        transpose_square(
            block + half * kernel.output_stride + kernel.tap[t],
            kernel.output_stride,
            gathered + t * kColumns + half,
            taps * kColumns);
      }
    }
  } else {
    for (int64_t k = 0; k < columns; ++k) {
      for (int t = 0; t < taps; ++t) {
        const float* row = block + k * kernel.output_stride + kernel.tap[t];
        for (int64_t c = 0; c < inputs; ++c) {
          gathered[(c * taps + t) * kColumns + k] = row[c * kernel.input_stride];
        }
      }
    }
  }
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

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
