#include "replay.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>

#include <bit>
#include <cstring>
#include <future>
#include <stdexcept>

namespace fastres::launch {

namespace {

constexpr std::size_t kPointerBytes = sizeof(void*);
constexpr std::uintptr_t kAlignment = 16; // what Triton specialises kernels for
constexpr int64_t kSharedCounters = 1024;

// Tags of a key's parts, so that no two lists of arguments have one key.
enum Tag : int64_t { kNone, kTensor, kInt, kDouble, kBool, kString, kList };

void append(Key& key, const at::Tensor& t) {
  if (!t.defined()) {
    key.push_back(kNone);
    return;
  }
  const bool aligned = reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % kAlignment == 0;
  key.push_back(kTensor | t.dim() << 8 | static_cast<int64_t>(t.scalar_type()) << 24 | int64_t{aligned} << 40);
  key.push_back(static_cast<int64_t>(t.device().type()) << 32 | (t.device().index() & 0xffffffff));
  key.insert(key.end(), t.sizes().begin(), t.sizes().end());
  key.insert(key.end(), t.strides().begin(), t.strides().end());
}

bool append(Key& key, const c10::IValue& value) {
  if (value.isTensor()) {
    append(key, value.toTensor());
  } else if (value.isNone()) {
    key.push_back(kNone);
  } else if (value.isInt()) {
    key.insert(key.end(), {kInt, value.toInt()});
  } else if (value.isDouble()) {
    key.insert(key.end(), {kDouble, std::bit_cast<int64_t>(value.toDouble())});
  } else if (value.isBool()) {
    key.push_back(kBool | int64_t{value.toBool()} << 8);
  } else if (value.isString()) {
    const auto text = value.toStringView();
    key.push_back(kString | static_cast<int64_t>(text.size()) << 8);
    for (std::size_t i = 0; i < text.size(); i += sizeof(int64_t)) {
      int64_t part = 0;
      std::memcpy(&part, text.data() + i, std::min(sizeof(part), text.size() - i));
      key.push_back(part);
    }
  } else if (value.isList()) {
    const auto list = value.toListRef();
    key.push_back(kList | static_cast<int64_t>(list.size()) << 8);
    for (const auto& element : list) {
      if (!append(key, element)) {
        return false;
      }
    }
  } else {
    return false;
  }
  return true;
}

} // namespace

std::size_t Hash::operator()(const Key& key) const {
  uint64_t hash = key.size();
  for (const int64_t part : key) {
    // The finaliser of splitmix64 over the running value.
    hash = (hash ^ static_cast<uint64_t>(part)) + 0x9e3779b97f4a7c15;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
    hash ^= hash >> 27;
  }
  return hash;
}

Key Replay::key_of(const void* operation, c10::ArrayRef<c10::IValue> arguments) {
  Key key;
  key.reserve(16 * arguments.size());
  key.push_back(reinterpret_cast<int64_t>(operation));
  for (const auto& argument : arguments) {
    if (!append(key, argument)) {
      return {};
    }
  }
  return key;
}

bool Replay::call(const Key& key, torch::jit::Stack& stack, std::size_t arguments) {
  std::shared_ptr<const Recipe> found;
  {
    const std::lock_guard lock(mutex_);
    const auto at = recipes_.find(key);
    if (at == recipes_.end()) {
      return false;
    }
    found = at->second;
  }
  const Recipe& recipe = *found;
  const c10::OptionalDeviceGuard guard(recipe.device);
  void* const stream = driver_.stream(recipe.device.index());
  if (driver_.is_capturing(stream)) {
    return false;
  }
  // Nothing below needs to be seen by autograd.
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto given = torch::jit::last(stack, arguments);
  for (const int index : recipe.updated) {
    given[index].toTensor().mutable_data_ptr(); // what was copied lazily is copied now
  }
  std::vector<at::Tensor> made;
  made.reserve(recipe.made.size());
  for (const auto& like : recipe.made) {
    made.push_back(at::empty_strided(like.sizes(), like.strides(), like.options().device(recipe.device)));
  }
  const at::Tensor zeros = recipe.counters > 0 ? counters(recipe, stream) : at::Tensor();
  std::vector<const void*> pointers;
  std::vector<void*> parameters;
  for (const Launch& launch : recipe.launches) {
    pointers.clear();
    parameters.clear();
    // Parameters point into the list of pointers, which must not move.
    pointers.reserve(launch.arguments.size());
    for (const Argument& argument : launch.arguments) {
      if (argument.source == Source::kValue) {
        parameters.push_back(const_cast<char*>(argument.value.data()));
        continue;
      }
      pointers.push_back(
          argument.source == Source::kInput      ? given[argument.index].toTensor().const_data_ptr()
              : argument.source == Source::kMade ? made[argument.index].const_data_ptr()
                                                 : zeros.const_data_ptr());
      parameters.push_back(&pointers.back());
    }
    const int status = driver_.launch_kernel(
        launch.function,
        launch.grid[0],
        launch.grid[1],
        launch.grid[2],
        launch.threads,
        1,
        1,
        launch.shared_bytes,
        stream,
        parameters.data(),
        nullptr);
    if (status != 0) {
      throw std::runtime_error("a kernel was not launched: CUDA error " + std::to_string(status));
    }
  }
  for (const int index : recipe.updated) {
    const at::Tensor& updated = given[index].toTensor();
    if (!updated.is_inference()) {
      // Kernels write past autograd, which has to know that the tensor is no longer what it was.
      updated.unsafeGetTensorImpl()->bump_version();
    }
  }
  torch::jit::drop(stack, arguments);
  for (const int index : recipe.results) {
    stack.emplace_back(std::move(made[index]));
  }
  return true;
}

at::Tensor Replay::counters(const Recipe& recipe, void* stream) {
  // Launches on one stream follow each other, so they share theirs.
  const std::lock_guard lock(mutex_);
  at::Tensor& kept = counters_[{recipe.device.index(), reinterpret_cast<int64_t>(stream)}];
  if (!kept.defined() || kept.numel() < recipe.counters) {
    // They outlive this call, so their memory must not come from the pool of a CUDA graph, from which the run that
    // warms a graph up allocates without a capture. Such a pool serves one thread.
    const c10::Stream current = c10::impl::VirtualGuardImpl(recipe.device.type()).getStream(recipe.device);
    const auto make = [&] {
      const c10::StreamGuard guard(current);
      const auto options = at::TensorOptions().dtype(at::kInt).device(recipe.device);
      return at::zeros({std::max(recipe.counters, kSharedCounters)}, options);
    };
    kept = std::async(std::launch::async, make).get();
  }
  return kept;
}

void Replay::learn(Key key, Recipe recipe) {
  for (Launch& launch : recipe.launches) {
    const auto sizes = driver_.parameters(launch.function);
    auto& arguments = launch.arguments;
    bool fits = arguments.size() <= sizes.size();
    for (std::size_t i = 0; fits && i < sizes.size(); ++i) {
      if (i == arguments.size()) {
        // Scratch memory, which these kernels do not use.
        arguments.push_back({Source::kValue, 0, std::string(kPointerBytes, '\0')});
      }
      fits = sizes[i] == (arguments[i].source == Source::kValue ? arguments[i].value.size() : kPointerBytes);
    }
    if (!fits) {
      throw std::runtime_error("a kernel takes other parameters than it was launched with");
    }
  }
  const std::lock_guard lock(mutex_);
  if (recipes_.size() >= kMost) {
    recipes_.clear();
  }
  recipes_.insert_or_assign(std::move(key), std::make_shared<const Recipe>(std::move(recipe)));
}

std::size_t Replay::clear() {
  const std::lock_guard lock(mutex_);
  const std::size_t count = recipes_.size();
  recipes_.clear();
  return count;
}

} // namespace fastres::launch
