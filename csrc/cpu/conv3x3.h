// What the operators with a 3x3 or 1x1 convolution share: checks, tensors of their results, and the convolution with
// batch statistics or without, by Winograd's algorithm where the kernel is 3x3 and as a matrix product where it is 1x1.
#pragma once

#include "batch_norm_act.h"
#include "epilogues.h"
#include "pixel_gemm.h"
#include "winograd.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Activations are float32 or bfloat16, weights float32 or of the activations' dtype; in registers all are float32.
inline void check_input(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", x.sizes());
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
      "x: expected dtype float32 or bfloat16, got ",
      x.scalar_type());
}

inline void check_operands(const Tensor& x, const Tensor& weight) {
  check_input(x);
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) == x.size(1) && (weight.size(2) == kTaps || weight.size(2) == 1) &&
          weight.size(3) == weight.size(2),
      "weight: expected shape (K, ",
      x.size(1),
      ", 3, 3) or (K, ",
      x.size(1),
      ", 1, 1), got ",
      weight.sizes());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat,
      "weight: expected dtype ",
      x.scalar_type(),
      ", got ",
      weight.scalar_type());
}

inline void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const std::array<int64_t, 4> sizes = {x.size(0), weight.size(0), x.size(2), x.size(3)};
  const at::IntArrayRef shape(sizes);
  TORCH_CHECK_VALUE(dy.sizes() == shape, "dy: expected shape ", shape, ", got ", dy.sizes());
  TORCH_CHECK_TYPE(
      dy.scalar_type() == x.scalar_type(), "dy: expected dtype ", x.scalar_type(), ", got ", dy.scalar_type());
}

// Calls f with a value of x's element type.
template <typename F>
auto with_type(const Tensor& x, const F& f) {
  return x.scalar_type() == at::kFloat ? f(float()) : f(at::BFloat16());
}

inline Tensor channels_last(const Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

inline Tensor empty_output(const Tensor& x, const Tensor& weight) {
  return empty_channels_last({x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
}

inline Tiles tiles_of(const Tensor& x) {
  return {x.size(0), x.size(2), x.size(3)};
}

// Whether outputs are stored past the caches: they are more than those can keep, and every vector is a whole line.
template <typename T>
bool streams(const T* y, const Rows& rows) {
  constexpr int64_t line = 64;
  return std::is_same_v<T, float> && kWidth * static_cast<int64_t>(sizeof(float)) == line &&
      rows.channels % kWidth == 0 && should_stream(y, rows);
}
inline bool streams(const Tensor& y) {
  return y.scalar_type() == at::kFloat && streams(y.const_data_ptr<float>(), rows_of(y));
}

// --- evaluation

enum class Algorithm { winograd, gemm };

inline Algorithm parse_algorithm(std::string_view name, int64_t stride) {
  TORCH_CHECK_VALUE(
      name == "winograd" || name == "gemm", "algorithm: expected \"winograd\" or \"gemm\", got \"", name, "\"");
  TORCH_CHECK_VALUE(
      stride >= 1 && (stride == 1 || name == "gemm"), "stride: expected 1, or more with \"gemm\", got ", stride);
  return name == "gemm" ? Algorithm::gemm : Algorithm::winograd;
}

// A convolution with stride 1, its work cut into chunks.
class Convolution {
public:
  // Of x with the weight; or, as its input gradient, of dy, whose images have the size of x's.
  Convolution(const Tensor& x, const Tensor& weight, bool gradient)
      : weight_(weight.to(at::kFloat)),
        kernel_(gradient ? turned(kernel_of(weight_)) : kernel_of(weight_)),
        pointwise_(weight.size(2) == 1) {
    if (pointwise_) {
      pixels_ = pixel_chunks(x.size(0) * x.size(2) * x.size(3), kernel_);
    } else {
      tiles_ = chunks_of(tiles_of(x), kernel_);
    }
  }

  // For epilogues that keep some of `channels` channels.
  ChunkSums sums(int64_t channels) const {
    return ChunkSums(pointwise_ ? pixels_.outputs() : tiles_.outputs(), channels);
  }

  template <typename T, typename Epilogue>
  void run(const Source<T>& source, const Epilogue& epilogue) const {
    if (pointwise_) {
      multiply_pixels(pixels_, source, kernel_, epilogue);
    } else {
      convolve(tiles_, source, kernel_, epilogue);
    }
  }

private:
  Tensor weight_;
  Kernel kernel_;
  bool pointwise_;
  Chunks tiles_{};
  PixelChunks pixels_{};
};

// (y, mean, M2) of the convolution, the last two empty where `measure` is off.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> convolve_measured(
    const Tensor& x,
    const Source<T>& source,
    const Tensor& weight,
    bool measure) {
  Tensor y = empty_output(x, weight);
  const int64_t channels = measure ? y.size(1) : 0;
  Tensor mean = channel_vector(x, channels), m2 = channel_vector(x, channels);
  const Convolution convolution(x, weight, false);
  T* to = y.mutable_data_ptr<T>();
  if (!measure) {
    convolution.run(source, Write<T>{to, streams(y)});
    return {y, mean, m2};
  }
  ChunkSums sums = convolution.sums(channels);
  const WriteMeasured<T> epilogue{to, streams(y), channels, &sums};
  convolution.run(source, epilogue);
  const Moments moments = epilogue.moments();
  std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<float>());
  std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<float>());
  return {y, mean, m2};
}

// In the weight's dtype; in its layout where that is channels_last, and else contiguous.
template <typename T>
Tensor weight_gradient_of(const Tensor& x, const Source<T>& source, const Tensor& dy, const Tensor& weight) {
  const auto options = weight.options().dtype(at::kFloat);
  Tensor to = at::empty(weight.sizes(), options.memory_format(at::MemoryFormat::ChannelsLast));
  if (x.numel() == 0 || weight.numel() == 0) {
    to.zero_();
  } else {
    const WeightGradient<T> problem{
        tiles_of(x), source, dy.const_data_ptr<T>(), to.mutable_data_ptr<float>(), x.size(1), weight.size(0)};
    if (weight.size(2) == 1) {
      pixel_weight_gradient(problem);
    } else {
      weight_gradient(problem);
    }
  }
  to = to.to(weight.scalar_type());
  return weight.is_contiguous() ? to.contiguous() : to;
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
