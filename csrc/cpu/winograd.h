// Winograd's minimal filtering F(4x4, 3x3): the transforms of tiles and weights, and the two matrix products between.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A      d: 6x6 input, g: 3x3 weights, Y: 4x4 outputs, *: element by element
//
// 36 multiplications give 16 outputs, where the direct sum takes 144. Source: Lavin and Gray 2016, "Fast algorithms for
// convolutional neural networks", sections 4.1 and 4.3; Toom and Cook's construction from points 0, +-a, +-b and
// infinity. Here a = sqrt(1/2) and b = sqrt(2): a * b = 1 keeps every matrix entry between 1/6 and 2.83, and the error
// is a third to a quarter of that with the points 1 and 2 (docs/convolution.md has the figures) for as many operations.
//
//   B^T rows   [1 0 -5/2 0 1 0]   [0 -+2a -2 +-a 1 0]   [0 -+b/2 -1/2 +-b 1 0]   [0 1 0 -5/2 0 1]
//   G rows     [1 0 0]            [1 +-a 1/2] / -3/2     [1 +-b 2] / 6            [0 0 1]
//   A^T rows   [1 1 1 1 1 0]      [0 a -a b -b 0]        [0 1/2 1/2 2 2 0]        [0 a/2 -a/2 2b -2b 1]
//
// Layouts of what is transformed, for each of the 36 points a plane (p: tile, c: channel, W: lanes of a vector):
//   operand   [p / kRows][c / W][p % kRows][W]     left side of the product that gives outputs
//   columns   [c / kColumns][p][kColumns]          right side of the product that gives the weight gradient; products
//   rows      [p][c], padded                       left side of that product
//   weights   [k / kPanel][c][kPanel]              right side of the product that gives outputs
// so that the inner loops read memory in order, at fixed offsets.
//
// The transforms mix the values of a tile, so that rounding errors of its largest spread to all of its outputs, and
// infinities and NaN with them. A tile beyond the transforms' range (within_range) is summed directly.
#pragma once

#include "norm_act.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace winograd {

// Plain registers: compilers keep an array of these in registers throughout a
// loop, and one of at::vec's classes not.
#if defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512;
inline Lanes broadcast(float value) {
  return _mm512_set1_ps(value);
}
inline Lanes load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, Lanes v) {
  _mm512_storeu_ps(p, v);
}
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return _mm512_fmadd_ps(x, y, z);
}
#else
using Lanes = __m256;
inline Lanes broadcast(float value) {
  return _mm256_set1_ps(value);
}
inline Lanes load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, Lanes v) {
  _mm256_storeu_ps(p, v);
}
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return _mm256_fmadd_ps(x, y, z);
}
#endif
// Lanes from `count` on are zero.
inline Lanes load(const float* p, int64_t count) {
  return Vec<float>::loadu(p, count);
}
inline void store(float* p, Lanes v, int64_t count) {
  Vec<float>(v).store(p, static_cast<int>(count));
}

// bfloat16 is a storage format here: values are float32 in registers.
inline Lanes load(const at::BFloat16* p) {
  Lanes v;
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), v);
#else
  at::vec::cvtbf16_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), v);
#endif
  return v;
}
inline void store(at::BFloat16* p, Lanes v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(v));
#endif
}
inline Lanes load(const at::BFloat16* p, int64_t count) {
  at::BFloat16 lanes[Vec<float>::size()] = {};
  std::copy(p, p + count, lanes);
  return load(lanes);
}
inline void store(at::BFloat16* p, Lanes v, int64_t count) {
  at::BFloat16 lanes[Vec<float>::size()];
  store(lanes, v);
  std::copy(lanes, lanes + count, p);
}
// The value as a load would give it back after a store to T.
template <typename T>
inline Lanes rounded(Lanes v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    Lanes back;
    at::vec::cvtbf16_fp32(at::vec::cvtfp32_bf16(v), back);
    return back;
  }
}

constexpr int64_t kWidth = Vec<float>::size();
constexpr int kOut = 4, kIn = 6, kTaps = 3, kPoints = kIn * kIn;

// A product's tile in registers: kRows x kColumns accumulators leave room for
// two vectors and a broadcast.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int64_t kColumns = 2 * kWidth;
// Outputs of a row of weights, as products read them. It does not depend on the vectors' width: packed weights are
// saved on one machine and loaded on another. Column groups are one or two of these.
constexpr int64_t kPanel = 16;

inline int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

// --- one dimension of each transform; `from` and `to` are strided arrays in
// registers

constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

inline Lanes times(float factor, Lanes x, Lanes plus) {
  return multiply_add(broadcast(factor), x, plus);
}

