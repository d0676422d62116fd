// The direct sum of images so small that most taps of most outputs lie outside: a product for every pair of an input
// and an output that share a tap, of the weights as they are.
//
//   sides                   products of an image     Winograd's     the sum over all taps
//   to 2, with stride 1             1 ... 16             25               9 ... 36
//   to 6, with stride 2             1 ... 64             81               9 ... 81
//
// As a form of winograd_forms.h, a tile is an image, the planes are pixels and taps, and nothing is transformed.
#pragma once

#include "winograd_tiles.h"

#include <array>
#include <cstdint>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Images of up to Side x Side pixels, read as they are.
template <int Side>
struct Pixels {
  static constexpr int kPitch = Side;
};

// The convolution of images of height x width with stride 1 or 2, or with `Turned` its input gradient.
template <bool Turned = false>
struct SmallImages {
  // The sides that it serves, by stride; and the largest ones of inputs and outputs.
  static constexpr std::array<int, 3> kSides{0, 2, 6};
  static constexpr int kLarger = 6, kSmaller = 3;
  static constexpr int kSide = Turned ? kSmaller : kLarger, kOut = Turned ? kLarger : kSmaller;
  static constexpr int kPlanes = kTaps * kTaps;
  static constexpr bool kTransforms = false, kSumsPlanes = true;
  static constexpr float kEnergyRatio = 0.0f; // of no tile
  using Input = Pixels<kSide>;
  using GradientInput = Input;
  using Gradient = Pixels<kOut>;

  int height, width, stride;

  SmallImages<!Turned> turned() const {
    return {height, width, stride};
  }

  int operands() const {
    return Turned ? smaller(height) * smaller(width) : height * width;
  }
  int points() const {
    return Turned ? height * width : smaller(height) * smaller(width);
  }
  int products() const {
    return points();
  }
  template <typename Visit>
  void for_each_product(int64_t point, const Visit& visit) const {
    const int across = Turned ? width : smaller(width);
    const int y = static_cast<int>(point) / across, x = static_cast<int>(point) % across;
    const int down_of_input = Turned ? smaller(height) : height, across_of_input = Turned ? smaller(width) : width;
    for (int i = 0; i < down_of_input; ++i) {
      for (int j = 0; j < across_of_input; ++j) {
        const int down = tap(i, y), right = tap(j, x);
        if (down >= 0 && right >= 0) {
          visit(i * across_of_input + j, down * kTaps + right, point);
        }
      }
    }
  }
  // Only the first tap misses the first output, along either axis.
  bool begins(int64_t point, int64_t plane) const {
    const int across = smaller(width);
    return point / across == (plane / kTaps == 0) && point % across == (plane % kTaps == 0);
  }

  template <typename Load, typename Store>
  inline __attribute__((always_inline)) void weights(const Load& load, const Store& store) const {
#pragma GCC unroll 9
    for (int t = 0; t < kPlanes; ++t) {
      if (meets(t)) {
        store(t, load(t));
      }
    }
  }
  template <typename Load, typename Store>
  inline __attribute__((always_inline)) void outputs(const Load& load, const Store& store) const {
    const int across = Turned ? width : smaller(width), all = points();
#pragma GCC unroll 1
    for (int i = 0; i < all; ++i) {
      store(i / across * kOut + i % across, load(i));
    }
  }
  template <typename Load, typename Store>
  void weight_gradient(const Load& load, const Store& store) const {
    for (int t = 0; t < kPlanes; ++t) {
      store(t, meets(t) ? load(t) : Lanes{});
    }
  }

private:
  int smaller(int side) const {
    return (side + stride - 1) / stride;
  }
  // Along an axis, that of an input and an output, or -1.
  int tap(int input, int output) const {
    const int t = Turned ? stride * input - output + 1 : input - stride * output + 1;
    return t >= 0 && t < kTaps ? t : -1;
  }
  // Whether a tap meets any pixel.
  bool meets(int t) const {
    const int down = Turned ? kTaps - 1 - t / kTaps : t / kTaps, right = Turned ? kTaps - 1 - t % kTaps : t % kTaps;
    return meets(down, height) && meets(right, width);
  }
  // Along an axis.
  bool meets(int t, int side) const {
    return t == 1 || (t == 0 ? smaller(side) > 1 : side > 1);
  }
};

// Reads images as TileReader does tiles.
template <typename T>
class ImageReader {
public:
  static constexpr bool kTransforms = false;

  ImageReader(const Tiles& images, float, const T* x, int64_t channels, const Prologue<T>* prologue = nullptr)
      : pixels_(images.height * images.width), x_(x), channels_(channels), prologue_(prologue) {
    activated_.resize(prologue != nullptr ? pixels_ * channels : 0);
  }

  template <typename Place, typename Beyond>
  void transform(int64_t first, int64_t count, float* to, int64_t plane, const Place& place, const Beyond&) {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t pixel = (first + p) * pixels_;
      if (prologue_ != nullptr) {
        run_prologue(*prologue_, pixel, pixels_, activated_.data());
        copy(activated_.data(), to, plane, place.of(p));
      } else {
        copy(x_ + pixel * channels_, to, plane, place.of(p));
      }
    }
  }

private:
  template <typename From, typename Place>
  void copy(const From* from, float* to, int64_t plane, const Place& place) const {
    for (int64_t i = 0; i < pixels_; ++i) {
      const From* pixel = from + i * channels_;
      float* out = to + i * plane;
      int64_t c = 0;
      for (; c + kWidth <= channels_; c += kWidth) {
        store(out + place(c), load(pixel + c));
      }
      if (c < channels_) {
        store(out + place(c), load(pixel + c, channels_ - c));
      }
    }
  }

  int64_t pixels_;
  const T* x_;
  int64_t channels_;
  const Prologue<T>* prologue_;
  std::vector<float> activated_; // an image
};

template <typename Side, typename T>
struct ReaderFor {
  using Type = TileReader<Side, T>;
};
template <int Side, typename T>
struct ReaderFor<Pixels<Side>, T> {
  using Type = ImageReader<T>;
};
template <typename Side, typename T>
using ReaderOf = typename ReaderFor<Side, T>::Type;

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
