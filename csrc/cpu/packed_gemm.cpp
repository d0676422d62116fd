// The convolution in inference as one matrix product with packed weights: loop order, threads, micro-kernel.
//
// A thread has a share of the positions and of the output channels. It goes through its positions in blocks that stay
// in its L2 cache; of a block, through its column groups, whose weights it takes a step of the depth at a time, so that
// they stay in the L1 cache; and of those through the tiles of kRows rows, whose sums stay in registers. After the last
// step a tile goes through the epilogue out of its registers. Meanwhile the next step's weights are prefetched.
#include "packed_gemm.h"

#include "caches.h"
#include "epilogues.h"
#include "workspace.h"

#include <algorithm>
#include <optional>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// Gathered elements that are worth a thread's start.
constexpr int64_t kThreadElements = 64 * 1024;
// Of the L1 cache for weights, and of the L2 cache for rows of the operand.
constexpr double kWeightsShare = 2.0 / 3, kRowsShare = 3.0 / 8;
// Bytes a cycle that a thread reads from beyond its caches, roughly.
constexpr int64_t kBytesPerCycle = 4;

// Rows of weights whose sums are taken in one go, for rows of the operand of `lines` runs of `run` elements: some whole
// runs, or an even part of one.
int64_t step_of(int64_t run, int64_t lines) {
  const int64_t most = static_cast<int64_t>(kWeightsShare * Caches::of_machine().l1) / (kColumns * sizeof(float));
  if (run <= most) {
    const int64_t steps = (lines * run + most - 1) / most;
    return (lines + steps - 1) / steps * run;
  }
  const int64_t steps = (run + most - 1) / most;
  return round_up((run + steps - 1) / steps, kWidth);
}

// Rows of the operand, or lines of the input, of `size` elements that a block has.
int64_t block_of(int64_t size) {
  return static_cast<int64_t>(kRowsShare * Caches::of_machine().l2) / (size * static_cast<int64_t>(sizeof(float)));
}

// How many ways the items and the column groups are cut. Their product is at most the number of threads.
struct Shares {
  int64_t rows, columns;
};

template <typename Work>
Shares shares_of(const Work& work, int64_t groups, int64_t depth) {
  const int64_t threads = get_num_threads(), items = work.items();
  const auto cycles = [&](int64_t rows, int64_t columns) {
    const int64_t tiles = work.tiles((items + rows - 1) / rows), own = (groups + columns - 1) / columns;
    const int64_t read = (tiles * kRows + own * kColumns) * depth * static_cast<int64_t>(sizeof(float));
    return tiles * own * depth * kRows + read / kBytesPerCycle;
  };
  Shares best{1, 1};
  for (int64_t columns = 1; columns <= std::min(threads, groups); ++columns) {
    const int64_t rows = std::min(threads / columns, work.tiles(items));
    if (cycles(rows, columns) < cycles(best.rows, best.columns)) {
      best = {rows, columns};
    }
  }
  return best;
}

// Rows of the operand: `lines` runs of `run` consecutive elements each, `line` elements apart; and rows `row` apart.
struct Operand {
  int64_t row, lines, line, run;
};

// Rows of one tile: consecutive positions from `first` on.
struct Tile {
  const float* operand;
  int64_t first, rows;
};

// What is brought into the caches while a tile is multiplied: a part of the weights of the step after this one, and the
// next tile's rows where they are read for the first time.
struct Ahead {
  const float *low, *high;
  int64_t vectors;   // in steps of kPanel
  const float* rows; // or null

  // Rows of weights between two calls of `fetch`, a line of the cache of each row of the operand.
  static constexpr int64_t kEvery = 16;

  void fetch(int64_t count, int64_t tile_rows, int64_t row, int64_t at) {
    for (int64_t i = std::min(count, vectors); i > 0; --i, --vectors) {
      __builtin_prefetch(low, 0, 2);
      low += kPanel;
      if constexpr (kWidth == kPanel) {
        __builtin_prefetch(high, 0, 2);
        high += kPanel;
      }
    }
    if (rows != nullptr) {
      for (int64_t r = 0; r < tile_rows; ++r) {
        __builtin_prefetch(rows + r * row + at, 0, 3);
      }
    }
  }
};

