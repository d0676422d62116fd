// The 3x3 convolution with padding 1 in one of Winograd's forms (winograd_forms.h), and in one of two loop orders:
//   by tiles      Each thread puts a chunk of tiles that fits its L2 cache through all three steps: transform,
//                 products, inverse transform. The transformed weights are made once a call, and read once a chunk.
//   by channels   All tiles are transformed first; then each thread has a group of output channels, transforms its
//                 weights, and goes through the tiles: the transformed weights, four to nine times as large as the
//                 weights and larger than the tiles, never leave the caches. Where the tiles are few it takes a block
//                 of input channels after the other.
// The prologue runs where tiles are read (TileReader), the epilogue where they are written. What those read of memory
// is prefetched during the products.
//
// Every output is one sum in one order, whatever the number of threads; with stride 2 that order depends on the size of
// the L2 cache. Sums that epilogues keep by chunks depend on both, and on nothing else.
//
// The templates are instantiated in winograd_tile4.cpp and its siblings, a form each.
#pragma once

#include "winograd.h"

#include "caches.h"
#include "epilogues.h"
#include "winograd_direct_sum.h"
#include "workspace.h"

#include <numeric>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// What a thread's chunk, transformed input and products together, may have at most; and by tiles, of its L2 cache.
constexpr int64_t kChunkBytes = 448 * 1024;
constexpr double kChunkOfCache = 0.375;
// Of its L2 cache, by channels: a block of inputs' transformed weights, and the products kept until the last block.
constexpr double kBlockOfCache = 0.5, kProductsOfCache = 0.5;
// Pairs of channels whose weights are worth a thread's start.
constexpr int64_t kThreadPairs = 2 * 1024;

// to: [plane][group of columns] and as transform_weights writes them. Returns whether the weights are within the
// transforms' range.
template <typename Form>
bool transform_all_weights(const Form& form, const Kernel& kernel, float* to) {
  const int64_t groups = groups_of(kernel.outputs), depth = round_up(kernel.inputs, kWidth), vectors = depth / kWidth;
  std::vector<float> energies(groups * vectors); // of each stretch of inputs, at its first vector
  parallel_for(0, groups * vectors, kThreadPairs / (kWidth * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t g = task / vectors, first = task % vectors, last = std::min(vectors, first + end - task);
      energies[task] = transform_weights(
          form,
          kernel,
          g * kColumns,
          first * kWidth,
          last * kWidth,
          to + g * depth * kColumns + first * kWidth * kPanel,
          groups * depth * kColumns,
          depth);
      task += last - first;
    }
  });
  for (int64_t g = 0; Form::kTransforms && g < groups; ++g) {
    if (!(std::accumulate(&energies[g * vectors], &energies[g * vectors] + vectors, 0.0f) <= kMaxEnergy)) {
      return false;
    }
  }
  return true;
}

// Where tiles from `first` on go in a plane of operand, see gemm.h.
struct OperandPlace {
  int64_t depth, first = 0;

  auto of(int64_t p) const {
    const int64_t tile = first + p, start = tile / kRows * depth * kRows + tile % kRows * kWidth;
    return [start](int64_t c) { return start + c * kRows; };
  }
};

template <typename Reader>
std::vector<DirectTile> read_tiles(Reader& reader, int64_t first, int64_t count) {
  std::vector<DirectTile> tiles;
  for (int64_t p = 0; p < count; ++p) {
    tiles.push_back(reader.read(first + p));
  }
  return tiles;
}

// Transforms tiles first ... first + count - 1, and reads into `direct` those out of range; all, unless `in_range`.
template <typename Reader, typename Place>
void transform_tiles(
    Reader& reader,
    int64_t first,
    int64_t count,
    bool in_range,
    float* to,
    int64_t plane,
    const Place& place,
    DirectTile* direct) {
  std::fill_n(direct, count, DirectTile());
  std::vector<int64_t> beyond;
  reader.transform(first, count, to, plane, place, [&](int64_t p) { beyond.push_back(p); });
  if (!in_range) {
    beyond.resize(count);
    std::iota(beyond.begin(), beyond.end(), 0);
  }
  if constexpr (Reader::kTransforms) {
    for (const int64_t p : beyond) {
      direct[p] = reader.read(first + p);
    }
  }
}

