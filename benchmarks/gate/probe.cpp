// What a replayed call of an operator asks the machine for: callgrind's switch, and a count of the bytes it allocates.
//
// Compiled by benchmarks/gate/replayed.py. Preloaded (LD_PRELOAD) it stands in for the C library's allocator and says
// that every core has the same caches, so that blocks are as large on every machine.
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#ifdef GATE_CALLGRIND
#include <valgrind/callgrind.h>
#endif

#define GATE_EXPORT extern "C" __attribute__((visibility("default")))

// glibc's own, under the names by which they stay reachable when the public ones are taken.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

// Smaller blocks are the interpreter's and the dispatcher's.
constexpr size_t kLeast = 4096;
constexpr int kBlocks = 4096;

struct Block {
  void* data;
  size_t bytes;
};

struct Count {
  bool running;
  bool full;
  int blocks;
  int64_t held, peak;
  Block block[kBlocks];
};

// Initial-exec: a variable that is allocated at its first use would call the allocator from within itself.
__attribute__((tls_model("initial-exec"))) thread_local Count* running = nullptr;
Count the_count;

// Whether the caller is PyTorch's library of operators itself. Its allocator lies in another one, so these are the
// buffers of the matrix products inside, whose sizes follow the processor.
bool is_of_products(const void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname &&
      (strstr(info.dli_fname, "torch_cpu") || strstr(info.dli_fname, "mkl"));
}

void* taken(void* data, size_t bytes, const void* caller) {
  Count* count = running;
  if (count && data && bytes >= kLeast && !is_of_products(caller)) {
    if (count->blocks == kBlocks) {
      count->full = true;
      return data;
    }
    count->block[count->blocks++] = {data, bytes};
    count->held += bytes;
    if (count->held > count->peak) {
      count->peak = count->held;
    }
  }
  return data;
}

void given_back(void* data) {
  Count* count = running;
  if (!count || !data) {
    return;
  }
  for (int i = count->blocks - 1; i >= 0; --i) {
    if (count->block[i].data == data) {
      count->held -= count->block[i].bytes;
      count->block[i] = count->block[--count->blocks];
      return;
    }
  }
}

} // namespace

// ------------------------------------------------------------------------------------------------------------- bytes

GATE_EXPORT void* malloc(size_t bytes) {
  return taken(__libc_malloc(bytes), bytes, __builtin_return_address(0));
}

GATE_EXPORT void* calloc(size_t items, size_t size) {
  return taken(__libc_calloc(items, size), items * size, __builtin_return_address(0));
}

GATE_EXPORT void* realloc(void* data, size_t bytes) {
  void* moved = __libc_realloc(data, bytes);
  if (moved || bytes == 0) {
    given_back(data);
  }
  return taken(moved, bytes, __builtin_return_address(0));
}

GATE_EXPORT void* memalign(size_t alignment, size_t bytes) {
  return taken(__libc_memalign(alignment, bytes), bytes, __builtin_return_address(0));
}

GATE_EXPORT void* aligned_alloc(size_t alignment, size_t bytes) {
  return taken(__libc_memalign(alignment, bytes), bytes, __builtin_return_address(0));
}

GATE_EXPORT int posix_memalign(void** data, size_t alignment, size_t bytes) {
  void* found = __libc_memalign(alignment, bytes);
  if (!found) {
    return ENOMEM;
  }
  *data = taken(found, bytes, __builtin_return_address(0));
  return 0;
}

GATE_EXPORT void free(void* data) {
  given_back(data);
  __libc_free(data);
}

GATE_EXPORT void gate_begin() {
  the_count.full = false;
  the_count.blocks = 0;
  the_count.held = the_count.peak = 0;
  running = &the_count;
}

// The most bytes that this thread has held at a time since `gate_begin`, of what it took after it; -1: too many blocks.
GATE_EXPORT int64_t gate_end() {
  running = nullptr;
  return the_count.full ? -1 : the_count.peak;
}

// Blocks of a product follow the caches (csrc/cpu/caches.h). These are what most processors with AVX2 have at least.
GATE_EXPORT long sysconf(int name) {
  if (name == _SC_LEVEL1_DCACHE_SIZE) {
    return 32 * 1024;
  }
  if (name == _SC_LEVEL2_CACHE_SIZE) {
    return 256 * 1024;
  }
  static const auto next = reinterpret_cast<long (*)(int)>(dlsym(RTLD_NEXT, "sysconf"));
  return next(name);
}

// ------------------------------------------------------------------------------------------------------ instructions

// Whether this process runs under valgrind and the switch is there.
GATE_EXPORT int gate_counts_instructions() {
#ifdef GATE_CALLGRIND
  return RUNNING_ON_VALGRIND > 0;
#else
  return 0;
#endif
}

GATE_EXPORT void gate_instrument() {
#ifdef GATE_CALLGRIND
  CALLGRIND_START_INSTRUMENTATION;
#endif
}

// Switches counting on, or off again.
GATE_EXPORT void gate_toggle() {
#ifdef GATE_CALLGRIND
  CALLGRIND_TOGGLE_COLLECT;
#endif
}

// Writes what was counted since the last dump to a file of its own, under a name.
GATE_EXPORT void gate_dump(const char* name) {
#ifdef GATE_CALLGRIND
  CALLGRIND_DUMP_STATS_AT(name);
#else
  (void)name;
#endif
}
