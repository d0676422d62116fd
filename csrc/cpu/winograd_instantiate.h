// What a file that compiles one of Winograd's forms consists of, so that the forms compile side by side. Before it is
// included, FASTRES_FORM is the form (winograd_forms.h) and FASTRES_FORM_EPILOGUES one of the lists in epilogues.h.
// No #pragma once: each inclusion is an instantiation.
#include "winograd_convolution.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

template Chunks chunks_of(const FASTRES_FORM&, int64_t, int64_t, int64_t, const Kernel&);

#define FASTRES_INSTANTIATE(T, ...) \
  template void convolve(const FASTRES_FORM&, const Chunks&, const Source<T>&, const Kernel&, const __VA_ARGS__&);
FASTRES_FORM_EPILOGUES(FASTRES_INSTANTIATE, float)
FASTRES_FORM_EPILOGUES(FASTRES_INSTANTIATE, BFloat16)
#undef FASTRES_INSTANTIATE

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
