// Whether bfloat16 numbers are multiplied in pairs, by the dot products of AVX512_BF16.
#pragma once

#include <cstdlib>
#include <string_view>

namespace fastres {
inline namespace CPU_CAPABILITY {

// Where the processor has them, which one with AVX-512 need not, and takes as long for one as for a multiply-add. AMD's
// do; Intel's take twice as long, and rounding comes on top.
inline bool multiplies_pairs() {
#if defined(CPU_CAPABILITY_AVX512)
  static const bool chosen = [] {
    const char* asked = std::getenv("FASTRES_BF16_PRODUCTS");
    const std::string_view name = asked != nullptr ? asked : "";
    const bool wanted = name == "pairs" || (name != "float32" && __builtin_cpu_is("amd"));
    return wanted && __builtin_cpu_supports("avx512bf16");
  }();
  return chosen;
#else
  return false;
#endif
}

} // namespace CPU_CAPABILITY
} // namespace fastres
