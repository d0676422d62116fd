// The convolution as one matrix product over gathered rows: gather, products, epilogue. Every output is one sum in one
// order, whatever the number of threads.
#include "gathered_gemm.h"

#include "epilogues.h"
#include "workspace.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// product [p][kColumns] = `count` positions of operand times the weights of outputs from ... from + kColumns - 1.
void multiply_positions(const Kernel& kernel, int64_t from, const float* operand, int64_t count, float* product) {
  constexpr int taps = kTaps * kTaps;
  const int64_t padded = round_up(kernel.inputs, kPanel), depth = taps * padded;
  const int64_t columns = std::min(kColumns, kernel.outputs - from);
  // `steps` vectors, of which the first is channel c under a tap.
  const auto multiply =
      [&](int64_t tap, int64_t c, auto row, int64_t step, const float* low, const float* high, int64_t steps) {
        constexpr int64_t weight_step = decltype(row)::value == kPanel ? kWidth * kPanel : kPanel;
        for (int64_t p = 0; p < count; p += kRows) {
          with_rows_and_vectors(std::min<int64_t>(kRows, count - p), columns, [&](auto rows, auto vectors) {
            output_product<rows, vectors, row>(
                operand + p * depth + (tap * padded + c) * kRows,
                step,
                low,
                high,
                weight_step,
                steps,
                product + p * kColumns,
                tap + c > 0);
          });
        }
      };
  constexpr std::integral_constant<int64_t, kPanel> by_channels{};
  constexpr std::integral_constant<int64_t, taps * kPanel> by_taps{};
  PanelBlock block;
  if (kernel.inputs_are_adjacent()) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < padded; c += PanelBlock::kRun) {
        const int64_t run = std::min(PanelBlock::kRun, padded - c);
        block.transpose(kernel, kernel.at(from, c) + kernel.tap[t], columns, run, std::min(run, kernel.inputs - c));
        multiply(t, c, by_channels, kRows * kWidth, block.low(), block.high(), run / kWidth);
      }
    }
    return;
  }
  for (int64_t c = 0; c < kernel.inputs; c += kWidth) {
    const int64_t inputs = std::min(kWidth, kernel.inputs - c);
    block.transpose(kernel, kernel.at(from, c), columns, taps * kWidth, taps * inputs);
    multiply(0, c, by_taps, padded * kRows, block.low(), block.high(), taps);
  }
}

// Positions first ... first + count - 1 of x [images, height, width, channels], `first` a multiple of kRows.
template <typename T>
void gather_positions(
    const Positions& positions,
    const T* x,
    int64_t channels,
    int64_t first,
    int64_t count,
    float* operand) {
  const int64_t padded = round_up(channels, kPanel), depth = kTaps * kTaps * padded;
  for (int64_t p = first; p < first + count; ++p) {
    float* row = operand + p / kRows * depth * kRows + p % kRows * kWidth;
    for (int64_t t = 0; t < kTaps * kTaps; ++t) {
      const int64_t pixel = positions.pixel(p, t);
      float* to = row + t * padded * kRows;
      for (int64_t c = 0; c < padded; c += kWidth, to += kRows * kWidth) {
        if (pixel < 0 || c >= channels) {
          store(to, Lanes{});
        } else if (c + kWidth <= channels) {
          store(to, load(x + pixel * channels + c));
        } else {
          store(to, load(x + pixel * channels + c, channels - c));
        }
      }
    }
  }
}

} // namespace

template <typename T, typename Epilogue>
void gathered_gemm(const Positions& positions, const T* x, const Kernel& kernel, const Epilogue& epilogue) {
  const int64_t count = positions.count(), groups = groups_of(kernel.outputs);
  const int64_t depth = kTaps * kTaps * round_up(kernel.inputs, kPanel);
  const int64_t row_groups = (count + kRows - 1) / kRows;
  const Workspace operand(row_groups * kRows * depth);
  parallel_for(
      0, row_groups, std::max<int64_t>(1, kGatheredElements / (depth * kRows)), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows;
        gather_positions(positions, x, kernel.inputs, first, std::min(count, end * kRows) - first, operand.data());
      });
  // A group's weights go through the caches once for all positions; with more threads than groups several share one.
  const int64_t shares = std::clamp<int64_t>(get_num_threads() / groups, 1, row_groups);
  const int64_t share = (row_groups + shares - 1) / shares * kRows;
  parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    const Workspace product(share * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / shares, first = task % shares * share, size = std::min(share, count - first);
      if (size > 0) {
        multiply_positions(kernel, g * kColumns, operand.data() + first * depth, size, product.data());
        finish_positions(product.data(), first, size, kernel.outputs, g * kColumns, false, epilogue);
      }
    }
  });
}

#define FASTRES_INSTANTIATE(T, ...) \
  template void gathered_gemm(const Positions&, const T*, const Kernel&, const __VA_ARGS__&);
FASTRES_INFERENCE_EPILOGUES(FASTRES_INSTANTIATE, float)
FASTRES_INFERENCE_EPILOGUES(FASTRES_INSTANTIATE, BFloat16)
#undef FASTRES_INSTANTIATE

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
