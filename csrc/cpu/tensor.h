// Tensors, checks and threads over torch's stable ABI: the C functions of libtorch_cpu that every torch from
// kTorchTarget on has. A module compiled with these runs in all of them, and knows no Python.
//
// What ATen would do in a line and the C functions do not is here, no more than the operators need. Everything that a
// call does several times goes straight to a C function: what looks an operator up by its name costs a microsecond.
#pragma once

// at::vec is inlined and leaves no symbol of torch, but its headers refuse a target version: they come first.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

// 2.11. fastres/_build.py has the same, STABLE_ABI.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastres {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// --- errors

// std::invalid_argument is ValueError in Python, where fastres/ops/library.py makes TypeError of one about a dtype.
#define FASTRES_CHECK(TEST, ...) \
  if (!(TEST)) [[unlikely]] { \
    throw std::invalid_argument(::fastres::message(__VA_ARGS__)); \
  }

// An error of torch's own, as a RuntimeError. Until 2.13 its words are on stderr alone.
[[noreturn]] inline void torch_failed(const char* function) {
  const auto words =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error(words ? words() : std::string(function) + " failed; torch's own words are on stderr");
}

#define FASTRES_TORCH(FUNCTION, ...) \
  if (FUNCTION(__VA_ARGS__) != AOTI_TORCH_SUCCESS) [[unlikely]] { \
    ::fastres::torch_failed(#FUNCTION); \
  }

// --- sizes and strides

class Sizes {
public:
  Sizes(const int64_t* data, size_t size) : data_(data), size_(size) {}
  Sizes(std::initializer_list<int64_t> list) : data_(std::data(list)), size_(list.size()) {}
  template <size_t N>
  Sizes(const std::array<int64_t, N>& array) : data_(array.data()), size_(N) {}
  Sizes(const std::vector<int64_t>& vector) : data_(vector.data()), size_(vector.size()) {}

  const int64_t* data() const {
    return data_;
  }
  size_t size() const {
    return size_;
  }
  const int64_t* begin() const {
    return data_;
  }
  const int64_t* end() const {
    return data_ + size_;
  }
  int64_t operator[](size_t i) const {
    return data_[i];
  }
  bool operator==(const Sizes& other) const {
    return std::equal(begin(), end(), other.begin(), other.end());
  }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : *this) {
      product *= size;
    }
    return product;
  }

private:
  const int64_t* data_;
  size_t size_;
};

// Where a tensor of these sizes has its elements in channels_last, [N, C, H, W] only.
inline std::array<int64_t, 4> channels_last_strides(Sizes sizes) {
  return {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
}

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

enum class MemoryFormat { contiguous, channels_last };

// --- messages

template <typename T>
void append(std::ostream& out, const T& part) {
  out << part;
}
template <typename T>
void append_list(std::ostream& out, const T& list) {
  const char* between = "[";
  for (const auto& item : list) {
    out << std::exchange(between, ", ") << item;
  }
  out << (std::size(list) == 0 ? "[]" : "]");
}
template <size_t N>
void append(std::ostream& out, const std::string_view (&names)[N]) {
  append_list(out, names);
}
inline void append(std::ostream& out, const Sizes& sizes) {
  append_list(out, sizes);
}
inline void append(std::ostream& out, ScalarType type) {
  out << torch::headeronly::toString(type);
}

template <typename... Parts>
[[gnu::cold, gnu::noinline]] std::string message(const Parts&... parts) {
  std::ostringstream out;
  (append(out, parts), ...);
  return out.str();
}

// --- dtypes: torch's numbers for them, which are those of the torch that runs

inline int32_t dtype_number(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Short:
      return aoti_torch_dtype_int16();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::ComplexHalf:
      return aoti_torch_dtype_complex32();
    case ScalarType::ComplexFloat:
      return aoti_torch_dtype_complex64();
    case ScalarType::ComplexDouble:
      return aoti_torch_dtype_complex128();
    default:
      return -1;
  }
}

