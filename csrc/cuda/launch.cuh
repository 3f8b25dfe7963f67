// The only home of <<<>>>, and of the dynamic shared memory that a launch sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace vlm::cuda {

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;  // of dynamic shared memory
  cudaStream_t stream = nullptr;
};

// nullptr, or what went wrong. Reading the error also clears it, so that it does not show up in
// somebody else's next check.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// A kernel's dynamic shared memory, aligned to 128 bytes. Always the same address: parts of it are
// offsets of the caller's.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char vlm_dynamic_shared[];
  return reinterpret_cast<T*>(vlm_dynamic_shared);
}

// Starts `kernel` on config.stream, without waiting; an empty grid starts nothing. Returns nullptr,
// or why it did not start.
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  const auto [grid, block, smem_bytes, stream] = config;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (smem_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) return error_text(error);
  }
  kernel<<<grid, block, smem_bytes, stream>>>(static_cast<Params>(args)...);
  return error_text(cudaGetLastError());
}

}  // namespace vlm::cuda
