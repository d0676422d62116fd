// Vector lanes: loading any dtype as pairs of accumulator vectors, and lanes <-> bits.
//
// The unit of every loop is a Pair, two vectors of the accumulator type: that is one vector of a 16-bit dtype, and a
// whole number of bytes of the bit mask for every dtype and capability.
#pragma once

#include "tensor.h"

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace fastres {
// One inline namespace a capability, as at::vec has: no inline function of one reaches another.
inline namespace CPU_CAPABILITY {

// The accumulator's type.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
using Vec = at::vec::Vectorized<A>;

template <typename A>
struct Pair {
  Vec<A> lo, hi;

  static constexpr int64_t size() {
    return 2 * Vec<A>::size();
  }
  static Pair fill(A value) {
    return {Vec<A>(value), Vec<A>(value)};
  }
};

template <typename A>
inline Pair<A> operator+(const Pair<A>& x, const Pair<A>& y) {
  return {x.lo + y.lo, x.hi + y.hi};
}
template <typename A>
inline Pair<A> operator-(const Pair<A>& x, const Pair<A>& y) {
  return {x.lo - y.lo, x.hi - y.hi};
}
template <typename A>
inline Pair<A> operator*(const Pair<A>& x, const Pair<A>& y) {
  return {x.lo * y.lo, x.hi * y.hi};
}
template <typename A>
inline Pair<A> fmadd(const Pair<A>& x, const Pair<A>& y, const Pair<A>& z) {
  return {at::vec::fmadd(x.lo, y.lo, z.lo), at::vec::fmadd(x.hi, y.hi, z.hi)};
}

// Calls f(k, count) for every unit of a row; count is a compile-time constant for all but the last.
template <typename A, typename F>
inline void for_each_unit(int64_t inner, const F& f) {
  constexpr int64_t width = Pair<A>::size();
  int64_t k = 0;
  for (; k + width <= inner; k += width) {
    f(k, std::integral_constant<int64_t, width>());
  }
  if (k < inner) {
    f(k, inner - k);
  }
}

// --- load and store

// Lanes from `count` on are zero.
template <typename T>
inline Pair<acc_t<T>> load_lanes(const T* p, int64_t count = Pair<acc_t<T>>::size()) {
  using A = acc_t<T>;
  constexpr int64_t width = Vec<A>::size();
  if constexpr (std::is_same_v<T, A>) {
    if (count == 2 * width) {
      return {Vec<A>::loadu(p), Vec<A>::loadu(p + width)};
    }
    if (count > width) {
      return {Vec<A>::loadu(p), Vec<A>::loadu(p + width, count - width)};
    }
    return {Vec<A>::loadu(p, count), Vec<A>(A(0))};
  } else {
    static_assert(at::vec::Vectorized<T>::size() == 2 * width);
    using V = at::vec::Vectorized<T>;
    auto [lo, hi] = at::vec::convert_to_float<T>(count == 2 * width ? V::loadu(p) : V::loadu(p, count));
    return {lo, hi};
  }
}

template <typename T>
inline void store_lanes(T* p, const Pair<acc_t<T>>& x, int64_t count = Pair<acc_t<T>>::size()) {
  using A = acc_t<T>;
  constexpr int64_t width = Vec<A>::size();
  if constexpr (std::is_same_v<T, A>) {
    if (count == 2 * width) {
      x.lo.store(p);
      x.hi.store(p + width);
    } else if (count > width) {
      x.lo.store(p);
      x.hi.store(p + width, count - width);
    } else {
      x.lo.store(p, count);
    }
  } else {
    at::vec::convert_from_float<T>(x.lo, x.hi).store(p, count);
  }
}

// A store past the caches; p is aligned to the vector. Ordinary where the processor has none.
template <typename V>
inline void stream_vector(void* p, const V& v) {
#if defined(CPU_CAPABILITY_AVX512)
  static_assert(sizeof(V) == 64);
  __m512i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  static_assert(sizeof(V) == 32);
  __m256i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#else
  v.store(p);
#endif
}

template <typename T>
inline void stream(T* p, const Pair<acc_t<T>>& x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    stream_vector(p, x.lo);
    stream_vector(p + Vec<T>::size(), x.hi);
  } else {
    stream_vector(p, at::vec::convert_from_float<T>(x.lo, x.hi));
  }
}

// Streaming stores are weakly ordered: every thread fences its own before others may read.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// --- prefetch
//
// A pass over several tensors has more streams than the hardware's prefetchers follow, and these fetch no lines to be
// written: the loops ask for both, into the L2 cache. The addresses may lie beyond a tensor's end.

constexpr int64_t kAheadBytes = 8 * 1024;

// Of the unit that lies kAheadBytes behind that at p.
template <typename T>
inline void fetch_ahead(const T* p) {
  constexpr int64_t line = 64, bytes = Pair<acc_t<T>>::size() * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < bytes; at += line) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAheadBytes + at), 0, 2);
  }
}

