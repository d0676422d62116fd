// Mean and M2 (the sum of squared deviations) a channel, stable whatever the mean.
//
// A block of values small enough for the caches is read twice: once for a rough mean m, once for S1 = sum(x - m) and
// S2 = sum((x - m)^2). The block's mean is m + S1 / n and its M2 is S2 - S1^2 / n, where S1 is only the rounding error
// of m; so the subtraction cancels nothing. Blocks, and then segments, are combined in double in a fixed order:
//
//   delta = mean_b - mean_a      mean = mean_a + delta * n_b / n      M2 = M2_a + M2_b + delta^2 * n_a * n_b / n
//
// Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", equations 2.1.
#pragma once

#include "lanes.h"
#include "rows.h"

#include <vector>

namespace fastres {
inline namespace CPU_CAPABILITY {

// A block's second reading comes out of the caches, and few enough values go into one float to keep its rounding small.
constexpr int64_t kBlockBytes = 128 * 1024;
constexpr int64_t kBlockValues = 256; // a lane

inline int64_t block_rows_of(int64_t channels, int64_t item_bytes) {
  return std::clamp<int64_t>(kBlockBytes / (channels * item_bytes), 8, kBlockValues);
}

// Running moments of `channels` channels, all over `count` values.
struct Moments {
  std::vector<double> mean, m2;
  int64_t count = 0;

  explicit Moments(int64_t channels) : mean(channels, 0.0), m2(channels, 0.0) {}
};

// One combination of n_a and n_b values, for all channels: the divisions are made once.
struct Chan {
  double share, cross; // n_b / n and n_a * n_b / n

  Chan(int64_t n_a, int64_t n_b)
      : share(static_cast<double>(n_b) / static_cast<double>(n_a + n_b)), cross(static_cast<double>(n_a) * share) {}

  void operator()(double& mean, double& m2, double block_mean, double block_m2) const {
    const double delta = block_mean - mean;
    mean += delta * share;
    m2 += block_m2 + delta * delta * cross;
  }
};

// Rows of memory are summed in their order, so that the prefetchers see streams: the sums of so many channels lie in
// the L1 cache meanwhile, and several rows are read side by side so that these are loaded and stored less often.
constexpr int64_t kPanelChannels = 512;
constexpr int64_t kRowsTogether = 4;

// Calls f(row, rows) for rows begin ... end - 1, `rows` at a time; `rows` is a compile-time constant.
template <typename F>
inline void for_each_rows(int64_t begin, int64_t end, const F& f) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) {
    f(row, std::integral_constant<int64_t, kRowsTogether>());
  }
  for (; row < end; ++row) {
    f(row, std::integral_constant<int64_t, 1>());
  }
}

// One block of at most kPanelChannels channels, its rows `stride` apart.
template <typename T>
inline void add_panel(
    const Chan& chan,
    double* __restrict mean,
    double* __restrict m2,
    const T* x,
    int64_t rows,
    int64_t channels,
    int64_t stride) {
  using A = acc_t<T>;
  alignas(64) A rough[kPanelChannels], s1[kPanelChannels], s2[kPanelChannels];
  std::fill_n(rough, channels, A(0));
  for_each_rows(0, rows, [&](int64_t row, auto together) {
    for_each_unit<A>(channels, [&](int64_t k, auto count) {
      Pair<A> sum = load_lanes(rough + k, count);
      for (int64_t i = 0; i < together; ++i) {
        const T* p = x + (row + i) * stride + k;
        fetch_ahead(p);
        sum = sum + load_lanes(p, count);
      }
      store_lanes(rough + k, sum, count);
    });
  });
  const A share = A(1) / static_cast<A>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    rough[c] *= share;
    s1[c] = s2[c] = 0;
  }
  for_each_rows(0, rows, [&](int64_t row, auto together) {
    for_each_unit<A>(channels, [&](int64_t k, auto count) {
      const Pair<A> shift = load_lanes(rough + k, count);
      Pair<A> first = load_lanes(s1 + k, count), second = load_lanes(s2 + k, count);
      for (int64_t i = 0; i < together; ++i) {
        const Pair<A> d = load_lanes(x + (row + i) * stride + k, count) - shift;
        first = first + d;
        second = fmadd(d, d, second);
      }
      store_lanes(s1 + k, first, count);
      store_lanes(s2 + k, second, count);
    });
  });
  const double inverse = 1.0 / static_cast<double>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double e = s1[c];
    chan(mean[c], m2[c], rough[c] + e * inverse, s2[c] - e * e * inverse);
  }
}

// Rows of `channels` values with stride `channels`: adds `rows` values to every channel.
template <typename T>
inline void add_columns(Moments& moments, const T* x, int64_t rows, int64_t channels) {
  const int64_t block_rows = block_rows_of(std::min(channels, kPanelChannels), sizeof(T));
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t n = std::min(block_rows, rows - first);
    const Chan chan(moments.count, n);
    for (int64_t c = 0; c < channels; c += kPanelChannels) {
      const int64_t panel = std::min(kPanelChannels, channels - c);
      add_panel(chan, moments.mean.data() + c, moments.m2.data() + c, x + first * channels + c, n, panel, channels);
    }
    moments.count += n;
  }
}

