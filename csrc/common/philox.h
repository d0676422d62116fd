// Philox-4x32-10 and the dropout contract.
//
// Element i (linear index in N, H, W, C order, whatever the memory layout) takes word i % 4 of
//   philox(key = (low, high word of seed), counter = (i / 4, 0, 0, 0))
// and is kept where that word, as an unsigned number, is at least round(p * 2^32).
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRES_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTRES_HOST_DEVICE inline
#endif

namespace fastres {

constexpr uint32_t kPhiloxRoundA = 0xD2511F53u;
constexpr uint32_t kPhiloxRoundB = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyA = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyB = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t a;
  uint32_t b;
};

struct PhiloxWords {
  uint32_t word[4];
};

FASTRES_HOST_DEVICE PhiloxKey philox_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

FASTRES_HOST_DEVICE PhiloxWords philox_4x32(PhiloxKey key, uint64_t index) {
  uint32_t a = static_cast<uint32_t>(index), b = static_cast<uint32_t>(index >> 32), c = 0, d = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t pa = static_cast<uint64_t>(a) * kPhiloxRoundA;
    const uint64_t pb = static_cast<uint64_t>(c) * kPhiloxRoundB;
    a = static_cast<uint32_t>(pb >> 32) ^ b ^ key.a;
    b = static_cast<uint32_t>(pb);
    c = static_cast<uint32_t>(pa >> 32) ^ d ^ key.b;
    d = static_cast<uint32_t>(pa);
    key.a += kPhiloxKeyA;
    key.b += kPhiloxKeyB;
  }
  return {{a, b, c, d}};
}

// Kept where word >= threshold. 2^32 itself does not fit and is what a p within 2^-33 of 1 would round to.
FASTRES_HOST_DEVICE uint32_t dropout_threshold(double p) {
  const double scaled = nearbyint(p * 4294967296.0);
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

} // namespace fastres
