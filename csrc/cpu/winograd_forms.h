// The forms of Winograd's 3x3 convolution: what a tile is, how it is transformed, and the range that the transforms
// serve.
//
//   Tile3          F(3x3, 3x3): 25 products for 9 outputs, 2.78 an output, for images of 3x3 and 6x6 outputs
//   Tile4          F(4x4, 3x3): 36 products for 16 outputs, 2.25 an output
//   Tile5          F(5x5, 3x3): 49 products for 25 outputs, 1.96 an output, with 2.5 times the rounding errors
//   Stride2        stride 2: 81 products for 16 outputs, where the direct sum takes 144
//   Stride2Turned  its input gradient
//
// small_images.h has one more, without a transform.
//
// Each point of what is transformed is a plane of its own, laid out as the products read it (gemm.h).
//
// With stride 2 the odd rows of the input meet two taps, 0 and 2, and the even rows one; so do the columns. That makes
// four phases of the input, each with a convolution of stride 1 by 2x2, 2x1, 1x2 or 1x1 taps. All are transformed with
// the points of F(4, 2), of which one tap leaves infinity out, and their products add up before the one inverse
// transform. In the input gradient the phases are those of the output, and share the one transform of dy.
//
// The transforms mix the values of a tile, so that rounding errors of its largest spread to all of its outputs, and
// infinities and NaN with them. A tile beyond the transforms' range (within_range) is summed directly.
#pragma once

#include "packed_weights.h"
#include "winograd_transforms.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// --- what is read of a tile
//
// kWindow x kWindow positions, the first one kBefore up and left of the tile's own kPitch x kPitch. Of these, kBlocks
// blocks of positions have sums of squares that tell whether the tile is within the transforms' range. Blocks may
// overlap, so they consist of kCells cells: cell(y, x) is that of a position, or -1.

// Cells and blocks are the squares of those along one axis: Axis::cell(position), and block b of cells
// Axis::kFirst[b] ... Axis::kFirst[b] + Axis::kSize - 1.
template <typename Axis>
struct Blocks {
  static constexpr int kAlong = Axis::kFirst.size(), kBlocks = kAlong * kAlong, kCells = Axis::kCells * Axis::kCells;

  static constexpr int cell(int y, int x) {
    return Axis::cell(y) < 0 || Axis::cell(x) < 0 ? -1 : Axis::cell(y) * Axis::kCells + Axis::cell(x);
  }
  static Lanes block(const Lanes* cells, int b) {
    const int top = Axis::kFirst[b / kAlong], left = Axis::kFirst[b % kAlong];
    const int bottom = top + Axis::kSize[b / kAlong], right = left + Axis::kSize[b % kAlong];
    Lanes sum{};
    for (int i = top; i < bottom; ++i) {
      for (int j = left; j < right; ++j) {
        sum = sum + cells[i * Axis::kCells + j];
      }
    }
    return sum;
  }
};

// `Count` blocks of Size positions from First on, a cell each.
template <int First, int Size, int Count>
struct Evenly {
  static constexpr int kCells = Count;
  static constexpr std::array<int, Count> kFirst = [] {
    std::array<int, Count> first{};
    for (int b = 0; b < Count; ++b) {
      first[b] = b;
    }
    return first;
  }();
  static constexpr std::array<int, Count> kSize = [] {
    std::array<int, Count> size{};
    size.fill(1);
    return size;
  }();
  static constexpr int cell(int position) {
    return position < First || position >= First + Size * Count ? -1 : (position - First) / Size;
  }
};

// One transform along both axes.
template <typename Transform, int Before, int Pitch, typename Axis>
struct Square : Blocks<Axis> {
  static constexpr int kWindow = Transform::kFrom, kBefore = Before, kPitch = Pitch;

  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void transform(const Load& load, const Store& store) {
    transform_tile<Transform, Transform>(
        [&](int i, int j) __attribute__((always_inline)) { return load(i, j); },
        [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(i * Transform::kTo + j, v); });
  }
};

// --- what of a tile is multiplied
//
// In each of points() points the product of one or several planes of the operand and of the kPlanes of the weights:
// for_each_product(point, visit) calls visit(plane of the operand, of the weights, of the products). Where kSumsPlanes
// they have one plane of products, and add up.
template <int Operands, int Points, int Products>
struct Transformed {
  static constexpr bool kTransforms = true, kSumsPlanes = Products < Operands;

  static constexpr int operands() {
    return Operands;
  }
  static constexpr int points() {
    return Points;
  }
  static constexpr int products() {
    return Products;
  }
  // Whether a plane of the weights has its first product in this point.
  static constexpr bool begins(int64_t, int64_t) {
    return true;
  }
};

// --- stride 1

