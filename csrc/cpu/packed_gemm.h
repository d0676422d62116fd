// The convolution in inference as one matrix product with packed weights: any square kernel, stride and padding, in one
// group.
//
//   y[p][k] = f(sum over tap, c of x[pixel(p, tap)][c] * weights[tap, c][k] + bias[k] + residual[p][k])
//
// Rows of the operand are read where they lie, or where lines of x have been copied to with their padding; rows of
// images of few pixels are copied one by one. Every output is one sum in one order, whatever the number of threads.
#pragma once

#include "activations.h"
#include "gathered_gemm.h"

#include <cstdint>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// y = f(value + bias + residual)
template <typename T, bool kGeneral>
struct Biased {
  T* y;
  bool streaming;
  const float* bias;              // or null
  const T* residual;              // or null
  float least;                    // of y: 0 for ReLU, else -infinity
  ActivationOf<float> activation; // where kGeneral

  template <typename Count>
  struct Vector {
    const Biased& of;
    Count count;
    Lanes bias, least;

    template <typename Visit>
    void begin(const Visit&, int64_t) {}
    void end() {}
    inline __attribute__((always_inline)) void operator()(int64_t, int64_t at, Lanes v) const {
      Lanes z = v + bias;
      if (of.residual != nullptr) {
        z = z + load_counted(of.residual + at, count);
      }
      if constexpr (kGeneral) {
        z = of.activation.forward(Vec<float>(z));
      } else {
        z = not_below(least, z);
      }
      put(of.y + at, z, count, of.streaming);
    }
  };
  // What kColumns outputs of some rows read and write.
  void prefetch(int64_t at, int64_t rows, int64_t row) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t r = 0; r < rows; ++r, at += row) {
      for (int64_t c = 0; c < kColumns; c += line) {
        if (residual != nullptr) {
          __builtin_prefetch(residual + at + c, 0, 3);
        }
        if (!streaming) {
          __builtin_prefetch(y + at + c, 1, 3);
        }
      }
    }
  }
  template <typename Count>
  Vector<Count> vector(int64_t c, Count count) const {
    return {*this, count, bias != nullptr ? load_counted(bias + c, count) : Lanes{}, broadcast(least)};
  }
};

// The convolution of x [images, height, width, channels].
template <typename T, bool kGeneral>
void packed_gemm(const Positions& positions, const T* x, const Panels& weights, const Biased<T, kGeneral>& epilogue);

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
