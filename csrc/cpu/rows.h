// How a dense activation lies in memory, and how its rows are shared out among threads.
#pragma once

#include "tensor.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

namespace fastres {
inline namespace CPU_CAPABILITY {

// Rows of `inner` consecutive elements: M rows of C in channels_last, N * C rows of H * W in NCHW.
struct Rows {
  bool channels_last;
  int64_t images;
  int64_t channels;
  int64_t pixels;

  int64_t count() const { // elements a channel
    return images * pixels;
  }
  int64_t rows() const {
    return channels_last ? count() : images * channels;
  }
  int64_t inner() const {
    return channels_last ? channels : pixels;
  }
  // What sums over the batch are shared out by: rows of channels, or images. None where there are no elements.
  int64_t summands() const {
    return channels_last ? rows() : pixels > 0 ? images : 0;
  }
  int64_t bytes(int64_t item_bytes) const {
    return count() * channels * item_bytes;
  }
  MemoryFormat memory_format() const {
    return channels_last ? MemoryFormat::channels_last : MemoryFormat::contiguous;
  }
};

// Where a tensor is contiguous both ways (C == 1 or H == W == 1) the longer rows win, as contract.rows_are_channels has
// it.
inline Rows rows_of(const Tensor& x) {
  const Sizes sizes = x.sizes();
  FASTRES_CHECK(sizes.size() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", sizes);
  const int64_t pixels = sizes[2] * sizes[3];
  const bool contiguous = x.is_contiguous();
  const bool channels_last = (!contiguous || pixels == 1) && x.is_channels_last();
  FASTRES_CHECK(
      channels_last || contiguous, "x: expected contiguous NCHW or channels_last memory, got strides ", x.strides());
  return {channels_last, sizes[0], sizes[1], pixels};
}

// The same memory in rows that fill a loop's units, of `unit` elements, where channels do not: several pixels each, and
// as many sets of channels. Masks beside it stay what they are, where a pixel's bits are whole bytes.
inline Rows filled(const Rows& rows, int64_t unit) {
  // Copies of the channels' vectors that a call is worth.
  constexpr int64_t kMostChannels = 4096, kLeastRows = 8;
  const int64_t sets = unit / std::gcd(unit, rows.channels), channels = sets * rows.channels;
  const int64_t count = rows.count() / sets;
  const bool fits = rows.channels_last && rows.channels % 8 == 0 && rows.count() % sets == 0;
  return fits && channels <= kMostChannels && count >= kLeastRows ? Rows{true, 1, channels, count} : rows;
}

// Bytes of one activation that pay for a thread's start. Where a segment also brings a set of sums, and merging it
// costs, there are fewer.
constexpr int64_t kElementwiseBytes = 64 * 1024;
constexpr int64_t kReductionBytes = 256 * 1024;

// A fixed cut into segments, whatever the number of threads, so that sums do not depend on it. There are enough of them
// for any machine's cores.
struct Segments {
  int64_t total;
  int64_t size;

  Segments(int64_t items, int64_t bytes, int64_t segment_bytes) : total(items) {
    constexpr int64_t kMost = 64;
    const int64_t wanted = std::clamp<int64_t>(bytes / segment_bytes, 1, std::min(kMost, std::max<int64_t>(items, 1)));
    size = (items + wanted - 1) / wanted;
  }
  int64_t count() const {
    return size == 0 ? 0 : (total + size - 1) / size;
  }
  std::pair<int64_t, int64_t> range(int64_t segment) const {
    return {segment * size, std::min(total, (segment + 1) * size)};
  }
};

template <typename F>
inline void for_each_segment(const Segments& segments, const F& f) {
  parallel_for(0, segments.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      f(s);
    }
  });
}

// As for_each_segment, each thread from its last segment to its first: what the pass before read last is still in
// cache.
template <typename F>
inline void for_each_segment_backwards(const Segments& segments, const F& f) {
  parallel_for(0, segments.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = end; s-- > begin;) {
      f(s);
    }
  });
}

} // namespace CPU_CAPABILITY
} // namespace fastres
