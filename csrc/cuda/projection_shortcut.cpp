// projection_shortcut for CUDA tensors: checks the arguments, allocates, asks for the plan and has it launched.
// The kernels are in projection_shortcut.cuh.
#include "../common/arguments.h"
#include "launch.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace fastres::shortcut {
namespace {

// Where a tensor is contiguous both ways (C == 1 or H == W == 1) the longer rows win, as contract.rows_are_channels has
// it.
bool is_channels_last(const Tensor& s) {
  const bool last =
      s.is_contiguous(at::MemoryFormat::ChannelsLast) && (!s.is_contiguous() || s.size(2) * s.size(3) == 1);
  TORCH_CHECK_VALUE(
      last || s.is_contiguous(), "s: expected contiguous NCHW or channels_last memory, got strides ", s.strides());
  return last;
}

void check_like(const char* name, const Tensor& t, const Tensor& s) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == s.scalar_type(), name, ": expected dtype ", s.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == s.device(), name, ": expected a tensor on ", s.device(), ", got one on ", t.device());
}

Problem problem_of(const Tensor& s, const Tensor& weight, at::IntArrayRef stride) {
  TORCH_CHECK_VALUE(s.dim() == 4, "s: expected 4 dimensions [N, C, H, W], got shape ", s.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) == s.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
      "weight: expected shape (Cout, ",
      s.size(1),
      ", 1, 1), got ",
      weight.sizes());
  check_like("weight", weight, s);
  TORCH_CHECK_VALUE(
      stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride: expected two positive numbers, got ", stride);
  const Problem p{
      s.size(0),
      s.size(1),
      s.size(2),
      s.size(3),
      weight.size(0),
      // A stride beyond the image looks at its first position, as one of its size does.
      std::min(stride[0], std::max<int64_t>(s.size(2), 1)),
      std::min(stride[1], std::max<int64_t>(s.size(3), 1)),
      is_channels_last(s)};
  TORCH_CHECK_VALUE(
      countable(p),
      "s: expected less than 2^31 positions (N * H * W) and weights, got shapes ",
      s.sizes(),
      " and ",
      weight.sizes());
  return p;
}

