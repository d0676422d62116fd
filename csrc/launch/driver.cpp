#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace fastres::launch {

namespace {

// CUDA_ERROR_INVALID_VALUE, which cuFuncGetParamInfo gives for an index past the last parameter.
constexpr int kNoSuchParameter = 1;

void* open(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw std::runtime_error(std::string("cannot be loaded: ") + dlerror());
  }
  return handle;
}

template <typename F>
void find(F*& function, void* handle, const std::string& library, const char* name) {
  function = reinterpret_cast<F*>(dlsym(handle, name));
  if (function == nullptr) {
    throw std::runtime_error(library + " has no " + name);
  }
}

} // namespace

Driver Driver::load(const std::string& driver_library, const std::string& torch_library) {
  Driver driver;
  void* const cuda = open(driver_library);
  find(driver.launch_kernel, cuda, driver_library, "cuLaunchKernel");
  find(driver.stream_is_capturing, cuda, driver_library, "cuStreamIsCapturing");
  find(driver.parameter_info, cuda, driver_library, "cuFuncGetParamInfo");
  find(driver.current_stream, open(torch_library), torch_library, "aoti_torch_get_current_cuda_stream");
  return driver;
}

std::vector<std::size_t> Driver::parameters(void* function) const {
  std::vector<std::size_t> sizes;
  for (;;) {
    std::size_t offset = 0, size = 0;
    const int status = parameter_info(function, sizes.size(), &offset, &size);
    if (status == kNoSuchParameter) {
      return sizes;
    }
    if (status != 0) {
      throw std::runtime_error("cuFuncGetParamInfo: error " + std::to_string(status));
    }
    sizes.push_back(size);
  }
}

void* Driver::stream(int device) const {
  void* stream = nullptr;
  if (const int status = current_stream(device, &stream); status != 0) {
    throw std::runtime_error("the current stream: error " + std::to_string(status));
  }
  return stream;
}

} // namespace fastres::launch
