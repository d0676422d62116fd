// batch_norm_act on the CPU. The forward formulas are in norm_act.h and statistics.h; backward:
//
//   g = dy * bit / (1 - p)      bit = kept and (ReLU input > 0)
//   dbias = sum g               dweight = sum g * (x - mean) * rstd
//   dx = scale * (g - dbias / M - xhat * dweight / M)      in training;  scale * g  in evaluation
//   dr = g ("add_act")  or  dy ("act_add"); through the residual's own normalisation where it has one
//
// Passes over memory: statistics read x; apply reads x and r and writes y; the backward sums read dy and x (and r where
// it has its own normalisation); the backward apply reads them again and writes dx and dr. Each reads or writes the
// bits once.
#include "batch_norm_act.h"
#include "norm_act_backward.h"

#include <ATen/ops/full.h>
#include <torch/library.h>

#include <array>
#include <tuple>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace {

struct OwnAct {
  bool relu;
  double dropout_p;
  bool act_add;

  bool needs_bits(bool has_residual) const {
    return dropout_p > 0 || (relu && has_residual && !act_add);
  }
};

// --- forward

template <typename T>
std::tuple<Tensor, Tensor> apply_forward(
    const Tensor& x,
    const OptionalTensor& residual,
    const OptionalTensor& seed,
    const OwnAct& act,
    bool save_bits,
    const ChannelNorm<acc_t<T>>& norm,
    const ChannelNorm<acc_t<T>>* residual_norm) {
  const Rows rows = rows_of(x);
  const bool has_residual = residual.has_value();
  const Tensor r = has_residual ? like_rows("residual", *residual, x, rows) : Tensor();
  Tensor y = at::empty_like(x);
  const bool saves = save_bits && act.needs_bits(has_residual);
  Tensor bits = at::empty({saves ? rows.rows() * bitmask_row_bytes(rows.inner()) : 0}, byte_options(x));
  Dropout dropout{};
  if (act.dropout_p > 0) {
    dropout = dropout_of(seed, act.dropout_p);
  }
  apply_all(
      ApplyParams<T>{
          x.const_data_ptr<T>(),
          has_residual ? r.const_data_ptr<T>() : nullptr,
          y.mutable_data_ptr<T>(),
          saves ? bits.mutable_data_ptr<uint8_t>() : nullptr,
          &norm,
          residual_norm,
          act.dropout_p > 0 ? &dropout : nullptr,
          static_cast<acc_t<T>>(1.0 / (1.0 - act.dropout_p)),
          act.relu,
          act.act_add,
          should_stream(y.const_data_ptr<T>(), rows),
          rows});
  return {y, bits};
}

std::tuple<Tensor, Tensor, Tensor> stats(const Tensor& x) {
  const Rows rows = rows_of(x);
  Tensor mean = channel_vector(x, rows.channels), m2 = channel_vector(x, rows.channels);
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_stats", [&] {
    using A = acc_t<scalar_t>;
    const Moments moments = moments_of(x.const_data_ptr<scalar_t>(), rows);
    std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<A>());
    std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<A>());
  });
  return {at::full({1}, rows.count(), x.options().dtype(at::kLong).memory_format(std::nullopt)), mean, m2};
}

