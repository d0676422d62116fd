// Winograd's minimal filtering F(4x4, 3x3): the transforms of input, weights and output, and the range that they serve.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A      d: 6x6 input, g: 3x3 weights, Y: 4x4 outputs, *: element by element
//
// 36 multiplications give 16 outputs, where the direct sum takes 144. Source: Lavin and Gray 2016, "Fast algorithms for
// convolutional neural networks", sections 4.1 and 4.3; Toom and Cook's construction from points 0, +-a, +-b and
// infinity. Here a = sqrt(1/2) and b = sqrt(2): a * b = 1 keeps every matrix entry between 1/6 and 2.83, and the error
// is a third to a quarter of that with the points 1 and 2 (docs/convolution.md has the figures) for as many operations.
//
//   B^T rows   [1 0 -5/2 0 1 0]   [0 -+2a -2 +-a 1 0]   [0 -+b/2 -1/2 +-b 1 0]   [0 1 0 -5/2 0 1]
//   G rows     [1 0 0]            [1 +-a 1/2] / -3/2     [1 +-b 2] / 6            [0 0 1]
//   A^T rows   [1 1 1 1 1 0]      [0 a -a b -b 0]        [0 1/2 1/2 2 2 0]        [0 a/2 -a/2 2b -2b 1]
//
// Each of the 36 points of what is transformed is a plane of its own, laid out as the products read it (gemm.h).
//
// The transforms mix the values of a tile, so that rounding errors of its largest spread to all of its outputs, and
// infinities and NaN with them. A tile beyond the transforms' range (within_range) is summed directly.
#pragma once

#include "packed_weights.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;

// --- one dimension of each transform; input and output are strided arrays in registers

constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

inline Lanes times(float factor, Lanes x, Lanes plus) {
  return multiply_add(broadcast(factor), x, plus);
}

// B^T d
struct InputTransform {
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
struct OutputTransform {
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
struct GradientTransform {
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
struct WeightTransform {
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
struct WeightGradientTransform {
  static constexpr int kFrom = kIn, kTo = kTaps;
  static inline __attribute__((always_inline)) void apply(const Lanes* m, int s, Lanes* o, int os) {
    const Lanes sum_a = m[s] + m[2 * s], difference_a = m[s] - m[2 * s];
    const Lanes sum_b = m[3 * s] + m[4 * s], difference_b = m[3 * s] - m[4 * s];
    o[0] = times(1.0f / 6, sum_b, times(-2.0f / 3, sum_a, m[0]));
    o[os] = times(kB / 6, difference_b, broadcast(-2.0f / 3 * kA) * difference_a);
    o[2 * os] = times(1.0f / 3, sum_b, times(-1.0f / 3, sum_a, m[5 * s]));
  }
};

// Both dimensions of one tile, a vector of channels: load(i) gives element i of the square, store(i, v) stores point i.
template <typename Transform, typename Load, typename Store>
inline __attribute__((always_inline)) void transform_square(const Load& load, const Store& store) {
  constexpr int from = Transform::kFrom, to = Transform::kTo;
  Lanes half[to * from];
#pragma GCC unroll 6
  for (int j = 0; j < from; ++j) {
    Lanes column[from];
#pragma GCC unroll 6
    for (int i = 0; i < from; ++i) {
      column[i] = load(i * from + j);
    }
    Transform::apply(column, 1, half + j, from);
  }
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i) {
    Lanes row[to];
    Transform::apply(half + i * from, 1, row, 1);
#pragma GCC unroll 6
    for (int j = 0; j < to; ++j) {
      store(i * to + j, row[j]);
    }
  }
}

// --- the transforms' range

// A tile's largest admissible ratio of all its inputs' sum of squares to that of one of its own 2x2 blocks, and the
// largest sum of squares, of a tile or of the weights. docs/convolution.md, "Range", derives what they promise.
constexpr float kEnergyRatio = 4096.0f;
constexpr float kMaxEnergy = 0x1p88f;

// The sums of squares of a tile, over channels: of the four 2x2 blocks of pixels that its outputs lie on, and of the
// pixels around them. The 3x3 inputs of every output hold one of the blocks, and so do the inputs of every tap of the
// weight gradient.
struct Energy {
  Lanes block[4] = {}, around = {};

  void operator+=(const Energy& other) {
    for (int i = 0; i < 4; ++i) {
      block[i] = block[i] + other.block[i];
    }
    around = around + other.around;
  }
};

// Whether a tile is within the transforms' range: no value is infinite or NaN, and none so large that its rounding
// errors would show in outputs that do not read it. Blocks of zeros do not count, and with them those outside the
// image.
inline bool within_range(const Energy& energy) {
  const auto& b = energy.block;
  const __m128 blocks = fold(_mm256_hadd_ps(
      _mm256_hadd_ps(half_folded(b[0]), half_folded(b[1])), _mm256_hadd_ps(half_folded(b[2]), half_folded(b[3]))));
  __m128 sum = _mm_add_ps(blocks, fold(half_folded(energy.around)));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  const float all = _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  const __m128 none = _mm_cmpeq_ps(blocks, _mm_setzero_ps());
  __m128 least = _mm_blendv_ps(blocks, _mm_set1_ps(std::numeric_limits<float>::infinity()), none);
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ss(least, _mm_movehdup_ps(least));
  return all <= kMaxEnergy && all <= kEnergyRatio * _mm_cvtss_f32(least); // false for NaN
}

// --- weights

// to: 36 planes of [kColumns / kPanel][inputs padded to kWidth][kPanel], for output channels from ... from + kColumns
// - 1, of which inputs begin ... end - 1, multiples of kWidth, are written; what lies outside the kernel is zero.
// Returns the sum of squares of these weights.
inline float transform_weights(
    const Kernel& kernel,
    int64_t from,
    int64_t begin,
    int64_t end,
    float* to,
    int64_t plane) {
  constexpr int taps = kTaps * kTaps;
  alignas(64) float gathered[kWidth * taps * kColumns];
  const int64_t high = high_vector(round_up(kernel.inputs, kWidth));
  Lanes energy{};
  // weight(half, i): tap i of outputs from + half ... and input c
  const auto transform = [&](int64_t c, const auto& weight) __attribute__((always_inline)) {
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      float* out = to + c * kPanel + (half == 0 ? 0 : high);
      Lanes part{};
      transform_square<WeightTransform>(
          [&](int i) __attribute__((always_inline)) {
            const Lanes v = load(weight(half, i));
            part = multiply_add(v, v, part);
            return v;
          },
          [&](int i, Lanes v) __attribute__((always_inline)) { store(out + i * plane, v); });
      energy = energy + part;
    }
  };
  for (int64_t c0 = begin; c0 < end; c0 += kWidth) {
    if (kernel.is_packed()) {
      for (int64_t c = c0; c < c0 + kWidth; ++c) {
        transform(c, [&](int64_t half, int i) { return kernel.at(from + half, c) + kernel.tap[i]; });
      }
      continue;
    }
    gather_weights(kernel, from, c0, gathered);
    for (int64_t c = 0; c < kWidth; ++c) {
      transform(c0 + c, [&](int64_t half, int i) { return gathered + (c * taps + i) * kColumns + half; });
    }
  }
  return horizontal_sum(energy);
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
