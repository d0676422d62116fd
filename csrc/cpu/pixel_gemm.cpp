// The 1x1 convolution as a matrix product over pixels. Each thread takes a chunk of pixels whose inputs fit its L2
// cache through the prologue, and then a group of output channels after the other: a run of pixels is multiplied by
// panels of weights that fit the L1 cache, and the pixels of each micro-kernel go through the epilogue at once, so that
// their stores overlap with the next one's products. The weights are packed once a call. What the epilogue and the next
// chunk read of memory is prefetched during the products.
//
// Every output is one sum in one order, whatever the number of threads. Sums that epilogues keep by chunks depend on
// that number, and on nothing else.
#include "pixel_gemm.h"

#include "caches.h"
#include "epilogues.h"
#include "workspace.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// Pixels of a run: a panel of weights is read from the L1 cache for as many micro-kernels.
constexpr int64_t kRun = 8 * kRows;
// Pixels of a chunk at most, whose sums are taken in float32.
constexpr int64_t kMostPixels = 2048 / kRows * kRows;
// Weights that are worth a thread's start.
constexpr int64_t kThreadWeights = 32 * 1024;

// Rows of a panel of weights that stays in the L1 cache together with as many inputs of kRows pixels, in equal parts of
// the depth; in words, as everything that is multiplied.
int64_t panel_rows(int64_t depth) {
  constexpr int64_t row_bytes = (kColumns + kRows) * static_cast<int64_t>(sizeof(float));
  const int64_t most = Caches::of_machine().l1 * 15 / 16 / row_bytes;
  const int64_t parts = (depth + most - 1) / most;
  return (depth + parts - 1) / parts;
}

// to: [inputs][kColumns] for the output channels from `from` on, zero past the last.
void pack_group(const Kernel& kernel, int64_t from, float* to) {
  const int64_t columns = std::min(kColumns, kernel.outputs - from), inputs = kernel.inputs;
  if (columns < kColumns) {
    std::fill_n(to, inputs * kColumns, 0.0f);
  }
  const float* weights = kernel.at(from, 0);
  if (kernel.output_stride == 1) {
    for (int64_t c = 0; c < inputs; ++c) {
      std::copy_n(weights + c * kernel.input_stride, columns, to + c * kColumns);
    }
    return;
  }
  int64_t transposed = 0;
  if (kernel.inputs_are_adjacent() && columns == kColumns) {
    transposed = inputs / kWidth * kWidth;
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      transpose_rows(weights + half * kernel.output_stride, kernel.output_stride, inputs / kWidth, to + half, kColumns);
    }
  }
  for (int64_t c = transposed; c < inputs; ++c) {
    for (int64_t k = 0; k < columns; ++k) {
      to[c * kColumns + k] = weights[k * kernel.output_stride + c * kernel.input_stride];
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// to: [inputs / 2][kColumns] pairs of inputs. The weights are rounded.
void pack_group(const Kernel& kernel, int64_t from, BFloat16Pair* to) {
  const Workspace singles(kernel.inputs * kColumns);
  pack_group(kernel, from, singles.data());
  for (const float* row = singles.data(); row < singles.data() + kernel.inputs * kColumns; row += 2 * kColumns) {
    for (int64_t half = 0; half < kColumns; half += kWidth, to += kWidth) {
      store(to, paired(load(row + half), load(row + kColumns + half)));
    }
  }
}
#endif

// Calls finish(product, pixel, count) for every micro-kernel's outputs of `count` pixels and the weights of one group,
// which has so many columns or more.
template <typename Word, typename Finish>
void multiply_run(
    const Word* pixels,
    const Word* weights,
    int64_t depth,
    int64_t columns,
    int64_t panel,
    int64_t count,
    Prefetch& prefetch,
    int64_t lines,
    float* product,
    const Finish& finish) {
  const RowGroups groups{count};
  for (int64_t c = 0; c < depth; c += panel) {
    const int64_t steps = std::min(panel, depth - c);
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t first = groups.begin(g), size = groups.size(g);
      float* to = product + first * kColumns;
      const Ahead ahead = prefetch.take(std::min(lines, steps));
      with_rows_and_vectors(size, columns, [&](auto rows, auto vectors) {
        pixel_product<rows, vectors>(
            pixels + first * depth + c, depth, weights + c * kColumns, steps, to, c > 0, ahead);
      });
      if (c + steps == depth) {
        finish(to, first, size);
      }
    }
  }
}

} // namespace

