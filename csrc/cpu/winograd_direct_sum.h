// The direct sum: the outputs of the tiles that are beyond the transforms' range (winograd_transforms.h), tap by tap.
#pragma once

#include "winograd_tiles.h"

#include <algorithm>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// The outputs of direct tiles for one column group.
class DirectSums {
public:
  // tiles [count], of which those that are not empty are summed.
  void compute(const Kernel& kernel, int64_t from, const DirectTile* tiles, int64_t count) {
    const int64_t direct = std::count_if(tiles, tiles + count, [](const DirectTile& t) { return !t.empty(); });
    place_.assign(direct > 0 ? count : 0, -1);
    if (direct == 0) {
      return;
    }
    constexpr int64_t part = kWidth * kTaps * kTaps * kColumns;
    weights_.resize(round_up(kernel.inputs, kWidth) / kWidth * part);
    for (int64_t c = 0; c < kernel.inputs; c += kWidth) {
      gather_weights(kernel, from, c, weights_.data() + c / kWidth * part);
    }
    sums_.resize(direct * kOut * kOut * kColumns);
    int64_t next = 0;
    for (int64_t p = 0; p < count; ++p) {
      if (!tiles[p].empty()) {
        place_[p] = next++ * kOut * kOut * kColumns;
        for (int64_t c = 0; c < kColumns; c += kWidth) {
          sum_rows<0>(tiles[p], kernel.inputs, c, sums_.data() + place_[p]);
          sum_rows<kOut / 2>(tiles[p], kernel.inputs, c, sums_.data() + place_[p]);
        }
      }
    }
  }

  // [16 outputs][kColumns], or null where the tile is transformed.
  const float* of(int64_t p) const {
    return place_.empty() || place_[p] < 0 ? nullptr : sums_.data() + place_[p];
  }

private:
  // Output rows First and First + 1, a vector of channels from `column` on: each input is read once, and goes to the
  // outputs that it is under. Taps outside the image are left out, as an infinite weight times zero would be NaN.
  template <int First>
  void sum_rows(const DirectTile& tile, int64_t inputs, int64_t column, float* to) const {
    constexpr int height = kOut / 2;
    Lanes sums[height * kOut] = {};
    for (int64_t c = 0; c < inputs; ++c) {
      const float* w = weights_.data() + c * kTaps * kTaps * kColumns + column;
#pragma GCC unroll 4
      for (int y = 0; y < height + kTaps - 1; ++y) {
#pragma GCC unroll 6
        for (int x = 0; x < kIn; ++x) {
          const int position = (First + y) * kIn + x;
          if (!tile.has(position)) {
            continue;
          }
          const Lanes value = broadcast(tile.values[position * inputs + c]);
#pragma GCC unroll 3
          for (int u = 0; u < kTaps; ++u) {
#pragma GCC unroll 3
            for (int v = 0; v < kTaps; ++v) {
              const int i = y - u, j = x - v;
              if (i >= 0 && i < height && j >= 0 && j < kOut) {
                sums[i * kOut + j] = multiply_add(value, load(w + (u * kTaps + v) * kColumns), sums[i * kOut + j]);
              }
            }
          }
        }
      }
    }
    for (int i = 0; i < height * kOut; ++i) {
      store(to + (First * kOut + i) * kColumns + column, sums[i]);
    }
  }

  std::vector<float> weights_; // [input channel][tap][kColumns]
  std::vector<float> sums_;
  std::vector<int64_t> place_;
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