// B^T d
struct InputTransform {
  static constexpr int kFrom = kIn, kTo = kIn;
  static inline __attribute__((always_inline)) void apply(const Lanes* d, int s, Lanes* o, int os) {
    const Lanes d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
    o[0] = times(-2.5f, d2, d0 + d4);
    const Lanes even_a = times(-2.0f, d2, d4), odd_a = times(-2.0f, d1, d3);
    o[os] = times(kA, odd_a, even_a);
    o[2 * os] = times(-kA, odd_a, even_a);
    const Lanes even_b = times(-0.5f, d2, d4), odd_b = times(-0.5f, d1, d3);
    o[3 * os] = times(kB, odd_b, even_b);
    o[4 * os] = times(-kB, odd_b, even_b);
    o[5 * os] = times(-2.5f, d3, d1 + d5);
  }
};

// A^T m
struct OutputTransform {
  static constexpr int kFrom = kIn, kTo = kOut;
  static inline __attribute__((always_inline)) void apply(const Lanes* m, int s, Lanes* o, int os) {
    const Lanes sum_a = m[s] + m[2 * s], difference_a = m[s] - m[2 * s];
    const Lanes sum_b = m[3 * s] + m[4 * s], difference_b = m[3 * s] - m[4 * s];
    o[0] = m[0] + sum_a + sum_b;
    o[os] = times(kB, difference_b, broadcast(kA) * difference_a);
    o[2 * os] = times(2.0f, sum_b, broadcast(0.5f) * sum_a);
    o[3 * os] = times(2 * kB, difference_b, times(kA / 2, difference_a, m[5 * s]));
  }
};

// A y
struct GradientTransform {
  static constexpr int kFrom = kOut, kTo = kIn;
  static inline __attribute__((always_inline)) void apply(const Lanes* y, int s, Lanes* o, int os) {
    const Lanes y0 = y[0], y1 = y[s], y2 = y[2 * s], y3 = y[3 * s];
    o[0] = y0;
    const Lanes even_a = times(0.5f, y2, y0), odd_a = times(0.5f, y3, y1);
    o[os] = times(kA, odd_a, even_a);
    o[2 * os] = times(-kA, odd_a, even_a);
    const Lanes even_b = times(2.0f, y2, y0), odd_b = times(2.0f, y3, y1);
    o[3 * os] = times(kB, odd_b, even_b);
    o[4 * os] = times(-kB, odd_b, even_b);
    o[5 * os] = y3;
  }
};

// G g
struct WeightTransform {
  static constexpr int kFrom = kTaps, kTo = kIn;
  static inline __attribute__((always_inline)) void apply(const Lanes* g, int s, Lanes* o, int os) {
    const Lanes g0 = g[0], g1 = g[s], g2 = g[2 * s];
    o[0] = g0;
    const Lanes even_a = broadcast(-2.0f / 3) * times(0.5f, g2, g0), odd_a = broadcast(-2.0f / 3 * kA) * g1;
    o[os] = even_a + odd_a;
    o[2 * os] = even_a - odd_a;
    const Lanes even_b = broadcast(1.0f / 6) * times(2.0f, g2, g0), odd_b = broadcast(kB / 6) * g1;
    o[3 * os] = even_b + odd_b;
    o[4 * os] = even_b - odd_b;
    o[5 * os] = g2;
  }
};

// G^T m
struct WeightGradientTransform {
  static constexpr int kFrom = kIn, kTo = kTaps;
  static inline __attribute__((always_inline)) void apply(const Lanes* m, int s, Lanes* o, int os) {
    const Lanes sum_a = m[s] + m[2 * s], difference_a = m[s] - m[2 * s];
    const Lanes sum_b = m[3 * s] + m[4 * s], difference_b = m[3 * s] - m[4 * s];
    o[0] = times(1.0f / 6, sum_b, times(-2.0f / 3, sum_a, m[0]));
    o[os] = times(kB / 6, difference_b, broadcast(-2.0f / 3 * kA) * difference_a);
    o[2 * os] = times(1.0f / 3, sum_b, times(-1.0f / 3, sum_a, m[5 * s]));
  }
};

// Both dimensions of one tile, a vector of channels: load(i) gives element i of
// the square, store(i, v) takes point i.
template <typename Transform, typename Load, typename Store>
inline __attribute__((always_inline)) void transform_square(const Load& load, const Store& store) {
  constexpr int from = Transform::kFrom, to = Transform::kTo;
  Lanes half[to * from];
#pragma GCC unroll 6
  for (int j = 0; j < from; ++j) {
    Lanes column[from];
#pragma GCC unroll 6
    for (int i = 0; i < from; ++i) {
      column[i] = load(i * from + j);
    }
    Transform::apply(column, 1, half + j, from);
  }
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i) {
    Lanes row[to];
    Transform::apply(half + i * from, 1, row, 1);
#pragma GCC unroll 6
    for (int j = 0; j < to; ++j) {
      store(i * to + j, row[j]);
    }
  }
}

// --- tiles

// The 4x4 tiles of [images, height, width] outputs, in the order of memory. The
// last ones of a line or column may reach over the edge.
struct Tiles {
  int64_t images, height, width;

