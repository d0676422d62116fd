// The outputs of depthwise convolutions, out of images as they lie in memory: a run of outputs along a row is summed in
// registers, a row of taps at a time, and every input is loaded once for all the taps that it meets. What is padding is
// left out of the sums.
#pragma once

#include "grouped_layout.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

// The outputs of one phase in one image, of units of eight channels.
template <typename T>
struct DepthwiseTask {
  const T* input;                                       // under the first tap of the first output, which may be padding
  int64_t input_row, input_column;                      // elements between inputs
  int64_t first_row, end_row, first_column, end_column; // of the inputs that are no padding, counted from there
  const Tap* taps;
  int64_t tap_rows;
  const float* weights;
  int64_t unit_weights;
  T* output;
  int64_t output_row, output_column;
  int64_t rows, columns; // of outputs
  int64_t channels;
};

// A run of outputs from `column` on. Where kInside all of them are outputs, all inputs are no padding, and all lanes
// channels.
template <typename T, int kTaps, int kStride, int kColumns, bool kInside>
[[gnu::always_inline]] inline void sum_run(
    const DepthwiseTask<T>& t,
    int64_t row,
    int64_t column,
    int64_t unit,
    int64_t first_tap,
    int64_t end_tap) {
  constexpr int kInputs = (kColumns - 1) * kStride + kTaps;
  const int64_t lanes = std::min(kLanes, t.channels - unit * kLanes);
  Octet sums[kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) {
    sums[i] = _mm256_setzero_ps();
  }
  for (int64_t u = first_tap; u < end_tap; ++u) {
    const float* weights = t.weights + unit * t.unit_weights;
    Octet factors[kTaps];
#pragma GCC unroll 8
    for (int v = 0; v < kTaps; ++v) {
      factors[v] = load8(weights + t.taps[u * kTaps + v].weight * kLanes);
    }
    const T* p = t.input + (row * kStride + u) * t.input_row + column * kStride * t.input_column + unit * kLanes;
#pragma GCC unroll 32
    for (int i = 0; i < kInputs; ++i) {
      if (kInside || (column * kStride + i >= t.first_column && column * kStride + i < t.end_column)) {
        const Octet value =
            kInside || lanes == kLanes ? load8(p + i * t.input_column) : load8(p + i * t.input_column, lanes);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          if (i - j * kStride >= 0 && i - j * kStride < kTaps) {
            sums[j] = _mm256_fmadd_ps(value, factors[i - j * kStride], sums[j]);
          }
        }
      }
    }
  }
  T* output = t.output + row * t.output_row + column * t.output_column + unit * kLanes;
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    if (kInside) {
      store8(output + j * t.output_column, sums[j]);
    } else if (column + j < t.columns) {
      write(output + j * t.output_column, sums[j], lanes);
    }
  }
}

template <typename T, int kTaps, int kStride, int kColumns>
void sum_rows(const DepthwiseTask<T>& t) {
  constexpr int kInputs = (kColumns - 1) * kStride + kTaps;
  const int64_t units = (t.channels + kLanes - 1) / kLanes, whole = t.channels / kLanes;
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t first_tap = std::max<int64_t>(0, t.first_row - row * kStride);
    const int64_t end_tap = std::min(t.tap_rows, t.end_row - row * kStride);
    for (int64_t column = 0; column < t.columns; column += kColumns) {
      const int64_t first = column * kStride;
      int64_t unit = 0;
      if (column + kColumns <= t.columns && first >= t.first_column && first + kInputs <= t.end_column) {
        for (; unit < whole; ++unit) {
          sum_run<T, kTaps, kStride, kColumns, true>(t, row, column, unit, first_tap, end_tap);
        }
      }
      for (; unit < units; ++unit) {
        sum_run<T, kTaps, kStride, kColumns, false>(t, row, column, unit, first_tap, end_tap);
      }
    }
  }
}

// f(the taps of a row as a constant), which are a whole kernel's or a phase's.
template <typename F>
void with_taps(int64_t taps, const F& f) {
  switch (taps) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, 7>());
  }
}

template <typename T>
void sum_depthwise(const DepthwiseTask<T>& t, int64_t tap_columns, int64_t stride) {
  // Of runs of eight and of five outputs, those which leave fewer unused.
  const bool eight = conv::round_up(t.columns, 8) <= conv::round_up(t.columns, 5);
  with_taps(tap_columns, [&](auto taps) {
    if (stride == 1) {
      eight ? sum_rows<T, taps, 1, 8>(t) : sum_rows<T, taps, 1, 5>(t);
    } else if constexpr (taps % 2 == 1 && taps > 1) {
      eight ? sum_rows<T, taps, 2, 8>(t) : sum_rows<T, taps, 2, 5>(t);
    }
  });
}

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