std::tuple<Tensor, Tensor> apply(
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const OptionalTensor& residual_mean,
    const OptionalTensor& residual_rstd,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    const OptionalTensor& seed,
    bool relu,
    double dropout_p,
    std::string_view order) {
  const int64_t channels = x.size(1);
  const OwnAct act{relu, dropout_p, parse_order(order)};
  std::tuple<Tensor, Tensor> result;
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_apply", [&] {
    using A = acc_t<scalar_t>;
    const Saved<A> own(channels, mean, rstd, weight, bias);
    const Saved<A> other(channels, residual_mean, residual_rstd, residual_weight, residual_bias);
    const ChannelNorm<A> norm = own.norm(), residual_norm = other.norm();
    result = apply_forward<scalar_t>(
        x, residual, seed, act, true, norm, residual_mean.has_value() ? &residual_norm : nullptr);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training(
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& residual,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    const OptionalTensor& residual_running_mean,
    const OptionalTensor& residual_running_var,
    const OptionalTensor& x_mean,
    const OptionalTensor& x_m2,
    const OptionalTensor& residual_mean,
    const OptionalTensor& residual_m2,
    const OptionalTensor& seed,
    bool residual_norm,
    double momentum,
    double eps,
    double residual_momentum,
    double residual_eps,
    bool relu,
    double dropout_p,
    std::string_view order) {
  const Rows rows = rows_of(x);
  const OwnAct act{relu, dropout_p, parse_order(order)};
  const bool dual = residual_norm && residual.has_value();
  const Tensor r = residual.has_value() ? like_rows("residual", *residual, x, rows) : Tensor();
  Tensor y, bits, mean, rstd, r_mean = channel_vector(x, 0), r_rstd = channel_vector(x, 0);
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_training", [&] {
    using A = acc_t<scalar_t>;
    // The residual first: x, measured last, is what the caches still hold when the apply pass starts.
    ChannelNorm<A> other;
    if (dual) {
      other = finalise<scalar_t>(
          r,
          rows,
          residual_mean,
          residual_m2,
          residual_weight,
          residual_bias,
          residual_running_mean,
          residual_running_var,
          residual_momentum,
          residual_eps,
          r_mean,
          r_rstd);
    }
    const ChannelNorm<A> own =
        finalise<scalar_t>(x, rows, x_mean, x_m2, weight, bias, running_mean, running_var, momentum, eps, mean, rstd);
    const OptionalTensor added = r.defined() ? OptionalTensor(r) : std::nullopt;
    std::tie(y, bits) = apply_forward<scalar_t>(x, added, seed, act, true, own, dual ? &other : nullptr);
  });
  return {y, mean, rstd, r_mean, r_rstd, bits};
}

std::tuple<Tensor, Tensor> inference(
    const Tensor& x,
    const Tensor& running_mean,
    const Tensor& running_var,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const OptionalTensor& residual_running_mean,
    const OptionalTensor& residual_running_var,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    double eps,
    double residual_eps,
    bool relu,
    std::string_view order,
    bool save_bits) {
  const int64_t channels = x.size(1);
  const OwnAct act{relu, 0.0, parse_order(order)};
  std::tuple<Tensor, Tensor> result;
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_inference", [&] {
    using A = acc_t<scalar_t>;
    const ChannelNorm<A> own = running_norm<A>(channels, running_mean, running_var, weight, bias, eps);
    const bool dual = residual_running_mean.has_value();
    const ChannelNorm<A> other = running_norm<A>(
        channels, residual_running_mean, residual_running_var, residual_weight, residual_bias, residual_eps);
    result = apply_forward<scalar_t>(x, residual, std::nullopt, act, save_bits, own, dual ? &other : nullptr);
  });
  return result;
}

// --- backward

// Four sums a channel: g, g * (x - mean), and the same two of what reaches the residual's normalisation.
constexpr int kSums = 4;
using ChannelSums = std::array<std::vector<double>, kSums>;

template <typename A>
using PairSums = std::array<Pair<A>, kSums>;

