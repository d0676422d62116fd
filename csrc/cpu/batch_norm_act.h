// What the operators on the CPU share: parameters made ready, and the forward pass after the statistics.
#pragma once

#include "activations.h"
#include "norm_act.h"
#include "statistics.h"

#include <optional>
#include <string_view>

namespace fastres {
inline namespace CPU_CAPABILITY {

// Calls f<scalar_t>() for x's element type.
template <typename F>
void with_floating_type(const Tensor& x, const F& f) {
  const ScalarType type = x.scalar_type();
  switch (type) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    default:
      FASTRES_CHECK(false, "x: expected dtype float32, float64, bfloat16 or float16, got ", type);
  }
}

inline ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// In x's strides: activations have no gaps.
inline Tensor empty_rows(const Tensor& x) {
  return empty_strided(x.sizes(), x.strides(), x.scalar_type());
}

inline Tensor channel_vector(const Tensor& x, int64_t size) {
  return empty_vector(size, statistics_type(x));
}

// What stands for a result that is not needed.
inline Tensor nothing_like(const Tensor& x) {
  return empty_vector(0, x.scalar_type());
}

inline Dropout dropout_of(const OptionalTensor& seed, double dropout_p) {
  FASTRES_CHECK(seed.has_value() && seed->numel() == 1, "seed: expected one element where dropout_p > 0");
  FASTRES_CHECK(seed->scalar_type() == ScalarType::Long, "seed: expected dtype int64, got ", seed->scalar_type());
  return {philox_key(*seed->const_data_ptr<int64_t>()), dropout_threshold(dropout_p)};
}

// Elements a channel, as an operator's argument.
inline double count_of(const char* name, const Tensor& count) {
  FASTRES_CHECK(count.numel() == 1, name, ": expected one element, got shape ", count.sizes());
  FASTRES_CHECK(count.scalar_type() == ScalarType::Long, name, ": expected dtype int64, got ", count.scalar_type());
  return static_cast<double>(*count.const_data_ptr<int64_t>());
}

// A [C] argument as the loops read it: contiguous, in the statistics' dtype.
template <typename A>
inline const A* channel_data(const char* name, const Tensor& v, int64_t channels) {
  FASTRES_CHECK(
      v.dim() == 1 && v.size(0) == channels && v.is_contiguous(),
      name,
      ": expected a contiguous tensor of shape (",
      channels,
      ",), got shape ",
      v.sizes());
  FASTRES_CHECK(v.scalar_type() == kDtype<A>, name, ": expected dtype ", kDtype<A>, ", got ", v.scalar_type());
  return v.const_data_ptr<A>();
}

template <typename A>
inline const A* channel_data(const char* name, const OptionalTensor& v, int64_t channels) {
  return v.has_value() ? channel_data<A>(name, *v, channels) : nullptr;
}

// The same activation in x's memory format: itself wherever the caller kept to one format, and else `copy`.
inline const Tensor& like_rows(const char* name, const Tensor& t, const Tensor& x, const Rows& rows, Tensor& copy) {
  FASTRES_CHECK(t.sizes() == x.sizes(), name, ": expected shape ", x.sizes(), ", got ", t.sizes());
  FASTRES_CHECK(
      t.scalar_type() == x.scalar_type(), name, ": expected dtype ", x.scalar_type(), ", got ", t.scalar_type());
  if (t.is_contiguous(rows.memory_format())) {
    return t;
  }
  copy = t.contiguous(rows.memory_format());
  return copy;
}

// The [C] tensors of one normalisation, checked; all null where there is none.
template <typename A>
struct Saved {
  int64_t channels = 0;
  const A *mean = nullptr, *rstd = nullptr, *weight = nullptr, *bias = nullptr;

  Saved() = default;
  Saved(
      int64_t c,
      const OptionalTensor& mean_in,
      const OptionalTensor& rstd_in,
      const OptionalTensor& weight_in,
      const OptionalTensor& bias_in)
      : channels(mean_in.has_value() ? c : 0),
        mean(channel_data<A>("mean", mean_in, c)),
        rstd(channel_data<A>("rstd", rstd_in, c)),
        weight(channel_data<A>("weight", weight_in, c)),
        bias(channel_data<A>("bias", bias_in, c)) {
    FASTRES_CHECK((mean == nullptr) == (rstd == nullptr), "mean and rstd: expected both or neither, got one of them");
  }
  Saved(int64_t c, const Norm& norm) : Saved(c, norm.mean, norm.rstd, norm.weight, norm.bias) {}
  static Saved of(int64_t c, const std::optional<Residual>& r) {
    return r.has_value() ? Saved(c, r->mean, r->rstd, r->weight, r->bias) : Saved();
  }

  bool exists() const {
    return mean != nullptr;
  }

