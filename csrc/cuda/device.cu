#include <cuda_runtime.h>

#include <cstdio>

#include "vlm/device.h"

namespace vlm::cuda {
namespace {

// Reading the error also clears it, so that it does not show up in somebody else's next check.
const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

const char* device_count(int* count) {
  *count = 0;
  return text_of(cudaGetDeviceCount(count));
}

const char* device_description(int device, char* text, size_t size) {
  cudaDeviceProp prop;
  if (const char* error = text_of(cudaGetDeviceProperties(&prop, device))) return error;
  std::snprintf(text, size, "%s, sm_%d%d, %d SMs, %.1f GiB", prop.name, prop.major, prop.minor,
                prop.multiProcessorCount, static_cast<double>(prop.totalGlobalMem) / (1 << 30));
  return nullptr;
}

}  // namespace vlm::cuda
