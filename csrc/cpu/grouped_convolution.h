// One direction of a convolution in groups, from inputs to outputs: chunks and panels, packed weights, and what sums
// the outputs of each.
#pragma once

#include "caches.h"
#include "grouped_depthwise.h"
#include "grouped_sums.h"

#include <algorithm>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {

struct Panel {
  int64_t first, units; // units

  static Panel of(const Shape& s, int64_t panel) {
    const int64_t first = panel * s.panel_units();
    return {first, std::min(s.panel_units(), s.units() - first)};
  }
};

inline Chunks chunks_of(const Shape& s) {
  const int64_t channels = s.panel_units() * std::max(s.unit_inputs(), s.unit_outputs());
  const int64_t row_bytes = (s.width + 2 * s.kernel) * s.stride * channels * static_cast<int64_t>(sizeof(float));
  return {s.images, s.out_height(), row_bytes, s.kernel - 1, Caches::of_machine().l2 / 3, s.panels()};
}

// f(chunk, panel, part) for all pairs, `parts` contiguous parts of the chunks at a time. A thread goes through the
// panels of a chunk one after the other.
template <typename F>
void for_each_task(const Chunks& chunks, int64_t panels, int64_t parts, const F& f) {
  parallel_for(0, parts * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin / panels; part * panels < end; ++part) {
      const int64_t first = std::max(begin - part * panels, int64_t(0)), last = std::min(end - part * panels, panels);
      for (int64_t chunk = chunks.count() * part / parts; chunk < chunks.count() * (part + 1) / parts; ++chunk) {
        for (int64_t panel = first; panel < last; ++panel) {
          f(chunks[chunk], chunk, panel, part);
        }
      }
    }
  });
}

// f(unit) for all units, where what f does is work on its weights.
template <typename F>
void for_each_unit(const Shape& s, const F& f) {
  constexpr int64_t kThreadWeights = 8 * 1024; // that are worth a thread's start
  parallel_for(0, s.units(), std::max<int64_t>(1, kThreadWeights / s.unit_weights()), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      f(unit);
    }
  });
}

// --- outputs

// Weights of all units as one direction reads them.
class PackedWeights {
public:
  PackedWeights(const Shape& s, const Weights<const float>& w, bool turned)
      : size_(s.unit_weights()), finite_(s.units()), data_(s.units() * size_) {
    for_each_unit(s, [&](int64_t unit) { finite_[unit] = pack_unit(s, w, unit, turned, data_.data() + unit * size_); });
  }

  const float* of(int64_t unit) const {
    return data_.data() + unit * size_;
  }
  bool are_finite(int64_t unit) const {
    return finite_[unit];
  }

private:
  int64_t size_;
  std::vector<char> finite_;
  Workspace data_;
};

// One direction of a convolution, from padded inputs to outputs.
template <typename T>
class Convolution {
public:
  Convolution(const Shape& s, const Weights<const float>& weights, bool turned)
      : shape_(s),
        turned_(turned),
        direction_(turned ? backwards(s) : forwards(s)),
        weights_(s, weights, turned),
        inputs_(turned ? s.unit_outputs() : s.unit_inputs()),
        outputs_(turned ? s.unit_inputs() : s.unit_outputs()) {
    const int64_t vectors = outputs_ / kLanes, rows = s.out_height(), columns = s.out_width();
    single_ = tile_for(kSingle, 1, rows, columns);
    double_ = vectors > 1 ? tile_for(kDouble, 2, rows, columns) : single_;
    if (vectors > 1 && vectors % 2 == 0) {
      single_ = double_;
    }
  }

  int64_t before() const {
    return direction_.before;
  }
  int64_t top(const Chunk& chunk) const {
    return chunk.row * direction_.stride - direction_.before;
  }
  // What the tiles of a chunk read.
  Padded padded(int64_t rows, int64_t units, float* data) const {
    const auto extent = [&](int64_t count, int64_t one, int64_t other) {
      return (std::max(conv::round_up(count, one), conv::round_up(count, other)) - 1) * direction_.stride +
          direction_.span;
    };
    return {
        extent(rows, single_.rows, double_.rows),
        extent(shape_.out_width(), single_.columns, double_.columns),
        units * inputs_ / kLanes,
        data};
  }