PixelChunks pixel_chunks(int64_t pixels, const Kernel& kernel) {
  // A third of the L2 cache for the inputs and what the epilogue reads; the next chunk's and the weights have the rest.
  const int64_t bytes = (kernel.inputs + kernel.outputs) * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::clamp(Caches::of_machine().l2 / 3 / bytes / kRows * kRows, kRun, kMostPixels);
  const int64_t threads = get_num_threads();
  // As many chunks for every thread, unless they become too short to pay for reading all weights.
  const int64_t chunks = (pixels + most - 1) / most;
  const int64_t even = std::min(round_up(chunks, threads), std::max(chunks, pixels / kRun));
  return {pixels, round_up((pixels + even - 1) / even, kRows)};
}

namespace {

template <typename Word, typename T, typename Epilogue>
void multiply_words(const PixelChunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue) {
  const int64_t depth = kernel.inputs / kNumbers<Word>, groups = groups_of(kernel.outputs);
  const int64_t panel = panel_rows(depth), threads = get_num_threads();
  const PixelReader<T, number_t<Word>> reader(x, kernel.inputs);
  const Workspace packed(groups * depth * kColumns);
  Word* weights = packed.as<Word>();
  parallel_for(0, groups, std::max<int64_t>(1, kThreadWeights / (depth * kColumns)), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      pack_group(kernel, g * kColumns, weights + g * depth * kColumns);
    }
  });
  // With more threads than chunks several share one, and each has a part of its output channels.
  const int64_t shares = std::clamp<int64_t>(threads / chunks.count(), 1, groups);
  parallel_for(0, chunks.count() * shares, 1, [&](int64_t begin, int64_t end) {
    const Workspace computed(reader.computes() ? chunks.size * depth : 0), product(kRun * kColumns);
    Prefetch prefetch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / shares, first = chunks.first(chunk), count = chunks.pixels_of(chunk);
      const int64_t first_group = groups * (task % shares) / shares, last_group = groups * (task % shares + 1) / shares;
      const Word* pixels =
          reinterpret_cast<const Word*>(reader.read(first, count, computed.template as<number_t<Word>>()));
      prefetch.clear();
      epilogue.for_each_read([&](const auto* p) {
        prefetch.add(p + first * kernel.outputs, count * kernel.outputs * static_cast<int64_t>(sizeof(*p)));
      });
      if (task + 1 < end && shares == 1) {
        reader.add(prefetch, chunks.first(chunk + 1), chunks.pixels_of(chunk + 1));
      }
      const auto of_chunk = epilogue.chunk(chunk);
      const int64_t kernels =
          (last_group - first_group) * ((count + kRows - 1) / kRows) * ((depth + panel - 1) / panel);
      const int64_t lines = (prefetch.lines() + kernels - 1) / kernels;
      for (int64_t g = first_group; g < last_group; ++g) {
        const Word* of_group = weights + g * depth * kColumns;
        for (int64_t at = 0; at < count; at += kRun) {
          const auto finish = [&](const float* outputs, int64_t pixel, int64_t size) {
            const int64_t p = at + pixel;
            finish_positions(outputs, first + p, size, kernel.outputs, g * kColumns, p == 0, of_chunk);
          };
          multiply_run(
              pixels + at * depth,
              of_group,
              depth,
              kernel.outputs - g * kColumns,
              panel,
              std::min(kRun, count - at),
              prefetch,
              lines,
              product.data(),
              finish);
        }
      }
    }
    stream_fence();
  });
}

} // namespace

template <typename T, typename Epilogue>
void multiply_pixels(const PixelChunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue) {
  with_word<T>(kernel.inputs % 2 == 0, [&](auto word) { multiply_words<decltype(word)>(chunks, x, kernel, epilogue); });
}

#define FASTRES_INSTANTIATE(T, ...) \
  template void multiply_pixels(const PixelChunks&, const Source<T>&, const Kernel&, const __VA_ARGS__&);
FASTRES_TRAINING_EPILOGUES(FASTRES_INSTANTIATE, float)
FASTRES_TRAINING_EPILOGUES(FASTRES_INSTANTIATE, BFloat16)
#undef FASTRES_INSTANTIATE

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
