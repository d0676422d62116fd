// The convolution in inference as one matrix product with packed weights: loop order, threads, micro-kernel.
//
// A thread has a share of the positions and of the output channels. It goes through its positions in blocks that stay
// in its L2 cache; of a block, through its column groups, whose weights it takes a step of the depth at a time, so that
// they stay in the L1 cache; and of those through the tiles of kRows rows, whose sums stay in registers. After the last
// step a tile goes through the epilogue out of its registers. Meanwhile the next step's weights are prefetched.
//
// Rows and depth are counted in words (gemm.h). Weights are floats; where words are pairs, those of a step are rounded
// and paired on their way into the L1 cache, for all tiles of the block.
#include "packed_gemm.h"

#include "caches.h"
#include "epilogues.h"
#include "gathered_rows.h"
#include "workspace.h"

#include <algorithm>
#include <optional>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

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

// Rows of the operand: `lines` runs of `run` consecutive words each, `line` words apart; and rows `row` apart.
struct Operand {
  int64_t row, lines, line, run;
};

// Rows of one tile: consecutive positions from `first` on.
template <typename Word>
struct Tile {
  const Word* operand;
  int64_t first, rows;
};

// What is brought into the caches while a tile is multiplied: a part of the weights of the step after this one, and the
// next tile's rows where they are read for the first time.
template <typename Word>
struct Ahead {
  const float *low, *high;
  int64_t vectors;  // in steps of kPanel
  const Word* rows; // or null

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

// finish(r, v, sum) for the sums over some rows of weights of R rows of the operand and so many vectors of outputs.
// `begun` has the sums over the rows before, [R][kColumns], or is null.
template <int R, int Vectors, typename Word, typename Finish>
inline void multiply_tile(
    const Word* operand,
    const Operand& shape,
    const Word* low,
    const Word* high,
    Ahead<Word> ahead,
    const float* begun,
    const Finish& finish) {
  Accumulators<R, Vectors> sums;
  sums.begin(begun);
  // A short rest would cost more than a few lines of the cache that are not fetched ahead.
  constexpr int64_t most = Ahead<Word>::kEvery;
  const int64_t row = shape.row, every = shape.run < 2 * most ? shape.run : most;
  const int64_t stretches = shape.lines * ((shape.run + every - 1) / every);
  const int64_t share = (ahead.vectors + stretches - 1) / stretches;
  for (int64_t line = 0; line < shape.lines; ++line, operand += shape.line) {
    // Four rows to a pointer: twelve pointers would not fit into registers.
    const Word* quad[3] = {operand, operand + 4 * row, operand + 8 * row};
    for (int64_t begin = 0; begin < shape.run; begin += every) {
      const int64_t count = std::min(every, shape.run - begin);
      ahead.fetch(share, R, row, line * shape.line + begin);
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; ++c) {
        const auto factor = [&](int r) __attribute__((always_inline)) { return quad[r / 4] + (r % 4 * row + c); };
        sums.add(factor, low + c * kPanel, high + c * kPanel);
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
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      finish(r, v, sums.sum[r][v]);
    }
  }
}

// The weights of a step as words, [rows][kPanel] for the first vector of outputs and then as many for the second.
template <typename Word>
struct StepWeights {
  const Word *low, *high;

  StepWeights(const float* low, const float* high, int64_t, float*) : low(low), high(high) {}
};

#if defined(CPU_CAPABILITY_AVX512)
// Pairs are made in `scratch`, of `count` rows of floats and zeros after an odd one.
template <>
struct StepWeights<BFloat16Pair> {
  const BFloat16Pair *low, *high;

