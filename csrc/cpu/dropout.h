// The keep bits of the dropout contract (csrc/common/philox.h), many at a time.
#pragma once

#include "../common/philox.h"
#include "lanes.h"

#include <algorithm>
#include <array>

namespace fastres {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

// Philox over vectors whose 64-bit lanes each hold one 32-bit value in their low half: the multiplication takes the low
// half and gives all 64 bits, so neither operand nor result needs a shuffle. High halves hold rubbish that nobody
// reads.
#if defined(CPU_CAPABILITY_AVX512)
struct Lanes64 {
  using type = __m512i;
  static constexpr int64_t counters = 8;
  static type set1(uint32_t v) {
    return _mm512_set1_epi64(v);
  }
  static type load(const uint64_t* p) {
    return _mm512_load_si512(p);
  }
  static type mul(type a, type b) {
    return _mm512_mul_epu32(a, b);
  }
  // By a shuffle: shifts share their execution port with multiplications.
  static type high(type a) {
    return _mm512_shuffle_epi32(a, _MM_PERM_DDBB);
  }
  static type xor2(type a, type b) {
    return _mm512_xor_si512(a, b);
  }
  static type xor3(type a, type b, type c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  }
};
#else
struct Lanes64 {
  using type = __m256i;
  static constexpr int64_t counters = 4;
  static type set1(uint32_t v) {
    return _mm256_set1_epi64x(v);
  }
  static type load(const uint64_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static type mul(type a, type b) {
    return _mm256_mul_epu32(a, b);
  }
  static type high(type a) {
    return _mm256_srli_epi64(a, 32);
  }
  static type xor2(type a, type b) {
    return _mm256_xor_si256(a, b);
  }
  static type xor3(type a, type b, type c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
};
#endif

// The keys of all rounds as vectors, computed once: the loops write bytes, which may alias anything, so that the
// compiler would compute them again for every vector.
struct RoundKeys {
  using Copies = std::array<uint64_t, Lanes64::counters>;
  alignas(64) std::array<Copies, kPhiloxRounds> a, b;

  explicit RoundKeys(PhiloxKey key) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      a[round].fill(key.a);
      b[round].fill(key.b);
      key.a += kPhiloxKeyA;
      key.b += kPhiloxKeyB;
    }
  }
};

struct WordLanes {
  Lanes64::type a, b, c, d;
};

// `index` holds whole 64-bit counters.
inline WordLanes philox_lanes(const RoundKeys& keys, Lanes64::type index) {
  using L = Lanes64;
  const L::type factor_a = L::set1(kPhiloxRoundA), factor_b = L::set1(kPhiloxRoundB);
  const auto key_a = [&](int round) { return L::load(keys.a[round].data()); };
  const auto key_b = [&](int round) { return L::load(keys.b[round].data()); };
  // The first round with c = d = 0, whose product is 0.
  const L::type first = L::mul(index, factor_a);
  L::type a = L::xor2(L::high(index), key_a(0)), b = L::set1(0), c = L::xor2(L::high(first), key_b(0)), d = first;
#pragma GCC unroll 10
  for (int round = 1; round < kPhiloxRounds; ++round) {
    const L::type pa = L::mul(a, factor_a), pb = L::mul(c, factor_b);
    a = L::xor3(L::high(pb), b, key_a(round));
    b = pb;
    c = L::xor3(L::high(pa), d, key_b(round));
    d = pa;
  }
  return {a, b, c, d};
}

#else

struct RoundKeys {
  explicit RoundKeys(PhiloxKey) {}
};

#endif

struct Dropout {
  PhiloxKey key;
  uint32_t threshold;
  RoundKeys rounds;

