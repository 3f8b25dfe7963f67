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

void on_threads(int64_t count, void (*fn)(void*), void* context) {
  if (count <= 0) return;
  if (count == 1) return fn(context);  // saves the pool's wake-up
  struct Call {
    void (*fn)(void*);
    void* context;
  } call{fn, context};
  // A range may hold several of the indices; the first empties the queue.
  const auto run = [](int64_t, int64_t, void* c) {
    static_cast<Call*>(c)->fn(static_cast<Call*>(c)->context);
  };
  const int64_t threads = num_threads();
  if (torch_parallel_for(0, count < threads ? count : threads, 1, run, &call) != 0) {
    throw std::runtime_error("vlm_kernels: a parallel CPU kernel failed; see the message above");
  }
}

}  // namespace vlm