  int64_t down() const {
    return (height + kOut - 1) / kOut;
  }
  int64_t across() const {
    return (width + kOut - 1) / kOut;
  }
  int64_t count() const {
    return images * down() * across();
  }
  // Of a tile, inside the image.
  int64_t pixels_down(int64_t tile) const {
    return std::min<int64_t>(kOut, height - tile / across() % down() * kOut);
  }
  int64_t pixels_across(int64_t tile) const {
    return std::min<int64_t>(kOut, width - tile % across() * kOut);
  }
  // Outputs of tiles first ... first + count - 1.
  int64_t pixels(int64_t first, int64_t count) const {
    int64_t sum = 0;
    for (int64_t tile = first; tile < first + count; ++tile) {
      sum += pixels_down(tile) * pixels_across(tile);
    }
    return sum;
  }
};

// Memory that is read after the products. They keep the multipliers busy and memory idle: meanwhile it is brought into
// the L2 cache, a share at a time.
class Ahead {
public:
  void clear() {
    runs_.clear();
    lines_ = run_ = at_ = 0;
  }

  // The pixels of tiles first ... first + count - 1 of x [images, height, width, channels].
  template <typename T>
  void add(const Tiles& tiles, const T* x, int64_t channels, int64_t first, int64_t count) {
    const int64_t across = tiles.across(), down = tiles.down();
    for (int64_t tile = first; tile < first + count;) {
      const int64_t line = tile / across, begin = tile % across, end = std::min(across, begin + first + count - tile);
      const int64_t top = line % down * kOut, left = begin * kOut, right = std::min(tiles.width, end * kOut);
      for (int64_t y = top; y < std::min(tiles.height, top + kOut); ++y) {
        const int64_t pixel = (line / down * tiles.height + y) * tiles.width + left;
        add_run(
            reinterpret_cast<const char*>(x + pixel * channels),
            (right - left) * channels * static_cast<int64_t>(sizeof(T)));
      }
      tile += end - begin;
    }
  }

  // One of `shares` shares, each call the next.
  void fetch(int64_t shares) {
    for (int64_t left = (lines_ + shares - 1) / shares; left > 0 && run_ < static_cast<int64_t>(runs_.size()); --left) {
      __builtin_prefetch(runs_[run_].first + at_, 0, 2);
      at_ += kLine;
      if (at_ >= runs_[run_].second) {
        ++run_;
        at_ = 0;
      }
    }
  }

private:
  static constexpr int64_t kLine = 64;

  void add_run(const char* start, int64_t bytes) {
    lines_ += (bytes + kLine - 1) / kLine;
    if (!runs_.empty() && runs_.back().first + runs_.back().second == start) {
      runs_.back().second += bytes;
    } else {
      runs_.emplace_back(start, bytes);
    }
  }

  std::vector<std::pair<const char*, int64_t>> runs_;
  int64_t lines_ = 0, run_ = 0, at_ = 0;
};

// --- the transforms' range

// A tile's largest admissible ratio of all its inputs' sum of squares to that of one of its own 2x2 blocks, and the
// largest sum of squares, of a tile or of the weights. docs/convolution.md, "Range", derives what they promise.
constexpr float kEnergyRatio = 4096.0f;
constexpr float kMaxEnergy = 0x1p88f;

// The sums of squares of a tile, over channels: of the four 2x2 blocks of pixels that its outputs lie on, and of the
// pixels around them. The 3x3 inputs of every output hold one of the blocks, and so do the inputs of every tap of the
// weight gradient.
struct Energy {
  Lanes block[4] = {}, around = {};

  void operator+=(const Energy& other) {
    for (int i = 0; i < 4; ++i) {
      block[i] = block[i] + other.block[i];
    }
    around = around + other.around;
  }
};

