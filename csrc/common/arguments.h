// The groups in which an operator's arguments travel (fastres/contract.py has the same), and how they become the flat
// arguments of its schema.
//
// A schema knows tensors, numbers and strings, but no structs. An implementation takes groups: a parameter
// `const Norm& norm` stands for the schema's norm_mean, norm_rstd, norm_weight and norm_bias. Where the whole group may
// be None, `const std::optional<Norm>& norm`, each of these may be None in the schema, and where all of them are, so is
// the group. fastres/ops/arguments.py makes the schema by the same rule. An operator is registered by
//
//   m.impl("batch_norm_act_apply", fastres::grouped<&fastres::apply>);
//
// csrc/cpu, over torch's stable ABI, has a Tensor of its own and includes tensor.h before this; csrc/cuda has ATen's.
#pragma once

#ifndef TORCH_TARGET_VERSION
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#define FASTRES_CHECK TORCH_CHECK_VALUE
#endif

#include <array>
#include <cstddef>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastres {

#ifndef TORCH_TARGET_VERSION
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
#endif

template <typename... T>
struct Types {};

// --- the groups: `Fields` are the types of the schema's arguments in order, `kName` is for messages. They refer to the
// caller's tensors, so a group lives no longer than the call.

struct NormParams {
  using Fields =
      Types<const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, double>;
  static constexpr const char* kName = "NormParams(running_mean, running_var, weight, bias, momentum, eps)";
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double momentum;
  double eps;
};

struct Norm {
  using Fields = Types<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
  static constexpr const char* kName = "Norm(mean, rstd, weight, bias)";
  const Tensor& mean;
  const Tensor& rstd;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
};

// It has a normalisation of its own where it has a mean.
struct Residual {
  using Fields =
      Types<const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;
  static constexpr const char* kName = "Residual(value, mean, rstd, weight, bias)";
  const Tensor& value;
  const OptionalTensor& mean;
  const OptionalTensor& rstd;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
};

// `count`, int64 [1]: elements a channel that they were taken of; None: those of the tensor that they come with.
struct Statistics {
  using Fields = Types<const Tensor&, const Tensor&, const OptionalTensor&>;
  static constexpr const char* kName = "Statistics(mean, m2, count)";
  const Tensor& mean;
  const Tensor& m2;
  const OptionalTensor& count;
};

struct Sums {
  using Fields = Types<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
  static constexpr const char* kName = "Sums(dweight, dbias, residual_dweight, residual_dbias)";
  const Tensor& dweight;
  const Tensor& dbias;
  const OptionalTensor& residual_dweight;
  const OptionalTensor& residual_dbias;
};

struct Act {
  using Fields = Types<std::string_view, double, double, std::string_view>;
  static constexpr const char* kName = "Act(kind, alpha, dropout_p, order)";
  std::string_view kind;
  double alpha;
  double dropout_p;
  std::string_view order;
};

// A convolution with a square kernel in one group.
struct ConvShape {
  using Fields = Types<int64_t, int64_t, int64_t, int64_t>;
  static constexpr const char* kName = "ConvShape(outputs, kernel, stride, padding)";
  int64_t outputs;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
};

// Square windows of a pooling.
struct Pool {
  using Fields = Types<int64_t, int64_t, int64_t>;
  static constexpr const char* kName = "Pool(kernel, stride, padding)";
  int64_t kernel;
  int64_t stride;
  int64_t padding;
};

struct Activation {
  using Fields = Types<std::string_view, double>;
  static constexpr const char* kName = "Activation(kind, alpha)";
  std::string_view kind;
  double alpha;
};

// --- from flat arguments to groups

namespace arguments {

// The type of a field in the schema where its group may be None.
template <typename T>
struct OrNone {
  using type = std::optional<T>;
};
template <typename T>
struct OrNone<const T&> {
  using type = const std::optional<T>&;
};
template <typename T>
struct OrNone<const std::optional<T>&> {
  using type = const std::optional<T>&;
};
template <typename T>
using or_none_t = typename OrNone<T>::type;

// The field itself, in a group that is not None.
template <typename T>
T present(or_none_t<T> value, const char* group) {
  if constexpr (std::is_same_v<T, or_none_t<T>>) {
    return value;
  } else {
    FASTRES_CHECK(value.has_value(), group, ": expected none or all of what may not be None by itself");
    return *value;
  }
}

// One parameter of an implementation: the flat arguments that it stands for, `Flat`, and what it is made of them.
template <typename P>
struct Parameter {
  using Flat = Types<P>;
  static P make(P value) {
    return value;
  }
};

template <typename G>
concept IsGroup = requires { typename G::Fields; };

template <typename G, typename Fields>
struct Group;
template <typename G, typename... F>
struct Group<G, Types<F...>> {
  using Flat = Types<F...>;
  static G make(F... fields) {
    return G{fields...};
  }
};

template <typename G, typename Fields>
struct OptionalGroup;
template <typename G, typename... F>
struct OptionalGroup<G, Types<F...>> {
  using Flat = Types<or_none_t<F>...>;
  static std::optional<G> make(or_none_t<F>... fields) {
    if (!(fields.has_value() || ...)) {
      return std::nullopt;
    }
    return G{present<F>(fields, G::kName)...};
  }
};

template <IsGroup G>
struct Parameter<const G&> : Group<G, typename G::Fields> {};
template <IsGroup G>
struct Parameter<const std::optional<G>&> : OptionalGroup<G, typename G::Fields> {};

template <typename... Lists>
struct Joined;
template <typename... T>
struct Joined<Types<T...>> {
  using type = Types<T...>;
};
template <typename... T, typename... U, typename... Rest>
struct Joined<Types<T...>, Types<U...>, Rest...> : Joined<Types<T..., U...>, Rest...> {};

template <typename... T>
constexpr size_t length(Types<T...>) {
  return sizeof...(T);
}

// The function whose parameters are the flat arguments of kFunction's parameters, one after the other.
template <auto kFunction, typename Parameters, typename Flat>
struct Flattened;
template <auto kFunction, typename... P, typename... F>
struct Flattened<kFunction, Types<P...>, Types<F...>> {
  using Flat = Types<F...>;

  // Where each parameter's arguments begin.
  static constexpr auto kFirst = [] {
    std::array<size_t, sizeof...(P)> first{length(typename Parameter<P>::Flat())...};
    for (size_t i = 0, next = 0; i < sizeof...(P); ++i) {
      next += std::exchange(first[i], next);
    }
    return first;
  }();

  template <typename One, size_t kAt, size_t... kField>
  static auto make(const std::tuple<F...>& flat, std::index_sequence<kField...>) -> decltype(auto) {
    return Parameter<One>::make(std::get<kAt + kField>(flat)...);
  }

  template <size_t... kParameter>
  static auto call_with(const std::tuple<F...>& flat, std::index_sequence<kParameter...>) {
    return kFunction(
        make<P, kFirst[kParameter]>(flat, std::make_index_sequence<length(typename Parameter<P>::Flat())>())...);
  }

  static auto call(F... flat) {
    return call_with(std::tuple<F...>(flat...), std::index_sequence_for<P...>());
  }
};

template <auto kFunction, typename Signature = decltype(kFunction)>
struct Grouped;
template <auto kFunction, typename R, typename... P>
struct Grouped<kFunction, R (*)(P...)>
    : Flattened<kFunction, Types<P...>, typename Joined<typename Parameter<P>::Flat...>::type> {};

} // namespace arguments

// `kFunction` with the flat arguments of its schema.
template <auto kFunction>
constexpr auto grouped = &arguments::Grouped<kFunction>::call;

} // namespace fastres
