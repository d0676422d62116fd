// The epilogues of the shortcut's GEMMs: what a program does with its tile of sums before it is written.
//
// Forward rounds it to the product's dtype and takes the mean and M2 of each column; inference applies both
// normalisations, adds x and rectifies; the gradients are stored as they are. projection_shortcut.cuh has the formulas.
#pragma once

#include "products.cuh"

#include <cstddef>
#include <type_traits>

namespace fastres::shortcut {

template <typename T>
struct Params {
  Operand<T> a, b;
  Target<T> out;
  uint32_t rows, columns;
  uint32_t column_tiles;
  uint32_t steps, steps_a_split;
  bool vector_stores;
  bool relu;
  float* workspace;
  const T* x;
  RunningNorm norm, x_norm;
};

// --- Epilogues -----------------------------------------------------------------------------------------------------

// The tile of results as float32. Pairs of columns are written by eight rows at once, chunks read line by line.
struct ResultTile {
  FASTRES_DEVICE static int offset(int row, int column) {
    return row * Tile::kColumns * 4 + ((column / 4) ^ ((row & 7) << 1)) * 16 + column % 4 * 4;
  }
};

FASTRES_DEVICE void stage_results(unsigned char* shared, const Accumulator& sum, const Place& place) {
  FASTRES_UNROLL
  for (int i = 0; i < 2; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < 4; ++j) {
      FASTRES_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const Bytes8 pair{{float_bits(sum[i][j][e]), float_bits(sum[i][j][e + 1])}};
        store_shared(shared + ResultTile::offset(place.row_of(i, e), place.column_of(j, e)), pair);
      }
    }
  }
}

// Sums f(value, row is inside) over the rows of this warp, for each of the lane's eight columns, and writes them down:
// table[warp row][column].
template <typename F>
FASTRES_DEVICE void sum_rows(float* table, const Accumulator& sum, const Place& place, uint32_t rows, const F& f) {
  FASTRES_UNROLL
  for (int j = 0; j < 4; ++j) {
    FASTRES_UNROLL
    for (int e = 0; e < 2; ++e) {
      float total = 0;
      FASTRES_UNROLL
      for (int i = 0; i < 2; ++i) {
        FASTRES_UNROLL
        for (int h = 0; h < 2; ++h) {
          const bool inside = static_cast<uint32_t>(place.row_of(i, h * 2)) < rows;
          total += f(sum[i][j][h * 2 + e], j * 2 + e, inside);
        }
      }
      FASTRES_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        total += shuffle_xor(total, mask);
      }
      if (place.lane < 4) {
        store_shared(table + place.row / kWarpRows * Tile::kColumns + place.column_of(j, e), total);
      }
    }
  }
}

FASTRES_DEVICE float sum_warps(const float* table, int column) {
  float total = 0;
  FASTRES_UNROLL
  for (int w = 0; w < kWarpsDown; ++w) {
    total += load_shared<float>(table + w * Tile::kColumns + column);
  }
  return total;
}

// Both normalisations of inference as factors: z = (product - mean) * scale + bias.
struct Folded {
  float mean, scale, bias;

  FASTRES_DEVICE Folded(const RunningNorm& norm, uint32_t channel, bool valid) : mean(0), scale(1), bias(0) {
    if (norm.mean != nullptr) {
      mean = load_global(norm.mean + channel, valid);
      scale = (norm.weight != nullptr ? load_global(norm.weight + channel, valid) : 1.0f) /
          sqrtf(load_global(norm.var + channel, valid) + norm.eps);
      bias = norm.bias != nullptr ? load_global(norm.bias + channel, valid) : 0.0f;
    }
  }
  FASTRES_DEVICE void store(float* table, int column) const {
    store_shared(table + column, mean);
    store_shared(table + Tile::kColumns + column, scale);
    store_shared(table + 2 * Tile::kColumns + column, bias);
  }
};

template <int kCount>
FASTRES_DEVICE void load_floats(float (&v)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const auto four = load_shared<Bytes16>(from);
    FASTRES_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = bits_float(four.words[i]);
    }
  } else {
    static_assert(kCount == 1);
    v[0] = load_shared<float>(from);
  }
}

template <int kCount>
FASTRES_DEVICE void normalise(float (&v)[kCount], const float* table, int column) {
  float mean[kCount], scale[kCount], bias[kCount];
  load_floats(mean, table + column);
  load_floats(scale, table + Tile::kColumns + column);
  load_floats(bias, table + 2 * Tile::kColumns + column);
  FASTRES_UNROLL
  for (int i = 0; i < kCount; ++i) {
    v[i] = (v[i] - mean[i]) * scale[i] + bias[i];
  }
}

// What inference makes of products in neighbouring columns.
template <int kCount, typename T>
FASTRES_DEVICE void activate(const Params<T>& p, const float* tables, float (&v)[kCount], const T* x, int column) {
  normalise(v, tables, column);
  if (p.x != nullptr) {
    float added[kCount];
    FASTRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      added[i] = to_float(x[i]);
    }
    normalise(added, tables + 3 * Tile::kColumns, column);
    FASTRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      v[i] += added[i];
    }
  }
  if (p.relu) {
    FASTRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      v[i] = v[i] > 0 || v[i] != v[i] ? v[i] : 0.0f;
    }
  }
}

