// Max pooling in channels_last, alone and of f(bn(x)), which is then neither written nor read as a whole: forward keeps
// the rows that a window covers, backward those that one step of batch_norm_act's own loops takes.
//
//   y = maxpool(f(bn(x)))         da = at each element the sum of dy over the windows that chose it
//
// da goes through batch_norm_act's backward. Passes over memory: forward reads x once more after its statistics and
// writes y and a byte an output; either stage of backward reads x, dy and these bytes, the second writes dx.
#include "batch_norm_act.h"
#include "library.h"
#include "max_pool.h"
#include "norm_act_sums.h"

#include <tuple>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace {

Tensor empty_pooled(const PoolShape& s, ScalarType type) {
  const std::array<int64_t, 4> sizes = s.output_sizes();
  return empty(sizes, type, MemoryFormat::channels_last);
}

PoolShape shape_of(const Tensor& x, const Pool& pool) {
  const PoolShape s(x.sizes(), pool);
  FASTRES_CHECK(x.is_channels_last(), "x: expected channels_last memory, got strides ", x.strides());
  return s;
}

Rows rows_of_pooled(const PoolShape& s) {
  return {true, s.images, s.channels, s.rows.size * s.columns.size};
}

template <typename T>
Segments segments_of(const PoolShape& s, int64_t items, int64_t segment_bytes) {
  return {items, rows_of_pooled(s).bytes(sizeof(T)), segment_bytes};
}

// All outputs; rows_of() makes a segment's function of (image, row) that gives a row to be pooled. `position` is null
// where nobody asks for it.
template <typename T, typename RowsOf>
void pool_all(const PoolShape& s, const RowsOf& rows_of, T* y, uint8_t* position) {
  const Segments segments = segments_of<T>(s, s.output_rows(), kElementwiseBytes);
  for_each_segment(segments, [&](int64_t segment) {
    const auto [begin, end] = segments.range(segment);
    auto row_of = rows_of();
    for (int64_t output = begin; output < end; ++output) {
      const int64_t image = output / s.rows.outputs, row = output % s.rows.outputs, at = output * s.output_row();
      const auto of_image = [&](int64_t r) { return row_of(image, r); };
      if (position != nullptr) {
        pool_row<true>(s, row, of_image, y + at, position + at);
      } else {
        pool_row<false>(s, row, of_image, y + at, nullptr);
      }
    }
  });
}

// --- max pooling alone

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& x, const Pool& pool, bool save_position) {
  const PoolShape s = shape_of(x, pool);
  Tensor y = empty_pooled(s, x.scalar_type());
  Tensor position = save_position ? empty_pooled(s, ScalarType::Byte) : empty_vector(0, ScalarType::Byte);
  with_floating_type(x, [&]<typename scalar_t>() {
    const scalar_t* data = x.const_data_ptr<scalar_t>();
    const auto rows_of = [&] {
      return [&](int64_t image, int64_t r) { return data + (image * s.rows.size + r) * s.input_row(); };
    };
    pool_all<scalar_t>(
        s, rows_of, y.mutable_data_ptr<scalar_t>(), save_position ? position.mutable_data_ptr<uint8_t>() : nullptr);
  });
  return {std::move(y), std::move(position)};
}

// dy and the positions, checked.
struct Chosen {
  Tensor dy, position;

  Chosen(const PoolShape& s, const Tensor& dy_in, const Tensor& position_in, ScalarType type) {
    const auto check = [&](const char* name, const Tensor& t, ScalarType expected) {
      const std::array<int64_t, 4> sizes = s.output_sizes();
      FASTRES_CHECK(t.sizes() == Sizes(sizes), name, ": expected shape ", Sizes(sizes), " for this x, got ", t.sizes());
      FASTRES_CHECK(t.scalar_type() == expected, name, ": expected dtype ", expected, ", got ", t.scalar_type());
      return t.contiguous(MemoryFormat::channels_last);
    };
    dy = check("dy", dy_in, type);
    position = check("position", position_in, ScalarType::Byte);
  }
};

