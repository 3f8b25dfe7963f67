// Types shared by every op's torch-free API.
#pragma once

#include <cstdint>

namespace vlm {

enum class DType { f32, bf16, f16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A row-major matrix view: unit column stride, any row stride (in elements).
struct MatrixRef {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;
};

struct MutableMatrixRef {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;
};

}  // namespace vlm
