#include "ops/gemm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>

namespace vlm {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return at::kBFloat16;
    case DType::f16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

at::Tensor view(const void* data, int64_t rows, int64_t cols, int64_t ld, DType dtype,
                c10::Device device) {
  const auto options = at::TensorOptions().dtype(scalar_type(dtype)).device(device);
  // naming the device saves asking the driver whose the pointer is
  return at::for_blob(const_cast<void*>(data), {rows, cols})
      .strides({ld, 1})
      .options(options)
      .target_device(device)
      .make_tensor();
}

// op(x), of 16 bits and on a CPU as fp32: its mm has no fp32 result of 16-bit operands.
at::Tensor operand(const void* data, bool transposed, int64_t rows, int64_t cols, int64_t ld,
                   DType dtype, c10::Device device) {
  at::Tensor x = transposed ? view(data, cols, rows, ld, dtype, device).t()
                            : view(data, rows, cols, ld, dtype, device);
  return device.is_cpu() && dtype != DType::f32 ? x.to(at::kFloat) : x;
}

// Whether this torch adds 16-bit products to an fp32 matrix; found out by trying.
std::atomic<bool> adds_to_f32{true};

void add_16_bit_product(at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  if (adds_to_f32) {
    try {
      at::addmm_out(c, c, a, b, at::kFloat);
      return;
    } catch (const c10::Error&) {  // refused by its checks, before any work
      adds_to_f32 = false;
    }
  }
  c.add_(at::mm(a, b, at::kFloat));
}

void run(void* context, const GemmCall& g) {
  const c10::Device device = *static_cast<const c10::Device*>(context);
  // Autocast would round fp32 operands.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor a = operand(g.a, g.transpose_a, g.m, g.k, g.lda, g.dtype, device);
  const at::Tensor b = operand(g.b, g.transpose_b, g.k, g.n, g.ldb, g.dtype, device);
  at::Tensor c = view(g.c, g.m, g.n, g.ldc, DType::f32, device);
  if (a.scalar_type() == at::kFloat) {
    g.accumulate ? at::addmm_out(c, c, a, b) : at::mm_out(c, a, b);
  } else if (g.accumulate) {
    add_16_bit_product(c, a, b);
  } else {
    at::mm_out(c, a, b, at::kFloat);
  }
}

}  // namespace

Gemm torch_gemm(const c10::Device* device) { return {run, const_cast<c10::Device*>(device)}; }

}  // namespace vlm