template <typename T, bool kColumns, bool kDual, Gate kGate, typename Count>
inline void accumulate(
    const BackwardParams<T>& p,
    const ChannelLanes<acc_t<T>, kColumns>& lanes,
    int64_t row,
    int64_t k,
    Count count,
    PairSums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  const int64_t at = row * p.rows.inner() + k;
  const Pair<A> dy = load_lanes(p.dy + at, count);
  const Pair<A> centred = load_lanes(p.x + at, count) - lanes(p.norm->mean, k, count);
  const Pair<A> g = masked_gradient<T, kColumns, kGate>(p, lanes, row, k, count, dy, centred);
  sums[0] = sums[0] + g;
  sums[1] = fmadd(g, centred, sums[1]);
  if constexpr (kDual) {
    const Pair<A> dr = p.act_add ? dy : g;
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

template <typename T, bool kDual, Gate kGate>
void sum_columns(const BackwardParams<T>& p, int64_t begin, int64_t end, ChannelSums& total) {
  using A = acc_t<T>;
  constexpr int64_t width = Pair<A>::size();
  const int64_t channels = p.rows.channels;
  const int64_t block_rows = block_rows_of(channels, sizeof(T));
  const ChannelLanes<A, true> lanes{0};
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t last = std::min(end, first + block_rows);
    for_each_unit<A>(channels, [&](int64_t k, auto count) {
      PairSums<A> sums = zero_sums<A>();
      for (int64_t row = first; row < last; ++row) {
        accumulate<T, true, kDual, kGate>(p, lanes, row, k, count, sums);
      }
      for (int i = 0; i < (kDual ? kSums : 2); ++i) {
        alignas(64) A lane[width];
        store_lanes(lane, sums[i]);
        for (int64_t j = 0; j < count; ++j) {
          total[i][k + j] += lane[j];
        }
      }
    });
  }
}

// Images begin ... end - 1 of one channel in NCHW.
template <typename T, bool kDual, Gate kGate>
void sum_planes(const BackwardParams<T>& p, int64_t begin, int64_t end, int64_t channel, ChannelSums& total) {
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
          accumulate<T, false, kDual, kGate>(p, lanes, row, k, count, tail);
          for (int i = 0; i < kSums; ++i) {
            sums[i] = sums[i] + zero_beyond(tail[i], count);
          }
        } else {
          accumulate<T, false, kDual, kGate>(p, lanes, row, k, count, sums);
        }
      });
    }
    for (int i = 0; i < (kDual ? kSums : 2); ++i) {
      total[i][channel] += sum_lanes(sums[i]);
    }
  }
}

template <typename T>
ChannelSums sum_all(const BackwardParams<T>& p) {
  const Rows& rows = p.rows;
  const Segments segments(rows.channels_last ? rows.rows() : rows.images, rows.bytes(sizeof(T)), kReductionBytes);
  const int sums = p.residual != nullptr ? kSums : 2;
  ChannelSums zero;
  std::fill_n(zero.begin(), sums, std::vector<double>(rows.channels, 0.0));
  std::vector<ChannelSums> parts(segments.count(), zero);
  with_flags(p, [&](auto columns, auto dual, auto gate) {
    for_each_segment(segments, [&](int64_t s) {
      const auto [begin, end] = segments.range(s);
      if constexpr (decltype(columns)::value) {
        sum_columns<T, decltype(dual)::value, decltype(gate)::value>(p, begin, end, parts[s]);
      } else {
        for (int64_t c = 0; c < rows.channels; ++c) {
          sum_planes<T, decltype(dual)::value, decltype(gate)::value>(p, begin, end, c, parts[s]);
        }
      }
    });
  });
  ChannelSums total = zero;
  for (const ChannelSums& part : parts) {
    for (int i = 0; i < sums; ++i) {
      for (int64_t c = 0; c < rows.channels; ++c) {
        total[i][c] += part[i][c];
      }
    }
  }
  return total;
}

// The saved tensors and flags of one backward call, checked and made ready.
template <typename T>
struct Backward {
  using A = acc_t<T>;
  Rows rows;
  Tensor x, dy, residual, bits;
  Saved<A> own, other;
  ChannelNorm<A> norm, residual_norm;
  BackwardParams<T> params;