inline __m128 fold(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#if defined(CPU_CAPABILITY_AVX512)
inline __m256 half_folded(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#else
inline __m256 half_folded(__m256 v) {
  return v;
}
#endif

// Whether the transforms carry a tile: no value is infinite or NaN, and none so large that its rounding errors would
// show in outputs that do not read it. Blocks of zeros do not count, and with them those outside the image.
inline bool within_range(const Energy& energy) {
  const auto& b = energy.block;
  const __m128 blocks = fold(_mm256_hadd_ps(
      _mm256_hadd_ps(half_folded(b[0]), half_folded(b[1])), _mm256_hadd_ps(half_folded(b[2]), half_folded(b[3]))));
  __m128 sum = _mm_add_ps(blocks, fold(half_folded(energy.around)));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  const float all = _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  const __m128 none = _mm_cmpeq_ps(blocks, _mm_setzero_ps());
  __m128 least = _mm_blendv_ps(blocks, _mm_set1_ps(std::numeric_limits<float>::infinity()), none);
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ss(least, _mm_movehdup_ps(least));
  return all <= kMaxEnergy && all <= kEnergyRatio * _mm_cvtss_f32(least); // false for NaN
}

// A tile that is summed directly: its inputs [position][channel], and a bit for each position inside the image. Empty
// for the tiles that are transformed.
struct DirectTile {
  std::vector<float> values;
  uint64_t inside = 0;

  bool empty() const {
    return values.empty();
  }
  bool has(int position) const {
    return inside >> position & 1;
  }
};

// Whether no pixel of a tile, other than zeros, is further below all of them than a block may be.
inline bool even(const DirectTile& tile, int64_t channels) {
  float all = 0.0f, least = std::numeric_limits<float>::infinity();
  for (auto pixel = tile.values.begin(); pixel != tile.values.end(); pixel += channels) {
    const float energy = std::inner_product(pixel, pixel + channels, pixel, 0.0f);
    all += energy;
    least = energy == 0.0f ? least : std::min(least, energy);
  }
  return all <= kEnergyRatio * least;
}

// The Size x Size positions of a tile, from Before up and left of its outputs on: a pointer to each of its rows, of
// which those outside the image point to zeros, and whether its first or last column lies outside.
template <typename T, int Size>
struct Window {
  std::array<const T*, Size> row;
  bool left_out, right_out;
  int64_t inside; // columns from the first one inside on
};

// Transforms the tiles of x [images, height, width, channels], or of what `act` makes of x: that is computed a line of
// tiles at a time, into a buffer of this object's, and two of its six lines of pixels serve the next line of tiles as
// well. One object a thread.
template <typename Transform, int Before, typename T>
class TileReader {
public:
  static constexpr int kSize = Transform::kFrom;

  TileReader(const Tiles& tiles, const T* x, int64_t channels, const ApplyParams<T, float>* act = nullptr)
      : tiles_(tiles), x_(x), channels_(channels), act_(act) {
    // A margin of Before on the left, and up to the last tile's end on the right, is never written to and stays zero.
    const int64_t width = tiles.across() * kOut + kSize - kOut;
    line_ = width * channels;
    buffer_.assign(act != nullptr ? kSize * line_ : 0, 0.0f);
    zeros_.assign(act != nullptr ? 0 : kSize * channels, T(0.0f));
  }

  // Tiles first ... first + count - 1. place(p, c) is where channel c of the p-th of them goes within a plane; lanes
  // past the last channel become zero. Calls beyond(p) for those outside the transform's range.
  template <typename Place, typename Beyond>
  void transform(int64_t first, int64_t count, float* to, int64_t plane, const Place& place, const Beyond& beyond) {
    const int64_t across = tiles_.across();
    for (int64_t p = 0; p < count;) {
      const int64_t line = (first + p) / across, begin = (first + p) % across;
      const int64_t end = std::min(across, begin + count - p);
      if (act_ != nullptr) {
        activate(line, begin, end);
      }
      for (int64_t column = begin; column < end; ++column, ++p) {
        const bool carried = act_ != nullptr ? transform_tile(activated(line, column), to, plane, p, place)
                                             : transform_tile(in_place(line, column), to, plane, p, place);
        if (!carried) {
          beyond(p);
        }
      }
    }
  }

  // A tile as it stands before the transform.
  DirectTile read(int64_t tile) {
    const int64_t line = tile / tiles_.across(), column = tile % tiles_.across();
    if (act_ != nullptr) {
      activate(line, column, column + 1);
      return copied(activated(line, column), line, column);
    }
    return copied(in_place(line, column), line, column);
  }

private:
  // The line of pixels that is the i-th of a line of tiles; lines of tiles are numbered through all images.
  int64_t pixel_line(int64_t line, int64_t i) const {
    return line % tiles_.down() * kOut - Before + i;
  }

  // Where a line of pixels lies in the buffer.
  int64_t slot(int64_t pixel_line) const {
    return (pixel_line + Before) % kSize * line_;
  }

  Window<float, kSize> activated(int64_t line, int64_t column) const {
    Window<float, kSize> window{{}, false, false, kSize};
    for (int64_t i = 0; i < kSize; ++i) {
      window.row[i] = buffer_.data() + slot(pixel_line(line, i)) + column * kOut * channels_;
    }
    return window;
  }

  Window<T, kSize> in_place(int64_t line, int64_t column) const {
    const int64_t image = line / tiles_.down(), left = column * kOut - Before;
    Window<T, kSize> window{{}, left<0, left + kSize> tiles_.width, std::min<int64_t>(kSize, tiles_.width - left)};
    for (int64_t i = 0; i < kSize; ++i) {
      const int64_t y = pixel_line(line, i);
      const bool inside = y >= 0 && y < tiles_.height;
      // The column outside is not read; its address stays inside the tensor.
      const int64_t from = window.left_out ? 0 : left;
      const T* row = inside ? x_ + ((image * tiles_.height + y) * tiles_.width + from) * channels_ : zeros_.data();
      window.row[i] = row;
    }
    return window;
  }

  template <typename From>
  DirectTile copied(const Window<From, kSize>& window, int64_t line, int64_t column) const {
    DirectTile tile{std::vector<float>(kSize * kSize * channels_)};
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        const int64_t y = pixel_line(line, i), x = column * kOut - Before + j;
        if (y >= 0 && y < tiles_.height && x >= 0 && x < tiles_.width) {
          tile.inside |= uint64_t(1) << (i * kSize + j);
          const From* from = window.row[i] + (j - window.left_out) * channels_;
          std::copy(from, from + channels_, tile.values.data() + (i * kSize + j) * channels_);
        }
      }
    }
    return tile;
  }

  // Fills the buffer for tiles begin ... end - 1 of a line.
  void activate(int64_t line, int64_t begin, int64_t end) {
    const bool follows = line == line_filled_ + 1 && line % tiles_.down() != 0 && begin >= begin_ && end <= end_;
    const int64_t left = std::max<int64_t>(0, begin * kOut - Before);
    const int64_t right = std::min(tiles_.width, end * kOut + kSize - kOut - Before);
    for (int64_t i = follows ? kSize - kOut : 0; i < kSize; ++i) {
      const int64_t y = pixel_line(line, i);
      float* to = buffer_.data() + slot(y) + (left + Before) * channels_;
      if (y < 0 || y >= tiles_.height) {
        std::fill_n(to, (right - left) * channels_, 0.0f);
        continue;
      }
      ApplyParams<T, float> params = *act_;
      params.y = to;
      params.first_y_row = (line / tiles_.down() * tiles_.height + y) * tiles_.width + left;
      apply_range(params, params.first_y_row, params.first_y_row + right - left);
    }
    line_filled_ = line;
    begin_ = begin;
    end_ = end;
  }

  // Whether the tile is within the transform's range.
  template <typename From, typename Place>
  bool transform_tile(const Window<From, kSize>& window, float* to, int64_t plane, int64_t p, const Place& place)
      const {
    if (window.right_out && window.inside != kSize - 1) {
      // The last tile of a line whose width is no multiple of four.
      return transform_columns(
          window, to, plane, p, place, [&](int64_t j) { return j >= (window.left_out ? 1 : 0) && j < window.inside; });
    }
    const auto with_edges = [&](auto left, auto right) {
      return transform_columns(window, to, plane, p, place, [&](int j) {
        return !(decltype(left)::value && j == 0) && !(decltype(right)::value && j == kSize - 1);
      });
    };
    if (window.left_out) {
      return window.right_out ? with_edges(std::true_type(), std::true_type())
                              : with_edges(std::true_type(), std::false_type());
    }
    return window.right_out ? with_edges(std::false_type(), std::true_type())
                            : with_edges(std::false_type(), std::false_type());
  }

  template <typename From, typename Place, typename Inside>
  inline __attribute__((always_inline)) bool transform_columns(
      const Window<From, kSize>& window,
      float* to,
      int64_t plane,
      int64_t p,
      const Place& place,
      const Inside& inside) const {
    const auto rows = window.row;
    const int64_t channels = channels_, out = window.left_out ? 1 : 0;
    Energy energy;
    const auto run = [&](int64_t c, auto count) {
      float* target = to + place(p, c);
      Energy part;
      transform_square<Transform>(
          [&](int i) __attribute__((always_inline)) {
            const int y = i / kSize, x = i % kSize;
            if (!inside(x)) {
              return Lanes{};
            }
            const From* from = rows[y] + (x - out) * channels + c;
            Lanes v;
            if constexpr (std::is_same_v<decltype(count), int64_t>) {
              v = load(from, count);
            } else {
              v = load(from);
            }
            const bool own = y >= Before && y < Before + kOut && x >= Before && x < Before + kOut;
            Lanes& sum = own ? part.block[(y - Before) / 2 * 2 + (x - Before) / 2] : part.around;
            sum = multiply_add(v, v, sum);
            return v;
          },
          [&](int i, Lanes v) __attribute__((always_inline)) { store(target + i * plane, v); });
      energy += part;
    };
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      run(c, std::integral_constant<int64_t, kWidth>());
    }
    if (c < channels) {
      run(c, channels - c);
    }
    return within_range(energy);
  }

  Tiles tiles_;
  const T* x_;
  int64_t channels_;
  const ApplyParams<T, float>* act_; // its y is not used
  int64_t line_;                     // floats of a line of pixels in the buffer
  std::vector<float> buffer_;        // kSize lines of pixels
  std::vector<T> zeros_;             // without act, for one line of a tile
  int64_t line_filled_ = -2, begin_ = 0, end_ = 0;
};