// --- lanes <-> bits

// Bit k: lane k is not <= 0, which is where ReLU passes (NaN included).
inline uint32_t passing_lanes(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return static_cast<uint16_t>(~_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LE_OQ));
#elif defined(CPU_CAPABILITY_AVX2)
  return static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LE_OQ)));
#else
  alignas(64) float lanes[Vec<float>::size()];
  x.store(lanes);
  uint32_t bits = 0;
  for (int k = 0; k < Vec<float>::size(); ++k) {
    bits |= static_cast<uint32_t>(!(lanes[k] <= 0)) << k;
  }
  return bits;
#endif
}

inline uint32_t passing_lanes(const Vec<double>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return static_cast<uint8_t>(~_mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_LE_OQ));
#elif defined(CPU_CAPABILITY_AVX2)
  return ~_mm256_movemask_pd(_mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_LE_OQ)) & 0xFu;
#else
  alignas(64) double lanes[Vec<double>::size()];
  x.store(lanes);
  uint32_t bits = 0;
  for (int k = 0; k < Vec<double>::size(); ++k) {
    bits |= static_cast<uint32_t>(!(lanes[k] <= 0)) << k;
  }
  return bits;
#endif
}

// The bits of a comparison's result, whose lanes are all ones or all zeros.
inline uint32_t lanes_of_mask(const Vec<float>& mask) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_movepi32_mask(_mm512_castps_si512(mask));
#elif defined(CPU_CAPABILITY_AVX2)
  return static_cast<uint8_t>(_mm256_movemask_ps(mask));
#else
  return passing_lanes(Vec<float>::blendv(Vec<float>(0.0f), Vec<float>(1.0f), mask));
#endif
}

inline uint32_t lanes_of_mask(const Vec<double>& mask) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_movepi64_mask(_mm512_castpd_si512(mask));
#elif defined(CPU_CAPABILITY_AVX2)
  return static_cast<uint8_t>(_mm256_movemask_pd(mask));
#else
  return passing_lanes(Vec<double>::blendv(Vec<double>(0.0), Vec<double>(1.0), mask));
#endif
}

// x where the lane's bit is set, 0 elsewhere.
inline Vec<float> select_lanes(const Vec<float>& x, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
#else
  alignas(64) float lanes[Vec<float>::size()];
  x.store(lanes);
  for (int k = 0; k < Vec<float>::size(); ++k) {
    lanes[k] = (bits >> k) & 1 ? lanes[k] : 0.0f;
  }
  return Vec<float>::loadu(lanes);
#endif
}

inline Vec<double> select_lanes(const Vec<double>& x, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lane);
  return _mm256_and_pd(x, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane)));
#else
  alignas(64) double lanes[Vec<double>::size()];
  x.store(lanes);
  for (int k = 0; k < Vec<double>::size(); ++k) {
    lanes[k] = (bits >> k) & 1 ? lanes[k] : 0.0;
  }
  return Vec<double>::loadu(lanes);
#endif
}

// x where z is not <= 0 (NaN included), 0 elsewhere: ReLU's gradient.
template <typename A>
inline Vec<A> gate(const Vec<A>& x, const Vec<A>& z) {
#if defined(CPU_CAPABILITY_AVX512)
  return select_lanes(x, passing_lanes(z));
#else
  return Vec<A>::blendv(x, Vec<A>(A(0)), z <= Vec<A>(A(0)));
#endif
}

// ReLU that lets NaN through, as PyTorch's does.
template <typename A>
inline Vec<A> rectify(const Vec<A>& x) {
  return gate(x, x);
}

template <typename A>
inline Pair<A> rectify(const Pair<A>& x) {
  return {rectify(x.lo), rectify(x.hi)};
}

template <typename A>
inline uint32_t passing_lanes(const Pair<A>& x) {
  return passing_lanes(x.lo) | passing_lanes(x.hi) << Vec<A>::size();
}

template <typename A>
inline Pair<A> select_lanes(const Pair<A>& x, uint32_t bits) {
  return {select_lanes(x.lo, bits), select_lanes(x.hi, bits >> Vec<A>::size())};
}

// `count` bits of the mask, which start on a byte.
inline uint32_t load_bits(const uint8_t* p, int64_t count) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, (count + 7) / 8);
  return bits;
}

inline void store_bits(uint8_t* p, uint32_t bits, int64_t count) {
  if (count < 32) {
    bits &= (1u << count) - 1;
  }
  std::memcpy(p, &bits, (count + 7) / 8);
}

} // namespace CPU_CAPABILITY
} // namespace fastres
