#include "ops/workspace.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "ops/ops.h"

namespace vlm {
namespace {

constexpr int64_t kPooledBytes = 1 << 20;  // below, malloc does not map fresh pages each time
constexpr size_t kMaxFree = 2;             // one call needs a kept similarity and a scratch block

class Pool {
 public:
  // The smallest free block that is large enough, or a new one in place of a free one too small.
  at::Tensor take(int64_t bytes) {
    at::Tensor dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->numel() >= bytes && (best == free_.end() || it->numel() < best->numel())) best = it;
      }
      if (best != free_.end()) {
        at::Tensor block = *best;
        free_.erase(best);
        return block;
      }
      if (!free_.empty()) {
        dropped = free_.back();
        free_.pop_back();
      }
    }
    dropped.reset();
    return at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  }

  void give_back(const at::Tensor& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() < kMaxFree) free_.push_back(block);
  }

  int64_t clear() {
    std::vector<at::Tensor> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(free_);
    }
    int64_t bytes = 0;
    for (const auto& block : blocks) bytes += block.numel();
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<at::Tensor> free_;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive static storage
  return *instance;
}

}  // namespace

at::Tensor take_workspace(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  int64_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kPooledBytes) return at::empty(sizes, options);
  at::Tensor block = pool().take(bytes);
  void* data = block.mutable_data_ptr();
  return at::from_blob(data, sizes, [block](void*) { pool().give_back(block); }, options);
}

int64_t empty_workspace_pool() { return pool().clear(); }

void bind_workspace(pybind11::module_& m) {
  m.def("empty_cache", &empty_workspace_pool,
        "Frees the CPU workspace kept between calls; returns its bytes.");
}

}  // namespace vlm