template <typename F, typename InputAxis, typename GradientAxis, int Ratio>
struct UnitStride : Transformed<F::kIn * F::kIn, F::kIn * F::kIn, F::kIn * F::kIn> {
  static constexpr int kOut = F::kOut, kStride = 1, kPlanes = F::kIn * F::kIn;
  static constexpr float kEnergyRatio = Ratio;

  using Input = Square<typename F::Input, 1, kOut, InputAxis>;
  using GradientInput = Input;
  using Gradient = Square<typename F::Gradient, 0, kOut, GradientAxis>;

  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void weights(const Load& load, const Store& store) {
    using W = typename F::Weight;
    transform_tile<W, W>(
        [&](int i, int j) __attribute__((always_inline)) { return load(i * kTaps + j); },
        [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(i * F::kIn + j, v); });
  }
  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void outputs(const Load& load, const Store& store) {
    using O = typename F::Output;
    transform_tile<O, O>(
        [&](int i, int j) __attribute__((always_inline)) { return load(i * F::kIn + j); },
        [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(i * kOut + j, v); });
  }
  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void weight_gradient(const Load& load, const Store& store) {
    using W = typename F::WeightGradient;
    transform_tile<W, W>(
        [&](int i, int j) __attribute__((always_inline)) { return load(i * F::kIn + j); },
        [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(i * kTaps + j, v); });
  }

  template <typename Visit>
  static inline void for_each_product(int64_t point, const Visit& visit) {
    visit(point, point, point);
  }
  // The form of the input gradient.
  static UnitStride turned() {
    return {};
  }

  // The direct sum: outputs i of kPieces pieces, kPiece x kPiece each, and what they read, kStep positions apart.
  static constexpr int kPieces = 1, kPiece = kOut, kStep = 1;
  // The position that the first output of a piece reads under a tap, or -1.
  static constexpr int corner(int, int tap) {
    return tap / kTaps * Input::kWindow + tap % kTaps;
  }
  static constexpr int output(int, int i) {
    return i;
  }
};

struct SmallPairs {
  static constexpr std::array<double, 2> kValues{0.4, 1.25};
};
// Three positions from First on, of which the first two and the last two are a block: what an output reads holds one.
template <int First>
struct TwoOfThree {
  static constexpr int kCells = 3;
  static constexpr std::array<int, 2> kFirst{0, 1}, kSize{2, 2};
  static constexpr int cell(int position) {
    return position < First || position >= First + kCells ? -1 : position - First;
  }
};
using Tile3 = UnitStride<Paired<SmallPairs, 3, 3>, TwoOfThree<1>, TwoOfThree<0>, 4096>;

using Tile4 = UnitStride<Zero43, Evenly<1, 2, 2>, Evenly<0, 2, 2>, 4096>;

struct ThreePairs {
  static constexpr std::array<double, 3> kValues{0.3, 0.85, 1.75};
};
// The tile's own rows 0 and 1, 2 and 3, 3 and 4: what an output reads holds one of them.
struct InputOfFive {
  static constexpr int kCells = 4;
  static constexpr std::array<int, 3> kFirst{0, 1, 2}, kSize{1, 2, 2};
  static constexpr int cell(int position) {
    return position < 1 || position > 5 ? -1 : std::max(0, position - 2);
  }
};
// Rows 0 and 1, and 2 to 4.
struct GradientOfFive {
  static constexpr int kCells = 2;
  static constexpr std::array<int, 2> kFirst{0, 1}, kSize{1, 1};
  static constexpr int cell(int position) {
    return position < 2 ? 0 : 1;
  }
};
using Tile5 = UnitStride<Paired<ThreePairs, 5, 3>, InputOfFive, GradientOfFive, 1024>;

// --- stride 2

struct TwoPairs {
  static constexpr std::array<double, 2> kValues{0.5, 1.25};
};
// Along one axis of a phase: of two taps, or of the one in the middle.
template <bool kMiddle>
using Phase = Paired<TwoPairs, 4, kMiddle ? 1 : 2, !kMiddle>;

struct Phases {
  static constexpr int kSide = 5, kPlanes = 81, kPoints = kSide * kSide;

