// What repeating a launch needs of CUDA, found at run time: this code is compiled without CUDA's headers and libraries,
// so that a machine that has torch and a C++ compiler, but no nvcc, launches as fast as one that has both.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastres::launch {

// The functions of the driver's library and of torch's that are called, by their C interface.
struct Driver {
  int (*launch_kernel)(
      void* function,
      unsigned grid_x,
      unsigned grid_y,
      unsigned grid_z,
      unsigned block_x,
      unsigned block_y,
      unsigned block_z,
      unsigned shared_bytes,
      void* stream,
      void** parameters,
      void** extra);
  int (*stream_is_capturing)(void* stream, int* status);
  int (*parameter_info)(void* function, std::size_t index, std::size_t* offset, std::size_t* size);
  int (*current_stream)(int32_t device, void** stream);

  // Throws std::runtime_error where a library or a function is missing. Neither library is ever unloaded.
  static Driver load(const std::string& driver_library, const std::string& torch_library);

  // Bytes of each of a kernel's parameters. Throws std::runtime_error where the driver does not say.
  std::vector<std::size_t> parameters(void* function) const;

  // Throws std::runtime_error where torch does not say.
  void* stream(int device) const;

  // Whether launches on the stream may go into a CUDA graph: also where the driver cannot say.
  bool is_capturing(void* stream) const {
    int status = 0;
    return stream_is_capturing(stream, &status) != 0 || status != 0;
  }
};

} // namespace fastres::launch
