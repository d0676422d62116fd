// The strided 1x1 convolution of a shortcut on the CPU, as GEMMs over gathered rows.
//
//   product[p, :] = W s[at(p), :]      p: output position, at(p): the input position under it
//   ds[at(p), :] = W^T dproduct[p, :], zero elsewhere      dW = sum_p dproduct[p, :] s[at(p), :]^T
//
// The work is cut into blocks of output rows whose gathered input and product stay in the L2 cache. In training a block
// is measured as soon as it is multiplied; in evaluation it is normalised, added and activated there and never written
// raw. In training float32 in channels_last is gathered as a whole instead, and multiplied by pixel_gemm.h's kernels.
//
// Passes over memory: forward reads the gathered share of s and writes the product; evaluation reads x as well and
// writes y instead; backward reads dproduct twice and the gathered share of s once, and writes ds once, zeros included.
#include "batch_norm_act.h"
#include "conv3x3.h"
#include "library.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <tuple>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockCacheBytes = 512 * 1024;
constexpr int64_t kImageSumElements = 4 * 1024 * 1024;
constexpr int64_t kSumElements = 64 * 1024; // that pay for a thread's start

struct Geometry {
  Rows in, out;
  int64_t in_h, in_w, out_h, out_w;
  int64_t stride_h, stride_w;

  bool gathers() const {
    return stride_h != 1 || stride_w != 1;
  }
  // Output lines (channels_last: W positions of one image; NCHW: whole images) and the positions in each.
  int64_t lines() const {
    return out.channels_last ? out.images * out_h : out.images;
  }
  int64_t line() const {
    return out.channels_last ? out_w : out.pixels;
  }
};

Geometry geometry_of(const Tensor& s, const Tensor& weight, Sizes stride) {
  const Rows in = rows_of(s);
  FASTRES_CHECK(
      weight.dim() == 4 && weight.size(1) == in.channels && weight.size(2) == 1 && weight.size(3) == 1,
      "weight: expected shape (Cout, ",
      in.channels,
      ", 1, 1), got ",
      weight.sizes());
  FASTRES_CHECK(
      weight.scalar_type() == s.scalar_type(),
      "weight: expected dtype ",
      s.scalar_type(),
      ", got ",
      weight.scalar_type());
  FASTRES_CHECK(
      stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride: expected two positive numbers, got ", stride);
  Geometry g{in, in, s.size(2), s.size(3), 0, 0, stride[0], stride[1]};
  g.out_h = (g.in_h + g.stride_h - 1) / g.stride_h;
  g.out_w = (g.in_w + g.stride_w - 1) / g.stride_w;
  g.out = {in.channels_last, in.images, weight.size(0), g.out_h * g.out_w};
  return g;
}

Tensor empty_product(const Tensor& s, const Geometry& g) {
  return empty({g.out.images, g.out.channels, g.out_h, g.out_w}, s.scalar_type(), g.out.memory_format());
}

// Lines a block takes, and segments of whole blocks.
int64_t block_lines(const Geometry& g, int64_t item_bytes) {
  const int64_t line_bytes = g.line() * (g.in.channels + g.out.channels) * item_bytes;
  return std::max<int64_t>(1, kBlockCacheBytes / std::max<int64_t>(line_bytes, 1));
}

// The input under output lines first ... first + count - 1: [positions, Cin] in channels_last, [Cin, positions] of one
// image in NCHW.
template <typename T>
void gather_lines(const Geometry& g, const T* s, int64_t first, int64_t count, T* to) {
  const int64_t channels = g.in.channels;
  if (g.in.channels_last) {
    for (int64_t line = first; line < first + count; ++line) {
      const int64_t image = line / g.out_h, row = line % g.out_h * g.stride_h;
      const T* from = s + (image * g.in_h + row) * g.in_w * channels;
      for (int64_t j = 0; j < g.out_w; ++j, to += channels) {
        std::memcpy(to, from + j * g.stride_w * channels, channels * sizeof(T));
      }
    }
  } else {
    const T* image = s + first * channels * g.in.pixels;
    for (int64_t c = 0; c < channels * count; ++c) {
      for (int64_t i = 0; i < g.out_h; ++i) {
        const T* from = image + c * g.in.pixels + i * g.stride_h * g.in_w;
        for (int64_t j = 0; j < g.out_w; ++j) {
          *to++ = from[j * g.stride_w];
        }
      }
    }
  }
}

// The same in a buffer; where nothing is skipped it is s itself.
template <typename T>
const T* gather(const Geometry& g, const T* s, int64_t first, int64_t count, std::vector<T>& buffer) {
  if (!g.gathers()) {
    return s + first * g.line() * g.in.channels;
  }
  buffer.resize(count * g.line() * g.in.channels);
  gather_lines(g, s, first, count, buffer.data());
  return buffer.data();
}

// The gradient of output lines back to the input: every position of the input lines above them is written, once.
template <typename T>
void scatter(const Geometry& g, const T* from, int64_t first, int64_t count, T* ds) {
  const int64_t channels = g.in.channels;
  const auto input_lines = [&](int64_t row) { return std::min(g.in_h, (row + 1) * g.stride_h) - row * g.stride_h; };
  if (g.in.channels_last) {
    for (int64_t line = first; line < first + count; ++line) {
      const int64_t image = line / g.out_h, row = line % g.out_h;
      T* to = ds + (image * g.in_h + row * g.stride_h) * g.in_w * channels;
      std::memset(static_cast<void*>(to), 0, input_lines(row) * g.in_w * channels * sizeof(T));
      for (int64_t j = 0; j < g.out_w; ++j, from += channels) {
        std::memcpy(to + j * g.stride_w * channels, from, channels * sizeof(T));
      }
    }
    return;
  }
  T* image = ds + first * channels * g.in.pixels;
  std::memset(static_cast<void*>(image), 0, count * channels * g.in.pixels * sizeof(T));
  for (int64_t c = 0; c < channels * count; ++c) {
    for (int64_t i = 0; i < g.out_h; ++i) {
      T* to = image + c * g.in.pixels + i * g.stride_h * g.in_w;
      for (int64_t j = 0; j < g.out_w; ++j) {
        to[j * g.stride_w] = *from++;
      }
    }
  }
}

template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return from_memory(data, {rows, columns}, {columns, 1});
}

