// Max pooling of rows of channels: the largest of a window, where in the window it was, and the way back.
//
//   y[n, i, j] = max over u, v of a[n, stride * i + u - padding, stride * j + v - padding]
//
// A window's position is u * kernel + v, one byte an output. As in PyTorch padding is never chosen, the first of equal
// values is, and NaN before any number, the last of several.
#pragma once

#include "lanes.h"
#include "rows.h"

#include "../common/arguments.h"

#include <algorithm>
#include <array>

namespace fastres {
inline namespace CPU_CAPABILITY {

// A position is a byte.
constexpr int64_t kMostPooled = 15;

// One axis of the windows: output positions `outputs` over input positions `size`.
struct PoolAxis {
  int64_t size, outputs, kernel, stride, padding;

  PoolAxis(int64_t size_in, const Pool& pool)
      : size(size_in),
        outputs((size_in + 2 * pool.padding - pool.kernel) / pool.stride + 1),
        kernel(pool.kernel),
        stride(pool.stride),
        padding(pool.padding) {}

  // The input position of the window's first tap, which may lie in the padding.
  int64_t first(int64_t output) const {
    return output * stride - padding;
  }
  // Input positions that a window covers.
  std::pair<int64_t, int64_t> covered(int64_t output) const {
    return {std::max<int64_t>(0, first(output)), std::min(size, first(output) + kernel)};
  }
  // Outputs whose windows cover an input position.
  std::pair<int64_t, int64_t> readers(int64_t input) const {
    const int64_t last = input + padding;
    const int64_t begin = last < kernel ? 0 : (last - kernel) / stride + 1;
    return {begin, std::min(outputs, last / stride + 1)};
  }
};

struct PoolShape {
  int64_t images, channels;
  PoolAxis rows, columns;

  // Of an input of these sizes, [N, C, H, W].
  PoolShape(Sizes sizes, const Pool& pool)
      : images(checked(sizes, pool)[0]), channels(sizes[1]), rows(sizes[2], pool), columns(sizes[3], pool) {}

  std::array<int64_t, 4> output_sizes() const {
    return {images, channels, rows.outputs, columns.outputs};
  }
  int64_t output_rows() const {
    return images * rows.outputs;
  }
  int64_t input_rows() const {
    return images * rows.size;
  }
  // Elements of one of them.
  int64_t input_row() const {
    return columns.size * channels;
  }
  int64_t output_row() const {
    return columns.outputs * channels;
  }

private:
  static Sizes checked(Sizes sizes, const Pool& pool) {
    FASTRES_CHECK(sizes.size() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", sizes);
    FASTRES_CHECK(
        pool.kernel >= 1 && pool.kernel <= kMostPooled, "kernel: expected 1 to ", kMostPooled, ", got ", pool.kernel);
    FASTRES_CHECK(pool.stride >= 1, "stride: expected at least 1, got ", pool.stride);
    FASTRES_CHECK(
        pool.padding >= 0 && pool.padding <= pool.kernel / 2,
        "padding: expected 0 to half the kernel, got ",
        pool.padding);
    FASTRES_CHECK(sizes.numel() > 0, "x: expected at least one element, got shape ", sizes);
    FASTRES_CHECK(
        std::min(sizes[2], sizes[3]) + 2 * pool.padding >= pool.kernel,
        "kernel: expected at most the size of x with its padding, got ",
        pool.kernel,
        " for shape ",
        sizes);
    return sizes;
  }
};

// --- forward

// The largest of the lanes seen, and its position in the window where that is asked for.
template <typename A, bool kPositions>
struct Largest {
  Vec<A> value, position;

  Largest(const Vec<A>& first, int64_t at) : value(first), position(static_cast<A>(at)) {}

  void see(const Vec<A>& other, int64_t at) {
    const Vec<A> larger = (other > value) | (other != other); // NaN is not equal to itself
    value = Vec<A>::blendv(value, other, larger);
    if constexpr (kPositions) {
      position = Vec<A>::blendv(position, Vec<A>(static_cast<A>(at)), larger);
    }
  }
};

template <typename A>
inline void store_positions(uint8_t* to, const Vec<A>& lo, const Vec<A>& hi, int64_t count) {
  alignas(64) A lanes[Pair<A>::size()];
  lo.store(lanes);
  hi.store(lanes + Vec<A>::size());
  for (int64_t k = 0; k < count; ++k) {
    to[k] = static_cast<uint8_t>(lanes[k]);
  }
}

// One row of outputs; row_of(r) is input row r of the image. Positions are stored where kPositions.
template <bool kPositions, typename T, typename RowOf>
void pool_row(const PoolShape& s, int64_t output, const RowOf& row_of, T* y, uint8_t* position) {
  using A = acc_t<T>;
  const auto [top, bottom] = s.rows.covered(output);
  const int64_t kernel = s.rows.kernel, first_row = s.rows.first(output);
  std::array<const T*, kMostPooled> inputs{};
  for (int64_t r = top; r < bottom; ++r) {
    inputs[r - top] = row_of(r);
  }
  for (int64_t j = 0; j < s.columns.outputs; ++j, y += s.channels) {
    const auto [left, right] = s.columns.covered(j);
    const int64_t first_column = s.columns.first(j);
    for_each_unit<A>(s.channels, [&](int64_t k, auto count) {
      const auto load = [&](int64_t r, int64_t c) { return load_lanes(inputs[r - top] + c * s.channels + k, count); };
      const auto at = [&](int64_t r, int64_t c) { return (r - first_row) * kernel + c - first_column; };
      const Pair<A> begin = load(top, left);
      Largest<A, kPositions> lo(begin.lo, at(top, left)), hi(begin.hi, at(top, left));
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = r == top ? left + 1 : left; c < right; ++c) {
          const Pair<A> v = load(r, c);
          lo.see(v.lo, at(r, c));
          hi.see(v.hi, at(r, c));
        }
      }
      store_lanes(y + k, Pair<A>{lo.value, hi.value}, count);
      if constexpr (kPositions) {
        store_positions(position + j * s.channels + k, lo.position, hi.position, count);
      }
    });
  }
}

// --- backward

// x where the lane's byte is `value`, 0 elsewhere.
template <typename A, typename Count>
inline Pair<A> where_equal(const Pair<A>& x, const uint8_t* p, uint8_t value, Count count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float> && !std::is_same_v<Count, int64_t>) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return select_lanes(x, _mm256_cmpeq_epi8_mask(bytes, _mm256_set1_epi8(static_cast<char>(value))));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float> && !std::is_same_v<Count, int64_t>) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i equal = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)));
    const __m256i lo = _mm256_cvtepi8_epi32(equal), hi = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(equal, equal));
    return {_mm256_and_ps(x.lo, _mm256_castsi256_ps(lo)), _mm256_and_ps(x.hi, _mm256_castsi256_ps(hi))};
  }
