// Shadows csrc/cuda/launch.cuh: a launch runs the kernel to its end before it returns, and what it
// returns is what the emulator found.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>

namespace vlm::cuda {

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class T>
VLM_EMU_INLINE T* dynamic_shared() {
  return static_cast<T*>(emu::dynamic_shared());
}

const char* emulated_launch(const emu::Launch& launch);

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
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> args;
  } call{kernel, {static_cast<Params>(args)...}};
  const auto enter = [](void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.args);
  };
  return emulated_launch({.kernel = reinterpret_cast<const void*>(kernel),
                          .grid = {grid.x, grid.y, grid.z},
                          .block = {block.x, block.y, block.z},
                          .smem_bytes = smem_bytes,
                          .enter = enter,
                          .call = &call,
                          .call_bytes = sizeof(call)});
}

}  // namespace vlm::cuda
