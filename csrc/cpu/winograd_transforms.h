// Winograd's minimal filtering, one dimension of it and two.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A      d: inputs, g: weights, Y: outputs, *: element by element
//
// F(m, r), m outputs and r taps, takes m + r - 1 products where the direct sum takes m r: Toom and Cook's construction
// from as many points less one, and infinity. Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural
// networks", sections 4.1 and 4.3.
//
//   F(4, 3)  0, +-sqrt(1/2), +-sqrt(2)     transforms written out (Zero43): a * b = 1 keeps every matrix entry between
//                                          1/6 and 2.83, for as many operations as the points 1 and 2 take
//   F(3, 3)  +-0.4, +-1.25                 of pairs of points (Paired), and infinity
//   F(5, 3)  +-0.3, +-0.85, +-1.75         of pairs
//   F(4, 2)  +-1/2, +-5/4                  of pairs; without infinity, whose product is zero then, F(4, 1)
//
// The points are those with the smallest errors that were found (docs/convolution.md has the figures).
#pragma once

#include "simd.h"

#include <array>
#include <utility>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

inline __attribute__((always_inline)) Lanes times(float factor, Lanes x, Lanes plus) {
  return multiply_add(broadcast(factor), x, plus);
}

// --- one dimension of each transform; input and output are strided arrays in registers

//   B^T rows   [1 0 -5/2 0 1 0]   [0 -+2a -2 +-a 1 0]   [0 -+b/2 -1/2 +-b 1 0]   [0 1 0 -5/2 0 1]
//   G rows     [1 0 0]            [1 +-a 1/2] / -3/2     [1 +-b 2] / 6            [0 0 1]
//   A^T rows   [1 1 1 1 1 0]      [0 a -a b -b 0]        [0 1/2 1/2 2 2 0]        [0 a/2 -a/2 2b -2b 1]
struct Zero43 {
  static constexpr int kOut = 4, kTaps = 3, kIn = 6;
  static constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

  // B^T d
  struct Input {
    static constexpr int kFrom = kIn, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* d, int s, Lanes* o, int os) {
      const Lanes d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
      o[0] = times(-2.5f, d2, d0 + d4);
      const Lanes even_a = times(-2.0f, d2, d4), odd_a = times(-2.0f, d1, d3);
      o[os] = times(kA, odd_a, even_a);
      o[2 * os] = times(-kA, odd_a, even_a);
      const Lanes even_b = times(-0.5f, d2, d4), odd_b = times(-0.5f, d1, d3);
      o[3 * os] = times(kB, odd_b, even_b);
      o[4 * os] = times(-kB, odd_b, even_b);
      o[5 * os] = times(-2.5f, d3, d1 + d5);
    }
  };

  // A^T m
  struct Output {
    static constexpr int kFrom = kIn, kTo = kOut;
    static inline __attribute__((always_inline)) void apply(const Lanes* m, int s, Lanes* o, int os) {
      const Lanes sum_a = m[s] + m[2 * s], difference_a = m[s] - m[2 * s];
      const Lanes sum_b = m[3 * s] + m[4 * s], difference_b = m[3 * s] - m[4 * s];
      o[0] = m[0] + sum_a + sum_b;
      o[os] = times(kB, difference_b, broadcast(kA) * difference_a);
      o[2 * os] = times(2.0f, sum_b, broadcast(0.5f) * sum_a);
      o[3 * os] = times(2 * kB, difference_b, times(kA / 2, difference_a, m[5 * s]));
    }
  };

  // A y
  struct Gradient {
    static constexpr int kFrom = kOut, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* y, int s, Lanes* o, int os) {
      const Lanes y0 = y[0], y1 = y[s], y2 = y[2 * s], y3 = y[3 * s];
      o[0] = y0;
      const Lanes even_a = times(0.5f, y2, y0), odd_a = times(0.5f, y3, y1);
      o[os] = times(kA, odd_a, even_a);
      o[2 * os] = times(-kA, odd_a, even_a);
      const Lanes even_b = times(2.0f, y2, y0), odd_b = times(2.0f, y3, y1);
      o[3 * os] = times(kB, odd_b, even_b);
      o[4 * os] = times(-kB, odd_b, even_b);
      o[5 * os] = y3;
    }
  };

  // G g
  struct Weight {
    static constexpr int kFrom = kTaps, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* g, int s, Lanes* o, int os) {
      const Lanes g0 = g[0], g1 = g[s], g2 = g[2 * s];
      o[0] = g0;
      const Lanes even_a = broadcast(-2.0f / 3) * times(0.5f, g2, g0), odd_a = broadcast(-2.0f / 3 * kA) * g1;
      o[os] = even_a + odd_a;
      o[2 * os] = even_a - odd_a;
      const Lanes even_b = broadcast(1.0f / 6) * times(2.0f, g2, g0), odd_b = broadcast(kB / 6) * g1;
      o[3 * os] = even_b + odd_b;
      o[4 * os] = even_b - odd_b;
      o[5 * os] = g2;
    }
  };

  // G^T m
  struct WeightGradient {
    static constexpr int kFrom = kIn, kTo = kTaps;
    static inline __attribute__((always_inline)) void apply(const Lanes* m, int s, Lanes* o, int os) {
      const Lanes sum_a = m[s] + m[2 * s], difference_a = m[s] - m[2 * s];
      const Lanes sum_b = m[3 * s] + m[4 * s], difference_b = m[3 * s] - m[4 * s];
      o[0] = times(1.0f / 6, sum_b, times(-2.0f / 3, sum_a, m[0]));
      o[os] = times(kB / 6, difference_b, broadcast(-2.0f / 3 * kA) * difference_a);
      o[2 * os] = times(1.0f / 3, sum_b, times(-1.0f / 3, sum_a, m[5 * s]));
    }
  };
};

