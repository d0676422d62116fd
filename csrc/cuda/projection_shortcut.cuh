// The strided 1x1 convolution of a shortcut on CUDA: implicit GEMMs over gathered rows.
//
//   forward          product[p, n] = sum_k s[at(p), k] W[n, k]          p: output position, at(p): the input under it
//   inference        y[p, n] = relu(norm_n(product[p, n]) + norm_x(x[p, n])), the product never written
//   input gradient   ds[at(p), n] = sum_k dproduct[p, k] W[k, n], and zero at the inputs that no output looks at
//   weight gradient  dW[m, n] = sum_p dproduct[p, m] s[at(p), n]
//
// One main loop serves all four: tiles of both operands come through three stages of asynchronous copies and are
// multiplied on tensor cores, or by FMA for float32 where tf32 is not wanted. They differ in which index of an operand
// lies along memory, and in the epilogue. Rows are addressed through the stride; nothing is gathered in memory first.
//
// Passes over memory, in units of the tensors: forward reads the gathered share of s and writes the product; inference
// reads x as well; the input gradient reads dproduct and writes ds once; the weight gradient reads dproduct and the
// gathered share of s. An operand wider than a tile is read again for every tile, out of the L2 cache.
//
// Statistics are those of the product as it is stored: the float32 accumulators, rounded to its dtype. batch_norm_act
// reads the rounded product, so only these give it mean 0 and variance 1, and its backward assumes both. A tile gives
// the mean and M2 of its rows for each channel; a second kernel combines the tiles by Chan's formula in a fixed order.
// There are no atomics, so every result is the same bit for bit from run to run.
//
// In channels_last, with 16-byte rows and pointers, operands are copied 16 bytes at a time. Everything else, NCHW among
// it, takes element loads with the same addressing ("own gather"), whose neighbours along memory go to neighbouring
// threads.
#pragma once

#include "epilogues.cuh"

namespace fastres::shortcut {

// --- The kernels ---------------------------------------------------------------------------------------------------

// One tile of results. Blocks that share rows of A follow each other, so that A comes out of the L2 cache again.
template <typename Math, Step kStep, bool kVector>
FASTRES_KERNEL(Tile::kThreads, Tile::blocks(sizeof(typename Math::Element), kVector))
gemm(const Params<typename Math::Element> p) {
  using T = typename Math::Element;
  constexpr int kDepth = Tile::kStepBytes / static_cast<int>(sizeof(T));
  constexpr bool kAAlongK = kStep != Step::kWeightGradient;
  constexpr bool kBAlongK = kStep == Step::kForward || kStep == Step::kInference;
  using A = std::conditional_t<kAAlongK, SharedTile<T, Tile::kRows, kDepth>, SharedTile<T, kDepth, Tile::kRows>>;
  using B = std::conditional_t<kBAlongK, SharedTile<T, Tile::kColumns, kDepth>, SharedTile<T, kDepth, Tile::kColumns>>;
  constexpr int kABytes = Tile::kRows * Tile::kStepBytes;

  unsigned char* shared = shared_memory();
  const uint32_t row_tile = block_index_x() / p.column_tiles;
  const uint32_t row0 = row_tile * Tile::kRows;
  const uint32_t column0 = (block_index_x() - row_tile * p.column_tiles) * Tile::kColumns;
  const uint32_t step0 = block_index_y() * p.steps_a_split;
  const uint32_t steps = (step0 + p.steps_a_split < p.steps ? step0 + p.steps_a_split : p.steps) - step0;

  using LoadA = Loader<T, A, kAAlongK, kVector>;
  const LoadA load_a(p.a, row0);
  const Loader<T, B, kBAlongK, kVector> load_b(p.b, column0);
  const auto fetch = [&](uint32_t step) {
    if (step < steps) {
      unsigned char* stage = shared + step % Tile::kStages * Tile::kStageBytes;
      load_a.fetch(stage, step0 + step);
      load_b.fetch(stage + kABytes, step0 + step);
    }
    if constexpr (LoadA::kAsynchronous) {
      copy_commit();
    }
  };

  const Place place;
  Accumulator sum = {};
  FASTRES_UNROLL
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    fetch(stage);
  }
  for (uint32_t step = 0; step < steps; ++step) {
    if constexpr (LoadA::kAsynchronous) {
      copy_wait<Tile::kStages - 2>();
    }
    barrier(); // this step has arrived for everybody, and everybody is done with the last one, whose place is free
    fetch(step + Tile::kStages - 1);
    const unsigned char* stage = shared + step % Tile::kStages * Tile::kStageBytes;
    Math::template multiply<A, B, kAAlongK, kBAlongK>(sum, stage, stage + kABytes, place);
  }
  barrier(); // nobody reads the stages any more

