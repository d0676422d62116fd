// The 3x3 convolution with stride 1 and padding 1 on the CPU, by Winograd's F(4x4, 3x3) (winograd.h has the formulas).
//
// Outputs, and the input gradient, which is the same convolution of dy with the kernel turned by half a circle and its
// channels exchanged, in one of two orders:
//   by tiles      Each thread takes a chunk of tiles that fits its L2 cache through all three steps: transform, 36
//                 products, inverse transform. The transformed weights are made once a call, and read once a chunk.
//   by channels   All tiles are transformed first; then each thread takes a group of output channels, transforms its
//                 weights, and goes through the tiles: the transformed weights, four times as large as the weights and
//                 larger than the tiles, never leave the caches.
// The weight gradient, likewise:
//   by shares     Each thread takes its share of the tiles, a chunk at a time, through transforms and products, and
//                 keeps sums of its own; they are added up and transformed back at the end.
//   at once       Where the tiles are few: all are transformed, and each thread takes its share of the channels.
// In evaluation with few output positions there is one product instead (direct.h).
//
// Tiles that the transforms cannot carry, and what is convolved with weights that they cannot, are summed directly.
//
// What stands before a convolution is done where tiles are read (TileReader), what follows it where they are written
// (epilogues.h). Memory that is read there is fetched during the products (Ahead).
//
// Every output and input gradient is one sum in one order, whatever the number of threads. Sums by shares, and those
// that epilogues take by chunks, depend on that number, and on nothing else.
#include "batch_norm_act.h"
#include "direct.h"
#include "epilogues.h"
#include "norm_act_backward.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace winograd {
namespace {

// What a thread's chunk may take of its L2 cache, transformed input and
// products together.
constexpr int64_t kChunkBytes = 448 * 1024;
// Transformed tiles that all threads share, held in the last-level cache.
constexpr int64_t kSharedBytes = 16 * 1024 * 1024;
// Tiles over which a weight gradient is summed in registers, where there are
// many, and its threads' sums in all.
constexpr int64_t kGradientTiles = 128;
constexpr int64_t kGradientBytes = 256 * 1024 * 1024;
// Output channels whose products are taken together where there are few tiles.
constexpr int64_t kGradientRows = 48;
// Pairs of channels whose weights pay for a thread's start.
constexpr int64_t kThreadPairs = 2 * 1024;
// Elements that are gathered, likewise.
constexpr int64_t kThreadElements = 64 * 1024;
// Memory that a thread keeps between calls.
constexpr int64_t kScratchBytes = 16 * 1024 * 1024;
// Planes a multiple of a page apart would all fall into the same few lines of
// the L1 cache.
constexpr int64_t kSkew = 64 / sizeof(float);

// Memory of buffers that are gone, kept by a thread for its next ones: where a convolution is small, page faults would
// cost more than its arithmetic. At most kScratchBytes a thread; those used longest ago go first, and a larger one is
// freed at once.
class Scratch {
public:
  struct Block {
    float* data = nullptr;
    int64_t bytes = 0;
  };

  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  ~Scratch() {
    while (count_ > 0) {
      free_oldest();
    }
  }

  // The smallest one that is large enough, or a new one.
  Block take(int64_t bytes) {
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      if (blocks_[i].bytes >= bytes && (best < 0 || blocks_[i].bytes < blocks_[best].bytes)) {
        best = i;
      }
    }
    return best < 0 ? Block{static_cast<float*>(c10::alloc_cpu(bytes)), bytes} : remove(best);
  }
  void give(Block block) noexcept {
    if (block.bytes > kScratchBytes) {
      c10::free_cpu(block.data);
      return;
    }
    while (count_ == kBlocks || bytes_ + block.bytes > kScratchBytes) {
      free_oldest();
    }
    blocks_[count_++] = block;
    bytes_ += block.bytes;
  }

private:
  // More than a thread ever holds at a time, so that a sequence of layers finds its own again.
  static constexpr int kBlocks = 16;

  Block remove(int i) noexcept {
    const Block block = blocks_[i];
    std::copy(blocks_.begin() + i + 1, blocks_.begin() + count_, blocks_.begin() + i);
    --count_;
    bytes_ -= block.bytes;
    return block;
  }
  void free_oldest() noexcept {
    c10::free_cpu(remove(0).data);
  }

  std::array<Block, kBlocks> blocks_; // the one given back last is the last
  int count_ = 0;
  int64_t bytes_ = 0;
};

// Uninitialised floats, aligned to a cache line. Made and destroyed by one thread.
class Buffer {
public:
  explicit Buffer(int64_t size)
      : block_(Scratch::of_thread().take(std::max<int64_t>(1, size) * static_cast<int64_t>(sizeof(float)))) {}
  ~Buffer() {
    Scratch::of_thread().give(block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const {
    return block_.data;
  }

private:
  Scratch::Block block_;
};

// --- weights

Kernel kernel_of(const Tensor& weight) {
  Kernel kernel{
      weight.const_data_ptr<float>(),
      weight.size(0),
      weight.size(1),
      kPanel * weight.stride(0),
      weight.stride(0),
      weight.stride(1),
      {}};
  for (int64_t t = 0; t < kTaps * kTaps; ++t) {
    kernel.tap[t] = t / kTaps * weight.stride(2) + t % kTaps * weight.stride(3);
  }
  return kernel;
}

// The kernel whose convolution with dy is the input gradient.
Kernel turned(Kernel kernel) {
  std::swap(kernel.outputs, kernel.inputs);
  std::swap(kernel.output_stride, kernel.input_stride);
  kernel.group_stride = kPanel * kernel.output_stride;
  std::reverse(kernel.tap.begin(), kernel.tap.end());
  return kernel;
}

int64_t groups_of(int64_t channels) {
  return (channels + kColumns - 1) / kColumns;
}

// to: [36][group of columns] and as transform_weights writes them. Returns whether the transforms carry the weights.
bool transform_all_weights(const Kernel& kernel, float* to) {
  const int64_t groups = groups_of(kernel.outputs), depth = round_up(kernel.inputs, kWidth), vectors = depth / kWidth;
  std::vector<float> energies(groups * vectors); // of each stretch of inputs, at its first vector
  at::parallel_for(0, groups * vectors, kThreadPairs / (kWidth * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t g = task / vectors, first = task % vectors, last = std::min(vectors, first + end - task);
      energies[task] = transform_weights(
          kernel, g * kColumns, first * kWidth, last * kWidth, to + g * depth * kColumns, groups * depth * kColumns);
      task += last - first;
    }
  });
  for (int64_t g = 0; g < groups; ++g) {
    if (!(std::accumulate(&energies[g * vectors], &energies[g * vectors] + vectors, 0.0f) <= kMaxEnergy)) {
      return false;
    }
  }
  return true;
}

// --- outputs

// The input of a convolution: [images, height, width, channels] as it lies, or what `act` makes of it.
template <typename T>
struct Source {
  const T* data;
  const ApplyParams<T, float>* act = nullptr;