// f(std::integral_constant<int, i>()) for i < kCount, unrolled.
template <int kCount, typename F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// F(m, r) with the points +-Points::kValues and infinity, or without infinity, where a tap less is there.
//
// With the polynomials Q(y) = product of (y - q^2) over the other pairs, M(y) over all, and s = 1 / (2 p Q(p^2)):
//   B^T row of +-p   the coefficients of (x +- p) Q(x^2)           of infinity   those of M(x^2)
//   G row of +-p     s [+-1 p +-p^2 ...]                                         [... 0 1]
//   A^T column       [1 +-p p^2 ...]                                             [... 0 1]
template <typename Points, int m, int r, bool kInfinity = true>
struct Paired {
  static constexpr int kOut = m, kTaps = r, kPairs = Points::kValues.size(), kIn = 2 * kPairs + kInfinity;
  static_assert(m + r - 1 == kIn);

  static constexpr double point(int k) {
    return Points::kValues[k];
  }
  static constexpr double power(int k, int exponent) {
    return exponent == 0 ? 1.0 : point(k) * power(k, exponent - 1);
  }
  // The coefficients of M, or for k >= 0 of Q, the constant's first.
  static constexpr std::array<double, kPairs + 1> polynomial(int k) {
    std::array<double, kPairs + 1> c{1.0};
    int degree = 0;
    for (int j = 0; j < kPairs; ++j) {
      if (j != k) {
        ++degree;
        for (int i = degree; i >= 0; --i) {
          c[i] = (i > 0 ? c[i - 1] : 0.0) - power(j, 2) * (i < degree ? c[i] : 0.0);
        }
      }
    }
    return c;
  }
  static constexpr double scale(int k) {
    double value = 2.0 * point(k);
    for (int j = 0; j < kPairs; ++j) {
      value *= j == k ? 1.0 : power(k, 2) - power(j, 2);
    }
    return 1.0 / value;
  }
  // The same as floats, for the compiler to put into the instructions.
  template <int k, int exponent>
  static constexpr float kPower = static_cast<float>(power(k, exponent));
  template <int k, int exponent>
  static constexpr float kScaled = static_cast<float>(scale(k) * power(k, exponent));
  template <int k, int i>
  static constexpr float kCoefficient = static_cast<float>(polynomial(k)[i]);

