// The operator frozen_network: the layers of a frozen network, or of a block, in one call.
//
// fastres/nn/plan.py records the steps: what each reads and writes, in the input, the output, or one scratch buffer
// that is planned ahead, so that a layer reads what the one before has left in the caches.
#include "grouped_forward.h"
#include "library.h"
#include "max_pool.h"
#include "packed_convolution.h"
#include "workspace.h"

#include <bit>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// The values of fastres.ops.frozen_network.Kind, and of its INPUT, OUTPUT and NONE.
enum class StepKind : int64_t { convolution, norm_act, max_pool, mean, grouped };
constexpr int64_t kInput = -1, kOutput = -2, kNone = -3;

// A row of `steps`; fastres.ops.frozen_network.Step has the same fields, in words. Places are offsets in scratch, in
// elements of one image, or one of the three values above.
struct Step {
  int64_t kind, input, residual, output, weight, bias;
  int64_t channels, height, width, outputs, out_height, out_width;
  int64_t kernel, stride, padding, depth, winograd, activation, alpha;
};
constexpr int64_t kFields = sizeof(Step) / sizeof(int64_t);

constexpr int64_t kThreadElements = 16 * 1024;

// x and y: [images, height, width, channels].
template <typename T>
struct Pass {
  const Step& step;
  int64_t images;
  const T* x;
  const T* residual; // or null
  T* y;
  const float *weight, *bias;
  ActivationOf<float> activation;

  int64_t pixels() const {
    return images * step.height * step.width;
  }
};

// f(c, count) for the vectors of a row of channels.
template <typename F>
inline void for_each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) {
    f(c, std::integral_constant<int64_t, kWidth>());
  }
  if (c < channels) {
    f(c, channels - c);
  }
}

// f(begin, end) for shares of `rows`, each of which takes `elements` operations.
template <typename F>
inline void for_rows(int64_t rows, int64_t elements, const F& f) {
  parallel_for(0, rows, std::max<int64_t>(1, kThreadElements / std::max<int64_t>(1, elements)), f);
}

// y = f(weight * x + bias + residual)
template <typename T>
void norm_act(const Pass<T>& p) {
  const int64_t channels = p.step.channels;
  for_rows(p.pixels(), channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * channels; row < end * channels; row += channels) {
      for_each_vector(channels, [&](int64_t c, auto count) {
        Lanes z = multiply_add(
            load_counted(p.x + row + c, count), load_counted(p.weight + c, count), load_counted(p.bias + c, count));
        if (p.residual != nullptr) {
          z = z + load_counted(p.residual + row + c, count);
        }
        store_counted(p.y + row + c, Lanes(p.activation.forward(Vec<float>(z))), count);
      });
    }
  });
}

PoolShape pool_shape(const Step& s, int64_t images) {
  return {Sizes{images, s.channels, s.height, s.width}, Pool{s.kernel, s.stride, s.padding}};
}

template <typename T>
void max_pool(const Pass<T>& p) {
  const PoolShape s = pool_shape(p.step, p.images);
  for_rows(s.output_rows(), s.output_row() * s.rows.kernel, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const T* image = p.x + line / s.rows.outputs * s.rows.size * s.input_row();
      pool_row<false>(
          s,
          line % s.rows.outputs,
          [&](int64_t r) { return image + r * s.input_row(); },
          p.y + line * s.output_row(),
          nullptr);
    }
  });
}

// Of a vector of channels over pixels. By halves, so that rounding errors do not grow with their number.
template <typename T, typename Count>
Lanes sum_pixels(const T* x, int64_t pixels, int64_t channels, Count count) {
  constexpr int64_t kInOrder = 32;
  if (pixels > kInOrder) {
    const int64_t half = pixels / 2;
    return sum_pixels(x, half, channels, count) + sum_pixels(x + half * channels, pixels - half, channels, count);
  }
  Lanes sum{};
  for (int64_t i = 0; i < pixels; ++i) {
    sum = sum + load_counted(x + i * channels, count);
  }
  return sum;
}

// Over all pixels of an image.
template <typename T>
void mean(const Pass<T>& p) {
  const Step& s = p.step;
  const int64_t pixels = s.height * s.width, vectors = (s.channels + kWidth - 1) / kWidth;
  const Lanes inverse = broadcast(1.0f / static_cast<float>(pixels));
  for_rows(p.images * vectors, pixels * kWidth, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / vectors, c = task % vectors * kWidth;
      const auto add = [&](auto count) {
        const Lanes sum = sum_pixels(p.x + image * pixels * s.channels + c, pixels, s.channels, count);
        store_counted(p.y + image * s.channels + c, sum * inverse, count);
      };
      if (c + kWidth <= s.channels) {
        add(std::integral_constant<int64_t, kWidth>());
      } else {
        add(s.channels - c);
      }
    }
  });
}

