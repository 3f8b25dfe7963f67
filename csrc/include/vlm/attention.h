// Softmax attention that never holds the queries x keys matrix (FlashAttention, Dao et al. 2022),
// for the shapes of vision-language models. Torch-free: pointers, strides, sizes, scratch.
//
// out = softmax(scale * Q K^T + mask) V for each head, over the keys that a query may see. A query
// that sees none has out = 0, lse = -inf and adds nothing to any gradient.
#pragma once

#include "vlm/types.h"

namespace vlm {

// Rows of heads: feature d of (batch, head, row) lies at
// data[batch * batch_stride + head * head_stride + row * row_stride + d], in elements.
struct HeadsRef {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct MutableHeadsRef {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// One attention problem: an entry of a batch, or a packed image or sequence (batch 0), with at
// least one query and one key. Its queries see its own keys only.
struct AttentionSegment {
  int64_t batch = 0;
  int64_t query_begin = 0, key_begin = 0;  // its first rows
  int64_t queries = 0, keys = 0;
  // (queries, 2): the half-open range of the segment's keys that each query sees, with
  // 0 <= begin <= end <= keys; null: all of them. Head h reads range + h * range_head_stride.
  const int32_t* range = nullptr;
};

// What is added to the scaled product (additive), or which keys a query sees (boolean, one byte an
// entry). Entry (batch, head, query, key) lies at the strides' sum + key; a stride of 0 broadcasts.
struct AttentionMask {
  enum Kind { none, boolean, additive } kind = none;
  const void* data = nullptr;
  DType dtype = DType::f32;  // of an additive one
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// Rotary position embedding (RoFormer, Su et al. 2021) of the first 2 * half features of queries
// and keys. Key j of a segment takes row key_begin + j, query i row key_begin + i + keys - queries.
struct Rope {
  const float* cos = nullptr;  // (batch, rows, half), contiguous rows; null: none
  const float* sin = nullptr;
  int64_t half = 0, batch_stride = 0;  // of cos and sin alike; 0: batches share it
  bool interleaved = false;            // pairs (2 i, 2 i + 1) instead of (i, i + half)
};

// Normalisation of each head's row of D features, before the rotation.
struct HeadNorm {
  enum Kind { none, rms, layer } kind = none;
  const float* weight = nullptr;  // (D), or (heads, D)
  const float* bias = nullptr;    // likewise, or null
  int64_t head_stride = 0;        // of both: 0 or D
  float eps = 0.f;
};

struct AttentionInputs {
  HeadsRef query;  // (batch, heads, queries, head_dim)
  HeadsRef key;    // (batch, kv_heads, keys, head_dim)
  HeadsRef value;  // (batch, kv_heads, keys, value_dim)
  DType dtype = DType::f32;
  int64_t heads = 0, kv_heads = 0;  // query head h reads key head h / (heads / kv_heads)
  int64_t head_dim = 0, value_dim = 0;
  const AttentionSegment* segments = nullptr;
  int64_t segment_count = 0;
  int64_t range_head_stride = 0;                      // in int32; 0: heads share a range
  int64_t lse_batch_stride = 0, lse_head_stride = 0;  // of lse (batch, heads, queries), in floats
  float scale = 1.f;
  float softcap = 0.f;  // s -> softcap * tanh(s / softcap), before the mask; 0: none
  AttentionMask mask;
  Rope rope;
  HeadNorm query_norm, key_norm;
};

// Gradients; data == nullptr: not needed. query, key and value come in the dtype of the inputs, the
// rest in fp32, zeroed by the caller: kernels add to them.
struct AttentionGrads {
  MutableHeadsRef query, key, value;
  // Sum over what the mask broadcasts, at these strides.
  float* mask = nullptr;
  int64_t mask_batch_stride = 0, mask_head_stride = 0, mask_row_stride = 0;
  float* query_norm_weight = nullptr;  // as HeadNorm::weight
  float* query_norm_bias = nullptr;
  float* key_norm_weight = nullptr;
  float* key_norm_bias = nullptr;
};

namespace cpu {

// Bytes of scratch of a forward, and of a backward that forms `grads`.
int64_t attention_scratch_bytes(const AttentionInputs& in);
int64_t attention_bwd_scratch_bytes(const AttentionInputs& in, const AttentionGrads& grads);

// out (batch, heads, queries, value_dim) and lse (natural logarithm), which may be null. Rows that
// belong to no segment are not written.
void attention_fwd(const AttentionInputs& in, const MutableHeadsRef& out, float* lse,
                   void* scratch);

// `grad` is that of `out`, grad_lse that of lse, or null.
void attention_bwd(const AttentionInputs& in, const HeadsRef& grad, const float* grad_lse,
                   const HeadsRef& out, const float* lse, const AttentionGrads& grads,
                   void* scratch);

}  // namespace cpu

namespace cuda {

// Who runs a call that several kernels could: by shape, or one of them wherever it can.
enum class AttentionKernels { automatic, short_rows, long_rows };

// A call on the device: every pointer is one of the device, and no function below waits for it or
// reads from it. 16-bit inputs, head dims that are multiples of 8 up to 128, rows that begin at
// multiples of 16 bytes. `in.segments` is not read: a batch is `batch` problems of `queries` x
// `keys`, a packed call is one of them all (batch 1), cut by the offsets below. Offsets and ranges
// may hold anything: they are clamped.
struct AttentionCall {
  AttentionInputs in;
  int64_t batch = 0, queries = 0, keys = 0;
  // The keys that query i sees: around key i, or where packed around key i + nk - nq of its
  // segment; -1: no limit. Causal: window_right = 0.
  int64_t window_left = -1, window_right = -1;
  const int32_t* range = nullptr;          // (batch or 1, heads or 1, queries, 2), or null
  int64_t range_batch_stride = 0;          // in int32, as in.range_head_stride
  const int32_t* query_offsets = nullptr;  // (segments + 1,), or null: not packed
  const int32_t* key_offsets = nullptr;
  int64_t segments = 0;
  AttentionKernels kernels = AttentionKernels::automatic;
  void* stream = nullptr;
};

// Bytes of scratch of a forward, and of a backward that forms `grads`.
int64_t attention_scratch_bytes(const AttentionCall& call);
int64_t attention_bwd_scratch_bytes(const AttentionCall& call, const AttentionGrads& grads);

// As the functions of namespace cpu, but that lse is written always, and that every row of the
// outputs is. Each returns nullptr, or why a kernel did not start.
const char* attention_fwd(const AttentionCall& call, const MutableHeadsRef& out, float* lse,
                          void* scratch);
const char* attention_bwd(const AttentionCall& call, const HeadsRef& grad, const float* grad_lse,
                          const HeadsRef& out, const float* lse, const AttentionGrads& grads,
                          void* scratch);

}  // namespace cuda
}  // namespace vlm
