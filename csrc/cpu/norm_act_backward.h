// The backward pass after the sums: what reaches x, and a residual, over rows of memory.
//
//   g = dy * bit / (1 - p)      dx = scale * g - offset - slope * (x - mean)
//
// Reads dy, x (and a residual that has its own normalisation) and the bits once, writes dx and dr once.
#pragma once

#include "norm_act.h"

namespace fastres {
inline namespace CPU_CAPABILITY {

// Where the gradient's bit comes from.
enum class Gate { open, bits, recompute };

// dx = scale * g - offset - slope * (x - mean)
template <typename A>
struct GradientNorm {
  std::vector<A> scale, offset, slope;
};

template <typename T>
struct BackwardParams {
  const T* dy;
  const T* x;
  const T* residual; // null unless it has its own normalisation
  const uint8_t* bits;
  T* dx; // null where not needed, or in the pass that sums
  T* dresidual;
  const ChannelNorm<acc_t<T>>* norm;
  const ChannelNorm<acc_t<T>>* residual_norm;
  const GradientNorm<acc_t<T>>* gradient;
  const GradientNorm<acc_t<T>>* residual_gradient;
  Gate gate;
  acc_t<T> keep_scale; // 1 / (1 - p), or 1
  bool act_add;
  bool centred; // statistics are the batch's: offset and slope count
  bool stream;
  Rows rows;
};

// g at elements k ... of a row, and x - mean, which both passes need.
template <typename T, bool kColumns, Gate kGate, typename Count>
inline Pair<acc_t<T>> masked_gradient(
    const BackwardParams<T>& p,
    const ChannelLanes<acc_t<T>, kColumns>& lanes,
    int64_t row,
    int64_t k,
    Count count,
    const Pair<acc_t<T>>& dy,
    const Pair<acc_t<T>>& centred) {
  using A = acc_t<T>;
  if constexpr (kGate == Gate::open) {
    return dy;
  } else if constexpr (kGate == Gate::bits) {
    const uint8_t* bits = p.bits + row * bitmask_row_bytes(p.rows.inner()) + k / 8;
    return select_lanes(dy, load_bits(bits, count)) * Pair<A>::fill(p.keep_scale);
  } else {
    // The very expression of the forward pass, so that its sign is the same.
    const Pair<A> z = fmadd(centred, lanes(p.norm->scale, k, count), lanes(p.norm->bias, k, count));
    return select_lanes(dy, passing_lanes(z));
  }
}

template <typename T, bool kColumns, bool kDual, Gate kGate>
inline void gradient_rows(const BackwardParams<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t inner = p.rows.inner();
  for (int64_t row = begin; row < end; ++row) {
    const ChannelLanes<A, kColumns> lanes{kColumns ? 0 : row % p.rows.channels};
    for_each_unit<A>(inner, [&](int64_t k, auto count) {
      const int64_t at = row * inner + k;
      const Pair<A> dy = load_lanes(p.dy + at, count);
      const bool needs_x = p.centred || kGate == Gate::recompute;
      const Pair<A> centred = needs_x ? load_lanes(p.x + at, count) - lanes(p.norm->mean, k, count) : Pair<A>::fill(0);
      const Pair<A> g = masked_gradient<T, kColumns, kGate>(p, lanes, row, k, count, dy, centred);
      const auto through = [&](const GradientNorm<A>& norm, const Pair<A>& dz, const Pair<A>& value) {
        const Pair<A> scaled = dz * lanes(norm.scale, k, count);
        return p.centred ? scaled - fmadd(value, lanes(norm.slope, k, count), lanes(norm.offset, k, count)) : scaled;
      };
      if (p.dx != nullptr) {
        put(p.dx + at, through(*p.gradient, g, centred), count, p.stream);
      }
      if (p.dresidual != nullptr) {
        const Pair<A> dr = p.act_add ? dy : g;
        if constexpr (kDual) {
          const Pair<A> r =
              p.centred ? load_lanes(p.residual + at, count) - lanes(p.residual_norm->mean, k, count) : dr;
          put(p.dresidual + at, through(*p.residual_gradient, dr, r), count, p.stream);
        } else {
          put(p.dresidual + at, dr, count, p.stream);
        }
      }
    });
  }
  if (p.stream) {
    stream_fence();
  }
}

template <typename T, typename F>
inline void with_flags(const BackwardParams<T>& p, const F& f) {
  const auto with_gate = [&](auto columns, auto dual) {
    switch (p.gate) {
      case Gate::open:
        return f(columns, dual, std::integral_constant<Gate, Gate::open>());
      case Gate::bits:
        return f(columns, dual, std::integral_constant<Gate, Gate::bits>());
      case Gate::recompute:
        return f(columns, dual, std::integral_constant<Gate, Gate::recompute>());
    }
  };
  const auto with_dual = [&](auto columns) {
    return p.residual != nullptr ? with_gate(columns, std::true_type()) : with_gate(columns, std::false_type());
  };
  return p.rows.channels_last ? with_dual(std::true_type()) : with_dual(std::false_type());
}

template <typename T>
inline void gradient_all(const BackwardParams<T>& p) {
  const Segments segments(p.rows.rows(), p.rows.bytes(sizeof(T)), kElementwiseBytes);
  with_flags(p, [&](auto columns, auto dual, auto gate) {
    for_each_segment_backwards(segments, [&](int64_t s) {
      const auto [begin, end] = segments.range(s);
      gradient_rows<T, decltype(columns)::value, decltype(dual)::value, decltype(gate)::value>(p, begin, end);
    });
  });
}

template <typename A>
inline GradientNorm<A> gradient_norm(
    const ChannelNorm<A>& norm,
    const A* rstd,
    const A* dweight,
    const A* dbias,
    double count) {
  GradientNorm<A> out;
  const size_t channels = norm.scale.size();
  out.scale = norm.scale;
  out.offset.assign(channels, A(0));
  out.slope.assign(channels, A(0));
  if (dweight != nullptr) {
    for (size_t c = 0; c < channels; ++c) {
      const double scale = norm.scale[c];
      out.offset[c] = static_cast<A>(scale * dbias[c] / count);
      out.slope[c] = static_cast<A>(scale * rstd[c] * dweight[c] / count);
    }
  }
  return out;
}

} // namespace CPU_CAPABILITY
} // namespace fastres
