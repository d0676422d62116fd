// The weight gradient of the 1x1 convolution: a product of dy and of its input over pixels, in one of two orders:
//   by shares     Each thread has its share of the pixels, packs a chunk of them at a time into panels, and keeps sums
//                 of its own; those are added up at the end.
//   at once       Where the pixels are few: all are packed, and each thread has its share of the channels.
//
// Sums by shares depend on the number of threads, and on nothing else.
#include "pixel_gemm.h"

#include "caches.h"
#include "workspace.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// Bytes of all threads' sums.
constexpr int64_t kGradientBytes = 256 * 1024 * 1024;
// Pixels that a chunk has at least, so that adding its product to the sums costs little.
constexpr int64_t kFewest = 64;
// Groups of kRows output channels whose products are computed together at once.
constexpr int64_t kTogether = 4;
// Bytes of inputs that are put through the prologue before they are packed.
constexpr int64_t kScratchBytes = 16 * 1024;

// The operands, and the sizes of packed pixels and their products.
template <typename T>
struct Problem : WeightGradient<T> {
  using WeightGradient<T>::inputs, WeightGradient<T>::outputs;

  int64_t pixels() const {
    return this->x.images * this->x.height * this->x.width;
  }
  int64_t groups() const {
    return groups_of(inputs);
  }
  int64_t row_groups() const {
    return (outputs + kRows - 1) / kRows;
  }
  // Output channels of a group.
  int64_t rows_of(int64_t row_group) const {
    return std::min<int64_t>(kRows, outputs - row_group * kRows);
  }
  int64_t pixel_floats() const {
    return row_groups() * kRows + groups() * kColumns;
  }
  // Floats of the sums, [group][outputs][kColumns].
  int64_t gradient_floats() const {
    return groups() * outputs * kColumns;
  }
  // Pixels of a chunk: a micro-kernel's columns and rows in the L1 cache, all of it in half of the L2 cache.
  int64_t chunk() const {
    const Caches& caches = Caches::of_machine();
    constexpr int64_t item = sizeof(float);
    const int64_t in_l1 = caches.l1 * 3 / 4 / ((kColumns + kRows) * item);
    const int64_t in_l2 = caches.l2 / 2 / (pixel_floats() * item);
    const int64_t most = std::max(kFewest, std::min(in_l1, in_l2));
    const int64_t chunks = (pixels() + most - 1) / most;
    return (pixels() + chunks - 1) / chunks;
  }
};

// Up to `most` pixels in panels: of a [group][most][kColumns], of dy [row group][most][kRows]. In dy itself the rows of
// a micro-kernel would each lie in a page of its own, and a few lines of the L1 cache would have to hold them all.
template <typename T>
class Panels {
public:
  Panels(const Problem<T>& w, int64_t most)
      : most_(most), columns_(w.groups() * most * kColumns), rows_(w.row_groups() * most * kRows) {}

  // Pixels first ... first + count - 1 become those from `at` on.
  void pack(const Problem<T>& w, const PixelReader<T>& reader, float* scratch, int64_t first, int64_t count, int64_t at)
      const {
    const int64_t together = scratch_pixels(w);
    for (int64_t p = 0; p < count; p += together) {
      const int64_t size = std::min(together, count - p);
      const float* from = scratch;
      if (reader.computes()) {
        reader.read(first + p, size, scratch);
      } else if constexpr (std::is_same_v<T, float>) {
        from = w.x.data + (first + p) * w.inputs;
      }
      pack_columns(from, w.inputs, size, at + p);
      pack_rows(w.dy.data + (first + p) * w.outputs, w, size, at + p);
    }
  }

  static int64_t scratch_pixels(const Problem<T>& w) {
    return std::max<int64_t>(1, kScratchBytes / static_cast<int64_t>(sizeof(float)) / w.inputs);
  }

  // gradient (+)= the product of pixels first ... first + count - 1 for a group of output channels and one of input
  // channels.
  void multiply(
      const Problem<T>& w,
      int64_t group,
      int64_t row_group,
      int64_t first,
      int64_t count,
      float* gradient,
      bool accumulate,
      const Ahead& ahead = {}) const {
    const float* rows = rows_.data() + (row_group * most_ + first) * kRows;
    const float* columns = columns_.data() + (group * most_ + first) * kColumns;
    with_rows(w.rows_of(row_group), [&](auto r) {
      gradient_product<r>(rows, kRows, columns, gradient, count, accumulate, ahead);
    });
  }

private:
  // Lanes past the last channel are zero.
  void pack_columns(const float* from, int64_t inputs, int64_t count, int64_t at) const {
    for (int64_t c = 0; c < round_up(inputs, kColumns); c += kWidth) {
      float* to = columns_.data() + (c / kColumns * most_ + at) * kColumns + c % kColumns;
      const int64_t lanes = std::clamp<int64_t>(inputs - c, 0, kWidth);
      for (int64_t p = 0; p < count; ++p) {
        store(to + p * kColumns, part(from + p * inputs + c, lanes));
      }
    }
  }

  // A vector is longer than a row: its end is overwritten by the next row, but for the last one's, which is not stored.
  void pack_rows(const T* from, const Problem<T>& w, int64_t count, int64_t at) const {
    static_assert(kRows <= kWidth);
    for (int64_t g = 0; g < w.row_groups(); ++g) {
      float* to = rows_.data() + (g * most_ + at) * kRows;
      const T* pixel = from + g * kRows;
      const int64_t lanes = std::min(kWidth, w.outputs - g * kRows);
      for (int64_t p = 0; p + 1 < count; ++p) {
        store(to + p * kRows, part(pixel + p * w.outputs, lanes));
      }
      store(to + (count - 1) * kRows, part(pixel + (count - 1) * w.outputs, lanes), kRows);
    }
  }

