// The operator packed_convolution, of one layer of a frozen network.
//
// The default module does not have it: there it is PyTorch's convolution.
#include "packed_convolution.h"
#include "library.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// packed: as fastres.ops.packed.pack makes it.
Tensor packed_convolution(
    const Tensor& x,
    const Tensor& packed,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const Activation& activation,
    const ConvShape& shape,
    std::string_view algorithm) {
  check_input(x);
  FASTRES_CHECK(x.size(1) > 0, "x: expected at least one channel, got shape ", x.sizes());
  const auto [outputs, kernel, stride, padding] = shape;
  const Algorithm parsed = parse_algorithm(algorithm, stride);
  FASTRES_CHECK(outputs >= 1, "outputs: expected at least 1, got ", outputs);
  FASTRES_CHECK(kernel >= 1, "kernel: expected at least 1, got ", kernel);
  FASTRES_CHECK(padding >= 0, "padding: expected at least 0, got ", padding);
  FASTRES_CHECK(
      parsed == Algorithm::gemm || (kernel == kTaps && padding == kTaps / 2),
      "kernel: expected 3, with padding 1, for \"winograd\", got ",
      kernel,
      " with padding ",
      padding);
  const int64_t groups = round_up((outputs + kPanel - 1) / kPanel, 2), taps = kernel * kernel;
  const int64_t padded = round_up(x.size(1), kPanel);
  const int64_t depth = packed.dim() == 3 && packed.size(1) == taps * padded ? padded : x.size(1);
  const std::array<int64_t, 3> sizes = {groups, taps * depth, kPanel};
  const Sizes expected(sizes);
  FASTRES_CHECK(packed.sizes() == expected, "packed: expected shape ", expected, ", got ", packed.sizes());
  FASTRES_CHECK(
      parsed == Algorithm::gemm || depth == padded,
      "packed: expected channels padded to a multiple of 16 for \"winograd\", got ",
      depth);
  FASTRES_CHECK(
      packed.scalar_type() == ScalarType::Float, "packed: expected dtype float32, got ", packed.scalar_type());
  const Positions positions{x.size(0), x.size(2), x.size(3), stride, kernel, padding};
  const auto fits = [&](int64_t size) { return size + 2 * padding >= kernel; };
  const int64_t height = fits(x.size(2)) ? positions.out_height() : 0;
  const int64_t width = fits(x.size(3)) ? positions.out_width() : 0;
  Tensor y = empty_channels_last({x.size(0), outputs, height, width}, x);
  const Tensor w = packed.contiguous(), in = channels_last(x);
  Tensor copy;
  const Tensor* r = residual.has_value() ? &like_rows("residual", *residual, y, rows_of(y), copy) : nullptr;
  const Pointwise act = pointwise(activation);
  const PackedConvolution convolution{
      {w.const_data_ptr<float>(), outputs, x.size(1), taps, depth},
      channel_data<float>("bias", bias, outputs),
      positions,
      parsed,
      act.kind,
      act.activation<float>()};
  if (y.numel() > 0) {
    with_type(x, [&](auto zero) {
      using T = decltype(zero);
      convolve_packed<T>(
          convolution,
          in.const_data_ptr<T>(),
          r != nullptr ? r->const_data_ptr<T>() : nullptr,
          y.mutable_data_ptr<T>());
    });
  }
  return y;
}

} // namespace
} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("packed_convolution", boxed<&conv::packed_convolution>);
}

#endif
