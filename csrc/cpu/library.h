// Registers implementations as kernels of the operators that fastres.ops defines.
//
//   FASTRES_KERNELS(m) {
//     m.impl("batch_norm_act_apply", boxed<&apply>);
//   }
//
// torch calls a kernel with a stack of words: a number's bits, a tensor's handle, a pointer to the word of what may be
// None, a handle of a string or a list. The kernel owns all that they refer to, and leaves its results in their place.
// The implementation's parameters are groups, as csrc/common/arguments.h has them.
#pragma once

#include "tensor.h"

#include "../common/arguments.h"

#include <bit>
#include <cstring>
#include <memory>

namespace fastres {
namespace boxing {

template <typename T>
T from_word(StableIValue word) {
  static_assert(std::endian::native == std::endian::little && sizeof(T) <= sizeof(word));
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// One flat argument: what it is held in, and what the implementation gets of that.
template <typename T>
struct Argument {
  T value;
  explicit Argument(StableIValue word) : value(from_word<T>(word)) {}
  T get() const {
    return value;
  }
};

template <>
struct Argument<const Tensor&> {
  Tensor value;
  explicit Argument(StableIValue word) : value(from_word<AtenTensorHandle>(word)) {}
  const Tensor& get() const {
    return value;
  }
};

template <typename T>
std::optional<T> optional_from(StableIValue word) {
  // For a module of this target version torch makes the inner word by new, and leaves it to the kernel.
  const std::unique_ptr<StableIValue> inner(from_word<StableIValue*>(word));
  if (inner == nullptr) {
    return std::nullopt;
  }
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(from_word<AtenTensorHandle>(*inner));
  } else {
    return from_word<T>(*inner);
  }
}

template <typename T>
struct Argument<std::optional<T>> {
  std::optional<T> value;
  explicit Argument(StableIValue word) : value(optional_from<T>(word)) {}
  const std::optional<T>& get() const {
    return value;
  }
};
template <typename T>
struct Argument<const std::optional<T>&> : Argument<std::optional<T>> {
  using Argument<std::optional<T>>::Argument;
};

template <>
struct Argument<std::string_view> {
  std::string value;
  explicit Argument(StableIValue word) {
    const auto handle = from_word<StringHandle>(word);
    size_t length = 0;
    const char* text = nullptr;
    FASTRES_TORCH(torch_string_length, handle, &length);
    FASTRES_TORCH(torch_string_c_str, handle, &text);
    value.assign(text, length);
    FASTRES_TORCH(torch_delete_string, handle);
  }
  std::string_view get() const {
    return value;
  }
};

// f(word) for the items of a list.
template <typename F>
void for_each_item(StableIValue word, const F& f) {
  const auto handle = from_word<StableListHandle>(word);
  size_t size = 0;
  FASTRES_TORCH(torch_list_size, handle, &size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item = 0;
    FASTRES_TORCH(torch_list_get_item, handle, i, &item);
    f(item);
  }
  FASTRES_TORCH(torch_delete_list, handle);
}

template <>
struct Argument<Sizes> {
  std::vector<int64_t> value;
  explicit Argument(StableIValue word) {
    for_each_item(word, [&](StableIValue item) { value.push_back(from_word<int64_t>(item)); });
  }
  Sizes get() const {
    return value;
  }
};

template <>
struct Argument<const Tensors&> {
  Tensors value;
  explicit Argument(StableIValue word) {
    for_each_item(word, [&](StableIValue item) { value.emplace_back(from_word<AtenTensorHandle>(item)); });
  }
  const Tensors& get() const {
    return value;
  }
};

template <size_t N>
struct Argument<std::array<bool, N>> {
  std::array<bool, N> value{};
  explicit Argument(StableIValue word) {
    size_t count = 0;
    for_each_item(word, [&](StableIValue item) {
      if (count < N) {
        value[count] = from_word<bool>(item);
      }
      ++count;
    });
    FASTRES_CHECK(count == N, "needs: expected ", N, " flags, got ", count);
  }
  const std::array<bool, N>& get() const {
    return value;
  }
};

inline void to_word(StableIValue& word, Tensor& result) {
  const AtenTensorHandle handle = result.release();
  std::memcpy(&word, &handle, sizeof(handle));
}

template <auto kFunction, typename Flat>
struct Boxed;
template <auto kFunction, typename... F>
struct Boxed<kFunction, Types<F...>> {
  template <size_t... kAt>
  static auto call_with(StableIValue* stack, std::index_sequence<kAt...>) {
    const std::tuple<Argument<F>...> held{Argument<F>(stack[kAt])...};
    return arguments::Grouped<kFunction>::call(std::get<kAt>(held).get()...);
  }

  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    if (count != sizeof...(F)) {
      throw std::logic_error(message("the schema has ", count, " arguments, the kernel ", sizeof...(F)));
    }
    auto results = call_with(stack, std::index_sequence_for<F...>());
    if constexpr (std::is_same_v<decltype(results), Tensor>) {
      to_word(stack[0], results);
    } else {
      std::apply([&](auto&... result) { (to_word(*stack++, result), ...); }, results);
    }
  }
};

} // namespace boxing

template <auto kFunction>
constexpr auto boxed = &boxing::Boxed<kFunction, typename arguments::Grouped<kFunction>::Flat>::call;

// The kernels of one file.
class Kernels {
public:
  Kernels(const char* file, void (*add)(Kernels&)) {
    FASTRES_TORCH(aoti_torch_library_init_impl, "fastres", "CPU", file, 0, &library_);
    add(*this);
  }
  ~Kernels() {
    aoti_torch_delete_library_object(library_);
  }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  void impl(const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    FASTRES_TORCH(torch_library_impl, library_, name, kernel, TORCH_TARGET_VERSION);
  }

private:
  TorchLibraryHandle library_ = nullptr;
};

#define FASTRES_KERNELS(M) \
  static void fastres_add_kernels(::fastres::Kernels&); \
  static const ::fastres::Kernels fastres_kernels(__FILE__, fastres_add_kernels); \
  static void fastres_add_kernels(::fastres::Kernels& M)

} // namespace fastres