// finish(r, low, high) for the sums over some rows of weights of R rows of the operand. `begun` has the sums over the
// rows before, [R][kColumns], or is null.
template <int R, typename Finish>
inline void multiply_tile(
    const float* operand,
    const Operand& shape,
    const float* low,
    const float* high,
    Ahead ahead,
    const float* begun,
    const Finish& finish) {
  Lanes sum_low[R], sum_high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sum_low[r] = begun != nullptr ? load(begun + r * kColumns) : Lanes{};
    sum_high[r] = begun != nullptr ? load(begun + r * kColumns + kWidth) : Lanes{};
  }
  // A short rest would cost more than a few lines of the cache that are not fetched ahead.
  const int64_t row = shape.row, every = shape.run < 2 * Ahead::kEvery ? shape.run : Ahead::kEvery;
  const int64_t stretches = shape.lines * ((shape.run + every - 1) / every);
  const int64_t share = (ahead.vectors + stretches - 1) / stretches;
  for (int64_t line = 0; line < shape.lines; ++line, operand += shape.line) {
    // Four rows to a pointer: twelve pointers would not fit into registers.
    const float* quad[3] = {operand, operand + 4 * row, operand + 8 * row};
    for (int64_t begin = 0; begin < shape.run; begin += every) {
      const int64_t count = std::min(every, shape.run - begin);
      ahead.fetch(share, R, row, line * shape.line + begin);
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; ++c) {
        const Lanes weights_low = load(low + c * kPanel), weights_high = load(high + c * kPanel);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const Lanes factor = broadcast(quad[r / 4][r % 4 * row + c]);
          sum_low[r] = multiply_add(factor, weights_low, sum_low[r]);
          sum_high[r] = multiply_add(factor, weights_high, sum_high[r]);
        }
      }
      quad[0] += count;
      quad[1] += count;
      quad[2] += count;
      low += count * kPanel;
      high += count * kPanel;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    finish(r, sum_low[r], sum_high[r]);
  }
}

// The outputs of tiles, of which those of column groups from ... to - 1. `product` has room for their rows times
// kColumns; the tiles' positions follow each other.
template <typename T, bool kGeneral>
void multiply_block(
    const std::vector<Tile>& tiles,
    const Operand& operand,
    const Panels& weights,
    int64_t from,
    int64_t to,
    float* product,
    const Biased<T, kGeneral>& epilogue) {
  constexpr std::integral_constant<int64_t, kWidth> whole_vector{};
  const int64_t depth = weights.rows(), step = step_of(operand.run, operand.lines);
  const int64_t first = tiles.front().first, count = tiles.back().first + tiles.back().rows - first;
  for (int64_t g = from; g < to; ++g) {
    const float* low = weights.data + g * kColumns * depth;
    const float* high = low + high_vector(depth);
    const int64_t c = g * kColumns;
    const bool in_registers = !kGeneral && c + kColumns <= weights.outputs;
    for (int64_t k = 0; k < depth;) {
      // Whole lines, or a part of one.
      const int64_t line = k / operand.run, within = k % operand.run;
      Operand part{operand.row, 1, operand.line, std::min(step, operand.run - within)};
      if (within == 0 && step >= operand.run) {
        part = {operand.row, std::min(step / operand.run, operand.lines - line), operand.line, operand.run};
      }
      const int64_t rows = part.lines * part.run, next = k + rows;
      Ahead all{low + next * kPanel, high + next * kPanel, std::min(step, depth - next), nullptr};
      if (next == depth && g + 1 < to) {
        all = {low + kColumns * depth, high + kColumns * depth, std::min(step, depth), nullptr};
      }
      for (size_t i = 0; i < tiles.size(); ++i) {
        const Tile& tile = tiles[i];
        const int64_t count = static_cast<int64_t>(tiles.size()), share = static_cast<int64_t>(i);
        const int64_t begin = all.vectors * share / count, end = all.vectors * (share + 1) / count;
        const bool first_read = g == from && i + 1 < tiles.size();
        const Ahead ahead{
            all.low + begin * kPanel,
            all.high + begin * kPanel,
            end - begin,
            first_read ? tiles[i + 1].operand + line * operand.line + within : nullptr};
        with_rows(tile.rows, [&](auto kTileRows) {
          const float* in = tile.operand + line * operand.line + within;
          float* sums = product + (tile.first - first) * kColumns;
          const float* begun = k > 0 ? sums : nullptr;
          if (in_registers && next == depth) {
            const auto vector_low = epilogue.vector(c, whole_vector);
            const auto vector_high = epilogue.vector(c + kWidth, whole_vector);
            const int64_t at = tile.first * weights.outputs + c;
            epilogue.prefetch(at, kTileRows, weights.outputs);
            multiply_tile<kTileRows>(
                in, part, low + k * kPanel, high + k * kPanel, ahead, begun, [&](int r, Lanes v, Lanes w) {
                  vector_low(tile.first + r, at + r * weights.outputs, v);
                  vector_high(tile.first + r, at + r * weights.outputs + kWidth, w);
                });
          } else {
            multiply_tile<kTileRows>(
                in, part, low + k * kPanel, high + k * kPanel, ahead, begun, [&](int r, Lanes v, Lanes w) {
                  store(sums + r * kColumns, v);
                  store(sums + r * kColumns + kWidth, w);
                });
          }
        });
      }
      k = next;
    }
    if (!in_registers) {
      finish_positions(product, first, count, weights.outputs, c, false, epilogue);
    }
  }
}

