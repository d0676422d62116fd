// Every activation f of this backend.
//
// To add one: a struct with its name, f and f', and a line in FASTRES_ACTIVATIONS.
//
// The pointwise loops (norm_act.h, norm_act_backward.h, epilogues.h) have the identity and ReLU compiled into them.
// Of the others SiLU and hardswish, of which whole families of networks are made, have loops of their own as well. All
// else goes through ActivationOf, which chooses by a switch for each pair of vectors, so that the loops are compiled
// once for all of them.
#pragma once

#include "exponentials.h"
#include "lanes.h"

#include "../common/arguments.h"

#include <algorithm>
#include <iterator>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace activations {

// f' follows from the input and is computed again in backward.
struct Smooth {
  static constexpr bool gated = false, leaks = false;
};

// f' is 1 where passes(z), elsewhere 0, or alpha where f leaks: one bit an element is all that backward has to know.
struct Gated {
  static constexpr bool gated = true, leaks = false;
};

template <typename V>
inline V number(double value) {
  return V(static_cast<typename V::value_type>(value));
}

// a where the mask is set, else b
template <typename V>
inline V where(const V& mask, const V& a, const V& b) {
  return V::blendv(b, a, mask);
}

struct Identity : Smooth {
  static constexpr std::string_view name = "identity";
  template <typename V>
  static V forward(const V& z, const V&) {
    return z;
  }
  template <typename V>
  static V gradient(const V&, const V&) {
    return number<V>(1);
  }
};

struct ReLU : Gated {
  static constexpr std::string_view name = "relu";
  template <typename V>
  static V forward(const V& z, const V&) {
    return rectify(z);
  }
  template <typename V>
  static uint32_t passes(const V& z) {
    return passing_lanes(z);
  }
};

struct LeakyReLU : Gated {
  static constexpr std::string_view name = "leaky_relu";
  static constexpr bool leaks = true;
  template <typename V>
  static V forward(const V& z, const V& alpha) {
    return where(z > number<V>(0), z, z * alpha);
  }
  template <typename V>
  static uint32_t passes(const V& z) {
    return lanes_of_mask(z > number<V>(0));
  }
};

struct ReLU6 : Gated {
  static constexpr std::string_view name = "relu6";
  template <typename V>
  static V forward(const V& z, const V&) {
    return at::vec::clamp(z, number<V>(0), number<V>(6));
  }
  template <typename V>
  static uint32_t passes(const V& z) {
    return passing_lanes(z) & ~lanes_of_mask(z >= number<V>(6)); // NaN passes
  }
};

// z * clamp(z + 3, 0, 6) / 6                     Howard et al. 2019, "Searching for MobileNetV3", section 5.2
struct Hardswish : Smooth {
  static constexpr std::string_view name = "hardswish";
  template <typename V>
  static V forward(const V& z, const V&) {
    return z * at::vec::clamp(z + number<V>(3), number<V>(0), number<V>(6)) * number<V>(1.0 / 6);
  }
  template <typename V>
  static V gradient(const V& z, const V&) {
    const V zero = number<V>(0), one = number<V>(1), three = number<V>(3);
    const V middle = at::vec::fmadd(z, number<V>(1.0 / 3), number<V>(0.5));
    return where(z <= three.neg(), zero, where(z < three, middle, one));
  }
};

// z * s, s = sigmoid(z)      f' = s * (1 + z * (1 - s))      Elfwing, Uchibe, Doya 2018, section 2.1
struct SiLU : Smooth {
  static constexpr std::string_view name = "silu";
  template <typename V>
  static V forward(const V& z, const V&) {
    return z * sigmoid(z);
  }
  template <typename V>
  static V gradient(const V& z, const V&) {
    const V one = number<V>(1), s = sigmoid(z);
    return s * at::vec::fmadd(z, one - s, one);
  }
};

// z * Phi(z)                 f' = Phi(z) + z * phi(z)        Hendrycks and Gimpel 2016, section 2
struct GELU : Smooth {
  static constexpr std::string_view name = "gelu";
  template <typename V>
  static V distribution(const V& z) {
    return number<V>(0.5) * (number<V>(1) + erf(z * number<V>(0.70710678118654752)));
  }
  template <typename V>
  static V forward(const V& z, const V&) {
    return z * distribution(z);
  }
  template <typename V>
  static V gradient(const V& z, const V&) {
    const V density = number<V>(0.39894228040143268) * exp(z * z * number<V>(-0.5));
    return at::vec::fmadd(z, density, distribution(z));
  }
};

