// A convolution with packed weights, in inference: bias, residual and activation are its epilogue.
#pragma once

#include "conv3x3.h"
#include "packed_gemm.h"

#include <cstdint>
#include <limits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

struct PackedConvolution {
  Panels weights;
  const float* bias; // [outputs], or null
  Positions positions;
  Algorithm algorithm;
  Kind kind;
  ActivationOf<float> activation;

  Rows rows() const {
    return {true, positions.images, weights.outputs, positions.out_height() * positions.out_width()};
  }
};

// y = f(conv(x) + bias + residual), all channels_last; `residual` may be null.
template <typename T>
void convolve_packed(const PackedConvolution& c, const T* x, const T* residual, T* y) {
  const bool streaming = streams(y, c.rows()), relu = c.kind == Kind::ReLU;
  if (c.algorithm == Algorithm::winograd) {
    ChannelNorm<float> norm; // adds the bias
    norm.mean.assign(c.weights.outputs, 0.0f);
    norm.scale.assign(c.weights.outputs, 1.0f);
    norm.bias.assign(c.weights.outputs, 0.0f);
    if (c.bias != nullptr) {
      std::copy_n(c.bias, c.weights.outputs, norm.bias.data());
    }
    const Kernel kernel = packed_kernel(c.weights);
    const Positions& p = c.positions;
    const Source<T> source{p.images, p.height, p.width, x};
    with_normalise(Normalise<T, false>{y, streaming, &norm, residual, relu, c.activation}, [&](const auto& epilogue) {
      convolve_by_winograd(source, p.stride, kernel, epilogue);
    });
  } else if (c.activation.general()) {
    packed_gemm(c.positions, x, c.weights, Biased<T, true>{y, streaming, c.bias, residual, 0.0f, c.activation});
  } else {
    const float least = relu ? 0.0f : -std::numeric_limits<float>::infinity();
    packed_gemm(c.positions, x, c.weights, Biased<T, false>{y, streaming, c.bias, residual, least, c.activation});
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
