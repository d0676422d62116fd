// What the operators with a 3x3 or 1x1 convolution share: checks, tensors of their results, and the convolution with
// batch statistics or without, by Winograd's algorithm where the kernel is 3x3 and as a matrix product where it is 1x1.
#pragma once

#include "batch_norm_act.h"
#include "epilogues.h"
#include "pixel_gemm.h"
#include "winograd.h"

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
  FASTRES_CHECK(x.dim() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", x.sizes());
  FASTRES_CHECK(
      x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
      "x: expected dtype float32 or bfloat16, got ",
      x.scalar_type());
}

inline void check_weight_dtype(const Tensor& weight, const Tensor& x) {
  FASTRES_CHECK(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float,
      "weight: expected dtype ",
      x.scalar_type(),
      ", got ",
      weight.scalar_type());
}

inline void check_operands(const Tensor& x, const Tensor& weight) {
  check_input(x);
  FASTRES_CHECK(
      weight.dim() == 4 && weight.size(1) == x.size(1) && (weight.size(2) == kTaps || weight.size(2) == 1) &&
          weight.size(3) == weight.size(2),
      "weight: expected shape (K, ",
      x.size(1),
      ", 3, 3) or (K, ",
      x.size(1),
      ", 1, 1), got ",
      weight.sizes());
  check_weight_dtype(weight, x);
}

inline void check_stride(int64_t stride, const Tensor& weight) {
  FASTRES_CHECK(
      stride == 1 || (stride == 2 && weight.size(2) == kTaps),
      "stride: expected 1, or 2 with a 3x3 kernel, got ",
      stride);
}

// The outputs along an axis.
inline int64_t output_size(int64_t size, int64_t stride) {
  return (size + stride - 1) / stride;
}

inline void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t stride) {
  const std::array<int64_t, 4> sizes = {
      x.size(0), weight.size(0), output_size(x.size(2), stride), output_size(x.size(3), stride)};
  const Sizes shape(sizes);
  FASTRES_CHECK(dy.sizes() == shape, "dy: expected shape ", shape, ", got ", dy.sizes());
  FASTRES_CHECK(
      dy.scalar_type() == x.scalar_type(), "dy: expected dtype ", x.scalar_type(), ", got ", dy.scalar_type());
}

// Calls f with a value of x's element type.
template <typename F>
auto with_type(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Float ? f(float()) : f(BFloat16());
}

inline Tensor channels_last(const Tensor& t) {
  return t.contiguous(MemoryFormat::channels_last);
}

inline Tensor empty_channels_last(Sizes sizes, const Tensor& like) {
  return empty(sizes, like.scalar_type(), MemoryFormat::channels_last);
}

inline Tensor empty_output(const Tensor& x, int64_t outputs, int64_t stride) {
  return empty_channels_last({x.size(0), outputs, output_size(x.size(2), stride), output_size(x.size(3), stride)}, x);
}

// Of a tensor in channels_last.
template <typename T>
Source<T> source_of(const Tensor& x) {
  return {x.size(0), x.size(2), x.size(3), x.const_data_ptr<T>()};
}

// Whether outputs are stored past the caches: they are more than those can keep, and every vector is a whole line.
template <typename T>
bool streams(const T* y, const Rows& rows) {
  constexpr int64_t line = 64;
  return std::is_same_v<T, float> && kWidth * static_cast<int64_t>(sizeof(float)) == line &&
      rows.channels % kWidth == 0 && should_stream(y, rows);
}
inline bool streams(const Tensor& y) {
  return y.scalar_type() == ScalarType::Float && streams(y.const_data_ptr<float>(), rows_of(y));
}

// --- evaluation

// The 3x3 convolution by the form of Winograd's algorithm that serves its outputs.
template <typename T, typename Epilogue>
void convolve_by_winograd(const Source<T>& x, int64_t stride, const Kernel& kernel, const Epilogue& epilogue) {
  const int64_t height = output_size(x.height, stride), width = output_size(x.width, stride);
  with_form(stride, x.height, x.width, [&](const auto& form) {
    convolve(form, chunks_of(form, x.images, height, width, kernel), x, kernel, epilogue);
  });
}

enum class Algorithm { winograd, gemm };

