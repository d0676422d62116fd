// Vectors of floats: loads, stores, streaming stores and transposes, as the convolutions' inner loops use them.
//
// lanes.h has the same for pairs of vectors of any dtype, which pointwise loops use. Here the registers are plain:
// compilers keep an array of __m512 in registers throughout a loop, and an array of at::vec's classes not.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

#if defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512;
inline Lanes broadcast(float value) {
  return _mm512_set1_ps(value);
}
inline Lanes load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, Lanes v) {
  _mm512_storeu_ps(p, v);
}
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return _mm512_fmadd_ps(x, y, z);
}
// max(least, v), NaN where v is one
inline Lanes not_below(Lanes least, Lanes v) {
  return _mm512_max_ps(least, v);
}
#else
using Lanes = __m256;
inline Lanes broadcast(float value) {
  return _mm256_set1_ps(value);
}
inline Lanes load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, Lanes v) {
  _mm256_storeu_ps(p, v);
}
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return _mm256_fmadd_ps(x, y, z);
}
inline Lanes not_below(Lanes least, Lanes v) {
  return _mm256_max_ps(least, v);
}
#endif

// Lanes from `count` on are zero.
inline Lanes load(const float* p, int64_t count) {
  return Vec<float>::loadu(p, count);
}
inline void store(float* p, Lanes v, int64_t count) {
  Vec<float>(v).store(p, static_cast<int>(count));
}

// bfloat16 is a storage format here: values are float32 in registers.
inline Lanes load(const at::BFloat16* p) {
  Lanes v;
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), v);
#else
  at::vec::cvtbf16_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), v);
#endif
  return v;
}
inline void store(at::BFloat16* p, Lanes v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(v));
#endif
}
inline Lanes load(const at::BFloat16* p, int64_t count) {
  at::BFloat16 lanes[Vec<float>::size()] = {};
  std::copy(p, p + count, lanes);
  return load(lanes);
}
inline void store(at::BFloat16* p, Lanes v, int64_t count) {
  at::BFloat16 lanes[Vec<float>::size()];
  store(lanes, v);
  std::copy(lanes, lanes + count, p);
}

// The value as a load would give it back after a store to T.
template <typename T>
inline Lanes rounded(Lanes v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    Lanes back;
    at::vec::cvtbf16_fp32(at::vec::cvtfp32_bf16(v), back);
    return back;
  }
}

constexpr int64_t kWidth = Vec<float>::size();

inline int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

// `count` is a compile-time constant where the vector is whole.
template <typename T, typename Count>
inline Lanes load_counted(const T* p, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return load(p, count);
  } else {
    return load(p);
  }
}
template <typename T, typename Count>
inline void store_counted(T* p, Lanes v, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    store(p, v, count);
  } else {
    store(p, v);
  }
}

// A store of an output. Past the caches where `streaming`, which may be where every vector fills a line of the cache.
template <typename T, typename Count>
inline void put(T* p, Lanes v, Count count, bool streaming) {
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<Count, int64_t>) {
    if (streaming) {
      stream_vector(p, v);
      return;
    }
  }
  store_counted(p, v, count);
}

// --- sums and transposes

inline __m128 fold(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#if defined(CPU_CAPABILITY_AVX512)
inline __m256 half_folded(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#else
inline __m256 half_folded(__m256 v) {
  return v;
}
#endif

inline float horizontal_sum(Lanes v) {
  const __m128 sum = fold(half_folded(v));
  const __m128 pairs = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

// to[i][k] = from[k][i] for a vector of outputs k, their rows `stride` apart, and `count` vectors of i.
inline void transpose_rows(const float* from, int64_t stride, int64_t count, float* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) {
    at::vec::transpose_mxn<float, kWidth, kWidth>(from + i * kWidth, stride, to + i * kWidth * to_row, to_row);
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
