// Similarity tiles by mma.sync with their epilogue in the same launch: S never leaves the SM.
#pragma once

#include "cuda/contrastive_tile.cuh"

namespace vlm::cuda {

// Rows of the two operands at a block's first row and column; strides in elements.
struct FusedOperands {
  const void* image;  // (block.rows, d)
  int64_t image_stride;
  const void* text;  // (block.cols, d)
  int64_t text_stride;
  int64_t d;
};

// 16-bit inputs whose rows begin at 16-byte boundaries, as cp.async wants them.
inline bool can_fuse(const ContrastiveCall& call) {
  const auto aligned = [](const MatrixRef& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.stride % 8 == 0 || x.rows == 1);
  };
  return call.dtype != DType::f32 && aligned(call.image) && aligned(call.text);
}

// Shows every tile of the block to `epilogue`. T is the dtype of the operands, __nv_bfloat16 or
// __half; instances: both for each epilogue that can meet them.
template <class T, class Epilogue>
const char* launch_fused(const FusedOperands& operands, const Block& block,
                         const Epilogue& epilogue, cudaStream_t stream);

}  // namespace vlm::cuda