// `like` has the shape of what was pooled, and perhaps no memory.
Tensor max_pool_backward(const Tensor& dy, const Tensor& position, const Tensor& like, const Pool& pool) {
  const PoolShape s(like.sizes(), pool);
  const Chosen chosen(s, dy, position, dy.scalar_type());
  Tensor dx = empty(like.sizes(), dy.scalar_type(), MemoryFormat::channels_last);
  with_floating_type(dy, [&]<typename scalar_t>() {
    const scalar_t* from = chosen.dy.const_data_ptr<scalar_t>();
    const uint8_t* at = chosen.position.const_data_ptr<uint8_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    const Segments segments = segments_of<scalar_t>(s, s.input_rows(), kElementwiseBytes);
    for_each_segment(segments, [&](int64_t segment) {
      const auto [begin, end] = segments.range(segment);
      for (int64_t row = begin; row < end; ++row) {
        unpool_row<scalar_t>(s, row, from, at, to + row * s.input_row());
      }
    });
  });
  return dx;
}

// --- of a normalised and activated x

// Rows of f(bn(x)) of one image, as many as a window covers, made when they are asked for.
template <typename T>
class ActivatedRows {
public:
  ActivatedRows(const PoolShape& s, const T* x, const ChannelNorm<acc_t<T>>& norm, const Pointwise& act)
      : shape_(s), x_(x), held_(s.rows.kernel, -1), data_(s.rows.kernel * s.input_row()) {
    params_.norm = &norm;
    params_.keep_scale = 1;
    params_.relu = act.kind == Kind::ReLU;
    params_.activation = act.activation<acc_t<T>>();
    params_.gated = false;
    params_.fetches_ahead = true;
    params_.rows = {true, 1, s.channels, s.columns.size};
  }

  const T* operator()(int64_t image, int64_t r) {
    const int64_t row = image * shape_.rows.size + r, place = r % shape_.rows.kernel;
    T* to = data_.data() + place * shape_.input_row();
    if (held_[place] != row) {
      params_.x = x_ + row * shape_.input_row();
      params_.y = to;
      apply_range(params_, 0, shape_.columns.size);
      held_[place] = row;
    }
    return to;
  }

private:
  const PoolShape& shape_;
  const T* x_;
  std::vector<int64_t> held_; // the row of all images' that lies at a place
  std::vector<T> data_;
  ApplyParams<T> params_{};
};

