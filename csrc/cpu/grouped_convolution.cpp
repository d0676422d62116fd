// The operators grouped_conv_*: convolutions in groups of few channels, and of single ones (depthwise), with padding of
// half the kernel.
//
// Each thread reads a chunk of images and a panel of channels with the padding around them into memory that the L2
// cache holds, and sums its outputs in registers (grouped_sums.h); depthwise ones are summed out of the images
// themselves (grouped_depthwise.h). The gradient of x is such a convolution of dy; with stride 2 each of four phases of
// its pixels has a part of the taps. Weights that are not finite are summed without the padding, which has no part in
// any result.
//
// Every output and gradient of x is one sum in one order, whatever the number of threads; chunks, and so statistics, do
// not depend on it either. The weight's gradient is summed by as many parts as there are threads.
//
// The default module has none of them: there the operators are PyTorch's convolution.
#include "grouped_convolution.h"
#include "conv3x3.h"
#include "grouped_forward.h"
#include "grouped_weight_gradient.h"
#include "library.h"
#include "statistics.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace grouped {
namespace {

// --- arguments

Shape checked_shape(const Tensor& x, const Tensor& weight, int64_t stride) {
  conv::check_input(x);
  const Sizes w = weight.sizes();
  FASTRES_CHECK(
      w.size() == 4 && (w[2] == 3 || w[2] == 5 || w[2] == 7) && w[3] == w[2],
      "weight: expected a kernel of 3x3, 5x5 or 7x7, got shape ",
      w);
  conv::check_weight_dtype(weight, x);
  FASTRES_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  const int64_t channels = x.size(1), inputs = w[1], groups = inputs > 0 ? channels / inputs : 0;
  FASTRES_CHECK(
      groups > 0 && channels % inputs == 0 && w[0] % groups == 0,
      "weight: expected shape (K, C / groups, k, k) for x of ",
      channels,
      " channels, got ",
      w);
  const Shape s{x.size(0), x.size(2), x.size(3), channels, w[0], inputs, w[0] / groups, w[2], stride};
  FASTRES_CHECK(
      s.is_served(),
      "weight: expected groups of 1, 4 or multiples of 8 channels, got ",
      inputs,
      " and ",
      s.group_outputs);
  return s;
}

template <typename T>
Images<const T> images_of(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.size(2), t.size(3), t.size(1)};
}

// A tensor of weights that are in float32.
Weights<const float> weights_of(const Tensor& w) {
  return {w.const_data_ptr<float>(), w.stride(0), w.stride(1), w.stride(3)};
}
bool taps_are_adjacent(const Tensor& w) {
  return w.stride(2) == w.size(3) * w.stride(3);
}

// --- forward

// The moments of outputs that have just been written.
template <typename T>
void measure(const Images<T>& y, const Outputs& part, Moments& moments) {
  const Chunk& chunk = part.chunk;
  const int64_t pixels = chunk.images * chunk.rows * y.width, end = part.first + part.count;
  const T* first = y.at(chunk.image, chunk.row, 0);
  for (int64_t c = part.first; c < end; c += kPanelChannels) {
    const int64_t count = std::min(kPanelChannels, end - c), block = block_rows_of(count, sizeof(T));
    for (int64_t row = 0; row < pixels; row += block) {
      const int64_t rows = std::min(block, pixels - row);
      add_panel<T>(
          Chan(row, rows),
          moments.mean.data() + c,
          moments.m2.data() + c,
          first + row * y.channels + c,
          rows,
          count,
          y.channels);
    }
  }
}

} // namespace

template <typename T>
void convolve(
    const Shape& s,
    const Images<const T>& x,
    const Weights<const float>& weights,
    const Images<T>& y,
    const Finish& finish) {
  const Convolution<T> convolution(s, weights, false);
  const Chunks chunks = chunks_of(s);
  for_each_task(chunks, s.panels(), chunks.count(), [&](const Chunk& chunk, int64_t i, int64_t at, int64_t) {
    const Panel panel = Panel::of(s, at);
    if (s.kind() == Kind::depthwise) {
      convolution.run(chunk, panel, x, y);
    } else {
      Padded padded = convolution.padded(chunk.rows, panel.units, nullptr);
      const Workspace data(chunk.images * padded.image());
      padded.data = data.data();
      const int64_t first = panel.first * s.unit_inputs();
      const int64_t count = std::min(panel.units * s.unit_inputs(), s.channels - first);
      read_padded<false>(x, chunk, convolution.top(chunk), convolution.before(), first, count, padded);
      convolution.run(chunk, panel, padded, y);
    }
    const int64_t channel = panel.first * s.unit_outputs();
    finish({chunk, i, channel, std::min(panel.units * s.unit_outputs(), s.outputs - channel)});
  });
}

template void convolve(
    const Shape&,
    const Images<const float>&,
    const Weights<const float>&,
    const Images<float>&,
    const Finish&);