inline Algorithm parse_algorithm(std::string_view name, int64_t stride) {
  FASTRES_CHECK(
      name == "winograd" || name == "gemm", "algorithm: expected \"winograd\" or \"gemm\", got \"", name, "\"");
  FASTRES_CHECK(
      stride >= 1 && (stride <= 2 || name == "gemm"), "stride: expected 1 or 2, or more with \"gemm\", got ", stride);
  return name == "gemm" ? Algorithm::gemm : Algorithm::winograd;
}

// --- training

// A convolution by one form of Winograd's algorithm, and a 1x1 convolution as a product over pixels.
template <typename Form>
struct WinogradConvolution {
  Form form;
  Kernel kernel;
  Chunks chunks;

  template <typename T, typename Epilogue>
  void run(const Source<T>& source, const Epilogue& epilogue) const {
    convolve(form, chunks, source, kernel, epilogue);
  }
};

struct PixelConvolution {
  Kernel kernel;
  PixelChunks chunks;

  template <typename T, typename Epilogue>
  void run(const Source<T>& source, const Epilogue& epilogue) const {
    multiply_pixels(chunks, source, kernel, epilogue);
  }
};

// f(the convolution that writes `to`); where kGradient it is the input gradient. `inputs` has the sizes of the inputs.
template <bool kGradient, typename F>
void with_convolution(const Tensor& to, const Tensor& inputs, const Tensor& weight, int64_t stride, const F& f) {
  const Tensor w = weight.to(ScalarType::Float);
  const Kernel kernel = kGradient ? turned(kernel_of(w)) : kernel_of(w);
  if (weight.size(2) == 1) {
    f(PixelConvolution{kernel, pixel_chunks(to.size(0) * to.size(2) * to.size(3), kernel)});
    return;
  }
  with_form(stride, inputs.size(2), inputs.size(3), [&](const auto& form) {
    const auto run = [&](const auto& chosen) {
      f(WinogradConvolution{chosen, kernel, chunks_of(chosen, to.size(0), to.size(2), to.size(3), kernel)});
    };
    if constexpr (kGradient) {
      run(form.turned());
    } else {
      run(form);
    }
  });
}

// (y, mean, M2) of the convolution, the last two empty where `measure` is off.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> convolve_measured(
    const Tensor& x,
    const Source<T>& source,
    const Tensor& weight,
    bool measure,
    int64_t stride) {
  Tensor y = empty_output(x, weight.size(0), stride);
  const int64_t channels = measure ? y.size(1) : 0;
  Tensor mean = channel_vector(x, channels), m2 = channel_vector(x, channels);
  T* to = y.mutable_data_ptr<T>();
  with_convolution<false>(y, x, weight, stride, [&](const auto& convolution) {
    if (!measure) {
      convolution.run(source, Write<T>{to, streams(y)});
      return;
    }
    ChunkSums sums(convolution.chunks.outputs(), channels);
    const WriteMeasured<T> epilogue{to, streams(y), channels, &sums};
    convolution.run(source, epilogue);
    const Moments moments = epilogue.moments();
    std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<float>());
    std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<float>());
  });
  return {std::move(y), std::move(mean), std::move(m2)};
}

// In the weight's dtype; in its layout where that is channels_last, and else contiguous.
template <typename T>
Tensor weight_gradient_of(
    const Tensor& x,
    const Source<T>& source,
    const Tensor& dy,
    const Tensor& weight,
    int64_t stride) {
  const bool contiguous = weight.is_contiguous();
  // Autograd takes it without a copy where all strides are the weight's, those of axes of size 1 included.
  const Tensor to = contiguous ? empty_strided(weight.sizes(), weight.strides(), ScalarType::Float)
                               : empty(weight.sizes(), ScalarType::Float, MemoryFormat::channels_last);
  if (x.numel() == 0 || weight.numel() == 0) {
    to.zero_();
  } else {
    const int64_t inputs = x.size(1);
    const KernelGradient dw{to.mutable_data_ptr<float>(), inputs, !contiguous};
    const WeightGradient<T> operands{source, source_of<T>(dy), dw, inputs, weight.size(0)};
    if (weight.size(2) == 1) {
      pixel_weight_gradient(operands);
    } else {
      with_form(stride, x.size(2), x.size(3), [&](const auto& form) { weight_gradient(form, operands); });
    }
  }
  return to.to(weight.scalar_type());
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