template <typename T>
void pool_activated(
    const PoolShape& s,
    const Tensor& x,
    const ChannelNorm<acc_t<T>>& norm,
    const Pointwise& act,
    Tensor& y,
    uint8_t* position) {
  const T* data = x.const_data_ptr<T>();
  pool_all<T>(s, [&] { return ActivatedRows<T>(s, data, norm, act); }, y.mutable_data_ptr<T>(), position);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> training(
    const Tensor& x,
    const NormParams& norm,
    const std::optional<Statistics>& statistics,
    const Activation& activation,
    const Pool& pool) {
  const PoolShape s = shape_of(x, pool);
  const Pointwise act = pointwise(activation);
  Tensor y = empty_pooled(s, x.scalar_type()), position = empty_pooled(s, ScalarType::Byte), mean, rstd;
  with_floating_type(x, [&]<typename scalar_t>() {
    const auto own = finalise<scalar_t>(x, rows_of_pooled(s), norm, statistics, mean, rstd);
    pool_activated<scalar_t>(s, x, own, act, y, position.mutable_data_ptr<uint8_t>());
  });
  return {std::move(y), std::move(mean), std::move(rstd), std::move(position)};
}

Tensor inference(const Tensor& x, const NormParams& norm, const Activation& activation, const Pool& pool) {
  const PoolShape s = shape_of(x, pool);
  const Pointwise act = pointwise(activation);
  Tensor y = empty_pooled(s, x.scalar_type());
  with_floating_type(x, [&]<typename scalar_t>() {
    const auto own = running_norm<acc_t<scalar_t>>(x.size(1), norm);
    pool_activated<scalar_t>(s, x, own, act, y, nullptr);
  });
  return y;
}

// Calls f(parameters of some rows, their number of pixels) for rows begin ... end - 1 of all images', da made for each.
template <typename T, typename F>
void for_each_gradient(
    const PoolShape& s,
    const Chosen& chosen,
    const BackwardParams<T>& all,
    int64_t begin,
    int64_t end,
    const F& f) {
  constexpr int64_t kScratchBytes = 32 * 1024;
  const int64_t together = std::max<int64_t>(1, kScratchBytes / (s.input_row() * static_cast<int64_t>(sizeof(T))));
  std::vector<T> da(together * s.input_row());
  for (int64_t first = begin; first < end; first += together) {
    const int64_t rows = std::min(together, end - first);
    for (int64_t i = 0; i < rows; ++i) {
      unpool_row<T>(
          s,
          first + i,
          chosen.dy.const_data_ptr<T>(),
          chosen.position.const_data_ptr<uint8_t>(),
          da.data() + i * s.input_row());
    }
    BackwardParams<T> part = all;
    part.dy = da.data();
    part.x = all.x + first * s.input_row();
    part.dx = all.dx == nullptr ? nullptr : all.dx + first * s.input_row();
    f(part, rows * s.columns.size);
  }
}

// with_variant where there is neither a residual nor bits, and rows are channels.
template <typename T, typename F>
void with_variant_alone(const BackwardParams<T>& p, const F& f) {
  if (p.general) {
    p.activation.for_loops([&](const auto& activation) { f(GeneralGradient{activation, false}); });
  } else if (p.gate == Gate::recompute) {
    f(FixedGradient<false, Gate::recompute>());
  } else {
    f(FixedGradient<false, Gate::open>());
  }
}

template <typename T>
ChannelSums sum_pooled(const PoolShape& s, const Chosen& chosen, const BackwardParams<T>& p) {
  const Segments segments = segments_of<T>(s, s.input_rows(), kReductionBytes);
  ChannelSums zero;
  std::fill_n(zero.begin(), 2, std::vector<double>(s.channels, 0.0));
  std::vector<ChannelSums> parts(std::max<int64_t>(1, segments.count()), zero);
  with_variant_alone(p, [&](const auto& variant) {
    for_each_segment(segments, [&](int64_t segment) {
      const auto [begin, end] = segments.range(segment);
      for_each_gradient(s, chosen, p, begin, end, [&](const BackwardParams<T>& part, int64_t pixels) {
        sum_columns(part, variant, 0, pixels, parts[segment]);
      });
    });
  });
  return total_of(std::move(parts));
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& position,
    const Tensor& x,
    const Norm& norm,
    const Activation& activation,
    const Pool& pool) {
  const PoolShape s = shape_of(x, pool);
  const Chosen chosen(s, dy, position, x.scalar_type());
  const Pointwise act = pointwise(activation);
  Tensor dx = empty(x.sizes(), x.scalar_type(), MemoryFormat::channels_last);
  Tensor dweight = channel_vector(x, s.channels), dbias = channel_vector(x, s.channels);
  with_floating_type(x, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Saved<A> saved(s.channels, norm);
    const ChannelNorm<A> own = saved.norm();
    BackwardParams<scalar_t> params{};
    params.x = x.const_data_ptr<scalar_t>();
    params.norm = &own;
    params.gate = act.kind == Kind::ReLU ? Gate::recompute : Gate::open;
    params.keep_scale = 1;
    params.rows = rows_of_pooled(s);
    params.activation = act.activation<A>();
    params.general = params.activation.general();
    params.recomputes = act.recomputes(false);
    const ChannelSums sums = sum_pooled(s, chosen, params);
    A *of_weight = dweight.mutable_data_ptr<A>(), *of_bias = dbias.mutable_data_ptr<A>();
    for (int64_t c = 0; c < s.channels; ++c) {
      of_weight[c] = static_cast<A>(sums[1][c] * saved.rstd[c]);
      of_bias[c] = static_cast<A>(sums[0][c]);
    }
    const double count = static_cast<double>(params.rows.count());
    const GradientNorm<A> gradient = gradient_norm<A>(own, saved.rstd, of_weight, of_bias, count);
    params.dx = dx.mutable_data_ptr<scalar_t>();
    params.gradient = &gradient;
    params.centred = true;
    params.stream = should_stream(params.dx, params.rows);
    const Segments segments = segments_of<scalar_t>(s, s.input_rows(), kElementwiseBytes);
    with_variant_alone(params, [&](const auto& variant) {
      for_each_segment_backwards(segments, [&](int64_t segment) {
        const auto [begin, end] = segments.range(segment);
        for_each_gradient(s, chosen, params, begin, end, [&](const auto& part, int64_t pixels) {
          gradient_rows<true>(part, variant, 0, pixels);
        });
      });
    });
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("max_pool_forward", boxed<&max_pool_forward>);
  m.impl("max_pool_backward", boxed<&max_pool_backward>);
  m.impl("norm_act_max_pool_training", boxed<&training>);
  m.impl("norm_act_max_pool_inference", boxed<&inference>);
  m.impl("norm_act_max_pool_backward", boxed<&backward>);
}
