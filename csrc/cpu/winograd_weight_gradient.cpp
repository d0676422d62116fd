// The weight gradient of Winograd's convolution: products over tiles of the transformed x and dy, in one of two orders:
//   by shares     Each thread has its share of the tiles, puts them through transforms and products a chunk at a time,
//                 and keeps sums of its own; those are added up and transformed back at the end.
//   at once       Where the tiles are few: all are transformed, and each thread has its share of the channels.
// Tiles beyond the transforms' range are zero in the products; their part of the gradient is a direct sum.
//
// Sums by shares depend on the number of threads, and on nothing else.
#include "winograd.h"
#include "workspace.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {
namespace {

// Tiles over which a weight gradient is summed in registers, at least and at most.
constexpr int64_t kFewestTiles = 32, kGradientTiles = 128;
constexpr int64_t kTileStep = 16;
// Of the tiles that are transformed at once.
constexpr int64_t kAtOnceBytes = 48 * 1024 * 1024;
// Pairs of tiles whose direct sums are computed together: their rows stay in the caches for a product.
constexpr int64_t kDirectPairs = 16;
// Output channels whose products are computed together where there are few tiles.
constexpr int64_t kGradientRows = 48;

// The operands, and the sizes of the transformed tiles and their products.
template <typename Form, typename T>
struct Problem : WeightGradient<T> {
  Form form;

  using WeightGradient<T>::inputs, WeightGradient<T>::outputs, WeightGradient<T>::x, WeightGradient<T>::dy;

  Tiles x_tiles() const {
    return x.template tiles<typename Form::GradientInput>();
  }
  Tiles tiles() const {
    return dy.template tiles<typename Form::Gradient>();
  }
  int64_t groups() const {
    return groups_of(inputs);
  }
  // Rows of dy a multiple of 2 KiB apart would fall into the same few lines of the L1 cache.
  int64_t row() const {
    return round_up(outputs, kWidth) + kSkew;
  }
  int64_t tile_bytes() const {
    return (form.points() * row() + form.operands() * groups() * kColumns) * static_cast<int64_t>(sizeof(float));
  }
  int64_t gradient_plane() const {
    return groups() * outputs * kColumns + kSkew;
  }
  int64_t gradient_bytes() const {
    return Form::kPlanes * gradient_plane() * static_cast<int64_t>(sizeof(float));
  }
  // Tiles of a chunk: as many bytes as the sums, which are read and written once a chunk.
  int64_t chunk() const {
    return std::clamp(round_up(gradient_bytes() / tile_bytes(), kTileStep), kFewestTiles, kGradientTiles);
  }
  // Threads that may have sums of their own.
  int64_t shares() const {
    return std::clamp<int64_t>(kGradientBytes / gradient_bytes(), 1, get_num_threads());
  }
};

// Where tiles go in a plane of columns, and in one of rows, see gemm.h.
struct ColumnPlace {
  int64_t most;

  auto of(int64_t p) const {
    return [=, *this](int64_t c) { return (c / kColumns * most + p) * kColumns + c % kColumns; };
  }
};
struct RowPlace {
  int64_t row;

  auto of(int64_t p) const {
    return [=, *this](int64_t k) { return p * row + k; };
  }
};

// A tile of x and of dy whose share in dW is summed directly.
struct DirectPair {
  DirectTile x, dy;
};

// Up to `most` transformed tiles of x and dy. Those that are summed directly are zero.
template <typename Form, typename T>
class GradientTiles {
public:
  GradientTiles(const Problem<Form, T>& w, int64_t most)
      : most_(most),
        column_plane_(w.groups() * most * kColumns + kSkew),
        row_plane_(most * w.row() + kSkew),
        columns_(w.form.operands() * column_plane_),
        rows_(w.form.points() * row_plane_) {
    if (w.inputs % kColumns != 0) {
      // The part of a column group that no vector of channels fills.
      std::fill_n(columns_.data(), w.form.operands() * column_plane_, 0.0f);
    }
  }

  // What a thread transforms tiles with.
  struct Readers {
    ReaderOf<typename Form::GradientInput, T> x;
    ReaderOf<typename Form::Gradient, T> dy;

    explicit Readers(const Problem<Form, T>& w)
        : x(w.x_tiles(), Form::kEnergyRatio, w.x.data, w.inputs, w.x.prologue),
          dy(w.tiles(), Form::kEnergyRatio, w.dy.data, w.outputs) {}
  };