// --- weights

// A 3x3 kernel tensor seen as (output channel, input channel, tap), whatever its layout. For the input gradient the
// channels change places and the taps are turned by half a circle. Packed weights have their outputs in groups.
struct Kernel {
  const float* data;
  int64_t outputs, inputs;
  int64_t group_stride; // of kPanel outputs
  int64_t output_stride, input_stride;
  std::array<int64_t, kTaps * kTaps> tap; // offsets

  const float* at(int64_t k, int64_t c) const {
    return data + k / kPanel * group_stride + k % kPanel * output_stride + c * input_stride;
  }
  bool is_packed() const {
    return group_stride != kPanel * output_stride;
  }
  // [k][...][c]: a vector of inputs under one tap lies together.
  bool inputs_are_adjacent() const {
    return input_stride == 1;
  }
  // [k][c][tap]: the nine taps of an input lie together, and those of the next one follow.
  bool taps_are_adjacent() const {
    bool adjacent = input_stride == kTaps * kTaps;
    for (int t = 0; t < kTaps * kTaps; ++t) {
      adjacent = adjacent && tap[t] == t;
    }
    return adjacent;
  }
};

// to[i][k] = from[k][i] for a vector of outputs k, their rows `stride` apart, and `count` vectors of i.
inline void transpose_rows(const float* from, int64_t stride, int64_t count, float* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) {
    at::vec::transpose_mxn<float, kWidth, kWidth>(from + i * kWidth, stride, to + i * kWidth * to_row, to_row);
  }
}