  template <typename F>
  void for_each_read(const F& f) const {
    if (act != nullptr) {
      act->for_each_read(f);
    } else {
      f(data);
    }
  }
};

template <typename T>
using InputReader = TileReader<InputTransform, 1, T>;

// Where channel c of tile p goes in a plane of operand, see winograd.h.
auto operand_place(int64_t depth) {
  return [depth](int64_t p, int64_t c) { return p / kRows * depth * kRows + c * kRows + p % kRows * kWidth; };
}

template <typename Reader>
std::vector<DirectTile> read_tiles(Reader& reader, int64_t first, int64_t count) {
  std::vector<DirectTile> tiles;
  for (int64_t p = 0; p < count; ++p) {
    tiles.push_back(reader.read(first + p));
  }
  return tiles;
}

// Transforms tiles first ... first + count - 1, and reads into `direct` those out of range; all, unless `carried`.
template <typename Reader, typename Place>
void transform_tiles(
    Reader& reader,
    int64_t first,
    int64_t count,
    bool carried,
    float* to,
    int64_t plane,
    const Place& place,
    DirectTile* direct) {
  std::fill_n(direct, count, DirectTile());
  std::vector<int64_t> beyond;
  reader.transform(first, count, to, plane, place, [&](int64_t p) { beyond.push_back(p); });
  if (!carried) {
    beyond.resize(count);
    std::iota(beyond.begin(), beyond.end(), 0);
  }
  for (const int64_t p : beyond) {
    direct[p] = reader.read(first + p);
  }
}

// Whether the tiles, transformed, are smaller than the weights are.
bool goes_by_channels(const Tiles& tiles, const Kernel& kernel) {
  return tiles.count() <= kernel.outputs &&
      tiles.count() * kernel.inputs * kPoints * static_cast<int64_t>(sizeof(float)) <= 2 * kSharedBytes;
}

// How the tiles are shared out.
Chunks chunks_of(const Tiles& tiles, const Kernel& kernel) {
  const int64_t count = tiles.count(), threads = at::get_num_threads(), groups = groups_of(kernel.outputs);
  const int64_t floats = kChunkBytes / static_cast<int64_t>(sizeof(float)) / kPoints;
  if (goes_by_channels(tiles, kernel)) {
    // With more threads than groups several share a group, and each transforms its weights for itself.
    const int64_t shares = std::clamp<int64_t>(threads / groups, 1, (count + kRows - 1) / kRows);
    const int64_t share = round_up((count + shares - 1) / shares, kRows);
    return {tiles, share, std::min(share, floats / 2 / kColumns / kRows * kRows)};
  }
  const int64_t width = round_up(kernel.inputs, kWidth) + groups * kColumns;
  const int64_t most = std::max<int64_t>(2, floats / width / kRows) * kRows;
  // As many chunks for every thread.
  const int64_t chunks = round_up((count + most - 1) / most, threads);
  const int64_t size = round_up((count + chunks - 1) / chunks, kRows);
  return {tiles, round_up(count, size), size};
}

template <typename T, typename Epilogue>
void by_tiles(const Chunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue) {
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), size = chunks.size;
  const int64_t operand_plane = size * depth + kSkew, product_plane = groups * size * kColumns + kSkew;
  const Buffer weights(kPoints * groups * depth * kColumns);
  const bool carried = transform_all_weights(kernel, weights.data());
  at::parallel_for(0, chunks.slots(), 1, [&](int64_t begin, int64_t end) {
    const Buffer operand(kPoints * operand_plane), product(kPoints * product_plane);
    InputReader<T> reader(chunks.tiles, x.data, kernel.inputs, x.act);
    std::vector<DirectTile> direct(size);
    DirectSums sums;
    Ahead ahead;
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t first = chunks.first(slot), count = chunks.count(slot);
      transform_tiles(
          reader, first, count, carried, operand.data(), operand_plane, operand_place(depth), direct.data());
      ahead.clear();
      epilogue.for_each_read([&](const auto* p) { ahead.add(chunks.tiles, p, kernel.outputs, first, count); });
      if (slot + 1 < end) {
        x.for_each_read([&](const T* p) {
          ahead.add(chunks.tiles, p, kernel.inputs, chunks.first(slot + 1), chunks.count(slot + 1));
        });
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        ahead.fetch(kPoints);
        for (int64_t g = 0; g < groups; ++g) {
          multiply_outputs(
              operand.data() + point * operand_plane,
              weights.data() + (point * groups + g) * depth * kColumns,
              product.data() + point * product_plane + g * size * kColumns,
              count,
              depth);
        }
      }
      const auto of_chunk = epilogue.chunk(slot);
      for (int64_t g = 0; g < groups; ++g) {
        sums.compute(kernel, g * kColumns, direct.data(), count);
        transform_products(
            chunks.tiles,
            product.data() + g * size * kColumns,
            product_plane,
            first,
            count,
            kernel.outputs,
            g * kColumns,
            sums,
            of_chunk);
      }
    }
    stream_fence();
  });
}