// The transpose of matrix(data, rows, columns).
template <typename T>
Tensor transposed(const T* data, int64_t rows, int64_t columns) {
  return from_memory(data, {columns, rows}, {1, columns});
}

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  FASTRES_TORCH(aoti_torch_cpu_mm_out, out.get(), a.get(), b.get());
}

// A 1x1 kernel as a matrix [rows, columns], and its transpose.
struct Factor {
  int64_t rows, columns;
  Tensor plain, turned;

  Factor transpose() const {
    return {columns, rows, turned, plain};
  }
};

template <typename T>
Factor factor_of(const Tensor& contiguous) {
  const T* data = contiguous.const_data_ptr<T>();
  const int64_t rows = contiguous.size(0), columns = contiguous.size(1);
  return {rows, columns, matrix(data, rows, columns), transposed(data, rows, columns)};
}

// to = W from, for the positions of a block in either layout.
template <typename T>
void multiply(const Rows& rows, const Factor& w, const T* from, T* to, int64_t positions) {
  if (rows.channels_last) {
    mm_out(matrix(to, positions, w.rows), matrix(from, positions, w.columns), w.turned);
  } else {
    mm_out(matrix(to, w.rows, positions), w.plain, matrix(from, w.columns, positions));
  }
}

// Calls f(segment, first line, lines) for every block, segments in parallel. NCHW goes image by image.
template <typename F>
void for_each_block(const Geometry& g, int64_t item_bytes, const Segments& segments, const F& f) {
  const int64_t most = g.out.channels_last ? block_lines(g, item_bytes) : 1;
  for_each_segment(segments, [&](int64_t s) {
    const auto [begin, end] = segments.range(s);
    for (int64_t first = begin; first < end; first += most) {
      f(s, first, std::min(most, end - first));
    }
  });
}

Segments segments_of(const Geometry& g, int64_t item_bytes) {
  return Segments(g.lines(), g.lines() * g.line() * (g.in.channels + g.out.channels) * item_bytes, kReductionBytes);
}

// For the input under all outputs.
Tensor empty_pixels(const Geometry& g, const Tensor& s) {
  return empty({g.in.images, g.in.channels, g.out_h, g.out_w}, s.scalar_type(), g.in.memory_format());
}