// Where in transformed weights of one group of columns the second vector of a row lies.
inline int64_t high_vector(int64_t depth) {
  return kWidth == kPanel ? depth * kPanel : kWidth;
}

// gathered: [kWidth][tap][kColumns], for input channels from c0 on and output channels from `from` on; what lies
// outside the kernel is zero.
inline void gather_weights(const Kernel& kernel, int64_t from, int64_t c0, float* gathered) {
  constexpr int taps = kTaps * kTaps;
  const int64_t columns = std::min(kColumns, kernel.outputs - from), inputs = std::min(kWidth, kernel.inputs - c0);
  if (inputs < kWidth || columns < kColumns) {
    std::fill_n(gathered, kWidth * taps * kColumns, 0.0f);
  }
  const float* block = kernel.at(from, c0);
  if (kernel.output_stride == 1) {
    // A group of packed weights is as long as a vector, or longer.
    const int64_t together = kernel.is_packed() ? kPanel : columns;
    for (int64_t k = 0; k < columns; k += together) {
      const int64_t size = std::min(together, columns - k);
      for (int64_t c = 0; c < inputs; ++c) {
        for (int t = 0; t < taps; ++t) {
          const float* row = kernel.at(from + k, c0 + c) + kernel.tap[t];
          std::copy(row, row + size, gathered + (c * taps + t) * kColumns + k);
        }
      }
    }
  } else if (kernel.taps_are_adjacent() && inputs == kWidth && columns == kColumns) {
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      transpose_rows(block + half * kernel.output_stride, kernel.output_stride, taps, gathered + half, kColumns);
    }
  } else if (kernel.inputs_are_adjacent() && inputs == kWidth && columns == kColumns) {
    for (int t = 0; t < taps; ++t) {
      for (int64_t half = 0; half < kColumns; half += kWidth) {
        at::vec::transpose_mxn<float, kWidth, kWidth>(
            block + half * kernel.output_stride + kernel.tap[t],
            kernel.output_stride,
            gathered + t * kColumns + half,
            taps * kColumns);
      }
    }
  } else {
    for (int64_t k = 0; k < columns; ++k) {
      for (int t = 0; t < taps; ++t) {
        const float* row = block + k * kernel.output_stride + kernel.tap[t];
        for (int64_t c = 0; c < inputs; ++c) {
          gathered[(c * taps + t) * kColumns + k] = row[c * kernel.input_stride];
        }
      }
    }
  }
}

// to: 36 planes of [kColumns / kPanel][inputs padded to kWidth][kPanel], for output channels from ... from + kColumns
// - 1, of which inputs begin ... end - 1, multiples of kWidth, are written; what lies outside the kernel is zero.
// Returns the sum of squares of these weights.
inline float transform_weights(
    const Kernel& kernel,
    int64_t from,
    int64_t begin,
    int64_t end,
    float* to,
    int64_t plane) {
  constexpr int taps = kTaps * kTaps;
  alignas(64) float gathered[kWidth * taps * kColumns];
  const int64_t high = high_vector(round_up(kernel.inputs, kWidth));
  Lanes energy{};
  // weight(half, i): tap i of outputs from + half ... and input c
  const auto transform = [&](int64_t c, const auto& weight) __attribute__((always_inline)) {
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      float* out = to + c * kPanel + (half == 0 ? 0 : high);
      Lanes part{};
      transform_square<WeightTransform>(
          [&](int i) __attribute__((always_inline)) {
            const Lanes v = load(weight(half, i));
            part = multiply_add(v, v, part);
            return v;
          },
          [&](int i, Lanes v) __attribute__((always_inline)) { store(out + i * plane, v); });
      energy = energy + part;
    }
  };
  for (int64_t c0 = begin; c0 < end; c0 += kWidth) {
    if (kernel.is_packed()) {
      for (int64_t c = c0; c < c0 + kWidth; ++c) {
        transform(c, [&](int64_t half, int i) { return kernel.at(from + half, c) + kernel.tap[i]; });
      }
      continue;
    }
    gather_weights(kernel, from, c0, gathered);
    for (int64_t c = 0; c < kWidth; ++c) {
      transform(c0 + c, [&](int64_t half, int i) { return gathered + (c * taps + i) * kColumns + half; });
    }
  }
  const __m128 sum = fold(half_folded(energy));
  const __m128 pairs = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

