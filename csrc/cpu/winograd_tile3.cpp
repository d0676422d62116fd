// F(3x3, 3x3), see winograd_forms.h.
#include "winograd_convolution.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

template Chunks chunks_of<Tile3>(int64_t, int64_t, int64_t, const Kernel&);

#define FASTRES_INSTANTIATE(T, ...) \
  template void convolve<Tile3>(const Chunks&, const Source<T>&, const Kernel&, const __VA_ARGS__&);
FASTRES_EPILOGUES(FASTRES_INSTANTIATE, float)
FASTRES_EPILOGUES(FASTRES_INSTANTIATE, BFloat16)
#undef FASTRES_INSTANTIATE

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
