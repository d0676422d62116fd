#include "prologue.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

template <typename T>
void activate_rows(const Prologue<T>& params, int64_t begin, int64_t end) {
  apply_range(params, begin, end);
}

template void activate_rows(const Prologue<float>&, int64_t, int64_t);
template void activate_rows(const Prologue<BFloat16>&, int64_t, int64_t);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