template <typename T, typename Epilogue>
void by_channels(const Chunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue) {
  const Tiles& tiles = chunks.tiles;
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), count = tiles.count();
  const int64_t operand_plane = round_up(count, kRows) * depth + kSkew;
  const Buffer operand(kPoints * operand_plane);
  std::vector<DirectTile> direct(count);
  at::parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRows;
    InputReader<T> reader(tiles, x.data, kernel.inputs, x.act);
    transform_tiles(
        reader,
        first,
        std::min(count, end * kRows) - first,
        true,
        operand.data() + first * depth,
        operand_plane,
        operand_place(depth),
        direct.data() + first);
  });
  const int64_t in_share = chunks.in_share(), shares = chunks.slots() / in_share;
  at::parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t weight_plane = depth * kColumns + kSkew, product_plane = chunks.size * kColumns + kSkew;
    const Buffer weights(kPoints * weight_plane), product(kPoints * product_plane);
    DirectSums sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / shares, share = task % shares;
      const bool carried =
          transform_weights(kernel, g * kColumns, 0, depth, weights.data(), weight_plane) <= kMaxEnergy;
      for (int64_t slot = share * in_share; slot < (share + 1) * in_share; ++slot) {
        const int64_t first = chunks.first(slot), size = chunks.count(slot);
        for (int64_t point = 0; point < kPoints; ++point) {
          multiply_outputs(
              operand.data() + point * operand_plane + first * depth,
              weights.data() + point * weight_plane,
              product.data() + point * product_plane,
              size,
              depth);
        }
        if (carried) {
          sums.compute(kernel, g * kColumns, direct.data() + first, size);
        } else {
          InputReader<T> reader(tiles, x.data, kernel.inputs, x.act);
          sums.compute(kernel, g * kColumns, read_tiles(reader, first, size).data(), size);
        }
        transform_products(
            tiles,
            product.data(),
            product_plane,
            first,
            size,
            kernel.outputs,
            g * kColumns,
            sums,
            epilogue.chunk(slot));
      }
    }
    stream_fence();
  });
}

template <typename T, typename Epilogue>
void convolve(const Chunks& chunks, const Source<T>& x, const Kernel& kernel, const Epilogue& epilogue) {
  if (goes_by_channels(chunks.tiles, kernel)) {
    by_channels(chunks, x, kernel, epilogue);
  } else {
    by_tiles(chunks, x, kernel, epilogue);
  }
}

// --- few positions

template <typename T, typename Epilogue>
void convolve_directly(const Positions& positions, const T* x, const Kernel& kernel, const Epilogue& epilogue) {
  const int64_t count = positions.count(), depth = direct_depth(kernel), groups = groups_of(kernel.outputs);
  const int64_t row_groups = (count + kRows - 1) / kRows;
  const Buffer operand(row_groups * kRows * depth);
  at::parallel_for(
      0, row_groups, std::max<int64_t>(1, kThreadElements / (depth * kRows)), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows;
        gather_positions(positions, x, kernel.inputs, first, std::min(count, end * kRows) - first, operand.data());
      });
  // A group's weights go through the caches once for all positions; with more threads than groups several share one.
  const int64_t shares = std::clamp<int64_t>(at::get_num_threads() / groups, 1, row_groups);
  const int64_t share = (row_groups + shares - 1) / shares * kRows;
  at::parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    const Buffer product(share * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / shares, first = task % shares * share, size = std::min(share, count - first);
      if (size > 0) {
        multiply_positions(kernel, g * kColumns, operand.data() + first * depth, size, product.data());
        finish_positions(product.data(), first, size, kernel.outputs, g * kColumns, epilogue);
      }
    }
  });
}

// --- the weight gradient

// dW, and where the transformed tiles and their products lie.
template <typename T>
struct WeightGradient {
  Tiles tiles;
  Source<T> x;
  const T* dy;
  float* dw; // [outputs][3][3][inputs]
  int64_t inputs, outputs;

  int64_t groups() const {
    return groups_of(inputs);
  }
  // Rows of dy a multiple of 2 KiB apart would fall into the same few lines of
  // the L1 cache.
  int64_t row() const {
    return round_up(outputs, kWidth) + kSkew;
  }
  int64_t tile_bytes() const {
    return kPoints * (row() + groups() * kColumns) * static_cast<int64_t>(sizeof(float));
  }
  int64_t gradient_plane() const {
    return groups() * outputs * kColumns + kSkew;
  }
  int64_t gradient_bytes() const {
    return kPoints * gradient_plane() * static_cast<int64_t>(sizeof(float));
  }
};

// A tile of x and of dy whose share in dW is summed directly.
struct DirectPair {
  DirectTile x, dy;
};

// Up to `most` transformed tiles of x and dy. Those that are summed directly are zero.
template <typename T>
class GradientTiles {
public:
  GradientTiles(const WeightGradient<T>& w, int64_t most)
      : most_(most),
        column_plane_(w.groups() * most * kColumns + kSkew),
        row_plane_(most * w.row() + kSkew),
        columns_(kPoints * column_plane_),
        rows_(kPoints * row_plane_) {
    if (w.inputs % kColumns != 0) {
      // The part of a column group that no vector of channels fills.
      std::fill_n(columns_.data(), kPoints * column_plane_, 0.0f);
    }
  }

  // What a thread transforms tiles with.
  struct Readers {
    InputReader<T> x;
    TileReader<GradientTransform, 0, T> dy;

    explicit Readers(const WeightGradient<T>& w)
        : x(w.tiles, w.x.data, w.inputs, w.x.act), dy(w.tiles, w.dy, w.outputs) {}
  };

