// The 3x3 convolution with stride 1 and padding 1 on the CPU, by Winograd's F(4x4, 3x3) (winograd.h has the formulas).
//
// Outputs (and the input gradient, which is the same convolution of dy with the kernel turned by half a circle and its
// channels exchanged) in one of two orders:
//   by tiles      each thread takes a chunk of tiles that fits its L2 cache through all three steps: transform, 36
//                 products, inverse transform. The transformed weights are made once, and read once a chunk.
//   by channels   all tiles are transformed first; then each thread takes a group of output channels, transforms its
//                 weights, and goes through the tiles: the transformed weights, four times as large as the weights and
//                 larger than the tiles, never leave the caches.
// The weight gradient: blocks of tiles are transformed by all threads together, then each thread takes its share of
// points and channels and adds their products over the block.
//
// Every output is one sum in one order, so results do not depend on the number of threads.
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

// What a thread's chunk may take of its L2 cache, transformed input and products together.
constexpr int64_t kChunkBytes = 768 * 1024;
// Transformed tiles that all threads share, held in the last-level cache.
constexpr int64_t kSharedBytes = 16 * 1024 * 1024;
// Tiles over which a weight gradient is summed in registers.
constexpr int64_t kGradientTiles = 128;
// Transformed weights kept for evaluation, in all.
constexpr int64_t kKeptBytes = 256 * 1024 * 1024;
// Planes a multiple of a page apart would all fall into the same few lines of the L1 cache.
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
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      transform_weights(kernel, g * kColumns, data + g * depth * kColumns, groups * depth * kColumns);
    }
  });
  return to;
}

// Transformed weights of evaluation. An entry stands while the weight's storage lives and its data pointer, version
// counter, sizes and strides are what they were.
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
  static auto* kept = new KeptWeights; // never destroyed: tensors may not outlive torch's own statics
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
  // With more threads than groups several share a group, and each transforms its weights for itself.
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

// dw: [outputs][3][3][inputs]
void weight_gradient(const Tiles& tiles, const float* x, int64_t inputs, const float* dy, int64_t outputs, float* dw) {
  const int64_t count = tiles.count(), groups = groups_of(inputs);
  // Rows a multiple of 2 KiB apart would fall into the same few lines of the L1 cache.
  const int64_t row = round_up(outputs, kWidth) + kSkew;
  const int64_t tile_bytes = kPoints * (row + groups * kColumns) * sizeof(float);
  const int64_t most = std::max<int64_t>(1, kSharedBytes / tile_bytes / kGradientTiles) * kGradientTiles;
  const int64_t blocks = (count + most - 1) / most;
  const int64_t size = std::min(count, round_up((count + blocks - 1) / blocks, kGradientTiles));
  const int64_t column_plane = groups * size * kColumns + kSkew, row_plane = size * row + kSkew;
  const int64_t gradient_plane = groups * outputs * kColumns + kSkew;
  const Buffer columns(kPoints * column_plane), rows(kPoints * row_plane), gradient(kPoints * gradient_plane);
  const std::vector<float> zeros(std::max(inputs, outputs));
  if (inputs % kColumns != 0) {
    // The half of a column group that no vector of channels fills.
    std::fill_n(columns.data(), kPoints * column_plane, 0.0f);
  }
  for (int64_t first = 0; first < count; first += size) {
    const int64_t block = std::min(size, count - first);
    at::parallel_for(0, block, 8, [&](int64_t begin, int64_t end) {
      transform_tiles<InputTransform, 1>(
          tiles,
          x,
          inputs,
          first + begin,
          end - begin,
          zeros.data(),
          columns.data(),
          column_plane,
          [&](int64_t p, int64_t c) { return c / kColumns * size * kColumns + (begin + p) * kColumns + c % kColumns; });
      transform_tiles<GradientTransform, 0>(
          tiles,
          dy,
          outputs,
          first + begin,
          end - begin,
          zeros.data(),
          rows.data(),
          row_plane,
          [&](int64_t p, int64_t k) { return (begin + p) * row + k; });
    });
    at::parallel_for(0, kPoints * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / groups, g = task % groups;
        for (int64_t p = 0; p < block; p += kGradientTiles) {
          multiply_gradients(
              rows.data() + point * row_plane + p * row,
              row,
              columns.data() + point * column_plane + (g * size + p) * kColumns,
              gradient.data() + point * gradient_plane + g * outputs * kColumns,
              outputs,
              std::min(kGradientTiles, block - p),
              first + p > 0);
        }
      }
    });
  }
  at::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t c = 0; c < inputs; c += kWidth) {
        const float* in = gradient.data() + (c / kColumns * outputs + k) * kColumns + c % kColumns;
        float* out = dw + k * kTaps * kTaps * inputs + c;
        const int lanes = static_cast<int>(std::min(kWidth, inputs - c));
        transform_square<WeightGradientTransform>(
            [&](int i) { return Lanes::loadu(in + i * gradient_plane); },
            [&](int i, const Lanes& v) { v.store(out + i * inputs, lanes); });
      }
    }
  });
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
    weight_gradient(tiles, in.const_data_ptr<float>(), x.size(1), dout, weight.size(0), to.mutable_data_ptr<float>());
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
