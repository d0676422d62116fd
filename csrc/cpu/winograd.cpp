// The 3x3 convolution with stride 1 and padding 1 on the CPU, by Winograd's
// F(4x4, 3x3) (winograd.h has the formulas).
//
// Outputs (and the input gradient, which is the same convolution of dy with the
// kernel turned by half a circle and its channels exchanged) in one of two
// orders:
//   by tiles      each thread takes a chunk of tiles that fits its L2 cache
//   through all three steps: transform, 36
//                 products, inverse transform. The transformed weights are made
//                 once, and read once a chunk.
//   by channels   all tiles are transformed first; then each thread takes a
//   group of output channels, transforms its
//                 weights, and goes through the tiles: the transformed weights,
//                 four times as large as the weights and larger than the tiles,
//                 never leave the caches.
// The weight gradient, likewise:
//   by shares     each thread takes its share of the tiles, a chunk at a time,
//   through transforms and products, and
//                 keeps sums of its own; they are added up and transformed back
//                 at the end.
//   at once       where the tiles are few: all are transformed, and each thread
//   takes its share of the channels.
//
// Every output and input gradient is one sum in one order, whatever the number
// of threads. Sums by shares depend on that number, and on nothing else.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <list>
#include <mutex>
#include <tuple>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace winograd {
namespace {

using at::Tensor;

// What a thread's chunk may take of its L2 cache, transformed input and
// products together.
constexpr int64_t kChunkBytes = 448 * 1024;
// Transformed tiles that all threads share, held in the last-level cache.
constexpr int64_t kSharedBytes = 16 * 1024 * 1024;
// Tiles over which a weight gradient is summed in registers, where there are
// many, and its threads' sums in all.
constexpr int64_t kGradientTiles = 128;
constexpr int64_t kGradientBytes = 256 * 1024 * 1024;
// Pairs of channels whose weights pay for a thread's start.
constexpr int64_t kThreadPairs = 64 * 1024;
// Transformed weights kept for evaluation, in all.
constexpr int64_t kKeptBytes = 256 * 1024 * 1024;
// Planes a multiple of a page apart would all fall into the same few lines of
// the L1 cache.
constexpr int64_t kSkew = 64 / sizeof(float);

// Uninitialised floats, aligned to a cache line.
class Buffer {
public:
  explicit Buffer(int64_t size) : data_(static_cast<float*>(c10::alloc_cpu(size * sizeof(float)))) {}
  ~Buffer() {
    c10::free_cpu(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const {
    return data_;
  }

private:
  float* data_;
};

// --- transformed weights

Kernel kernel_of(const Tensor& weight) {
  Kernel kernel{weight.const_data_ptr<float>(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1), {}};
  for (int64_t t = 0; t < kTaps * kTaps; ++t) {
    kernel.tap[t] = t / kTaps * weight.stride(2) + t % kTaps * weight.stride(3);
  }
  return kernel;
}

// The kernel whose convolution with dy is the input gradient.
Kernel turned(Kernel kernel) {
  std::swap(kernel.outputs, kernel.inputs);
  std::swap(kernel.output_stride, kernel.input_stride);
  std::reverse(kernel.tap.begin(), kernel.tap.end());
  return kernel;
}

int64_t groups_of(int64_t channels) {
  return (channels + kColumns - 1) / kColumns;
}

// [36][group][inputs, padded][kColumns]
Tensor transformed(const Kernel& kernel) {
  const int64_t groups = groups_of(kernel.outputs), depth = round_up(kernel.inputs, kWidth);
  Tensor to = at::empty({kPoints, groups, depth, kColumns}, at::kFloat);
  float* data = to.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kThreadPairs / (depth * kColumns));
  at::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      transform_weights(kernel, g * kColumns, data + g * depth * kColumns, groups * depth * kColumns);
    }
  });
  return to;
}