  // Tiles first ... first + count - 1 of the convolution become tiles at ... at + count - 1 of these. Returns those of
  // them that are summed directly.
  std::vector<DirectPair> transform(
      const Problem<Form, T>& w,
      Readers& readers,
      int64_t first,
      int64_t count,
      int64_t at) {
    const ColumnPlace in_columns{most_};
    const RowPlace in_rows{w.row()};
    std::vector<int64_t> beyond;
    const auto note = [&](int64_t p) { beyond.push_back(p); };
    readers.x.transform(first, count, columns_.data() + in_columns.of(at)(0), column_plane_, in_columns, note);
    readers.dy.transform(first, count, rows_.data() + in_rows.of(at)(0), row_plane_, in_rows, note);
    std::vector<DirectPair> direct;
    if constexpr (Form::kTransforms) {
      const Tiles tiles = w.tiles();
      for (int64_t p = 0; p < count; ++p) {
        // Every tap reads a whole block of a tile with three outputs inside the image along each axis.
        if (std::min(tiles.pixels_down(first + p), tiles.pixels_across(first + p)) < 3 &&
            !(even(readers.x.read(first + p), w.inputs, Form::kEnergyRatio) &&
              even(readers.dy.read(first + p), w.outputs, Form::kEnergyRatio))) {
          beyond.push_back(p);
        }
      }
      std::sort(beyond.begin(), beyond.end());
      beyond.erase(std::unique(beyond.begin(), beyond.end()), beyond.end());
      for (const int64_t p : beyond) {
        direct.push_back({readers.x.read(first + p), readers.dy.read(first + p)});
        for (int64_t plane = 0; plane < w.form.operands(); ++plane) {
          for (int64_t c = 0; c < w.groups() * kColumns; c += kColumns) {
            std::fill_n(columns_.data() + plane * column_plane_ + in_columns.of(at + p)(c), kColumns, 0.0f);
          }
        }
        for (int64_t point = 0; point < w.form.points(); ++point) {
          std::fill_n(rows_.data() + point * row_plane_ + in_rows.of(at + p)(0), w.outputs, 0.0f);
        }
      }
    }
    return direct;
  }

