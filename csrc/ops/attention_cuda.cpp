// attention and attention_varlen on CUDA tensors. Nothing here waits for the device or reads from
// it: ranges and offsets stay there, and the kernels clamp what they hold.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "ops/attention.h"
#include "ops/bind.h"
#include "ops/check.h"
#include "ops/device.h"
#include "vlm/attention.h"

namespace vlm {
namespace {

constexpr int64_t kMaxHeadDim = 128;

// What the kernels read: rows that begin at multiples of 16 bytes.
Tensor aligned_rows(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                 (x.stride(-1) == 1 || x.size(-1) == 1);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    aligned = aligned && (x.size(i) <= 1 || x.stride(i) % 8 == 0);
  }
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

void check_kernels(const AttentionArgs& a) {
  TORCH_CHECK_TYPE(a.query.scalar_type() != at::kFloat, a.op(),
                   ": the CUDA kernels take bfloat16 and float16, query is ", a.query.scalar_type(),
                   "; convert it, or pass backend='triton'");
  for (const int64_t d : {a.head_dim(), a.value_dim()}) {
    TORCH_CHECK_VALUE(d <= kMaxHeadDim && d % 8 == 0, a.op(), ": the CUDA kernels take head dims ",
                      "that are multiples of 8 up to ", kMaxHeadDim, ", one is ", d,
                      "; pass backend='triton'");
  }
}

Tensor on_device_i32(const Tensor& x) { return x.to(at::kInt).contiguous(); }

// A call with its inputs readable by the kernels.
struct DeviceCall : AttentionOperands {
  c10::DeviceGuard guard;
  Tensor range, offsets[2];
  cuda::AttentionCall call;

  explicit DeviceCall(const AttentionArgs& a)
      : AttentionOperands(a, aligned_rows), guard(a.query.device()) {
    call.in = in;
    call.batch = a.batch();
    call.queries = a.queries();
    call.keys = a.keys();
    call.window_left = a.window_left;
    call.window_right = a.is_causal && a.window_right != 0 ? 0 : a.window_right;
    if (a.kv_range) {
      range = a.kv_range->contiguous();
      if (reinterpret_cast<uintptr_t>(range.const_data_ptr()) % 8) range = range.clone();
      call.range = range.const_data_ptr<int32_t>();
      call.range_batch_stride = range.size(0) == 1 ? 0 : range.stride(0);
      call.in.range_head_stride = range.size(1) == 1 ? 0 : range.stride(1);
    }
    if (a.packed()) {
      offsets[0] = on_device_i32(*a.cu_seqlens_q);
      offsets[1] = on_device_i32(*a.cu_seqlens_k);
      call.query_offsets = offsets[0].const_data_ptr<int32_t>();
      call.key_offsets = offsets[1].const_data_ptr<int32_t>();
      call.segments = offsets[0].size(0) - 1;
    }
    call.kernels = attention_kernels;
    call.stream = current_stream(a.query);
  }

  bool empty() const { return call.batch == 0 || call.queries == 0 || call.keys == 0; }
};

// At least a byte, since null would ask for the size.
Tensor scratch_of(const AttentionArgs& a, int64_t bytes) {
  return at::empty({std::max<int64_t>(bytes, 1)}, a.query.options().dtype(at::kByte));
}

AttentionFwdResult attention_fwd(VLM_ATTENTION_PARAMS) {
  const AttentionArgs a(VLM_ATTENTION_ARGS);
  check(a);
  check_kernels(a);
  const DeviceCall d(a);

  const auto [out, lse] = empty_results(a);
  if (d.empty()) {
    out.zero_();
    lse.fill_(-std::numeric_limits<float>::infinity());
    return {out, lse};
  }
  const Tensor scratch = scratch_of(a, cuda::attention_scratch_bytes(d.call));
  check_launched(a.op(),
                 cuda::attention_fwd(d.call, mutable_heads(out), lse.mutable_data_ptr<float>(),
                                     scratch.mutable_data_ptr()));
  return {out, lse};
}

AttentionBwdResult attention_bwd(const Tensor& grad, const OptionalTensor& grad_lse,
                                 VLM_ATTENTION_PARAMS, const Tensor& out, const Tensor& lse,
                                 int64_t needs) {
  const AttentionArgs a(VLM_ATTENTION_ARGS);
  check(a);
  check_kernels(a);
  check_saved(a, grad, grad_lse, out, lse);
  const DeviceCall d(a);

  AttentionGradients gradients(a, needs);
  if (d.empty()) {
    gradients.zero();
    return gradients.results();
  }
  const Tensor g = aligned_rows(grad), o = aligned_rows(out), l = lse.contiguous();
  const Tensor gl = grad_lse ? grad_lse->contiguous() : Tensor();
  const AttentionGrads& grads = gradients.grads;
  const Tensor scratch = scratch_of(a, cuda::attention_bwd_scratch_bytes(d.call, grads));
  check_launched(
      a.op(), cuda::attention_bwd(d.call, heads_of(g),
                                  gl.defined() ? gl.const_data_ptr<float>() : nullptr, heads_of(o),
                                  l.const_data_ptr<float>(), grads, scratch.mutable_data_ptr()));
  return gradients.results();
}

TORCH_LIBRARY_IMPL(VLM_LIBRARY, CUDA, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
}

}  // namespace
}  // namespace vlm