// Transformed weights of evaluation. An entry stands while the weight's storage
// lives and its data pointer, version counter, sizes and strides are what they
// were.
class KeptWeights {
public:
  Tensor get(const Tensor& weight) {
    if (weight.is_inference()) { // no version counter
      return transformed(kernel_of(weight));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      if (entry->storage.expired() || (entry->data == weight.const_data_ptr() && !entry->fits(weight))) {
        bytes_ -= entry->value.nbytes();
        entry = entries_.erase(entry);
        continue;
      }
      if (entry->data == weight.const_data_ptr()) {
        entries_.splice(entries_.begin(), entries_, entry);
        return entry->value;
      }
      ++entry;
    }
    Tensor value = transformed(kernel_of(weight));
    bytes_ += value.nbytes();
    entries_.push_front(
        {weight.storage().getWeakStorageImpl(),
         weight.const_data_ptr(),
         static_cast<int64_t>(weight._version()),
         weight.sizes().vec(),
         weight.strides().vec(),
         value});
    while (bytes_ > kKeptBytes && entries_.size() > 1) {
      bytes_ -= entries_.back().value.nbytes();
      entries_.pop_back();
    }
    return value;
  }

private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    int64_t version;
    std::vector<int64_t> sizes, strides;
    Tensor value;

    bool fits(const Tensor& weight) const {
      return version == static_cast<int64_t>(weight._version()) && weight.sizes() == at::IntArrayRef(sizes) &&
          weight.strides() == at::IntArrayRef(strides);
    }
  };
  std::mutex mutex_;
  std::list<Entry> entries_; // the one used last comes first
  int64_t bytes_ = 0;
};

KeptWeights& kept_weights() {
  static auto* kept = new KeptWeights; // never destroyed: tensors may not
                                       // outlive torch's own statics
  return *kept;
}

// --- outputs

// Where channel c of tile p goes in a plane of operand, see winograd.h.
auto operand_place(int64_t depth) {
  return [depth](int64_t p, int64_t c) { return p / kRows * depth * kRows + c * kRows + p % kRows * kWidth; };
}

void by_tiles(const Tiles& tiles, const float* x, const Tensor& weights, const Kernel& kernel, float* y) {
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), count = tiles.count();
  const int64_t width = groups * kColumns;
  const int64_t most =
      std::max<int64_t>(2, kChunkBytes / static_cast<int64_t>(sizeof(float)) / kPoints / (depth + width) / kRows) *
      kRows;
  // As many chunks for every thread.
  const int64_t threads = at::get_num_threads();
  const int64_t chunks = round_up((count + most - 1) / most, threads);
  const int64_t size = round_up((count + chunks - 1) / chunks, kRows);
  const int64_t operand_plane = size * depth + kSkew, product_plane = groups * size * kColumns + kSkew;
  const std::vector<float> zeros(kernel.inputs);
  const float* u = weights.const_data_ptr<float>();
  at::parallel_for(0, (count + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    const Buffer operand(kPoints * operand_plane), product(kPoints * product_plane);
    for (int64_t first = begin * size; first < std::min(count, end * size); first += size) {
      const int64_t chunk = std::min(size, count - first);
      transform_tiles<InputTransform, 1>(
          tiles, x, kernel.inputs, first, chunk, zeros.data(), operand.data(), operand_plane, operand_place(depth));
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t g = 0; g < groups; ++g) {
          multiply_outputs(
              operand.data() + point * operand_plane,
              u + (point * groups + g) * depth * kColumns,
              product.data() + point * product_plane + g * size * kColumns,
              chunk,
              depth);
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        transform_products(
            tiles, product.data() + g * size * kColumns, product_plane, first, chunk, y, kernel.outputs, g * kColumns);
      }
    }
  });
}

