// The epilogues of the convolutions: pointwise operations and reductions on outputs that are in registers.
//
// epilogue.chunk(slot) is the epilogue of one chunk of tiles, which one thread goes through; a 1x1 convolution's tiles
// are runs of pixels. Its vector(c, count) is called for every tile and vector of channels c ... c + count - 1. Of the
// result these are called: for the first tile of a chunk begin(visit, outputs), where visit(f) calls f with each of the
// tile's outputs; operator()(pixel, at, value) for every output, `at` being the element's offset in a tensor of the
// outputs' shape; and end().
// for_each_read(f) calls f with the tensors that are read at these offsets, which are prefetched.
//
// Activations: the identity and ReLU are compiled into the loops; where kGeneral, any other is chosen at run time.
#pragma once

#include "norm_act.h"
#include "statistics.h"
#include "winograd_tiles.h"

#include <utility>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Three vectors of channels a chunk, each written by the thread that goes through it.
class ChunkSums {
public:
  // outputs: a channel, of every chunk; 0 where a slot is empty.
  ChunkSums(std::vector<int64_t> outputs, int64_t channels)
      : outputs_(std::move(outputs)), channels_(channels), data_(3 * outputs_.size() * channels) {}

  float* data(int64_t slot) {
    return data_.data() + 3 * slot * channels_;
  }

  // f(sums of the chunk, outputs a channel) for every chunk, in their order.
  template <typename F>
  void for_each(const F& f) const {
    for (size_t slot = 0; slot < outputs_.size(); ++slot) {
      if (outputs_[slot] > 0) {
        f(data_.data() + 3 * slot * channels_, outputs_[slot]);
      }
    }
  }

private:
  std::vector<int64_t> outputs_;
  int64_t channels_;
  std::vector<float> data_;
};

// y = value
template <typename T>
struct Write {
  T* y;
  bool streaming;

  Write chunk(int64_t) const {
    return *this;
  }
  template <typename F>
  void for_each_read(const F&) const {}
  template <typename Count>
  struct Vector {
    T* y;
    bool streaming;
    Count count;

    template <typename Visit>
    void begin(const Visit&, int64_t) {}
    void operator()(int64_t, int64_t at, Lanes v) {
      put(y + at, v, count, streaming);
    }
    void end() {}
  };
  template <typename Count>
  Vector<Count> vector(int64_t, Count count) const {
    return {y, streaming, count};
  }
};

// y = value + added
template <typename T>
struct WriteAdded {
  T* y;
  const T* added;
  bool streaming;

  WriteAdded chunk(int64_t) const {
    return *this;
  }
  template <typename F>
  void for_each_read(const F& f) const {
    f(added);
  }
  template <typename Count>
  struct Vector {
    T* y;
    const T* added;
    bool streaming;
    Count count;

    template <typename Visit>
    void begin(const Visit&, int64_t) {}
    void operator()(int64_t, int64_t at, Lanes v) {
      put(y + at, v + load_counted(added + at, count), count, streaming);
    }
    void end() {}
  };
  template <typename Count>
  Vector<Count> vector(int64_t, Count count) const {
    return {y, added, streaming, count};
  }
};

// y = value, and its moments. Sums are taken of differences from the mean of the chunk's first tile, so that no square
// is much larger than the variance.
template <typename T>
struct WriteMeasured {
  T* y;
  bool streaming;
  int64_t channels;
  ChunkSums* sums;
  float* of_chunk = nullptr; // shift, sum, sum of squares

  WriteMeasured chunk(int64_t slot) const {
    return {y, streaming, channels, sums, sums->data(slot)};
  }
  template <typename F>
  void for_each_read(const F&) const {}
  template <typename Count>
  struct Vector {
    T* y;
    bool streaming;
    float* sums;
    int64_t channels;
    Count count;
    Lanes shift, sum, squares;

