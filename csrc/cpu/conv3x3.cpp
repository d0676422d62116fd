// The operators conv3x3_*: the 3x3 convolution with padding 1, in training with the batch statistics of its output, in
// evaluation with the normalisation, residual and activation that follow, as its epilogue. In training the 1x1
// convolution, too.
//
// The default module has none of them: there the operators are PyTorch's convolution.
#include "conv3x3.h"
#include "gathered_gemm.h"
#include "library.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, bool statistics, int64_t stride) {
  check_operands(x, weight);
  check_stride(stride, weight);
  FASTRES_CHECK(!statistics || x.numel() > 0, "x: expected at least one element to measure, got shape ", x.sizes());
  if (x.numel() == 0 || weight.numel() == 0) {
    const Tensor y = empty_output(x, weight.size(0), stride);
    y.zero_();
    return {y, channel_vector(x, 0), channel_vector(x, 0)};
  }
  const Tensor in = channels_last(x);
  return with_type(x, [&](auto zero) {
    using T = decltype(zero);
    return convolve_measured<T>(in, source_of<T>(in), weight, statistics, stride);
  });
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    const OptionalTensor& added,
    std::array<bool, 2> needs,
    int64_t stride) {
  check_operands(x, weight);
  check_stride(stride, weight);
  check_gradient(dy, x, weight, stride);
  FASTRES_CHECK(
      !added.has_value() || (added->sizes() == x.sizes() && added->scalar_type() == x.scalar_type()),
      "added: expected shape and dtype of x");
  Tensor dx = needs[0] ? empty_channels_last(x.sizes(), x) : nothing_like(x);
  Tensor dweight = nothing_like(weight);
  const Tensor gradient = channels_last(dy), in = channels_last(x);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    if (needs[0] && weight.numel() == 0) {
      if (added.has_value()) {
        dx.copy_(*added);
      } else {
        dx.zero_();
      }
    } else if (needs[0] && x.numel() > 0) {
      T* to = dx.mutable_data_ptr<T>();
      with_convolution<true>(dx, dx, weight, stride, [&](const auto& convolution) {
        if (added.has_value()) {
          const Tensor other = channels_last(*added);
          const WriteAdded<T> epilogue{to, other.const_data_ptr<T>(), streams(dx)};
          convolution.run(source_of<T>(gradient), epilogue);
        } else {
          convolution.run(source_of<T>(gradient), Write<T>{to, streams(dx)});
        }
      });
    }
    if (needs[1]) {
      dweight = weight_gradient_of<T>(in, source_of<T>(in), gradient, weight, stride);
    }
  });
  return {std::move(dx), std::move(dweight)};
}

// --- evaluation

// The output. fill(y, an element of its type, convolve_to) has to call convolve_to with an epilogue that writes y.
template <typename F>
Tensor infer(const Tensor& x, const Kernel& kernel, int64_t stride, Algorithm algorithm, const F& fill) {
  Tensor y = empty_output(x, kernel.outputs, stride);
  if (y.numel() == 0) {
    return y;
  }
  const Tensor in = channels_last(x);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    fill(y, zero, [&](const auto& epilogue) {
      if (algorithm == Algorithm::gemm) {
        const Positions positions{x.size(0), x.size(2), x.size(3), stride};
        gathered_gemm(positions, in.const_data_ptr<T>(), kernel, epilogue);
        return;
      }
      convolve_by_winograd(source_of<T>(in), stride, kernel, epilogue);
    });
  });
  return y;
}

// Calls convolve_to with the epilogue y = f(bn(value) + residual).
template <typename T, typename F>
void normalise_to(
    Tensor& y,
    const ChannelNorm<float>& norm,
    const OptionalTensor& residual,
    const Activation& activation,
    const F& convolve_to) {
  Tensor copy;
  const Tensor* r = residual.has_value() ? &like_rows("residual", *residual, y, rows_of(y), copy) : nullptr;
  const Pointwise act = pointwise(activation);
  const Normalise<T, false> epilogue{
      y.mutable_data_ptr<T>(),
      streams(y),
      &norm,
      r != nullptr ? r->const_data_ptr<T>() : nullptr,
      act.kind == Kind::ReLU,
      act.activation<float>()};
  with_normalise(epilogue, convolve_to);
}

Tensor inference(
    const Tensor& x,
    const Tensor& conv_weight,
    const std::optional<NormParams>& norm,
    const OptionalTensor& residual,
    const Activation& activation,
    int64_t stride,
    std::string_view algorithm) {
  check_operands(x, conv_weight);
  FASTRES_CHECK(conv_weight.size(2) == kTaps, "conv_weight: expected a 3x3 kernel, got ", conv_weight.sizes());
  FASTRES_CHECK(x.size(1) > 0, "x: expected at least one channel, got shape ", x.sizes());
  const Algorithm parsed = parse_algorithm(algorithm, stride);
  Tensor w = conv_weight.to(ScalarType::Float);
  if (parsed == Algorithm::gemm && !gemm_reads(kernel_of(w))) {
    w = w.contiguous();
  }
  return infer(x, kernel_of(w), stride, parsed, [&](Tensor& y, auto zero, const auto& convolve_to) {
    using T = decltype(zero);
    if (norm.has_value()) {
      normalise_to<T>(y, running_norm<float>(y.size(1), *norm), residual, activation, convolve_to);
    } else {
      convolve_to(Write<T>{y.mutable_data_ptr<T>(), streams(y)});
    }
  });
}

} // namespace
} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("conv3x3_forward", boxed<&conv::forward>);
  m.impl("conv3x3_backward", boxed<&conv::backward>);
  m.impl("conv3x3_inference", boxed<&conv::inference>);
}

#endif