void by_channels(const Tiles& tiles, const float* x, const Kernel& kernel, float* y) {
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), count = tiles.count();
  const int64_t operand_plane = round_up(count, kRows) * depth + kSkew;
  const Buffer operand(kPoints * operand_plane);
  const std::vector<float> zeros(kernel.inputs);
  at::parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRows;
    transform_tiles<InputTransform, 1>(
        tiles,
        x,
        kernel.inputs,
        first,
        std::min(count, end * kRows) - first,
        zeros.data(),
        operand.data() + first * depth,
        operand_plane,
        operand_place(depth));
  });
  // With more threads than groups several share a group, and each transforms
  // its weights for itself.
  const int64_t threads = at::get_num_threads();
  const int64_t shares = std::clamp<int64_t>(threads / groups, 1, (count + kRows - 1) / kRows);
  const int64_t share = round_up((count + shares - 1) / shares, kRows);
  const int64_t size =
      std::min(share, kChunkBytes / 2 / static_cast<int64_t>(sizeof(float)) / kPoints / kColumns / kRows * kRows);
  at::parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t weight_plane = depth * kColumns + kSkew, product_plane = size * kColumns + kSkew;
    const Buffer weights(kPoints * weight_plane), product(kPoints * product_plane);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / shares, start = task % shares * share;
      transform_weights(kernel, g * kColumns, weights.data(), weight_plane);
      for (int64_t first = start; first < std::min(count, start + share); first += size) {
        const int64_t chunk = std::min(size, std::min(count, start + share) - first);
        for (int64_t point = 0; point < kPoints; ++point) {
          multiply_outputs(
              operand.data() + point * operand_plane + first * depth,
              weights.data() + point * weight_plane,
              product.data() + point * product_plane,
              chunk,
              depth);
        }
        transform_products(tiles, product.data(), product_plane, first, chunk, y, kernel.outputs, g * kColumns);
      }
    }
  });
}

// Whether the tiles, transformed, are smaller than the weights are.
bool goes_by_channels(const Tiles& tiles, const Kernel& kernel) {
  return tiles.count() <= kernel.outputs &&
      tiles.count() * kernel.inputs * kPoints * static_cast<int64_t>(sizeof(float)) <= 2 * kSharedBytes;
}

void convolve(const Tiles& tiles, const float* x, const Kernel& kernel, float* y, const Tensor* kept_of) {
  if (goes_by_channels(tiles, kernel)) {
    by_channels(tiles, x, kernel, y);
  } else {
    by_tiles(tiles, x, kept_of ? kept_weights().get(*kept_of) : transformed(kernel), kernel, y);
  }
}

// --- the weight gradient

// dW, and where the transformed tiles and their products lie.
struct WeightGradient {
  Tiles tiles;
  const float* x;
  const float* dy;
  float* dw; // [outputs][3][3][inputs]
  int64_t inputs, outputs;

  int64_t groups() const {
    return groups_of(inputs);
  }
  // Rows of dy a multiple of 2 KiB apart would fall into the same few lines of
  // the L1 cache.
  int64_t row() const {
    return round_up(outputs, kWidth) + kSkew;
  }
  int64_t tile_bytes() const {
    return kPoints * (row() + groups() * kColumns) * static_cast<int64_t>(sizeof(float));
  }
  int64_t gradient_plane() const {
    return groups() * outputs * kColumns + kSkew;
  }
  int64_t gradient_bytes() const {
    return kPoints * gradient_plane() * static_cast<int64_t>(sizeof(float));
  }
};

// Up to `most` transformed tiles of x and dy.
class GradientTiles {
public:
  GradientTiles(const WeightGradient& w, int64_t most)
      : most_(most),
        column_plane_(w.groups() * most * kColumns + kSkew),
        row_plane_(most * w.row() + kSkew),
        columns_(kPoints * column_plane_),
        rows_(kPoints * row_plane_),
        zeros_(std::max(w.inputs, w.outputs)) {
    if (w.inputs % kColumns != 0) {
      // The part of a column group that no vector of channels fills.
      std::fill_n(columns_.data(), kPoints * column_plane_, 0.0f);
    }
  }

  // Tiles first ... first + count - 1 of the convolution become tiles at ... at
  // + count - 1 of these.
  void transform(const WeightGradient& w, int64_t first, int64_t count, int64_t at) {
    const int64_t most = most_, row = w.row();
    transform_tiles<InputTransform, 1>(
        w.tiles,
        w.x,
        w.inputs,
        first,
        count,
        zeros_.data(),
        columns_.data() + at * kColumns,
        column_plane_,
        [most](int64_t p, int64_t c) { return c / kColumns * most * kColumns + p * kColumns + c % kColumns; });
    transform_tiles<GradientTransform, 0>(
        w.tiles,
        w.dy,
        w.outputs,
        first,
        count,
        zeros_.data(),
        rows_.data() + at * row,
        row_plane_,
        [row](int64_t p, int64_t k) { return p * row + k; });
  }