  // gradient, its planes gradient_plane apart, (+)= the products of one point and tiles first ... first + count - 1 for
  // output channels begin ... begin + size - 1 and a group of input channels.
  void multiply(
      const Problem<Form, T>& w,
      int64_t point,
      int64_t group,
      int64_t begin,
      int64_t size,
      int64_t first,
      int64_t count,
      float* gradient,
      int64_t gradient_plane,
      bool accumulate) const {
    const float* rows = rows_.data() + point * row_plane_ + first * w.row() + begin;
    const float* columns = columns_.data() + (group * most_ + first) * kColumns;
    with_rows_and_vectors(size, w.inputs - group * kColumns, [&](auto r, auto vectors) {
      w.form.for_each_product(point, [&](int64_t from, int64_t plane, int64_t) {
        gradient_product<r, vectors>(
            rows,
            w.row(),
            columns + from * column_plane_,
            gradient + plane * gradient_plane,
            count,
            accumulate || !w.form.begins(point, plane));
      });
    });
  }

private:
  int64_t most_, column_plane_, row_plane_;
  Workspace columns_, rows_;
};

// The inverse transform of `size` output channels from `begin` on and a group of input channels: the sum of `parts`
// products, each with planes of [size][kColumns].
template <typename Form>
void transform_gradient(
    const Form& form,
    const KernelGradient& dw,
    int64_t group,
    int64_t begin,
    int64_t size,
    const std::vector<const float*>& parts,
    int64_t plane) {
  for (int64_t k = 0; k < size; ++k) {
    for (int64_t half = 0; half < kColumns && group * kColumns + half < dw.inputs; half += kWidth) {
      const int64_t c = group * kColumns + half, at = k * kColumns + half;
      float* out = dw.at(begin + k, 0, c);
      const int64_t lanes = std::min(kWidth, dw.inputs - c);
      alignas(64) std::array<float, kTaps * kTaps * kWidth> turned; // [tap][lane]
      form.weight_gradient(
          [&](int i) {
            Lanes sum = load(parts[0] + i * plane + at);
            for (size_t part = 1; part < parts.size(); ++part) {
              sum = sum + load(parts[part] + i * plane + at);
            }
            return sum;
          },
          [&](int i, Lanes v) {
            if (dw.inputs_are_adjacent) {
              store(out + i * dw.inputs, v, lanes);
            } else {
              store(turned.data() + i * kWidth, v);
            }
          });
      for (int64_t lane = 0; !dw.inputs_are_adjacent && lane < lanes; ++lane) {
        for (int i = 0; i < kTaps * kTaps; ++i) {
          *out++ = turned[i * kWidth + lane];
        }
      }
    }
  }
}

// dw plus the tiles' sums for `size` output channels from `begin` on and a group of input channels.
// For each tap the outputs meet the inputs above them, where both are inside the image.
template <typename Form>
void add_directly(
    const std::vector<DirectPair>& tiles,
    int64_t all_outputs,
    int64_t group,
    int64_t begin,
    int64_t size,
    const KernelGradient& dw) {
  if (tiles.empty()) {
    return;
  }
  constexpr int taps = kTaps * kTaps;
  const int64_t from = group * kColumns, inputs = std::min(kColumns, dw.inputs - from);
  const int64_t count = tiles.size(), most = std::min(kDirectPairs, count) * Form::kOut * Form::kOut;
  const int64_t row = round_up(size, kWidth) + kSkew;
  const RowGroups groups{size};
  const Workspace rows(most * row), columns(most * kColumns), product(size * kColumns);
  std::fill_n(columns.data(), most * kColumns, 0.0f);
  for (int64_t first = 0; first < count; first += kDirectPairs) {
    for (int tap = 0; tap < taps; ++tap) {
      int64_t depth = 0;
      for (int64_t p = first; p < std::min(count, first + kDirectPairs); ++p) {
        for (int output = 0; output < Form::kOut * Form::kOut; ++output) {
          const int position = Form::corner(0, tap) +
              (output / Form::kOut * Form::GradientInput::kWindow + output % Form::kOut) * Form::kStride;
          if (tiles[p].dy.has(output) && tiles[p].x.has(position)) {
            std::copy_n(tiles[p].dy.values.data() + output * all_outputs + begin, size, rows.data() + depth * row);
            std::copy_n(
                tiles[p].x.values.data() + position * dw.inputs + from, inputs, columns.data() + depth * kColumns);
            ++depth;
          }
        }
      }
      for (int64_t r = 0; r < groups.count(); ++r) {
        with_rows_and_vectors(groups.size(r), inputs, [&](auto height, auto vectors) {
          const int64_t at = groups.begin(r);
          gradient_product<height, vectors>(
              rows.data() + at, row, columns.data(), product.data() + at * kColumns, depth, false);
        });
      }
      for (int64_t k = 0; k < size; ++k) {
        float* to = dw.at(begin + k, tap, from);
        for (int64_t c = 0; c < inputs; ++c) {
          to[c * dw.input_stride()] += product.data()[k * kColumns + c];
        }
      }
    }
  }
}

// Few tiles: all are transformed, and each product is transformed back at once.
template <typename Form, typename T>
void gradient_at_once(const Problem<Form, T>& w) {
  const int64_t count = w.tiles().count();
  GradientTiles<Form, T> transformed(w, count);
  std::vector<std::vector<DirectPair>> direct_from(count); // by the first tile of a thread's share
  parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    typename GradientTiles<Form, T>::Readers readers(w);
    direct_from[begin] = transformed.transform(w, readers, begin, end - begin, begin);
  });
  std::vector<DirectPair> direct;
  for (auto& part : direct_from) {
    std::move(part.begin(), part.end(), std::back_inserter(direct));
  }
  const RowGroups rows{w.outputs};
  // Row groups that go through one group of columns while that is in the L1 cache, and fill whole lines of rows.
  constexpr int64_t together = kGradientRows / kRows, plane = kGradientRows * kColumns + kSkew;
  const int64_t blocks = (rows.count() + together - 1) / together;
  parallel_for(0, w.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
    const Workspace product(Form::kPlanes * plane);
    const std::vector<const float*> parts{product.data()};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first_group = task % blocks * together;
      const int64_t last_group = std::min(rows.count(), first_group + together);
      const int64_t first = rows.begin(first_group), size = rows.begin(last_group) - first;
      for (int64_t point = 0; point < w.form.points(); ++point) {
        for (int64_t from = 0; from < count; from += kGradientTiles) {
          const int64_t depth = std::min(kGradientTiles, count - from);
          for (int64_t r = first_group; r < last_group; ++r) {
            float* to = product.data() + (rows.begin(r) - first) * kColumns;
            transformed.multiply(w, point, group, rows.begin(r), rows.size(r), from, depth, to, plane, from > 0);
          }
        }
      }
      transform_gradient(w.form, w.dw, group, first, size, parts, plane);
      if constexpr (Form::kTransforms) {
        add_directly<Form>(direct, w.outputs, group, first, size, w.dw);
      }
    }
  });
}