  // The outputs of a chunk and a panel, whose inputs `in` has.
  void run(const Chunk& chunk, const Panel& panel, const Padded& in, const Images<T>& out) const {
    for (int64_t i = 0; i < panel.units; ++i) {
      const int64_t unit = panel.first + i, vectors = outputs_ / kLanes;
      const float* weights = weights_.of(unit);
      for (int64_t vector = 0, together; vector < vectors; vector += together) {
        together = vectors_at(vector, vectors);
        for (const Phase& phase : direction_.phases) {
          const Part part{chunk, phase, weights, unit * outputs_ + vector * kLanes, i * inputs_ / kLanes, unit};
          if (shape_.kind() == Kind::pairs) {
            run_part<Kind::pairs, 1, kSingle>(part, in, out);
          } else if (together == 1) {
            run_part<Kind::dense, 1, kSingle>(part, in, out);
          } else {
            run_part<Kind::dense, 2, kDouble>(part, in, out);
          }
        }
        weights += inputs_ / kLanes * shape_.taps() * shape_.depth() * together * kLanes;
      }
    }
  }

  // The same of a depthwise convolution, whose inputs are read where they are.
  void run(const Chunk& chunk, const Panel& panel, const Images<const T>& in, const Images<T>& out) const {
    const int64_t channel = panel.first * kLanes, before = direction_.before;
    for (const Phase& phase : direction_.phases) {
      const Tap& first = phase.taps.front();
      const int64_t row = top(chunk) + first.row, column = first.column - before;
      for (int64_t image = chunk.image; image < chunk.image + chunk.images; ++image) {
        const DepthwiseTask<T> task{
            in.at(image, row, column) + channel,
            in.width * in.channels,
            in.channels,
            -row,
            in.height - row,
            -column,
            in.width - column,
            phase.taps.data(),
            static_cast<int64_t>(phase.taps.size()) / phase.tap_columns,
            weights_.of(panel.first),
            shape_.unit_weights(),
            out.at(image, phase.row + phase.step * chunk.row, phase.column) + channel,
            phase.step * out.width * out.channels,
            phase.step * out.channels,
            phase.rows_of(chunk, out.height),
            phase.count(out.width, phase.column),
            std::min(panel.units * kLanes, out.channels - channel)};
        sum_depthwise(task, phase.tap_columns, direction_.stride);
      }
    }
  }

private:
  struct Part {
    const Chunk& chunk;
    const Phase& phase;
    const float* weights;
    int64_t channel; // of the outputs
    int64_t block;   // of the padded input
    int64_t unit;
  };

  template <Kind kKind, int kVectors, const auto& kTiles>
  void run_part(const Part& part, const Padded& in, const Images<T>& out) const {
    const Phase& phase = part.phase;
    const int64_t tap_weights = shape_.depth() * kVectors * kLanes, step = phase.step;
    Offset offsets[7 * 7];
    for (size_t i = 0; i < phase.taps.size(); ++i) {
      const Tap& tap = phase.taps[i];
      offsets[i] = {(tap.row * in.columns + tap.column) * kLanes, tap.weight * tap_weights};
    }
    const int64_t rows = phase.rows_of(part.chunk, out.height);
    const Operands operands{
        in.row(),
        inputs_ / kLanes,
        in.block(),
        shape_.taps() * tap_weights,
        offsets,
        static_cast<int64_t>(phase.taps.size())};
    const bool finite = weights_.are_finite(part.unit);
    const Summing<T> sum = summing_of<T, kKind, kVectors, kTiles>(kVectors == 1 ? single_ : double_, direction_.stride);
    for (int64_t image = 0; image < part.chunk.images; ++image) {
      const Task<T> task{
          operands,
          in.data + image * in.image() + part.block * in.block(),
          part.weights,
          rows,
          phase.count(out.width, phase.column),
          out.at(part.chunk.image + image, phase.row + step * part.chunk.row, phase.column) + part.channel,
          step * out.width * out.channels,
          step * out.channels,
          std::min(kLanes, out.channels - part.channel),
          -top(part.chunk),
          input_height() - top(part.chunk),
          phase.taps.front().row,
          phase.tap_columns};
      if (finite) {
        sum(task);
      } else {
        sum_inside<kKind, kVectors>(part, task);
      }
    }
  }

  template <Kind kKind, int kVectors>
  [[gnu::noinline]] void sum_inside(const Part& part, const Task<T>& task) const {
    const int64_t width = turned_ ? shape_.out_width() : shape_.width;
    sum_phase_inside<T, kKind, kVectors>(task, direction_.stride, part.phase.taps, [&](int64_t row, int64_t column) {
      const int64_t beside = column - direction_.before;
      return row >= task.first_row && row < task.end_row && beside >= 0 && beside < width;
    });
  }

  int64_t input_height() const {
    return turned_ ? shape_.out_height() : shape_.height;
  }

  Shape shape_;
  bool turned_;
  Direction direction_;
  PackedWeights weights_;
  int64_t inputs_, outputs_; // of a unit
  Tile single_, double_;
};

} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
