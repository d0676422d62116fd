// Calls of operators whose kernels Triton compiled, repeated without Python.
//
// A first call of an operator runs its launcher in Python, which compiles what is missing, launches, and leaves a
// recipe behind: the tensors that were made, and each launch with the place that every argument came from. A later call
// with arguments of the same shapes, strides, dtypes, numbers and alignment follows the recipe. What recipes cannot say
// (a CUDA graph's own counters, autotuning, float64) goes to Python every time.
#pragma once

#include "driver.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastres::launch {

// Where an argument of a kernel comes from.
enum class Source : int { kInput, kMade, kCounters, kValue };

struct Argument {
  Source source;
  int index;         // of the operator's argument or of the tensor made
  std::string value; // the bytes of a number
};

struct Launch {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads;
  unsigned shared_bytes;
  std::vector<Argument> arguments;
};

struct Recipe {
  std::vector<at::Tensor> made; // one of each kind that a call makes, without memory of its own
  std::vector<int> results;     // of those, in the order of the operator's results
  std::vector<int> updated;     // arguments that kernels write to
  std::vector<Launch> launches;
  int64_t counters; // int32 zeros that a launch finds and leaves
  at::Device device;
};

// What a call is known by: the operator, and all of its arguments but for the tensors' contents and addresses.
using Key = std::vector<int64_t>;

struct Hash {
  std::size_t operator()(const Key& key) const;
};

class Replay {
public:
  explicit Replay(Driver driver) : driver_(driver) {}

  // The arguments on top of the stack as a key, or an empty one where they have a type that keys do not know.
  static Key key_of(const void* operation, c10::ArrayRef<c10::IValue> arguments);

  // Follow the recipe of a key, arguments and results on the stack. False where there is none, or launches may be
  // going into a CUDA graph; the stack is then as it was. Throws std::runtime_error where a launch fails.
  bool call(const Key& key, torch::jit::Stack& stack, std::size_t arguments);

  // Throws std::runtime_error where a kernel takes other parameters than the recipe gives it.
  void learn(Key key, Recipe recipe);

  // Forget every recipe; returns how many there were.
  std::size_t clear();

private:
  static constexpr std::size_t kMost = 4096;

  at::Tensor counters(const Recipe& recipe, void* stream);

  Driver driver_;
  std::mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Recipe>, Hash> recipes_;
  std::unordered_map<Key, at::Tensor, Hash> counters_; // by device and stream
};

} // namespace fastres::launch