  Backward(
      const Tensor& dy_in,
      const Tensor& x_in,
      const OptionalTensor& residual_in,
      const Saved<A>& own_in,
      const Saved<A>& other_in,
      const OptionalTensor& bits_in,
      const OwnAct& act)
      : rows(rows_of(x_in)),
        x(x_in),
        dy(like_rows("dy", dy_in, x_in, rows)),
        own(own_in),
        other(other_in),
        norm(own.norm()),
        residual_norm(other.norm()),
        params{} {
    const bool has_bits = bits_in.has_value() && bits_in->numel() > 0;
    if (has_bits) {
      bits = bits_in->contiguous();
      const int64_t bytes = rows.rows() * bitmask_row_bytes(rows.inner());
      TORCH_CHECK_VALUE(
          bits.scalar_type() == at::kByte && bits.numel() == bytes,
          "bits: expected uint8 of ",
          bytes,
          " elements, got ",
          bits.scalar_type(),
          " of ",
          bits.numel());
    }
    TORCH_CHECK_VALUE(act.dropout_p == 0 || has_bits, "bits: expected the forward pass's mask where dropout_p > 0");
    if (other.mean != nullptr) {
      TORCH_CHECK_VALUE(residual_in.has_value(), "residual: expected a tensor with residual_mean, got None");
      residual = like_rows("residual", *residual_in, x, rows);
    }
    params.dy = dy.const_data_ptr<T>();
    params.x = x.const_data_ptr<T>();
    params.residual = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
    params.bits = has_bits ? bits.const_data_ptr<uint8_t>() : nullptr;
    params.norm = &norm;
    params.residual_norm = residual.defined() ? &residual_norm : nullptr;
    params.gate = has_bits ? Gate::bits : act.relu ? Gate::recompute : Gate::open;
    params.keep_scale = static_cast<A>(1.0 / (1.0 - act.dropout_p));
    params.act_add = act.act_add;
    params.rows = rows;
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  // (dweight, dbias, residual_dweight, residual_dbias)
  std::array<Tensor, kSums> reduce() const {
    const ChannelSums sums = sum_all(params);
    std::array<Tensor, kSums> out;
    const auto emit = [&](int at, const std::vector<double>& v, const A* factor) {
      out[at] = channel_vector(x, rows.channels);
      A* data = out[at].template mutable_data_ptr<A>();
      for (int64_t c = 0; c < rows.channels; ++c) {
        data[c] = static_cast<A>(factor ? v[c] * factor[c] : v[c]);
      }
    };
    emit(0, sums[1], own.rstd);
    emit(1, sums[0], nullptr);
    if (residual.defined()) {
      emit(2, sums[3], other.rstd);
      emit(3, sums[2], nullptr);
    } else {
      out[2] = channel_vector(x, 0);
      out[3] = channel_vector(x, 0);
    }
    return out;
  }

  // Null sums: statistics are constants.
  std::tuple<Tensor, Tensor> apply(const std::array<const A*, kSums>& sums, double count, bool need_dx, bool need_dr) {
    Tensor dx = need_dx ? at::empty_like(x) : channel_vector(x, 0).to(x.scalar_type());
    Tensor dr = need_dr ? at::empty_like(x) : channel_vector(x, 0).to(x.scalar_type());
    if (!need_dx && !need_dr) {
      return {dx, dr};
    }
    const GradientNorm<A> gradient = gradient_norm(norm, own.rstd, sums[0], sums[1], count);
    const GradientNorm<A> residual_gradient = gradient_norm(residual_norm, other.rstd, sums[2], sums[3], count);
    params.dx = need_dx ? dx.mutable_data_ptr<T>() : nullptr;
    params.dresidual = need_dr ? dr.mutable_data_ptr<T>() : nullptr;
    params.gradient = &gradient;
    params.residual_gradient = &residual_gradient;
    params.centred = sums[0] != nullptr;
    params.stream = should_stream<T>(need_dx ? params.dx : params.dresidual, rows) &&
        (!need_dr || can_stream<T>(params.dresidual, rows.inner()));
    gradient_all(params);
    return {dx, dr};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const OptionalTensor& residual_mean,
    const OptionalTensor& residual_rstd,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    const OptionalTensor& bits,
    bool relu,
    double dropout_p,
    std::string_view order) {
  const OwnAct act{relu, dropout_p, parse_order(order)};
  std::array<Tensor, kSums> sums;
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_backward_reduce", [&] {
    using A = acc_t<scalar_t>;
    const Saved<A> own(x.size(1), mean, rstd, weight, bias);
    const Saved<A> other(x.size(1), residual_mean, residual_rstd, residual_weight, residual_bias);
    sums = Backward<scalar_t>(dy, x, residual, own, other, bits, act).reduce();
  });
  return {sums[0], sums[1], sums[2], sums[3]};
}

