// What the CUDA runtime sees of this machine. Safe to call without a GPU and without a driver.
#pragma once

#include <cstddef>

namespace vlm::cuda {

// Both return nullptr, or why CUDA cannot be used.
const char* device_count(int* count);
// Writes such as "NVIDIA H200, sm_90, 132 SMs, 139.8 GiB", cut to `size` bytes.
const char* device_description(int device, char* text, size_t size);

}  // namespace vlm::cuda