  float* tables = reinterpret_cast<float*>(shared + Tile::kResultBytes);
  if constexpr (kStep == Step::kWeightGradient) {
    stage_results(shared, sum, place);
    barrier();
    Target<float> out{};
    out.lines.spaced = true;
    out.lines.column = p.columns;
    out.step = 1;
    out.data = p.workspace + static_cast<int64_t>(block_index_y()) * p.rows * p.columns;
    store_results<kStep>(p, out, shared, tables, nullptr, row0, column0);
  } else if constexpr (kStep == Step::kForward) {
    FASTRES_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTRES_UNROLL
      for (int j = 0; j < 4; ++j) {
        FASTRES_UNROLL
        for (int e = 0; e < 4; ++e) {
          sum[i][j][e] = to_float(from_float<T>(sum[i][j][e]));
        }
      }
    }
    stage_results(shared, sum, place);
    const bool statistics = p.workspace != nullptr;
    const uint32_t rows = p.rows - row0 < Tile::kRows ? p.rows - row0 : Tile::kRows;
    const float count = static_cast<float>(rows);
    float* squares = tables + kWarpsDown * Tile::kColumns;
    if (statistics) {
      sum_rows(tables, sum, place, rows, [](float v, int, bool inside) { return inside ? v : 0.0f; });
    }
    barrier();
    if (statistics) {
      float mean[8];
      FASTRES_UNROLL
      for (int c = 0; c < 8; ++c) {
        mean[c] = sum_warps(tables, place.column_of(c / 2, c % 2)) / count;
      }
      sum_rows(squares, sum, place, rows, [&](float v, int c, bool inside) {
        return inside ? (v - mean[c]) * (v - mean[c]) : 0.0f;
      });
    }
    store_results<kStep>(p, p.out, shared, tables, nullptr, row0, column0);
    if (statistics) {
      barrier();
      const int column = thread_index();
      if (column < Tile::kColumns) {
        float* to = p.workspace + static_cast<int64_t>(row_tile) * 2 * p.columns + column0 + column;
        const bool valid = column0 + column < p.columns;
        store_global(to, sum_warps(tables, column) / count, valid);
        store_global(to + p.columns, sum_warps(squares, column), valid);
      }
    }
  } else {
    Bytes16 x[kStep == Step::kInference ? Chunks<T>::kParts : 1] = {};
    if constexpr (kStep == Step::kInference) {
      load_added(x, p, row0, column0);
    }
    stage_results(shared, sum, place);
    if constexpr (kStep == Step::kInference) {
      const int column = thread_index() % Tile::kColumns;
      const bool valid = column0 + column < p.columns;
      if (thread_index() < Tile::kColumns) {
        Folded(p.norm, column0 + column, valid).store(tables, column);
      } else if (thread_index() < 2 * Tile::kColumns) {
        Folded(p.x_norm, column0 + column, valid).store(tables + 3 * Tile::kColumns, column);
      }
    }
    barrier();
    store_results<kStep>(p, p.out, shared, tables, x, row0, column0);
  }
}

// Sums the values of a channel over the groups of the block; the same order always. Every thread gets the sum.
template <int kThreads, int kWidth>
FASTRES_DEVICE float sum_groups(float* table, float value) {
  static_assert(kWidth <= 32 && kThreads / kWidth <= 1024);
  FASTRES_UNROLL
  for (int mask = kWidth; mask < 32; mask *= 2) {
    value += shuffle_xor(value, mask);
  }
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  if (lane < kWidth) {
    store_shared(table + warp * kWidth + lane, value);
  }
  barrier();
  float total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    total += load_shared<float>(table + w * kWidth + lane % kWidth);
  }
  return total;
}

struct StatisticsParams {
  const float* tiles; // [tiles, 2, channels]: mean, M2
  uint32_t tile_count, channels;
  int64_t count; // values a channel
  float *mean, *m2;
};