  // f(down, across): of the four phases, std::bool_constant; true is the axis with the tap in the middle.
  template <typename F>
  static inline __attribute__((always_inline)) void for_each(const F& f) {
    f(std::false_type(), std::false_type());
    f(std::false_type(), std::true_type());
    f(std::true_type(), std::false_type());
    f(std::true_type(), std::true_type());
  }
  // The plane of a phase's point (i, j).
  static constexpr int plane(bool down, bool across, int i, int j) {
    const int first = down ? (across ? 65 : 45) : (across ? 25 : 0);
    return first + i * (kSide - across) + j;
  }
  // visit(plane) for those of a point.
  template <typename Visit>
  static inline void for_each_plane(int64_t point, const Visit& visit) {
    const int i = static_cast<int>(point) / kSide, j = static_cast<int>(point) % kSide;
    for_each([&](bool down, bool across) {
      if (i < kSide - down && j < kSide - across) {
        visit(plane(down, across, i, j));
      }
    });
  }

  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void weights(const Load& load, const Store& store) {
    for_each([&](auto down, auto across) __attribute__((always_inline)) {
      transform_tile<typename Phase<down>::Weight, typename Phase<across>::Weight>(
          [&](int i, int j) __attribute__((always_inline)) { return load((2 * i + down) * kTaps + 2 * j + across); },
          [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(plane(down, across, i, j), v); });
    });
  }
};

struct Stride2Turned;

struct Stride2 : Phases, Transformed<Phases::kPlanes, Phases::kPoints, Phases::kPoints> {
  static constexpr int kOut = 4, kStride = 2;
  static constexpr float kEnergyRatio = 4096;

  template <typename Axis>
  struct AllPhases : Blocks<Axis> {
    static constexpr int kWindow = 9, kBefore = 1, kPitch = 8;

    template <typename Load, typename Store>
    static inline __attribute__((always_inline)) void transform(const Load& load, const Store& store) {
      for_each([&](auto down, auto across) __attribute__((always_inline)) {
        transform_tile<typename Phase<down>::Input, typename Phase<across>::Input>(
            [&](int i, int j) __attribute__((always_inline)) { return load(2 * i + down, 2 * j + across); },
            [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(plane(down, across, i, j), v); });
      });
    }
  };
  using Input = AllPhases<Evenly<1, 2, 4>>;
  // Two rows of each phase that all its taps read, where at least three outputs are inside the image.
  struct RowsOfPhases {
    static constexpr int kCells = 2;
    static constexpr std::array<int, 2> kFirst{0, 1}, kSize{1, 1};
    static constexpr int cell(int position) {
      return position < 1 || position > 4 ? -1 : position % 2;
    }
  };
  using GradientInput = AllPhases<RowsOfPhases>;
  using Gradient = Square<Phase<false>::Gradient, 0, kOut, Evenly<0, 2, 2>>;

  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void outputs(const Load& load, const Store& store) {
    using O = Phase<false>::Output;
    transform_tile<O, O>(
        [&](int i, int j) __attribute__((always_inline)) { return load(i * kSide + j); },
        [&](int i, int j, Lanes v) __attribute__((always_inline)) { store(i * kOut + j, v); });
  }
  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void weight_gradient(const Load& load, const Store& store) {
    for_each([&](auto down, auto across) __attribute__((always_inline)) {
      transform_tile<typename Phase<down>::WeightGradient, typename Phase<across>::WeightGradient>(
          [&](int i, int j) __attribute__((always_inline)) { return load(plane(down, across, i, j)); },
          [&](int i, int j, Lanes v)
              __attribute__((always_inline)) { store((2 * i + down) * kTaps + 2 * j + across, v); });
    });
  }

  template <typename Visit>
  static inline void for_each_product(int64_t point, const Visit& visit) {
    for_each_plane(point, [&](int64_t plane) { visit(plane, plane, point); });
  }
  static Stride2Turned turned();

  static constexpr int kPieces = 1, kPiece = kOut, kStep = 2;
  static constexpr int corner(int, int tap) {
    return tap / kTaps * Input::kWindow + tap % kTaps;
  }
  static constexpr int output(int, int i) {
    return i;
  }
};

struct Stride2Turned : Phases, Transformed<Phases::kPoints, Phases::kPoints, Phases::kPlanes> {
  static constexpr int kOut = 8;
  static constexpr float kEnergyRatio = 16384;

  // An output may read a single position.
  using Input = Square<Phase<false>::Input, 0, 4, Evenly<0, 1, 4>>;

  template <typename Load, typename Store>
  static inline __attribute__((always_inline)) void outputs(const Load& load, const Store& store) {
    Lanes all[kOut * kOut];
    for_each([&](auto down, auto across) __attribute__((always_inline)) {
      transform_tile<typename Phase<down>::Output, typename Phase<across>::Output>(
          [&](int i, int j) __attribute__((always_inline)) { return load(plane(down, across, i, j)); },
          [&](int i, int j, Lanes v)
              __attribute__((always_inline)) { all[(2 * i + !down) * kOut + 2 * j + !across] = v; });
    });
    // In a loop, for the code of what takes the outputs would be there 64 times.
#pragma GCC unroll 1
    for (int i = 0; i < kOut * kOut; ++i) {
      store(i, all[i]);
    }
  }

