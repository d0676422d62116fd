// batch_norm_act on the CPU: backward, in two stages. M is the number of elements a channel.
//
//   g = dy * f'(z) * keep / (1 - p)
//   dbias = sum g               dweight = sum g * (x - mean) * rstd
//   dx = scale * (g - dbias / M - xhat * dweight / M)      in training;  scale * g  in evaluation
//   dr = g ("add_act")  or  dy ("act_add"); through the residual's own normalisation where it has one
//
// Passes over memory: the sums read dy and x (and r where it has its own normalisation, or where z is computed again
// from it); the second stage reads them again and writes dx and dr. Each reads the bits once. Where dy comes in two
// parts the first stage reads both and writes dz, which the second reads in dy's place: g, or in the order "act_add"
// the sum of the parts. That is dr already where the residual has no normalisation.
#include "batch_norm_act.h"
#include "library.h"
#include "norm_act_sums.h"

#include <array>
#include <tuple>

namespace fastres {
inline namespace CPU_CAPABILITY {

template <typename T>
void gradient_all(const BackwardParams<T>& given) {
  BackwardParams<T> p = given;
  const T* written = p.dx != nullptr ? p.dx : p.dresidual;
  p.stream = written != p.dy && should_stream(written, p.rows) &&
      (p.dresidual == nullptr || can_stream(p.dresidual, p.rows.inner()));
  const Segments segments(p.rows.rows(), p.rows.bytes(sizeof(T)), kElementwiseBytes);
  with_variant(p, [&](auto columns, const auto& variant) {
    for_each_segment_backwards(segments, [&](int64_t s) {
      const auto [begin, end] = segments.range(s);
      gradient_rows<decltype(columns)::value>(p, variant, begin, end);
    });
  });
}

template void gradient_all(const BackwardParams<float>&);
template void gradient_all(const BackwardParams<double>&);
template void gradient_all(const BackwardParams<Half>&);
template void gradient_all(const BackwardParams<BFloat16>&);

namespace {

// The tensors and flags of one backward call, checked and made ready.
template <typename T>
class Backward {
public:
  using A = acc_t<T>;

  Backward(
      const Tensor& dy,
      const OptionalTensor& dy2,
      const Tensor& x,
      const Norm& norm,
      const std::optional<Residual>& residual,
      const OptionalTensor& bits,
      const Pointwise& act)
      : rows_(rows_of(x)),
        x_(x),
        own_(x.size(1), norm),
        other_(Saved<A>::of(x.size(1), residual)),
        norm_(own_.norm()),
        residual_norm_(other_.norm()),
        all_(checked(dy, dy2, residual, bits, act)) {}
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  const Rows& rows() const {
    return rows_;
  }
  // The residual has its own normalisation.
  bool dual() const {
    return other_.exists();
  }

  // (dweight, dbias, residual_dweight, residual_dbias, dz); dz only where `writes_dz`.
  std::array<Tensor, kSums + 1> reduce(bool writes_dz) const {
    BackwardParams<T> params = all_.params;
    std::array<Tensor, kSums + 1> out;
    out[4] = writes_dz ? empty_rows(x_) : nothing_like(x_);
    if (writes_dz) {
      params.general = true;
      params.dy2 = dy2_;
      params.dz = out[4].mutable_data_ptr<T>();
    }
    const ChannelSums sums = sum_all(params, x_.size(1));
    const auto emit = [&](int at, const std::vector<double>& v, const A* factor) {
      out[at] = channel_vector(x_, v.size());
      A* data = out[at].template mutable_data_ptr<A>();
      for (size_t c = 0; c < v.size(); ++c) {
        data[c] = static_cast<A>(factor ? v[c] * factor[c] : v[c]);
      }
    };
    emit(0, sums[1], own_.rstd);
    emit(1, sums[0], nullptr);
    emit(2, sums[3], other_.rstd);
    emit(3, sums[2], nullptr);
    return out;
  }

  // The second stage reads dz, which `reduce` wrote and the caller keeps, in dy's place.
  void read_instead(const Tensor& dz) {
    BackwardParams<T>& params = all_.params;
    params.dy = dz.const_data_ptr<T>();
    if (!params.act_add) {
      params.general = params.recomputes = false;
      params.gate = Gate::open;
    }
  }

  // Null sums: statistics are constants.
  std::tuple<Tensor, Tensor> apply(const std::array<const A*, kSums>& sums, double count, bool need_dx, bool need_dr) {
    Tensor dx = need_dx ? empty_rows(x_) : nothing_like(x_), dr = need_dr ? empty_rows(x_) : nothing_like(x_);
    if (!need_dx && !need_dr) {
      return {std::move(dx), std::move(dr)};
    }
    BackwardParams<T>& params = all_.params;
    const GradientNorm<A> gradient = gradient_norm(*params.norm, own_.rstd, sums[0], sums[1], count, all_.sets());
    GradientNorm<A> residual_gradient;
    if (dual()) {
      residual_gradient = gradient_norm(*params.residual_norm, other_.rstd, sums[2], sums[3], count, all_.sets());
      params.residual_gradient = &residual_gradient;
    }
    params.dx = need_dx ? dx.mutable_data_ptr<T>() : nullptr;
    params.dresidual = need_dr ? dr.mutable_data_ptr<T>() : nullptr;
    params.gradient = &gradient;
    params.centred = sums[0] != nullptr;
    gradient_all(params);
    return {std::move(dx), std::move(dr)};
  }

private:
  Rows rows_;
  const Tensor& x_;
  Tensor dy_copy_, dy2_copy_, residual_copy_, bits_; // where the caller's have another format
  const T* dy2_ = nullptr;
  Saved<A> own_, other_;
  ChannelNorm<A> norm_, residual_norm_;
  Filled<BackwardParams<T>> all_;

  BackwardParams<T> checked(
      const Tensor& dy,
      const OptionalTensor& dy2,
      const std::optional<Residual>& residual,
      const OptionalTensor& bits,
      const Pointwise& act) {
    BackwardParams<T> params{};
    const bool has_bits = bits.has_value() && bits->numel() > 0;
    FASTRES_CHECK(act.dropout_p == 0 || has_bits, "bits: expected the forward pass's mask where dropout_p > 0");
    if (has_bits) {
      bits_ = bits->contiguous();
      const int64_t bytes = rows_.rows() * bitmask_row_bytes(rows_.inner());
      FASTRES_CHECK(
          bits_.scalar_type() == ScalarType::Byte && bits_.numel() == bytes,
          "bits: expected uint8 of ",
          bytes,
          " elements, got ",
          bits_.scalar_type(),
          " of ",
          bits_.numel());
    }
    if (dy2.has_value()) {
      dy2_ = like_rows("dy2", *dy2, x_, rows_, dy2_copy_).const_data_ptr<T>();
    }
    if (residual.has_value() && (dual() || act.reads_residual())) {
      params.residual = like_rows("residual", residual->value, x_, rows_, residual_copy_).const_data_ptr<T>();
    }
    params.dy = like_rows("dy", dy, x_, rows_, dy_copy_).const_data_ptr<T>();
    params.x = x_.const_data_ptr<T>();
    params.bits = has_bits ? bits_.const_data_ptr<uint8_t>() : nullptr;
    params.norm = &norm_;
    params.residual_norm = dual() ? &residual_norm_ : nullptr;
    params.gate = has_bits ? Gate::bits : act.kind == Kind::ReLU ? Gate::recompute : Gate::open;
    params.keep_scale = static_cast<A>(1.0 / (1.0 - act.dropout_p));
    params.act_add = act.act_add;
    params.rows = rows_;
    params.activation = act.activation<A>();
    params.general = params.activation.general();
    params.recomputes = act.recomputes(has_bits);
    params.leak = act.gated() ? static_cast<A>(act.leak()) : A(0);
    return params;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_reduce(
    const Tensor& dy,
    const OptionalTensor& dy2,
    const Tensor& x,
    const Norm& norm,
    const std::optional<Residual>& residual,
    const OptionalTensor& bits,
    const Act& act) {
  std::array<Tensor, kSums + 1> out;
  with_floating_type(x, [&]<typename scalar_t>() {
    out = Backward<scalar_t>(dy, dy2, x, norm, residual, bits, pointwise(act)).reduce(dy2.has_value());
  });
  return std::tuple_cat(std::move(out));
}

std::tuple<Tensor, Tensor> backward_apply(
    const Tensor& dy,
    const Tensor& x,
    const Norm& norm,
    const std::optional<Residual>& residual,
    const OptionalTensor& bits,
    const std::optional<Sums>& sums,
    const OptionalTensor& count,
    const Act& act,
    std::array<bool, 2> needs) {
  std::tuple<Tensor, Tensor> result;
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    Backward<scalar_t> backward(dy, std::nullopt, x, norm, residual, bits, pointwise(act));
    std::array<const A*, kSums> pointers{};
    if (sums.has_value()) {
      const int64_t channels = x.size(1);
      pointers[0] = channel_data<A>("sums_dweight", sums->dweight, channels);
      pointers[1] = channel_data<A>("sums_dbias", sums->dbias, channels);
      if (backward.dual()) {
        FASTRES_CHECK(
            sums->residual_dweight.has_value() && sums->residual_dbias.has_value(),
            "sums_residual_dweight and sums_residual_dbias: expected tensors where the residual has a normalisation");
        pointers[2] = channel_data<A>("sums_residual_dweight", sums->residual_dweight, channels);
        pointers[3] = channel_data<A>("sums_residual_dbias", sums->residual_dbias, channels);
      }
    }
    const double m = count.has_value() ? count_of("count", *count) : static_cast<double>(backward.rows().count());
    result = backward.apply(pointers, m, needs[0], needs[1]);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy,
    const OptionalTensor& dy2,
    const Tensor& x,
    const Norm& norm,
    const std::optional<Residual>& residual,
    const OptionalTensor& bits,
    const Act& act,
    bool training,
    std::array<bool, 3> needs) {
  const Pointwise parsed = pointwise(act);
  Tensor dx, dr;
  std::array<Tensor, kSums + 1> sums;
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    Backward<scalar_t> backward(dy, dy2, x, norm, residual, bits, parsed);
    // f' of a smooth activation costs more than a pass over memory, and g is what a plain residual gets in any case. In
    // 16 bits g would be rounded on the way.
    const bool keeps_g =
        std::is_same_v<scalar_t, A> && training && needs[0] && parsed.recomputes(true) && !parsed.act_add;
    const bool writes_dz = dy2.has_value() || keeps_g;
    std::array<const A*, kSums> pointers{};
    if (writes_dz || needs[2] || (training && (needs[0] || needs[1]))) {
      sums = backward.reduce(writes_dz);
      for (int i = 0; training && i < (backward.dual() ? kSums : 2); ++i) {
        pointers[i] = sums[i].template const_data_ptr<A>();
      }
    }
    const bool dr_is_dz = writes_dz && !backward.dual();
    if (writes_dz) {
      backward.read_instead(sums[4]);
    }
    const double count = static_cast<double>(backward.rows().count());
    std::tie(dx, dr) = backward.apply(pointers, count, needs[0], needs[1] && !dr_is_dz);
    if (needs[1] && dr_is_dz) {
      dr = std::move(sums[4]);
    }
  });
  for (Tensor& sum : sums) {
    if (!needs[2]) {
      sum = channel_vector(x, 0);
    }
  }
  return {std::move(dx), std::move(dr), std::move(sums[0]), std::move(sums[1]), std::move(sums[2]), std::move(sums[3])};
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("batch_norm_act_backward_reduce", boxed<&backward_reduce>);
  m.impl("batch_norm_act_backward_apply", boxed<&backward_apply>);
  m.impl("batch_norm_act_backward", boxed<&backward>);
}
