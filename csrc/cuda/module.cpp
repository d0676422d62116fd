// The Python side of the CUDA module: what it was compiled from and for, and what a device offers.
#include "device.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

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

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CUDA side of fastres.";
  m.def("build_info", &build_info, "The torch, the CUDA version and the architectures it was compiled for.");
  m.def("runtime_version", &fastres::runtime_version, "Version of the CUDA runtime in use: 13000 is 13.0.");
  m.def("driver_version", &fastres::driver_version, "Newest CUDA version the driver knows, 0 without a driver.");
  m.def("device_limits", &device_limits, py::arg("device"), "What a device offers. RuntimeError where there is none.");
}