  // Tiles first ... first + count - 1 of the convolution become tiles at ... at + count - 1 of these. Returns those of
  // them that are summed directly.
  std::vector<DirectPair> transform(
      const WeightGradient<T>& w,
      Readers& readers,
      int64_t first,
      int64_t count,
      int64_t at) {
    const int64_t most = most_, row = w.row();
    std::vector<int64_t> beyond;
    const auto note = [&](int64_t p) { beyond.push_back(p); };
    const auto column_place = [most](int64_t p, int64_t c) {
      return c / kColumns * most * kColumns + p * kColumns + c % kColumns;
    };
    const auto row_place = [row](int64_t p, int64_t k) { return p * row + k; };
    readers.x.transform(first, count, columns_.data() + at * kColumns, column_plane_, column_place, note);
    readers.dy.transform(first, count, rows_.data() + at * row, row_plane_, row_place, note);
    for (int64_t p = 0; p < count; ++p) {
      // Of a tile with a single block of 2x2 pixels some taps read less than that block.
      if (w.tiles.pixels_down(first + p) <= kOut / 2 && w.tiles.pixels_across(first + p) <= kOut / 2 &&
          !(even(readers.x.read(first + p), w.inputs) && even(readers.dy.read(first + p), w.outputs))) {
        beyond.push_back(p);
      }
    }
    std::sort(beyond.begin(), beyond.end());
    beyond.erase(std::unique(beyond.begin(), beyond.end()), beyond.end());
    std::vector<DirectPair> direct;
    for (const int64_t p : beyond) {
      direct.push_back({readers.x.read(first + p), readers.dy.read(first + p)});
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t c = 0; c < w.groups() * kColumns; c += kColumns) {
          std::fill_n(columns_.data() + point * column_plane_ + column_place(at + p, c), kColumns, 0.0f);
        }
        std::fill_n(rows_.data() + point * row_plane_ + row_place(at + p, 0), w.outputs, 0.0f);
      }
    }
    return direct;
  }

  // gradient (+)= the product of one point and tiles first ... first + count - 1 for output channels begin ... begin
  // + size - 1 and a group of input channels.
  void multiply(
      const WeightGradient<T>& w,
      int64_t point,
      int64_t group,
      int64_t begin,
      int64_t size,
      int64_t first,
      int64_t count,
      float* gradient,
      bool accumulate) const {
    const float* rows = rows_.data() + point * row_plane_ + first * w.row() + begin;
    const float* columns = columns_.data() + point * column_plane_ + (group * most_ + first) * kColumns;
    with_rows(size, [&](auto r) { gradient_product<r>(rows, w.row(), columns, gradient, count, accumulate); });
  }

private:
  int64_t most_, column_plane_, row_plane_;
  Buffer columns_, rows_;
};

// The inverse transform of `size` output channels from `begin` on and a group
// of input channels: the sum of `parts` products, each with planes of
// [size][kColumns].
template <typename T>
void transform_gradient(
    const WeightGradient<T>& w,
    int64_t group,
    int64_t begin,
    int64_t size,
    const std::vector<const float*>& parts,
    int64_t plane) {
  for (int64_t k = 0; k < size; ++k) {
    for (int64_t half = 0; half < kColumns && group * kColumns + half < w.inputs; half += kWidth) {
      const int64_t c = group * kColumns + half, at = k * kColumns + half;
      float* out = w.dw + (begin + k) * kTaps * kTaps * w.inputs + c;
      const int64_t lanes = std::min(kWidth, w.inputs - c);
      transform_square<WeightGradientTransform>(
          [&](int i) {
            Lanes sum = load(parts[0] + i * plane + at);
            for (size_t part = 1; part < parts.size(); ++part) {
              sum = sum + load(parts[part] + i * plane + at);
            }
            return sum;
          },
          [&](int i, Lanes v) { store(out + i * w.inputs, v, lanes); });
    }
  }
}

// dw, laid out as dW, plus the tiles' sums for `size` output channels from `begin` on and a group of input channels.
// Every input meets the outputs that it is under, of those inside the image.
template <typename T>
void add_directly(
    const WeightGradient<T>& w,
    const std::vector<DirectPair>& tiles,
    int64_t group,
    int64_t begin,
    int64_t size,
    float* dw) {
  if (tiles.empty()) {
    return;
  }
  constexpr int taps = kTaps * kTaps;
  for (int64_t c = group * kColumns; c < std::min(w.inputs, (group + 1) * kColumns); c += kWidth) {
    const int64_t lanes = std::min(kWidth, w.inputs - c);
    for (int64_t k = begin; k < begin + size; ++k) {
      float* to = dw + k * taps * w.inputs + c;
      Lanes sums[taps];
#pragma GCC unroll 9
      for (int t = 0; t < taps; ++t) {
        sums[t] = load(to + t * w.inputs, lanes);
      }
      for (const DirectPair& tile : tiles) {
#pragma GCC unroll 6
        for (int y = 0; y < kIn; ++y) {
#pragma GCC unroll 6
          for (int x = 0; x < kIn; ++x) {
            if (!tile.x.has(y * kIn + x)) {
              continue;
            }
            const Lanes value = load(tile.x.values.data() + (y * kIn + x) * w.inputs + c, lanes);
#pragma GCC unroll 3
            for (int u = 0; u < kTaps; ++u) {
#pragma GCC unroll 3
              for (int v = 0; v < kTaps; ++v) {
                const int i = y - u, j = x - v;
                if (i >= 0 && i < kOut && j >= 0 && j < kOut && tile.dy.has(i * kOut + j)) {
                  const Lanes factor = broadcast(tile.dy.values[(i * kOut + j) * w.outputs + k]);
                  sums[u * kTaps + v] = multiply_add(factor, value, sums[u * kTaps + v]);
                }
              }
            }
          }
        }
      }
#pragma GCC unroll 9
      for (int t = 0; t < taps; ++t) {
        store(to + t * w.inputs, sums[t], lanes);
      }
    }
  }
}