grouped::Shape grouped_shape(const Step& s, int64_t images) {
  const int64_t groups = s.channels / s.depth;
  return {images, s.height, s.width, s.channels, s.outputs, s.depth, s.outputs / groups, s.kernel, s.stride};
}

// y = f(conv(x) + bias)
template <typename T>
void convolve_groups(const Pass<T>& p) {
  const Step& s = p.step;
  const grouped::Images<T> y{p.y, s.out_height, s.out_width, s.outputs};
  grouped::convolve<T>(
      grouped_shape(s, p.images),
      {p.x, s.height, s.width, s.channels},
      // [kernel][kernel][inputs of a group][outputs]
      {p.weight, 1, s.outputs, s.depth * s.outputs},
      y,
      [&](const grouped::Outputs& part) {
        const grouped::Chunk& chunk = part.chunk;
        T* row = y.at(chunk.image, chunk.row, 0) + part.first;
        for (const T* end = row + chunk.images * chunk.rows * y.width * y.channels; row < end; row += y.channels) {
          for_each_vector(part.count, [&](int64_t c, auto count) {
            const Lanes z = load_counted(row + c, count) + load_counted(p.bias + part.first + c, count);
            store_counted(row + c, Lanes(p.activation.forward(Vec<float>(z))), count);
          });
        }
      });
}

template <typename T>
void run_step(const Pass<T>& p) {
  const Step& s = p.step;
  switch (static_cast<StepKind>(s.kind)) {
    case StepKind::convolution:
      convolve_packed<T>(
          {{p.weight, s.outputs, s.channels, s.kernel * s.kernel, s.depth},
           p.bias,
           {p.images, s.height, s.width, s.stride, s.kernel, s.padding},
           s.winograd != 0 ? Algorithm::winograd : Algorithm::gemm,
           p.activation.kind,
           p.activation},
          p.x,
          p.residual,
          p.y);
      return;
    case StepKind::norm_act:
      norm_act(p);
      return;
    case StepKind::max_pool:
      max_pool(p);
      return;
    case StepKind::mean:
      mean(p);
      return;
    case StepKind::grouped:
      convolve_groups(p);
      return;
  }
  FASTRES_CHECK(false, "steps: expected a kind of step from 0 to 4, got ", s.kind);
}

// Memory is read and written by the numbers in `steps`, so all of them are checked.
class Checked {
public:
  Checked(const Tensor& x, const Tensors& tensors, int64_t scratch, Sizes output)
      : x_(x.numel() / x.size(0)), y_(output.numel() / x.size(0)), scratch_(scratch), tensors_(tensors) {}

  void operator()(const Step& s) const {
    const int64_t in = s.channels * s.height * s.width, out = s.outputs * s.out_height * s.out_width;
    FASTRES_CHECK(
        s.channels > 0 && s.height > 0 && s.width > 0 && s.outputs > 0 && s.out_height > 0 && s.out_width > 0,
        "steps: expected sizes of at least 1");
    place(s.input, in, kInput, x_);
    place(s.output, out, kOutput, y_);
    if (s.residual != kNone) {
      place(s.residual, out, kInput, x_);
    }
    FASTRES_CHECK(
        s.activation >= 0 && s.activation < static_cast<int64_t>(std::size(kKindNames)),
        "steps: expected an activation's number, got ",
        s.activation);
    const int64_t last = std::max(s.weight, s.bias);
    FASTRES_CHECK(
        last < static_cast<int64_t>(tensors_.size()), "steps: expected one of the tensors, got number ", last);
    switch (static_cast<StepKind>(s.kind)) {
      case StepKind::convolution: {
        window(s);
        const int64_t padded = round_up(s.channels, kPanel), groups = round_up((s.outputs + kPanel - 1) / kPanel, 2);
        FASTRES_CHECK(
            s.depth == padded || (s.depth == s.channels && s.winograd == 0), "steps: unexpected depth ", s.depth);
        FASTRES_CHECK(
            s.winograd == 0 || (s.kernel == kTaps && s.stride <= 2 && s.padding == kTaps / 2),
            "steps: expected a 3x3 kernel with stride 1 or 2 and padding 1 for Winograd's algorithm");
        tensor(s.weight, groups * s.kernel * s.kernel * s.depth * kPanel);
        tensor(s.bias, s.outputs);
        return;
      }
      case StepKind::norm_act:
        same(s, s.out_height == s.height && s.out_width == s.width);
        tensor(s.weight, s.channels);
        tensor(s.bias, s.channels);
        return;
      case StepKind::max_pool:
        window(s);
        same(s, true);
        static_cast<void>(pool_shape(s, 1));
        return;
      case StepKind::mean:
        same(s, s.out_height == 1 && s.out_width == 1);
        return;
      case StepKind::grouped:
        window(s);
        FASTRES_CHECK(
            s.depth > 0 && s.channels % s.depth == 0 && s.outputs % (s.channels / s.depth) == 0,
            "steps: unexpected depth ",
            s.depth);
        FASTRES_CHECK(
            s.padding == s.kernel / 2 && grouped_shape(s, 1).is_served(), "steps: there is no kernel for these groups");
        FASTRES_CHECK(s.residual == kNone, "steps: expected no residual of a convolution in groups");
        tensor(s.weight, s.kernel * s.kernel * s.depth * s.outputs);
        tensor(s.bias, s.outputs);
        return;
    }
  }

private:
  int64_t x_, y_, scratch_; // elements of one image
  const Tensors& tensors_;

