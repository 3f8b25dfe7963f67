// The CUDA side of the ops, without a CUDA header or library of torch: everything here compiles,
// links and loads with a CPU-only torch as well.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

// From libtorch_cuda; null where there is none.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace vlm {

// torch's current stream on the device of `x`; null for a CPU tensor, whose kernels are emulated.
inline void* current_stream(const at::Tensor& x) {
  if (x.is_cpu()) return nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
              "vlm_kernels: a CUDA tensor came, but this torch has no CUDA stream to offer "
              "(aoti_torch_get_current_cuda_stream is missing from the process)");
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.device().index(), &stream) == 0,
              "vlm_kernels: torch did not say what the current CUDA stream of ", x.device(), " is");
  return stream;
}

inline void check_launched(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": a CUDA kernel did not start: ", error);
}

}  // namespace vlm
