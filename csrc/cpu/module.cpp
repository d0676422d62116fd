// What a CPU module says of itself, and the allocator's settings: C functions, for ctypes (fastres/_library.py).
// The operators' kernels register themselves in the other files, through FASTRES_KERNELS.
#include "pairs.h"
#include "tensor.h"

#include <torch/headeronly/version.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#define FASTRES_STRING_OF(x) #x
#define FASTRES_STRING(x) FASTRES_STRING_OF(x)
#define FASTRES_EXPORT extern "C" [[gnu::visibility("default")]]

#ifdef __clang__
#define FASTRES_COMPILER __VERSION__
#else
#define FASTRES_COMPILER "GCC " __VERSION__
#endif

namespace {

// glibc maps buffers above a threshold afresh and gives them back at every free, so that every use pays for the page
// faults. With the thresholds out of reach it keeps what was freed and hands it out again.
bool reuse_memory(bool enabled) {
#ifdef __GLIBC__
  // Another allocator may have taken malloc's place (LD_PRELOAD), and these settings are not for it.
  Dl_info of_malloc, of_mallopt;
  if (!dladdr(reinterpret_cast<void*>(&malloc), &of_malloc) ||
      !dladdr(reinterpret_cast<void*>(&mallopt), &of_mallopt) || of_malloc.dli_fbase != of_mallopt.dli_fbase) {
    return false;
  }
  if (enabled) {
    // Buffers from 1 GiB on are still mapped on their own. -1: never give the heap's end back.
    return mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 64 << 20);
  }
  const bool done =
      mallopt(M_MMAP_THRESHOLD, 128 << 10) && mallopt(M_TRIM_THRESHOLD, 128 << 10) && mallopt(M_TOP_PAD, 128 << 10);
  malloc_trim(0);
  return done;
#else
  (void)enabled;
  return false;
#endif
}

} // namespace

// "DEFAULT", "AVX2" or "AVX512".
FASTRES_EXPORT const char* fastres_capability() {
  return FASTRES_STRING(CPU_CAPABILITY);
}

// The torch whose headers it was compiled with; it runs in any from the stable ABI's target version on.
FASTRES_EXPORT const char* fastres_torch() {
  return TORCH_VERSION;
}

FASTRES_EXPORT uint64_t fastres_stable_abi() {
  return TORCH_TARGET_VERSION;
}

FASTRES_EXPORT const char* fastres_compiler() {
  return FASTRES_COMPILER;
}

// Threads that a loop of the kernels may run on.
FASTRES_EXPORT int64_t fastres_threads() {
  return fastres::get_num_threads();
}

// Whether bfloat16 numbers are multiplied in pairs where there is a kernel that does.
FASTRES_EXPORT bool fastres_multiplies_pairs() {
  return fastres::multiplies_pairs();
}

// Makes glibc keep freed buffers, or sets its starting thresholds again; whether that was possible.
FASTRES_EXPORT bool fastres_reuse_memory(bool enabled) {
  return reuse_memory(enabled);
}