// The input under all outputs.
template <typename T>
Tensor gather_all(const Geometry& g, const Tensor& s) {
  if (!g.gathers()) {
    return s;
  }
  const Tensor gathered = empty_pixels(g, s);
  T* to = gathered.mutable_data_ptr<T>();
  const Segments segments = segments_of(g, sizeof(T));
  for_each_segment(segments, [&](int64_t segment) {
    const auto [begin, end] = segments.range(segment);
    gather_lines(g, s.const_data_ptr<T>(), begin, end - begin, to + begin * g.line() * g.in.channels);
  });
  return gathered;
}

// The gradient of the weight in its strides, those of its axes of size 1 included: DDP compares them all. fill(data)
// has to write [Cout, Cin].
template <typename T, typename F>
Tensor gradient_of_weight(const Tensor& weight, const F& fill) {
  const bool contiguous = weight.is_contiguous();
  Tensor gradient = contiguous ? empty_strided(weight.sizes(), weight.strides(), weight.scalar_type())
                               : empty(weight.sizes(), weight.scalar_type());
  fill(gradient.mutable_data_ptr<T>());
  if (contiguous) {
    return gradient;
  }
  Tensor like = weight.clone();
  like.copy_(gradient);
  return like;
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
// Whether the kernels of the 1x1 convolution compute it in training, over gathered pixels.
bool by_pixels(const Geometry& g, const Tensor& s, const Tensor& weight) {
  return g.in.channels_last && s.scalar_type() == ScalarType::Float && s.numel() > 0 && weight.numel() > 0;
}

std::tuple<Tensor, Tensor> backward_by_pixels(
    const Geometry& g,
    const Tensor& dproduct,
    const Tensor& s,
    const Tensor& weight,
    std::array<bool, 2> needs) {
  const conv::Source<float> dy = conv::source_of<float>(dproduct);
  Tensor ds = nothing_like(s), dweight = nothing_like(s);
  if (needs[0]) {
    ds = empty_rows(s);
    const Tensor pixels = g.gathers() ? empty_pixels(g, s) : ds;
    conv::with_convolution<true>(pixels, pixels, weight, 1, [&](const auto& convolution) {
      convolution.run(dy, conv::Write<float>{pixels.mutable_data_ptr<float>(), conv::streams(pixels)});
    });
    if (g.gathers()) {
      const float* from = pixels.const_data_ptr<float>();
      float* to = ds.mutable_data_ptr<float>();
      const Segments segments = segments_of(g, sizeof(float));
      for_each_segment(segments, [&](int64_t segment) {
        const auto [begin, end] = segments.range(segment);
        scatter(g, from + begin * g.line() * g.in.channels, begin, end - begin, to);
      });
    }
  }
  if (needs[1]) {
    const Tensor pixels = gather_all<float>(g, s);
    dweight = gradient_of_weight<float>(weight, [&](float* to) {
      conv::pixel_weight_gradient(
          conv::WeightGradient<float>{
              conv::source_of<float>(pixels), dy, {to, g.in.channels, true}, g.in.channels, g.out.channels});
    });
  }
  return {std::move(ds), std::move(dweight)};
}
#endif

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& s, const Tensor& weight, Sizes stride, bool statistics) {
  const Geometry g = geometry_of(s, weight, stride);
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if (by_pixels(g, s, weight)) {
    const Tensor pixels = gather_all<float>(g, s);
    return conv::convolve_measured<float>(pixels, conv::source_of<float>(pixels), weight, statistics, 1);
  }
#endif
  const int64_t channels = g.out.channels;
  const Tensor dense = weight.contiguous();
  Tensor product = empty_product(s, g);
  Tensor mean = channel_vector(s, statistics ? channels : 0), m2 = channel_vector(s, statistics ? channels : 0);
  if (s.numel() == 0 || weight.numel() == 0) {
    for (const Tensor* result : {&product, &mean, &m2}) {
      result->zero_();
    }
    return {std::move(product), std::move(mean), std::move(m2)};
  }
  with_floating_type(s, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Segments segments = segments_of(g, sizeof(scalar_t));
    std::vector<Moments> parts(segments.count(), Moments(channels));
    scalar_t* out = product.mutable_data_ptr<scalar_t>();
    const scalar_t* in = s.const_data_ptr<scalar_t>();
    const Factor w = factor_of<scalar_t>(dense);
    for_each_block(g, sizeof(scalar_t), segments, [&](int64_t segment, int64_t first, int64_t lines) {
      std::vector<scalar_t> buffer;
      const int64_t positions = lines * g.line();
      scalar_t* block = out + first * g.line() * channels;
      multiply(g.out, w, gather(g, in, first, lines, buffer), block, positions);
      if (!statistics) {
        return;
      }
      Moments& moments = parts[segment];
      if (g.out.channels_last) {
        add_columns(moments, block, positions, channels);
        return;
      }
      const int64_t before = moments.count;
      for (int64_t c = 0; c < channels; ++c) {
        moments.count = before;
        add_planes(
            moments.mean[c], moments.m2[c], moments.count, block + c * positions, 1, positions, channels * positions);
      }
    });
    if (statistics) {
      const Moments moments = combine(parts, channels);
      std::copy(moments.mean.begin(), moments.mean.end(), mean.mutable_data_ptr<A>());
      std::copy(moments.m2.begin(), moments.m2.end(), m2.mutable_data_ptr<A>());
    }
  });
  return {std::move(product), std::move(mean), std::move(m2)};
}