// The outputs of a tile for a vector of channels, out of its products or its direct sums. Not inlined, for it serves
// every epilogue.
template <typename Form>
__attribute__((noinline)) void outputs_of_tile(
    const Form& form,
    const float* product,
    int64_t plane,
    const float* summed,
    Lanes* to) {
  if (summed == nullptr) {
    form.outputs(
        [&](int i) __attribute__((always_inline)) { return load(product + i * plane); },
        [&](int i, Lanes v) __attribute__((always_inline)) { to[i] = v; });
    return;
  }
  for (int i = 0; i < Form::kOut * Form::kOut; ++i) {
    to[i] = load(summed + i * kColumns);
  }
}

// The outputs of tiles first ... first + count - 1, channels from ... from + columns - 1, out of products whose planes
// are [p][kColumns], or out of the direct sums, through the epilogue.
template <typename Form, typename Epilogue>
inline void transform_products(
    const Form& form,
    const Tiles& tiles,
    const float* product,
    int64_t plane,
    int64_t first,
    int64_t count,
    int64_t channels,
    int64_t from,
    const SumsBeyond<Form>& direct,
    const Epilogue& epilogue) {
  constexpr int side = Form::kOut;
  const int64_t columns = std::min(kColumns, channels - from);
  const int64_t across = tiles.across(), down = tiles.down();
  for (int64_t p = 0; p < count; ++p) {
    const int64_t line = (first + p) / across, top = line % down * side, left = (first + p) % across * side;
    const int64_t pixel = (line / down * tiles.height + top) * tiles.width + left;
    const int64_t height = std::min<int64_t>(side, tiles.height - top);
    const int64_t width = std::min<int64_t>(side, tiles.width - left);
    const int64_t start = pixel * channels + from, row = tiles.width * channels;
    const float* summed = direct.of(p);
    const bool whole = height == side && width == side && summed == nullptr;
    for (int64_t c = 0; c < columns; c += kWidth) {
      const float* in = product + p * kColumns + c;
      const auto put = [&](auto& vector, int64_t y, int64_t x, Lanes v) __attribute__((always_inline)) {
        vector(pixel + y * tiles.width + x, start + c + y * row + x * channels, v);
      };
      const auto run = [&](auto lanes) {
        constexpr bool kAll = !std::is_same_v<decltype(lanes), int64_t>;
        auto vector = epilogue.vector(from + c, lanes);
        Lanes outputs[side * side];
        if (!(kAll && whole) || p == 0) {
          outputs_of_tile(form, in, plane, summed == nullptr ? nullptr : summed + c, outputs);
        }
        // In loops, for the code of an epilogue would be there once an output.
        const auto each = [&](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 1
          for (int64_t y = 0; y < height; ++y) {
#pragma GCC unroll 1
            for (int64_t x = 0; x < width; ++x) {
              visit(y, x, outputs[y * side + x]);
            }
          }
        };
        if (p == 0) {
          vector.begin([&](const auto& visit) { each([&](int64_t, int64_t, Lanes v) { visit(v); }); }, height * width);
        }
        if (kAll && whole) {
          if constexpr (kAll) {
            form.outputs(
                [&](int i) __attribute__((always_inline)) { return load(in + i * plane); },
                [&](int i, Lanes v) __attribute__((always_inline)) { put(vector, i / side, i % side, v); });
          }
        } else {
          each([&](int64_t y, int64_t x, Lanes v) __attribute__((always_inline)) { put(vector, y, x, v); });
        }
        vector.end();
      };
      if (c + kWidth <= columns) {
        run(std::integral_constant<int64_t, kWidth>());
      } else {
        run(columns - c);
      }
    }
  }
}