// Chan et al. 1979 for many parts at once:
//   mean = sum_i n_i mean_i / n      M2 = sum_i M2_i + n_i (mean_i - mean)^2
// with the first part's mean as the origin, so that the sum of large means loses nothing.
template <int kThreads>
FASTRES_KERNEL(kThreads, 1)
combine_statistics(const StatisticsParams p) {
  constexpr int kChannels = Combine::kChannels, kGroups = kThreads / kChannels;
  constexpr int kTable = kThreads / 32 * kChannels;
  float* tables = reinterpret_cast<float*>(shared_memory());
  const uint32_t channel = block_index_x() * kChannels + thread_index() % kChannels;
  const bool valid = channel < p.channels;
  const uint32_t group = thread_index() / kChannels;
  const auto at = [&](uint32_t tile, int which) {
    return load_global(p.tiles + (static_cast<int64_t>(tile) * 2 + which) * p.channels + channel, valid);
  };
  const float last = static_cast<float>(p.count - static_cast<int64_t>(p.tile_count - 1) * Tile::kRows);
  const auto weight = [&](uint32_t tile) { return tile + 1 < p.tile_count ? Tile::kRows : last; };
  const float origin = at(0, 0);
  float sum = 0;
  FASTRES_UNROLL_BY(4)
  for (uint32_t tile = group; tile < p.tile_count; tile += kGroups) {
    sum += weight(tile) * (at(tile, 0) - origin);
  }
  const float mean = origin + sum_groups<kThreads, kChannels>(tables, sum) / static_cast<float>(p.count);
  sum = 0;
  FASTRES_UNROLL_BY(4)
  for (uint32_t tile = group; tile < p.tile_count; tile += kGroups) {
    const float apart = at(tile, 0) - mean;
    sum += at(tile, 1) + weight(tile) * apart * apart;
  }
  const float m2 = sum_groups<kThreads, kChannels>(tables + kTable, sum);
  store_global(p.mean + channel, mean, valid && group == 0);
  store_global(p.m2 + channel, m2, valid && group == 0);
}

template <typename T>
struct WeightParams {
  const float* splits; // [split_count, elements]
  uint32_t split_count;
  int64_t elements;
  T* dweight;
};

// dW = the sum over splits, in a fixed order.
template <typename T>
FASTRES_KERNEL(Combine::kWeightThreads, 1)
combine_weight(const WeightParams<T> p) {
  constexpr int kWidth = Combine::kElements, kGroups = Combine::kWeightThreads / kWidth;
  float* table = reinterpret_cast<float*>(shared_memory());
  const int64_t element = static_cast<int64_t>(block_index_x()) * kWidth + thread_index() % kWidth;
  const bool valid = element < p.elements;
  const uint32_t group = thread_index() / kWidth;
  float sum = 0;
  FASTRES_UNROLL_BY(4)
  for (uint32_t split = group; split < p.split_count; split += kGroups) {
    sum += load_global(p.splits + split * p.elements + element, valid);
  }
  sum = sum_groups<Combine::kWeightThreads, kWidth>(table, sum);
  store_global(p.dweight + element, from_float<T>(sum), valid && group == 0);
}

// --- Launching -----------------------------------------------------------------------------------------------------

// What a launcher is asked for. It is called as launch(configuration, kernel, params).
struct Configuration {
  int64_t grid_x, grid_y;
  int threads, shared_bytes;
};

inline Lines spaced_lines(int64_t distance) {
  Lines lines{};
  lines.spaced = true;
  lines.column = distance;
  return lines;
}

// The output positions of `p` in a dense tensor of `channels` whose images are h x w, stepping through it by the
// stride or, for one that has the output's size, by 1.
inline Lines position_lines(const Problem& p, int64_t channels, bool strided) {
  const int64_t h = strided ? p.in_h : p.out_h(), w = strided ? p.in_w : p.out_w();
  const int64_t column = p.channels_last ? channels : 1;
  Lines lines{};
  lines.spaced = p.channels_last && (!strided || (p.stride_h == 1 && p.stride_w == 1));
  lines.width = Divisor(p.out_w());
  lines.height = Divisor(p.out_h());
  lines.image = h * w * channels;
  lines.row = w * column * (strided ? p.stride_h : 1);
  lines.column = column * (strided ? p.stride_w : 1);
  return lines;
}

template <typename T>
Operand<T> activation(const Problem& p, const void* data, bool strided) {
  const int64_t channels = strided ? p.in_channels : p.out_channels;
  const int64_t pixels = strided ? p.in_h * p.in_w : p.out_h() * p.out_w();
  return {
      static_cast<const T*>(data),
      position_lines(p, channels, strided),
      p.channels_last ? 1 : pixels,
      static_cast<uint32_t>(p.positions()),
      static_cast<uint32_t>(channels),
      !p.channels_last};
}