  StepWeights(const float* low, const float* high, int64_t count, float* scratch) {
    BFloat16Pair* to = reinterpret_cast<BFloat16Pair*>(scratch);
    this->low = to;
    this->high = to + (count + 1) / 2 * kPanel;
    for (const float* from : {low, high}) {
      for (int64_t i = 0; i < count; i += 2, from += 2 * kPanel, to += kPanel) {
        store(to, paired(load(from), i + 1 < count ? load(from + kPanel) : Lanes{}));
      }
    }
  }
};
#endif

// The outputs of tiles, of which those of column groups from ... to - 1. `product` has room for their rows times
// kColumns, `scratch` for a step's words; the tiles' positions follow each other.
template <typename Word, typename T, bool kGeneral>
void multiply_block(
    const std::vector<Tile<Word>>& tiles,
    const Operand& operand,
    const Panels& weights,
    int64_t from,
    int64_t to,
    float* product,
    float* scratch,
    const Biased<T, kGeneral>& epilogue) {
  constexpr std::integral_constant<int64_t, kWidth> whole_vector{};
  // Floats of a row of words, and of one of two groups of outputs.
  constexpr int64_t row = kNumbers<Word> * kPanel;
  const int64_t depth = words_of<Word>(weights.rows()), step = step_of(operand.run, operand.lines);
  const int64_t first = tiles.front().first, count = tiles.back().first + tiles.back().rows - first;
  for (int64_t g = from; g < to; ++g) {
    const float* low = weights.data + g * kColumns * weights.rows();
    const float* high = low + high_vector(weights.rows());
    const int64_t c = g * kColumns, columns = std::min(kColumns, weights.outputs - c);
    const bool in_registers = !kGeneral && columns % kWidth == 0;
    for (int64_t k = 0; k < depth;) {
      // Whole lines, or a part of one.
      const int64_t line = k / operand.run, within = k % operand.run;
      Operand part{operand.row, 1, operand.line, std::min(step, operand.run - within)};
      if (within == 0 && step >= operand.run) {
        part = {operand.row, std::min(step / operand.run, operand.lines - line), operand.line, operand.run};
      }
      const int64_t rows = part.lines * part.run, next = k + rows;
      const int64_t floats = std::min(rows * kNumbers<Word>, weights.rows() - k * kNumbers<Word>);
      const StepWeights<Word> words(low + k * row, high + k * row, floats, scratch);
      Ahead<Word> all{low + next * row, high + next * row, std::min(step, depth - next) * kNumbers<Word>, nullptr};
      if (next == depth && g + 1 < to) {
        const int64_t group = kColumns * weights.rows();
        all = {low + group, high + group, std::min(step, depth) * kNumbers<Word>, nullptr};
      }
      for (size_t i = 0; i < tiles.size(); ++i) {
        const Tile<Word>& tile = tiles[i];
        const int64_t count = static_cast<int64_t>(tiles.size()), share = static_cast<int64_t>(i);
        const int64_t begin = all.vectors * share / count, end = all.vectors * (share + 1) / count;
        const bool first_read = g == from && i + 1 < tiles.size();
        const Ahead<Word> ahead{
            all.low + begin * kPanel,
            all.high + begin * kPanel,
            end - begin,
            first_read ? tiles[i + 1].operand + line * operand.line + within : nullptr};
        with_rows_and_vectors(tile.rows, columns, [&](auto kTileRows, auto kVectors) {
          const Word* in = tile.operand + line * operand.line + within;
          float* sums = product + (tile.first - first) * kColumns;
          const auto run = [&](const auto& finish) {
            multiply_tile<kTileRows, kVectors>(in, part, words.low, words.high, ahead, k > 0 ? sums : nullptr, finish);
          };
          if (in_registers && next == depth) {
            const auto low = epilogue.vector(c, whole_vector);
            const auto high = epilogue.vector(c + (kVectors - 1) * kWidth, whole_vector);
            const int64_t at = tile.first * weights.outputs + c;
            epilogue.prefetch(at, kTileRows, weights.outputs);
            run([&](int r, int v, Lanes sum) __attribute__((always_inline)) {
              (v == 0 ? low : high)(tile.first + r, at + r * weights.outputs + v * kWidth, sum);
            });
          } else {
            run([&](int r, int v, Lanes sum)
                    __attribute__((always_inline)) { store(sums + r * kColumns + v * kWidth, sum); });
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

// How rows of the operand come into being.
enum class Way {
  rows,   // those of x, one a position
  lines,  // parts of the lines of x
  padded, // parts of lines that are copied with their padding
  copied, // copied one by one
};

// `as_it_is`: x has the numbers that words have; `whole`: a pixel has a whole number of words.
Way way_of(const Positions& positions, const Panels& weights, bool as_it_is, bool whole) {
  if (weights.depth != weights.inputs || !whole) {
    return Way::copied;
  }
  if (positions.kernel == 1 && positions.stride == 1 && positions.padding == 0) {
    return as_it_is ? Way::rows : Way::copied;
  }
  // Tiles do not reach from one line into the next.
  const int64_t width = positions.out_width();
  if (2 * width < kRows * RowGroups{width}.count()) {
    return Way::copied;
  }
  return as_it_is && positions.padding == 0 ? Way::lines : Way::padded;
}

// The work on a convolution, of which a thread does its share. An item is a position, or a line of them.
template <typename Word, typename T, bool kGeneral>
class Work {
public:
  using Number = number_t<Word>;

  Work(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue)
      : positions_(positions),
        x_(x),
        weights_(weights),
        epilogue_(epilogue),
        way_(way_of(positions, weights, std::is_same_v<T, Number>, weights.inputs % kNumbers<Word> == 0)) {
    const int64_t channels = weights.inputs / kNumbers<Word>, kernel = positions.kernel;
    if (by_lines()) {
      const int64_t line = (positions.width + 2 * positions.padding) * channels;
      operand_ = {positions.stride * channels, kernel, line, kernel * channels};
      block_ = (block_of(line) - kernel) / positions.stride + 1;
    } else {
      operand_ = {depth(), 1, 0, depth()};
      block_ = std::max<int64_t>(2, block_of(depth()) / kRows) * kRows;
    }
    block_ = std::clamp<int64_t>(block_, 1, items());
  }

  int64_t depth() const {
    return words_of<Word>(weights_.rows());
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
  void copy_rows(int64_t first, int64_t count, Word* to) const {
    gather_rows(positions_, x_, weights_, first, count, depth() * kNumbers<Word>, reinterpret_cast<Number*>(to));
  }

  // Items first ... last - 1 and column groups from ... to - 1. `copied` has the rows of all items, or is null.
  void run(int64_t first, int64_t last, int64_t from, int64_t to, const Word* copied) const {
    const int64_t width = by_lines() ? positions_.out_width() : 1;
    const int64_t step = std::is_same_v<Word, float> ? 0 : step_of(operand_.run, operand_.lines);
    const Workspace product(block_ * width * kColumns), own(copied == nullptr ? copied_words() : 0);
    const Workspace paired_weights(step * kColumns);
    std::vector<Tile<Word>> tiles;
    for (int64_t item = first; item < last;) {
      // Lines of one image.
      const int64_t height = by_lines() ? positions_.out_height() : items();
      const int64_t end = std::min(last, (item / height + 1) * height);
      const int64_t blocks = (end - item + block_ - 1) / block_, size = (end - item + blocks - 1) / blocks;
      const Word* rows = rows_of_block(item, size, copied, own.as<Word>());
      tiles.clear();
      for (int64_t line = 0; line < (by_lines() ? size : 1); ++line) {
        const Word* operand = rows + line * positions_.stride * operand_.line;
        const RowGroups groups{by_lines() ? width : size};
        for (int64_t i = 0; i < groups.count(); ++i) {
          tiles.push_back(
              {operand + groups.begin(i) * operand_.row, (item + line) * width + groups.begin(i), groups.size(i)});
        }
      }
      multiply_block(tiles, operand_, weights_, from, to, product.data(), paired_weights.data(), epilogue_);
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
  int64_t copied_words() const {
    return way_ == Way::copied ? block_ * operand_.run : way_ == Way::padded ? lines_read(block_) * operand_.line : 0;
  }
  const Word* rows_of_block(int64_t item, int64_t size, const Word* copied, Word* own) const {
    if (way_ == Way::rows) {
      return reinterpret_cast<const Word*>(x_) + item * operand_.row;
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
    if (way_ == Way::lines) {
      return reinterpret_cast<const Word*>(image) + top * operand_.line;
    }
    pad_lines(positions_, image, channels, top, lines_read(size), reinterpret_cast<Number*>(own));
    return own;
  }
};

template <typename Word, typename T, bool kGeneral>
void multiply_words(
    const Positions& positions,
    const T* x,
    const Panels& weights,
    const Biased<T, kGeneral>& epilogue) {
  const Work<Word, T, kGeneral> work(positions, x, weights, epilogue);
  const int64_t items = work.items(), groups = groups_of(weights.outputs), depth = work.depth();
  const Shares shares = shares_of(work, groups, depth);
  std::optional<Workspace> copied;
  if (work.copies_rows() && shares.columns > 1) {
    copied.emplace(items * depth);
    parallel_for(0, items, std::max<int64_t>(1, kGatheredElements / depth), [&](int64_t begin, int64_t end) {
      work.copy_rows(begin, end - begin, copied->as<Word>() + begin * depth);
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
          copied ? copied->as<Word>() : nullptr);
    }
    stream_fence();
  });
}

} // namespace

template <typename T, bool kGeneral>
void packed_gemm(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue) {
  with_word<T>(true, [&](auto word) { multiply_words<decltype(word)>(positions, x, weights, epilogue); });
}

template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, false>&);
template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, true>&);
template void packed_gemm(const Positions&, const BFloat16*, const Panels&, const Biased<BFloat16, false>&);
template void packed_gemm(const Positions&, const BFloat16*, const Panels&, const Biased<BFloat16, true>&);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
