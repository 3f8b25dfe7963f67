// What the torch side of attention and its autograd node share: the registered ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace vlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bits of `needs`: the gradients that a backward is to form, in the order it returns them.
enum AttentionNeed : int64_t {
  kNeedQuery = 1,
  kNeedKey = 2,
  kNeedValue = 4,
  kNeedMask = 8,
  kNeedQueryWeight = 16,
  kNeedQueryBias = 32,
  kNeedKeyWeight = 64,
  kNeedKeyBias = 128,
};
constexpr int kAttentionGrads = 8;

// The arguments of a forward, in the order of its schema, as parameters and as arguments.
#define VLM_ATTENTION_PARAMS                                                                    \
  const Tensor &query, const Tensor &key, const Tensor &value, const OptionalTensor &mask,      \
      const OptionalTensor &kv_range, const OptionalTensor &cu_seqlens_q,                       \
      const OptionalTensor &cu_seqlens_k, bool is_causal, int64_t window_left,                  \
      int64_t window_right, std::optional<double> scale, double softcap,                        \
      const OptionalTensor &rope_cos, const OptionalTensor &rope_sin, bool rope_interleaved,    \
      const OptionalTensor &q_weight, const OptionalTensor &q_bias, double q_eps, bool q_layer, \
      const OptionalTensor &k_weight, const OptionalTensor &k_bias, double k_eps, bool k_layer
#define VLM_ATTENTION_ARGS                                                                         \
  query, key, value, mask, kv_range, cu_seqlens_q, cu_seqlens_k, is_causal, window_left,           \
      window_right, scale, softcap, rope_cos, rope_sin, rope_interleaved, q_weight, q_bias, q_eps, \
      q_layer, k_weight, k_bias, k_eps, k_layer

using AttentionFwdResult = std::tuple<Tensor, Tensor>;
using AttentionBwdResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using AttentionFwd = AttentionFwdResult(VLM_ATTENTION_PARAMS);
using AttentionBwd = AttentionBwdResult(const Tensor& grad, const OptionalTensor& grad_lse,
                                        VLM_ATTENTION_PARAMS, const Tensor& out, const Tensor& lse,
                                        int64_t needs);

}  // namespace vlm