// --- tiles beyond the range

// The outputs of direct tiles for one column group.
class DirectSums {
public:
  // tiles [count], of which those that are not empty are summed.
  void compute(const Kernel& kernel, int64_t from, const DirectTile* tiles, int64_t count) {
    const int64_t direct = std::count_if(tiles, tiles + count, [](const DirectTile& t) { return !t.empty(); });
    place_.assign(direct > 0 ? count : 0, -1);
    if (direct == 0) {
      return;
    }
    constexpr int64_t part = kWidth * kTaps * kTaps * kColumns;
    weights_.resize(round_up(kernel.inputs, kWidth) / kWidth * part);
    for (int64_t c = 0; c < kernel.inputs; c += kWidth) {
      gather_weights(kernel, from, c, weights_.data() + c / kWidth * part);
    }
    sums_.resize(direct * kOut * kOut * kColumns);
    int64_t next = 0;
    for (int64_t p = 0; p < count; ++p) {
      if (!tiles[p].empty()) {
        place_[p] = next++ * kOut * kOut * kColumns;
        for (int64_t c = 0; c < kColumns; c += kWidth) {
          sum_rows<0>(tiles[p], kernel.inputs, c, sums_.data() + place_[p]);
          sum_rows<kOut / 2>(tiles[p], kernel.inputs, c, sums_.data() + place_[p]);
        }
      }
    }
  }

  // [16 outputs][kColumns], or null where the tile is transformed.
  const float* of(int64_t p) const {
    return place_.empty() || place_[p] < 0 ? nullptr : sums_.data() + place_[p];
  }

private:
  // Output rows First and First + 1, a vector of channels from `column` on: each input is read once, and goes to the
  // outputs that it is under. Taps outside the image are left out, as an infinite weight times zero would be NaN.
  template <int First>
  void sum_rows(const DirectTile& tile, int64_t inputs, int64_t column, float* to) const {
    constexpr int height = kOut / 2;
    Lanes sums[height * kOut] = {};
    for (int64_t c = 0; c < inputs; ++c) {
      const float* w = weights_.data() + c * kTaps * kTaps * kColumns + column;
#pragma GCC unroll 4
      for (int y = 0; y < height + kTaps - 1; ++y) {
#pragma GCC unroll 6
        for (int x = 0; x < kIn; ++x) {
          const int position = (First + y) * kIn + x;
          if (!tile.has(position)) {
            continue;
          }
          const Lanes value = broadcast(tile.values[position * inputs + c]);
#pragma GCC unroll 3
          for (int u = 0; u < kTaps; ++u) {
#pragma GCC unroll 3
            for (int v = 0; v < kTaps; ++v) {
              const int i = y - u, j = x - v;
              if (i >= 0 && i < height && j >= 0 && j < kOut) {
                sums[i * kOut + j] = multiply_add(value, load(w + (u * kTaps + v) * kColumns), sums[i * kOut + j]);
              }
            }
          }
        }
      }
    }
    for (int i = 0; i < height * kOut; ++i) {
      store(to + (First * kOut + i) * kColumns + column, sums[i]);
    }
  }

  std::vector<float> weights_; // [input channel][tap][kColumns]
  std::vector<float> sums_;
  std::vector<int64_t> place_;
};

