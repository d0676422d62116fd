// exp, expm1, tanh and erf of vectors. at::vec takes them from a library inside torch that is no part of its stable
// ABI.
//
// exp(z) = 2^n exp(r), n = round(z / log 2), |r| <= log(2) / 2, where eight terms of exp's series are enough for
// float32. float64, which serves comparisons and not speed, and float32 without AVX2 go lane by lane through the C
// library.
#pragma once

#include "lanes.h"

#include <cmath>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace activations {

template <typename A, typename F>
inline Vec<A> lane_by_lane(const Vec<A>& z, const F& f) {
  alignas(64) A lanes[Vec<A>::size()];
  z.store(lanes);
  for (A& lane : lanes) {
    lane = f(lane);
  }
  return Vec<A>::loadu(lanes);
}

template <typename A>
inline Vec<A> exp(const Vec<A>& z) {
  return lane_by_lane(z, [](A lane) { return std::exp(lane); });
}
template <typename A>
inline Vec<A> expm1(const Vec<A>& z) {
  return lane_by_lane(z, [](A lane) { return std::expm1(lane); });
}
template <typename A>
inline Vec<A> tanh(const Vec<A>& z) {
  return lane_by_lane(z, [](A lane) { return std::tanh(lane); });
}
template <typename A>
inline Vec<A> erf(const Vec<A>& z) {
  return lane_by_lane(z, [](A lane) { return std::erf(lane); });
}
template <typename A>
inline Vec<A> sigmoid(const Vec<A>& z) {
  const Vec<A> one(1);
  return one / (one + exp(z.neg()));
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

// 2^n for whole numbers -126 <= n <= 127.
inline Vec<float> power_of_two(const Vec<float>& n) {
  constexpr int kBias = 127, kFraction = 23;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(kBias));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, kFraction));
#else
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(kBias));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, kFraction));
#endif
}

// z = n log 2 + r; n is whole.
struct Reduced {
  Vec<float> n, r;

  explicit Reduced(const Vec<float>& z) : n((z * Vec<float>(1.44269504f)).round()) {
    // log 2 as the sum of two numbers: n times the first is exact in a fused multiply-add.
    r = at::vec::fmadd(n, Vec<float>(1.90465421e-9f), at::vec::fmadd(n, Vec<float>(-0.693147182f), z));
  }

  // exp(r) - 1
  Vec<float> series() const {
    Vec<float> sum(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2}) {
      sum = at::vec::fmadd(sum, r, Vec<float>(factor));
    }
    return at::vec::fmadd(sum * r, r, r);
  }
};

inline Vec<float> exp(const Vec<float>& z) {
  // Beyond these the result is 0 or infinite in any case. NaN stays.
  const Reduced at(at::vec::clamp(z, Vec<float>(-104.0f), Vec<float>(89.0f)));
  // 2^n in two steps: the result may be subnormal, and 2^128 is no number.
  const Vec<float> half = (at.n * Vec<float>(0.5f)).round();
  return (at.series() + Vec<float>(1.0f)) * power_of_two(half) * power_of_two(at.n - half);
}

// 1 / (1 + exp(-z)); 0 where it is below the normal numbers.
inline Vec<float> sigmoid(const Vec<float>& z) {
  constexpr float kLeast = -87.0f;
  const Vec<float> one(1.0f);
  const Reduced at(at::vec::clamp(z.neg(), Vec<float>(kLeast), Vec<float>(-kLeast)));
  // One power of two is enough in this range.
  const Vec<float> e = at::vec::fmadd(at.series(), power_of_two(at.n), power_of_two(at.n));
  return Vec<float>::blendv(one / (one + e), Vec<float>(0.0f), z < Vec<float>(kLeast));
}

// For z <= 0; that of 0 for others. Small results are as exact as large ones.
inline Vec<float> expm1(const Vec<float>& z) {
  // Below -20 it rounds to -1.
  const Reduced at(at::vec::clamp(z, Vec<float>(-20.0f), Vec<float>(0.0f)));
  const Vec<float> scale = power_of_two(at.n);
  return at::vec::fmadd(scale, at.series(), scale - Vec<float>(1.0f));
}

inline Vec<float> tanh(const Vec<float>& z) {
  const Vec<float> e = expm1(z.abs() * Vec<float>(-2.0f));
  const Vec<float> magnitude = (Vec<float>(0.0f) - e) / (e + Vec<float>(2.0f));
  return Vec<float>::blendv(magnitude, magnitude.neg(), z < Vec<float>(0.0f));
}

// Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7.
inline Vec<float> erf(const Vec<float>& z) {
  const Vec<float> one(1.0f), t = one / at::vec::fmadd(Vec<float>(0.3275911f), z.abs(), one);
  Vec<float> sum(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    sum = at::vec::fmadd(sum, t, Vec<float>(factor));
  }
  const Vec<float> magnitude = one - sum * t * exp((z * z).neg());
  return Vec<float>::blendv(magnitude, magnitude.neg(), z < Vec<float>(0.0f));
}

#endif

} // namespace activations
} // namespace CPU_CAPABILITY
} // namespace fastres