// 0.5 * z * (1 + t), t = tanh(k * (z + c * z^3))             Hendrycks and Gimpel 2016, section 2
struct GELUTanh : Smooth {
  static constexpr std::string_view name = "gelu_tanh";
  static constexpr double k = 0.79788456080286536, c = 0.044715;
  template <typename V>
  static V tangent(const V& z, const V& square) {
    return tanh(number<V>(k) * z * at::vec::fmadd(number<V>(c), square, number<V>(1)));
  }
  template <typename V>
  static V forward(const V& z, const V&) {
    return number<V>(0.5) * z * (number<V>(1) + tangent(z, z * z));
  }
  template <typename V>
  static V gradient(const V& z, const V&) {
    const V one = number<V>(1), half = number<V>(0.5), square = z * z, t = tangent(z, square);
    const V inner = number<V>(k) * at::vec::fmadd(number<V>(3 * c), square, one);
    return half * (one + t) + half * z * (one - t * t) * inner;
  }
};

// z where z > 0, else alpha * (exp(z) - 1)                   Clevert, Unterthiner, Hochreiter 2016, equation 15
struct ELU : Smooth {
  static constexpr std::string_view name = "elu";
  template <typename V>
  static V forward(const V& z, const V& alpha) {
    return where(z > number<V>(0), z, alpha * expm1(z));
  }
  template <typename V>
  static V gradient(const V& z, const V& alpha) {
    return where(z > number<V>(0), number<V>(1), alpha * exp(z));
  }
};

} // namespace activations

// clang-format off
#define FASTRES_ACTIVATIONS(X) \
  X(Identity) X(ReLU) X(LeakyReLU) X(ReLU6) X(Hardswish) X(SiLU) X(GELU) X(GELUTanh) X(ELU)
// clang-format on

#define FASTRES_KIND(NAME) NAME,
enum class Kind { FASTRES_ACTIVATIONS(FASTRES_KIND) };
#undef FASTRES_KIND

// f(activations::NAME()) for the struct of that kind.
template <typename F>
inline auto with_kind(Kind kind, const F& f) {
  switch (kind) {
#define FASTRES_KIND(NAME) \
  case Kind::NAME: \
    return f(activations::NAME());
    FASTRES_ACTIVATIONS(FASTRES_KIND)
#undef FASTRES_KIND
  }
  __builtin_unreachable();
}

// The names, in the order of Kind.
#define FASTRES_KIND(NAME) activations::NAME::name,
constexpr std::string_view kKindNames[] = {FASTRES_ACTIVATIONS(FASTRES_KIND)};
#undef FASTRES_KIND

inline Kind parse_kind(std::string_view name) {
  const auto found = std::find(std::begin(kKindNames), std::end(kKindNames), name);
  FASTRES_CHECK(found != std::end(kKindNames), "kind: expected one of ", kKindNames, ", got \"", name, "\"");
  return static_cast<Kind>(found - std::begin(kKindNames));
}

// A smooth activation without a parameter, known when loops are compiled.
template <typename F, typename A>
struct InLoop {
  Pair<A> forward(const Pair<A>& z) const {
    return {F::forward(z.lo, Vec<A>(0)), F::forward(z.hi, Vec<A>(0))};
  }
  Pair<A> backward(const Pair<A>& dy, const Pair<A>& z) const {
    return {dy.lo * F::gradient(z.lo, Vec<A>(0)), dy.hi * F::gradient(z.hi, Vec<A>(0))};
  }
  uint32_t passes(const Pair<A>&) const {
    return 0;
  }
};

// An activation with its parameter, for loops that learn at run time which one it is.
template <typename A>
struct ActivationOf {
  Kind kind = Kind::Identity;
  A alpha = 0;

  // Not one of those that loops have compiled into them.
  bool general() const {
    return kind != Kind::Identity && kind != Kind::ReLU;
  }