// Few tiles: all are transformed, and each product is transformed back as soon
// as it is there.
template <typename T>
void gradient_at_once(const WeightGradient<T>& w) {
  const int64_t count = w.tiles.count();
  GradientTiles<T> transformed(w, count);
  std::vector<std::vector<DirectPair>> direct_from(count); // by the first tile of a thread's share
  at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    typename GradientTiles<T>::Readers readers(w);
    direct_from[begin] = transformed.transform(w, readers, begin, end - begin, begin);
  });
  std::vector<DirectPair> direct;
  for (auto& part : direct_from) {
    std::move(part.begin(), part.end(), std::back_inserter(direct));
  }
  const RowGroups rows{w.outputs};
  // Row groups that go through one group of columns while that is in the L1 cache, and fill whole lines of rows.
  constexpr int64_t together = kGradientRows / kRows, plane = kGradientRows * kColumns + kSkew;
  const int64_t blocks = (rows.count() + together - 1) / together;
  at::parallel_for(0, w.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer product(kPoints * plane);
    const std::vector<const float*> parts{product.data()};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first_group = task % blocks * together;
      const int64_t last_group = std::min(rows.count(), first_group + together);
      const int64_t first = rows.begin(first_group), size = rows.begin(last_group) - first;
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t from = 0; from < count; from += kGradientTiles) {
          const int64_t depth = std::min(kGradientTiles, count - from);
          for (int64_t r = first_group; r < last_group; ++r) {
            float* to = product.data() + point * plane + (rows.begin(r) - first) * kColumns;
            transformed.multiply(w, point, group, rows.begin(r), rows.size(r), from, depth, to, from > 0);
          }
        }
      }
      transform_gradient(w, group, first, size, parts, plane);
      add_directly(w, direct, group, first, size, w.dw);
    }
  });
}

// Many tiles: every thread takes a share of them through its caches, a chunk at
// a time, and the shares are added up.
template <typename T>
void gradient_by_shares(const WeightGradient<T>& w) {
  const int64_t count = w.tiles.count(), plane = w.gradient_plane();
  const int64_t chunks = (count + kGradientTiles - 1) / kGradientTiles;
  const int64_t shares =
      std::clamp<int64_t>(kGradientBytes / w.gradient_bytes(), 1, std::min<int64_t>(chunks, at::get_num_threads()));
  const Buffer gradients(shares * kPoints * plane);
  std::vector<std::vector<float>> summed(shares); // as dW, empty where nothing is summed directly
  const RowGroups rows{w.outputs};
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    GradientTiles<T> transformed(w, std::min(count, kGradientTiles));
    typename GradientTiles<T>::Readers readers(w);
    Ahead ahead;
    for (int64_t share = begin; share < end; ++share) {
      float* gradient = gradients.data() + share * kPoints * plane;
      const int64_t start = chunks * share / shares;
      for (int64_t chunk = start; chunk < chunks * (share + 1) / shares; ++chunk) {
        const int64_t first = chunk * kGradientTiles, size = std::min(kGradientTiles, count - first);
        const std::vector<DirectPair> direct = transformed.transform(w, readers, first, size, 0);
        if (!direct.empty()) {
          summed[share].resize(w.outputs * kTaps * kTaps * w.inputs);
          for (int64_t group = 0; group < w.groups(); ++group) {
            add_directly(w, direct, group, 0, w.outputs, summed[share].data());
          }
        }
        ahead.clear();
        if (chunk + 1 < chunks * (share + 1) / shares) {
          const int64_t next = first + size, next_size = std::min(kGradientTiles, count - next);
          w.x.for_each_read([&](const T* p) { ahead.add(w.tiles, p, w.inputs, next, next_size); });
          ahead.add(w.tiles, w.dy, w.outputs, next, next_size);
        }
        for (int64_t point = 0; point < kPoints; ++point) {
          ahead.fetch(kPoints);
          for (int64_t group = 0; group < w.groups(); ++group) {
            for (int64_t r = 0; r < rows.count(); ++r) {
              float* to = gradient + point * plane + (group * w.outputs + rows.begin(r)) * kColumns;
              transformed.multiply(w, point, group, rows.begin(r), rows.size(r), 0, size, to, chunk > start);
            }
          }
        }
      }
    }
  });
  at::parallel_for(0, w.groups() * rows.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<const float*> parts(shares);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / rows.count(), first = rows.begin(task % rows.count());
      const int64_t size = rows.size(task % rows.count());
      for (int64_t share = 0; share < shares; ++share) {
        parts[share] = gradients.data() + share * kPoints * plane + (group * w.outputs + first) * kColumns;
      }
      transform_gradient(w, group, first, size, parts, plane);
      const int64_t inputs = std::min(kColumns, w.inputs - group * kColumns);
      for (const auto& part : summed) {
        for (int64_t row = first * kTaps * kTaps; !part.empty() && row < (first + size) * kTaps * kTaps; ++row) {
          const int64_t start = row * w.inputs + group * kColumns;
          for (int64_t at = start; at < start + inputs; ++at) {
            w.dw[at] += part[at];
          }
        }
      }
    }
  });
}

template <typename T>
void weight_gradient(const WeightGradient<T>& w) {
  // At once where the transformed tiles are no larger than what would be added
  // up otherwise.
  const int64_t bytes = w.tiles.count() * w.tile_bytes();
  if (bytes <= kSharedBytes || (bytes <= 3 * kSharedBytes && bytes <= 2 * w.gradient_bytes())) {
    gradient_at_once(w);
  } else {
    gradient_by_shares(w);
  }
}

// --- operators

// Activations are float32 or bfloat16, weights float32 or of the activations' dtype; in registers all are float32.
void check_input(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", x.sizes());
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
      "x: expected dtype float32 or bfloat16, got ",
      x.scalar_type());
}

