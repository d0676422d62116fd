// Vectors of floats: loads, stores, streaming stores and transposes, as the convolutions' inner loops use them.
//
// lanes.h has the same for pairs of vectors of any dtype, which pointwise loops use. Here the registers are plain:
// compilers keep an array of __m512 in registers throughout a loop, and an array of at::vec's classes not.
#pragma once

#include "lanes.h"
#include "pairs.h"

#include <algorithm>
#include <bit>
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
inline Lanes load(const BFloat16* p) {
  Lanes v;
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), v);
#else
  at::vec::cvtbf16_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), v);
#endif
  return v;
}
inline void store(BFloat16* p, Lanes v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(v));
#endif
}
inline Lanes load(const BFloat16* p, int64_t count) {
  BFloat16 lanes[Vec<float>::size()] = {};
  std::copy(p, p + count, lanes);
  return load(lanes);
}
inline void store(BFloat16* p, Lanes v, int64_t count) {
  BFloat16 lanes[Vec<float>::size()];
  store(lanes, v);
  std::copy(lanes, lanes + count, p);
}

// Up to `count` lanes of a row of bfloat16, as they are.
#if defined(CPU_CAPABILITY_AVX512)
inline __m256i load_raw(const BFloat16* p, int64_t count) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
}

// Two bfloat16 numbers that lie together: what a lane of AVX512_BF16's dot products takes.
struct BFloat16Pair {
  BFloat16 first, second;
};
inline __m512i broadcast(BFloat16Pair pair) {
  return _mm512_set1_epi32(std::bit_cast<int32_t>(pair));
}
inline __m512i load(const BFloat16Pair* p) {
  return _mm512_loadu_si512(p);
}
inline void store(BFloat16Pair* p, __m512i v) {
  _mm512_storeu_si512(p, v);
}
inline void store(BFloat16Pair* p, __m512i v, int64_t count) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << count) - 1), v);
}
// z + both products of every pair. In assembly, for a compiler that may use AVX512_BF16 would use it everywhere.
inline Lanes multiply_add(__m512i x, __m512i y, Lanes z) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(z) : "v"(x), "v"(y));
  return z;
}
// Pairs of the lanes of two rows.
inline __m512i paired(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
// The same of rows that are rounded. Denormal numbers become zero, which the products take them for anyway.
inline __m512i paired(Lanes first, Lanes second) {
  __m256i low, high;
  asm("vcvtneps2bf16 %1, %0" : "=v"(low) : "v"(first));
  asm("vcvtneps2bf16 %1, %0" : "=v"(high) : "v"(second));
  return paired(low, high);
}
#endif

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

// to[i][k] = from[k][i] for a vector of either.
#if defined(CPU_CAPABILITY_AVX512)
// At each step, registers that are apart by a power of two exchange pieces: numbers, pairs of them, and lanes of four.
inline void transpose_square(const float* from, int64_t stride, float* to, int64_t to_row) {
  const auto pairs = [](__m512 v) { return _mm512_castps_pd(v); };
  const auto single = [](__m512d v) { return _mm512_castpd_ps(v); };
  __m512 a[kWidth], b[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    a[i] = _mm512_loadu_ps(from + i * stride);
  }
  for (int i = 0; i < kWidth; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 i + j], lane l: column 4 l + j of rows 4 i ... 4 i + 3
  for (int i = 0; i < kWidth; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = single(_mm512_unpacklo_pd(pairs(b[i + j]), pairs(b[i + j + 2])));
      a[i + 2 * j + 1] = single(_mm512_unpackhi_pd(pairs(b[i + j]), pairs(b[i + j + 2])));
    }
  }
  constexpr int kEven = 0x88, kOdd = 0xdd; // lanes 0 and 2 of either register, or 1 and 3
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      b[8 * i + j] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + j + 4], kEven);
      b[8 * i + j + 4] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + j + 4], kOdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_ps(to + j * to_row, _mm512_shuffle_f32x4(b[j], b[j + 8], kEven));
    _mm512_storeu_ps(to + (j + 8) * to_row, _mm512_shuffle_f32x4(b[j], b[j + 8], kOdd));
  }
}
#else
inline void transpose_square(const float* from, int64_t stride, float* to, int64_t to_row) {
  at::vec::transpose_mxn<float, kWidth, kWidth>(from, stride, to, to_row);
}
#endif

// to[i][k] = from[k][i] for a vector of outputs k, their rows `stride` apart, and `count` vectors of i.
inline void transpose_rows(const float* from, int64_t stride, int64_t count, float* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) {
    transpose_square(from + i * kWidth, stride, to + i * kWidth * to_row, to_row);
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
