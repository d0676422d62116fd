// The weight gradient of the 1x1 convolution: a product of dy and of its input over pixels, in one of two orders:
//   by shares     Each thread has its share of the pixels, packs a chunk of them at a time into panels, and keeps sums
//                 of its own; those are added up at the end.
//   at once       Where the pixels are few: all are packed, and each thread has its share of the channels.
//
// A word has one pixel, or two (gemm.h): where dot products are to be had, bfloat16 pixels are packed two and two, and
// a pixel too few is zeros. Sums by shares depend on the number of threads, and on nothing else.
#include "pixel_gemm.h"

#include "caches.h"
#include "workspace.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// Words that a chunk has at least, so that adding its product to the sums costs little.
constexpr int64_t kFewest = 64;
// Groups of kRows output channels whose products are computed together at once.
constexpr int64_t kTogether = 4;
// Bytes of inputs that are put through the prologue before they are packed.
constexpr int64_t kScratchBytes = 16 * 1024;

// The operands, and the sizes of packed pixels and their products.
template <typename T, typename Word>
struct Problem : WeightGradient<T> {
  using WeightGradient<T>::inputs, WeightGradient<T>::outputs;

  int64_t pixels() const {
    return this->x.images * this->x.height * this->x.width;
  }
  int64_t words() const {
    return words_of<Word>(pixels());
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
  // All channels' words of a pixel, or of two.
  int64_t packed_words() const {
    return row_groups() * kRows + groups() * kColumns;
  }
  // Floats of the sums, [group][outputs][kColumns].
  int64_t gradient_floats() const {
    return groups() * outputs * kColumns;
  }
  // Words of a chunk: a micro-kernel's columns and rows in the L1 cache, all of it in half of the L2 cache.
  int64_t chunk() const {
    const Caches& caches = Caches::of_machine();
    constexpr int64_t size = sizeof(Word);
    const int64_t in_l1 = caches.l1 * 3 / 4 / ((kColumns + kRows) * size);
    const int64_t in_l2 = caches.l2 / 2 / (packed_words() * size);
    const int64_t most = std::max(kFewest, std::min(in_l1, in_l2));
    const int64_t chunks = (words() + most - 1) / most;
    return (words() + chunks - 1) / chunks;
  }
};

// Up to `most` words in panels: of a [group][most][kColumns], of dy [row group][most][kRows]. In dy itself the rows of
// a micro-kernel would each lie in a page of its own, and a few lines of the L1 cache would have to hold them all.
template <typename T, typename Word>
class Panels {
public:
  using Number = number_t<Word>;
  using Reader = PixelReader<T, Number>;

  Panels(const Problem<T, Word>& w, int64_t most)
      : most_(most), columns_(w.groups() * most * kColumns), rows_(w.row_groups() * most * kRows) {}

  // Words first ... first + count - 1 become those from `at` on.
  void pack(const Problem<T, Word>& w, const Reader& reader, Number* scratch, int64_t first, int64_t count, int64_t at)
      const {
    const int64_t together = scratch_words(w), end = std::min(w.pixels(), (first + count) * kNumbers<Word>);
    for (int64_t p = first * kNumbers<Word>; p < end; p += together * kNumbers<Word>) {
      const int64_t pixels = std::min(together * kNumbers<Word>, end - p);
      pack_columns(reader.read(p, pixels, scratch), w.inputs, pixels, at);
      pack_rows(w.dy.data + p * w.outputs, w, pixels, at);
      at += together;
    }
  }

  static int64_t scratch_words(const Problem<T, Word>& w) {
    return std::max<int64_t>(1, kScratchBytes / static_cast<int64_t>(sizeof(Word)) / w.inputs);
  }

  // gradient (+)= the product of words first ... first + count - 1 for a group of output channels and one of input
  // channels.
  void multiply(
      const Problem<T, Word>& w,
      int64_t group,
      int64_t row_group,
      int64_t first,
      int64_t count,
      float* gradient,
      bool accumulate,
      const Ahead& ahead = {}) const {
    const Word* rows = rows_.as<Word>() + (row_group * most_ + first) * kRows;
    const Word* columns = columns_.as<Word>() + (group * most_ + first) * kColumns;
    with_rows_and_vectors(w.rows_of(row_group), w.inputs - group * kColumns, [&](auto r, auto vectors) {
      gradient_product<r, vectors>(rows, kRows, columns, gradient, count, accumulate, ahead);
    });
  }

private:
  // Lanes past the last channel are zero.
  void pack_columns(const Number* from, int64_t inputs, int64_t pixels, int64_t at) const {
    for (int64_t c = 0; c < round_up(inputs, kColumns); c += kWidth) {
      Word* to = columns_.as<Word>() + (c / kColumns * most_ + at) * kColumns + c % kColumns;
      const int64_t lanes = std::clamp<int64_t>(inputs - c, 0, kWidth);
      for (int64_t p = 0; p < pixels; p += kNumbers<Word>, to += kColumns) {
        store(to, words(from + p * inputs + c, inputs, pixels - p, lanes));
      }
    }
  }

