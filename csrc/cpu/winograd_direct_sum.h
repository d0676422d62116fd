// The direct sum: the outputs of the tiles that are beyond the transforms' range (winograd_forms.h), tap by tap.
#pragma once

#include "winograd_tiles.h"
#include "workspace.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// The outputs of direct tiles for one column group.
template <typename Form>
class DirectSums {
public:
  // tiles [count], of which those that are not empty are summed. finite: that all of the group's weights are.
  void compute(const Kernel& kernel, int64_t from, bool finite, const DirectTile* tiles, int64_t count) {
    const int64_t direct = std::count_if(tiles, tiles + count, [](const DirectTile& t) { return !t.empty(); });
    place_.assign(direct > 0 ? count : 0, -1);
    if (direct == 0) {
      return;
    }
    gather(kernel, from);
    sums_.resize(direct * kTileOutputs * kColumns);
    int64_t next = 0;
    for (int64_t p = 0; p < count; ++p) {
      if (!tiles[p].empty()) {
        place_[p] = next++ * kTileOutputs * kColumns;
        for (int piece = 0; piece < Form::kPieces; ++piece) {
          for (int first = 0; first < kPieceOutputs; first += kTogether) {
            sum_outputs(tiles[p], kernel.inputs, finite, piece, first, sums_.data() + place_[p]);
          }
        }
      }
    }
  }

  // [outputs][kColumns], or null where the tile is transformed.
  const float* of(int64_t p) const {
    return place_.empty() || place_[p] < 0 ? nullptr : sums_.data() + place_[p];
  }

private:
  static constexpr int kTileOutputs = Form::kOut * Form::kOut, kPieceOutputs = Form::kPiece * Form::kPiece;
  // Outputs, whole rows of a piece's, that are summed in registers: two vectors of channels each.
  static constexpr int kTogether = Form::kPiece * (kRows >= 12 && Form::kPiece % 2 == 0 ? 2 : 1);

  void gather(const Kernel& kernel, int64_t from) {
    constexpr int taps = kTaps * kTaps;
    if (!weights_) {
      weights_.emplace(taps * kernel.inputs * kColumns);
    }
    alignas(64) float part[kWidth * taps * kColumns];
    for (int64_t c = 0; c < kernel.inputs; c += kWidth) {
      gather_weights(kernel, from, c, part);
      for (int64_t i = 0; i < std::min(kWidth, kernel.inputs - c); ++i) {
        for (int tap = 0; tap < taps; ++tap) {
          std::copy_n(
              part + (i * taps + tap) * kColumns,
              kColumns,
              weights_->data() + (tap * kernel.inputs + c + i) * kColumns);
        }
      }
    }
  }

  // Outputs first ... first + kTogether - 1 of a piece. Positions outside the image are zeros; a tap on one of them is
  // left out where weights are not finite, as an infinite weight times zero would be NaN.
  void sum_outputs(const DirectTile& tile, int64_t inputs, bool finite, int piece, int first, float* to) const {
    Lanes low[kTogether] = {}, high[kTogether] = {};
    const auto position = [](int i) {
      return (i / Form::kPiece * Form::Input::kWindow + i % Form::kPiece) * Form::kStep;
    };
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
      if (Form::corner(piece, tap) < 0) {
        continue;
      }
      const int corner = Form::corner(piece, tap) + position(first);
      const float* values = tile.values.data() + corner * inputs;
      const float* weights = weights_->data() + tap * inputs * kColumns;
      const auto sum = [&](const auto& each) __attribute__((always_inline)) {
        for (int64_t c = 0; c < inputs; ++c) {
          const float* w = weights + c * kColumns;
          const Lanes weights_low = load(w), weights_high = load(w + kWidth);
#pragma GCC unroll 8
          for (int i = 0; i < kTogether; ++i) {
            if (each(i)) {
              const Lanes value = broadcast(values[position(i) * inputs + c]);
              low[i] = multiply_add(value, weights_low, low[i]);
              high[i] = multiply_add(value, weights_high, high[i]);
            }
          }
        }
      };
      if (finite) {
        sum([](int) { return true; });
      } else {
        sum([&](int i) { return tile.has(corner + position(i)); });
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; ++i) {
      float* at = to + Form::output(piece, first + i) * kColumns;
      store(at, low[i]);
      store(at + kWidth, high[i]);
    }
  }

  std::optional<Workspace> weights_; // [tap][input channel][kColumns]
  std::vector<float> sums_;
  std::vector<int64_t> place_;
};

// Of a form that is the direct sum of all tiles.
struct NoSums {
  static const float* of(int64_t) {
    return nullptr;
  }
};
template <typename Form>
using SumsBeyond = std::conditional_t<Form::kTransforms, DirectSums<Form>, NoSums>;

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
