// Stands in for libcuda.so.1 and libtorch_cuda.so: a "function" is one of the host's, and launches are written down.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MOST_LAUNCHES 64
#define MOST_PARAMETERS 64

struct kernel {
  void (*run)(void** parameters);  // or NULL
  int32_t count;
  int32_t sizes[MOST_PARAMETERS];
};

struct launch {
  void* function;
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  int32_t count;
  uint64_t values[MOST_PARAMETERS];
};

int32_t capturing = 0, refusing = 0, launched = 0;
struct launch launches[MOST_LAUNCHES];

int cuLaunchKernel(
    void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
    unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  const struct kernel* kernel = function;
  if (refusing || threads_y != 1 || threads_z != 1 || stream != (void*)7 || extra != NULL) {
    return 700;
  }
  struct launch* launch = &launches[launched++ % MOST_LAUNCHES];
  *launch = (struct launch){function, {x, y, z}, threads, shared_bytes, kernel->count, {0}};
  for (int i = 0; i < kernel->count; ++i) {
    memcpy(&launch->values[i], parameters[i], kernel->sizes[i]);
  }
  if (kernel->run) {
    kernel->run(parameters);
  }
  return 0;
}

int cuStreamIsCapturing(void* stream, int* status) {
  *status = capturing;
  return stream == (void*)7 ? 0 : 1;
}

int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  const struct kernel* kernel = function;
  if (index >= (size_t)kernel->count) {
    return 1;
  }
  *offset = 0;
  *size = kernel->sizes[index];
  return 0;
}

int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = (void*)7;
  return 0;
}

// y = factor * x, and a count of its calls: (x, y, calls, counters, size, factor).
static void scale(void** parameters) {
  const float* x = *(float**)parameters[0];
  float* y = *(float**)parameters[1];
  int64_t* calls = *(int64_t**)parameters[2];
  int32_t* counters = *(int32_t**)parameters[3];
  const int64_t size = *(int64_t*)parameters[4];
  const float factor = *(float*)parameters[5];
  for (int64_t i = 0; i < size; ++i) {
    y[i] = factor * x[i] + counters[0];
  }
  calls[0] += 1;
}

struct kernel scale_kernel = {scale, 8, {8, 8, 8, 8, 8, 4, 8, 8}};  // and two pointers to scratch memory
