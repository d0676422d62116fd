// The tiles of an image: how threads share them, and how they are read, put through a prologue and transformed.
#pragma once

#include "prefetch.h"
#include "prologue.h"
#include "winograd_forms.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <limits>
#include <numeric>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// The tiles of [images, height, width] pixels, side x side each, in the order of memory. The last ones of a line or
// column may reach over the edge.
struct Tiles {
  int64_t images, height, width;
  int64_t side;

  int64_t down() const {
    return (height + side - 1) / side;
  }
  int64_t across() const {
    return (width + side - 1) / side;
  }
  int64_t count() const {
    return images * down() * across();
  }
  // Of a tile, inside the image.
  int64_t pixels_down(int64_t tile) const {
    return std::min(side, height - tile / across() % down() * side);
  }
  int64_t pixels_across(int64_t tile) const {
    return std::min(side, width - tile % across() * side);
  }
  // Pixels of tiles first ... first + count - 1.
  int64_t pixels(int64_t first, int64_t count) const {
    int64_t sum = 0;
    for (int64_t tile = first; tile < first + count; ++tile) {
      sum += pixels_down(tile) * pixels_across(tile);
    }
    return sum;
  }
};

// The tiles cut into shares, and each share into chunks. A slot is the place of a chunk; a last one may be empty.
struct Chunks {
  Tiles tiles;
  int64_t share; // tiles, the last share may have fewer
  int64_t size;  // tiles of a chunk

  int64_t in_share() const {
    return (share + size - 1) / size;
  }
  int64_t slots() const {
    return (tiles.count() + share - 1) / share * in_share();
  }
  int64_t first(int64_t slot) const {
    return slot / in_share() * share + slot % in_share() * size;
  }
  int64_t count(int64_t slot) const {
    const int64_t end = std::min(tiles.count(), (slot / in_share() + 1) * share);
    return std::clamp<int64_t>(end - first(slot), 0, size);
  }
  // Of every slot.
  std::vector<int64_t> outputs() const {
    std::vector<int64_t> found(slots());
    for (int64_t slot = 0; slot < slots(); ++slot) {
      found[slot] = tiles.pixels(first(slot), count(slot));
    }
    return found;
  }
};

// Prefetches the pixels of tiles first ... first + count - 1 of x [images, height, width, channels].
template <typename T>
void add_tiles(Prefetch& prefetch, const Tiles& tiles, const T* x, int64_t channels, int64_t first, int64_t count) {
  const int64_t across = tiles.across(), down = tiles.down();
  for (int64_t tile = first; tile < first + count;) {
    const int64_t line = tile / across, begin = tile % across, end = std::min(across, begin + first + count - tile);
    const int64_t top = line % down * tiles.side, left = begin * tiles.side;
    const int64_t right = std::min(tiles.width, end * tiles.side);
    for (int64_t y = top; y < std::min(tiles.height, top + tiles.side); ++y) {
      const int64_t pixel = (line / down * tiles.height + y) * tiles.width + left;
      prefetch.add(x + pixel * channels, (right - left) * channels * static_cast<int64_t>(sizeof(T)));
    }
    tile += end - begin;
  }
}

// A tile that is beyond the transforms' range, for the direct sum: its inputs [position][channel], and a bit for each
// position inside the image. Empty for the tiles that are transformed.
struct DirectTile {
  std::vector<float> values;
  std::bitset<81> inside{};

  bool empty() const {
    return values.empty();
  }
  bool has(int position) const {
    return inside[position];
  }
};

// Whether no pixel of a tile, other than zeros, is further below all of them than a block may be.
inline bool even(const DirectTile& tile, int64_t channels, float ratio) {
  float all = 0.0f, least = std::numeric_limits<float>::infinity();
  for (auto pixel = tile.values.begin(); pixel != tile.values.end(); pixel += channels) {
    const float energy = std::inner_product(pixel, pixel + channels, pixel, 0.0f);
    all += energy;
    least = energy == 0.0f ? least : std::min(least, energy);
  }
  return all <= ratio * least;
}

// The Size x Size positions that are read of a tile: a pointer to each of its rows, of which those outside the image
// point to zeros, and whether its first or last column lies outside.
template <typename T, int Size>
struct Window {
  std::array<const T*, Size> row;
  bool left_out, right_out;
  int64_t inside; // columns from the first one inside on
};