// In the order in which they are looked for. Any other one, which no operator takes, is Undefined.
inline ScalarType dtype_of(int32_t number) {
  using enum ScalarType;
  for (const ScalarType type :
       {Float, BFloat16, Half, Double, Long, Byte, Bool, Int, Short, Char, ComplexHalf, ComplexFloat, ComplexDouble}) {
    if (dtype_number(type) == number) {
      return type;
    }
  }
  return Undefined;
}

template <typename T>
inline constexpr ScalarType kDtype = ScalarType::Undefined;
template <>
inline constexpr ScalarType kDtype<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtype<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kDtype<Half> = ScalarType::Half;
template <>
inline constexpr ScalarType kDtype<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kDtype<uint8_t> = ScalarType::Byte;

// --- tensors

// A reference to a tensor, or to none. Copying it costs an allocation, as torch's C functions have it; moving nothing.
class Tensor {
public:
  Tensor() = default;
  // Takes over the handle.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(const Tensor& other) {
    if (other.handle_ != nullptr) {
      FASTRES_TORCH(aoti_torch_new_tensor_handle, other.handle_, &handle_);
    }
  }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) {
      aoti_torch_delete_tensor_object(handle_);
    }
  }

  AtenTensorHandle get() const {
    return handle_;
  }
  // The caller's from now on.
  AtenTensorHandle release() noexcept {
    return std::exchange(handle_, nullptr);
  }
  bool defined() const {
    return handle_ != nullptr;
  }

  int64_t dim() const {
    int64_t value = 0;
    FASTRES_TORCH(aoti_torch_get_dim, handle_, &value);
    return value;
  }
  int64_t numel() const {
    int64_t value = 0;
    FASTRES_TORCH(aoti_torch_get_numel, handle_, &value);
    return value;
  }
  Sizes sizes() const {
    int64_t* data = nullptr;
    FASTRES_TORCH(aoti_torch_get_sizes, handle_, &data);
    return {data, static_cast<size_t>(dim())};
  }
  Sizes strides() const {
    int64_t* data = nullptr;
    FASTRES_TORCH(aoti_torch_get_strides, handle_, &data);
    return {data, static_cast<size_t>(dim())};
  }
  int64_t size(int64_t axis) const {
    int64_t value = 0;
    FASTRES_TORCH(aoti_torch_get_size, handle_, axis, &value);
    return value;
  }
  int64_t stride(int64_t axis) const {
    int64_t value = 0;
    FASTRES_TORCH(aoti_torch_get_stride, handle_, axis, &value);
    return value;
  }
  ScalarType scalar_type() const {
    return dtype_of(number());
  }
  bool is_contiguous() const {
    bool value = false;
    FASTRES_TORCH(aoti_torch_is_contiguous, handle_, &value);
    return value;
  }
  // As ATen has it: where an axis has one element its stride says nothing.
  bool is_channels_last() const {
    const Sizes shape = sizes(), step = strides();
    if (shape.size() != 4) {
      return false;
    }
    int64_t expected = 1;
    for (const int axis : {1, 3, 2, 0}) {
      if (shape[axis] != 1) {
        if (step[axis] != expected) {
          return false;
        }
        expected *= shape[axis];
      }
    }
    return true;
  }
  bool is_contiguous(MemoryFormat format) const {
    return format == MemoryFormat::channels_last ? is_channels_last() : is_contiguous();
  }

  template <typename T>
  const T* const_data_ptr() const {
    expect_dtype(kDtype<T>);
    const void* data = nullptr;
    FASTRES_TORCH(torch_get_const_data_ptr, handle_, &data);
    return static_cast<const T*>(data);
  }
  template <typename T>
  T* mutable_data_ptr() const {
    expect_dtype(kDtype<T>);
    void* data = nullptr;
    FASTRES_TORCH(torch_get_mutable_data_ptr, handle_, &data);
    return static_cast<T*>(data);
  }

  void copy_(const Tensor& from) const {
    FASTRES_TORCH(aoti_torch_copy_, handle_, from.handle_, false);
  }
  // In the same strides, where these leave no gaps.
  Tensor clone() const {
    AtenTensorHandle made = nullptr;
    FASTRES_TORCH(aoti_torch_clone, handle_, &made);
    return Tensor(made);
  }
  void zero_() const {
    FASTRES_TORCH(aoti_torch_zero_, handle_);
  }
  // Says that the data was changed. The dispatcher does so for operators that it generates, not for these; a copy onto
  // itself is counted, and returns at once.
  void bump_version() const {
    copy_(*this);
  }

  // Itself where it has that format, or that dtype, already.
  Tensor contiguous(MemoryFormat format = MemoryFormat::contiguous) const;
  Tensor to(ScalarType type) const;