  ChannelNorm<A> norm() const {
    ChannelNorm<A> out;
    out.mean.assign(mean, mean + channels);
    out.scale.assign(rstd, rstd + channels);
    out.bias.assign(channels, A(0));
    for (int64_t k = 0; k < channels; ++k) {
      out.scale[k] *= weight ? weight[k] : A(1);
      out.bias[k] = bias ? bias[k] : A(0);
    }
    return out;
  }
};

// The normalisation by running statistics.
template <typename A>
inline ChannelNorm<A> running_norm(int64_t channels, const NormParams& norm) {
  FASTRES_CHECK(
      norm.running_mean.has_value() && norm.running_var.has_value(),
      "running_mean and running_var: expected tensors, got None");
  Saved<A> saved(channels, norm.running_mean, norm.running_var, norm.weight, norm.bias);
  std::vector<A> rstd(channels);
  for (int64_t c = 0; c < channels; ++c) {
    rstd[c] = static_cast<A>(1.0 / std::sqrt(static_cast<double>(saved.rstd[c]) + norm.eps));
  }
  saved.rstd = rstd.data();
  return saved.norm();
}

// The batch statistics of x, given or measured here, and the number of elements a channel behind them.
template <typename T>
inline std::pair<Moments, double> batch_moments(
    const Tensor& x,
    const Rows& rows,
    const std::optional<Statistics>& statistics) {
  using A = acc_t<T>;
  const int64_t channels = rows.channels;
  const double count = static_cast<double>(rows.count());
  if (!statistics.has_value()) {
    return {moments_of(x.const_data_ptr<T>(), rows), count};
  }
  const A* mean = channel_data<A>("statistics_mean", statistics->mean, channels);
  const A* m2 = channel_data<A>("statistics_m2", statistics->m2, channels);
  const bool shared = statistics->count.has_value();
  // Squares that are too large for the accumulator's type still fit into moments that are taken here.
  if (!shared && !std::all_of(m2, m2 + channels, [](A value) { return std::isfinite(value); })) {
    return {moments_of(x.const_data_ptr<T>(), rows), count};
  }
  Moments moments(channels);
  moments.mean.assign(mean, mean + channels);
  moments.m2.assign(m2, m2 + channels);
  return {moments, shared ? count_of("statistics_count", *statistics->count) : count};
}

// The batch statistics become mean and rstd, the running statistics and the vectors of the apply pass.
template <typename T>
inline ChannelNorm<acc_t<T>> finalise(
    const Tensor& x,
    const Rows& rows,
    const NormParams& norm,
    const std::optional<Statistics>& statistics,
    Tensor& mean,
    Tensor& rstd) {
  using A = acc_t<T>;
  const int64_t channels = rows.channels;
  const auto [moments, count] = batch_moments<T>(x, rows, statistics);
  mean = channel_vector(x, channels);
  rstd = channel_vector(x, channels);
  A* mean_data = mean.mutable_data_ptr<A>();
  A* rstd_data = rstd.mutable_data_ptr<A>();
  for (int64_t c = 0; c < channels; ++c) {
    mean_data[c] = static_cast<A>(moments.mean[c]);
    rstd_data[c] = static_cast<A>(1.0 / std::sqrt(moments.m2[c] / count + norm.eps));
  }
  const double share = norm.momentum;
  const auto update =
      [&](const char* name, const OptionalTensor& running, const std::vector<double>& batch, double by) {
        if (!running.has_value()) {
          return;
        }
        channel_data<A>(name, running, channels);
        A* data = running->mutable_data_ptr<A>();
        for (int64_t c = 0; c < channels; ++c) {
          data[c] = static_cast<A>((1.0 - share) * static_cast<double>(data[c]) + share * batch[c] / by);
        }
        running->bump_version();
      };
  update("running_mean", norm.running_mean, moments.mean, 1.0);
  update("running_var", norm.running_var, moments.m2, count - 1.0);
  return Saved<A>(channels, mean, rstd, norm.weight, norm.bias).norm();
}

// Streaming stores pay where the output is larger than what the caches can keep for its reader.
template <typename T>
inline bool should_stream(const T* p, const Rows& rows) {
  constexpr int64_t kCacheBytes = 6 * 1024 * 1024;
  return rows.bytes(sizeof(T)) >= kCacheBytes && can_stream(p, rows.inner());
}

// Segments of a pass that treats every row alike: in NCHW never through four channels that share their dropout
// counters.
inline int64_t rows_together(const Rows& rows) {
  return !rows.channels_last && rows.channels % 4 == 0 ? 4 : 1;
}

template <typename T>
inline void apply_all(const ApplyParams<T>& given) {
  Filled all(given);
  ApplyParams<T>& p = all.params;
  p.stream = should_stream(p.y, p.rows);
  const int64_t together = rows_together(p.rows);
  const Segments segments(p.rows.rows() / together, p.rows.bytes(sizeof(T)), kElementwiseBytes);
  for_each_segment_backwards(segments, [&](int64_t s) {
    const auto [begin, end] = segments.range(s);
    apply_range(p, begin * together, end * together);
  });
}

} // namespace CPU_CAPABILITY
} // namespace fastres
