// The CUDA runtime's functions, of a small device: few SMs, so that a grid sized by them stays
// small and its loops run, and the shared memory of sm_80, the smallest the kernels run on.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda/launch.cuh"
#include "cuda_runtime.h"
#include "state.h"

namespace {

constexpr int kMultiprocessors = 4;
constexpr unsigned kMostGridYZ = 65535;

thread_local cudaError_t t_error = cudaSuccess;
std::mutex g_lock;
std::map<const void*, size_t> g_shared_limit;  // kernels that asked for more than the default

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) t_error = error;
  return error;
}

size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(g_lock);
  const auto it = g_shared_limit.find(kernel);
  return it == g_shared_limit.end() ? vlm::emu::kDynamicSharedDefault : it->second;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = t_error;
  t_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return t_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return note(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = vlm::emu::kMaxLanes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = vlm::emu::kDynamicSharedDefault;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = vlm::emu::kDynamicSharedLimit;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = vlm::emu::kWarp;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int device) {
  if (device != 0) return note(cudaErrorInvalidDevice);
  *prop = {"emulated", size_t{1} << 30, 8, 0, kMultiprocessors};
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!vlm::emu::is_global(p, bytes)) return note(cudaErrorInvalidValue);
  std::memset(p, value, bytes);
  vlm::emu::mark_written(p, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!vlm::emu::is_global(to, bytes) || !vlm::emu::is_global(from, bytes)) {
    return note(cudaErrorInvalidValue);
  }
  std::memmove(to, from, bytes);
  vlm::emu::mark_written(to, bytes);
  return cudaSuccess;
}

cudaError_t vlm_emu_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > vlm::emu::kDynamicSharedLimit) {
    return note(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(g_lock);
  g_shared_limit[kernel] = value;
  return cudaSuccess;
}

cudaError_t vlm_emu_occupancy(int* blocks, const void* kernel, int threads, size_t smem_bytes) {
  if (threads <= 0 || threads > vlm::emu::kMaxLanes || smem_bytes > shared_limit(kernel)) {
    return note(cudaErrorInvalidValue);
  }
  *blocks = 1;
  return cudaSuccess;
}

namespace vlm::cuda {

const char* emulated_launch(const emu::Launch& launch) {
  const auto [x, y, z] = launch.block;
  const uint64_t threads = uint64_t{x} * y * z;
  if (threads == 0 || threads > emu::kMaxLanes || z > 64 || launch.grid.y > kMostGridYZ ||
      launch.grid.z > kMostGridYZ) {
    return cudaGetErrorString(cudaErrorInvalidConfiguration);
  }
  if (launch.smem_bytes > shared_limit(launch.kernel)) {
    return cudaGetErrorString(cudaErrorInvalidValue);
  }
  return emu::run(launch);
}

}  // namespace vlm::cuda