// The outputs of tiles first ... first + count - 1, channels from ... from + columns - 1, out of a product whose planes
// are [p][kColumns], or those that were summed directly. What becomes of them is the epilogue's (epilogues.h).
template <typename Epilogue>
inline void transform_products(
    const Tiles& tiles,
    const float* product,
    int64_t plane,
    int64_t first,
    int64_t count,
    int64_t channels,
    int64_t from,
    const DirectSums& direct,
    const Epilogue& epilogue) {
  const int64_t columns = std::min(kColumns, channels - from);
  const int64_t across = tiles.across(), down = tiles.down();
  for (int64_t p = 0; p < count; ++p) {
    const int64_t line = (first + p) / across, top = line % down * kOut, left = (first + p) % across * kOut;
    const int64_t pixel = (line / down * tiles.height + top) * tiles.width + left;
    const int64_t height = std::min<int64_t>(kOut, tiles.height - top);
    const int64_t width = std::min<int64_t>(kOut, tiles.width - left);
    const int64_t start = pixel * channels + from, row = tiles.width * channels;
    const float* in = product + p * kColumns;
    const float* summed = direct.of(p);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const auto put = [&](auto& vector, int i, Lanes v) __attribute__((always_inline)) {
        vector(pixel + i / kOut * tiles.width + i % kOut, start + c + i / kOut * row + i % kOut * channels, v);
      };
      const auto point = [&](int i) __attribute__((always_inline)) { return load(in + i * plane + c); };
      const auto outputs = [&](const auto& take) __attribute__((always_inline)) {
        if (summed == nullptr) {
          transform_square<OutputTransform>(point, take);
        } else {
          for (int i = 0; i < kOut * kOut; ++i) {
            take(i, load(summed + i * kColumns + c));
          }
        }
      };
      if (height == kOut && width == kOut && c + kWidth <= columns) {
        auto vector = epilogue.vector(from + c, std::integral_constant<int64_t, kWidth>());
        if (p == 0) {
          vector.begin([&](const auto& take) { outputs([&](int, Lanes v) { take(v); }); }, kOut * kOut);
        }
        outputs([&](int i, Lanes v) __attribute__((always_inline)) { put(vector, i, v); });
        vector.end();
      } else {
        auto vector = epilogue.vector(from + c, std::min(kWidth, columns - c));
        const auto inside = [&](int i) { return i / kOut < height && i % kOut < width; };
        if (p == 0) {
          vector.begin(
              [&](const auto& take) {
                outputs([&](int i, Lanes v) {
                  if (inside(i)) {
                    take(v);
                  }
                });
              },
              height * width);
        }
        outputs([&](int i, Lanes v) {
          if (inside(i)) {
            put(vector, i, v);
          }
        });
        vector.end();
      }
    }
  }
}

// --- products

// product[r][:] (+)= sum_c operand[r][c] * weights[c][:] for R rows of one group of kRows, over `steps` vectors of c,
// which lie operand_step and weight_step apart. The two vectors of weights[c] are at low and high, c's rows Row apart.
template <int R, int64_t Row>
inline void output_product(
    const float* operand,
    int64_t operand_step,
    const float* low,
    const float* high,
    int64_t weight_step,
    int64_t steps,
    float* product,
    bool accumulate) {
  Lanes sum_low[R], sum_high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sum_low[r] = accumulate ? load(product + r * kColumns) : Lanes{};
    sum_high[r] = accumulate ? load(product + r * kColumns + kWidth) : Lanes{};
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth; ++lane) {
      const Lanes weights_low = load(low + lane * Row), weights_high = load(high + lane * Row);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Lanes factor = broadcast(operand[r * kWidth + lane]);
        sum_low[r] = multiply_add(factor, weights_low, sum_low[r]);
        sum_high[r] = multiply_add(factor, weights_high, sum_high[r]);
      }
    }
    low += weight_step;
    high += weight_step;
    operand += operand_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(product + r * kColumns, sum_low[r]);
    store(product + r * kColumns + kWidth, sum_high[r]);
  }
}

// gradient[r][:] (+)= sum_p rows[p][r] * columns[p][:] for R rows.
template <int R>
inline void gradient_product(
    const float* rows,
    int64_t row,
    const float* columns,
    float* gradient,
    int64_t depth,
    bool accumulate) {
  Lanes low[R], high[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    low[r] = high[r] = Lanes{};
  }
  for (int64_t p = 0; p < depth; ++p) {
    const Lanes columns_low = load(columns), columns_high = load(columns + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Lanes factor = broadcast(rows[r]);
      low[r] = multiply_add(factor, columns_low, low[r]);
      high[r] = multiply_add(factor, columns_high, high[r]);
    }
    rows += row;
    columns += kColumns;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    float* to = gradient + r * kColumns;
    store(to, accumulate ? load(to) + low[r] : low[r]);
    store(to + kWidth, accumulate ? load(to + kWidth) + high[r] : high[r]);
  }
}

// Calls f(std::integral_constant<int, rows>) for 1 ... kRows.
template <int R = kRows, typename F>
inline void with_rows(int64_t rows, const F& f) {
  if (rows == R) {
    f(std::integral_constant<int, R>());
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, f);
  }
}

// `tiles` tiles of a plane of operand, a column group of weights: product
// [p][kColumns]. depth is a multiple of kWidth.
inline void multiply_outputs(const float* operand, const float* weights, float* product, int64_t tiles, int64_t depth) {
  for (int64_t p = 0; p < tiles; p += kRows) {
    with_rows(std::min<int64_t>(kRows, tiles - p), [&](auto rows) {
      output_product<rows, kPanel>(
          operand + p * depth,
          kRows * kWidth,
          weights,
          weights + high_vector(depth),
          kWidth * kPanel,
          depth / kWidth,
          product + p * kColumns,
          false);
    });
  }
}

// Groups of at most kRows, as even as can be: a short last one would leave the
// multipliers waiting.
struct RowGroups {
  int64_t rows;

  int64_t count() const {
    return (rows + kRows - 1) / kRows;
  }
  int64_t begin(int64_t group) const {
    return rows * group / count();
  }
  int64_t size(int64_t group) const {
    return begin(group + 1) - begin(group);
  }
};

} // namespace winograd
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
