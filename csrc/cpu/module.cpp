// The Python side of a CPU module: what it was compiled from and with, and the allocator's settings.
// The operators' kernels register themselves in the other files, through TORCH_LIBRARY_IMPL.
#include <ATen/Config.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <climits>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __GLIBC__
#include <dlfcn.h>
#include <malloc.h>
#endif

#define FASTRES_STRING_OF(x) #x
#define FASTRES_STRING(x) FASTRES_STRING_OF(x)

namespace py = pybind11;

namespace {

std::string capability() {
  return FASTRES_STRING(CPU_CAPABILITY);
}

// The threads a parallel region would get: torch.get_num_threads() where both run on one OpenMP runtime.
int openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["capability"] = capability();
#if defined(_OPENMP) && AT_PARALLEL_OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CPU kernels of fastres for one capability.";
  m.def("capability", &capability, "The capability it was compiled for: DEFAULT, AVX2 or AVX512.");
  m.def("build_info", &build_info, "The torch, the compiler, the capability and whether OpenMP is in use.");
  m.def("openmp_threads", &openmp_threads, "The threads a parallel region would get, 0 without OpenMP.");
  m.def(
      "reuse_memory",
      &reuse_memory,
      py::arg("enabled"),
      "Make glibc keep freed buffers, or set its starting thresholds again; whether that was possible.");
}