// Writes kItems results of a row next to each other, and where a cell is larger than one position zeros to the rest.
template <Step kStep, int kItems, typename T, typename V>
FASTRES_DEVICE void store_cell(const Target<T>& out, uint32_t line, int64_t item_offset, V value, bool valid) {
  if constexpr (kStep == Step::kInputGradient) {
    const uint32_t image_line = out.lines.width.quotient(line);
    const uint32_t j = line - image_line * out.lines.width.divisor;
    const uint32_t n = out.lines.height.quotient(image_line), i = image_line - n * out.lines.height.divisor;
    T* corner = out.data + n * out.lines.image + i * out.lines.row + j * out.lines.column + item_offset;
    for (uint32_t di = 0; di < out.cell_h; ++di) {
      for (uint32_t dj = 0; dj < out.cell_w; ++dj) {
        const bool inside = valid && i * out.cell_h + di < out.height && j * out.cell_w + dj < out.width;
        const V what = di + dj == 0 ? value : V{};
        store_global(reinterpret_cast<V*>(corner + di * out.row + dj * out.column), what, inside);
      }
    }
  } else {
    store_global(reinterpret_cast<V*>(out.data + out.lines.offset(line) + item_offset), value, valid);
  }
}

// How a block's threads share out a tile of results for 16-byte accesses: a thread keeps its columns.
template <typename Out>
struct Chunks {
  static constexpr int kItems = 16 / static_cast<int>(sizeof(Out));
  static constexpr int kAcross = Tile::kColumns / kItems;
  static constexpr int kParts = Tile::kRows * kAcross / Tile::kThreads;
  static_assert(Tile::kThreads % kAcross == 0);

  FASTRES_DEVICE static int row_of(int part) {
    return thread_index() / kAcross + part * (Tile::kThreads / kAcross);
  }
  FASTRES_DEVICE static int column() {
    return thread_index() % kAcross * kItems;
  }
};

// The other branch of inference, all of a thread's share at once: its latency is paid once, and beside the staging.
template <typename T>
FASTRES_DEVICE void load_added(Bytes16 (&x)[Chunks<T>::kParts], const Params<T>& p, uint32_t row0, uint32_t column0) {
  if (p.x == nullptr || !p.vector_stores) {
    return;
  }
  const uint32_t column = column0 + Chunks<T>::column();
  FASTRES_UNROLL
  for (int part = 0; part < Chunks<T>::kParts; ++part) {
    const uint32_t row = row0 + Chunks<T>::row_of(part);
    const T* from = p.x + p.out.lines.offset(row) + column;
    x[part] = load_global(reinterpret_cast<const Bytes16*>(from), row < p.rows && column < p.columns);
  }
}

// Brings the staged results to global memory, 16 bytes a thread where rows allow it.
template <Step kStep, typename T, typename Out>
FASTRES_DEVICE void store_results(
    const Params<T>& p,
    const Target<Out>& out,
    const unsigned char* shared,
    const float* tables,
    const Bytes16* x,
    uint32_t row0,
    uint32_t column0) {
  if (p.vector_stores) {
    using C = Chunks<Out>;
    const int column = C::column();
    FASTRES_UNROLL
    for (int part = 0; part < C::kParts; ++part) {
      const int row = C::row_of(part);
      union {
        Bytes16 bytes;
        Out items[C::kItems];
      } added{}, stored;
      if constexpr (kStep == Step::kInference) {
        added.bytes = x[part];
      }
      FASTRES_UNROLL
      for (int q = 0; q < C::kItems; q += 4) {
        float v[4];
        load_floats(v, reinterpret_cast<const float*>(shared + ResultTile::offset(row, column + q)));
        if constexpr (kStep == Step::kInference) {
          activate(p, tables, v, added.items + q, column + q);
        }
        FASTRES_UNROLL
        for (int r = 0; r < 4; ++r) {
          stored.items[q + r] = from_float<Out>(v[r]);
        }
      }
      const bool valid = row0 + row < p.rows && column0 + column < p.columns;
      store_cell<kStep, C::kItems>(out, row0 + row, column0 + column, stored.bytes, valid);
    }
    return;
  }
  for (int index = thread_index(); index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const int row = out.across ? index % Tile::kRows : index / Tile::kColumns;
    const int column = out.across ? index / Tile::kRows : index % Tile::kColumns;
    const bool valid = row0 + row < p.rows && column0 + column < p.columns;
    const int64_t item_offset = (column0 + column) * out.step;
    float v[1];
    load_floats(v, reinterpret_cast<const float*>(shared + ResultTile::offset(row, column)));
    if constexpr (kStep == Step::kInference) {
      const T added = p.x != nullptr ? load_global(p.x + out.lines.offset(row0 + row) + item_offset, valid) : T{};
      activate(p, tables, v, &added, column);
    }
    store_cell<kStep, 1>(out, row0 + row, item_offset, from_float<Out>(v[0]), valid);
  }
}

} // namespace fastres::shortcut