template <typename T>
inline void copy_run(const T* from, int64_t count, float* to) {
  if (count < kWidth) {
    store(to, load(from, count), count);
    return;
  }
  for (int64_t i = 0; i + kWidth <= count; i += kWidth) {
    store(to + i, load(from + i));
  }
  store(to + count - kWidth, load(from + count - kWidth));
}

// The rows of the operand of positions first ... first + count - 1.
template <typename T>
void gather_rows(
    const Positions& positions,
    const T* x,
    const Panels& weights,
    int64_t first,
    int64_t count,
    float* operand) {
  const int64_t kernel = positions.kernel, depth = weights.depth, channels = weights.inputs;
  const int64_t width = positions.out_width(), height = positions.out_height();
  for (int64_t p = first; p < first + count; ++p) {
    const int64_t top = p / width % height * positions.stride - positions.padding;
    const int64_t left = p % width * positions.stride - positions.padding;
    // Taps of a line that lie inside.
    const int64_t begin = std::clamp<int64_t>(-left, 0, kernel);
    const int64_t end = std::clamp<int64_t>(positions.width - left, begin, kernel);
    const T* image = x + p / (width * height) * positions.height * positions.width * channels;
    for (int64_t i = 0; i < kernel; ++i, operand += kernel * depth) {
      const int64_t y = top + i;
      if (y < 0 || y >= positions.height || begin == end) {
        std::fill_n(operand, kernel * depth, 0.0f);
        continue;
      }
      std::fill_n(operand, begin * depth, 0.0f);
      const T* line = image + (y * positions.width + left) * channels;
      if (depth == channels) {
        copy_run(line + begin * channels, (end - begin) * channels, operand + begin * depth);
      } else {
        for (int64_t t = begin; t < end; ++t) {
          copy_run(line + t * channels, channels, operand + t * depth);
          std::fill_n(operand + t * depth + channels, depth - channels, 0.0f);
        }
      }
      std::fill_n(operand + end * depth, (kernel - end) * depth, 0.0f);
    }
  }
}

// Copies input lines first ... first + count - 1 of an image, which may lie outside, with the padding on both sides.
template <typename T>
void pad_lines(const Positions& positions, const T* image, int64_t channels, int64_t first, int64_t count, float* to) {
  const int64_t margin = positions.padding * channels, width = positions.width * channels;
  for (int64_t y = first; y < first + count; ++y, to += width + 2 * margin) {
    if (y < 0 || y >= positions.height) {
      std::fill_n(to, width + 2 * margin, 0.0f);
      continue;
    }
    std::fill_n(to, margin, 0.0f);
    copy_run(image + y * width, width, to + margin);
    std::fill_n(to + margin + width, margin, 0.0f);
  }
}

// How rows of the operand come into being.
enum class Way {
  rows,   // those of x, one a position
  lines,  // parts of the lines of x
  padded, // parts of lines that are copied with their padding
  copied, // copied one by one
};

Way way_of(const Positions& positions, const Panels& weights, bool is_float) {
  if (weights.depth != weights.inputs) {
    return Way::copied;
  }
  if (positions.kernel == 1 && positions.stride == 1 && positions.padding == 0) {
    return is_float ? Way::rows : Way::copied;
  }
  // Tiles do not reach from one line into the next.
  const int64_t width = positions.out_width();
  if (2 * width < kRows * RowGroups{width}.count()) {
    return Way::copied;
  }
  return is_float && positions.padding == 0 ? Way::lines : Way::padded;
}

// The work on a convolution, of which a thread does its share. An item is a position, or a line of them.
template <typename T, bool kGeneral>
class Work {
public:
  Work(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue)
      : positions_(positions),
        x_(x),
        weights_(weights),
        epilogue_(epilogue),
        way_(way_of(positions, weights, std::is_same_v<T, float>)) {
    const int64_t channels = weights.inputs, kernel = positions.kernel;
    if (by_lines()) {
      const int64_t line = (positions.width + 2 * positions.padding) * channels;
      operand_ = {positions.stride * channels, kernel, line, kernel * channels};
      block_ = (block_of(line) - kernel) / positions.stride + 1;
    } else {
      operand_ = {weights.rows(), 1, 0, weights.rows()};
      block_ = std::max<int64_t>(2, block_of(weights.rows()) / kRows) * kRows;
    }
    block_ = std::clamp<int64_t>(block_, 1, items());
  }

