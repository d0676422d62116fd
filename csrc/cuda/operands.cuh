// The operands of a GEMM: where their elements lie in global memory, how tiles of them lie in shared memory, and the
// copies from one to the other.
#pragma once

#include "primitives.cuh"
#include "projection_shortcut.h"

namespace fastres::shortcut {

// --- Addresses -----------------------------------------------------------------------------------------------------

// Division of numbers below 2^31 by one that is known at launch: n / d = n * ceil(2^(31 + l) / d) / 2^(31 + l) with
// 2^l >= d (Granlund and Montgomery 1994, theorem 4.2).
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(31) {
    while ((int64_t{1} << (shift - 31)) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1);
  }
  FASTRES_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

// Where the row of an index starts, in elements. Rows are equally spaced, or those of output positions in N, H, W order
// in a tensor that the stride steps through.
struct Lines {
  bool spaced;
  Divisor width, height; // of the output
  int64_t image, row, column;

  FASTRES_HOST_DEVICE int64_t offset(uint32_t index) const {
    if (spaced) {
      return index * column;
    }
    const uint32_t line = width.quotient(index), j = index - line * width.divisor;
    const uint32_t n = height.quotient(line), i = line - n * height.divisor;
    return n * image + i * row + j * column;
  }
};

// One operand in memory: [lines, items], an item of a line `step` elements from the next.
template <typename T>
struct Operand {
  const T* data;
  Lines lines;
  int64_t step;
  uint32_t line_count, item_count;
  bool across; // neighbours in memory are those of the next line, as in NCHW
};

// Where results go. In the gradient of the input an output position owns the cell of input positions from its own up
// to the next: cell_h x cell_w of them, less at the edge. The cells cover the input.
template <typename T>
struct Target {
  T* data;
  Lines lines;
  int64_t step;
  uint32_t cell_h, cell_w;
  uint32_t height, width; // of what the cells cover
  int64_t row, column;    // from one position of a cell to the next
  bool across;
};

// --- Tiles in shared memory ----------------------------------------------------------------------------------------

// A tile of kLines x kItems elements. Chunks of 16 bytes are exchanged within a line so that both the copies into it
// and the reads of fragments, which take eight lines at once, touch every bank once.
template <typename T, int kLinesInTile, int kItemsInTile>
struct SharedTile {
  static constexpr int kLines = kLinesInTile;
  static constexpr int kItems = kItemsInTile;
  static constexpr int kLineBytes = kItems * static_cast<int>(sizeof(T));
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kLineBytes / 16;

  FASTRES_DEVICE static int chunk_offset(int line, int chunk) {
    if constexpr (kLineBytes == 64) {
      chunk ^= (line >> 1) & 3;
    } else if constexpr (sizeof(T) == 2) {
      chunk ^= line & 7;
    } else {
      chunk ^= (line & 3) << 1;
    }
    return line * kLineBytes + chunk * 16;
  }
  FASTRES_DEVICE static int offset(int line, int item) {
    return chunk_offset(line, item / kPerChunk) + item % kPerChunk * static_cast<int>(sizeof(T));
  }
};

// Copies the tiles of one operand, a step along K after the other. With kAlongK an item is an index of K and the lines
// stay the same; without it the lines are indices of K and the items stay.
template <typename T, typename Tile_, bool kAlongK, bool kVector>
struct Loader {
  static constexpr int kParts = Tile_::kLines * (kVector ? Tile_::kChunks : Tile_::kItems) / Tile::kThreads;
  static constexpr int kStep = kAlongK ? Tile_::kItems : Tile_::kLines;
  // There is no asynchronous copy of two bytes.
  static constexpr bool kAsynchronous = kVector || sizeof(T) == 4;
  static_assert(kParts * Tile::kThreads == Tile_::kLines * (kVector ? Tile_::kChunks : Tile_::kItems));

  const Operand<T>& operand;
  uint32_t first; // line or item, whichever stays
  int64_t line_offset[kVector && kAlongK ? kParts : 1];

  FASTRES_DEVICE Loader(const Operand<T>& source, uint32_t start) : operand(source), first(start) {
    if constexpr (kVector && kAlongK) {
      FASTRES_UNROLL
      for (int i = 0; i < kParts; ++i) {
        line_offset[i] = operand.lines.offset(first + line_of(i));
      }
    }
  }

  FASTRES_DEVICE static int line_of(int part) {
    return (thread_index() + part * Tile::kThreads) / Tile_::kChunks;
  }

  FASTRES_DEVICE void fetch(unsigned char* to, uint32_t step) const {
    const uint32_t line0 = kAlongK ? first : step * kStep, item0 = kAlongK ? step * kStep : first;
    if constexpr (kVector) {
      FASTRES_UNROLL
      for (int i = 0; i < kParts; ++i) {
        const int line = line_of(i), chunk = thread_index() % Tile_::kChunks;
        const uint32_t item = item0 + chunk * Tile_::kPerChunk;
        const bool valid = line0 + line < operand.line_count && item < operand.item_count;
        const int64_t offset = kAlongK ? line_offset[i] : operand.lines.offset(line0 + line);
        copy_async<16>(to + Tile_::chunk_offset(line, chunk), operand.data + offset + item, valid);
      }
    } else {
      // Not unrolled whole: sixteen addresses at a time would not fit the registers.
      FASTRES_UNROLL_BY(4)
      for (int i = 0; i < kParts; ++i) {
        const int index = thread_index() + i * Tile::kThreads;
        const int line = operand.across ? index % Tile_::kLines : index / Tile_::kItems;
        const int item = operand.across ? index / Tile_::kLines : index % Tile_::kItems;
        const bool valid = line0 + line < operand.line_count && item0 + item < operand.item_count;
        const T* from = operand.data + operand.lines.offset(line0 + line) + (item0 + item) * operand.step;
        unsigned char* place = to + Tile_::offset(line, item);
        if constexpr (kAsynchronous) {
          copy_async<4>(place, from, valid);
        } else {
          store_shared(place, load_global(from, valid));
        }
      }
    }
  }
};

} // namespace fastres::shortcut