    template <typename Visit>
    void begin(const Visit& visit, int64_t outputs) {
      sum = squares = Lanes{};
      Lanes largest{};
      visit([&](Lanes v) {
        sum = sum + v;
        largest = not_below(largest, not_below(v, Lanes{} - v));
      });
      shift = sum * broadcast(1.0f / static_cast<float>(outputs));
      if constexpr (!std::is_same_v<T, float>) {
        // In steps of a bfloat16's of that size: with more digits than outputs have, all differences would end alike,
        // and what their sum rounds off would be the same at every addition.
        const Lanes steps = broadcast(1.5f * (1 << 15)) * largest;
        shift = (shift + steps) - steps;
      }
      sum = Lanes{};
      store_counted(sums, shift, count);
    }
    void operator()(int64_t, int64_t at, Lanes v) {
      put(y + at, v, count, streaming);
      const Lanes d = rounded<T>(v) - shift;
      sum = sum + d;
      squares = multiply_add(d, d, squares);
    }
    void end() {
      store_counted(sums + channels, sum, count);
      store_counted(sums + 2 * channels, squares, count);
    }
  };
  template <typename Count>
  Vector<Count> vector(int64_t c, Count count) const {
    float* own = of_chunk + c;
    return {
        y,
        streaming,
        own,
        channels,
        count,
        load_counted(own, count),
        load_counted(own + channels, count),
        load_counted(own + 2 * channels, count)};
  }

  Moments moments() const {
    Moments all(channels);
    sums->for_each([&](const float* part, int64_t outputs) {
      const Chan chan(all.count, outputs);
      const double inverse = 1.0 / static_cast<double>(outputs);
      for (int64_t c = 0; c < channels; ++c) {
        const double s1 = part[channels + c], s2 = part[2 * channels + c];
        chan(all.mean[c], all.m2[c], part[c] + s1 * inverse, s2 - s1 * s1 * inverse);
      }
      all.count += outputs;
    });
    return all;
  }
};

// y = f(bn(value) + residual), bn by constants
template <typename T, bool kGeneral>
struct Normalise {
  T* y;
  bool streaming;
  const ChannelNorm<float>* norm;
  const T* residual; // or null
  bool relu;
  ActivationOf<float> activation; // where kGeneral

  Normalise chunk(int64_t) const {
    return *this;
  }
  template <typename F>
  void for_each_read(const F& f) const {
    if (residual != nullptr) {
      f(residual);
    }
  }
  template <typename Count>
  struct Vector {
    T* y;
    bool streaming;
    const T* residual;
    bool relu;
    const ActivationOf<float>* activation;
    Count count;
    Lanes mean, scale, bias;

    template <typename Visit>
    void begin(const Visit&, int64_t) {}
    void operator()(int64_t, int64_t at, Lanes v) {
      Lanes z = multiply_add(v - mean, scale, bias);
      if (residual != nullptr) {
        z = z + load_counted(residual + at, count);
      }
      if constexpr (kGeneral) {
        put(y + at, activation->forward(Vec<float>(z)), count, streaming);
      } else {
        put(y + at, relu ? Lanes(rectify(Vec<float>(z))) : z, count, streaming);
      }
    }
    void end() {}
  };
  template <typename Count>
  Vector<Count> vector(int64_t c, Count count) const {
    return {
        y,
        streaming,
        residual,
        relu,
        &activation,
        count,
        load_counted(norm->mean.data() + c, count),
        load_counted(norm->scale.data() + c, count),
        load_counted(norm->bias.data() + c, count)};
  }
};

// Backward through a prologue. The value is da, the gradient of what the prologue made of x; g is the gradient of the
// normalisation's output, whose sums of g and of g * (x - mean) are kept.
template <typename T, bool kGeneral>
struct MaskedGradient {
  const Prologue<T>* act;
  T* g;
  T* da; // the value itself as well, or null
  bool streaming;
  int64_t channels;
  ChunkSums* sums;
  float* of_chunk = nullptr; // the first of the three is not used

  MaskedGradient chunk(int64_t slot) const {
    return {act, g, da, streaming, channels, sums, sums->data(slot)};
  }
  template <typename F>
  void for_each_read(const F& f) const {
    act->for_each_read(f);
  }
  template <typename Count>
  struct Vector {
    const MaskedGradient& of;
    int64_t c;
    Count count;
    Lanes mean, scale, bias, sum, products;

