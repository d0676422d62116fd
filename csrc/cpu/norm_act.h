// Normalise, add, activate and drop: the forward pass over rows of memory that are already measured.
//
//   z = (x - mean) * scale + bias      scale = weight * rstd
//   "add_act":  y = dropout(f(z + r))            "act_add":  y = dropout(f(z)) + r
//
// Reads x and r once, writes y once and one bit an element where backward will need it.
#pragma once

#include "../common/bitmask.h"
#include "activations.h"
#include "dropout.h"
#include "lanes.h"
#include "rows.h"

#include <type_traits>
#include <utility>
#include <vector>

namespace fastres {
inline namespace CPU_CAPABILITY {

// [C] vectors of one normalisation, ready for the loop.
template <typename A>
struct ChannelNorm {
  using Scalar = A;
  std::vector<A> mean, scale, bias;

  ChannelNorm repeated(int64_t times) const {
    const auto sets = [&](const std::vector<A>& v) {
      std::vector<A> out;
      out.reserve(v.size() * times);
      for (int64_t i = 0; i < times; ++i) {
        out.insert(out.end(), v.begin(), v.end());
      }
      return out;
    };
    return {sets(mean), sets(scale), sets(bias)};
  }
};

// What a pass over whole tensors is given, for rows that are filled where channels do not fill a loop's units. The sets
// of their vectors are this object's.
template <typename Params>
class Filled {
  using Norm = std::remove_cvref_t<decltype(*std::declval<Params>().norm)>;

public:
  explicit Filled(const Params& given) : params(given) {
    params.rows = filled(given.rows, Pair<typename Norm::Scalar>::size());
    sets_ = given.rows.channels > 0 ? params.rows.channels / given.rows.channels : 1;
    params.norm = in_sets(given.norm, norm_);
    params.residual_norm = in_sets(given.residual_norm, residual_norm_);
  }
  Filled(const Filled&) = delete;
  Filled& operator=(const Filled&) = delete;

  int64_t sets() const {
    return sets_;
  }

  Params params;

private:
  int64_t sets_;
  Norm norm_, residual_norm_;

  const Norm* in_sets(const Norm* norm, Norm& copy) const {
    if (norm == nullptr || sets_ == 1) {
      return norm;
    }
    copy = norm->repeated(sets_);
    return &copy;
  }
};

enum class ResidualKind { none, plain, normalised };

// What the pass makes of every element, but for where it is written to.
template <typename T>
struct ApplyOperands {
  const T* x;
  const T* residual; // null where there is none
  uint8_t* bits;     // null where backward can do without
  const ChannelNorm<acc_t<T>>* norm;
  const ChannelNorm<acc_t<T>>* residual_norm; // null where the residual is taken as it is
  const Dropout* dropout;                     // null where there is none
  acc_t<T> keep_scale;                        // 1 / (1 - p)
  bool relu;
  bool act_add;
  Rows rows;
  const uint8_t* kept = nullptr;       // dropout's mask where it has been drawn already, in channels_last
  ActivationOf<acc_t<T>> activation{}; // what is not `relu` is this
  bool gated = true;                   // bits say what the activation passed, too
  bool fetches_ahead = false;          // whole tensors are passed over

  template <typename F>
  void for_each_read(const F& f) const {
    f(x);
    if (residual != nullptr) {
      f(residual);
    }
  }
  ResidualKind kind() const {
    return residual == nullptr ? ResidualKind::none : residual_norm ? ResidualKind::normalised : ResidualKind::plain;
  }
};

// The output may have another dtype than the input.
template <typename T, typename Out = T>
struct ApplyParams : ApplyOperands<T> {
  Out* y;
  int64_t first_y_row = 0; // the row that y starts with, where y is not as large as x
  bool stream = false;
};

// The [C] vectors at a place in a row: as they lie in channels_last, one value for the whole row in NCHW.
template <typename A, bool kColumns>
struct ChannelLanes {
  int64_t channel; // of the row, in NCHW

  template <typename Count>
  Pair<A> operator()(const std::vector<A>& v, int64_t k, Count count) const {
    if constexpr (kColumns) {
      return load_lanes(v.data() + k, count);
    } else {
      return Pair<A>::fill(v[channel]);
    }
  }
};

// Whether rows of p may be stored past the caches: every unit must be whole and aligned.
template <typename T>
inline bool can_stream(const T* p, int64_t inner) {
  return inner % Pair<acc_t<T>>::size() == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
      inner * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

template <typename T, typename Count>
inline void put(T* p, const Pair<acc_t<T>>& x, Count count, bool streaming) {
  if constexpr (!std::is_same_v<Count, int64_t>) {
    if (streaming) {
      stream(p, x);
      return;
    }
  }
  store_lanes(p, x, count);
}

// The mask of whole channels_last rows, written as the bit mask of bitmask.h.
inline void draw_keep_bits(const Dropout& dropout, const Rows& given, uint8_t* keep) {
  constexpr int64_t unit = 32;
  const Rows rows = filled(given, unit);
  const int64_t inner = rows.inner(), bytes = bitmask_row_bytes(inner);
  const Segments segments(rows.rows(), rows.bytes(1), kElementwiseBytes);
  for_each_segment(segments, [&](int64_t s) {
    const auto [begin, end] = segments.range(s);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < inner; k += unit) {
        store_bits(keep + row * bytes + k / 8, keep_bits(dropout, row * inner + k), std::min(unit, inner - k));
      }
    }
  });
}

// Rows begin ... end - 1 of the pass. Compiled in norm_act.cpp: x and y are of one of the floating types, or y is float
// and x bfloat16.
template <typename T, typename Out>
void apply_range(const ApplyParams<T, Out>& p, int64_t begin, int64_t end);

} // namespace CPU_CAPABILITY
} // namespace fastres
