// The backward pass after the sums: what reaches x, and a residual, over rows of memory.
//
//   g = dy * f'(z) * keep / (1 - p)      dx = scale * g - offset - slope * (x - mean)
//
// keep * f'(z) is one bit an element where f is ReLU or the identity; otherwise z is computed again from x, and from
// the residual where that was added before f.
//
// Reads dy, x (and a residual that has its own normalisation, or is part of z) and the bits once, writes dx and dr
// once.
#pragma once

#include "norm_act.h"

namespace fastres {
inline namespace CPU_CAPABILITY {

// Where the bit of ReLU's gradient comes from.
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
  const T* residual; // null unless it has its own normalisation, or is part of z
  const uint8_t* bits;
  T* dx; // null where not needed, or in the pass that sums
  T* dresidual;
  const ChannelNorm<acc_t<T>>* norm;
  const ChannelNorm<acc_t<T>>* residual_norm; // null unless it has its own normalisation
  const GradientNorm<acc_t<T>>* gradient;
  const GradientNorm<acc_t<T>>* residual_gradient;
  Gate gate;
  acc_t<T> keep_scale; // 1 / (1 - p), or 1
  bool act_add;
  bool centred; // statistics are the batch's: offset and slope count
  bool stream;
  Rows rows;
  // Only read where `general`:
  bool general = false;
  bool recomputes = false; // z
  ActivationOf<acc_t<T>> activation{};
  acc_t<T> leak = 0;      // g / dy where the bit is not set
  const T* dy2 = nullptr; // in the pass that sums: the other part of the gradient of y,
  T* dz = nullptr;        // and where the gradient that the next pass reads is written
};

// What the backward loops have compiled into them: the identity or ReLU, one gradient of y, and these.
template <bool kDual, Gate kGate>
struct FixedGradient {
  static constexpr bool general = false;
  static constexpr bool dual = kDual; // the residual has its own normalisation
  static constexpr Gate gate = kGate;
};

// Another activation, and a gradient of y in one part or in two.
template <typename Activation>
struct GeneralGradient {
  static constexpr bool general = true;
  static constexpr Gate gate = Gate::open; // has no meaning
  Activation activation;
  bool dual;
};

// g at elements k ... of a row. `centred` is x - mean.
template <typename T, typename Variant, typename Lanes, typename Count>
inline Pair<acc_t<T>> masked_gradient(
    const BackwardParams<T>& p,
    const Variant& variant,
    const Lanes& lanes,
    int64_t row,
    int64_t k,
    Count count,
    const Pair<acc_t<T>>& dy,
    const Pair<acc_t<T>>& centred) {
  using P = Pair<acc_t<T>>;
  // The very expression of the forward pass, so that its sign is the same.
  const auto normalised = [&](const ChannelNorm<acc_t<T>>& norm, const P& value) {
    return fmadd(value, lanes(norm.scale, k, count), lanes(norm.bias, k, count));
  };
  const auto bits = [&] { return load_bits(p.bits + row * bitmask_row_bytes(p.rows.inner()) + k / 8, count); };
  if constexpr (Variant::general) {
    P g = dy;
    if (p.recomputes) {
      P z = normalised(*p.norm, centred);
      if (p.residual != nullptr && !p.act_add) {
        const P r = load_lanes(p.residual + row * p.rows.inner() + k, count);
        z = z + (variant.dual ? normalised(*p.residual_norm, r - lanes(p.residual_norm->mean, k, count)) : r);
      }
      g = variant.activation.backward(g, z);
    }
    if (p.bits != nullptr) {
      const uint32_t mask = bits();
      const P kept = select_lanes(g, mask) * P::fill(p.keep_scale);
      g = p.leak == 0 ? kept : kept + select_lanes(g * P::fill(p.leak), ~mask);
    }
    return g;
  } else if constexpr (Variant::gate == Gate::open) {
    return dy;
  } else if constexpr (Variant::gate == Gate::bits) {
    return select_lanes(dy, bits()) * P::fill(p.keep_scale);
  } else {
    return select_lanes(dy, passing_lanes(normalised(*p.norm, centred)));
  }
}

template <bool kColumns, typename T, typename Variant>
inline void gradient_rows(const BackwardParams<T>& p, const Variant& variant, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t inner = p.rows.inner();
  const bool reads_x = p.centred || (Variant::general ? p.recomputes : Variant::gate == Gate::recompute);
  for (int64_t row = begin; row < end; ++row) {
    const ChannelLanes<A, kColumns> lanes{kColumns ? 0 : row % p.rows.channels};
    for_each_unit<A>(inner, [&](int64_t k, auto count) {
      const int64_t at = row * inner + k;
      if (!p.stream) { // beside streaming stores it gains nothing
        fetch_ahead(p.dy + at);
        if (reads_x) {
          fetch_ahead(p.x + at);
        }
        if (p.dx != nullptr) {
          fetch_ahead(p.dx + at);
        }
        if (p.dresidual != nullptr) {
          fetch_ahead(p.dresidual + at);
        }
      }
      const Pair<A> dy = load_lanes(p.dy + at, count);
      const Pair<A> centred = reads_x ? load_lanes(p.x + at, count) - lanes(p.norm->mean, k, count) : Pair<A>::fill(0);
      const Pair<A> g = masked_gradient(p, variant, lanes, row, k, count, dy, centred);
      const auto through = [&](const GradientNorm<A>& norm, const Pair<A>& dz, const Pair<A>& value) {
        const Pair<A> scaled = dz * lanes(norm.scale, k, count);
        return p.centred ? scaled - fmadd(value, lanes(norm.slope, k, count), lanes(norm.offset, k, count)) : scaled;
      };
      if (p.dx != nullptr) {
        put(p.dx + at, through(*p.gradient, g, centred), count, p.stream);
      }
      if (p.dresidual != nullptr) {
        const Pair<A> dr = p.act_add ? dy : g;
        if (variant.dual) {
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

// f(whether rows are channels, as a type, and the variant of the loop)
template <typename T, typename F>
inline void with_variant(const BackwardParams<T>& p, const F& f) {
  const auto with_gate = [&](auto columns, auto dual) {
    constexpr bool kDual = decltype(dual)::value;
    switch (p.gate) {
      case Gate::open:
        return f(columns, FixedGradient<kDual, Gate::open>());
      case Gate::bits:
        return f(columns, FixedGradient<kDual, Gate::bits>());
      case Gate::recompute:
        return f(columns, FixedGradient<kDual, Gate::recompute>());
    }
  };
  const auto with_dual = [&](auto columns) {
    const bool dual = p.residual_norm != nullptr;
    if (p.general) {
      return p.activation.for_loops(
          [&](const auto& activation) { return f(columns, GeneralGradient{activation, dual}); });
    }
    return dual ? with_gate(columns, std::true_type()) : with_gate(columns, std::false_type());
  };
  return p.rows.channels_last ? with_dual(std::true_type()) : with_dual(std::false_type());
}

// All rows. Compiled in batch_norm_act_backward.cpp, for the floating types.
template <typename T>
void gradient_all(const BackwardParams<T>& p);

// `norm` has so many sets of the channels' vectors.
template <typename A>
inline GradientNorm<A> gradient_norm(
    const ChannelNorm<A>& norm,
    const A* rstd,
    const A* dweight,
    const A* dbias,
    double count,
    int64_t sets = 1) {
  GradientNorm<A> out;
  const size_t size = norm.scale.size(), channels = size / sets;
  out.scale = norm.scale;
  out.offset.assign(size, A(0));
  out.slope.assign(size, A(0));
  for (size_t set = 0; dweight != nullptr && set < size; set += channels) {
    for (size_t c = 0; c < channels; ++c) {
      const double scale = norm.scale[c];
      out.offset[set + c] = static_cast<A>(scale * dbias[c] / count);
      out.slope[set + c] = static_cast<A>(scale * rstd[c] * dweight[c] / count);
    }
  }
  return out;
}

} // namespace CPU_CAPABILITY
} // namespace fastres
