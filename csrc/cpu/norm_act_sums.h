// The backward pass's sums over the batch, the first reading of its inputs.
//
//   dbias = sum g      dweight = rstd * sum g * (x - mean)
//
// and the same two of what reaches a residual that has its own normalisation. Where the gradient of y arrives in two
// parts, this pass adds them while it reads and writes what the second pass reads in their place: g where the residual
// was added before f, their sum where it was added after.
#pragma once

#include "norm_act_backward.h"
#include "statistics.h"

#include <array>

namespace fastres {
inline namespace CPU_CAPABILITY {

// Four sums a channel: g, g * (x - mean), and the same two of what reaches the residual's normalisation.
constexpr int kSums = 4;
using ChannelSums = std::array<std::vector<double>, kSums>;

template <typename A>
using PairSums = std::array<Pair<A>, kSums>;

template <typename T, typename Variant, typename Lanes, typename Count>
inline void accumulate(
    const BackwardParams<T>& p,
    const Variant& variant,
    const Lanes& lanes,
    int64_t row,
    int64_t k,
    Count count,
    PairSums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  const int64_t at = row * p.rows.inner() + k;
  fetch_ahead(p.dy + at);
  fetch_ahead(p.x + at);
  Pair<A> dy = load_lanes(p.dy + at, count);
  if (Variant::general && p.dy2 != nullptr) {
    dy = dy + load_lanes(p.dy2 + at, count);
  }
  const Pair<A> centred = load_lanes(p.x + at, count) - lanes(p.norm->mean, k, count);
  const Pair<A> g = masked_gradient(p, variant, lanes, row, k, count, dy, centred);
  sums[0] = sums[0] + g;
  sums[1] = fmadd(g, centred, sums[1]);
  const Pair<A> dr = p.act_add ? dy : g;
  if (Variant::general && p.dz != nullptr) {
    put(p.dz + at, dr, count, p.stream);
  }
  if (variant.dual) {
    sums[2] = sums[2] + dr;
    sums[3] = fmadd(dr, load_lanes(p.residual + at, count) - lanes(p.residual_norm->mean, k, count), sums[3]);
  }
}

template <typename A>
inline PairSums<A> zero_sums() {
  PairSums<A> sums;
  sums.fill(Pair<A>::fill(0));
  return sums;
}

// Channels first ... first + channels - 1, at most kPanelChannels, of rows begin ... end - 1 in channels_last.
template <typename T, typename Variant>
void sum_panel(
    const BackwardParams<T>& p,
    const Variant& variant,
    int64_t begin,
    int64_t end,
    int64_t first,
    int64_t channels,
    ChannelSums& total) {
  using A = acc_t<T>;
  // A loop over sums of a number that is not known would keep them out of the registers.
  constexpr int kKept = [] {
    if constexpr (Variant::general) {
      return kSums;
    } else {
      return Variant::dual ? kSums : 2;
    }
  }();
  alignas(64) A block[kKept][kPanelChannels];
  for (int i = 0; i < kKept; ++i) {
    std::fill_n(block[i], channels, A(0));
  }
  const ChannelLanes<A, true> lanes{0};
  for_each_rows(begin, end, [&](int64_t row, auto together) {
    for_each_unit<A>(channels, [&](int64_t k, auto count) {
      PairSums<A> sums;
      for (int i = 0; i < kKept; ++i) {
        sums[i] = load_lanes(block[i] + k, count);
      }
      for (int64_t i = 0; i < together; ++i) {
        accumulate(p, variant, lanes, row + i, first + k, count, sums);
      }
      for (int i = 0; i < kKept; ++i) {
        store_lanes(block[i] + k, sums[i], count);
      }
    });
  });
  for (int i = 0; i < (variant.dual ? kSums : 2); ++i) {
    double* to = total[i].data() + first;
    for (int64_t c = 0; c < channels; ++c) {
      to[c] += block[i][c];
    }
  }
}

template <typename T, typename Variant>
void sum_columns(const BackwardParams<T>& p, const Variant& variant, int64_t begin, int64_t end, ChannelSums& total) {
  for (int64_t first = begin; first < end; first += kBlockValues) {
    const int64_t last = std::min(end, first + kBlockValues);
    for (int64_t c = 0; c < p.rows.channels; c += kPanelChannels) {
      sum_panel(p, variant, first, last, c, std::min(kPanelChannels, p.rows.channels - c), total);
    }
  }
}

// Images begin ... end - 1 of one channel in NCHW.
template <typename T, typename Variant>
void sum_planes(
    const BackwardParams<T>& p,
    const Variant& variant,
    int64_t begin,
    int64_t end,
    int64_t channel,
    ChannelSums& total) {
  using A = acc_t<T>;
  const ChannelLanes<A, false> lanes{channel};
  const int64_t block_images = std::max<int64_t>(1, kBlockValues * Pair<A>::size() / p.rows.pixels);
  for (int64_t first = begin; first < end; first += block_images) {
    PairSums<A> sums = zero_sums<A>();
    for (int64_t image = first; image < std::min(end, first + block_images); ++image) {
      const int64_t row = image * p.rows.channels + channel;
      for_each_unit<A>(p.rows.pixels, [&](int64_t k, auto count) {
        if constexpr (std::is_same_v<decltype(count), int64_t>) {
          // Lanes past the row would count as dy = 0 and x = 0, and 0 * inf is not 0 where mean is infinite.
          PairSums<A> tail = zero_sums<A>();
          accumulate(p, variant, lanes, row, k, count, tail);
          for (int i = 0; i < kSums; ++i) {
            sums[i] = sums[i] + zero_beyond(tail[i], count);
          }
        } else {
          accumulate(p, variant, lanes, row, k, count, sums);
        }
      });
    }
    for (int i = 0; i < (variant.dual ? kSums : 2); ++i) {
      total[i][channel] += sum_lanes(sums[i]);
    }
  }
}

// The sums of all segments as one, in the segments' order.
inline ChannelSums total_of(std::vector<ChannelSums>&& parts) {
  ChannelSums total = std::move(parts[0]);
  for (size_t part = 1; part < parts.size(); ++part) {
    for (int i = 0; i < kSums; ++i) {
      double* __restrict to = total[i].data();
      const double* __restrict from = parts[part][i].data();
      for (size_t c = 0; c < total[i].size(); ++c) {
        to[c] += from[c];
      }
    }
  }
  return total;
}

// The sums of all sets of channels as one.
inline ChannelSums of_one_set(ChannelSums&& sums, int64_t channels) {
  for (std::vector<double>& sum : sums) {
    for (size_t k = channels; k < sum.size(); ++k) {
      sum[k % channels] += sum[k];
    }
    sum.resize(std::min<size_t>(sum.size(), channels));
  }
  return std::move(sums);
}

// Of `channels`, of which the rows have one set or several.
template <typename T>
ChannelSums sum_all(const BackwardParams<T>& given, int64_t channels) {
  BackwardParams<T> p = given;
  p.stream = p.dz != nullptr && should_stream(p.dz, p.rows);
  const Rows& rows = p.rows;
  const Segments segments(rows.summands(), rows.bytes(sizeof(T)), kReductionBytes);
  const int sums = p.residual_norm != nullptr ? kSums : 2;
  ChannelSums zero;
  std::fill_n(zero.begin(), sums, std::vector<double>(rows.channels, 0.0));
  std::vector<ChannelSums> parts(std::max<int64_t>(1, segments.count()), zero);
  with_variant(p, [&](auto columns, const auto& variant) {
    for_each_segment(segments, [&](int64_t s) {
      const auto [begin, end] = segments.range(s);
      if constexpr (decltype(columns)::value) {
        sum_columns(p, variant, begin, end, parts[s]);
      } else {
        for (int64_t c = 0; c < rows.channels; ++c) {
          sum_planes(p, variant, begin, end, c, parts[s]);
        }
      }
      if (p.stream) {
        stream_fence();
      }
    });
  });
  return of_one_set(total_of(std::move(parts)), channels);
}

} // namespace CPU_CAPABILITY
} // namespace fastres