  Dropout(PhiloxKey seeded, uint32_t at_least) : key(seeded), threshold(at_least), rounds(seeded) {}
};

// The fewest elements that a vector of counters draws.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kLeastDrawn = 32;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kLeastDrawn = 16;
#else
constexpr int64_t kLeastDrawn = 4;
#endif
template <int64_t kWanted>
constexpr int64_t kDrawn = std::max(kWanted, kLeastDrawn);

// Elements first ... first + kDrawn - 1, one bit each; `first` is a multiple of 4.
template <int64_t kWanted>
inline uint32_t keep_bits_aligned(const Dropout& dropout, int64_t first) {
#if defined(CPU_CAPABILITY_AVX512)
  // Lane order such that the two interleavings below leave the elements in order.
  const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const WordLanes w = philox_lanes(dropout.rounds, _mm512_add_epi64(_mm512_set1_epi64(first / 4), lane));
  const __m512i ab = _mm512_mask_blend_epi32(0xAAAA, w.a, _mm512_slli_epi64(w.b, 32));
  const __m512i cd = _mm512_mask_blend_epi32(0xAAAA, w.c, _mm512_slli_epi64(w.d, 32));
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
  const uint32_t lo = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(ab, cd), threshold);
  const uint32_t hi = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(ab, cd), threshold);
  return lo | hi << 16;
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i threshold = _mm256_set1_epi32(static_cast<int>(dropout.threshold));
  uint32_t bits = 0;
  for (int half = 0; half < kDrawn<kWanted> / 16; ++half) {
    const WordLanes w = philox_lanes(dropout.rounds, _mm256_add_epi64(_mm256_set1_epi64x(first / 4 + 4 * half), lane));
    const __m256i ab = _mm256_blend_epi32(w.a, _mm256_slli_epi64(w.b, 32), 0xAA);
    const __m256i cd = _mm256_blend_epi32(w.c, _mm256_slli_epi64(w.d, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
    const __m256i lo = _mm256_cmpeq_epi32(_mm256_max_epu32(even, threshold), even);
    const __m256i hi = _mm256_cmpeq_epi32(_mm256_max_epu32(odd, threshold), odd);
    const uint32_t sixteen = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lo))) |
        static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hi))) << 8;
    bits |= sixteen << (16 * half);
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int counter = 0; counter < kDrawn<kWanted> / 4; ++counter) {
    const PhiloxWords w = philox_4x32(dropout.key, first / 4 + counter);
    for (int k = 0; k < 4; ++k) {
      bits |= static_cast<uint32_t>(w.word[k] >= dropout.threshold) << (4 * counter + k);
    }
  }
  return bits;
#endif
}

// `keep_bits` where `first` is no multiple of 4. Not inlined: it would hold twice the registers in every loop.
template <int64_t kWanted>
[[gnu::noinline]] uint32_t keep_bits_between(const Dropout& dropout, int64_t first) {
  constexpr int64_t drawn = kDrawn<kWanted>;
  const int64_t over = first % 4;
  const uint32_t bits = keep_bits_aligned<kWanted>(dropout, first - over);
  return bits >> over | keep_bits_aligned<kWanted>(dropout, first - over + drawn) << (drawn - over);
}

// Elements first ... first + kWanted - 1 of a run that is consecutive in N, H, W, C order. Bits beyond are of elements
// that follow, or 0.
template <int64_t kWanted = 32>
inline uint32_t keep_bits(const Dropout& dropout, int64_t first) {
  return first % 4 == 0 ? keep_bits_aligned<kWanted>(dropout, first) : keep_bits_between<kWanted>(dropout, first);
}

// Eight positions of four neighbouring channels in NCHW: bits[k] is the byte of channel c + k. Position j has the
// counter counter + j * step.
inline void keep_bytes_of_four_channels(const Dropout& dropout, int64_t counter, int64_t step, uint8_t bits[4]) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i lane = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(step));
  const WordLanes w = philox_lanes(dropout.rounds, _mm512_add_epi64(_mm512_set1_epi64(counter), lane));
  const __m256i threshold = _mm256_set1_epi32(static_cast<int>(dropout.threshold));
  const __m512i words[4] = {w.a, w.b, w.c, w.d};
  for (int k = 0; k < 4; ++k) {
    bits[k] = _mm256_cmpge_epu32_mask(_mm512_cvtepi64_epi32(words[k]), threshold);
  }
#else
  for (int k = 0; k < 4; ++k) {
    bits[k] = 0;
  }
#if defined(CPU_CAPABILITY_AVX2)
  const __m256i threshold = _mm256_set1_epi32(static_cast<int>(dropout.threshold));
  const __m256i lane = _mm256_setr_epi64x(0, step, 2 * step, 3 * step);
  for (int half = 0; half < 2; ++half) {
    const __m256i first = _mm256_set1_epi64x(counter + 4 * half * step);
    const WordLanes w = philox_lanes(dropout.rounds, _mm256_add_epi64(first, lane));
    const __m256i words[4] = {w.a, w.b, w.c, w.d};
    for (int k = 0; k < 4; ++k) {
      // The word is the low half of its lane: the sign that movemask_pd reads is the high half's.
      const __m256i word = _mm256_slli_epi64(words[k], 32);
      const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(word, threshold), word);
      bits[k] |= static_cast<uint8_t>(_mm256_movemask_pd(_mm256_castsi256_pd(kept)) << (4 * half));
    }
  }
#else
  for (int j = 0; j < 8; ++j) {
    const PhiloxWords w = philox_4x32(dropout.key, counter + j * step);
    for (int k = 0; k < 4; ++k) {
      bits[k] |= static_cast<uint8_t>(w.word[k] >= dropout.threshold) << j;
    }
  }
#endif
#endif
}

} // namespace CPU_CAPABILITY
} // namespace fastres