// total[out, in] = the sum over images of gradient[image] from[image]^T, as many products at a time as fit, summed in
// float64.
template <typename T>
void sum_image_products(const T* gradient, const T* from, const Rows& rows, int64_t in, T* total) {
  const int64_t out = rows.channels, pixels = rows.pixels, size = out * in;
  const int64_t together = std::clamp<int64_t>(kImageSumElements / size, 1, std::max<int64_t>(rows.images, 1));
  std::vector<double> sums(size);
  const Tensor each = empty({together, out, in}, kDtype<T>);
  const T* products = each.const_data_ptr<T>();
  for (int64_t first = 0; first < rows.images; first += together) {
    const int64_t images = std::min(together, rows.images - first);
    const Tensor a = from_memory(gradient + first * out * pixels, {images, out, pixels}, {out * pixels, pixels, 1});
    const Tensor b = from_memory(from + first * in * pixels, {images, pixels, in}, {in * pixels, 1, pixels});
    const Tensor to = from_memory(products, {images, out, in}, {size, in, 1});
    FASTRES_TORCH(aoti_torch_cpu_bmm_out, to.get(), a.get(), b.get());
    parallel_for(0, size, std::max<int64_t>(1, kSumElements / images), [&](int64_t begin, int64_t end) {
      for (int64_t image = 0; image < images; ++image) {
        for (int64_t i = begin; i < end; ++i) {
          sums[i] += static_cast<double>(products[image * size + i]);
        }
      }
    });
  }
  std::transform(
      sums.begin(), sums.end(), total, [](double sum) { return static_cast<T>(static_cast<acc_t<T>>(sum)); });
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dproduct,
    const Tensor& s,
    const Tensor& weight,
    Sizes stride,
    std::array<bool, 2> needs) {
  const Geometry g = geometry_of(s, weight, stride);
  const Tensor dense = weight.contiguous();
  Tensor ds = nothing_like(s), dweight = nothing_like(s);
  const std::array<int64_t, 4> sizes = {g.out.images, g.out.channels, g.out_h, g.out_w};
  const Sizes shape(sizes);
  FASTRES_CHECK(dproduct.sizes() == shape, "dproduct: expected shape ", shape, ", got ", dproduct.sizes());
  FASTRES_CHECK(
      dproduct.scalar_type() == s.scalar_type(),
      "dproduct: expected dtype ",
      s.scalar_type(),
      ", got ",
      dproduct.scalar_type());
  if (s.numel() == 0 || weight.numel() == 0) {
    if (needs[0]) {
      ds = empty_rows(s);
      ds.zero_();
    }
    if (needs[1]) {
      dweight = weight.clone();
      dweight.zero_();
    }
    return {std::move(ds), std::move(dweight)};
  }
  const Tensor dout = dproduct.contiguous(g.out.memory_format());
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if (by_pixels(g, s, weight)) {
    return backward_by_pixels(g, dout, s, weight, needs);
  }
#endif
  with_floating_type(s, [&]<typename scalar_t>() {
    const scalar_t* gradient = dout.const_data_ptr<scalar_t>();
    const Segments segments = segments_of(g, sizeof(scalar_t));
    if (needs[0]) {
      ds = empty_rows(s);
      const Factor w = factor_of<scalar_t>(dense).transpose();
      scalar_t* to = ds.mutable_data_ptr<scalar_t>();
      for_each_block(g, sizeof(scalar_t), segments, [&](int64_t, int64_t first, int64_t lines) {
        const int64_t positions = lines * g.line();
        const scalar_t* block = gradient + first * g.line() * g.out.channels;
        if (!g.gathers()) {
          multiply(g.out, w, block, to + first * g.line() * g.in.channels, positions);
          return;
        }
        std::vector<scalar_t> buffer(positions * g.in.channels);
        multiply(g.out, w, block, buffer.data(), positions);
        scatter(g, buffer.data(), first, lines, to);
      });
    }
    if (needs[1]) {
      // One GEMM over all gathered pixels: a partial sum a segment would cost more memory than those do.
      const int64_t in = g.in.channels, out = g.out.channels;
      const Tensor gathered = gather_all<scalar_t>(g, s);
      const scalar_t* from = gathered.const_data_ptr<scalar_t>();
      dweight = gradient_of_weight<scalar_t>(weight, [&](scalar_t* to) {
        if (g.out.channels_last) {
          const int64_t positions = g.out.count();
          mm_out(matrix(to, out, in), transposed(gradient, positions, out), matrix(from, positions, in));
        } else {
          sum_image_products(gradient, from, g.out, in, to);
        }
      });
    }
  });
  return {std::move(ds), std::move(dweight)};
}