  // `at` is in scratch, or is `outside`, which has room for that many elements.
  void place(int64_t at, int64_t size, int64_t outside, int64_t elements) const {
    const int64_t room = at >= 0 ? scratch_ - at : at == outside ? elements : 0;
    FASTRES_CHECK(size <= room, "steps: expected room for ", size, " elements at ", at, ", got ", room);
  }
  void tensor(int64_t i, int64_t size) const {
    FASTRES_CHECK(i >= 0, "steps: expected one of the tensors, got number ", i);
    FASTRES_CHECK(
        tensors_[i].scalar_type() == ScalarType::Float,
        "tensors: expected dtype float32, got ",
        tensors_[i].scalar_type());
    FASTRES_CHECK(
        tensors_[i].is_contiguous() && tensors_[i].numel() == size,
        "tensors: expected a contiguous tensor of ",
        size,
        " elements, got shape ",
        tensors_[i].sizes());
  }
  static void window(const Step& s) {
    FASTRES_CHECK(
        s.kernel > 0 && s.stride > 0 && s.padding >= 0 && std::min(s.height, s.width) + 2 * s.padding >= s.kernel &&
            s.out_height == (s.height + 2 * s.padding - s.kernel) / s.stride + 1 &&
            s.out_width == (s.width + 2 * s.padding - s.kernel) / s.stride + 1,
        "steps: the sizes of the output are not those of the window");
  }
  static void same(const Step& s, bool sizes) {
    FASTRES_CHECK(s.outputs == s.channels && sizes, "steps: the sizes of the output are not those of the input");
  }
};

// x: channels_last or copied to it. steps: int64 [steps, kFields]. scratch: elements of one image. output: sizes of the
// result, [N, C, H, W] in channels_last or [N, C].
Tensor frozen_network(const Tensor& x, const Tensors& tensors, const Tensor& steps, int64_t scratch, Sizes output) {
  check_input(x);
  FASTRES_CHECK(x.numel() > 0, "x: expected at least one element, got shape ", x.sizes());
  FASTRES_CHECK(
      steps.dim() == 2 && steps.size(1) == kFields && steps.scalar_type() == ScalarType::Long && steps.is_contiguous(),
      "steps: expected a contiguous int64 tensor of shape [steps, ",
      kFields,
      "], got ",
      steps.scalar_type(),
      " of shape ",
      steps.sizes());
  FASTRES_CHECK(scratch >= 0, "scratch: expected at least 0, got ", scratch);
  FASTRES_CHECK(
      (output.size() == 2 || output.size() == 4) && output[0] == x.size(0) && output.numel() > 0,
      "output: expected the sizes of ",
      x.size(0),
      " images or rows, got ",
      output);
  const Step* all = reinterpret_cast<const Step*>(steps.const_data_ptr<int64_t>());
  const int64_t count = steps.size(0), images = x.size(0);
  const Checked check(x, tensors, scratch, output);
  std::for_each(all, all + count, check);
  const Tensor in = channels_last(x);
  Tensor y = output.size() == 4 ? empty_channels_last(output, x) : empty(output, x.scalar_type());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t item = sizeof(T);
    const Workspace memory((scratch * images * item + 3) / static_cast<int64_t>(sizeof(float)));
    T* const places = reinterpret_cast<T*>(memory.data());
    const auto read = [&](int64_t place) -> const T* {
      return place == kNone ? nullptr : place == kInput ? in.const_data_ptr<T>() : places + place * images;
    };
    const auto data = [&](int64_t i) { return i >= 0 ? tensors[i].const_data_ptr<float>() : nullptr; };
    for (int64_t i = 0; i < count; ++i) {
      const Step& s = all[i];
      run_step<T>(
          {s,
           images,
           read(s.input),
           read(s.residual),
           s.output == kOutput ? y.mutable_data_ptr<T>() : places + s.output * images,
           data(s.weight),
           data(s.bias),
           {static_cast<Kind>(s.activation), static_cast<float>(std::bit_cast<double>(s.alpha))}});
    }
  });
  return y;
}

} // namespace
} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

FASTRES_KERNELS(m) {
  using namespace fastres;
  m.impl("frozen_network", boxed<&conv::frozen_network>);
}

#endif