// Many tiles: every thread computes a share of them, a chunk at a time in its caches, and the shares are added up.
template <typename Form, typename T>
void gradient_by_shares(const Problem<Form, T>& w) {
  const int64_t count = w.tiles().count(), plane = w.gradient_plane();
  const int64_t most = std::min(w.chunk(), round_up((count + w.shares() - 1) / w.shares(), kTileStep));
  const int64_t chunks = (count + most - 1) / most, shares = std::min(chunks, w.shares());
  const Workspace gradients(shares * Form::kPlanes * plane);
  // [outputs][taps][inputs], empty where nothing is summed directly.
  std::vector<std::vector<float>> summed(shares);
  const RowGroups rows{w.outputs};
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    GradientTiles<Form, T> transformed(w, most);
    typename GradientTiles<Form, T>::Readers readers(w);
    Prefetch prefetch;
    for (int64_t share = begin; share < end; ++share) {
      float* gradient = gradients.data() + share * Form::kPlanes * plane;
      const int64_t start = chunks * share / shares;
      for (int64_t chunk = start; chunk < chunks * (share + 1) / shares; ++chunk) {
        const int64_t first = chunk * most, size = std::min(most, count - first);
        const std::vector<DirectPair> direct = transformed.transform(w, readers, first, size, 0);
        if constexpr (Form::kTransforms) {
          if (!direct.empty()) {
            summed[share].resize(w.outputs * kTaps * kTaps * w.inputs);
            for (int64_t group = 0; group < w.groups(); ++group) {
              add_directly<Form>(direct, w.outputs, group, 0, w.outputs, {summed[share].data(), w.inputs, true});
            }
          }
        }
        prefetch.clear();
        if (chunk + 1 < chunks * (share + 1) / shares) {
          const int64_t next = first + size, next_size = std::min(most, count - next);
          w.x.for_each_read([&](const T* p) { add_tiles(prefetch, w.x_tiles(), p, w.inputs, next, next_size); });
          add_tiles(prefetch, w.tiles(), w.dy.data, w.outputs, next, next_size);
        }
        for (int64_t point = 0; point < w.form.points(); ++point) {
          prefetch.fetch(w.form.points());
          for (int64_t group = 0; group < w.groups(); ++group) {
            for (int64_t r = 0; r < rows.count(); ++r) {
              float* to = gradient + (group * w.outputs + rows.begin(r)) * kColumns;
              transformed.multiply(w, point, group, rows.begin(r), rows.size(r), 0, size, to, plane, chunk > start);
            }
          }
        }
      }
    }
  });
  parallel_for(0, w.groups() * rows.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<const float*> parts(shares);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / rows.count(), first = rows.begin(task % rows.count());
      const int64_t size = rows.size(task % rows.count());
      for (int64_t share = 0; share < shares; ++share) {
        parts[share] = gradients.data() + share * Form::kPlanes * plane + (group * w.outputs + first) * kColumns;
      }
      transform_gradient(w.form, w.dw, group, first, size, parts, plane);
      const int64_t inputs = std::min(kColumns, w.inputs - group * kColumns);
      for (const auto& part : summed) {
        for (int64_t row = first * kTaps * kTaps; !part.empty() && row < (first + size) * kTaps * kTaps; ++row) {
          const float* from = part.data() + row * w.inputs + group * kColumns;
          float* to = w.dw.at(row / (kTaps * kTaps), row % (kTaps * kTaps), group * kColumns);
          for (int64_t c = 0; c < inputs; ++c) {
            to[c * w.dw.input_stride()] += from[c];
          }
        }
      }
    }
  });
}

} // namespace

template <typename Form, typename T>
void weight_gradient(const Form& form, const WeightGradient<T>& given) {
  const Problem<Form, T> w{given, form};
  // At once where the transformed tiles are no larger than what would be added up otherwise, or hardly larger where a
  // vector has 16 lanes: rows are read once a column group, and there are half as many.
  const int64_t sums = w.shares() * w.gradient_bytes();
  if (w.tiles().count() * w.tile_bytes() <= std::min(kAtOnceBytes, kWidth == 16 ? sums + sums / 4 : sums)) {
    gradient_at_once(w);
  } else {
    gradient_by_shares(w);
  }
}

#define FASTRES_INSTANTIATE(Form) \
  template void weight_gradient<Form>(const Form&, const WeightGradient<float>&); \
  template void weight_gradient<Form>(const Form&, const WeightGradient<BFloat16>&);
FASTRES_INSTANTIATE(Tile3)
FASTRES_INSTANTIATE(Tile4)
FASTRES_INSTANTIATE(Tile5)
FASTRES_INSTANTIATE(Stride2)
FASTRES_INSTANTIATE(SmallImages<>)
#undef FASTRES_INSTANTIATE

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