template void convolve(
    const Shape&,
    const Images<const BFloat16>&,
    const Weights<const float>&,
    const Images<BFloat16>&,
    const Finish&);

namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, bool statistics, int64_t stride) {
  const Shape s = checked_shape(x, weight, stride);
  FASTRES_CHECK(!statistics || x.numel() > 0, "x: expected at least one element to measure, got shape ", x.sizes());
  Tensor y = conv::empty_output(x, s.outputs, stride);
  const int64_t channels = statistics ? s.outputs : 0;
  Tensor mean = channel_vector(x, channels), m2 = channel_vector(x, channels);
  if (x.numel() > 0) {
    const Tensor in = conv::channels_last(x), w = weight.to(ScalarType::Float);
    conv::with_type(x, [&](auto zero) {
      using T = decltype(zero);
      const Images<T> to{y.mutable_data_ptr<T>(), s.out_height(), s.out_width(), s.outputs};
      const Chunks chunks = chunks_of(s);
      std::vector<Moments> parts(statistics ? chunks.count() : 0, Moments(channels));
      const Tensor packable = taps_are_adjacent(w) ? w : w.contiguous();
      convolve<T>(s, images_of<T>(in), weights_of(packable), to, [&](const Outputs& part) {
        if (statistics) {
          measure(to, part, parts[part.index]);
        }
      });
      for (size_t i = 0; i < parts.size(); ++i) {
        const Chunk chunk = chunks[static_cast<int64_t>(i)];
        parts[i].count = chunk.images * chunk.rows * to.width;
      }
      if (statistics) {
        const Moments all = combine(parts, channels);
        std::copy(all.mean.begin(), all.mean.end(), mean.mutable_data_ptr<float>());
        std::copy(all.m2.begin(), all.m2.end(), m2.mutable_data_ptr<float>());
      }
    });
  }
  return {std::move(y), std::move(mean), std::move(m2)};
}

// --- backward

// A unit's gradient of the weights: [outputs of a group][blocks of eight channels][tap][kLanes].
template <typename F>
void add_unit(const Shape& s, const F& add) {
  const int64_t blocks = s.unit_inputs() / kLanes, block_weights = s.taps() * kLanes;
  if (s.kind() == Kind::depthwise) {
    add(std::integral_constant<Kind, Kind::depthwise>(), 0, 0, 0, 0);
  } else if (s.kind() == Kind::pairs) {
    add(std::integral_constant<Kind, Kind::pairs>(), 0, 0, 0, block_weights);
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t k = 0; k < s.group_outputs; k += 4) {
        const int64_t at = (k * blocks + block) * block_weights;
        add(std::integral_constant<Kind, Kind::dense>(), block, k, at, blocks * block_weights);
      }
    }
  }
}

void add_weight_gradient(
    const Shape& s,
    const Chunk& chunk,
    const Padded& x,
    const Padded& dy,
    int64_t border, // pixels of dy's padding above and left
    int64_t units,
    bool finite,
    float* to) {
  const int64_t padding = s.kernel / 2;
  const Pixels pixels{
      chunk.images,
      chunk.rows,
      s.out_width(),
      s.stride,
      chunk.row * s.stride - padding,
      s.height,
      x.row(),
      x.image(),
      dy.row(),
      dy.image()};
  const float* gradient = dy.data + border * (dy.row() + kLanes);
  for (int64_t unit = 0; unit < units; ++unit) {
    add_unit(s, [&](auto kind, int64_t block, int64_t k, int64_t at, int64_t output) {
      const float* input = x.data + (unit * s.unit_inputs() / kLanes + block) * x.block();
      const float* of_unit = gradient + (unit * s.unit_outputs() / kLanes + k / kLanes) * dy.block();
      float* sums = to + unit * s.unit_weights() + at;
      if (finite) {
        add_taps<kind>(pixels, s.kernel, input, of_unit, k % kLanes, sums, output);
      } else {
        add_taps_inside<kind>(pixels, s.kernel, {s.width, padding}, input, of_unit, k % kLanes, sums, output);
      }
    });
  }
}

// The sums of all parts, in their order, into the gradient's tensor.
void collect(const Shape& s, const float* sums, int64_t parts, const Weights<float>& to) {
  const int64_t size = s.unit_weights(), all = s.units() * size, blocks = s.unit_inputs() / kLanes;
  for_each_unit(s, [&](int64_t unit) {
    const float* from = sums + unit * size;
    for (int64_t k = 0; k < size / (blocks * s.taps() * kLanes); ++k) {
      for (int64_t block = 0; block < blocks; ++block) {
        const LaneWeights<float> gradient = lane_weights(s, to, unit, true, block * kLanes, k);
        for (int64_t tap = 0; tap < s.taps(); ++tap, from += kLanes) {
          Octet sum = load8(from);
          for (int64_t part = 1; part < parts; ++part) {
            sum = _mm256_add_ps(sum, load8(from + part * all));
          }
          alignas(32) float lanes[kLanes];
          store8(lanes, sum);
          for (int64_t lane = 0; lane < gradient.lanes; ++lane) {
            gradient.at(lane, tap * to.tap) = lanes[lane];
          }
        }
      }
    }
  });
}