std::tuple<Tensor, Tensor> backward_apply(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const OptionalTensor& residual_mean,
    const OptionalTensor& residual_rstd,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    const OptionalTensor& bits,
    const OptionalTensor& dweight,
    const OptionalTensor& dbias,
    const OptionalTensor& residual_dweight,
    const OptionalTensor& residual_dbias,
    const OptionalTensor& count,
    bool relu,
    double dropout_p,
    std::string_view order,
    std::array<bool, 2> needs) {
  const OwnAct act{relu, dropout_p, parse_order(order)};
  const int64_t channels = x.size(1);
  std::tuple<Tensor, Tensor> result;
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_backward_apply", [&] {
    using A = acc_t<scalar_t>;
    const Saved<A> own(channels, mean, rstd, weight, bias);
    const Saved<A> other(channels, residual_mean, residual_rstd, residual_weight, residual_bias);
    Backward<scalar_t> backward(dy, x, residual, own, other, bits, act);
    const bool dual = residual_mean.has_value();
    const std::array<const A*, kSums> sums = {
        channel_data<A>("dweight", dweight, channels),
        channel_data<A>("dbias", dbias, channels),
        dual ? channel_data<A>("residual_dweight", residual_dweight, channels) : nullptr,
        dual ? channel_data<A>("residual_dbias", residual_dbias, channels) : nullptr};
    TORCH_CHECK_VALUE(
        (sums[0] == nullptr) == (sums[1] == nullptr) && (!dual || (sums[2] == nullptr) == (sums[0] == nullptr)) &&
            (sums[2] == nullptr) == (sums[3] == nullptr),
        "dweight, dbias and the residual's: expected all or none");
    const double m = static_cast<double>(count.has_value() ? count->item<int64_t>() : backward.rows.count());
    result = backward.apply(sums, m, needs[0], needs[1]);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const OptionalTensor& residual_mean,
    const OptionalTensor& residual_rstd,
    const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias,
    const OptionalTensor& bits,
    bool training,
    bool relu,
    double dropout_p,
    std::string_view order,
    std::array<bool, 3> needs) {
  const OwnAct act{relu, dropout_p, parse_order(order)};
  const bool needs_sums = needs[2] || (training && (needs[0] || needs[1]));
  Tensor dx, dr;
  std::array<Tensor, kSums> sums;
  FASTRES_DISPATCH(x.scalar_type(), "batch_norm_act_backward", [&] {
    using A = acc_t<scalar_t>;
    const Saved<A> own(x.size(1), mean, rstd, weight, bias);
    const Saved<A> other(x.size(1), residual_mean, residual_rstd, residual_weight, residual_bias);
    Backward<scalar_t> backward(dy, x, residual, own, other, bits, act);
    std::array<const A*, kSums> pointers{};
    if (needs_sums) {
      sums = backward.reduce();
      for (int i = 0; training && i < kSums; ++i) {
        pointers[i] = sums[i].numel() > 0 ? sums[i].template const_data_ptr<A>() : nullptr;
      }
    }
    std::tie(dx, dr) = backward.apply(pointers, static_cast<double>(backward.rows.count()), needs[0], needs[1]);
  });
  for (Tensor& sum : sums) {
    if (!needs[2]) {
      sum = channel_vector(x, 0);
    }
  }
  return {dx, dr, sums[0], sums[1], sums[2], sums[3]};
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastres

TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("batch_norm_act_stats", fastres::stats);
  m.impl("batch_norm_act_apply", fastres::apply);
  m.impl("batch_norm_act_training", fastres::training);
  m.impl("batch_norm_act_inference", fastres::inference);
  m.impl("batch_norm_act_backward_reduce", fastres::backward_reduce);
  m.impl("batch_norm_act_backward_apply", fastres::backward_apply);
  m.impl("batch_norm_act_backward", fastres::backward);
}
