// The loops of norm_act.h, once for all that call them.
//
// They are compiled for the identity and ReLU with every kind of residual and of dropout, and for the other activations
// as activations.h has them: what is constant in the former is a variable in the latter.
#include "norm_act.h"

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace {

// Where dropout's mask comes from.
enum class Keep { all, drawn, given };

// What a loop over rows has compiled into it: the identity or ReLU, and these.
template <ResidualKind kResidual, Keep kKeep>
struct Fixed {
  static constexpr bool general = false;
  static constexpr ResidualKind residual = kResidual;
  static constexpr Keep keep = kKeep;

  static constexpr Fixed<kResidual, Keep::given> with_given_mask() {
    return {};
  }
};

// Another activation, and these told at run time.
template <typename Activation>
struct General {
  static constexpr bool general = true;
  Activation activation;
  ResidualKind residual;
  Keep keep;

  General with_given_mask() const {
    return {activation, residual, Keep::given};
  }
};

// dropout(f(z)) of `count` elements, and their bits. `kept` is called for dropout's mask where there is one.
template <typename T, typename Out, typename Variant, typename Count, typename Kept>
inline Pair<acc_t<T>> activate(
    const ApplyParams<T, Out>& p,
    const Variant& variant,
    Pair<acc_t<T>> z,
    uint8_t* bits,
    Count count,
    const Kept& kept) {
  using P = Pair<acc_t<T>>;
  if constexpr (Variant::general) {
    uint32_t mask = p.gated ? variant.activation.passes(z) : ~0u;
    z = variant.activation.forward(z);
    if (variant.keep != Keep::all) {
      const uint32_t keep = kept();
      mask &= keep;
      z = select_lanes(z * P::fill(p.keep_scale), keep);
    }
    if (bits != nullptr) {
      store_bits(bits, mask, count);
    }
  } else if (variant.keep != Keep::all || bits != nullptr) {
    uint32_t mask = p.relu ? passing_lanes(z) : ~0u;
    if (variant.keep != Keep::all) {
      mask &= kept();
      z = z * P::fill(p.keep_scale);
    }
    z = select_lanes(z, mask);
    if (bits != nullptr) {
      store_bits(bits, mask, count);
    }
  } else if (p.relu) {
    z = rectify(z);
  }
  return z;
}

// `keep` is the row's keep bits; in channels_last they may be drawn here instead.
template <bool kColumns, typename T, typename Out, typename Variant>
inline void apply_row(const ApplyParams<T, Out>& p, const Variant& variant, int64_t row, const uint8_t* keep) {
  using A = acc_t<T>;
  const int64_t inner = p.rows.inner();
  const ChannelLanes<A, kColumns> lanes{kColumns ? 0 : row % p.rows.channels};
  const T* x = p.x + row * inner;
  const T* residual = p.residual + (variant.residual == ResidualKind::none ? 0 : row * inner);
  Out* y = p.y + (row - p.first_y_row) * inner;
  uint8_t* bits = p.bits == nullptr ? nullptr : p.bits + row * bitmask_row_bytes(inner);
  for_each_unit<A>(inner, [&](int64_t k, auto count) {
    if (p.fetches_ahead) {
      fetch_ahead(x + k);
      if (variant.residual != ResidualKind::none) {
        fetch_ahead(residual + k);
      }
      if (!p.stream) {
        fetch_ahead(y + k);
      }
    }
    const auto& norm = *p.norm;
    Pair<A> z = fmadd(
        load_lanes(x + k, count) - lanes(norm.mean, k, count), lanes(norm.scale, k, count), lanes(norm.bias, k, count));
    Pair<A> r;
    if (variant.residual != ResidualKind::none) {
      r = load_lanes(residual + k, count);
      if (variant.residual == ResidualKind::normalised) {
        const auto& own = *p.residual_norm;
        r = fmadd(r - lanes(own.mean, k, count), lanes(own.scale, k, count), lanes(own.bias, k, count));
      }
      if (!p.act_add) {
        z = z + r;
      }
    }
    const auto kept = [&] {
      if (variant.keep != Keep::drawn) {
        return load_bits(keep + k / 8, count);
      }
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        return keep_bits(*p.dropout, row * inner + k);
      } else {
        return keep_bits<decltype(count)::value>(*p.dropout, row * inner + k);
      }
    };
    z = activate(p, variant, z, bits == nullptr ? nullptr : bits + k / 8, count, kept);
    if (variant.residual != ResidualKind::none && p.act_add) {
      z = z + r;
    }
    put(y + k, z, count, p.stream);
  });
}

