// The operators norm_act_conv3x3_*: the 3x3 or 1x1 convolution of a = dropout(f(bn(x) + r)), or of
// dropout(f(bn(x))) + r.
//
// Forward and the weight gradient compute a in their prologue. The input gradient's epilogue has da in registers, makes
// g = da * f' * keep / (1 - p) of it and accumulates the sums of the normalisation's backward; the second stage is that
// of batch_norm_act.
#include "conv3x3.h"
#include "library.h"
#include "norm_act_backward.h"

#include <optional>
#include <string_view>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

void check_nonempty(const Tensor& x, const Tensor& weight) {
  check_operands(x, weight);
  FASTRES_CHECK(x.numel() > 0 && weight.numel() > 0, "x: expected at least one element, got shape ", x.sizes());
}

Rows rows_of_channels(const Tensor& x) {
  return {true, x.size(0), x.size(1), x.size(2) * x.size(3)};
}

int64_t keep_bytes(const Rows& rows) {
  return rows.rows() * bitmask_row_bytes(rows.inner());
}

// What the prologue reads: x, a residual and dropout's mask. Their memory is this object's.
template <typename T>
struct Operands {
  Rows rows;
  Tensor x, residual, keep;
  Prologue<T> prologue{};

  Operands(const Tensor& x_in, const OptionalTensor& residual_in, const Tensor& keep_in, const Pointwise& act)
      : rows(rows_of_channels(x_in)), x(channels_last(x_in)), keep(keep_in) {
    if (residual_in.has_value()) {
      residual = like_rows("residual", *residual_in, x, rows, residual);
    }
    FASTRES_CHECK(
        act.dropout_p == 0 ||
            (keep.scalar_type() == ScalarType::Byte && keep.numel() == keep_bytes(rows) && keep.is_contiguous()),
        "keep: expected uint8 of ",
        keep_bytes(rows),
        " elements, got ",
        keep.scalar_type(),
        " of ",
        keep.numel());
    prologue.x = x.const_data_ptr<T>();
    prologue.residual = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
    prologue.keep_scale = static_cast<float>(1.0 / (1.0 - act.dropout_p));
    prologue.relu = act.kind == Kind::ReLU;
    prologue.act_add = act.act_add;
    prologue.rows = rows;
    prologue.kept = act.dropout_p > 0 ? keep.const_data_ptr<uint8_t>() : nullptr;
    prologue.activation = act.activation<float>();
    prologue.gated = false; // no bits are saved
  }
  void set_norm(const ChannelNorm<float>& norm) {
    prologue.norm = &norm;
    filled_.emplace(prologue);
    prologue.filled = filled_->sets() > 1 ? &filled_->params : nullptr;
  }

  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;

  Source<T> source() const {
    return {x.size(0), x.size(2), x.size(3), prologue.x, &prologue};
  }

private:
  std::optional<Filled<ApplyOperands<T>>> filled_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x,
    const NormParams& norm,
    const std::optional<Statistics>& statistics,
    const OptionalTensor& residual,
    const OptionalTensor& seed,
    const Tensor& weight,
    const Act& act,
    bool measure,
    int64_t stride) {
  check_nonempty(x, weight);
  check_stride(stride, weight);
  const Pointwise parsed = pointwise(act);
  const Tensor in = channels_last(x);
  const Rows rows = rows_of_channels(x);
  Tensor keep = empty_vector(parsed.dropout_p > 0 ? keep_bytes(rows) : 0, ScalarType::Byte);
  if (parsed.dropout_p > 0) {
    draw_keep_bits(dropout_of(seed, parsed.dropout_p), rows, keep.mutable_data_ptr<uint8_t>());
  }
  return with_type(x, [&](auto zero) {
    using T = decltype(zero);
    Operands<T> operands(in, residual, keep, parsed);
    Tensor mean, rstd;
    const ChannelNorm<float> own = finalise<T>(in, rows, norm, statistics, mean, rstd);
    operands.set_norm(own);
    const auto [y, y_mean, y_m2] = convolve_measured<T>(in, operands.source(), weight, measure, stride);
    return std::make_tuple(y, y_mean, y_m2, mean, rstd, keep);
  });
}

// --- backward, in two stages

// The results of the first stage: g, da where it is kept, the weight's gradient and the sums; each empty where not
// needed.
struct Gradients {
  Tensor dz, da, dweight, dnorm_weight, dnorm_bias;
};

// The input gradient of the convolution, and through the prologue, as far as g and its sums.
template <typename T>
void reduce(
    const Tensor& dy,
    const Operands<T>& operands,
    const Tensor& weight,
    int64_t stride,
    const float* rstd,
    Gradients& out) {
  const Tensor& x = operands.x;
  const int64_t channels = x.size(1);
  out.dz = empty_channels_last(x.sizes(), x);
  out.dnorm_weight = channel_vector(x, channels);
  out.dnorm_bias = channel_vector(x, channels);
  with_convolution<true>(x, x, weight, stride, [&](const auto& convolution) {
    ChunkSums sums(convolution.chunks.outputs(), channels);
    const MaskedGradient<T, false> epilogue{
        &operands.prologue,
        out.dz.mutable_data_ptr<T>(),
        out.da.numel() > 0 ? out.da.mutable_data_ptr<T>() : nullptr,
        streams(out.dz),
        channels,
        &sums};
    with_masked_gradient(epilogue, [&](const auto& chosen) { convolution.run(source_of<T>(dy), chosen); });
    const auto [sum_g, sum_products] = epilogue.totals();
    float* of_weight = out.dnorm_weight.mutable_data_ptr<float>();
    float* of_bias = out.dnorm_bias.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      of_weight[c] = static_cast<float>(sum_products[c] * rstd[c]);
      of_bias[c] = static_cast<float>(sum_g[c]);
    }
  });
}