// Whether the tiles, transformed, are smaller than the weights are.
template <typename Form>
bool goes_by_channels(const Form& form, const Tiles& tiles, const Kernel& kernel) {
  return tiles.count() * form.operands() <= kernel.outputs * Form::kPlanes &&
      tiles.count() * kernel.inputs * form.operands() * static_cast<int64_t>(sizeof(float)) <= 2 * kSharedBytes;
}

// The planes of an operand, of weights or of a product.
template <typename T>
struct Planes {
  T* first;
  int64_t size;

  T* at(int64_t i) const {
    return first + i * size;
  }
};

// Inputs of a block, as even as can be: their transformed weights, of one group of outputs, take half of the L2 cache.
template <typename Form>
int64_t block_of_inputs(int64_t depth) {
  const int64_t floats = kBlockOfCache * Caches::of_machine().l2 / sizeof(float);
  const int64_t most = std::max<int64_t>(1, floats / (Form::kPlanes * kColumns) / kWidth) * kWidth;
  const int64_t blocks = (depth + most - 1) / most;
  return round_up((depth + blocks - 1) / blocks, kWidth);
}

// The products of one point, of tiles and one group of output channels, or what they add to them. Planes that add up
// take so many inputs together, and then the next ones, for any block of inputs.
template <typename Form>
inline void multiply_point(
    const Form& form,
    int64_t point,
    const Planes<const float>& operand,
    const Planes<const float>& weights,
    const Planes<float>& product,
    const OutputShape& shape,
    int64_t together,
    bool accumulate) {
  const int64_t step = Form::kSumsPlanes ? together : shape.inputs; // else one, which the compiler knows
  for (int64_t c = 0; c < shape.inputs; c += step) {
    OutputShape part = shape;
    part.inputs = std::min(step, shape.inputs - c);
    form.for_each_product(point, [&](int64_t from, int64_t plane, int64_t to) {
      multiply_outputs(operand.at(from) + c * kRows, weights.at(plane) + c * kPanel, product.at(to), part, accumulate);
      accumulate = accumulate || Form::kSumsPlanes;
    });
  }
}

template <typename Form, typename T>
ReaderOf<typename Form::Input, T> reader_of(const Source<T>& x, int64_t channels) {
  return {x.template tiles<typename Form::Input>(), Form::kEnergyRatio, x.data, channels, x.prologue};
}

template <typename Form, typename T, typename Epilogue>
void by_tiles(
    const Form& form,
    const Chunks& chunks,
    const Source<T>& x,
    const Kernel& kernel,
    const Epilogue& epilogue) {
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), size = chunks.size;
  const int64_t operand_plane = size * depth + kSkew, product_plane = groups * size * kColumns + kSkew;
  const Workspace weights(Form::kPlanes * groups * depth * kColumns);
  const bool in_range = transform_all_weights(form, kernel, weights.data());
  const int64_t together = block_of_inputs<Form>(depth);
  const Tiles in = x.template tiles<typename Form::Input>();
  parallel_for(0, chunks.slots(), 1, [&](int64_t begin, int64_t end) {
    const Workspace operand(form.operands() * operand_plane), product(form.products() * product_plane);
    auto reader = reader_of<Form>(x, kernel.inputs);
    std::vector<DirectTile> direct(size);
    SumsBeyond<Form> sums;
    Prefetch prefetch;
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t first = chunks.first(slot), count = chunks.count(slot);
      transform_tiles(
          reader, first, count, in_range, operand.data(), operand_plane, OperandPlace{depth}, direct.data());
      prefetch.clear();
      epilogue.for_each_read(
          [&](const auto* p) { add_tiles(prefetch, chunks.tiles, p, kernel.outputs, first, count); });
      if (slot + 1 < end) {
        x.for_each_read([&](const T* p) {
          add_tiles(prefetch, in, p, kernel.inputs, chunks.first(slot + 1), chunks.count(slot + 1));
        });
      }
      for (int64_t point = 0; point < form.points(); ++point) {
        prefetch.fetch(form.points());
        for (int64_t g = 0; g < groups; ++g) {
          multiply_point(
              form,
              point,
              {operand.data(), operand_plane},
              {weights.data() + g * depth * kColumns, groups * depth * kColumns},
              {product.data() + g * size * kColumns, product_plane},
              {count, depth, depth, depth, kernel.outputs - g * kColumns},
              together,
              false);
        }
      }
      const auto of_chunk = epilogue.chunk(slot);
      for (int64_t g = 0; g < groups; ++g) {
        if constexpr (Form::kTransforms) {
          sums.compute(kernel, g * kColumns, in_range, direct.data(), count);
        }
        transform_products(
            form,
            chunks.tiles,
            product.data() + g * size * kColumns,
            product_plane,
            first,
            count,
            kernel.outputs,
            g * kColumns,
            sums,
            of_chunk);
      }
    }
    stream_fence();
  });
}

