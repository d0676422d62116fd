// The words that device code is written in: asynchronous copies, matrix fragments, shuffles, barriers, memory access.
//
// There are two implementations of the same names: the device's, in this file, and that of tests/emulator, which runs
// kernels on the CPU and checks every access (FASTRES_EMULATOR selects it). Kernels touch shared and global memory
// through these functions only, and let ragged edges be cut off by their `valid` arguments.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTRES_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTRES_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// sm_75 has shared memory for one block only.
#define FASTRES_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS)
#else
#define FASTRES_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#endif
#define FASTRES_UNROLL _Pragma("unroll")
#define FASTRES_PRAGMA(WORDS) _Pragma(#WORDS)
#define FASTRES_UNROLL_BY(N) FASTRES_PRAGMA(unroll N)
#else
#define FASTRES_HOST_DEVICE inline
#define FASTRES_DEVICE inline
#define FASTRES_KERNEL(THREADS, BLOCKS) inline void
#define FASTRES_UNROLL
#define FASTRES_UNROLL_BY(N)
#endif

namespace fastres {

// Storage of the two 16-bit formats: bits, and no arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The formats of an operand of mma; tf32 travels in the bits of a float32.
struct tf32 {};

struct alignas(8) Bytes8 {
  uint32_t words[2];
};
struct alignas(16) Bytes16 {
  uint32_t words[4];
};

} // namespace fastres

#if defined(FASTRES_EMULATOR)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastres {

// --- Where a thread stands -----------------------------------------------------------------------------------------

FASTRES_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}

FASTRES_DEVICE uint32_t block_index_x() {
  return blockIdx.x;
}

FASTRES_DEVICE uint32_t block_index_y() {
  return blockIdx.y;
}

FASTRES_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char fastres_shared_memory[];
  return fastres_shared_memory;
}

FASTRES_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers and shuffles -----------------------------------------------------------------------------------------

FASTRES_DEVICE void barrier() {
  __syncthreads();
}

FASTRES_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

FASTRES_DEVICE uint32_t shuffle_from(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// --- Memory --------------------------------------------------------------------------------------------------------

template <typename V>
FASTRES_DEVICE V load_shared(const void* from) {
  return *static_cast<const V*>(from);
}

template <typename V>
FASTRES_DEVICE void store_shared(void* to, V value) {
  *static_cast<V*>(to) = value;
}

// What lies at `from`, or zeros where it is not `valid`: then nothing is read.
template <typename V>
FASTRES_DEVICE V load_global(const V* from, bool valid) {
  return valid ? *from : V{};
}

template <>
FASTRES_DEVICE Bytes16 load_global(const Bytes16* from, bool valid) {
  const uint4 v = valid ? *reinterpret_cast<const uint4*>(from) : uint4{};
  return {v.x, v.y, v.z, v.w};
}

template <typename V>
FASTRES_DEVICE void store_global(V* to, V value, bool valid) {
  if (valid) {
    *to = value;
  }
}

template <>
FASTRES_DEVICE void store_global(Bytes16* to, Bytes16 value, bool valid) {
  if (valid) {
    *reinterpret_cast<uint4*>(to) = {value.words[0], value.words[1], value.words[2], value.words[3]};
  }
}

// A copy from global to shared memory that has arrived after copy_wait and, for other threads, the barrier behind it.
// Zeros are written where it is not `valid`; `from` is then not read. Before sm_80 the copy is made at once.
template <int Bytes>
FASTRES_DEVICE void copy_async(void* to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    // Past the L1 cache: a tile is read once by a block.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes), "r"(bytes)
        : "memory");
  }
#else
  if constexpr (Bytes == 16) {
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{};
  } else if constexpr (Bytes == 8) {
    *static_cast<uint2*>(to) = valid ? *static_cast<const uint2*>(from) : uint2{};
  } else {
    *static_cast<uint32_t*>(to) = valid ? *static_cast<const uint32_t*>(from) : 0;
  }
#endif
}

// Closes a group of copies.
FASTRES_DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest `Pending` groups of this thread are still under way.
template <int Pending>
FASTRES_DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// --- Conversions ---------------------------------------------------------------------------------------------------

FASTRES_DEVICE float to_float(float v) {
  return v;
}
FASTRES_DEVICE float to_float(bf16 v) {
  return __bfloat162float(__ushort_as_bfloat16(v.bits));
}
FASTRES_DEVICE float to_float(f16 v) {
  return __half2float(__ushort_as_half(v.bits));
}

// To nearest, ties to even.
template <typename T>
FASTRES_DEVICE T from_float(float v);
template <>
FASTRES_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
FASTRES_DEVICE bf16 from_float<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
FASTRES_DEVICE f16 from_float<f16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

FASTRES_DEVICE uint32_t float_bits(float v) {
  return __float_as_uint(v);
}
FASTRES_DEVICE float bits_float(uint32_t v) {
  return __uint_as_float(v);
}

// The bits of a float32 rounded to tf32 (to nearest, ties away from zero), as mma expects them.
FASTRES_DEVICE uint32_t round_to_tf32(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(v)));
  return rounded;
#else
  return (v + 0x1000u) & ~0x1fffu;
#endif
}

} // namespace fastres
#endif

namespace fastres {

// mma m16n8k16 where there is none, as for bf16 on sm_75: each lane fetches the rows and columns of its four results
// from the lanes that hold them.
template <typename T>
FASTRES_DEVICE void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
  const int lane = thread_index() % 32;
  for (int part = 0; part < 4; ++part) {
    uint32_t row[4], column[2][2];
    for (int i = 0; i < 4; ++i) {
      row[i] = shuffle_from(a[i], (lane & ~3) | part);
    }
    for (int j = 0; j < 2; ++j) {
      const int from = (2 * (lane & 3) + j) * 4 + part;
      column[j][0] = shuffle_from(b0, from);
      column[j][1] = shuffle_from(b1, from);
    }
    for (int i = 0; i < 4; ++i) {
      // Register i of a holds row i % 2, k half i / 2; result e holds row e / 2, column e % 2.
      for (int j = 0; j < 2; ++j) {
        for (int half = 0; half < 2; ++half) {
          const T x{static_cast<uint16_t>(row[i] >> (16 * half))};
          const T y{static_cast<uint16_t>(column[j][i / 2] >> (16 * half))};
          d[(i % 2) * 2 + j] += to_float(x) * to_float(y);
        }
      }
    }
  }
}

} // namespace fastres

#if !defined(FASTRES_EMULATOR)
namespace fastres {

// --- Matrices ------------------------------------------------------------------------------------------------------

// ldmatrix: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and receives
// elements 2 * (l % 4) and the next of row l / 4 of each.
FASTRES_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed on its way.
FASTRES_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, fragments as the PTX ISA lays them out: m16n8k16 for bf16 and f16, m16n8k8 for tf32; float32 accumulators.
template <typename Format>
FASTRES_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1);

template <>
FASTRES_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_by_shuffles<bf16>(d, a, b0, b1);
#endif
}

template <>
FASTRES_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  FASTRES_UNROLL
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half == 0 ? b0 : b1));
  }
#endif
}

template <>
FASTRES_DEVICE void mma<tf32>(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap(); // the launcher takes plain FMA there
#endif
}

} // namespace fastres

#endif
