// The micro-kernels: products of panels of floats, with all accumulators in registers.
//
//   outputs            product[r][k] = sum over c of operand[r][c] * weights[c][k]
//   pixels             product[r][k] = sum over c of pixels[r][c] * weights[c][k]
//   weight gradient    gradient[r][k] = sum over p of rows[p][r] * columns[p][k]
//
// Layouts, so that the inner loops read memory in order, at fixed offsets (W: lanes of a vector):
//   operand   [r / kRows][c / W][r % kRows][W]
//   weights   [k / kPanel][c][kPanel]; of pixels [k / kColumns][c][kColumns]
//   pixels    [r][c], rows any distance apart
//   columns   [k / kColumns][p][kColumns], and so are products
//   rows      [p][r], padded
//
// A word is what a step multiplies: a float, or a pair of bfloat16 numbers that follow each other along c (in the
// weight gradient along p), which are multiplied by AVX512_BF16's dot products and summed in float32: half as many
// steps.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// The accumulators of a micro-kernel: kRows x kColumns of them leave registers for two vectors and a broadcast.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int64_t kColumns = 2 * kWidth;

// Columns of a panel of weights. It does not depend on the vectors' width: packed weights are saved on one machine and
// loaded on another. A column group is one panel or two.
constexpr int64_t kPanel = 16;

// The numbers that a word has, and how many.
template <typename Word>
using number_t = std::conditional_t<std::is_same_v<Word, float>, float, BFloat16>;
template <typename Word>
constexpr int64_t kNumbers = sizeof(Word) / sizeof(number_t<Word>);

template <typename Word>
constexpr int64_t words_of(int64_t numbers) {
  return (numbers + kNumbers<Word> - 1) / kNumbers<Word>;
}

// f(a value of the word by which products over numbers of type T are computed), that of a pair where the depth can be
// had in pairs.
template <typename T, typename F>
void with_word([[maybe_unused]] bool in_pairs, const F& f) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (in_pairs && multiplies_pairs()) {
      return f(BFloat16Pair());
    }
  }
#endif
  f(float());
}

inline int64_t groups_of(int64_t channels) {
  return (channels + kColumns - 1) / kColumns;
}

// Where in the weights of one column group the second vector of a row lies.
inline int64_t high_vector(int64_t depth) {
  return kWidth == kPanel ? depth * kPanel : kWidth;
}

// product[r][:] (+)= sum_c operand[r][c] * weights[c][:] for R rows of one group of kRows, over `steps` vectors of c,
// which lie operand_step and weight_step apart. The two vectors of weights[c] are at low and high, c's rows Row apart.
template <int R, int64_t Row>
inline void output_product(
    const float* operand,
    int64_t operand_step,
    const float* low,
    const float* high,
    int64_t weight_step,
    int64_t steps,
    float* product,
    bool accumulate) {
  Lanes sum_low[R], sum_high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sum_low[r] = accumulate ? load(product + r * kColumns) : Lanes{};
    sum_high[r] = accumulate ? load(product + r * kColumns + kWidth) : Lanes{};
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth; ++lane) {
      const Lanes weights_low = load(low + lane * Row), weights_high = load(high + lane * Row);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Lanes factor = broadcast(operand[r * kWidth + lane]);
        sum_low[r] = multiply_add(factor, weights_low, sum_low[r]);
        sum_high[r] = multiply_add(factor, weights_high, sum_high[r]);
      }
    }
    low += weight_step;
    high += weight_step;
    operand += operand_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(product + r * kColumns, sum_low[r]);
    store(product + r * kColumns + kWidth, sum_high[r]);
  }
}

// Memory that a micro-kernel fetches into the L2 cache on its way, a line a step: a burst of prefetches between two
// products would leave the multipliers waiting.
struct Ahead {
  const char* data = nullptr;
  int64_t lines = 0; // not more than steps

  static constexpr int64_t kLine = 64;

  // Calls step() as often.
  template <typename F>
  inline __attribute__((always_inline)) void steps(int64_t count, const F& step) const {
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(data + i * kLine, 0, 2);
      step();
    }
    for (int64_t i = lines; i < count; ++i) {
      step();
    }
  }
};

// product[r][:] (+)= sum_c pixels[r][c] * weights[c][:] for R pixels, `row` words apart.
template <int R, typename Word>
inline void pixel_product(
    const Word* pixels,
    int64_t row,
    const Word* weights,
    int64_t depth,
    float* product,
    bool accumulate,
    const Ahead& ahead) {
  Lanes low[R], high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    low[r] = accumulate ? load(product + r * kColumns) : Lanes{};
    high[r] = accumulate ? load(product + r * kColumns + kWidth) : Lanes{};
  }
  ahead.steps(depth, [&]() __attribute__((always_inline)) {
    const auto weights_low = load(weights), weights_high = load(weights + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto factor = broadcast(pixels[r * row]);
      low[r] = multiply_add(factor, weights_low, low[r]);
      high[r] = multiply_add(factor, weights_high, high[r]);
    }
    ++pixels;
    weights += kColumns;
  });
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(product + r * kColumns, low[r]);
    store(product + r * kColumns + kWidth, high[r]);
  }
}

// gradient[r][:] (+)= sum_p rows[p][r] * columns[p][:] for R rows.
template <int R, typename Word>
inline void gradient_product(
    const Word* rows,
    int64_t row,
    const Word* columns,
    float* gradient,
    int64_t depth,
    bool accumulate,
    const Ahead& ahead = {}) {
  Lanes low[R], high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    low[r] = high[r] = Lanes{};
  }
  ahead.steps(depth, [&]() __attribute__((always_inline)) {
    const auto columns_low = load(columns), columns_high = load(columns + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto factor = broadcast(rows[r]);
      low[r] = multiply_add(factor, columns_low, low[r]);
      high[r] = multiply_add(factor, columns_high, high[r]);
    }
    rows += row;
    columns += kColumns;
  });
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    float* to = gradient + r * kColumns;
    store(to, accumulate ? load(to) + low[r] : low[r]);
    store(to + kWidth, accumulate ? load(to + kWidth) + high[r] : high[r]);
  }
}

// Calls f(std::integral_constant<int, rows>) for 1 ... kRows.
template <int R = kRows, typename F>
inline void with_rows(int64_t rows, const F& f) {
  if (rows == R) {
    f(std::integral_constant<int, R>());
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, f);
  }
}

// product [p][kColumns] (+)= `tiles` rows of operand times one column group of weights. depth is a multiple of kWidth.
inline void multiply_outputs(
    const float* operand,
    const float* weights,
    float* product,
    int64_t tiles,
    int64_t depth,
    bool accumulate) {
  for (int64_t p = 0; p < tiles; p += kRows) {
    with_rows(std::min<int64_t>(kRows, tiles - p), [&](auto rows) {
      output_product<rows, kPanel>(
          operand + p * depth,
          kRows * kWidth,
          weights,
          weights + high_vector(depth),
          kWidth * kPanel,
          depth / kWidth,
          product + p * kColumns,
          accumulate);
    });
  }
}

// Groups of at most kRows, as even as can be: a short last one would leave the multipliers waiting.
struct RowGroups {
  int64_t rows;

  int64_t count() const {
    return (rows + kRows - 1) / kRows;
  }
  int64_t begin(int64_t group) const {
    return rows * group / count();
  }
  int64_t size(int64_t group) const {
    return begin(group + 1) - begin(group);
  }
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