void check(const Tensor& x, const Tensor& weight) {
  check_input(x);
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == kTaps && weight.size(3) == kTaps,
      "weight: expected shape (K, ",
      x.size(1),
      ", 3, 3), got ",
      weight.sizes());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat,
      "weight: expected dtype ",
      x.scalar_type(),
      ", got ",
      weight.scalar_type());
}

// Calls f with a value of x's element type.
template <typename F>
auto with_type(const Tensor& x, const F& f) {
  return x.scalar_type() == at::kFloat ? f(float()) : f(at::BFloat16());
}

Tensor channels_last(const Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor empty_channels_last(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

Tensor empty_output(const Tensor& x, const Tensor& weight) {
  return empty_channels_last({x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
}

Tiles tiles_of(const Tensor& x) {
  return {x.size(0), x.size(2), x.size(3)};
}

// Whether outputs are stored past the caches: they are more than those can keep, and every vector is a whole line.
bool streams(const Tensor& y) {
  constexpr int64_t line = 64;
  return y.scalar_type() == at::kFloat && kWidth * static_cast<int64_t>(sizeof(float)) == line &&
      y.size(1) % kWidth == 0 && should_stream(y.const_data_ptr<float>(), rows_of(y));
}

// (y, mean, M2), the last two empty where they are not asked for.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> convolve_measured(
    const Tensor& x,
    const Source<T>& source,
    const Tensor& weight,
    bool statistics) {
  Tensor y = empty_output(x, weight);
  const int64_t channels = statistics ? y.size(1) : 0;
  Tensor mean = channel_vector(x, channels), m2 = channel_vector(x, channels);
  const Tensor w = weight.to(at::kFloat);
  const Kernel kernel = kernel_of(w);
  const Chunks chunks = chunks_of(tiles_of(x), kernel);
  T* to = y.mutable_data_ptr<T>();
  if (!statistics) {
    convolve(chunks, source, kernel, Write<T>{to, streams(y)});
    return {y, mean, m2};
  }
  ChunkSums sums(chunks, channels);
  const WriteMeasured<T> epilogue{to, streams(y), channels, &sums};
  convolve(chunks, source, kernel, epilogue);
  const Moments moments = epilogue.moments();
  std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<float>());
  std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<float>());
  return {y, mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, bool statistics) {
  check(x, weight);
  TORCH_CHECK_VALUE(!statistics || x.numel() > 0, "x: expected at least one element to measure, got shape ", x.sizes());
  if (x.numel() == 0 || weight.numel() == 0) {
    return {empty_output(x, weight).zero_(), channel_vector(x, 0), channel_vector(x, 0)};
  }
  const Tensor in = channels_last(x);
  return with_type(x, [&](auto zero) {
    using T = decltype(zero);
    return convolve_measured<T>(in, {in.const_data_ptr<T>()}, weight, statistics);
  });
}

// The output; run(y, an element of it, convolve_to) has to call convolve_to with what becomes of the sums.
template <typename F>
Tensor infer(const Tensor& x, const Kernel& kernel, int64_t stride, bool direct, const F& run) {
  TORCH_CHECK_VALUE(stride >= 1 && (direct || stride == 1), "stride: expected 1, or more with direct, got ", stride);
  const Positions positions{x.size(0), x.size(2), x.size(3), stride};
  const bool empty = x.size(2) == 0 || x.size(3) == 0;
  Tensor y = empty_channels_last(
      {x.size(0), kernel.outputs, empty ? 0 : positions.out_height(), empty ? 0 : positions.out_width()}, x);
  if (y.numel() == 0) {
    return y;
  }
  const Tensor in = channels_last(x);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    run(y, zero, [&](const auto& epilogue) {
      const T* from = in.const_data_ptr<T>();
      if (direct) {
        convolve_directly(positions, from, kernel, epilogue);
      } else {
        convolve(chunks_of(tiles_of(x), kernel), Source<T>{from}, kernel, epilogue);
      }
    });
  });
  return y;
}

template <typename T>
Normalise<T> normalise(Tensor& y, const ChannelNorm<float>& norm, const Tensor& residual, bool relu) {
  const T* r = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  return {y.mutable_data_ptr<T>(), streams(y), &norm, r, relu};
}

Tensor residual_of(const Tensor& y, const OptionalTensor& residual) {
  return residual.has_value() ? like_rows("residual", *residual, y, rows_of(y)) : Tensor();
}

Tensor inference(
    const Tensor& x,
    const Tensor& conv_weight,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    double eps,
    bool relu,
    int64_t stride,
    bool direct) {
  check(x, conv_weight);
  Tensor w = conv_weight.to(at::kFloat);
  if (direct && !product_reads(kernel_of(w))) {
    w = w.contiguous();
  }
  return infer(x, kernel_of(w), stride, direct, [&](Tensor& y, auto zero, const auto& convolve_to) {
    using T = decltype(zero);
    if (!running_mean.has_value()) {
      convolve_to(Write<T>{y.mutable_data_ptr<T>(), streams(y)});
      return;
    }
    const ChannelNorm<float> norm = running_norm<float>(y.size(1), running_mean, running_var, weight, bias, eps);
    const Tensor r = residual_of(y, residual);
    convolve_to(normalise<T>(y, norm, r, relu));
  });
}

