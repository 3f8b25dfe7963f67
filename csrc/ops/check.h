// Argument checks of the ops: each says what came, what was expected and how to mend it. And the
// form in which kernels take tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

#include "vlm/types.h"

namespace vlm {

inline DType feature_dtype(const char* op, const char* name, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " is ", x.scalar_type(),
                       ", expected float32, bfloat16 or float16; convert it with .to(dtype)");
  }
}

inline void check_dim(const char* op, const char* name, const at::Tensor& x, int64_t dim,
                      const char* layout) {
  TORCH_CHECK_VALUE(x.dim() == dim, op, ": ", name, " has shape ", x.sizes(), ", expected ", dim,
                    " dimensions ", layout);
}

inline void check_length(const char* op, const char* name, const at::Tensor& x, int64_t length,
                         const char* of) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == length, op, ": ", name, " has shape ", x.sizes(),
                    ", expected (", length, ",), one entry for each row of ", of);
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& x,
                              const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.device() == other.device(), op, ": ", name, " is on ", x.device(),
                    " but the features are on ", other.device(), "; move it there with .to()");
}

// A one-element floating-point tensor of shape () or (1,).
inline void check_scalar(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op, ": ", name, " is ", x.scalar_type(),
                   ", expected a floating-point tensor or a Python float");
  TORCH_CHECK_VALUE(x.numel() == 1 && x.dim() <= 1, op, ": ", name, " has shape ", x.sizes(),
                    ", expected one value of shape () or (1,)");
}

// What the kernels take: any strides, but the last.
inline at::Tensor rows_contiguous(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

}  // namespace vlm