#endif
  uint32_t bits = 0;
  for (int64_t k = 0; k < count; ++k) {
    bits |= static_cast<uint32_t>(p[k] == value) << k;
  }
  return select_lanes(x, bits);
}

// Row `input`, of all images' rows, of the gradient of a: at each element the sum of dy over the windows that chose it.
template <typename T>
void unpool_row(const PoolShape& s, int64_t input, const T* dy, const uint8_t* position, T* to) {
  using A = acc_t<T>;
  const int64_t image = input / s.rows.size, row = input % s.rows.size;
  const auto [top, bottom] = s.rows.readers(row);
  // An output that reads the pixel, and the pixel's position in its window.
  struct Reader {
    int64_t at;
    uint8_t position;
  };
  std::array<Reader, kMostPooled * kMostPooled> readers;
  for (int64_t column = 0; column < s.columns.size; ++column, to += s.channels) {
    const auto [left, right] = s.columns.readers(column);
    int64_t count_of_readers = 0;
    for (int64_t i = top; i < bottom; ++i) {
      for (int64_t j = left; j < right; ++j) {
        const int64_t here = (row - s.rows.first(i)) * s.rows.kernel + column - s.columns.first(j);
        const int64_t output = (image * s.rows.outputs + i) * s.columns.outputs + j;
        readers[count_of_readers++] = {output * s.channels, static_cast<uint8_t>(here)};
      }
    }
    for_each_unit<A>(s.channels, [&](int64_t k, auto count) {
      Pair<A> sum = Pair<A>::fill(0);
      for (int64_t i = 0; i < count_of_readers; ++i) {
        const int64_t at = readers[i].at + k;
        sum = sum + where_equal(load_lanes(dy + at, count), position + at, readers[i].position, count);
      }
      store_lanes(to + k, sum, count);
    });
  }
}

} // namespace CPU_CAPABILITY
} // namespace fastres
