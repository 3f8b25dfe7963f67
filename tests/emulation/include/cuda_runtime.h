// Shadows CUDA's header of the same name: the part that the kernels use, on the emulator.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// One block runs at a time on a host thread: its shared variables are that thread's. The alignment
// leaves a gap behind most of them, so that what lies past the end is no other variable.
#define __shared__ static thread_local __attribute__((aligned(4096)))

#define VLM_EMU_INLINE inline __attribute__((always_inline))

#define threadIdx (::vlm::emu::thread_index())
#define blockIdx (::vlm::emu::block_index())
#define blockDim (::vlm::emu::block_dim())
#define gridDim (::vlm::emu::grid_dim())
constexpr int warpSize = 32;

// ---- vector types

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define VLM_EMU_VECTORS(T, name)                                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VLM_EMU_VECTORS(signed char, char)
VLM_EMU_VECTORS(unsigned char, uchar)
VLM_EMU_VECTORS(short, short)
VLM_EMU_VECTORS(unsigned short, ushort)
VLM_EMU_VECTORS(int, int)
VLM_EMU_VECTORS(unsigned, uint)
VLM_EMU_VECTORS(long long, longlong)
VLM_EMU_VECTORS(float, float)
VLM_EMU_VECTORS(double, double)
#undef VLM_EMU_VECTORS

// ---- barriers, votes, shuffles

#define VLM_EMU_FULL 0xffffffffu

VLM_EMU_INLINE void __syncthreads() { vlm::emu::sync_threads(); }
VLM_EMU_INLINE int __syncthreads_count(int p) { return vlm::emu::sync_threads_count(p); }
VLM_EMU_INLINE int __syncthreads_or(int p) { return vlm::emu::sync_threads_count(p) != 0; }
VLM_EMU_INLINE int __syncthreads_and(int p) { return vlm::emu::sync_threads_count(!p) == 0; }
VLM_EMU_INLINE void __syncwarp(unsigned mask = VLM_EMU_FULL) { vlm::emu::sync_warp(mask); }
VLM_EMU_INLINE void __threadfence() { vlm::emu::fence(); }
VLM_EMU_INLINE void __threadfence_block() {}

VLM_EMU_INLINE unsigned __ballot_sync(unsigned mask, int p) {
  return vlm::emu::ballot(mask, p != 0);
}
VLM_EMU_INLINE int __any_sync(unsigned mask, int p) { return vlm::emu::ballot(mask, p != 0) != 0; }
VLM_EMU_INLINE int __all_sync(unsigned mask, int p) { return vlm::emu::ballot(mask, p == 0) == 0; }

template <class T>
VLM_EMU_INLINE uint64_t vlm_emu_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
VLM_EMU_INLINE T vlm_emu_value(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
VLM_EMU_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  return vlm::emu::match_any(mask, vlm_emu_bits(value));
}

#define VLM_EMU_SHUFFLE(name, kind, Argument)                                                     \
  template <class T>                                                                              \
  VLM_EMU_INLINE T name(unsigned mask, T value, Argument argument, int width = warpSize) {        \
    return vlm_emu_value<T>(vlm::emu::shuffle(vlm::emu::Shuffle::kind, mask, vlm_emu_bits(value), \
                                              static_cast<unsigned>(argument),                    \
                                              static_cast<unsigned>(width)));                     \
  }
VLM_EMU_SHUFFLE(__shfl_sync, index, int)
VLM_EMU_SHUFFLE(__shfl_up_sync, up, unsigned)
VLM_EMU_SHUFFLE(__shfl_down_sync, down, unsigned)
VLM_EMU_SHUFFLE(__shfl_xor_sync, bitwise, int)
#undef VLM_EMU_SHUFFLE

#define VLM_EMU_REDUCE(name, op, T)                                             \
  VLM_EMU_INLINE T name(unsigned mask, T value) {                               \
    return static_cast<T>(vlm::emu::reduce(vlm::emu::Reduce::op, mask, value)); \
  }
VLM_EMU_REDUCE(__reduce_add_sync, add, int)
VLM_EMU_REDUCE(__reduce_add_sync, add, unsigned)
VLM_EMU_REDUCE(__reduce_min_sync, min, int)
VLM_EMU_REDUCE(__reduce_min_sync, min, unsigned)
VLM_EMU_REDUCE(__reduce_max_sync, max, int)
VLM_EMU_REDUCE(__reduce_max_sync, max, unsigned)
VLM_EMU_REDUCE(__reduce_and_sync, bit_and, unsigned)
VLM_EMU_REDUCE(__reduce_or_sync, bit_or, unsigned)
VLM_EMU_REDUCE(__reduce_xor_sync, bit_xor, unsigned)
#undef VLM_EMU_REDUCE

// ---- atomics: integers only, as everywhere in the library (float sums would depend on the order)

#define VLM_EMU_ATOMIC(name, op, T)                                                 \
  VLM_EMU_INLINE T name(T* p, T value) {                                            \
    return static_cast<T>(                                                          \
        vlm::emu::atomic(vlm::emu::Atomic::op, p, sizeof(T), vlm_emu_bits(value))); \
  }
#define VLM_EMU_ATOMIC_ALL(name, op) \
  VLM_EMU_ATOMIC(name, op, int)      \
  VLM_EMU_ATOMIC(name, op, unsigned) \
  VLM_EMU_ATOMIC(name, op, unsigned long long)
VLM_EMU_ATOMIC_ALL(atomicAdd, add)
VLM_EMU_ATOMIC_ALL(atomicAnd, bit_and)
VLM_EMU_ATOMIC_ALL(atomicOr, bit_or)
VLM_EMU_ATOMIC_ALL(atomicXor, bit_xor)
VLM_EMU_ATOMIC_ALL(atomicExch, exchange)
VLM_EMU_ATOMIC(atomicMin, min, int)
VLM_EMU_ATOMIC(atomicMin, unsigned_min, unsigned)
VLM_EMU_ATOMIC(atomicMin, unsigned_min, unsigned long long)
VLM_EMU_ATOMIC(atomicMax, max, int)
VLM_EMU_ATOMIC(atomicMax, unsigned_max, unsigned)
VLM_EMU_ATOMIC(atomicMax, unsigned_max, unsigned long long)
#undef VLM_EMU_ATOMIC_ALL
#undef VLM_EMU_ATOMIC

template <class T>
VLM_EMU_INLINE T atomicCAS(T* p, T expected, T desired) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return static_cast<T>(
      vlm::emu::atomic_cas(p, sizeof(T), vlm_emu_bits(expected), vlm_emu_bits(desired)));
}

// ---- arithmetic

template <class T>
VLM_EMU_INLINE T __ldg(const T* p) {
  return *p;
}

#define VLM_EMU_MIN_MAX(T)                            \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
VLM_EMU_MIN_MAX(int)
VLM_EMU_MIN_MAX(unsigned)
VLM_EMU_MIN_MAX(long)
VLM_EMU_MIN_MAX(unsigned long)
VLM_EMU_MIN_MAX(long long)
VLM_EMU_MIN_MAX(unsigned long long)
#undef VLM_EMU_MIN_MAX
// the device's drop a NaN where the other operand is none
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.f ? fminf(x, 1.f) : 0.f; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}

// ---- the runtime: "device memory" is host memory that the emulator was told of

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int device);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t vlm_emu_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t vlm_emu_occupancy(int* blocks, const void* kernel, int threads, size_t smem_bytes);

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  return vlm_emu_set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params...),
                                                          int threads, size_t smem_bytes) {
  return vlm_emu_occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, smem_bytes);
}
