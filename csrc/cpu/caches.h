// The sizes of a core's caches, as the system says; blocking follows them.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace fastres {
inline namespace CPU_CAPABILITY {

struct Caches {
  int64_t l1, l2; // bytes a core

  static const Caches& of_machine() {
    // What most processors with AVX2 have at least, where the system does not know (containers, virtual machines).
    static const Caches caches{size_or(level1(), 32 * 1024), size_or(level2(), 256 * 1024)};
    return caches;
  }

private:
  static int64_t size_or(int64_t size, int64_t least) {
    return size > 0 ? size : least;
  }
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
  static int64_t level1() {
    return sysconf(_SC_LEVEL1_DCACHE_SIZE);
  }
  static int64_t level2() {
    return sysconf(_SC_LEVEL2_CACHE_SIZE);
  }
#else
  static int64_t level1() {
    return 0;
  }
  static int64_t level2() {
    return 0;
  }
#endif
};

} // namespace CPU_CAPABILITY
} // namespace fastres
