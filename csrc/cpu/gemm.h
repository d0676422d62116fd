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

// The accumulators of a micro-kernel: R rows of the first `Vectors` vectors of a column group.
template <int R, int Vectors>
struct Accumulators {
  Lanes sum[R][Vectors];

  // From those of a product, whose rows lie kColumns apart, or from zero.
  inline __attribute__((always_inline)) void begin(const float* product) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] = product != nullptr ? load(product + r * kColumns + v * kWidth) : Lanes{};
      }
    }
  }

  // Each row's factor(r), a pointer, times vectors at low and high.
  template <typename Factor, typename Word>
  inline __attribute__((always_inline)) void add(
      const Factor& factor,
      const Word* low,
      [[maybe_unused]] const Word* high) {
    decltype(load(low)) columns[Vectors];
    columns[0] = load(low);
    if constexpr (Vectors == 2) {
      columns[1] = load(high);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto of_row = broadcast(*factor(r));
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] = multiply_add(of_row, columns[v], sum[r][v]);
      }
    }
  }
  // The same for factors that lie `row` apart.
  template <typename Word>
  inline __attribute__((always_inline)) void add(const Word* factors, int64_t row, const Word* low, const Word* high) {
    add([=](int r) __attribute__((always_inline)) { return factors + r * row; }, low, high);
  }

  inline __attribute__((always_inline)) void end(float* product, bool accumulate = false) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        float* to = product + r * kColumns + v * kWidth;
        store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
      }
    }
  }
};

// product[r][:] (+)= sum_c operand[r][c] * weights[c][:] for R rows of one group of kRows, over `steps` vectors of c,
// which lie operand_step and weight_step apart. The vectors of weights[c] are at low and high, c's rows Row apart.
template <int R, int Vectors, int64_t Row>
inline void output_product(
    const float* operand,
    int64_t operand_step,
    const float* low,
    const float* high,
    int64_t weight_step,
    int64_t steps,
    float* product,
    bool accumulate) {
  Accumulators<R, Vectors> sums;
  sums.begin(accumulate ? product : nullptr);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth; ++lane) {
      sums.add(operand + lane, kWidth, low + lane * Row, high + lane * Row);
    }
    low += weight_step;
    high += weight_step;
    operand += operand_step;
  }
  sums.end(product);
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
template <int R, int Vectors, typename Word>
inline void pixel_product(
    const Word* pixels,
    int64_t row,
    const Word* weights,
    int64_t depth,
    float* product,
    bool accumulate,
    const Ahead& ahead) {
  Accumulators<R, Vectors> sums;
  sums.begin(accumulate ? product : nullptr);
  ahead.steps(depth, [&]() __attribute__((always_inline)) {
    sums.add(pixels, row, weights, weights + kWidth);
    ++pixels;
    weights += kColumns;
  });
  sums.end(product);
}

// gradient[r][:] (+)= sum_p rows[p][r] * columns[p][:] for R rows.
template <int R, int Vectors, typename Word>
inline void gradient_product(
    const Word* rows,
    int64_t row,
    const Word* columns,
    float* gradient,
    int64_t depth,
    bool accumulate,
    const Ahead& ahead = {}) {
  Accumulators<R, Vectors> sums;
  sums.begin(nullptr);
  ahead.steps(depth, [&]() __attribute__((always_inline)) {
    sums.add(rows, 1, columns, columns + kWidth);
    rows += row;
    columns += kColumns;
  });
  sums.end(gradient, accumulate);
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

// Calls f(std::integral_constant<int, rows>, std::integral_constant<int, vectors>) for a column group of so many
// columns: where one vector has them all, the other is neither read nor written.
template <typename F>
inline void with_rows_and_vectors(int64_t rows, int64_t columns, const F& f) {
  with_rows(rows, [&](auto r) {
    if (columns > kWidth) {
      f(r, std::integral_constant<int, 2>());
    } else {
      f(r, std::integral_constant<int, 1>());
    }
  });
}

// Of a product of outputs. Depths are multiples of kWidth.
struct OutputShape {
  int64_t tiles;
  int64_t operand_depth;
  int64_t weight_depth;
  int64_t inputs;  // over which is summed
  int64_t columns; // of the group of weights, or more
};

// product [p][kColumns] (+)= rows of operand times a column group of weights.
inline void multiply_outputs(
    const float* operand,
    const float* weights,
    float* product,
    const OutputShape& shape,
    bool accumulate) {
  for (int64_t p = 0; p < shape.tiles; p += kRows) {
    with_rows_and_vectors(std::min<int64_t>(kRows, shape.tiles - p), shape.columns, [&](auto rows, auto vectors) {
      output_product<rows, vectors, kPanel>(
          operand + p * shape.operand_depth,
          kRows * kWidth,
          weights,
          weights + high_vector(shape.weight_depth),
          kWidth * kPanel,
          shape.inputs / kWidth,
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
