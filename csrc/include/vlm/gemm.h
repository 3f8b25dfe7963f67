// The matrix multiply that a device kernel's host code calls instead of linking a BLAS: csrc/ops
// hands over torch's.
#pragma once

#include "vlm/types.h"

namespace vlm {

// C = op(A) op(B), or C += op(A) op(B). All matrices are row-major with unit column stride.
struct GemmCall {
  bool transpose_a = false;  // a holds op(A)^T, (k, m)
  bool transpose_b = false;  // b holds op(B)^T, (n, k)
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  DType dtype = DType::f32;  // of A and B; sums and C are fp32
  float* c = nullptr;        // (m, n)
  int64_t ldc = 0;
  bool accumulate = false;
};

struct Gemm {
  void (*run)(void* context, const GemmCall& call) = nullptr;  // on the current stream
  void* context = nullptr;

  void operator()(const GemmCall& call) const { run(context, call); }
};

}  // namespace vlm
