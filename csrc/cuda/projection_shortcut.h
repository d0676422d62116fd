// projection_shortcut on CUDA as the host sees it: the shapes, the pointers, the launch plans. Plain types.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace fastres::shortcut {

// The sizes that every kernel is built from. A block of eight warps, four by two, makes kRows x kColumns results; a
// step takes 64 bytes of K (32 elements of 16 bits, 16 of 32), so one stage of both operands is 12 KiB and three are 36
// KiB: under the 48 KiB that need no opt-in, and four blocks in the 164 KiB of sm_80, two in the 100 KiB of sm_86. Two
// stages under way are 24 KiB a block; to cover 600 ns at 3.3 TB/s each of 132 multiprocessors needs 15 KiB. The
// accumulators are 32 registers a thread. With fragments and addresses that stays below the 80 of three blocks for 16
// bits and 16-byte loads; element loads, which compute more addresses, and float32, whose FMA holds more operands, have
// the 128 of two.
struct Tile {
  static constexpr int kRows = 128;
  static constexpr int kColumns = 64;
  static constexpr int kStepBytes = 64;
  static constexpr int kStages = 3;
  static constexpr int kThreads = 256;
  static constexpr int blocks(int item_bytes, bool vector_loads) { // a multiprocessor, asked of the compiler
    return item_bytes == 2 && vector_loads ? 3 : 2;
  }
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // The epilogue uses the same memory again: the results as float32, then what is exchanged between warps.
  static constexpr int kResultBytes = kRows * kColumns * 4;
  static constexpr int kTables = 6; // of kColumns floats: the folded normalisations need most
  static_assert(kResultBytes + 2 * 4 * kColumns * 4 <= kSharedBytes && kTables <= 2 * 4);
};

// The second stages: one block combines `kChannels` channels, or sums kElements weights, with its threads in groups.
struct Combine {
  static constexpr int kChannels = 8;
  static constexpr int kStatisticsThreads = 1024;
  static constexpr int kStatisticsBytes = 2 * kStatisticsThreads / 32 * kChannels * 4; // two sums a warp and channel
  static constexpr int kElements = 32;
  static constexpr int kWeightThreads = 256;
  static constexpr int kWeightBytes = kWeightThreads / 32 * kElements * 4;
};

enum class Step { kForward, kInference, kInputGradient, kWeightGradient };
constexpr const char* kStepNames[] = {"forward", "inference", "input_gradient", "weight_gradient"};

// How products are made: bf16 and f16 on tensor cores, float32 on tensor cores rounded to tf32, float32 by FMA.
enum class Arithmetic { kBFloat16, kHalf, kTf32, kFloat };
constexpr const char* kArithmeticNames[] = {"bfloat16", "float16", "tf32", "float32"};

constexpr int item_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kBFloat16 || arithmetic == Arithmetic::kHalf ? 2 : 4;
}

// s is [images, in_channels, in_h, in_w]; the product is [images, out_channels, out_h, out_w].
struct Problem {
  int64_t images, in_channels, in_h, in_w, out_channels;
  int64_t stride_h, stride_w;
  bool channels_last;

  int64_t out_h() const {
    return (in_h - 1) / stride_h + 1;
  }
  int64_t out_w() const {
    return (in_w - 1) / stride_w + 1;
  }
  int64_t positions() const {
    return images * out_h() * out_w();
  }
};

// A normalisation by running statistics; no mean means none, no weight or bias means 1 or 0.
struct RunningNorm {
  const float *mean, *var, *weight, *bias;
  float eps;
};

// What the kernels read and write; a step looks only at what it needs.
struct Pointers {
  const void *s, *weight, *dproduct, *x;
  void *product, *y, *ds, *dweight;
  float *mean, *m2; // null: no statistics are taken
  float* workspace;
  RunningNorm norm, x_norm;
  bool relu;
};

// What is launched for a step: the grid of the GEMM and, where second_blocks is not 0, that of the second stage.
struct Plan {
  bool vector_loads, vector_stores;
  int64_t row_tiles, column_tiles, splits;
  int64_t steps_a_split; // along K, in units of the tile's step
  int64_t second_blocks;
  int second_threads;
  int64_t workspace; // floats

