// How grouped convolutions lie in memory: units of whole vectors of channels, chunks of images with the padding around
// them, and packed weights.
//
// Vectors have eight lanes with AVX-512 too: most groups have no more channels.
#pragma once

#include "simd.h"
#include "workspace.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

using conv::Workspace;

constexpr int64_t kLanes = 8;
// Channels of a panel.
constexpr int64_t kPanelLanes = 4 * kLanes, kDepthwiseLanes = 8 * kLanes;
using Octet = __m256;

inline Octet load8(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Octet load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store8(float* p, Octet v) {
  _mm256_storeu_ps(p, v);
}
inline void store8(BFloat16* p, Octet v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bits = _mm256_castsi256_si128(at::vec::cvtfp32_bf16(_mm512_castps256_ps512(v)));
#else
  const __m128i bits = at::vec::cvtfp32_bf16(v);
#endif
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
// Lanes from `count` on are zero.
template <typename T>
inline Octet load8(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::copy(p, p + count, lanes);
  return load8(lanes);
}
template <typename T>
inline void store8(T* p, Octet v, int64_t count) {
  T lanes[kLanes];
  store8(lanes, v);
  std::copy(lanes, lanes + count, p);
}

template <typename T>
[[gnu::always_inline]] inline void write(T* p, Octet v, int64_t lanes) {
  if (lanes == kLanes) [[likely]] {
    store8(p, v);
  } else {
    store8(p, v, lanes);
  }
}

// The sum of zero times each of some values: not zero where one of them is not finite.
struct Seen {
  Octet sum = _mm256_setzero_ps();

  void add(Octet v) {
    sum = _mm256_fmadd_ps(v, _mm256_setzero_ps(), sum);
  }
  bool are_finite() const {
    return _mm256_movemask_ps(_mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0;
  }
};

// What a lane of a vector sums: its own channel; four channels, the vector being two groups of four; eight channels at
// a time, all of one group.
enum class Kind { depthwise, pairs, dense };

// A grouped convolution with padding of half its kernel. A unit is the least that fills vectors: eight groups of one
// channel, two of four, or one group.
struct Shape {
  int64_t images, height, width; // of x
  int64_t channels, outputs;     // of x and of y
  int64_t group_inputs, group_outputs;
  int64_t kernel, stride;

  bool is_served() const {
    const bool narrow = group_inputs == group_outputs && (group_inputs == 1 || group_inputs == 4);
    const bool whole = group_inputs % kLanes == 0 && group_outputs % kLanes == 0;
    return (kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2) &&
        (narrow || (whole && group_inputs > 0 && group_outputs > 0));
  }
  int64_t out_height() const {
    return (height + stride - 1) / stride;
  }
  int64_t out_width() const {
    return (width + stride - 1) / stride;
  }
  int64_t taps() const {
    return kernel * kernel;
  }
  Kind kind() const {
    return group_inputs == 1 ? Kind::depthwise : group_inputs == 4 ? Kind::pairs : Kind::dense;
  }
  // Channels of a unit, and those that a lane sums at a time.
  int64_t unit_inputs() const {
    return std::max(kLanes, group_inputs);
  }
  int64_t unit_outputs() const {
    return std::max(kLanes, group_outputs);
  }
  int64_t depth() const {
    return std::min(kLanes, group_inputs);
  }
  int64_t units() const {
    return (channels + unit_inputs() - 1) / unit_inputs();
  }
  int64_t unit_weights() const {
    return unit_inputs() * unit_outputs() / kLanes * depth() * taps();
  }
  // Units that are computed together, so that what is read of a pixel is whole lines of the cache.
  int64_t panel_units() const {
    const int64_t lanes = kind() == Kind::depthwise ? kDepthwiseLanes : kPanelLanes;
    return std::clamp<int64_t>(lanes / std::max(unit_inputs(), unit_outputs()), 1, units());
  }
  int64_t panels() const {
    return (units() + panel_units() - 1) / panel_units();
  }
};

// Images in channels_last.
template <typename T>
struct Images {
  T* data;
  int64_t height, width, channels;

  T* at(int64_t image, int64_t row, int64_t column) const {
    return data + ((image * height + row) * width + column) * channels;
  }
};

// Rows of outputs, of one image where they are not all of its rows.
struct Chunk {
  int64_t image, images, row, rows;
};

// A tap: how far what it multiplies lies from the first element under the kernel, in pixels of the padded input, and
// which of the weights it is.
struct Tap {
  int64_t row, column, weight;
};

// Outputs that are sums of the same taps: every `step`-th row and column of the result, from `row` and `column` on. The
// taps are rows of `tap_columns`, each a row of the input below the one before.
struct Phase {
  int64_t row, column, step, tap_columns;
  std::vector<Tap> taps;

  // Outputs of the phase among `size`, the first of which is `first`; and rows of them in a chunk.
  int64_t count(int64_t size, int64_t first) const {
    return std::max<int64_t>(0, (size - first + step - 1) / step);
  }
  int64_t rows_of(const Chunk& chunk, int64_t height) const {
    return std::max<int64_t>(0, std::min(chunk.rows, count(height, row) - chunk.row));
  }
};

// A convolution in one direction: y out of x, or dx out of dy.
struct Direction {
  int64_t stride; // pixels of the input between those of neighbouring outputs of a phase
  int64_t before; // padding above and left of the input
  int64_t span;   // rows under the kernel
  std::vector<Phase> phases;
};

inline Direction forwards(const Shape& s) {
  Phase all{0, 0, 1, s.kernel, {}};
  for (int64_t u = 0; u < s.kernel; ++u) {
    for (int64_t v = 0; v < s.kernel; ++v) {
      all.taps.push_back({u, v, u * s.kernel + v});
    }
  }
  return {s.stride, s.kernel / 2, s.kernel, {all}};
}

// dx[a + stride * q] = sum over the taps u for which a + padding - u is a multiple of the stride of
// w[u] * dy[q + (a + padding - u) / stride], and so for columns.
inline Direction backwards(const Shape& s) {
  const int64_t padding = s.kernel / 2, before = padding / s.stride;
  Direction found{1, before, before + (s.stride - 1 + padding) / s.stride + 1, {}};
  const auto offset = [&](int64_t phase, int64_t tap) { return before + (phase + padding - tap) / s.stride; };
  // From the last tap on, whose input is the first.
  const auto last = [&](int64_t phase) {
    return s.kernel - 1 - (s.kernel - 1 - (phase + padding) % s.stride) % s.stride;
  };
  for (int64_t a = 0; a < s.stride; ++a) {
    for (int64_t b = 0; b < s.stride; ++b) {
      Phase phase{a, b, s.stride, last(b) / s.stride + 1, {}};
      for (int64_t u = last(a); u >= 0; u -= s.stride) {
        for (int64_t v = last(b); v >= 0; v -= s.stride) {
          phase.taps.push_back({offset(a, u), offset(b, v), u * s.kernel + v});
        }
      }
      found.phases.push_back(phase);
    }
  }
  return found;
}

// Outputs cut into chunks whose inputs fit a share of the cache, whatever the number of threads.
class Chunks {
public:
  // row_bytes: of the padded input that a row of outputs adds; border: rows beyond.
  Chunks(int64_t images, int64_t rows, int64_t row_bytes, int64_t border, int64_t cache, int64_t panels)
      : images_(images), rows_(rows) {
    const int64_t most = std::max<int64_t>(1, cache / row_bytes);
    if (most < rows + border) {
      strips_ = (rows + std::max<int64_t>(2, most - border) - 1) / std::max<int64_t>(2, most - border);
      // An even number, for tiles have two rows.
      strip_rows_ = ((rows + strips_ - 1) / strips_ + 1) / 2 * 2;
      strips_ = (rows + strip_rows_ - 1) / strip_rows_;
    } else {
      strip_rows_ = rows;
      constexpr int64_t kTasks = 16; // for any processor with few images
      together_ = std::clamp<int64_t>(images * panels / kTasks, 1, most / (rows + border));
    }
  }

  int64_t count() const {
    return (images_ + together_ - 1) / together_ * strips_;
  }
  Chunk operator[](int64_t i) const {
    const int64_t image = i / strips_ * together_, row = i % strips_ * strip_rows_;
    return {image, std::min(together_, images_ - image), row, std::min(strip_rows_, rows_ - row)};
  }

private:
  int64_t images_, rows_, strips_ = 1, strip_rows_ = 1, together_ = 1;
};

// A chunk's input, as float32 and with zeros around it: [images][blocks][rows][columns][kLanes].
struct Padded {
  int64_t rows, columns, blocks;
  float* data;

  int64_t row() const {
    return columns * kLanes;
  }
  int64_t block() const {
    return rows * row();
  }
  int64_t image() const {
    return blocks * block();
  }
};

// Reads channels first ... first + count - 1 of the chunk's images; row 0 of `to` is row `top` of an image, and column
// 0 column -before. Returns whether all of them are finite, where it is asked for.
template <bool kAsk, typename T>
bool read_padded(
    const Images<const T>& from,
    const Chunk& chunk,
    int64_t top,
    int64_t before,
    int64_t first,
    int64_t count,
    const Padded& to) {
  const int64_t columns = std::min(from.width, to.columns - before), behind = to.columns - before - columns;
  Seen seen;
  for (int64_t image = 0; image < chunk.images; ++image) {
    for (int64_t row = 0; row < to.rows; ++row) {
      float* at = to.data + image * to.image() + row * to.row();
      const int64_t source = top + row;
      if (source < 0 || source >= from.height) {
        for (int64_t block = 0; block < to.blocks; ++block) {
          std::fill_n(at + block * to.block(), to.row(), 0.0f);
        }
        continue;
      }
      for (int64_t block = 0; block < to.blocks; ++block) {
        std::fill_n(at + block * to.block(), before * kLanes, 0.0f);
        std::fill_n(at + block * to.block() + (before + columns) * kLanes, behind * kLanes, 0.0f);
      }
      const T* pixels = from.at(chunk.image + image, source, 0) + first;
      at += before * kLanes;
      const auto read = [&](int64_t block, auto blocks, auto load) {
        for (int64_t column = 0; column < columns; ++column) {
          for (int64_t i = 0; i < blocks; ++i) {
            const Octet v = load(pixels + column * from.channels + (block + i) * kLanes);
            if constexpr (kAsk) {
              seen.add(v);
            }
            store8(at + (block + i) * to.block() + column * kLanes, v);
          }
        }
      };
      // Pixel by pixel, so that memory is read in its order.
      constexpr std::integral_constant<int64_t, 4> four;
      constexpr std::integral_constant<int64_t, 1> one;
      const auto whole = [](const T* p) { return load8(p); };
      int64_t block = 0;
      for (; block + four <= count / kLanes; block += four) {
        read(block, four, whole);
      }
      for (; block < count / kLanes; ++block) {
        read(block, one, whole);
      }
      if (const int64_t lanes = count % kLanes; lanes > 0) {
        read(block, one, [lanes](const T* p) { return load8(p, lanes); });
      }
    }
  }
  return seen.are_finite();
}

// Weights [outputs][group inputs][kernel][kernel] of any strides.
template <typename T>
struct Weights {
  T* data;
  int64_t output, input, tap; // strides; rows and columns of taps are adjacent
};

// Where the lanes of a vector of weights lie: those of its second half `jump` further.
template <typename T>
struct LaneWeights {
  T* data;
  int64_t step, jump, lanes;

  T& at(int64_t lane, int64_t offset) const {
    return data[lane * step + (lane < kLanes / 2 ? 0 : jump) + offset];
  }
};

// The weights of `other`, counted within its group, and of a unit's lanes from `first` on: channels of x where
// `turned`, and else of y.
template <typename T>
LaneWeights<T> lane_weights(
    const Shape& s,
    const Weights<T>& w,
    int64_t unit,
    bool turned,
    int64_t first,
    int64_t other) {
  const int64_t output = unit * s.unit_outputs(), lanes = std::min(kLanes, s.outputs - output);
  if (s.kind() == Kind::depthwise) {
    return {w.data + output * w.output, w.output, 0, lanes};
  }
  if (!turned) {
    return {w.data + (output + first) * w.output + other * w.input, w.output, 0, lanes};
  }
  const int64_t jump = s.kind() == Kind::pairs ? kLanes / 2 * (w.output - w.input) : 0;
  return {w.data + (output + other) * w.output + first * w.input, w.input, jump, lanes};
}

// Packed for one direction: [vectors of outputs][blocks of eight inputs][tap][depth][lanes of `vectors` vectors]. Two
// vectors lie side by side where there are as many.
inline int64_t vectors_at(int64_t vector, int64_t all) {
  return vector + 1 < all ? 2 : 1;
}

// Packs one unit; returns whether all weights are finite. Turned: the inputs are y's channels, and the outputs x's.
inline bool pack_unit(const Shape& s, const Weights<const float>& w, int64_t unit, bool turned, float* to) {
  const int64_t inputs = turned ? s.unit_outputs() : s.unit_inputs();
  const int64_t outputs = turned ? s.unit_inputs() : s.unit_outputs();
  const int64_t vectors = outputs / kLanes, blocks = inputs / kLanes, depth = s.depth(), taps = s.taps();
  Seen seen;
  for (int64_t vector = 0, together; vector < vectors; vector += together) {
    together = vectors_at(vector, vectors);
    const int64_t step = depth * together * kLanes;
    for (int64_t input = 0; input < blocks * depth; ++input) {
      float* of_input = to + (input / depth * taps * depth + input % depth) * together * kLanes;
      for (int64_t part = 0; part < together; ++part) {
        const LaneWeights<const float> from = lane_weights(s, w, unit, turned, (vector + part) * kLanes, input);
        const auto pack = [&](auto load) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            const Octet v = load(tap * w.tap);
            seen.add(v);
            store8(of_input + tap * step + part * kLanes, v);
          }
        };
        if (from.lanes < kLanes) {
          pack([&](int64_t at) {
            float lanes[kLanes] = {};
            for (int64_t lane = 0; lane < from.lanes; ++lane) {
              lanes[lane] = from.at(lane, at);
            }
            return load8(lanes);
          });
        } else if (from.step == 1 && from.jump == 0) {
          pack([&](int64_t at) { return load8(from.data + at); });
        } else {
          pack([&](int64_t at) {
            const auto of = [&](int64_t lane) { return from.at(lane, at); };
            return _mm256_setr_ps(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
          });
        }
      }
    }
    to += blocks * taps * step;
  }
  return seen.are_finite();
}

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