    template <typename Visit>
    void begin(const Visit&, int64_t) {
      sum = products = Lanes{};
    }
    void operator()(int64_t pixel, int64_t at, Lanes v) {
      const Prologue<T>& act = *of.act;
      if (of.da != nullptr) {
        put(of.da + at, v, count, of.streaming);
      }
      const Lanes centred = load_counted(act.x + at, count) - mean;
      if (kGeneral || act.relu) {
        // The very expression of the forward pass, so that its sign is the same.
        Lanes z = multiply_add(centred, scale, bias);
        if (act.residual != nullptr && !act.act_add) {
          z = z + load_counted(act.residual + at, count);
        }
        if constexpr (kGeneral) {
          v = act.activation.backward(Vec<float>(v), Vec<float>(z));
        } else {
          v = gate(Vec<float>(v), Vec<float>(z));
        }
      }
      if (act.kept != nullptr) {
        const uint8_t* kept = act.kept + pixel * bitmask_row_bytes(of.channels) + c / 8;
        v = select_lanes(Vec<float>(v * broadcast(act.keep_scale)), load_bits(kept, count));
      }
      put(of.g + at, v, count, of.streaming);
      v = rounded<T>(v);
      sum = sum + v;
      products = multiply_add(v, centred, products);
    }
    void end() {
      float* own = of.of_chunk + c;
      store_counted(own + of.channels, sum, count);
      store_counted(own + 2 * of.channels, products, count);
    }
  };
  template <typename Count>
  Vector<Count> vector(int64_t c, Count count) const {
    const ChannelNorm<float>& norm = *act->norm;
    const float* own = of_chunk + c;
    return {
        *this,
        c,
        count,
        load_counted(norm.mean.data() + c, count),
        load_counted(norm.scale.data() + c, count),
        load_counted(norm.bias.data() + c, count),
        load_counted(own + channels, count),
        load_counted(own + 2 * channels, count)};
  }

  // (sum of g, sum of g * (x - mean))
  std::pair<std::vector<double>, std::vector<double>> totals() const {
    std::vector<double> first(channels, 0.0), second(channels, 0.0);
    sums->for_each([&](const float* part, int64_t) {
      for (int64_t c = 0; c < channels; ++c) {
        first[c] += part[channels + c];
        second[c] += part[2 * channels + c];
      }
    });
    return {first, second};
  }
};

// y = f(bn(value) + residual) by an epilogue of its own for the activations that are compiled in: f(epilogue).
template <typename T, typename F>
inline void with_normalise(const Normalise<T, false>& fixed, const F& f) {
  if (fixed.activation.general()) {
    f(Normalise<T, true>{fixed.y, fixed.streaming, fixed.norm, fixed.residual, fixed.relu, fixed.activation});
  } else {
    f(fixed);
  }
}

// The same for the backward of a prologue; the sums are those of `fixed`.
template <typename T, typename F>
inline void with_masked_gradient(const MaskedGradient<T, false>& fixed, const F& f) {
  if (fixed.act->activation.general()) {
    f(MaskedGradient<T, true>{fixed.act, fixed.g, fixed.da, fixed.streaming, fixed.channels, fixed.sums});
  } else {
    f(fixed);
  }
}

// The outputs of positions first ... first + count - 1 and one column group of a product [position][kColumns] go
// through the epilogue of their chunk, which `begins` with them or not.
template <typename Epilogue>
inline void finish_positions(
    const float* product,
    int64_t first,
    int64_t count,
    int64_t channels,
    int64_t from,
    bool begins,
    const Epilogue& epilogue) {
  const int64_t columns = std::min(kColumns, channels - from);
  for (int64_t c = 0; c < columns; c += kWidth) {
    const auto run = [&](auto lanes) {
      auto vector = epilogue.vector(from + c, lanes);
      if (begins) {
        vector.begin(
            [&](const auto& visit) {
              for (int64_t p = 0; p < count; ++p) {
                visit(load(product + p * kColumns + c));
              }
            },
            count);
      }
      for (int64_t p = 0; p < count; ++p) {
        vector(first + p, (first + p) * channels + from + c, load(product + p * kColumns + c));
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

// X(T, epilogue) for every epilogue of evaluation, of the outputs, of the input gradient, of training, and for every
// one.
#define FASTRES_INFERENCE_EPILOGUES(X, T) X(T, Write<T>) X(T, Normalise<T, false>) X(T, Normalise<T, true>)
#define FASTRES_FORWARD_EPILOGUES(X, T) FASTRES_INFERENCE_EPILOGUES(X, T) X(T, WriteMeasured<T>)
#define FASTRES_MASKED_EPILOGUES(X, T) X(T, WriteAdded<T>) X(T, MaskedGradient<T, false>) X(T, MaskedGradient<T, true>)
#define FASTRES_GRADIENT_EPILOGUES(X, T) X(T, Write<T>) FASTRES_MASKED_EPILOGUES(X, T)
#define FASTRES_TRAINING_EPILOGUES(X, T) X(T, WriteMeasured<T>) FASTRES_GRADIENT_EPILOGUES(X, T)
#define FASTRES_EPILOGUES(X, T) FASTRES_FORWARD_EPILOGUES(X, T) FASTRES_MASKED_EPILOGUES(X, T)

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
