// The gradients of attention_fwd: one node at its Autograd key, which eager calls, torch.compile,
// torch.export and checkpointing all go through.
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "ops/attention.h"
#include "ops/autograd.h"
#include "ops/bind.h"

namespace vlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Every argument that has no gradient.
struct Options {
  const OptionalTensor &kv_range, &cu_seqlens_q, &cu_seqlens_k;
  bool is_causal;
  int64_t window_left, window_right;
  std::optional<double> scale;
  double softcap;
  const OptionalTensor &rope_cos, &rope_sin;
  bool rope_interleaved;
  double q_eps;
  bool q_layer;
  double k_eps;
  bool k_layer;
};

// What comes back in the backward. The first kAttentionGrads have gradients, in the order of
// AttentionNeed.
enum Saved {
  kQuery,
  kKey,
  kValue,
  kMask,
  kQWeight,
  kQBias,
  kKWeight,
  kKBias,
  kRange,
  kSeqlensQ,
  kSeqlensK,
  kCos,
  kSin,
  kOut,
  kLse
};
enum Number { kScale, kSoftcap, kQEps, kKEps };
enum Integer { kCausal, kLeft, kRight, kHasScale, kInterleaved, kQLayer, kKLayer };

struct AttentionFn : Function<AttentionFn> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& mask,
                               const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                               const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                               const Options& o) {
    static const auto op = op_handle<AttentionFwd>("attention_fwd");
    const BelowAutograd guard;
    const auto [out, lse] =
        op.call(query, key, value, mask, o.kv_range, o.cu_seqlens_q, o.cu_seqlens_k, o.is_causal,
                o.window_left, o.window_right, o.scale, o.softcap, o.rope_cos, o.rope_sin,
                o.rope_interleaved, q_weight, q_bias, o.q_eps, o.q_layer, k_weight, k_bias, o.k_eps,
                o.k_layer);
    ctx->save_for_backward({query, key, value, or_undefined(mask), or_undefined(q_weight),
                            or_undefined(q_bias), or_undefined(k_weight), or_undefined(k_bias),
                            or_undefined(o.kv_range), or_undefined(o.cu_seqlens_q),
                            or_undefined(o.cu_seqlens_k), or_undefined(o.rope_cos),
                            or_undefined(o.rope_sin), out, lse});
    ctx->saved_data["numbers"] =
        std::vector<double>{o.scale.value_or(0.0), o.softcap, o.q_eps, o.k_eps};
    ctx->saved_data["integers"] =
        std::vector<int64_t>{o.is_causal,        o.window_left, o.window_right, o.scale.has_value(),
                             o.rope_interleaved, o.q_layer,     o.k_layer};
    ctx->set_materialize_grads(false);  // few use lse, and a gradient of zeros would cost a tensor
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto op = op_handle<AttentionBwd>("attention_bwd");
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads(kAttentionGrads + 1);  // one for the options
    int64_t needs = 0;
    size_t edge = 0;
    for (int i = 0; i < kAttentionGrads; ++i) {
      if (!saved[i].defined()) continue;  // no tensor, no edge
      if (ctx->needs_input_grad(edge++)) needs |= int64_t{1} << i;
    }
    if (needs == 0 || (!grad[0].defined() && !grad[1].defined())) return grads;
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const auto integers = ctx->saved_data["integers"].toIntVector();
    const std::optional<double> scale =
        integers[kHasScale] ? std::optional<double>(numbers[kScale]) : std::nullopt;
    const bool packed = saved[kSeqlensQ].defined();
    {
      const BelowAutograd guard;
      std::tie(grads[kQuery], grads[kKey], grads[kValue], grads[kMask], grads[kQWeight],
               grads[kQBias], grads[kKWeight], grads[kKBias]) =
          op.call(grad[0].defined() ? grad[0] : at::zeros_like(saved[kOut]), or_none(grad[1]),
                  saved[kQuery], saved[kKey], saved[kValue], or_none(saved[kMask]),
                  or_none(saved[kRange]), or_none(saved[kSeqlensQ]), or_none(saved[kSeqlensK]),
                  integers[kCausal], integers[kLeft], integers[kRight], scale, numbers[kSoftcap],
                  or_none(saved[kCos]), or_none(saved[kSin]), integers[kInterleaved],
                  or_none(saved[kQWeight]), or_none(saved[kQBias]), numbers[kQEps],
                  integers[kQLayer], or_none(saved[kKWeight]), or_none(saved[kKBias]),
                  numbers[kKEps], integers[kKLayer], saved[kOut], saved[kLse], needs);
    }
    for (int i = 0; i < kAttentionGrads; ++i) {
      if (!(needs >> i & 1)) grads[i] = Tensor();
    }
    return once_differentiable(std::move(grads), saved, packed ? "attention_varlen" : "attention");
  }
};

AttentionFwdResult attention_fwd(VLM_ATTENTION_PARAMS) {
  static const auto op = op_handle<AttentionFwd>("attention_fwd");
  const Tensor* const given[kAttentionGrads] = {&query,
                                                &key,
                                                &value,
                                                mask ? &*mask : nullptr,
                                                q_weight ? &*q_weight : nullptr,
                                                q_bias ? &*q_bias : nullptr,
                                                k_weight ? &*k_weight : nullptr,
                                                k_bias ? &*k_bias : nullptr};
  bool needed = false;
  for (const Tensor* x : given) {
    if (!x) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(
        !x->_fw_grad(0).defined(), cu_seqlens_q ? "attention_varlen" : "attention",
        " has no forward-mode derivative (jvp, jacfwd); use reverse mode, backward() or "
        "torch.autograd.grad, or backend='reference'");
    needed = needed || x->requires_grad();
  }
  if (!needed || !c10::GradMode::is_enabled()) {
    const BelowAutograd guard;
    return op.call(VLM_ATTENTION_ARGS);
  }
  refuse_transforms(cu_seqlens_q ? "attention_varlen" : "attention");
  const Options options{kv_range,         cu_seqlens_q, cu_seqlens_k, is_causal, window_left,
                        window_right,     scale,        softcap,      rope_cos,  rope_sin,
                        rope_interleaved, q_eps,        q_layer,      k_eps,     k_layer};
  const variable_list results =
      AttentionFn::apply(query, key, value, mask, q_weight, q_bias, k_weight, k_bias, options);
  return {results[0], results[1]};
}

TORCH_LIBRARY_IMPL(VLM_LIBRARY, Autograd, m) { m.impl("attention_fwd", attention_fwd); }

}  // namespace
}  // namespace vlm