  // gradient (+)= the product of one point for output channels begin ... begin
  // + size - 1 and a group of input channels.
  void multiply(
      const WeightGradient& w,
      int64_t point,
      int64_t group,
      int64_t begin,
      int64_t size,
      int64_t count,
      float* gradient,
      bool accumulate) const {
    const float* rows = rows_.data() + point * row_plane_ + begin;
    const float* columns = columns_.data() + point * column_plane_ + group * most_ * kColumns;
    with_rows(size, [&](auto r) { gradient_product<r>(rows, w.row(), columns, gradient, count, accumulate); });
  }

private:
  int64_t most_, column_plane_, row_plane_;
  Buffer columns_, rows_;
  std::vector<float> zeros_;
};

// The inverse transform of `size` output channels from `begin` on and a group
// of input channels: the sum of `parts` products, each with planes of
// [size][kColumns].
void transform_gradient(
    const WeightGradient& w,
    int64_t group,
    int64_t begin,
    int64_t size,
    const std::vector<const float*>& parts,
    int64_t plane) {
  for (int64_t k = 0; k < size; ++k) {
    for (int64_t half = 0; half < kColumns && group * kColumns + half < w.inputs; half += kWidth) {
      const int64_t c = group * kColumns + half, at = k * kColumns + half;
      float* out = w.dw + (begin + k) * kTaps * kTaps * w.inputs + c;
      const int64_t lanes = std::min(kWidth, w.inputs - c);
      transform_square<WeightGradientTransform>(
          [&](int i) {
            Lanes sum = load(parts[0] + i * plane + at);
            for (size_t part = 1; part < parts.size(); ++part) {
              sum = sum + load(parts[part] + i * plane + at);
            }
            return sum;
          },
          [&](int i, Lanes v) { store(out + i * w.inputs, v, lanes); });
    }
  }
}

// Few tiles: all are transformed, and each product is transformed back as soon
// as it is there.
void gradient_at_once(const WeightGradient& w) {
  const int64_t count = w.tiles.count();
  GradientTiles transformed(w, count);
  at::parallel_for(
      0, count, 8, [&](int64_t begin, int64_t end) { transformed.transform(w, begin, end - begin, begin); });
  const RowGroups rows{w.outputs};
  at::parallel_for(0, w.groups() * rows.count(), 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t plane = kRows * kColumns;
    const Buffer product(kPoints * plane);
    const std::vector<const float*> parts{product.data()};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / rows.count(), first = rows.begin(task % rows.count());
      const int64_t size = rows.size(task % rows.count());
      for (int64_t point = 0; point < kPoints; ++point) {
        transformed.multiply(w, point, group, first, size, count, product.data() + point * plane, false);
      }
      transform_gradient(w, group, first, size, parts, plane);
    }
  });
}

// Many tiles: every thread takes a share of them through its caches, a chunk at
// a time, and the shares are added up.
void gradient_by_shares(const WeightGradient& w) {
  const int64_t count = w.tiles.count(), plane = w.gradient_plane();
  const int64_t chunks = (count + kGradientTiles - 1) / kGradientTiles;
  const int64_t shares =
      std::clamp<int64_t>(kGradientBytes / w.gradient_bytes(), 1, std::min<int64_t>(chunks, at::get_num_threads()));
  const Buffer gradients(shares * kPoints * plane);
  const RowGroups rows{w.outputs};
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    GradientTiles transformed(w, std::min(count, kGradientTiles));
    for (int64_t share = begin; share < end; ++share) {
      float* gradient = gradients.data() + share * kPoints * plane;
      const int64_t start = chunks * share / shares;
      for (int64_t chunk = start; chunk < chunks * (share + 1) / shares; ++chunk) {
        const int64_t first = chunk * kGradientTiles, size = std::min(kGradientTiles, count - first);
        transformed.transform(w, first, size, 0);
        for (int64_t point = 0; point < kPoints; ++point) {
          for (int64_t group = 0; group < w.groups(); ++group) {
            for (int64_t r = 0; r < rows.count(); ++r) {
              float* to = gradient + point * plane + (group * w.outputs + rows.begin(r)) * kColumns;
              transformed.multiply(w, point, group, rows.begin(r), rows.size(r), size, to, chunk > start);
            }
          }
        }
      }
    }
  });
  at::parallel_for(0, w.groups() * rows.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<const float*> parts(shares);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / rows.count(), first = rows.begin(task % rows.count());
      for (int64_t share = 0; share < shares; ++share) {
        parts[share] = gradients.data() + share * kPoints * plane + (group * w.outputs + first) * kColumns;
      }
      transform_gradient(w, group, first, rows.size(task % rows.count()), parts, plane);
    }
  });
}

