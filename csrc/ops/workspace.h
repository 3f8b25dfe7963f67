// Scratch of the CPU kernels. Large blocks come from torch's allocator and are kept between calls,
// since the first touch of fresh pages costs more than the kernels that use them.
#pragma once

#include <ATen/core/Tensor.h>

namespace vlm {

// An uninitialised CPU tensor; its block goes back to the pool when the tensor dies.
at::Tensor take_workspace(at::IntArrayRef sizes, at::ScalarType dtype);

// Bytes the pool gives back to torch's allocator.
int64_t empty_workspace_pool();

}  // namespace vlm