// Prefetches the weights of inputs begin ... end - 1 and of a group of output channels, where they lie in runs.
inline void add_weights(Prefetch& prefetch, const Kernel& kernel, int64_t from, int64_t begin, int64_t end) {
  const int64_t columns = std::min(kColumns, kernel.outputs - from), inputs = std::min(end, kernel.inputs) - begin;
  const bool packed = kernel.is_packed(), together = kernel.taps_are_adjacent();
  if (!packed && !together && !kernel.inputs_are_adjacent()) {
    return;
  }
  const int64_t run = inputs * (packed ? kPanel : together ? kTaps * kTaps : 1);
  for (int64_t k = 0; k < columns; k += packed ? kPanel : 1) {
    for (int t = 0; t < (together ? 1 : kTaps * kTaps); ++t) {
      prefetch.add(kernel.at(from + k, begin) + kernel.tap[t], run * static_cast<int64_t>(sizeof(float)));
    }
  }
}

template <typename Form, typename T, typename Epilogue>
void by_channels(
    const Form& form,
    const Chunks& chunks,
    const Source<T>& x,
    const Kernel& kernel,
    const Epilogue& epilogue) {
  const Tiles& tiles = chunks.tiles;
  const int64_t depth = round_up(kernel.inputs, kWidth), groups = groups_of(kernel.outputs), count = tiles.count();
  const int64_t operand_plane = round_up(count, kRows) * depth + kSkew;
  const Workspace operand(form.operands() * operand_plane);
  std::vector<DirectTile> direct(count);
  // A prologue computes whole lines, so that its threads take more tiles at a time.
  const int64_t step = x.prologue != nullptr ? kRows : 1;
  parallel_for(0, (count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * step;
    auto reader = reader_of<Form>(x, kernel.inputs);
    transform_tiles(
        reader,
        first,
        std::min(count, end * step) - first,
        true,
        operand.data(),
        operand_plane,
        OperandPlace{depth, first},
        direct.data() + first);
  });
  const int64_t in_share = chunks.in_share(), shares = chunks.slots() / in_share;
  // Products of more than one chunk could not all be kept until the last block.
  const int64_t block = in_share == 1 ? block_of_inputs<Form>(depth) : depth;
  parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t weight_plane = block * kColumns + kSkew, product_plane = chunks.size * kColumns + kSkew;
    const Workspace weights(Form::kPlanes * weight_plane), product(form.products() * product_plane);
    SumsBeyond<Form> sums;
    Prefetch prefetch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / shares, share = task % shares;
      float energy = 0.0f;
      for (int64_t c = 0; c < depth; c += block) {
        const int64_t inputs = std::min(block, depth - c);
        energy += transform_weights(form, kernel, g * kColumns, c, c + inputs, weights.data(), weight_plane, inputs);
        prefetch.clear();
        if (c + inputs < depth) {
          add_weights(prefetch, kernel, g * kColumns, c + inputs, c + inputs + block);
        } else if (task + 1 < end && shares == 1) {
          add_weights(prefetch, kernel, (g + 1) * kColumns, 0, block);
        }
        for (int64_t slot = share * in_share; slot < (share + 1) * in_share; ++slot) {
          const int64_t first = chunks.first(slot), size = chunks.count(slot);
          for (int64_t point = 0; point < form.points(); ++point) {
            prefetch.fetch(in_share * form.points());
            multiply_point(
                form,
                point,
                {operand.data() + first * depth + c * kRows, operand_plane},
                {weights.data(), weight_plane},
                {product.data(), product_plane},
                {size, depth, inputs, inputs, kernel.outputs - g * kColumns},
                block,
                c > 0);
          }
          if (c + inputs < depth) {
            continue;
          }
          if constexpr (Form::kTransforms) {
            const bool in_range = energy <= kMaxEnergy;
            if (in_range) {
              sums.compute(kernel, g * kColumns, in_range, direct.data() + first, size);
            } else {
              auto reader = reader_of<Form>(x, kernel.inputs);
              sums.compute(kernel, g * kColumns, in_range, read_tiles(reader, first, size).data(), size);
            }
          }
          transform_products(
              form,
              tiles,
              product.data(),
              product_plane,
              first,
              size,
              kernel.outputs,
              g * kColumns,
              sums,
              epilogue.chunk(slot));
        }
      }
    }
    stream_fence();
  });
}