template <typename T>
void differentiate(
    const Shape& s,
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    Tensor* dx,
    Tensor* dweight) {
  std::optional<Convolution<T>> convolution;
  if (dx != nullptr) {
    convolution.emplace(s, weights_of(weight), true);
  }
  const Chunks chunks = chunks_of(s);
  const int64_t parts = std::min(chunks.count(), get_num_threads()), all = s.units() * s.unit_weights();
  const Workspace sums(dweight != nullptr ? parts * all : 0);
  if (dweight != nullptr) {
    std::fill_n(sums.data(), parts * all, 0.0f);
  }
  const Images<const T> from_dy = images_of<T>(dy), from_x = images_of<T>(x);
  const auto task = [&](const Chunk& chunk, int64_t, int64_t at, int64_t part) {
    const Panel panel = Panel::of(s, at);
    const int64_t channel = panel.first * s.unit_outputs(), first = panel.first * s.unit_inputs();
    const int64_t channels = std::min(panel.units * s.unit_outputs(), s.outputs - channel);
    // A depthwise convolution reads dy where it is.
    const bool pads = dx != nullptr && s.kind() != Kind::depthwise;
    const int64_t border = pads ? convolution->before() : 0;
    Padded gradient = pads ? convolution->padded(chunk.rows, panel.units, nullptr)
                           : Padded{chunk.rows, s.out_width(), panel.units * s.unit_outputs() / kLanes, nullptr};
    const Workspace gradient_data(pads || dweight != nullptr ? chunk.images * gradient.image() : 0);
    gradient.data = gradient_data.data();
    bool finite = true;
    if (pads || dweight != nullptr) {
      finite = read_padded<true>(from_dy, chunk, chunk.row - border, border, channel, channels, gradient);
    }
    if (dweight != nullptr) {
      Padded input{
          (chunk.rows - 1) * s.stride + s.kernel,
          (s.out_width() - 1) * s.stride + s.kernel,
          panel.units * s.unit_inputs() / kLanes,
          nullptr};
      const Workspace input_data(chunk.images * input.image());
      input.data = input_data.data();
      const int64_t count = std::min(panel.units * s.unit_inputs(), s.channels - first), padding = s.kernel / 2;
      read_padded<false>(from_x, chunk, chunk.row * s.stride - padding, padding, first, count, input);
      float* to = sums.data() + part * all + panel.first * s.unit_weights();
      add_weight_gradient(s, chunk, input, gradient, border, panel.units, finite, to);
    }
    if (dx != nullptr) {
      const Images<T> to{dx->mutable_data_ptr<T>(), s.height, s.width, s.channels};
      pads ? convolution->run(chunk, panel, gradient, to) : convolution->run(chunk, panel, from_dy, to);
    }
  };
  for_each_task(chunks, s.panels(), dweight != nullptr ? parts : chunks.count(), task);
  if (dweight != nullptr) {
    float* to = dweight->mutable_data_ptr<float>();
    collect(s, sums.data(), parts, {to, dweight->stride(0), dweight->stride(1), dweight->stride(3)});
  }
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    std::array<bool, 2> needs,
    int64_t stride) {
  const Shape s = checked_shape(x, weight, stride);
  conv::check_gradient(dy, x, weight, stride);
  Tensor dx = needs[0] ? conv::empty_channels_last(x.sizes(), x) : nothing_like(x);
  Tensor dweight = nothing_like(weight);
  if (needs[1]) {
    const auto format = weight.is_contiguous() ? MemoryFormat::contiguous : MemoryFormat::channels_last;
    dweight = empty(weight.sizes(), ScalarType::Float, format);
    if (x.numel() == 0) {
      dweight.zero_();
    }
  }
  if (x.numel() > 0 && (needs[0] || needs[1])) {
    const Tensor gradient = conv::channels_last(dy), in = conv::channels_last(x), w = weight.to(ScalarType::Float);
    conv::with_type(x, [&](auto zero) {
      using T = decltype(zero);
      differentiate<T>(
          s,
          gradient,
          in,
          taps_are_adjacent(w) ? w : w.contiguous(),
          needs[0] ? &dx : nullptr,
          needs[1] ? &dweight : nullptr);
    });
  }
  if (needs[1]) {
    dweight = dweight.to(weight.scalar_type());
  }
  return {std::move(dx), std::move(dweight)};
}

} // namespace
} // namespace grouped
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("grouped_conv_forward", boxed<&grouped::forward>);
  m.impl("grouped_conv_backward", boxed<&grouped::backward>);
}

#endif