// packed: [groups of 16 outputs, an even number][tap, inputs rounded up to 16][16], see fastres.ops.conv3x3.pack.
Tensor packed_inference(
    const Tensor& x,
    const Tensor& packed,
    int64_t outputs,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    bool relu,
    int64_t stride,
    bool product) {
  constexpr int64_t taps = kTaps * kTaps;
  check_input(x);
  const int64_t depth = round_up(x.size(1), kPanel), groups = round_up((outputs + kPanel - 1) / kPanel, 2);
  const std::array<int64_t, 3> sizes = {groups, taps * depth, kPanel};
  const at::IntArrayRef shape(sizes);
  TORCH_CHECK_VALUE(outputs >= 1, "outputs: expected at least 1, got ", outputs);
  TORCH_CHECK_VALUE(packed.sizes() == shape, "packed: expected shape ", shape, ", got ", packed.sizes());
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kFloat, "packed: expected dtype float32, got ", packed.scalar_type());
  const Tensor w = packed.contiguous();
  Kernel kernel{w.const_data_ptr<float>(), outputs, x.size(1), taps * depth * kPanel, 1, kPanel, {}};
  for (int64_t t = 0; t < taps; ++t) {
    kernel.tap[t] = t * depth * kPanel;
  }
  ChannelNorm<float> norm; // adds the bias
  norm.mean.assign(outputs, 0.0f);
  norm.scale.assign(outputs, 1.0f);
  norm.bias.assign(outputs, 0.0f);
  if (bias.has_value()) {
    const float* values = channel_data<float>("bias", bias, outputs);
    norm.bias.assign(values, values + outputs);
  }
  return infer(x, kernel, stride, product, [&](Tensor& y, auto zero, const auto& convolve_to) {
    using T = decltype(zero);
    const Tensor r = residual_of(y, residual);
    convolve_to(normalise<T>(y, norm, r, relu));
  });
}

void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const std::array<int64_t, 4> sizes = {x.size(0), weight.size(0), x.size(2), x.size(3)};
  const at::IntArrayRef shape(sizes);
  TORCH_CHECK_VALUE(dy.sizes() == shape, "dy: expected shape ", shape, ", got ", dy.sizes());
  TORCH_CHECK_TYPE(
      dy.scalar_type() == x.scalar_type(), "dy: expected dtype ", x.scalar_type(), ", got ", dy.scalar_type());
}

// In the weight's dtype; in its layout where that is channels_last, and else contiguous.
template <typename T>
Tensor weight_gradient_of(const Tensor& x, const Source<T>& source, const Tensor& dy, const Tensor& weight) {
  const auto options = weight.options().dtype(at::kFloat);
  Tensor to = at::empty(weight.sizes(), options.memory_format(at::MemoryFormat::ChannelsLast));
  if (x.numel() == 0 || weight.numel() == 0) {
    to.zero_();
  } else {
    weight_gradient<T>(
        {tiles_of(x), source, dy.const_data_ptr<T>(), to.mutable_data_ptr<float>(), x.size(1), weight.size(0)});
  }
  to = to.to(weight.scalar_type());
  return weight.is_contiguous() ? to.contiguous() : to;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    const OptionalTensor& added,
    std::array<bool, 2> needs) {
  check(x, weight);
  check_gradient(dy, x, weight);
  TORCH_CHECK_VALUE(
      !added.has_value() || (added->sizes() == x.sizes() && added->scalar_type() == x.scalar_type()),
      "added: expected shape and dtype of x");
  const auto none = x.options().memory_format(std::nullopt);
  Tensor dx = needs[0] ? empty_channels_last(x.sizes(), x) : at::empty({0}, none);
  Tensor dweight = at::empty({0}, none.dtype(weight.scalar_type()));
  const Tensor gradient = channels_last(dy), in = channels_last(x), w = weight.to(at::kFloat);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    if (needs[0] && weight.numel() == 0) {
      dx.zero_();
      if (added.has_value()) {
        dx.add_(*added);
      }
    } else if (needs[0] && x.numel() > 0) {
      const Kernel kernel = turned(kernel_of(w));
      const Chunks chunks = chunks_of(tiles_of(x), kernel);
      const Source<T> source{gradient.const_data_ptr<T>()};
      T* to = dx.mutable_data_ptr<T>();
      if (added.has_value()) {
        const Tensor other = channels_last(*added);
        convolve(chunks, source, kernel, WriteAdded<T>{to, other.const_data_ptr<T>(), streams(dx)});
      } else {
        convolve(chunks, source, kernel, Write<T>{to, streams(dx)});
      }
    }
    if (needs[1]) {
      dweight = weight_gradient_of<T>(in, {in.const_data_ptr<T>()}, gradient, weight);
    }
  });
  return {dx, dweight};
}

// --- the convolution of what a normalisation makes of x

void check_normed(const Tensor& x, const Tensor& weight) {
  check(x, weight);
  TORCH_CHECK_VALUE(x.numel() > 0 && weight.numel() > 0, "x: expected at least one element, got shape ", x.sizes());
}

// x, a residual and a keep mask, as the input's transform reads them. Their memory is this object's.
template <typename T>
struct Activated {
  Rows rows;
  Tensor x, residual, keep;
  ApplyParams<T, float> params{};

  Activated(
      const Tensor& x_in,
      const OptionalTensor& residual_in,
      const Tensor& keep_in,
      bool relu,
      double dropout_p,
      std::string_view order)
      : rows{true, x_in.size(0), x_in.size(1), x_in.size(2) * x_in.size(3)}, x(channels_last(x_in)), keep(keep_in) {
    if (residual_in.has_value()) {
      residual = like_rows("residual", *residual_in, x, rows);
    }
    const int64_t bytes = rows.rows() * bitmask_row_bytes(rows.inner());
    TORCH_CHECK_VALUE(
        dropout_p == 0 || (keep.scalar_type() == at::kByte && keep.numel() == bytes && keep.is_contiguous()),
        "keep: expected uint8 of ",
        bytes,
        " elements, got ",
        keep.scalar_type(),
        " of ",
        keep.numel());
    params.x = x.const_data_ptr<T>();
    params.residual = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
    params.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    params.relu = relu;
    params.act_add = parse_order(order);
    params.rows = rows;
    params.kept = dropout_p > 0 ? keep.const_data_ptr<uint8_t>() : nullptr;
  }
  Activated(const Activated&) = delete;
  Activated& operator=(const Activated&) = delete;