template <typename A>
inline double sum_lanes(const Pair<A>& x) {
  alignas(64) A lanes[Pair<A>::size()];
  store_lanes(lanes, x);
  double sum = 0;
  for (const A lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <typename A>
inline Pair<A> zero_beyond(const Pair<A>& x, int64_t count) {
  return select_lanes(x, count >= 32 ? ~0u : (1u << count) - 1);
}

// `planes` runs of `pixels` consecutive values, `stride` apart: one channel of several images.
template <typename T>
inline void add_planes(
    double& mean,
    double& m2,
    int64_t& count,
    const T* x,
    int64_t planes,
    int64_t pixels,
    int64_t stride) {
  using A = acc_t<T>;
  constexpr int64_t width = Pair<A>::size();
  const int64_t block = kBlockValues * width;
  const auto sweep = [&](const T* first, int64_t block_planes, int64_t run) {
    Pair<A> sum = Pair<A>::fill(0);
    for (int64_t i = 0; i < block_planes; ++i) {
      const T* row = first + i * stride;
      int64_t k = 0;
      for (; k + width <= run; k += width) {
        sum = sum + load_lanes(row + k);
      }
      if (k < run) {
        sum = sum + load_lanes(row + k, run - k);
      }
    }
    const int64_t n = block_planes * run;
    const A rough = static_cast<A>(sum_lanes(sum) / static_cast<double>(n));
    const Pair<A> shift = Pair<A>::fill(rough);
    Pair<A> s1 = Pair<A>::fill(0), s2 = s1;
    for (int64_t i = 0; i < block_planes; ++i) {
      const T* row = first + i * stride;
      int64_t k = 0;
      for (; k + width <= run; k += width) {
        const Pair<A> d = load_lanes(row + k) - shift;
        s1 = s1 + d;
        s2 = fmadd(d, d, s2);
      }
      if (k < run) {
        const Pair<A> d = zero_beyond(load_lanes(row + k, run - k) - shift, run - k);
        s1 = s1 + d;
        s2 = fmadd(d, d, s2);
      }
    }
    const double e = sum_lanes(s1), d2 = sum_lanes(s2), inverse = 1.0 / static_cast<double>(n);
    Chan(count, n)(mean, m2, rough + e * inverse, d2 - e * e * inverse);
    count += n;
  };
  if (pixels >= block) {
    for (int64_t i = 0; i < planes; ++i) {
      for (int64_t k = 0; k < pixels; k += block) {
        sweep(x + i * stride + k, 1, std::min(block, pixels - k));
      }
    }
  } else {
    const int64_t together = block / pixels;
    for (int64_t i = 0; i < planes; i += together) {
      sweep(x + i * stride, std::min(together, planes - i), pixels);
    }
  }
}

// The moments of all segments as one, in the segments' order. A segment may have several sets of the channels.
inline Moments combine(const std::vector<Moments>& parts, int64_t channels) {
  if (parts.size() == 1 && static_cast<int64_t>(parts[0].mean.size()) == channels) {
    return parts[0];
  }
  Moments all(channels);
  double* __restrict mean = all.mean.data();
  double* __restrict m2 = all.m2.data();
  for (const Moments& part : parts) {
    for (size_t set = 0; part.count != 0 && set < part.mean.size(); set += channels) {
      const Chan chan(all.count, part.count);
      for (int64_t c = 0; c < channels; ++c) {
        chan(mean[c], m2[c], part.mean[set + c], part.m2[set + c]);
      }
      all.count += part.count;
    }
  }
  return all;
}

// Reads x once.
template <typename T>
inline Moments moments_of(const T* x, const Rows& given) {
  const Rows rows = filled(given, Pair<acc_t<T>>::size());
  const Segments segments(rows.summands(), rows.bytes(sizeof(T)), kReductionBytes);
  std::vector<Moments> parts(segments.count(), Moments(rows.channels));
  for_each_segment(segments, [&](int64_t s) {
    const auto [begin, end] = segments.range(s);
    if (rows.channels_last) {
      add_columns(parts[s], x + begin * rows.channels, end - begin, rows.channels);
      return;
    }
    const int64_t image = rows.channels * rows.pixels;
    for (int64_t c = 0; c < rows.channels; ++c) {
      int64_t count = 0;
      const T* first = x + begin * image + c * rows.pixels;
      add_planes(parts[s].mean[c], parts[s].m2[c], count, first, end - begin, rows.pixels, image);
      parts[s].count = count;
    }
  });
  return combine(parts, given.channels);
}

} // namespace CPU_CAPABILITY
} // namespace fastres