template <typename T>
Target<T> target(const Problem& p, void* data, bool strided) {
  const Operand<T> same = activation<T>(p, nullptr, strided);
  const int64_t column = p.channels_last ? same.item_count : 1;
  return {
      static_cast<T*>(data),
      same.lines,
      same.step,
      static_cast<uint32_t>(p.stride_h),
      static_cast<uint32_t>(p.stride_w),
      static_cast<uint32_t>(p.in_h),
      static_cast<uint32_t>(p.in_w),
      p.in_w * column,
      column,
      same.across};
}

template <typename T>
Params<T> params_of(Step step, const Plan& plan, const Problem& p, const Pointers& q) {
  const uint32_t in = static_cast<uint32_t>(p.in_channels), out = static_cast<uint32_t>(p.out_channels);
  const Operand<T> weight{static_cast<const T*>(q.weight), spaced_lines(in), 1, out, in, false};
  Params<T> r{};
  int64_t depth = in;
  switch (step) {
    case Step::kForward:
    case Step::kInference:
      r.a = activation<T>(p, q.s, true);
      r.b = weight;
      r.out = target<T>(p, step == Step::kForward ? q.product : q.y, false);
      r.columns = out;
      break;
    case Step::kInputGradient:
      r.a = activation<T>(p, q.dproduct, false);
      r.b = weight;
      r.out = target<T>(p, q.ds, true);
      r.columns = in;
      depth = out;
      break;
    case Step::kWeightGradient:
      r.a = activation<T>(p, q.dproduct, false);
      r.b = activation<T>(p, q.s, true);
      r.columns = in;
      depth = p.positions();
      break;
  }
  r.rows = step == Step::kWeightGradient ? out : static_cast<uint32_t>(p.positions());
  r.column_tiles = static_cast<uint32_t>(plan.column_tiles);
  r.steps = static_cast<uint32_t>(ceil_div(depth, Tile::kStepBytes / static_cast<int64_t>(sizeof(T))));
  r.steps_a_split = static_cast<uint32_t>(plan.steps_a_split);
  r.vector_stores = plan.vector_stores;
  r.relu = q.relu;
  r.workspace = plan.workspace > 0 ? q.workspace : nullptr;
  r.x = static_cast<const T*>(q.x);
  r.norm = q.norm;
  r.x_norm = q.x_norm;
  return r;
}

template <typename Math, Step kStep, typename Launcher>
void launch_gemm(const Plan& plan, const Problem& p, const Pointers& q, const Launcher& launch) {
  using T = typename Math::Element;
  const Configuration configuration{plan.blocks(), plan.splits, Tile::kThreads, Tile::kSharedBytes};
  const Params<T> params = params_of<T>(kStep, plan, p, q);
  if (plan.vector_loads) {
    launch(configuration, gemm<Math, kStep, true>, params);
  } else {
    launch(configuration, gemm<Math, kStep, false>, params);
  }
}

// Everything that a step launches, in order. `plan` is plan_of the same arguments.
template <typename Math, typename Launcher>
void run(Step step, const Plan& plan, const Problem& p, const Pointers& q, const Launcher& launch) {
  using T = typename Math::Element;
  switch (step) {
    case Step::kForward: {
      launch_gemm<Math, Step::kForward>(plan, p, q, launch);
      if (plan.second_blocks > 0) {
        const StatisticsParams params{
            q.workspace,
            static_cast<uint32_t>(plan.row_tiles),
            static_cast<uint32_t>(p.out_channels),
            p.positions(),
            q.mean,
            q.m2};
        launch(
            Configuration{plan.second_blocks, 1, plan.second_threads, Combine::kStatisticsBytes},
            combine_statistics<Combine::kStatisticsThreads>,
            params);
      }
      break;
    }
    case Step::kInference:
      launch_gemm<Math, Step::kInference>(plan, p, q, launch);
      break;
    case Step::kInputGradient:
      launch_gemm<Math, Step::kInputGradient>(plan, p, q, launch);
      break;
    case Step::kWeightGradient: {
      launch_gemm<Math, Step::kWeightGradient>(plan, p, q, launch);
      const WeightParams<T> params{
          q.workspace, static_cast<uint32_t>(plan.splits), p.out_channels * p.in_channels, static_cast<T*>(q.dweight)};
      launch(
          Configuration{plan.second_blocks, 1, plan.second_threads, Combine::kWeightBytes}, combine_weight<T>, params);
      break;
    }
  }
}

} // namespace fastres::shortcut
