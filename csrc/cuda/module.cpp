// The Python side of the CUDA module: what it was compiled from and for, and what a device offers.
#include "device.h"
#include "projection_shortcut.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <array>
#include <string>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = fastres::compiled_version();
  info["architectures"] = fastres::compiled_architectures();
  return info;
}

py::dict device_limits(int device) {
  const auto limits = fastres::device_limits(device);
  py::dict info;
  info["name"] = limits.name;
  info["capability"] = py::make_tuple(limits.capability_major, limits.capability_minor);
  info["multiprocessors"] = limits.multiprocessors;
  info["threads_per_multiprocessor"] = limits.threads_per_multiprocessor;
  info["registers_per_multiprocessor"] = limits.registers_per_multiprocessor;
  info["shared_bytes_per_multiprocessor"] = limits.shared_bytes_per_multiprocessor;
  info["shared_bytes_per_block"] = limits.shared_bytes_per_block;
  info["l2_bytes"] = limits.l2_bytes;
  return info;
}

template <typename E, std::size_t kCount>
E by_name(const char* what, const char* const (&names)[kCount], const std::string& name) {
  for (std::size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) {
      return static_cast<E>(i);
    }
  }
  throw py::value_error(std::string(what) + ": unknown name \"" + name + "\"");
}

// The shape is (N, Cin, H, W).
py::dict launch_plan(
    const std::string& step,
    const std::string& arithmetic,
    const std::array<int64_t, 4>& shape,
    int64_t out_channels,
    const std::array<int64_t, 2>& stride,
    bool channels_last,
    bool aligned,
    bool statistics) {
  using namespace fastres::shortcut;
  const Problem problem{shape[0], shape[1], shape[2], shape[3], out_channels, stride[0], stride[1], channels_last};
  const Plan plan = plan_of(
      by_name<Step>("step", kStepNames, step),
      by_name<Arithmetic>("arithmetic", kArithmeticNames, arithmetic),
      problem,
      aligned,
      statistics);
  py::dict info;
  info["grid"] = py::make_tuple(plan.blocks(), plan.splits);
  info["threads"] = Tile::kThreads;
  info["shared_bytes"] = Tile::kSharedBytes;
  info["vector_loads"] = plan.vector_loads;
  info["vector_stores"] = plan.vector_stores;
  info["second_blocks"] = plan.second_blocks;
  info["second_threads"] = plan.second_threads;
  info["workspace_bytes"] = plan.workspace * 4;
  return info;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CUDA side of fastres.";
  m.def("build_info", &build_info, "The torch, the CUDA version and the architectures it was compiled for.");
  m.def("runtime_version", &fastres::runtime_version, "Version of the CUDA runtime in use: 13000 is 13.0.");
  m.def("driver_version", &fastres::driver_version, "Newest CUDA version the driver knows, 0 without a driver.");
  m.def("device_limits", &device_limits, py::arg("device"), "What a device offers. RuntimeError where there is none.");
  m.def(
      "launch_plan",
      &launch_plan,
      py::arg("step"),
      py::arg("arithmetic"),
      py::arg("shape"),
      py::arg("out_channels"),
      py::arg("stride"),
      py::arg("channels_last") = true,
      py::arg("aligned") = true,
      py::arg("statistics") = true,
      "What projection_shortcut launches for a step: the same function that the launcher calls.");
}
