// The convolution in inference as one matrix product with packed weights: loop order, threads, micro-kernel.
//
// A thread has a share of the positions and of the output channels. It goes through its positions in blocks that stay
// in its L2 cache; of a block, through its column groups, whose weights it takes a step of the depth at a time, so that
// they stay in the L1 cache; and of those through the tiles of kRows rows, whose sums stay in registers. After the last
// step a tile goes through the epilogue out of its registers.
#include "packed_gemm.h"

#include "workspace.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include <unistd.h>

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

struct Caches {
  int64_t first, second; // bytes, of one core
};

int64_t positive_or(int64_t value, int64_t otherwise) {
  return value > 0 ? value : otherwise;
}

const Caches& caches() {
  static const Caches found = {
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
      positive_or(sysconf(_SC_LEVEL1_DCACHE_SIZE), 32 * 1024),
      positive_or(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 * 1024),
#else
      32 * 1024,
      512 * 1024,
#endif
  };
  return found;
}

// Rows of weights whose sums are taken in one go.
int64_t step_of(int64_t depth) {
  const int64_t most = static_cast<int64_t>(kWeightsShare * caches().first) / (kColumns * sizeof(float));
  const int64_t steps = (depth + most - 1) / most;
  return round_up((depth + steps - 1) / steps, kWidth);
}

// Positions of a block.
int64_t block_of(int64_t depth) {
  const int64_t rows = static_cast<int64_t>(kRowsShare * caches().second) / (depth * sizeof(float));
  return std::max<int64_t>(2, rows / kRows) * kRows;
}

// How many ways the positions and the column groups are cut. Their product is at most the number of threads.
struct Shares {
  int64_t rows, columns;
};

Shares shares_of(int64_t count, int64_t groups, int64_t depth) {
  const int64_t threads = at::get_num_threads();
  const auto cycles = [&](int64_t rows, int64_t columns) {
    const int64_t share = (count + rows - 1) / rows, tiles = RowGroups{share}.count();
    const int64_t own = (groups + columns - 1) / columns;
    const int64_t read = (share + own * kColumns) * depth * static_cast<int64_t>(sizeof(float));
    return tiles * own * depth * kRows + read / kBytesPerCycle;
  };
  Shares best{1, 1};
  for (int64_t columns = 1; columns <= std::min(threads, groups); ++columns) {
    const int64_t rows = std::min(threads / columns, (count + kRows - 1) / kRows);
    if (cycles(rows, columns) < cycles(best.rows, best.columns)) {
      best = {rows, columns};
    }
  }
  return best;
}

