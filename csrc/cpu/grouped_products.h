// Products of convolutions in groups for processors with sixteen registers: as many as fourteen sums, a factor and a
// value. Compilers load values early and leave a sum in memory for it, for which every product then waits.
#pragma once

#include "grouped_layout.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

#if defined(CPU_CAPABILITY_AVX2)
constexpr int kRegisters = 16;
#else
constexpr int kRegisters = 32;
#endif

// sum += value * factor. Products stay in their order, and a factor that has no register is read where it lies.
[[gnu::always_inline]] inline void add_product(Octet& sum, Octet value, Octet factor) {
#if defined(CPU_CAPABILITY_AVX2)
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(value), "x"(factor));
#else
  sum = _mm256_fmadd_ps(value, factor, sum);
#endif
}
[[gnu::always_inline]] inline void add_product(Octet& sum, Octet value, const float* factor) {
#if defined(CPU_CAPABILITY_AVX2)
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(value), "m"(*reinterpret_cast<const __m256_u*>(factor)));
#else
  add_product(sum, value, load8(factor));
#endif
}

// The numbers of each half in the order that kOrder gives, two bits a lane.
template <int kOrder>
[[gnu::always_inline]] inline Octet permuted(const float* p) {
#if defined(CPU_CAPABILITY_AVX2)
  // Read again for each channel: to keep the vector takes a register that the sums need.
  Octet value;
  asm("vpermilps %2, %1, %0" : "=x"(value) : "m"(*reinterpret_cast<const __m256_u*>(p)), "i"(kOrder));
  return value;
#else
  return _mm256_permute_ps(load8(p), kOrder);
#endif
}

// Channel c of the group of each lane, out of a vector of channels. Loops over channels are unrolled: nothing is left
// of the choice.
template <Kind kKind>
[[gnu::always_inline]] inline Octet spread(const float* p, int c) {
  if constexpr (kKind != Kind::pairs) {
    return _mm256_broadcast_ss(p + c);
  }
  switch (c % 4) {
    case 0:
      return permuted<0x00>(p);
    case 1:
      return permuted<0x55>(p);
    case 2:
      return permuted<0xAA>(p);
    default:
      return permuted<0xFF>(p);
  }
}

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