// The second stage. dx replaces dz in its memory unless that is needed further.
template <typename T>
Tensor apply(const Gradients& found, const Operands<T>& operands, const float* rstd, bool keeps_dz) {
  const Tensor& x = operands.x;
  Tensor dx = keeps_dz ? empty_channels_last(x.sizes(), x) : found.dz;
  BackwardParams<T> params{};
  params.dy = found.dz.const_data_ptr<T>();
  params.x = operands.prologue.x;
  params.dx = dx.mutable_data_ptr<T>();
  params.norm = operands.prologue.norm;
  params.gate = Gate::open;
  params.keep_scale = 1.0f;
  params.centred = true;
  params.rows = operands.rows;
  Filled all(params);
  const GradientNorm<float> gradient = gradient_norm(
      *all.params.norm,
      rstd,
      found.dnorm_weight.const_data_ptr<float>(),
      found.dnorm_bias.const_data_ptr<float>(),
      static_cast<double>(operands.rows.count()),
      all.sets());
  all.params.gradient = &gradient;
  gradient_all(all.params);
  return dx;
}

// The arguments of backward, and of its first stage.
struct Arguments {
  const Tensor& dy;
  const Tensor& x;
  const Norm& norm;
  const OptionalTensor& residual;
  const Tensor& keep;
  const Tensor& weight;
  Pointwise act;
  std::array<bool, 3> needs; // dx, dresidual, dweight
  int64_t stride;
};

// The first stage; then finish(operands, rstd, the results so far) where dx is needed.
template <typename F>
Gradients gradients(const Arguments& a, const F& finish) {
  check_nonempty(a.x, a.weight);
  check_stride(a.stride, a.weight);
  check_gradient(a.dy, a.x, a.weight, a.stride);
  FASTRES_CHECK(!a.needs[1] || (a.needs[0] && a.residual.has_value()), "needs: the residual's gradient needs x's");
  const Saved<float> saved(a.x.size(1), a.norm);
  const ChannelNorm<float> norm = saved.norm();
  const Tensor dy = channels_last(a.dy);
  Gradients out{
      nothing_like(a.x), nothing_like(a.x), nothing_like(a.weight), channel_vector(a.x, 0), channel_vector(a.x, 0)};
  with_type(a.x, [&](auto zero) {
    using T = decltype(zero);
    Operands<T> operands(a.x, a.residual, a.keep, a.act);
    operands.set_norm(norm);
    if (a.needs[2]) {
      out.dweight = weight_gradient_of<T>(operands.x, operands.source(), dy, a.weight, a.stride);
    }
    if (a.needs[0]) {
      // A residual that is added before the activation has g as its gradient, one that is added after it da.
      if (a.needs[1] && a.act.act_add) {
        out.da = empty_channels_last(a.x.sizes(), a.x);
      }
      reduce(dy, operands, a.weight, a.stride, saved.rstd, out);
      finish(operands, saved.rstd, out);
    }
  });
  return out;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results backward_reduce(
    const Tensor& dy,
    const Tensor& x,
    const Norm& norm,
    const OptionalTensor& residual,
    const Tensor& keep,
    const Tensor& weight,
    const Act& act,
    std::array<bool, 3> needs,
    int64_t stride) {
  const Gradients found = gradients(
      {dy, x, norm, residual, keep, weight, pointwise(act), needs, stride},
      [](const auto&, const float*, const Gradients&) {});
  return {found.dz, found.da, found.dweight, found.dnorm_weight, found.dnorm_bias};
}

Results backward(
    const Tensor& dy,
    const Tensor& x,
    const Norm& norm,
    const OptionalTensor& residual,
    const Tensor& keep,
    const Tensor& weight,
    const Act& act,
    std::array<bool, 3> needs,
    int64_t stride) {
  const Pointwise parsed = pointwise(act);
  const bool dr_is_dz = needs[1] && !parsed.act_add;
  Tensor dx = nothing_like(x);
  const Gradients found = gradients(
      {dy, x, norm, residual, keep, weight, parsed, needs, stride},
      [&](const auto& operands, const float* rstd, const Gradients& so_far) {
        dx = apply(so_far, operands, rstd, dr_is_dz);
      });
  return {dx, dr_is_dz ? found.dz : found.da, found.dweight, found.dnorm_weight, found.dnorm_bias};
}

} // namespace
} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("norm_act_conv3x3_forward", boxed<&conv::forward>);
  m.impl("norm_act_conv3x3_backward_reduce", boxed<&conv::backward_reduce>);
  m.impl("norm_act_conv3x3_backward", boxed<&conv::backward>);
}

#endif