private:
  AtenTensorHandle handle_ = nullptr;

  int32_t number() const {
    int32_t value = 0;
    FASTRES_TORCH(aoti_torch_get_dtype, handle_, &value);
    return value;
  }
  void expect_dtype(ScalarType type) const {
    if (number() != dtype_number(type)) [[unlikely]] {
      throw std::runtime_error(message("expected a tensor of ", type, ", got ", scalar_type()));
    }
  }
};

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// --- making them, uninitialised

inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType type) {
  AtenTensorHandle made = nullptr;
  FASTRES_TORCH(
      aoti_torch_empty_strided,
      static_cast<int64_t>(sizes.size()),
      sizes.data(),
      strides.data(),
      dtype_number(type),
      aoti_torch_device_type_cpu(),
      0,
      &made);
  return Tensor(made);
}

inline Tensor empty(Sizes sizes, ScalarType type, MemoryFormat format = MemoryFormat::contiguous) {
  if (format == MemoryFormat::channels_last) {
    return empty_strided(sizes, channels_last_strides(sizes), type);
  }
  return empty_strided(sizes, contiguous_strides(sizes), type);
}

inline Tensor empty_vector(int64_t size, ScalarType type) {
  return empty_strided({size}, {1}, type);
}

// A view of memory that outlives it.
template <typename T>
Tensor from_memory(const T* data, Sizes sizes, Sizes strides) {
  AtenTensorHandle made = nullptr;
  FASTRES_TORCH(
      aoti_torch_create_tensor_from_blob,
      const_cast<T*>(data),
      static_cast<int64_t>(sizes.size()),
      sizes.data(),
      strides.data(),
      0,
      dtype_number(kDtype<T>),
      aoti_torch_device_type_cpu(),
      0,
      &made);
  return Tensor(made);
}

inline Tensor Tensor::contiguous(MemoryFormat format) const {
  if (is_contiguous(format)) {
    return *this;
  }
  Tensor made = empty(sizes(), scalar_type(), format);
  made.copy_(*this);
  return made;
}

inline Tensor Tensor::to(ScalarType type) const {
  if (scalar_type() == type) {
    return *this;
  }
  const bool turned = !is_contiguous() && is_channels_last();
  Tensor made = empty(sizes(), type, turned ? MemoryFormat::channels_last : MemoryFormat::contiguous);
  made.copy_(*this);
  return made;
}

// --- threads: those of torch

inline int64_t get_num_threads() {
  uint32_t threads = 1;
  FASTRES_TORCH(torch_get_num_threads, &threads);
  return threads;
}

// f(begin, end) for parts of the range, none smaller than `grain` but for the last.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  // Of an exception that reaches torch only a number comes back: the first one is kept here.
  struct Task {
    const F& f;
    std::atomic<bool> failed = false;
    std::exception_ptr error;
  } task{f};
  const auto run = [](int64_t from, int64_t to, void* context) {
    Task& task = *static_cast<Task*>(context);
    try {
      task.f(from, to);
    } catch (...) {
      if (!task.failed.exchange(true)) {
        task.error = std::current_exception();
      }
    }
  };
  FASTRES_TORCH(torch_parallel_for, begin, end, grain, run, &task);
  if (task.error) {
    std::rethrow_exception(task.error);
  }
}

} // namespace fastres