  // A vector is longer than a row: its end is overwritten by the next row, but for the last one's, which is not stored.
  void pack_rows(const T* from, const Problem<T, Word>& w, int64_t pixels, int64_t at) const {
    static_assert(kRows <= kWidth);
    for (int64_t g = 0; g < w.row_groups(); ++g) {
      Word* to = rows_.as<Word>() + (g * most_ + at) * kRows;
      const T* pixel = from + g * kRows;
      const int64_t lanes = std::min(kWidth, w.outputs - g * kRows);
      int64_t p = 0;
      for (; p + kNumbers<Word> < pixels; p += kNumbers<Word>, to += kRows) {
        store(to, words(pixel + p * w.outputs, w.outputs, kNumbers<Word>, lanes));
      }
      store(to, words(pixel + p * w.outputs, w.outputs, pixels - p, lanes), kRows);
    }
  }

  // One vector of channels of a pixel, or of two that lie `row` apart and of which there are `pixels`.
  template <typename From>
  static auto words(const From* from, [[maybe_unused]] int64_t row, [[maybe_unused]] int64_t pixels, int64_t lanes) {
    if constexpr (std::is_same_v<Word, float>) {
      return lanes == kWidth ? load(from) : lanes > 0 ? load(from, lanes) : Lanes{};
    } else {
      return paired(load_raw(from, lanes), load_raw(from + row, pixels > 1 ? lanes : 0));
    }
  }

  int64_t most_;
  Workspace columns_, rows_;
};

// dw for `size` output channels from `begin` on and a group of input channels: the sum of `parts` products
// [size][kColumns], which lie `distance` apart.
template <typename T, typename Word>
void store_gradient(
    const Problem<T, Word>& w,
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
      float* to = w.dw.data + (begin + k) * w.inputs + c;
      if (c + kWidth <= w.inputs) {
        store(to, sum);
      } else {
        store(to, sum, w.inputs - c);
      }
    }
  }
}

// Few pixels: all are packed, and each product goes to its place at once.
template <typename T, typename Word>
void gradient_at_once(const Problem<T, Word>& w) {
  const int64_t words = w.words(), chunk = w.chunk(), chunks = (words + chunk - 1) / chunk;
  using All = Panels<T, Word>;
  const All panels(w, words);
  const typename All::Reader reader(w.x, w.inputs);
  parallel_for(0, words, kFewest, [&](int64_t begin, int64_t end) {
    const Workspace scratch(All::scratch_words(w) * w.inputs);
    panels.pack(w, reader, scratch.template as<typename All::Number>(), begin, end - begin, begin);
  });
  const int64_t blocks = (w.row_groups() + kTogether - 1) / kTogether;
  parallel_for(0, w.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
    const Workspace product(kTogether * kRows * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first = task % blocks * kTogether;
      const int64_t last = std::min(w.row_groups(), first + kTogether);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = c * chunk, depth = std::min(chunk, words - from);
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
template <typename T, typename Word>
void gradient_by_shares(const Problem<T, Word>& w, int64_t shares) {
  const int64_t words = w.words(), chunk = w.chunk(), chunks = (words + chunk - 1) / chunk;
  const int64_t size = w.gradient_floats();
  const Workspace gradients(shares * size);
  using Chunk = Panels<T, Word>;
  const typename Chunk::Reader reader(w.x, w.inputs);
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Chunk panels(w, chunk);
    const Workspace scratch(Chunk::scratch_words(w) * w.inputs);
    Prefetch prefetch;
    for (int64_t share = begin; share < end; ++share) {
      float* gradient = gradients.data() + share * size;
      const int64_t start = chunks * share / shares, stop = chunks * (share + 1) / shares;
      for (int64_t c = start; c < stop; ++c) {
        const int64_t first = c * chunk, count = std::min(chunk, words - first);
        panels.pack(w, reader, scratch.template as<typename Chunk::Number>(), first, count, 0);
        prefetch.clear();
        if (c + 1 < stop) {
          const int64_t next = (first + count) * kNumbers<Word>;
          const int64_t next_count = std::min(chunk * kNumbers<Word>, w.pixels() - next);
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
  with_word<T>(true, [&](auto word) {
    const Problem<T, decltype(word)> w{given};
    const int64_t chunks = (w.words() + w.chunk() - 1) / w.chunk();
    const int64_t most = kGradientBytes / static_cast<int64_t>(sizeof(float)) / w.gradient_floats();
    const int64_t shares = std::clamp<int64_t>(most, 1, std::min<int64_t>(chunks, get_num_threads()));
    // At once where packed pixels, which are written and read, are no more than the threads' sums.
    if (w.words() * w.packed_words() <= shares * w.gradient_floats()) {
      gradient_at_once(w);
    } else {
      gradient_by_shares(w, shares);
    }
  });
}

template void pixel_weight_gradient(const WeightGradient<float>&);
template void pixel_weight_gradient(const WeightGradient<BFloat16>&);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