  Source<T> source() const {
    return {params.x, &params};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_forward(
    const Tensor& x,
    const OptionalTensor& x_mean,
    const OptionalTensor& x_m2,
    const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& residual,
    const OptionalTensor& seed,
    const Tensor& weight,
    double momentum,
    double eps,
    bool relu,
    double dropout_p,
    std::string_view order,
    bool statistics) {
  check_normed(x, weight);
  const Tensor in = channels_last(x);
  const Rows rows{true, x.size(0), x.size(1), x.size(2) * x.size(3)};
  Tensor keep = at::empty({dropout_p > 0 ? rows.rows() * bitmask_row_bytes(rows.inner()) : 0}, byte_options(x));
  if (dropout_p > 0) {
    draw_keep_bits(dropout_of(seed, dropout_p), rows, keep.mutable_data_ptr<uint8_t>());
  }
  return with_type(x, [&](auto zero) {
    using T = decltype(zero);
    Activated<T> activated(in, residual, keep, relu, dropout_p, order);
    Tensor mean, rstd;
    const ChannelNorm<float> norm = finalise<T>(
        in, rows, x_mean, x_m2, norm_weight, norm_bias, running_mean, running_var, momentum, eps, mean, rstd);
    activated.params.norm = &norm;
    const auto [y, y_mean, y_m2] = convolve_measured<T>(in, activated.source(), weight, statistics);
    return std::make_tuple(y, y_mean, y_m2, mean, rstd, keep);
  });
}

// What reaches x, the residual and the normalisation's parameters: (dx, dr, dnorm_weight, dnorm_bias).
template <typename T>
std::array<Tensor, 4> norm_act_input_gradient(
    const Tensor& dy,
    const Activated<T>& activated,
    const Saved<float>& saved,
    const Tensor& weight,
    bool needs_residual) {
  const Tensor& x = activated.x;
  const int64_t channels = x.size(1);
  // A residual that joins before the activation has g as its gradient, one that joins after it the whole of da. Where
  // neither is asked for dx takes g's place.
  const bool keeps_da = needs_residual && activated.params.act_add, keeps_g = needs_residual && !keeps_da;
  Tensor g = empty_channels_last(x.sizes(), x), dr = at::empty({0}, x.options().memory_format(std::nullopt));
  if (keeps_da) {
    dr = empty_channels_last(x.sizes(), x);
  }
  const Tensor w = weight.to(at::kFloat);
  const Kernel kernel = turned(kernel_of(w));
  const Chunks chunks = chunks_of(tiles_of(x), kernel);
  ChunkSums sums(chunks, channels);
  const MaskedGradient<T> epilogue{
      &activated.params,
      g.mutable_data_ptr<T>(),
      keeps_da ? dr.mutable_data_ptr<T>() : nullptr,
      streams(g),
      channels,
      &sums};
  convolve(chunks, Source<T>{dy.const_data_ptr<T>()}, kernel, epilogue);
  const auto [sum_g, sum_products] = epilogue.totals();
  Tensor dnorm_weight = channel_vector(x, channels), dnorm_bias = channel_vector(x, channels);
  float* of_weight = dnorm_weight.mutable_data_ptr<float>();
  float* of_bias = dnorm_bias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    of_weight[c] = static_cast<float>(sum_products[c] * saved.rstd[c]);
    of_bias[c] = static_cast<float>(sum_g[c]);
  }
  const GradientNorm<float> gradient = gradient_norm(
      *activated.params.norm, saved.rstd, of_weight, of_bias, static_cast<double>(activated.rows.count()));
  Tensor dx = keeps_g ? empty_channels_last(x.sizes(), x) : g;
  BackwardParams<T> params{};
  params.dy = g.const_data_ptr<T>();
  params.x = activated.params.x;
  params.dx = dx.mutable_data_ptr<T>();
  params.norm = activated.params.norm;
  params.gradient = &gradient;
  params.gate = fastres::Gate::open;
  params.keep_scale = 1.0f;
  params.centred = true;
  params.stream = keeps_g && should_stream(params.dx, activated.rows);
  params.rows = activated.rows;
  gradient_all(params);
  return {dx, keeps_g ? g : dr, dnorm_weight, dnorm_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias,
    const OptionalTensor& residual,
    const Tensor& keep,
    const Tensor& weight,
    bool relu,
    double dropout_p,
    std::string_view order,
    std::array<bool, 3> needs) {
  check_normed(x, weight);
  check_gradient(dy, x, weight);
  TORCH_CHECK_VALUE(!needs[1] || (needs[0] && residual.has_value()), "needs: the residual's gradient needs x's");
  const Saved<float> saved(x.size(1), mean, rstd, norm_weight, norm_bias);
  const ChannelNorm<float> norm = saved.norm();
  const Tensor gradient = channels_last(dy);
  const auto none = x.options().memory_format(std::nullopt);
  Tensor dweight = at::empty({0}, none.dtype(weight.scalar_type()));
  std::array<Tensor, 4> rest = {at::empty({0}, none), at::empty({0}, none), channel_vector(x, 0), channel_vector(x, 0)};
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    Activated<T> activated(x, residual, keep, relu, dropout_p, order);
    activated.params.norm = &norm;
    if (needs[2]) {
      dweight = weight_gradient_of<T>(activated.x, activated.source(), gradient, weight);
    }
    if (needs[0]) {
      rest = norm_act_input_gradient<T>(gradient, activated, saved, weight, needs[1]);
    }
  });
  return {rest[0], rest[1], dweight, rest[2], rest[3]};
}

} // namespace
} // namespace winograd
} // namespace CPU_CAPABILITY
} // namespace fastres

// The baseline module leaves the operators to PyTorch's convolution.
TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("conv3x3_forward", fastres::winograd::forward);
  m.impl("conv3x3_backward", fastres::winograd::backward);
  m.impl("conv3x3_inference", fastres::winograd::inference);
  m.impl("conv3x3_packed", fastres::winograd::packed_inference);
  m.impl("norm_act_conv3x3_forward", fastres::winograd::norm_act_forward);
  m.impl("norm_act_conv3x3_backward", fastres::winograd::norm_act_backward);
}

#endif
