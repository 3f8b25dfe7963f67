#include "cpu/parallel.h"

#include <stdexcept>

// Exported by libtorch_cpu since torch 2.10 (torch/csrc/stable/c/shim.h): declared here, so that
// the CPU kernels see neither torch headers nor an OpenMP of their own.
extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                           void (*fn)(int64_t, int64_t, void*), void* context);
int32_t torch_get_thread_idx(uint32_t* index);
int32_t torch_get_num_threads(uint32_t* count);
}

namespace vlm {

int num_threads() {
  uint32_t count = 1;
  return torch_get_num_threads(&count) == 0 && count > 0 ? static_cast<int>(count) : 1;
}

int thread_index() {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return static_cast<int>(index);
}

void parallel_ranges(int64_t count, void (*fn)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  if (count == 1) return fn(0, 1, context);  // saves the pool's wake-up
  if (torch_parallel_for(0, count, 1, fn, context) != 0) {
    throw std::runtime_error("vlm_kernels: a parallel CPU kernel failed; see the message above");
  }
}

}  // namespace vlm
