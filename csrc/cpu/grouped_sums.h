// The outputs of a convolution in groups of several channels: tiles of outputs and one or two vectors of channels are
// summed in registers, a vector of weights at a time for all of them.
#pragma once

#include "grouped_layout.h"
#include "grouped_products.h"

#include <utility>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

// A tap in floats: from the first element under the kernel, and from the weights of a block of inputs.
struct Offset {
  int64_t input, weights;
};

// What is summed for a tile.
struct Operands {
  int64_t row;                               // floats between rows of the padded input
  int64_t blocks, input_block, weight_block; // of eight inputs, and floats between them
  const Offset* taps;
  int64_t count;
};

template <Kind kKind, int kRows, int kColumns, int kStride, int kVectors>
[[gnu::always_inline]] inline void sum_tile(
    const float* input,
    const float* weights,
    const Operands& o,
    Octet (&sums)[kRows * kColumns * kVectors]) {
  constexpr int kDepth = kKind == Kind::pairs ? 4 : 8;
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kColumns * kVectors; ++i) {
    sums[i] = _mm256_setzero_ps();
  }
  for (int64_t block = 0; block < o.blocks; ++block) {
    for (const Offset* tap = o.taps; tap < o.taps + o.count; ++tap) {
      const float* x = input + tap->input;
      const float* w = weights + tap->weights;
#pragma GCC unroll 8
      for (int c = 0; c < kDepth; ++c) {
        const float* factors = w + c * kVectors * kLanes;
        const Octet first = load8(factors), second = load8(factors + (kVectors - 1) * kLanes);
#pragma GCC unroll 3
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 12
          for (int column = 0; column < kColumns; ++column) {
            const Octet value = spread<kKind>(x + row * kStride * o.row + column * kStride * kLanes, c);
            Octet* sum = sums + (row * kColumns + column) * kVectors;
            add_product(sum[0], value, first);
            if constexpr (kVectors == 2 && kRows * kColumns * kVectors + kVectors < kRegisters) {
              add_product(sum[1], value, second);
            } else if constexpr (kVectors == 2) {
              add_product(sum[1], value, factors + kLanes);
            }
          }
        }
      }
    }
    input += o.input_block;
    weights += o.weight_block;
  }
}

// The outputs of one phase in one image of a chunk, for one or two vectors of channels.
template <typename T>
struct Task {
  Operands operands;
  const float* input;
  const float* weights;
  int64_t rows, columns; // of outputs
  T* output;
  int64_t output_row, output_column; // elements between outputs
  int64_t lanes;                     // channels of a vector
  // What tells which taps a row of outputs reads: the input's rows that are of the image, from its padded row 0 on, the
  // row of the first tap, and how many taps are in one.
  int64_t first_row, end_row, first_tap, tap_columns;

  // The operands without those taps that see only padding in all rows, the padded input's, from `row` to `last`.
  Operands inside(int64_t row, int64_t last) const {
    Operands o = operands;
    const int64_t begin = std::max<int64_t>(0, first_row - last - first_tap);
    const int64_t end = std::min(o.count / tap_columns, end_row - row - first_tap);
    o.taps += begin * tap_columns;
    o.count = std::max<int64_t>(0, end - begin) * tap_columns;
    return o;
  }
};

template <typename T, Kind kKind, int kRows, int kColumns, int kStride, int kVectors>
void sum_phase(const Task<T>& t) {
  for (int64_t row = 0; row < t.rows; row += kRows) {
    const Operands operands = t.inside(row * kStride, (row + kRows - 1) * kStride);
    for (int64_t column = 0; column < t.columns; column += kColumns) {
      Octet sums[kRows * kColumns * kVectors];
      const float* input = t.input + row * kStride * t.operands.row + column * kStride * kLanes;
      sum_tile<kKind, kRows, kColumns, kStride, kVectors>(input, t.weights, operands, sums);
      T* output = t.output + row * t.output_row + column * t.output_column;
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < kColumns; ++j) {
          if (row + i < t.rows && column + j < t.columns) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              write(
                  output + i * t.output_row + j * t.output_column + v * kLanes,
                  sums[(i * kColumns + j) * kVectors + v],
                  t.lanes);
            }
          }
        }
      }
    }
  }
}

// A tile's sides. The padded input has to have what the last tiles read, outputs beyond the last among them.
struct Tile {
  int rows, columns;

  bool operator==(const Tile&) const = default;
};

// Tiles of one vector and of two; registers hold their sums, a vector of weights or two, and a value.
inline constexpr Tile kSingle[] = {{1, 12}, {1, 10}, {1, 8}, {2, 7}, {2, 6}, {2, 5}, {3, 4}};
inline constexpr Tile kDouble[] = {{1, 7}, {1, 6}, {1, 5}, {1, 4}, {2, 3}};

// The tile with which the outputs take the fewest operations. Two are begun a cycle and end four or five cycles later,
// so that fewer than nine sums leave some unused.
template <size_t kCount>
Tile tile_for(const Tile (&tiles)[kCount], int vectors, int64_t rows, int64_t columns) {
  Tile best = tiles[0];
  int64_t least = -1;
  for (const Tile& tile : tiles) {
    const int64_t count = ((rows + tile.rows - 1) / tile.rows) * ((columns + tile.columns - 1) / tile.columns);
    const int64_t cost = count * (std::max(9, tile.rows * tile.columns * vectors) + 1);
    if (least < 0 || cost < least) {
      best = tile;
      least = cost;
    }
  }
  return best;
}

template <typename T>
using Summing = void (*)(const Task<T>&);

template <typename T, Kind kKind, int kStride, int kVectors, const auto& kTiles, size_t... kAt>
Summing<T> summing_of(Tile tile, std::index_sequence<kAt...>) {
  Summing<T> found = nullptr;
  ((found =
        kTiles[kAt] == tile ? &sum_phase<T, kKind, kTiles[kAt].rows, kTiles[kAt].columns, kStride, kVectors> : found),
   ...);
  return found;
}

// The function for tiles of one of the lists.
template <typename T, Kind kKind, int kVectors, const auto& kTiles>
Summing<T> summing_of(Tile tile, int64_t stride) {
  constexpr auto all = std::make_index_sequence<std::size(kTiles)>();
  return stride == 1 ? summing_of<T, kKind, 1, kVectors, kTiles>(tile, all)
                     : summing_of<T, kKind, 2, kVectors, kTiles>(tile, all);
}

// The same where weights are not finite: what is padding, and not an element of the input, has no part in the sums.
template <typename T, Kind kKind, int kVectors, typename IsInside>
void sum_phase_inside(const Task<T>& t, int64_t stride, const std::vector<Tap>& taps, const IsInside& is_inside) {
  std::vector<Offset> inside;
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int64_t column = 0; column < t.columns; ++column) {
      inside.clear();
      for (size_t i = 0; i < taps.size(); ++i) {
        if (is_inside(row * stride + taps[i].row, column * stride + taps[i].column)) {
          inside.push_back(t.operands.taps[i]);
        }
      }
      Operands operands = t.operands;
      operands.taps = inside.data();
      operands.count = static_cast<int64_t>(inside.size());
      Octet sums[kVectors];
      const float* input = t.input + row * stride * t.operands.row + column * stride * kLanes;
      sum_tile<kKind, 1, 1, 1, kVectors>(input, t.weights, operands, sums);
      for (int v = 0; v < kVectors; ++v) {
        write(t.output + row * t.output_row + column * t.output_column + v * kLanes, sums[v], t.lanes);
      }
    }
  }
}

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
