// The Python side of repeated launches, and the operators' kernels that look for a recipe first.
#include "replay.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using namespace fastres::launch;

// They last as long as the process: an operator may be called until its very end.
Replay* replay = nullptr;
std::vector<torch::Library*> registrations;
std::unordered_map<std::string, std::string> functions; // operator -> the function that has its derivative

// The call that Python is doing in this thread, and may leave a recipe for.
thread_local const Key* unknown = nullptr;

void launched(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const std::size_t arguments = schema.arguments().size();
  const Key key = Replay::key_of(&schema, torch::jit::last(*stack, arguments));
  if (!key.empty() && replay->call(key, *stack, arguments)) {
    return;
  }
  struct Asking {
    const Key* outer = unknown;
    explicit Asking(const Key* key) {
      unknown = key;
    }
    ~Asking() {
      unknown = outer;
    }
  } asking(key.empty() ? nullptr : &key);
  operation.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, *stack);
}

// What fastres/ops/library.py says of every operator in Python, without going there.
void without_gradients(const c10::OperatorHandle& operation, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    for (const auto& argument : torch::jit::last(*stack, operation.schema().arguments().size())) {
      if (argument.isTensor() && argument.toTensor().requires_grad()) {
        const std::string& name = operation.operator_name().name;
        throw std::runtime_error(
            name +
            ": expected inputs that require no gradient, or torch.no_grad(), for the operator has no derivative"
            " of its own; call fastres.functional." +
            functions.at(name) + " where gradients are needed");
      }
    }
  }
  operation.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void load(const std::string& driver_library, const std::string& torch_library) {
  if (replay == nullptr) {
    replay = new Replay(Driver::load(driver_library, torch_library));
  }
}

torch::Library& library(const std::string& name, c10::DispatchKey key) {
  const std::string space = name.substr(0, name.find("::"));
  registrations.push_back(new torch::Library(torch::Library::IMPL, space, key, __FILE__, __LINE__));
  return *registrations.back();
}

void install(const std::string& name, const std::string& backend) {
  if (replay == nullptr) {
    throw std::runtime_error("load comes before install");
  }
  library(name, c10::parseDispatchKey(backend))
      .impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&launched>());
}

void guard(const std::string& name, const std::string& backend, const std::string& function) {
  functions[name] = function;
  library(name, c10::parseDispatchKey("Autograd" + backend))
      .impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&without_gradients>());
}

bool is_asked() {
  return unknown != nullptr;
}

using Argued = std::tuple<int, int, py::bytes>;
using Launched = std::tuple<std::uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, std::vector<Argued>>;

bool learn(
    const std::vector<at::Tensor>& made,
    const std::vector<int>& results,
    const std::vector<int>& updated,
    const std::vector<Launched>& launches,
    int64_t counters,
    const at::Device& device) {
  if (unknown == nullptr) {
    return false;
  }
  Recipe recipe{made, results, updated, {}, counters, device};
  for (const auto& [function, grid, threads, shared_bytes, arguments] : launches) {
    Launch launch{reinterpret_cast<void*>(function), grid, threads, shared_bytes, {}};
    for (const auto& [source, index, value] : arguments) {
      launch.arguments.push_back({static_cast<Source>(source), index, value});
    }
    recipe.launches.push_back(std::move(launch));
  }
  replay->learn(*unknown, std::move(recipe));
  return true;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  return info;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Calls of operators whose kernels Triton compiled, repeated without Python.";
  m.def("build_info", &build_info, "The torch that it was compiled for.");
  m.def(
      "load",
      &load,
      py::arg("driver_library"),
      py::arg("torch_library"),
      "Find what launches need, once a process. RuntimeError where it is not there.");
  m.def(
      "install",
      &install,
      py::arg("name"),
      py::arg("backend"),
      "Make namespace::operator look for a recipe before it runs its kernel of every device. backend: \"CUDA\".");
  m.def(
      "guard",
      &guard,
      py::arg("name"),
      py::arg("backend"),
      py::arg("function"),
      "Refuse tensors that require a gradient to namespace::operator, naming the function that has its derivative.");
  m.def("is_asked", &is_asked, "Whether an operator is running that would take a recipe.");
  m.def(
      "learn",
      &learn,
      py::arg("made"),
      py::arg("results"),
      py::arg("updated"),
      py::arg("launches"),
      py::arg("counters"),
      py::arg("device"),
      "A recipe for the operator that is running. made: tensors without data; results: which of them are the results; "
      "updated: arguments that are written; launches: (function, grid, threads, shared bytes, [(source, index, bytes "
      "of "
      "a number)]). RuntimeError where a kernel takes other parameters. False where nobody asks.");
  m.def("clear", [] { return replay == nullptr ? 0 : replay->clear(); }, "Forget all recipes; how many there were.");
}