at::MemoryFormat memory_format(const Problem& p) {
  return p.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

std::array<int64_t, 4> product_sizes(const Problem& p) {
  return {p.images, p.out_channels, p.out_h(), p.out_w()};
}

// There is nothing to multiply: results are empty or zero.
bool nothing(const Problem& p) {
  return p.positions() == 0 || p.in_channels == 0 || p.out_channels == 0;
}

Tensor empty_product(const Tensor& s, const Problem& p) {
  return at::empty(product_sizes(p), s.options().memory_format(memory_format(p)));
}

Tensor vector(const Tensor& s, int64_t size) {
  return at::empty({size}, s.options().dtype(at::kFloat).memory_format(std::nullopt));
}

// An activation with the product's shape, in the memory format of s.
Tensor like_product(const char* name, const Tensor& t, const Tensor& s, const Problem& p) {
  const std::array<int64_t, 4> sizes = product_sizes(p);
  TORCH_CHECK_VALUE(
      t.sizes() == at::IntArrayRef(sizes), name, ": expected shape ", at::IntArrayRef(sizes), ", got ", t.sizes());
  check_like(name, t, s);
  return t.contiguous(memory_format(p));
}

const float* channel_data(const char* name, const OptionalTensor& v, const Tensor& s, int64_t channels) {
  if (!v.has_value()) {
    return nullptr;
  }
  TORCH_CHECK_VALUE(
      v->dim() == 1 && v->size(0) == channels && v->is_contiguous(),
      name,
      ": expected a contiguous tensor of shape (",
      channels,
      ",), got shape ",
      v->sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == at::kFloat, name, ": expected dtype float32, got ", v->scalar_type());
  TORCH_CHECK_VALUE(
      v->device() == s.device(), name, ": expected a tensor on ", s.device(), ", got one on ", v->device());
  return v->const_data_ptr<float>();
}

// float32 is rounded to tf32 where torch's setting for matrix products says so and the device has it.
Arithmetic arithmetic_of(const Tensor& s) {
  switch (s.scalar_type()) {
    case at::kBFloat16:
      return Arithmetic::kBFloat16;
    case at::kHalf:
      return Arithmetic::kHalf;
    case at::kFloat: {
      const bool tf32 =
          at::globalContext().allowTF32CuBLAS() && at::cuda::getDeviceProperties(s.get_device())->major >= 8;
      return tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat;
    }
    default:
      TORCH_CHECK_TYPE(false, "s: expected float32, bfloat16 or float16 on CUDA, got ", s.scalar_type());
  }
}

// Asks for the plan, allocates what it needs between its kernels and launches them on the current stream.
void launch(Step step, const Tensor& s, const Problem& p, Pointers q) {
  const Arithmetic arithmetic = arithmetic_of(s);
  // The workspace is the allocator's, always aligned; its pointer is not known before the plan.
  const Plan plan = plan_of(step, arithmetic, p, aligned_for(step, q), q.mean != nullptr);
  const Tensor workspace = vector(s, plan.workspace);
  q.workspace = plan.workspace > 0 ? workspace.mutable_data_ptr<float>() : nullptr;
  constexpr Run* kRuns[] = {run_bfloat16, run_half, run_tf32, run_float};
  kRuns[static_cast<int>(arithmetic)](step, plan, p, q, at::cuda::getCurrentCUDAStream(s.get_device()));
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& s,
    const Tensor& weight,
    at::IntArrayRef stride,
    bool statistics) {
  const Problem p = problem_of(s, weight, stride);
  const c10::cuda::CUDAGuard guard(s.device());
  const Tensor w = weight.contiguous();
  Tensor product = empty_product(s, p);
  Tensor mean = vector(s, statistics ? p.out_channels : 0), m2 = vector(s, statistics ? p.out_channels : 0);
  if (nothing(p)) {
    return {product.zero_(), mean.zero_(), m2.zero_()};
  }
  Pointers q{};
  q.s = s.const_data_ptr();
  q.weight = w.const_data_ptr();
  q.product = product.mutable_data_ptr();
  if (statistics) {
    q.mean = mean.mutable_data_ptr<float>();
    q.m2 = m2.mutable_data_ptr<float>();
  }
  launch(Step::kForward, s, p, q);
  return {product, mean, m2};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dproduct,
    const Tensor& s,
    const Tensor& weight,
    at::IntArrayRef stride,
    std::array<bool, 2> needs) {
  const Problem p = problem_of(s, weight, stride);
  const c10::cuda::CUDAGuard guard(s.device());
  const Tensor w = weight.contiguous(), gradient = like_product("dproduct", dproduct, s, p);
  Tensor ds = needs[0] ? at::empty_like(s) : at::empty({0}, s.options().memory_format(std::nullopt));
  Tensor dweight = at::empty({0}, s.options().memory_format(std::nullopt));
  if (needs[1]) {
    // Rows of input channels, as the kernel writes them. Where the weight lies so in memory, in its strides, those of
    // its axes of size 1 included: DDP compares them all.
    const auto options = s.options().memory_format(std::nullopt);
    dweight = weight.is_contiguous() ? at::empty_strided(weight.sizes(), weight.strides(), options)
                                     : at::empty(weight.sizes(), options);
  }
  if (nothing(p)) {
    return {ds.zero_(), dweight.zero_()};
  }
  Pointers q{};
  q.s = s.const_data_ptr();
  q.weight = w.const_data_ptr();
  q.dproduct = gradient.const_data_ptr();
  if (needs[0]) {
    q.ds = ds.mutable_data_ptr();
    launch(Step::kInputGradient, s, p, q);
  }
  if (needs[1]) {
    q.dweight = dweight.mutable_data_ptr();
    launch(Step::kWeightGradient, s, p, q);
    dweight = weight.is_contiguous() ? dweight : at::empty_like(weight).copy_(dweight);
  }
  return {ds, dweight};
}

// A normalisation by running statistics; `prefix` is what its arguments' names begin with.
RunningNorm running_norm(const std::string& prefix, const NormParams& norm, const Tensor& s, int64_t channels) {
  TORCH_CHECK_VALUE(
      norm.running_mean.has_value() && norm.running_var.has_value(),
      prefix,
      "running_mean and ",
      prefix,
      "running_var: expected tensors, got None");
  const auto data = [&](const char* name, const OptionalTensor& v) {
    return channel_data((prefix + name).c_str(), v, s, channels);
  };
  return {
      data("running_mean", norm.running_mean),
      data("running_var", norm.running_var),
      data("weight", norm.weight),
      data("bias", norm.bias),
      static_cast<float>(norm.eps)};
}

Tensor inference(
    const Tensor& s,
    const Tensor& conv_weight,
    const NormParams& norm,
    const OptionalTensor& x,
    const std::optional<NormParams>& x_norm,
    at::IntArrayRef stride,
    const Activation& activation) {
  TORCH_CHECK_VALUE(
      activation.kind == "relu" || activation.kind == "identity",
      "activation_kind: expected \"relu\" or \"identity\" on CUDA, got \"",
      activation.kind,
      "\"");
  const Problem p = problem_of(s, conv_weight, stride);
  const c10::cuda::CUDAGuard guard(s.device());
  const Tensor w = conv_weight.contiguous();
  const Tensor added = x.has_value() ? like_product("x", *x, s, p) : Tensor();
  Pointers q{};
  q.norm = running_norm("norm_", norm, s, p.out_channels);
  if (x_norm.has_value()) {
    q.x_norm = running_norm("x_norm_", *x_norm, s, p.out_channels);
  }
  Tensor y = empty_product(s, p);
  if (y.numel() == 0) {
    return y;
  }
  TORCH_CHECK_VALUE(p.in_channels > 0, "s: expected at least one channel, got shape ", s.sizes());
  q.s = s.const_data_ptr();
  q.weight = w.const_data_ptr();
  q.x = added.defined() ? added.const_data_ptr() : nullptr;
  q.y = y.mutable_data_ptr();
  q.relu = activation.kind == "relu";
  launch(Step::kInference, s, p, q);
  return y;
}

} // namespace
} // namespace fastres::shortcut

TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("projection_shortcut_forward", fastres::shortcut::forward);
  m.impl("projection_shortcut_backward", fastres::shortcut::backward);
  m.impl("projection_shortcut_inference", fastres::grouped<&fastres::shortcut::inference>);
}
