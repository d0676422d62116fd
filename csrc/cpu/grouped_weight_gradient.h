// The gradient of a grouped convolution's weights: products of inputs and gradients of outputs are summed in registers
// over the pixels of a chunk, and then in memory over chunks.
//
//   dw[k][c][u][v] = sum over n, i, j of dy[n][i][j][k] * x[n][stride * i + u - padding][stride * j + v - padding][c]
//
// A lane is a channel of x: a pixel's values are read as vectors, and the gradients of four outputs broadcast.
#pragma once

#include "grouped_layout.h"
#include "grouped_products.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

// The pixels of a chunk, dy's, as both operands have them in padded memory.
struct Pixels {
  int64_t images, rows, columns;
  int64_t stride;
  int64_t top, height; // x's row of the image that the padded input begins with, and all of its rows
  int64_t input_row, input_image, gradient_row, gradient_image; // floats
};

// The positions, the first and the one behind the last of `count`, whose taps `first` to `last` read an element of
// `extent`; a tap at position 0 reads the element of its number.
inline std::pair<int64_t, int64_t> positions_inside(
    int64_t first,
    int64_t last,
    int64_t stride,
    int64_t extent,
    int64_t count) {
  const int64_t begin = last >= 0 ? 0 : (-last + stride - 1) / stride;
  const int64_t end = first >= extent ? 0 : std::min(count, (extent - 1 - first) / stride + 1);
  return {std::min(begin, count), std::max(std::min(begin, count), end)};
}

// Adds to kOutputs * kRows * kColumns vectors, the taps of one output `tap` floats apart and its rows `tap_row`, those
// of outputs `output`.
template <Kind kKind, int kRows, int kColumns>
[[gnu::noinline]] void add_products(
    const Pixels& p,
    const float* input,
    const float* gradient,
    int64_t first_output,
    float* to,
    int64_t tap_row,
    int64_t output) {
  constexpr int kOutputs = kKind == Kind::depthwise ? 1 : 4;
  Octet sums[kRows * kColumns * kOutputs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kColumns * kOutputs; ++i) {
    sums[i] = _mm256_setzero_ps();
  }
  for (int64_t image = 0; image < p.images; ++image) {
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* x = input + image * p.input_image + row * p.stride * p.input_row;
      const float* dy = gradient + image * p.gradient_image + row * p.gradient_row + first_output;
      for (int64_t column = 0; column < p.columns; ++column) {
        if constexpr (kKind == Kind::depthwise) {
          const Octet factor = load8(dy);
#pragma GCC unroll 3
          for (int u = 0; u < kRows; ++u) {
#pragma GCC unroll 7
            for (int v = 0; v < kColumns; ++v) {
              Octet& sum = sums[u * kColumns + v];
              sum = _mm256_fmadd_ps(load8(x + u * p.input_row + v * kLanes), factor, sum);
            }
          }
        } else {
          Octet values[kRows * kColumns];
#pragma GCC unroll 3
          for (int u = 0; u < kRows; ++u) {
#pragma GCC unroll 7
            for (int v = 0; v < kColumns; ++v) {
              values[u * kColumns + v] = load8(x + u * p.input_row + v * kLanes);
            }
          }
#pragma GCC unroll 4
          for (int k = 0; k < kOutputs; ++k) {
            const Octet factor = spread<kKind>(dy, k);
#pragma GCC unroll 16
            for (int i = 0; i < kRows * kColumns; ++i) {
              add_product(sums[i * kOutputs + k], values[i], factor);
            }
          }
        }
        x += p.stride * kLanes;
        dy += kLanes;
      }
    }
  }
#pragma GCC unroll 3
  for (int u = 0; u < kRows; ++u) {
#pragma GCC unroll 7
    for (int v = 0; v < kColumns; ++v) {
#pragma GCC unroll 4
      for (int k = 0; k < kOutputs; ++k) {
        float* at = to + u * tap_row + v * kLanes + k * output;
        store8(at, _mm256_add_ps(load8(at), sums[(u * kColumns + v) * kOutputs + k]));
      }
    }
  }
}

// Of an output and a block of eight inputs, all taps: rows of as many at a time as registers hold. Rows of pixels for
// which they see only padding are left out.
template <Kind kKind>
void add_taps(
    const Pixels& p,
    int64_t kernel,
    const float* input,
    const float* gradient,
    int64_t first_output,
    float* to,
    int64_t output) {
  const int64_t tap_row = kernel * kLanes;
  const auto add = [&](int64_t u, int64_t v, auto rows, auto columns) {
    const auto [row, end] = positions_inside(p.top + u, p.top + u + rows - 1, p.stride, p.height, p.rows);
    Pixels inside = p;
    inside.rows = end - row;
    const float* x = input + (row * p.stride + u) * p.input_row + v * kLanes;
    const float* dy = gradient + row * p.gradient_row;
    add_products<kKind, rows, columns>(inside, x, dy, first_output, to + u * tap_row + v * kLanes, tap_row, output);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  if constexpr (kKind == Kind::depthwise) {
    if (kernel == 3) {
      add(0, 0, three, three);
      return;
    }
    const auto add_rows = [&](auto columns) {
      for (int64_t u = 0; u + 1 < kernel; u += 2) {
        add(u, 0, two, columns);
      }
      add(kernel - 1, 0, one, columns);
    };
    if (kernel == 5) {
      add_rows(std::integral_constant<int, 5>());
    } else {
      add_rows(std::integral_constant<int, 7>());
    }
  } else {
    for (int64_t u = 0; u < kernel; ++u) {
      int64_t v = 0;
      for (; v + 3 <= kernel; v += 3) {
        add(u, v, one, three);
      }
      if (kernel - v == 2) {
        add(u, v, one, two);
      } else if (kernel - v == 1) {
        add(u, v, one, one);
      }
    }
  }
}

// The same where gradients are not finite, a tap at a time: padding has no part in the sums. `size` has x's columns,
// and those of padding before them.
template <Kind kKind>
void add_taps_inside(
    const Pixels& p,
    int64_t kernel,
    std::pair<int64_t, int64_t> size,
    const float* input,
    const float* gradient,
    int64_t first_output,
    float* to,
    int64_t output) {
  for (int64_t u = 0; u < kernel; ++u) {
    const auto [row, row_end] = positions_inside(p.top + u, p.top + u, p.stride, p.height, p.rows);
    for (int64_t v = 0; v < kernel; ++v) {
      const int64_t tap = v - size.second;
      const auto [column, column_end] = positions_inside(tap, tap, p.stride, size.first, p.columns);
      Pixels inside = p;
      inside.rows = row_end - row;
      inside.columns = column_end - column;
      const float* x = input + (row * p.stride + u) * p.input_row + (column * p.stride + v) * kLanes;
      const float* dy = gradient + row * p.gradient_row + column * kLanes;
      float* at = to + (u * kernel + v) * kLanes;
      add_products<kKind, 1, 1>(inside, x, dy, first_output, at, 0, output);
    }
  }
}

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