Tensor inference(
    const Tensor& s,
    const Tensor& conv_weight,
    const NormParams& norm,
    const OptionalTensor& x,
    const std::optional<NormParams>& x_norm,
    Sizes stride,
    const Activation& activation) {
  const Geometry g = geometry_of(s, conv_weight, stride);
  const int64_t channels = g.out.channels;
  const Tensor dense = conv_weight.contiguous();
  Tensor y = empty_product(s, g);
  const Pointwise act = pointwise(activation);
  Tensor copy;
  const Tensor* added = x.has_value() ? &like_rows("x", *x, y, g.out, copy) : nullptr;
  if (y.numel() == 0) {
    return y;
  }
  with_floating_type(s, [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    // The product is the forward pass's x, and the operator's x what is added to it.
    const ChannelNorm<A> own = running_norm<A>(channels, norm);
    ChannelNorm<A> other;
    if (x_norm.has_value()) {
      other = running_norm<A>(channels, *x_norm);
    }
    const Segments segments = segments_of(g, sizeof(scalar_t));
    const scalar_t* in = s.const_data_ptr<scalar_t>();
    const Factor w = factor_of<scalar_t>(dense);
    for_each_block(g, sizeof(scalar_t), segments, [&](int64_t, int64_t first, int64_t lines) {
      std::vector<scalar_t> buffer;
      const int64_t positions = lines * g.line(), at = first * g.line() * channels;
      std::vector<scalar_t> product(positions * channels);
      multiply(g.out, w, gather(g, in, first, lines, buffer), product.data(), positions);
      ApplyParams<scalar_t> params{};
      params.x = product.data();
      params.residual = added != nullptr ? added->const_data_ptr<scalar_t>() + at : nullptr;
      params.y = y.mutable_data_ptr<scalar_t>() + at;
      params.norm = &own;
      params.residual_norm = x_norm.has_value() ? &other : nullptr;
      params.keep_scale = 1;
      params.relu = act.kind == Kind::ReLU;
      params.activation = act.activation<A>();
      // The block as rows of its own: output positions, or the channels of one image.
      params.rows = g.out.channels_last ? Rows{true, 1, channels, positions} : Rows{false, 1, channels, positions};
      apply_range(params, 0, params.rows.rows());
    });
  });
  return y;
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("projection_shortcut_forward", boxed<&forward>);
  m.impl("projection_shortcut_backward", boxed<&backward>);
  m.impl("projection_shortcut_inference", boxed<&inference>);
}
