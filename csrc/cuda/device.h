// What the CUDA runtime says of itself and of a device. Plain types, so that device code needs no header of torch.
#pragma once

#include <string>
#include <vector>

namespace fastres {

struct DeviceLimits {
  std::string name;
  int capability_major;
  int capability_minor;
  int multiprocessors;
  int threads_per_multiprocessor;
  int registers_per_multiprocessor;
  int shared_bytes_per_multiprocessor;
  int shared_bytes_per_block; // with the opt-in that a kernel asks for
  int l2_bytes;
};

// Architectures compiled in, as __CUDA_ARCH_LIST__ gives them: 900 is compute capability 9.0.
std::vector<int> compiled_architectures();

// The CUDA version compiled with, and those of the runtime and the driver in use (0: no driver): 13000 is 13.0.
int compiled_version();
int runtime_version();
int driver_version();

// Throws std::runtime_error with the runtime's words where the device cannot be asked.
DeviceLimits device_limits(int device);

} // namespace fastres