// Transforms channels c ... c + count - 1 of a tile, and adds their sums of squares to `energy`. inside(x): whether
// column x lies inside the image.
template <typename Side, typename From, typename Count, typename Inside>
inline __attribute__((always_inline)) void transform_vector(
    const Window<From, Side::kWindow>& window,
    int64_t channels,
    int64_t c,
    Count count,
    const Inside& inside,
    float* to,
    int64_t plane,
    Energy<Side>& energy) {
  const auto rows = window.row;
  const int64_t out = window.left_out ? 1 : 0;
  Energy<Side> part;
  Side::transform(
      [&](int y, int x) __attribute__((always_inline)) {
        if (!inside(x)) {
          return Lanes{};
        }
        const Lanes v = load_counted(rows[y] + (x - out) * channels + c, count);
        const int cell = Side::cell(y, x);
        Lanes& sum = cell >= 0 ? part.cell[cell] : part.around;
        sum = multiply_add(v, v, sum);
        return v;
      },
      [&](int i, Lanes v) __attribute__((always_inline)) { store(to + i * plane, v); });
  energy += part;
}

// Transforms a tile, of which channel c goes to place(c) within each plane; returns whether it is within the
// transform's range, of energies of such a ratio.
template <typename Side, typename From, typename Place>
bool transform_window(
    const Window<From, Side::kWindow>& window,
    int64_t channels,
    float ratio,
    float* to,
    int64_t plane,
    const Place& place) {
  constexpr int last = Side::kWindow - 1;
  Energy<Side> energy;
  const int64_t first = window.left_out ? 1 : 0, whole = channels / kWidth * kWidth;
  const auto in_columns = [&](int64_t x) { return x >= first && x < window.inside; };
  const auto vectors = [&](const auto& inside) {
    for (int64_t c = 0; c < whole; c += kWidth) {
      const std::integral_constant<int64_t, kWidth> count;
      transform_vector(window, channels, c, count, inside, to + place(c), plane, energy);
    }
  };
  const auto with_edges = [&](auto left, auto right) {
    vectors([](int x) { return !(decltype(left)::value && x == 0) && !(decltype(right)::value && x == last); });
  };
  if (window.right_out && window.inside != last) {
    vectors(in_columns); // the last tile of a line whose width is no multiple of kPitch
  } else if (window.left_out) {
    window.right_out ? with_edges(std::true_type(), std::true_type()) : with_edges(std::true_type(), std::false_type());
  } else {
    window.right_out ? with_edges(std::false_type(), std::true_type())
                     : with_edges(std::false_type(), std::false_type());
  }
  if (whole < channels) {
    transform_vector(window, channels, whole, channels - whole, in_columns, to + place(whole), plane, energy);
  }
  return within_range(energy, ratio);
}

// Transforms the tiles of x [images, height, width, channels], or of x behind a prologue: that is computed a line of
// tiles at a time, into a buffer of this object's, and those of its lines of pixels that the next line of tiles reads
// as well serve that. `Side` is what winograd_forms.h has to be read of a tile. One object a thread.
template <typename Side, typename T>
class TileReader {
public:
  static constexpr int kSize = Side::kWindow, kBefore = Side::kBefore, kPitch = Side::kPitch;
  static constexpr bool kTransforms = true;

  TileReader(const Tiles& tiles, float ratio, const T* x, int64_t channels, const Prologue<T>* prologue = nullptr)
      : tiles_(tiles), ratio_(ratio), x_(x), channels_(channels), prologue_(prologue) {
    // A margin of kBefore on the left, and up to the last tile's end on the right, is never written to and stays zero.
    const int64_t width = tiles.across() * kPitch + kSize - kPitch;
    line_ = width * channels;
    buffer_.assign(prologue != nullptr ? kSize * line_ : 0, 0.0f);
    zeros_.assign(prologue != nullptr ? 0 : kSize * channels, T(0.0f));
  }

  // Tiles first ... first + count - 1. place.of(p)(c) is where channel c of the p-th of them goes within a plane; lanes
  // past the last channel become zero. Calls beyond(p) for those outside the transform's range.
  template <typename Place, typename Beyond>
  void transform(int64_t first, int64_t count, float* to, int64_t plane, const Place& place, const Beyond& beyond) {
    const int64_t across = tiles_.across();
    for (int64_t p = 0; p < count;) {
      const int64_t line = (first + p) / across, begin = (first + p) % across;
      const int64_t end = std::min(across, begin + count - p);
      if (prologue_ != nullptr) {
        activate(line, begin, end);
      }
      for (int64_t column = begin; column < end; ++column, ++p) {
        const auto within = [&](const auto& window) {
          return transform_window<Side>(window, channels_, ratio_, to, plane, place.of(p));
        };
        const bool in_range = prologue_ != nullptr ? within(activated(line, column)) : within(in_place(line, column));
        if (!in_range) {
          beyond(p);
        }
      }
    }
  }

