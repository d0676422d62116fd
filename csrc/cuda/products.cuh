// The product of two tiles in shared memory, added to accumulators in registers: on tensor cores, or by FMA.
#pragma once

#include "operands.cuh"

#include <type_traits>

namespace fastres::shortcut {

// Every kind of arithmetic leaves results where mma does: of a warp's 32 x 32, in tile i of 16 rows and j of 8 columns,
// a lane holds rows lane / 4 and 8 more, columns 2 * (lane % 4) and the next.
constexpr int kWarpRows = 32, kWarpColumns = 32;
constexpr int kWarpsAcross = Tile::kColumns / kWarpColumns, kWarpsDown = Tile::kRows / kWarpRows;
static_assert(kWarpsAcross * kWarpsDown * 32 == Tile::kThreads);

using Accumulator = float[2][4][4];

struct Place {
  int lane, row, column; // the warp's first row and column in the tile

  FASTRES_DEVICE Place()
      : lane(thread_index() % 32),
        row(thread_index() / 32 / kWarpsAcross * kWarpRows),
        column(thread_index() / 32 % kWarpsAcross * kWarpColumns) {}

  // Row and column in the tile of element e of accumulator [i][j].
  FASTRES_DEVICE int row_of(int i, int e) const {
    return row + i * 16 + e / 2 * 8 + lane / 4;
  }
  FASTRES_DEVICE int column_of(int j, int e) const {
    return column + j * 8 + lane % 4 * 2 + e % 2;
  }
};

// Tensor cores. K is taken 32 bytes at a time: 16 elements of 16 bits or 8 of 32, two chunks of a line.
template <typename T, typename Format_>
struct TensorCores {
  using Element = T;
  using Format = Format_;

  template <typename A, typename B, bool kAAlongK, bool kBAlongK>
  FASTRES_DEVICE static void multiply(
      Accumulator& sum,
      const unsigned char* a,
      const unsigned char* b,
      const Place& place) {
    constexpr int kDepth = Tile::kStepBytes / static_cast<int>(sizeof(T));
    constexpr int kMmaDepth = 32 / static_cast<int>(sizeof(T));
    const int lane = place.lane;
    FASTRES_UNROLL
    for (int k = 0; k < kDepth; k += kMmaDepth) {
      uint32_t left[2][4], right[2][4]; // right: two tiles of 8 columns together, each in two registers
      FASTRES_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = place.row + i * 16;
        if constexpr (kAAlongK) {
          load_matrices(left[i], a + A::chunk_offset(row + lane % 16, k / A::kPerChunk + lane / 16));
        } else if constexpr (sizeof(T) == 2) {
          const int line = k + lane / 16 * 8 + lane % 8;
          load_matrices_transposed(left[i], a + A::chunk_offset(line, row / A::kPerChunk + lane / 8 % 2));
        } else {
          FASTRES_UNROLL
          for (int r = 0; r < 4; ++r) {
            left[i][r] = load_shared<uint32_t>(a + A::offset(k + r / 2 * 4 + lane % 4, row + r % 2 * 8 + lane / 4));
          }
        }
        const int column = place.column + i * 16;
        if constexpr (kBAlongK) {
          const int line = column + lane / 16 * 8 + lane % 8;
          load_matrices(right[i], b + B::chunk_offset(line, k / B::kPerChunk + lane / 8 % 2));
        } else if constexpr (sizeof(T) == 2) {
          load_matrices_transposed(right[i], b + B::chunk_offset(k + lane % 16, column / B::kPerChunk + lane / 16));
        } else {
          FASTRES_UNROLL
          for (int r = 0; r < 4; ++r) {
            right[i][r] = load_shared<uint32_t>(b + B::offset(k + r % 2 * 4 + lane % 4, column + r / 2 * 8 + lane / 4));
          }
        }
      }
      if constexpr (std::is_same_v<Format, tf32>) {
        FASTRES_UNROLL
        for (int i = 0; i < 2; ++i) {
          FASTRES_UNROLL
          for (int r = 0; r < 4; ++r) {
            left[i][r] = round_to_tf32(left[i][r]);
            right[i][r] = round_to_tf32(right[i][r]);
          }
        }
      }
      FASTRES_UNROLL
      for (int i = 0; i < 2; ++i) {
        FASTRES_UNROLL
        for (int j = 0; j < 4; ++j) {
          mma<Format>(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

struct BFloat16 : TensorCores<bf16, bf16> {};
struct Half : TensorCores<f16, f16> {};
struct Tf32 : TensorCores<float, tf32> {};

// Plain FMA in float32: four rows and eight columns a lane, four indices of K at a time.
struct Float {
  using Element = float;

  // The values of line or item `at` at k ... k + 3.
  template <typename S, bool kAlongK>
  FASTRES_DEVICE static void take(float (&v)[4], const unsigned char* tile, int at, int k) {
    if constexpr (kAlongK) {
      const auto four = load_shared<Bytes16>(tile + S::chunk_offset(at, k / 4));
      FASTRES_UNROLL
      for (int q = 0; q < 4; ++q) {
        v[q] = bits_float(four.words[q]);
      }
    } else {
      FASTRES_UNROLL
      for (int q = 0; q < 4; ++q) {
        v[q] = load_shared<float>(tile + S::offset(k + q, at));
      }
    }
  }

  template <typename A, typename B, bool kAAlongK, bool kBAlongK>
  FASTRES_DEVICE static void multiply(
      Accumulator& sum,
      const unsigned char* a,
      const unsigned char* b,
      const Place& place) {
    constexpr int kDepth = Tile::kStepBytes / 4;
    FASTRES_UNROLL_BY(1)
    for (int k = 0; k < kDepth; k += 4) {
      float left[2][2][4];
      FASTRES_UNROLL
      for (int i = 0; i < 2; ++i) {
        FASTRES_UNROLL
        for (int h = 0; h < 2; ++h) {
          take<A, kAAlongK>(left[i][h], a, place.row_of(i, h * 2), k);
        }
      }
      FASTRES_UNROLL
      for (int j = 0; j < 4; ++j) {
        FASTRES_UNROLL
        for (int e = 0; e < 2; ++e) {
          float right[4];
          take<B, kBAlongK>(right, b, place.column_of(j, e), k);
          FASTRES_UNROLL
          for (int q = 0; q < 4; ++q) {
            FASTRES_UNROLL
            for (int i = 0; i < 2; ++i) {
              sum[i][j][e] += left[i][0][q] * right[q];
              sum[i][j][2 + e] += left[i][1][q] * right[q];
            }
          }
        }
      }
    }
  }
};

} // namespace fastres::shortcut