void weight_gradient(const WeightGradient& w) {
  // At once where the transformed tiles are no larger than what would be added
  // up otherwise.
  const int64_t bytes = w.tiles.count() * w.tile_bytes();
  if (bytes <= kSharedBytes || (bytes <= 3 * kSharedBytes && bytes <= 4 * w.gradient_bytes())) {
    gradient_at_once(w);
  } else {
    gradient_by_shares(w);
  }
}

// --- operators

void check(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected 4 dimensions [N, C, H, W], got shape ", x.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == kTaps && weight.size(3) == kTaps,
      "weight: expected shape (K, ",
      x.size(1),
      ", 3, 3), got ",
      weight.sizes());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == x.scalar_type(),
      "weight: expected dtype ",
      x.scalar_type(),
      ", got ",
      weight.scalar_type());
}

// What the transforms are written for; the rest is PyTorch's.
bool serves(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() == at::kFloat && x.numel() > 0 && weight.numel() > 0;
}

constexpr int64_t kOne[] = {1, 1}, kNone[] = {0, 0};

Tensor channels_last(const Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor empty_channels_last(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

Tensor forward(const Tensor& x, const Tensor& weight, bool keep_weights) {
  check(x, weight);
  Tensor y = empty_channels_last({x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
  if (!serves(x, weight)) {
    return y.copy_(at::convolution(x, weight, std::nullopt, kOne, kOne, kOne, false, kNone, 1));
  }
  const Tensor in = channels_last(x);
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  convolve(
      tiles,
      in.const_data_ptr<float>(),
      kernel_of(weight),
      y.mutable_data_ptr<float>(),
      keep_weights ? &weight : nullptr);
  return y;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    std::array<bool, 2> needs) {
  check(x, weight);
  const std::array<int64_t, 4> sizes = {x.size(0), weight.size(0), x.size(2), x.size(3)};
  const at::IntArrayRef shape(sizes);
  TORCH_CHECK_VALUE(dy.sizes() == shape, "dy: expected shape ", shape, ", got ", dy.sizes());
  TORCH_CHECK_TYPE(
      dy.scalar_type() == x.scalar_type(), "dy: expected dtype ", x.scalar_type(), ", got ", dy.scalar_type());
  const auto none = x.options().memory_format(std::nullopt);
  const bool plain = weight.is_contiguous();
  Tensor dx = needs[0] ? empty_channels_last(x.sizes(), x) : at::empty({0}, none);
  Tensor dweight = at::empty({0}, none);
  if (needs[1]) {
    dweight = plain ? at::empty(weight.sizes(), none) : empty_channels_last(weight.sizes(), x);
  }
  if (!serves(x, weight)) {
    const auto [own_dx, own_dweight, own_dbias] = at::convolution_backward(
        dy, x, weight, at::OptionalIntArrayRef(), kOne, kOne, kOne, false, kNone, 1, {needs[0], needs[1], false});
    if (needs[0]) {
      dx.copy_(own_dx);
    }
    if (needs[1]) {
      dweight.copy_(own_dweight);
    }
    return {dx, dweight};
  }
  const Tensor gradient = channels_last(dy);
  const float* dout = gradient.const_data_ptr<float>();
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  if (needs[0]) {
    convolve(tiles, dout, turned(kernel_of(weight)), dx.mutable_data_ptr<float>(), nullptr);
  }
  if (needs[1]) {
    const Tensor in = channels_last(x);
    Tensor to = plain ? empty_channels_last(weight.sizes(), x) : dweight;
    weight_gradient({tiles, in.const_data_ptr<float>(), dout, to.mutable_data_ptr<float>(), x.size(1), weight.size(0)});
    if (plain) {
      dweight.copy_(to);
    }
  }
  return {dx, dweight};
}

} // namespace
} // namespace winograd
} // namespace CPU_CAPABILITY
} // namespace fastres

// The baseline module leaves the operators to PyTorch's convolution.
TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("conv3x3_forward", fastres::winograd::forward);
  m.impl("conv3x3_backward", fastres::winograd::backward);
}

#endif
