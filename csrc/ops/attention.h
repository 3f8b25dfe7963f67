// What the torch side of attention shares: the registered ops, and a call as kernels take it.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "vlm/attention.h"

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

struct AttentionNorm {
  const char* name;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  bool layer;
};

// The arguments of a call, dense (B, H, N, D) or packed (T, H, D).
struct AttentionArgs {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& kv_range;
  const OptionalTensor& cu_seqlens_q;
  const OptionalTensor& cu_seqlens_k;
  bool is_causal;
  int64_t window_left, window_right;
  std::optional<double> scale;
  double softcap;
  const OptionalTensor& rope_cos;
  const OptionalTensor& rope_sin;
  bool rope_interleaved;
  AttentionNorm q_norm, k_norm;

  explicit AttentionArgs(VLM_ATTENTION_PARAMS)
      : query(query),
        key(key),
        value(value),
        mask(mask),
        kv_range(kv_range),
        cu_seqlens_q(cu_seqlens_q),
        cu_seqlens_k(cu_seqlens_k),
        is_causal(is_causal),
        window_left(window_left),
        window_right(window_right),
        scale(scale),
        softcap(softcap),
        rope_cos(rope_cos),
        rope_sin(rope_sin),
        rope_interleaved(rope_interleaved),
        q_norm{"q_norm", q_weight, q_bias, q_eps, q_layer},
        k_norm{"k_norm", k_weight, k_bias, k_eps, k_layer} {}

  bool packed() const { return cu_seqlens_q || cu_seqlens_k; }
  const char* op() const { return packed() ? "attention_varlen" : "attention"; }
  int64_t rows_dim() const { return packed() ? 0 : 2; }
  int64_t batch() const { return packed() ? 1 : query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t kv_heads() const { return key.size(1); }
  int64_t queries() const { return query.size(rows_dim()); }
  int64_t keys() const { return key.size(rows_dim()); }
  int64_t head_dim() const { return query.size(-1); }
  int64_t value_dim() const { return value.size(-1); }
};

// Which CUDA kernels run calls that several could; set_attention_kernels() chooses.
inline std::atomic<cuda::AttentionKernels> attention_kernels{cuda::AttentionKernels::automatic};

void check(const AttentionArgs& a);
void check_saved(const AttentionArgs& a, const Tensor& grad, const OptionalTensor& grad_lse,
                 const Tensor& out, const Tensor& lse);

// The operands of a call and the memory they point to, but for which keys a query sees.
struct AttentionOperands {
  AttentionInputs in;

  // `readable` gives query, key and value in a form that the kernels can read.
  AttentionOperands(const AttentionArgs& a, Tensor (*readable)(const Tensor&));
  AttentionOperands(const AttentionOperands&) = delete;
  AttentionOperands& operator=(const AttentionOperands&) = delete;

 private:
  void use_mask(const AttentionArgs& a);
  void use_rope(const AttentionArgs& a);

  Tensor query_, key_, value_, mask_, cos_, sin_;
  Tensor norms_[4];  // weight and bias of the queries, then of the keys, fp32
};

HeadsRef heads_of(const Tensor& x);
MutableHeadsRef mutable_heads(const Tensor& x);

// out, in the layout of the queries, and lse (B, H, Nq) or (H, Tq), unwritten
AttentionFwdResult empty_results(const AttentionArgs& a);

// The gradients that `needs` names, unwritten, those in fp32 zero.
class AttentionGradients {
 public:
  AttentionGradients(const AttentionArgs& a, int64_t needs);

  AttentionGrads grads;

  void zero();
  // In the order of AttentionNeed; (0,) where not needed.
  AttentionBwdResult results();

 private:
  const AttentionArgs& a_;
  Tensor query_, key_, value_;
  Tensor f32_[kAttentionGrads - 3];  // of mask, q_norm's weight and bias, k_norm's
};

}  // namespace vlm
