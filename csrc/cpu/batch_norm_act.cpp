// batch_norm_act on the CPU: statistics and forward. The formulas are in statistics.h and norm_act.h.
//
// Passes over memory: statistics read x; apply reads x and r and writes y, and one bit an element where backward will
// need it.
#include "batch_norm_act.h"
#include "library.h"

#include <tuple>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace {

// The residual, or null where there is none, is in x's memory format.
template <typename T>
std::tuple<Tensor, Tensor> apply_forward(
    const Tensor& x,
    const Tensor* residual,
    const OptionalTensor& seed,
    const Pointwise& act,
    bool saves,
    const ChannelNorm<acc_t<T>>& norm,
    const ChannelNorm<acc_t<T>>* residual_norm) {
  const Rows rows = rows_of(x);
  Tensor y = empty_rows(x);
  Tensor bits = empty_vector(saves ? rows.rows() * bitmask_row_bytes(rows.inner()) : 0, ScalarType::Byte);
  std::optional<Dropout> dropout;
  if (act.dropout_p > 0) {
    dropout = dropout_of(seed, act.dropout_p);
  }
  ApplyParams<T> params{};
  params.x = x.const_data_ptr<T>();
  params.residual = residual != nullptr ? residual->const_data_ptr<T>() : nullptr;
  params.y = y.mutable_data_ptr<T>();
  params.bits = saves ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  params.norm = &norm;
  params.residual_norm = residual_norm;
  params.dropout = dropout.has_value() ? &*dropout : nullptr;
  params.keep_scale = static_cast<acc_t<T>>(1.0 / (1.0 - act.dropout_p));
  params.relu = act.kind == Kind::ReLU;
  params.act_add = act.act_add;
  params.fetches_ahead = true;
  params.rows = rows;
  params.activation = act.activation<acc_t<T>>();
  params.gated = act.gated();
  apply_all(params);
  return {std::move(y), std::move(bits)};
}

std::tuple<Tensor, Tensor, Tensor> stats(const Tensor& x) {
  const Rows rows = rows_of(x);
  Tensor mean = channel_vector(x, rows.channels), m2 = channel_vector(x, rows.channels);
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Moments moments = moments_of(x.const_data_ptr<scalar_t>(), rows);
    std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<A>());
    std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<A>());
  });
  Tensor count = empty_vector(1, ScalarType::Long);
  *count.mutable_data_ptr<int64_t>() = rows.count();
  return {std::move(count), std::move(mean), std::move(m2)};
}

std::tuple<Tensor, Tensor> apply(
    const Tensor& x,
    const Norm& norm,
    const std::optional<Residual>& residual,
    const OptionalTensor& seed,
    const Act& act,
    bool save_bits) {
  Tensor copy;
  const Tensor* added = residual.has_value() ? &like_rows("residual", residual->value, x, rows_of(x), copy) : nullptr;
  std::tuple<Tensor, Tensor> result;
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Saved<A> other = Saved<A>::of(x.size(1), residual);
    const ChannelNorm<A> own = Saved<A>(x.size(1), norm).norm(), residual_norm = other.norm();
    const Pointwise parsed = pointwise(act);
    const bool saves = save_bits && parsed.saves_bits(added != nullptr);
    result = apply_forward<scalar_t>(x, added, seed, parsed, saves, own, other.exists() ? &residual_norm : nullptr);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training(
    const Tensor& x,
    const NormParams& norm,
    const std::optional<Statistics>& statistics,
    const OptionalTensor& residual,
    const std::optional<NormParams>& residual_norm,
    const std::optional<Statistics>& residual_statistics,
    const OptionalTensor& seed,
    const Act& act) {
  const Rows rows = rows_of(x);
  const bool dual = residual_norm.has_value() && residual.has_value();
  Tensor copy;
  const Tensor* r = residual.has_value() ? &like_rows("residual", *residual, x, rows, copy) : nullptr;
  Tensor y, bits, mean, rstd, r_mean = channel_vector(x, 0), r_rstd = channel_vector(x, 0);
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    // The residual first: x, measured last, is what the caches still hold when the apply pass starts.
    ChannelNorm<A> other;
    if (dual) {
      other = finalise<scalar_t>(*r, rows, *residual_norm, residual_statistics, r_mean, r_rstd);
    }
    const ChannelNorm<A> own = finalise<scalar_t>(x, rows, norm, statistics, mean, rstd);
    const Pointwise parsed = pointwise(act);
    const bool saves = parsed.saves_bits(r != nullptr);
    std::tie(y, bits) = apply_forward<scalar_t>(x, r, seed, parsed, saves, own, dual ? &other : nullptr);
  });
  return {std::move(y), std::move(mean), std::move(rstd), std::move(r_mean), std::move(r_rstd), std::move(bits)};
}

std::tuple<Tensor, Tensor> inference(
    const Tensor& x,
    const NormParams& norm,
    const OptionalTensor& residual,
    const std::optional<NormParams>& residual_norm,
    const Act& act,
    bool save_bits) {
  Pointwise parsed = pointwise(act);
  parsed.dropout_p = 0;
  Tensor copy;
  const Tensor* added = residual.has_value() ? &like_rows("residual", *residual, x, rows_of(x), copy) : nullptr;
  std::tuple<Tensor, Tensor> result;
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const ChannelNorm<A> own = running_norm<A>(x.size(1), norm);
    ChannelNorm<A> other;
    const bool dual = residual.has_value() && residual_norm.has_value();
    if (dual) {
      other = running_norm<A>(x.size(1), *residual_norm);
    }
    // Backward may have no x to compute the activation's input of.
    const bool saves = save_bits && parsed.gated();
    result = apply_forward<scalar_t>(x, added, std::nullopt, parsed, saves, own, dual ? &other : nullptr);
  });
  return result;
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("batch_norm_act_stats", boxed<&stats>);
  m.impl("batch_norm_act_apply", boxed<&apply>);
  m.impl("batch_norm_act_training", boxed<&training>);
  m.impl("batch_norm_act_inference", boxed<&inference>);
}