  // f(z). Not inlined: beside a call of the exponential function one more costs nothing, and one body serves all loops.
  [[gnu::noinline]] Pair<A> forward(const Pair<A>& z) const {
    return with_kind(kind, [&](auto f) -> Pair<A> {
      const Vec<A> parameter(alpha);
      return {f.forward(z.lo, parameter), f.forward(z.hi, parameter)};
    });
  }
  [[gnu::noinline]] Vec<A> forward(Vec<A> z) const {
    return with_kind(kind, [&](auto f) { return f.forward(z, Vec<A>(alpha)); });
  }

  // dy * f'(z)
  [[gnu::noinline]] Pair<A> backward(const Pair<A>& dy, const Pair<A>& z) const {
    return {times_gradient(dy.lo, z.lo), times_gradient(dy.hi, z.hi)};
  }
  [[gnu::noinline]] Vec<A> backward(Vec<A> dy, Vec<A> z) const {
    return times_gradient(dy, z);
  }

  // f(this activation, as loops take it). To choose for each pair costs as much as hardswish itself.
  template <typename F>
  auto for_loops(const F& f) const {
    switch (kind) {
      case Kind::SiLU:
        return f(InLoop<activations::SiLU, A>());
      case Kind::Hardswish:
        return f(InLoop<activations::Hardswish, A>());
      default:
        return f(*this);
    }
  }

  // Where a gated activation's f' is 1, a bit a lane.
  uint32_t passes(const Pair<A>& z) const {
    return passes(z.lo) | passes(z.hi) << Vec<A>::size();
  }
  uint32_t passes(const Vec<A>& z) const {
    return with_kind(kind, [&](auto f) -> uint32_t {
      if constexpr (decltype(f)::gated) {
        return f.passes(z);
      } else {
        return 0;
      }
    });
  }

private:
  Vec<A> times_gradient(const Vec<A>& dy, const Vec<A>& z) const {
    return with_kind(kind, [&](auto f) {
      using F = decltype(f);
      if constexpr (!F::gated) {
        return dy * f.gradient(z, Vec<A>(alpha));
      } else {
        // 0 and not dy * 0, which is not 0 where dy is infinite.
        const uint32_t passed = f.passes(z);
        const Vec<A> through = select_lanes(dy, passed);
        return F::leaks ? through + select_lanes(dy * Vec<A>(alpha), ~passed) : through;
      }
    });
  }
};

// What happens to z, as contract.py's Act has it: activation, dropout, and on which side of them a residual is added.
struct Pointwise {
  Kind kind;
  double alpha;
  double dropout_p;
  bool act_add;

  // One bit an element, kept by dropout and passed by the activation, says all that backward needs.
  bool gated() const {
    return with_kind(kind, [&](auto f) { return f.gated && !(f.leaks && dropout_p > 0); });
  }
  // The gradient's factor where the bit of a gated activation is not set.
  double leak() const {
    return with_kind(kind, [&](auto f) { return f.leaks ? alpha : 0.0; });
  }
  bool saves_bits(bool has_residual) const {
    return dropout_p > 0 || (gated() && has_residual && !act_add);
  }
  // Backward computes the activation's input again.
  bool recomputes(bool has_bits) const {
    return kind != Kind::Identity && !(gated() && has_bits);
  }
  // Backward reads a residual that has no normalisation of its own: its value is part of f's input.
  bool reads_residual() const {
    return !act_add && kind != Kind::Identity && !gated();
  }
  template <typename A>
  ActivationOf<A> activation() const {
    return {kind, static_cast<A>(alpha)};
  }
};

// "act_add" or not.
inline bool parse_order(std::string_view order) {
  FASTRES_CHECK(
      order == "add_act" || order == "act_add", "order: expected \"add_act\" or \"act_add\", got \"", order, "\"");
  return order == "act_add";
}

inline Pointwise pointwise(const Act& act) {
  return {parse_kind(act.kind), act.alpha, act.dropout_p, parse_order(act.order)};
}

// A residual is added first, and there is no dropout.
inline Pointwise pointwise(const Activation& activation) {
  return {parse_kind(activation.kind), activation.alpha, 0.0, false};
}

} // namespace CPU_CAPABILITY
} // namespace fastres