template <typename Form>
Chunks chunks_of(const Form& form, int64_t images, int64_t height, int64_t width, const Kernel& kernel) {
  const Tiles tiles{images, height, width, Form::kOut};
  const int64_t count = tiles.count(), threads = get_num_threads(), groups = groups_of(kernel.outputs);
  const double cache = Caches::of_machine().l2 / sizeof(float);
  constexpr int64_t floats = kChunkBytes / static_cast<int64_t>(sizeof(float));
  if (goes_by_channels(form, tiles, kernel)) {
    // What adds up planes writes their products once a block of inputs in any case, so its shares all go by blocks.
    const int64_t kept = Form::kSumsPlanes ? static_cast<int64_t>(kProductsOfCache * cache) : floats / 2;
    const int64_t most = std::max<int64_t>(kept / (form.products() * kColumns * kRows), 1) * kRows;
    const int64_t least = Form::kSumsPlanes ? (count + most - 1) / most : 1;
    // With more threads than groups several share a group. Each share transforms the weights for itself.
    const int64_t shares = std::clamp<int64_t>(threads / groups, least, (count + kRows - 1) / kRows);
    const int64_t share = round_up((count + shares - 1) / shares, kRows);
    return {tiles, share, std::min(share, most)};
  }
  const int64_t of_tile = form.operands() * round_up(kernel.inputs, kWidth) + form.products() * groups * kColumns;
  // Each chunk reads all weights: what of them the caches do not hold has to be worth it.
  const int64_t weight_bytes =
      Form::kPlanes * groups * kColumns * round_up(kernel.inputs, kWidth) * static_cast<int64_t>(sizeof(float));
  const int64_t least = 2 * std::clamp<int64_t>(weight_bytes / (kSharedBytes / 2), 1, 8);
  const int64_t in_cache = kChunkOfCache * cache;
  const int64_t most = std::max(least, std::min(floats, in_cache) / of_tile / kRows) * kRows;
  // As many chunks for every thread.
  const int64_t chunks = round_up((count + most - 1) / most, threads);
  const int64_t size = round_up((count + chunks - 1) / chunks, kRows);
  return {tiles, round_up(count, size), size};
}

template <typename Form, typename T, typename Epilogue>
void convolve(
    const Form& form,
    const Chunks& chunks,
    const Source<T>& x,
    const Kernel& kernel,
    const Epilogue& epilogue) {
  if (goes_by_channels(form, chunks.tiles, kernel)) {
    by_channels(form, chunks, x, kernel, epilogue);
  } else {
    by_tiles(form, chunks, x, kernel, epilogue);
  }
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
