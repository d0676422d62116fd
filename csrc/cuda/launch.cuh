// How a kernel is put into a stream.
#pragma once

#include "launch.h"
#include "projection_shortcut.cuh"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastres::shortcut {

struct Launcher {
  cudaStream_t stream;

  template <typename P>
  void operator()(const Configuration& c, void (*kernel)(P), const std::type_identity_t<P>& params) const {
    const dim3 grid(static_cast<unsigned>(c.grid_x), static_cast<unsigned>(c.grid_y));
    kernel<<<grid, c.threads, c.shared_bytes, stream>>>(params);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(
          std::string("projection_shortcut: a kernel was not launched: ") + cudaGetErrorString(error));
    }
  }
};

} // namespace fastres::shortcut