  int64_t blocks() const {
    return row_tiles * column_tiles;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The splits of the weight's gradient: blocks for two on each of 132 multiprocessors, but no split below 512 positions,
// and the partial sums, written and read in float32, never more bytes than the operands. Of the shapes alone, so that
// results do not depend on the device.
inline int64_t weight_splits(const Problem& p, int64_t tiles, int item) {
  constexpr int64_t kBlocksWanted = 264, kLeastPositions = 512;
  const int64_t operands = p.positions() * (p.in_channels + p.out_channels) * item;
  const int64_t partial = 2 * p.in_channels * p.out_channels * 4;
  const int64_t most = std::min({kBlocksWanted / tiles, p.positions() / kLeastPositions, operands / partial});
  return std::max<int64_t>(most, 1);
}

// `aligned`: every pointer that the step reads or writes starts at a multiple of 16 bytes.
inline Plan plan_of(Step step, Arithmetic arithmetic, const Problem& p, bool aligned, bool statistics) {
  const int item = item_bytes(arithmetic);
  const int64_t step_items = Tile::kStepBytes / item;
  const auto whole = [&](int64_t channels, int bytes) { return channels * bytes % 16 == 0; };
  const bool dense = p.channels_last && aligned;
  const bool in = dense && whole(p.in_channels, item), out = dense && whole(p.out_channels, item);
  Plan plan{};
  int64_t rows = p.positions(), columns = p.out_channels, depth = p.in_channels;
  switch (step) {
    case Step::kForward:
    case Step::kInference:
      plan.vector_loads = in;
      plan.vector_stores = out;
      break;
    case Step::kInputGradient:
      std::swap(columns, depth);
      plan.vector_loads = in && out;
      plan.vector_stores = in;
      break;
    case Step::kWeightGradient:
      rows = p.out_channels;
      columns = p.in_channels;
      depth = p.positions();
      plan.vector_loads = in && out;
      plan.vector_stores = whole(p.in_channels, 4);
      break;
  }
  plan.row_tiles = ceil_div(rows, Tile::kRows);
  plan.column_tiles = ceil_div(columns, Tile::kColumns);
  plan.splits = step == Step::kWeightGradient ? weight_splits(p, plan.blocks(), item) : 1;
  plan.steps_a_split = ceil_div(ceil_div(depth, step_items), plan.splits);
  plan.splits = ceil_div(ceil_div(depth, step_items), plan.steps_a_split);
  if (step == Step::kForward && statistics) {
    plan.workspace = plan.row_tiles * 2 * p.out_channels;
    plan.second_blocks = ceil_div(p.out_channels, Combine::kChannels);
    plan.second_threads = Combine::kStatisticsThreads;
  }
  if (step == Step::kWeightGradient) {
    plan.workspace = plan.splits * p.out_channels * p.in_channels;
    plan.second_blocks = ceil_div(p.out_channels * p.in_channels, Combine::kElements);
    plan.second_threads = Combine::kWeightThreads;
  }
  return plan;
}

inline bool aligned_for(Step step, const Pointers& p) {
  const auto ok = [](const void* v) { return reinterpret_cast<uintptr_t>(v) % 16 == 0; };
  switch (step) {
    case Step::kForward:
      return ok(p.s) && ok(p.weight) && ok(p.product);
    case Step::kInference:
      return ok(p.s) && ok(p.weight) && ok(p.x) && ok(p.y);
    case Step::kInputGradient:
      return ok(p.dproduct) && ok(p.weight) && ok(p.ds);
    case Step::kWeightGradient:
      return ok(p.dproduct) && ok(p.s) && ok(p.workspace);
  }
  return false;
}

// Positions are counted in 31 bits, and a grid has at most 2^31 - 1 blocks.
inline bool countable(const Problem& p) {
  constexpr int64_t kMost = INT32_MAX;
  return p.images * p.in_h * p.in_w <= kMost && p.in_channels <= kMost && p.out_channels <= kMost &&
      p.in_channels * p.out_channels <= kMost;
}

} // namespace fastres::shortcut