  template <typename Visit>
  static inline void for_each_product(int64_t point, const Visit& visit) {
    for_each_plane(point, [&](int64_t plane) { visit(point, plane, plane); });
  }

  // A piece a phase.
  static constexpr int kPieces = 4, kPiece = 4, kStep = 1;
  static constexpr int corner(int piece, int tap) {
    const int u = tap / kTaps, v = tap % kTaps;
    return u % 2 == piece / 2 && v % 2 == piece % 2 ? u / 2 * Input::kWindow + v / 2 : -1;
  }
  static constexpr int output(int piece, int i) {
    return (i / kPiece * 2 + 1 - piece / 2) * kOut + i % kPiece * 2 + 1 - piece % 2;
  }
};

inline Stride2Turned Stride2::turned() {
  return {};
}

// --- the transforms' range

// The largest sum of squares of a tile or of the weights. docs/convolution.md, "Range", derives what it and the forms'
// kEnergyRatio, the largest ratio of a tile's sum of squares to that of one of its blocks, promise.
constexpr float kMaxEnergy = 0x1p88f;

// The sums of squares of a tile, over channels: of the cells of its blocks, of which the inputs of every output hold
// one, and those of every tap of the weight gradient; and of the positions around them.
template <typename Side>
struct Energy {
  Lanes cell[Side::kCells] = {}, around = {};

  void operator+=(const Energy& other) {
    for (int i = 0; i < Side::kCells; ++i) {
      cell[i] = cell[i] + other.cell[i];
    }
    around = around + other.around;
  }
};

// Whether a tile is within the transforms' range: no value is infinite or NaN, and none so large that its rounding
// errors would show in outputs that do not read it. Blocks of zeros do not count, and with them those outside the
// image.
template <typename Side>
inline bool within_range(const Energy<Side>& energy, float ratio) {
  Lanes all = energy.around;
  for (int i = 0; i < Side::kCells; ++i) {
    all = all + energy.cell[i];
  }
  const auto half = [&](int b) {
    return b < Side::kBlocks ? half_folded(Side::block(energy.cell, b)) : _mm256_setzero_ps();
  };
  const __m128 infinite = _mm_set1_ps(std::numeric_limits<float>::infinity());
  __m128 least = infinite;
  for (int b = 0; b < Side::kBlocks; b += 4) {
    const __m128 blocks =
        fold(_mm256_hadd_ps(_mm256_hadd_ps(half(b), half(b + 1)), _mm256_hadd_ps(half(b + 2), half(b + 3))));
    least = _mm_min_ps(least, _mm_blendv_ps(blocks, infinite, _mm_cmpeq_ps(blocks, _mm_setzero_ps())));
  }
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ss(least, _mm_movehdup_ps(least));
  const float sum = horizontal_sum(all);
  return sum <= kMaxEnergy && sum <= ratio * _mm_cvtss_f32(least); // false for NaN
}

// --- weights

// to: kPlanes planes of [kColumns / kPanel][depth][kPanel], for output channels from ... from + kColumns - 1, of which
// the rows of inputs begin ... end - 1, multiples of kWidth, are written, the first of them first; what lies outside
// the kernel is zero. Returns the sum of squares of these weights.
template <typename Form>
inline float transform_weights(
    const Form& form,
    const Kernel& kernel,
    int64_t from,
    int64_t begin,
    int64_t end,
    float* to,
    int64_t plane,
    int64_t depth) {
  constexpr int taps = kTaps * kTaps;
  alignas(64) float gathered[kWidth * taps * kColumns];
  const int64_t high = high_vector(depth);
  Lanes energy{};
  // weight(half, i): tap i of outputs from + half ... and input c
  const auto transform = [&](int64_t c, const auto& weight) __attribute__((always_inline)) {
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      float* out = to + (c - begin) * kPanel + (half == 0 ? 0 : high);
      Lanes part{};
      form.weights(
          [&](int i) __attribute__((always_inline)) {
            const Lanes v = load(weight(half, i));
            part = multiply_add(v, v, part);
            return v;
          },
          [&](int i, Lanes v) __attribute__((always_inline)) { store(out + i * plane, v); });
      energy = energy + part;
    }
  };
  for (int64_t c0 = begin; c0 < end; c0 += kWidth) {
    if (kernel.is_packed()) {
      for (int64_t c = c0; c < c0 + kWidth; ++c) {
        transform(c, [&](int64_t half, int i) { return kernel.at(from + half, c) + kernel.tap[i]; });
      }
      continue;
    }
    gather_weights(kernel, from, c0, gathered);
    for (int64_t c = 0; c < kWidth; ++c) {
      transform(c0 + c, [&](int64_t half, int i) { return gathered + (c * taps + i) * kColumns + half; });
    }
  }
  return horizontal_sum(energy);
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