// Keep bits of the NCHW rows row ... row + 3, four neighbouring channels of one image (C % 4 == 0), or of one row.
inline void draw_keep_rows(const Dropout& dropout, const Rows& rows, int64_t row, bool four, uint8_t* keep) {
  const int64_t bytes = bitmask_row_bytes(rows.pixels);
  const int64_t image = row / rows.channels, channel = row % rows.channels;
  const int64_t first = image * rows.pixels * rows.channels + channel;
  if (four) {
    for (int64_t byte = 0; byte < bytes; ++byte) {
      uint8_t bits[4];
      const int64_t step = rows.channels / 4;
      keep_bytes_of_four_channels(dropout, first / 4 + byte * 8 * step, step, bits);
      for (int k = 0; k < 4; ++k) {
        keep[k * bytes + byte] = bits[k];
      }
    }
    return;
  }
  std::memset(keep, 0, bytes);
  for (int64_t pixel = 0; pixel < rows.pixels; ++pixel) {
    const int64_t i = first + pixel * rows.channels;
    const bool kept = philox_4x32(dropout.key, i / 4).word[i % 4] >= dropout.threshold;
    keep[pixel / 8] |= static_cast<uint8_t>(kept) << (pixel % 8);
  }
}

template <bool kColumns, typename T, typename Out, typename Variant>
inline void apply_rows(const ApplyParams<T, Out>& p, const Variant& variant, int64_t begin, int64_t end) {
  if (!kColumns && variant.keep == Keep::drawn) {
    const bool four = p.rows.channels % 4 == 0 && begin % 4 == 0 && end % 4 == 0;
    const int64_t bytes = bitmask_row_bytes(p.rows.pixels), group = four ? 4 : 1;
    // load_bits never reads past a row, so the last row needs no slack.
    std::vector<uint8_t> keep(group * bytes);
    for (int64_t row = begin; row < end; row += group) {
      draw_keep_rows(*p.dropout, p.rows, row, four, keep.data());
      for (int64_t k = 0; k < group; ++k) {
        apply_row<kColumns>(p, variant.with_given_mask(), row + k, keep.data() + k * bytes);
      }
    }
  } else {
    for (int64_t row = begin; row < end; ++row) {
      const bool given = variant.keep == Keep::given;
      apply_row<kColumns>(p, variant, row, given ? p.kept + row * bitmask_row_bytes(p.rows.inner()) : nullptr);
    }
  }
  if (p.stream) {
    stream_fence();
  }
}

} // namespace

template <typename T, typename Out>
void apply_range(const ApplyParams<T, Out>& p, int64_t begin, int64_t end) {
  const Keep keep = p.kept != nullptr ? Keep::given : p.dropout != nullptr ? Keep::drawn : Keep::all;
  if (p.activation.general()) {
    return p.activation.for_loops([&](const auto& activation) {
      const General variant{activation, p.kind(), keep};
      p.rows.channels_last ? apply_rows<true>(p, variant, begin, end) : apply_rows<false>(p, variant, begin, end);
    });
  }
  const auto with_residual = [&](auto columns, auto keep_constant) {
    constexpr bool kColumns = decltype(columns)::value;
    constexpr Keep kKeep = decltype(keep_constant)::value;
    switch (p.kind()) {
      case ResidualKind::none:
        return apply_rows<kColumns>(p, Fixed<ResidualKind::none, kKeep>(), begin, end);
      case ResidualKind::plain:
        return apply_rows<kColumns>(p, Fixed<ResidualKind::plain, kKeep>(), begin, end);
      case ResidualKind::normalised:
        return apply_rows<kColumns>(p, Fixed<ResidualKind::normalised, kKeep>(), begin, end);
    }
  };
  using All = std::integral_constant<Keep, Keep::all>;
  using Drawn = std::integral_constant<Keep, Keep::drawn>;
  using Given = std::integral_constant<Keep, Keep::given>;
  if (!p.rows.channels_last) {
    return keep == Keep::all ? with_residual(std::false_type(), All()) : with_residual(std::false_type(), Drawn());
  }
  switch (keep) {
    case Keep::all:
      return with_residual(std::true_type(), All());
    case Keep::drawn:
      return with_residual(std::true_type(), Drawn());
    case Keep::given:
      return with_residual(std::true_type(), Given());
  }
}

template void apply_range(const ApplyParams<float>&, int64_t, int64_t);
template void apply_range(const ApplyParams<double>&, int64_t, int64_t);
template void apply_range(const ApplyParams<Half>&, int64_t, int64_t);
template void apply_range(const ApplyParams<BFloat16>&, int64_t, int64_t);
template void apply_range(const ApplyParams<BFloat16, float>&, int64_t, int64_t);

} // namespace CPU_CAPABILITY
} // namespace fastres