  bool by_lines() const {
    return way_ == Way::lines || way_ == Way::padded;
  }
  int64_t items() const {
    return by_lines() ? positions_.images * positions_.out_height() : positions_.count();
  }
  // Tiles of some items.
  int64_t tiles(int64_t items) const {
    return by_lines() ? items * RowGroups{positions_.out_width()}.count() : RowGroups{items}.count();
  }
  bool copies_rows() const {
    return way_ == Way::copied;
  }

  // The rows of items first ... first + count - 1, one after the other.
  void copy_rows(int64_t first, int64_t count, float* to) const {
    gather_rows(positions_, x_, weights_, first, count, to);
  }

  // Items first ... last - 1 and column groups from ... to - 1. `copied` has the rows of all items, or is null.
  void run(int64_t first, int64_t last, int64_t from, int64_t to, const float* copied) const {
    const int64_t width = by_lines() ? positions_.out_width() : 1;
    const Workspace product(block_ * width * kColumns), own(copied == nullptr ? copied_elements() : 0);
    std::vector<Tile> tiles;
    for (int64_t item = first; item < last;) {
      // Lines of one image.
      const int64_t height = by_lines() ? positions_.out_height() : items();
      const int64_t end = std::min(last, (item / height + 1) * height);
      const int64_t blocks = (end - item + block_ - 1) / block_, size = (end - item + blocks - 1) / blocks;
      const float* rows = rows_of_block(item, size, copied, own.data());
      tiles.clear();
      for (int64_t line = 0; line < (by_lines() ? size : 1); ++line) {
        const float* operand = rows + line * positions_.stride * operand_.line;
        const RowGroups groups{by_lines() ? width : size};
        for (int64_t i = 0; i < groups.count(); ++i) {
          tiles.push_back(
              {operand + groups.begin(i) * operand_.row, (item + line) * width + groups.begin(i), groups.size(i)});
        }
      }
      multiply_block(tiles, operand_, weights_, from, to, product.data(), epilogue_);
      item += size;
    }
  }

private:
  Positions positions_;
  const T* x_;
  Panels weights_;
  const Biased<T, kGeneral>& epilogue_;
  Way way_;
  Operand operand_;
  int64_t block_; // items

  int64_t lines_read(int64_t lines) const {
    return (lines - 1) * positions_.stride + positions_.kernel;
  }
  // Of a block.
  int64_t copied_elements() const {
    return way_ == Way::copied ? block_ * operand_.run : way_ == Way::padded ? lines_read(block_) * operand_.line : 0;
  }
  const float* rows_of_block(int64_t item, int64_t size, const float* copied, float* own) const {
    if constexpr (std::is_same_v<T, float>) {
      if (way_ == Way::rows) {
        return x_ + item * operand_.row;
      }
    }
    if (way_ == Way::copied) {
      if (copied != nullptr) {
        return copied + item * operand_.run;
      }
      copy_rows(item, size, own);
      return own;
    }
    const int64_t height = positions_.out_height(), channels = weights_.inputs;
    const T* image = x_ + item / height * positions_.height * positions_.width * channels;
    const int64_t top = item % height * positions_.stride - positions_.padding;
    if constexpr (std::is_same_v<T, float>) {
      if (way_ == Way::lines) {
        return image + top * operand_.line;
      }
    }
    pad_lines(positions_, image, channels, top, lines_read(size), own);
    return own;
  }
};

} // namespace

template <typename T, bool kGeneral>
void packed_gemm(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue) {
  const Work<T, kGeneral> work(positions, x, weights, epilogue);
  const int64_t items = work.items(), groups = groups_of(weights.outputs), depth = weights.rows();
  const Shares shares = shares_of(work, groups, depth);
  std::optional<Workspace> copied;
  if (work.copies_rows() && shares.columns > 1) {
    copied.emplace(items * depth);
    parallel_for(0, items, std::max<int64_t>(1, kThreadElements / depth), [&](int64_t begin, int64_t end) {
      work.copy_rows(begin, end - begin, copied->data() + begin * depth);
    });
  }
  parallel_for(0, shares.rows * shares.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / shares.columns, column = task % shares.columns;
      work.run(
          items * row / shares.rows,
          items * (row + 1) / shares.rows,
          groups * column / shares.columns,
          groups * (column + 1) / shares.columns,
          copied ? copied->data() : nullptr);
    }
    stream_fence();
  });
}

template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, false>&);
template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, true>&);
template void packed_gemm(const Positions&, const BFloat16*, const Panels&, const Biased<BFloat16, false>&);
template void packed_gemm(const Positions&, const BFloat16*, const Panels&, const Biased<BFloat16, true>&);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