  // B^T d
  struct Input {
    static constexpr int kFrom = kIn, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* d, int s, Lanes* o, int os) {
      unrolled<kPairs>([&](auto k) __attribute__((always_inline)) {
        Lanes even = d[(2 * kPairs - 2) * s], odd = d[(2 * kPairs - 1) * s];
        unrolled<kPairs - 1>([&](auto i) __attribute__((always_inline)) {
          even = times(kCoefficient<k, i>, d[2 * i * s], even);
          odd = times(kCoefficient<k, i>, d[(2 * i + 1) * s], odd);
        });
        o[2 * k * os] = times(kPower<k, 1>, even, odd);
        o[(2 * k + 1) * os] = times(-kPower<k, 1>, even, odd);
      });
      if constexpr (kInfinity) {
        Lanes sum = d[2 * kPairs * s];
        unrolled<kPairs>([&](auto i)
                             __attribute__((always_inline)) { sum = times(kCoefficient<-1, i>, d[2 * i * s], sum); });
        o[2 * kPairs * os] = sum;
      }
    }
  };

  // A^T m
  struct Output {
    static constexpr int kFrom = kIn, kTo = m;
    static inline __attribute__((always_inline)) void apply(const Lanes* x, int s, Lanes* o, int os) {
      Lanes sum[kPairs], difference[kPairs];
      unrolled<kPairs>([&](auto k) __attribute__((always_inline)) {
        sum[k] = x[2 * k * s] + x[(2 * k + 1) * s];
        difference[k] = x[2 * k * s] - x[(2 * k + 1) * s];
      });
      unrolled<m>([&](auto e) __attribute__((always_inline)) {
        const Lanes* of = e % 2 == 0 ? sum : difference;
        Lanes y = e == 0 ? of[0] : broadcast(kPower<0, e>) * of[0];
        unrolled<kPairs - 1>([&](auto k) __attribute__((always_inline)) {
          y = e == 0 ? y + of[k + 1] : times(kPower<k + 1, e>, of[k + 1], y);
        });
        if constexpr (kInfinity && e == m - 1) {
          y = y + x[2 * kPairs * s];
        }
        o[e * os] = y;
      });
    }
  };

  // A y
  struct Gradient {
    static constexpr int kFrom = m, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* y, int s, Lanes* o, int os) {
      unrolled<kPairs>([&](auto k) __attribute__((always_inline)) {
        Lanes even = y[0], odd = y[s];
        unrolled<m - 2>([&](auto i) __attribute__((always_inline)) {
          Lanes& part = i % 2 == 0 ? even : odd;
          part = times(kPower<k, (i + 2) / 2 * 2>, y[(i + 2) * s], part);
        });
        o[2 * k * os] = times(kPower<k, 1>, odd, even);
        o[(2 * k + 1) * os] = times(-kPower<k, 1>, odd, even);
      });
      if constexpr (kInfinity) {
        o[2 * kPairs * os] = y[(m - 1) * s];
      }
    }
  };

  // G g
  struct Weight {
    static constexpr int kFrom = r, kTo = kIn;
    static inline __attribute__((always_inline)) void apply(const Lanes* g, int s, Lanes* o, int os) {
      unrolled<kPairs>([&](auto k) __attribute__((always_inline)) {
        Lanes even = broadcast(kScaled<k, 0>) * g[0];
        if constexpr (r == 1) {
          o[2 * k * os] = even;
          o[(2 * k + 1) * os] = broadcast(-kScaled<k, 0>) * g[0];
        } else {
          const Lanes odd = broadcast(kScaled<k, 1>) * g[s];
          if constexpr (r == 3) {
            even = times(kScaled<k, 2>, g[2 * s], even);
          }
          o[2 * k * os] = odd + even;
          o[(2 * k + 1) * os] = odd - even;
        }
      });
      if constexpr (kInfinity) {
        o[2 * kPairs * os] = g[(r - 1) * s];
      }
    }
  };

  // G^T x
  struct WeightGradient {
    static constexpr int kFrom = kIn, kTo = r;
    static inline __attribute__((always_inline)) void apply(const Lanes* x, int s, Lanes* o, int os) {
      unrolled<r>([&](auto e) __attribute__((always_inline)) {
        Lanes g = kInfinity && e == r - 1 ? x[2 * kPairs * s] : Lanes{};
        unrolled<kPairs>([&](auto k) __attribute__((always_inline)) {
          const Lanes plus = x[2 * k * s], minus = x[(2 * k + 1) * s];
          g = times(kScaled<k, e>, e % 2 == 0 ? plus - minus : plus + minus, g);
        });
        o[e * os] = g;
      });
    }
  };
};

// --- both dimensions of a tile, a vector of channels

// load(i, j) gives element (i, j), store(i, j, v) takes point (i, j): Down goes along the columns, Across the rows.
template <typename Down, typename Across, typename Load, typename Store>
inline __attribute__((always_inline)) void transform_tile(const Load& load, const Store& store) {
  constexpr int height = Down::kFrom, width = Across::kFrom, to_height = Down::kTo, to_width = Across::kTo;
  Lanes half[to_height * width];
#pragma GCC unroll 8
  for (int j = 0; j < width; ++j) {
    Lanes column[height];
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      column[i] = load(i, j);
    }
    Down::apply(column, 1, half + j, width);
  }
#pragma GCC unroll 8
  for (int i = 0; i < to_height; ++i) {
    Lanes row[to_width];
    Across::apply(half + i * width, 1, row, 1);
#pragma GCC unroll 8
    for (int j = 0; j < to_width; ++j) {
      store(i, j, row[j]);
    }
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