// finish(r, low, high) for the sums over `depth` rows of weights of R rows of the operand, `row` apart. `begun` has the
// sums over the rows before, [R][kColumns], or is null.
template <int R, typename Finish>
inline void multiply_tile(
    const float* operand,
    int64_t row,
    const float* low,
    const float* high,
    int64_t depth,
    const float* begun,
    const Finish& finish) {
  Lanes sum_low[R], sum_high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sum_low[r] = begun != nullptr ? load(begun + r * kColumns) : Lanes{};
    sum_high[r] = begun != nullptr ? load(begun + r * kColumns + kWidth) : Lanes{};
  }
  // Four rows to a pointer: twelve pointers would not fit into registers.
  const float* quad[3] = {operand, operand + 4 * row, operand + 8 * row};
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c) {
    const Lanes weights_low = load(low + c * kPanel), weights_high = load(high + c * kPanel);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Lanes factor = broadcast(quad[r / 4][r % 4 * row + c]);
      sum_low[r] = multiply_add(factor, weights_low, sum_low[r]);
      sum_high[r] = multiply_add(factor, weights_high, sum_high[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    finish(r, sum_low[r], sum_high[r]);
  }
}

// The outputs of positions first ... first + count - 1, whose rows of the operand are `row` apart, and of column groups
// from ... to - 1. `product` has room for count times kColumns.
template <typename T, bool kGeneral>
void multiply_block(
    const float* operand,
    const Panels& weights,
    int64_t first,
    int64_t count,
    int64_t from,
    int64_t to,
    float* product,
    const Biased<T, kGeneral>& epilogue) {
  constexpr std::integral_constant<int64_t, kWidth> whole_vector{};
  const int64_t depth = weights.rows(), step = step_of(depth);
  const RowGroups tiles{count};
  for (int64_t g = from; g < to; ++g) {
    const float* low = weights.data + g * kColumns * depth;
    const float* high = low + high_vector(depth);
    const int64_t c = g * kColumns;
    const bool in_registers = !kGeneral && c + kColumns <= weights.outputs;
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t run = std::min(step, depth - k);
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        with_rows(tiles.size(tile), [&](auto rows) {
          const int64_t begin = tiles.begin(tile);
          const float* in = operand + begin * depth + k;
          float* sums = product + begin * kColumns;
          const float* begun = k > 0 ? sums : nullptr;
          if (in_registers && k + run == depth) {
            const auto vector_low = epilogue.vector(c, whole_vector),
                       vector_high = epilogue.vector(c + kWidth, whole_vector);
            const int64_t at = (first + begin) * weights.outputs + c;
            multiply_tile<rows>(
                in, depth, low + k * kPanel, high + k * kPanel, run, begun, [&](int r, Lanes v, Lanes w) {
                  vector_low(first + begin + r, at + r * weights.outputs, v);
                  vector_high(first + begin + r, at + r * weights.outputs + kWidth, w);
                });
          } else {
            multiply_tile<rows>(
                in, depth, low + k * kPanel, high + k * kPanel, run, begun, [&](int r, Lanes v, Lanes w) {
                  store(sums + r * kColumns, v);
                  store(sums + r * kColumns + kWidth, w);
                });
          }
        });
      }
    }
    if (!in_registers) {
      finish_positions(product, first, count, weights.outputs, c, epilogue);
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

} // namespace

template <typename T, bool kGeneral>
void packed_gemm(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue) {
  const int64_t count = positions.count(), groups = groups_of(weights.outputs), depth = weights.rows();
  const Shares shares = shares_of(count, groups, depth);
  const float* rows = nullptr; // of all positions
  if constexpr (std::is_same_v<T, float>) {
    if (positions.kernel == 1 && positions.stride == 1 && positions.padding == 0 && depth == weights.inputs) {
      rows = x;
    }
  }
  std::optional<Workspace> gathered;
  const bool shared = rows == nullptr && shares.columns > 1;
  if (shared) {
    gathered.emplace(count * depth);
    at::parallel_for(0, count, std::max<int64_t>(1, kThreadElements / depth), [&](int64_t begin, int64_t end) {
      gather_rows(positions, x, weights, begin, end - begin, gathered->data() + begin * depth);
    });
    rows = gathered->data();
  }
  const int64_t most = std::min(block_of(depth), (count + shares.rows - 1) / shares.rows);
  at::parallel_for(0, shares.rows * shares.columns, 1, [&](int64_t begin, int64_t end) {
    const Workspace product(most * kColumns), own(rows == nullptr ? most * depth : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / shares.columns, column = task % shares.columns;
      const int64_t from = groups * column / shares.columns, to = groups * (column + 1) / shares.columns;
      const int64_t first = count * row / shares.rows, last = count * (row + 1) / shares.rows;
      const int64_t blocks = (last - first + most - 1) / most;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t p = first + (last - first) * block / blocks;
        const int64_t size = first + (last - first) * (block + 1) / blocks - p;
        if (rows == nullptr) {
          gather_rows(positions, x, weights, p, size, own.data());
        }
        multiply_block(
            rows == nullptr ? own.data() : rows + p * depth, weights, p, size, from, to, product.data(), epilogue);
      }
    }
    stream_fence();
  });
}

template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, false>&);
template void packed_gemm(const Positions&, const float*, const Panels&, const Biased<float, true>&);
template void packed_gemm(const Positions&, const at::BFloat16*, const Panels&, const Biased<at::BFloat16, false>&);
template void packed_gemm(const Positions&, const at::BFloat16*, const Panels&, const Biased<at::BFloat16, true>&);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