  template <typename From>
  static Lanes part(const From* from, int64_t lanes) {
    return lanes == kWidth ? load(from) : lanes > 0 ? load(from, lanes) : Lanes{};
  }

  int64_t most_;
  Workspace columns_, rows_;
};

// dw for `size` output channels from `begin` on and a group of input channels: the sum of `parts` products
// [size][kColumns], which lie `distance` apart.
template <typename T>
void store_gradient(
    const Problem<T>& w,
    int64_t group,
    int64_t begin,
    int64_t size,
    const float* product,
    int64_t parts,
    int64_t distance) {
  for (int64_t k = 0; k < size; ++k) {
    for (int64_t half = 0; half < kColumns && group * kColumns + half < w.inputs; half += kWidth) {
      const int64_t c = group * kColumns + half;
      Lanes sum = load(product + k * kColumns + half);
      for (int64_t part = 1; part < parts; ++part) {
        sum = sum + load(product + part * distance + k * kColumns + half);
      }
      float* to = w.dw + (begin + k) * w.inputs + c;
      if (c + kWidth <= w.inputs) {
        store(to, sum);
      } else {
        store(to, sum, w.inputs - c);
      }
    }
  }
}

// Few pixels: all are packed, and each product goes to its place at once.
template <typename T>
void gradient_at_once(const Problem<T>& w) {
  const int64_t pixels = w.pixels(), chunk = w.chunk(), chunks = (pixels + chunk - 1) / chunk;
  const Panels<T> panels(w, pixels);
  const PixelReader<T> reader(w.x, w.inputs);
  parallel_for(0, pixels, kFewest, [&](int64_t begin, int64_t end) {
    const Workspace scratch(Panels<T>::scratch_pixels(w) * w.inputs);
    panels.pack(w, reader, scratch.data(), begin, end - begin, begin);
  });
  const int64_t blocks = (w.row_groups() + kTogether - 1) / kTogether;
  parallel_for(0, w.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
    const Workspace product(kTogether * kRows * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first = task % blocks * kTogether;
      const int64_t last = std::min(w.row_groups(), first + kTogether);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = c * chunk, depth = std::min(chunk, pixels - from);
        for (int64_t r = first; r < last; ++r) {
          panels.multiply(w, group, r, from, depth, product.data() + (r - first) * kRows * kColumns, c > 0);
        }
      }
      const int64_t size = std::min(w.outputs, last * kRows) - first * kRows;
      store_gradient(w, group, first * kRows, size, product.data(), 1, 0);
    }
  });
}

// Many pixels: every thread computes a share of them, a chunk at a time in its caches, and the shares are added up.
template <typename T>
void gradient_by_shares(const Problem<T>& w, int64_t shares) {
  const int64_t pixels = w.pixels(), chunk = w.chunk(), chunks = (pixels + chunk - 1) / chunk;
  const int64_t size = w.gradient_floats();
  const Workspace gradients(shares * size);
  const PixelReader<T> reader(w.x, w.inputs);
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Panels<T> panels(w, chunk);
    const Workspace scratch(Panels<T>::scratch_pixels(w) * w.inputs);
    Prefetch prefetch;
    for (int64_t share = begin; share < end; ++share) {
      float* gradient = gradients.data() + share * size;
      const int64_t start = chunks * share / shares, stop = chunks * (share + 1) / shares;
      for (int64_t c = start; c < stop; ++c) {
        const int64_t first = c * chunk, count = std::min(chunk, pixels - first);
        panels.pack(w, reader, scratch.data(), first, count, 0);
        prefetch.clear();
        if (c + 1 < stop) {
          const int64_t next = first + count, next_count = std::min(chunk, pixels - next);
          reader.add(prefetch, next, next_count);
          prefetch.add(w.dy.data + next * w.outputs, next_count * w.outputs * static_cast<int64_t>(sizeof(T)));
        }
        const int64_t kernels = w.groups() * w.row_groups(), lines = (prefetch.lines() + kernels - 1) / kernels;
        for (int64_t group = 0; group < w.groups(); ++group) {
          for (int64_t r = 0; r < w.row_groups(); ++r) {
            const Ahead ahead = prefetch.take(std::min(lines, count));
            float* to = gradient + (group * w.outputs + r * kRows) * kColumns;
            panels.multiply(w, group, r, 0, count, to, c > start, ahead);
          }
        }
      }
    }
  });
  parallel_for(0, w.groups() * w.row_groups(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / w.row_groups(), r = task % w.row_groups();
      const float* product = gradients.data() + (group * w.outputs + r * kRows) * kColumns;
      store_gradient(w, group, r * kRows, w.rows_of(r), product, shares, size);
    }
  });
}

} // namespace

template <typename T>
void pixel_weight_gradient(const WeightGradient<T>& given) {
  const Problem<T> w{given};
  const int64_t chunks = (w.pixels() + w.chunk() - 1) / w.chunk();
  const int64_t most = kGradientBytes / static_cast<int64_t>(sizeof(float)) / w.gradient_floats();
  const int64_t shares = std::clamp<int64_t>(most, 1, std::min<int64_t>(chunks, get_num_threads()));
  // At once where packed pixels, which are written and read, are no more than the threads' sums.
  if (w.pixels() * w.pixel_floats() <= shares * w.gradient_floats()) {
    gradient_at_once(w);
  } else {
    gradient_by_shares(w, shares);
  }
}

template void pixel_weight_gradient(const WeightGradient<float>&);
template void pixel_weight_gradient(const WeightGradient<BFloat16>&);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