  // A tile before the transform.
  DirectTile read(int64_t tile) {
    const int64_t line = tile / tiles_.across(), column = tile % tiles_.across();
    if (prologue_ != nullptr) {
      activate(line, column, column + 1);
      return copied(activated(line, column), line, column);
    }
    return copied(in_place(line, column), line, column);
  }

private:
  // The line of pixels that is the i-th of a line of tiles; lines of tiles are numbered through all images.
  int64_t pixel_line(int64_t line, int64_t i) const {
    return line % tiles_.down() * kPitch - kBefore + i;
  }

  // Where a line of pixels lies in the buffer.
  int64_t slot(int64_t pixel_line) const {
    return (pixel_line + kBefore) % kSize * line_;
  }

  Window<float, kSize> activated(int64_t line, int64_t column) const {
    Window<float, kSize> window{{}, false, false, kSize};
    for (int64_t i = 0; i < kSize; ++i) {
      window.row[i] = buffer_.data() + slot(pixel_line(line, i)) + column * kPitch * channels_;
    }
    return window;
  }

  Window<T, kSize> in_place(int64_t line, int64_t column) const {
    const int64_t image = line / tiles_.down(), left = column * kPitch - kBefore;
    Window<T, kSize> window{{}, left<0, left + kSize> tiles_.width, std::min<int64_t>(kSize, tiles_.width - left)};
    for (int64_t i = 0; i < kSize; ++i) {
      const int64_t y = pixel_line(line, i);
      const bool inside = y >= 0 && y < tiles_.height;
      // The column outside is not read; its address stays inside the tensor.
      const int64_t from = window.left_out ? 0 : left;
      const T* row = inside ? x_ + ((image * tiles_.height + y) * tiles_.width + from) * channels_ : zeros_.data();
      window.row[i] = row;
    }
    return window;
  }

  template <typename From>
  DirectTile copied(const Window<From, kSize>& window, int64_t line, int64_t column) const {
    DirectTile tile{std::vector<float>(kSize * kSize * channels_)};
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        const int64_t y = pixel_line(line, i), x = column * kPitch - kBefore + j;
        if (y >= 0 && y < tiles_.height && x >= 0 && x < tiles_.width) {
          tile.inside.set(i * kSize + j);
          const From* from = window.row[i] + (j - window.left_out) * channels_;
          std::copy(from, from + channels_, tile.values.data() + (i * kSize + j) * channels_);
        }
      }
    }
    return tile;
  }

  // Fills the buffer for tiles begin ... end - 1 of a line.
  void activate(int64_t line, int64_t begin, int64_t end) {
    const bool follows = line == line_filled_ + 1 && line % tiles_.down() != 0 && begin >= begin_ && end <= end_;
    const int64_t left = std::max<int64_t>(0, begin * kPitch - kBefore);
    const int64_t right = std::min(tiles_.width, end * kPitch + kSize - kPitch - kBefore);
    for (int64_t i = follows ? kSize - kPitch : 0; i < kSize; ++i) {
      const int64_t y = pixel_line(line, i);
      float* to = buffer_.data() + slot(y) + (left + kBefore) * channels_;
      if (y < 0 || y >= tiles_.height) {
        std::fill_n(to, (right - left) * channels_, 0.0f);
        continue;
      }
      run_prologue(*prologue_, (line / tiles_.down() * tiles_.height + y) * tiles_.width + left, right - left, to);
    }
    line_filled_ = line;
    begin_ = begin;
    end_ = end;
  }

  Tiles tiles_;
  float ratio_;
  const T* x_;
  int64_t channels_;
  const Prologue<T>* prologue_;
  int64_t line_;              // floats of a line of pixels in the buffer
  std::vector<float> buffer_; // kSize lines of pixels
  std::vector<T> zeros_;      // without a prologue, for one line of a tile
  int64_t line_filled_ = -2, begin_ = 0, end_ = 0;
};

// The input of a convolution: [images, height, width, channels], with a prologue or without.
template <typename T>
struct Source {
  int64_t images, height, width;
  const T* data;
  const Prologue<T>* prologue = nullptr;

  template <typename Side>
  Tiles tiles() const {
    return {images, height, width, Side::kPitch};
  }

  template <typename F>
  void for_each_read(const F& f) const {
    if (prologue != nullptr) {
      prologue->for_each_read(f);
    } else {
      f(data);
    }
  }
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
