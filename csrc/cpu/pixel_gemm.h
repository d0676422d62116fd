// The 1x1 convolution with stride 1 as a matrix product over pixels, as the operators call it.
//
//   y[p][k] = sum over c of a[p][c] * weights[k][c]      a: x, or what a prologue makes of it
//
// With the channels of the weights exchanged and dy for x it is the input gradient.
#pragma once

#include "gathered_rows.h"
#include "packed_weights.h"
#include "winograd.h"

#include <cstdint>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Pixels cut into chunks, whose statistics and sums are taken apart; the last may have fewer.
struct PixelChunks {
  int64_t pixels, size;

  int64_t count() const {
    return (pixels + size - 1) / size;
  }
  int64_t first(int64_t chunk) const {
    return chunk * size;
  }
  int64_t pixels_of(int64_t chunk) const {
    return std::min(size, pixels - first(chunk));
  }
  std::vector<int64_t> outputs() const {
    std::vector<int64_t> found(count());
    for (int64_t chunk = 0; chunk < count(); ++chunk) {
      found[chunk] = pixels_of(chunk);
    }
    return found;
  }
};

// How threads share the pixels.
PixelChunks pixel_chunks(int64_t pixels, const Kernel& kernel);

// The product. Of the kernel's taps there is one, whose offset is 0.
template <typename T, typename Epilogue>
void multiply_pixels(const PixelChunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue);

// dw [outputs][inputs] = the gradient of the weights.
template <typename T>
void pixel_weight_gradient(const WeightGradient<T>& w);

// --- what both are made of

// Rows of x, or of what the prologue makes of it, as the products take them.
template <typename T, typename To>
class PixelReader {
public:
  explicit PixelReader(const Source<T>& source, int64_t channels) : source_(source), channels_(channels) {}

  // Whether they are computed, or lie in memory.
  bool computes() const {
    return !std::is_same_v<T, To> || source_.prologue != nullptr;
  }
  // Pixels first ... first + count - 1 [count][channels], where they are computed in `scratch`.
  const To* read(int64_t first, int64_t count, To* scratch) const {
    if (source_.prologue != nullptr) {
      run_prologue(*source_.prologue, first, count, scratch);
      return scratch;
    }
    const T* from = source_.data + first * channels_;
    if constexpr (std::is_same_v<T, To>) {
      return from;
    } else {
      copy_run(from, count * channels_, scratch);
      return scratch;
    }
  }
  // Prefetches pixels first ... first + count - 1.
  void add(Prefetch& prefetch, int64_t first, int64_t count) const {
    source_.for_each_read(
        [&](const T* p) { prefetch.add(p + first * channels_, count * channels_ * static_cast<int64_t>(sizeof(T))); });
  }

private:
  Source<T> source_;
  int64_t channels_;
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
