#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace fastres {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    // The runtime remembers it, and whoever asks next, such as torch after a launch, would take it for theirs.
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

} // namespace

std::vector<int> compiled_architectures() {
  return {__CUDA_ARCH_LIST__};
}

int compiled_version() {
  return CUDART_VERSION;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

DeviceLimits device_limits(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {
      properties.name,
      attribute(cudaDevAttrComputeCapabilityMajor, device),
      attribute(cudaDevAttrComputeCapabilityMinor, device),
      attribute(cudaDevAttrMultiProcessorCount, device),
      attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device),
      attribute(cudaDevAttrMaxRegistersPerMultiprocessor, device),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrL2CacheSize, device),
  };
}

} // namespace fastres
