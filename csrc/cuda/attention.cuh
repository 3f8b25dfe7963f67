// What the kernels of attention share: the problem as they take it, which keys a query sees, the
// logits, and tiles of rows in shared memory with the fragments that mma.sync takes from them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#include "vlm/attention.h"

namespace vlm::cuda {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kTileRows = 64;  // queries, or keys, of a tile of the kernels for long rows

constexpr __host__ __device__ int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}
constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

// ---------------------------------------------------------------------------------------------
// The problem.

// Up to kTileRows rows of one segment, on one side, and the rows of the other side that belong to
// the segment. The place of query i among the keys is i + shift. Unused tiles have count 0.
struct PackedTile {
  int first, count;
  int begin, end;
  int shift;
};

// By value to every kernel. Queries and keys are as the products take them: where a row is to be
// normalised or rotated, the copies that prepare_rows made (attention_rows.cu).
struct Problem {
  HeadsRef query, key, value;
  int batch, heads, group;  // query head h reads key head h / group
  int queries, keys;
  int head_dim, value_dim;
  int window_left, window_right;  // never below 0; kNoLimit
  const int32_t* range;           // (batch or 1, heads or 1, queries, 2), or null
  int64_t range_batch_stride, range_head_stride;
  const PackedTile* query_tiles;  // (packed_tiles(..)), or null: not packed
  const PackedTile* key_tiles;
  int query_tile_count, key_tile_count;  // of kTileRows rows each
  float scale, softcap;
  AttentionMask mask;

  static constexpr int kNoLimit = 1 << 30;
  bool packed() const { return query_tiles != nullptr; }
};

// Normalisation and rotation of one side's rows: row r takes row r + shift of the tables, clamped
// to those there are.
struct RowTransform {
  HeadNorm norm;
  Rope rope;
  int table_rows = 0;
  int shift = 0;  // not of packed queries, whose tiles have their own
  __host__ __device__ bool any() const {
    return norm.kind != HeadNorm::none || rope.cos != nullptr;
  }
};

struct ForwardOut {
  MutableHeadsRef out;
  float* lse;  // (batch, heads, queries), natural logarithm
};

struct BackwardArgs {
  HeadsRef grad, out;
  const float* grad_lse;  // (batch, heads, queries), or null
  const float* lse;
  // Of the queries and keys as Problem has them; data == nullptr: not needed.
  MutableHeadsRef grad_query, grad_key, grad_value;
};

// A tile of rows and what of the other side it may meet.
struct TileRows {
  int first, count;
  int begin, end;
  int shift;
};

// `tile` counts over the grid; the other side has `others` rows where the call is not packed.
__device__ __forceinline__ TileRows tile_rows(const PackedTile* packed, int tile, int rows,
                                              int others) {
  if (packed) {
    const PackedTile t = packed[tile];
    return {t.first, t.count, t.begin, t.end, t.shift};
  }
  const int first = tile * kTileRows;
  return {first, min(kTileRows, rows - first), 0, others, 0};
}

struct Interval {
  int begin, end;
  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool has(int j) const { return begin <= j && j < end; }
};

// The keys that query `row` of a head sees, of [begin, end) and around row + shift. Empty: begin ==
// end.
__device__ __forceinline__ Interval seen_keys(const Problem& p, int batch, int head, int row,
                                              int begin, int end, int shift) {
  const int place = row + shift;
  begin = max(begin, place - p.window_left);
  end = min(end, place + p.window_right + 1);
  if (p.range) {
    const int32_t* range = p.range + batch * p.range_batch_stride + head * p.range_head_stride;
    const int2 given = reinterpret_cast<const int2*>(range)[row];
    begin = max(begin, given.x);
    end = min(end, given.y);
  }
  return {begin, max(begin, end)};
}

// ---------------------------------------------------------------------------------------------
// Logits.

// tanh(x), relative error 1e-6 away from 0, absolute 1e-7 near it.
__device__ __forceinline__ float tanh_approx(float x) {
  return 1.f - __fdividef(2.f, 1.f + ptx::exp2_approx(2.f * kLog2e * x));
}

// From the product of a query and a key to its logit, in units of log2, before the mask.
struct Logit {
  float scale, cap, inverse_cap;

  __host__ __device__ __forceinline__ explicit Logit(const Problem& p)
      : scale(p.softcap > 0.f ? p.scale : p.scale * kLog2e),
        cap(p.softcap * kLog2e),
        inverse_cap(p.softcap > 0.f ? 1.f / p.softcap : 0.f) {}

  __device__ __forceinline__ bool capped() const { return inverse_cap != 0.f; }
  __device__ __forceinline__ float operator()(float product) const {
    if (!capped()) return product * scale;
    return cap * tanh_approx(product * scale * inverse_cap);
  }
  // dLogit / dProduct over the scale p.scale (natural units), given the logit without mask.
  __device__ __forceinline__ float slope(float logit) const {
    if (!capped()) return 1.f;
    const float t = __fdividef(logit, cap);
    return 1.f - t * t;
  }
};

// From natural units to those of log2. A number stays one: the lowest drowns the logit that it is
// added to, but does not hide the key, as -inf does.
__device__ __forceinline__ float bias_log2(float bias) {
  constexpr float kLowest = -3.402823466e38f;
  const float x = kLog2e * bias;
  return x == -kInfinity && bias != -kInfinity ? kLowest : x;
}

// What the mask adds to a logit, in units of log2; -inf where a query does not see a key.
__device__ __forceinline__ float masked(const AttentionMask& mask, int batch, int head, int row,
                                        int key) {
  const int64_t at =
      batch * mask.batch_stride + head * mask.head_stride + row * mask.row_stride + key;
  if (mask.kind == AttentionMask::boolean) {
    return static_cast<const bool*>(mask.data)[at] ? 0.f : -kInfinity;
  }
  if (mask.dtype == DType::f32) return bias_log2(static_cast<const float*>(mask.data)[at]);
  if (mask.dtype == DType::bf16) {
    return bias_log2(static_cast<float>(static_cast<const __nv_bfloat16*>(mask.data)[at]));
  }
  return bias_log2(static_cast<float>(static_cast<const __half*>(mask.data)[at]));
}

// The row of a head in a tensor of rows of heads.
template <class T>
__device__ __forceinline__ const T* head_rows(const HeadsRef& x, int batch, int head, int row) {
  return static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         row * x.row_stride;
}

template <class T>
__device__ __forceinline__ T* head_rows(const MutableHeadsRef& x, int batch, int head, int row) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         row * x.row_stride;
}

// ---------------------------------------------------------------------------------------------
// Rows in shared memory: `ld` elements apart, an odd number of 16-byte chunks, so that the eight
// rows of an ldmatrix meet all banks.

constexpr __host__ __device__ int shared_ld(int features) {
  return static_cast<int>(round_up(features, 16)) + 8;
}

// Starts copies of rows [0, rows) of `features` features; rows up to `all_rows` and features up to
// the next multiple of 16 become zero. `from` and `stride` are multiples of 8 elements, and so is
// `features`. By all `threads`, of which this is `thread`; the caller commits, waits and meets.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int rows,
                                          int all_rows, int features, int thread, int threads) {
  const int ld = shared_ld(features), chunks = (ld - 8) / 8;
  for (int i = thread; i < all_rows * chunks; i += threads) {
    const int r = i / chunks, c = i % chunks * 8;
    const bool inside = r < rows && c < features;
    ptx::cp_async_16(to + r * ld + c, inside ? from + r * stride + c : from, inside ? 16 : 0);
  }
}

// A: 16 rows from `rows`, features k to k + 16.
template <class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* rows, int ld, int k) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix<4>(a, rows + lane % 16 * ld + k + lane / 16 * 8);
}

// B of X Y^T: 16 rows of Y from `rows`, which are columns of the product, features k to k + 16.
// b[0], b[1]: the first 8 of them; b[2], b[3]: the others.
template <class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* rows, int ld, int k) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix<4>(b, rows + (lane % 8 + lane / 16 * 8) * ld + k + lane / 8 % 2 * 8);
}

// B of P Y: 16 rows of Y from `rows`, which are summed over, features n to n + 16, which are
// columns of the product. As load_b.
template <class T>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], const T* rows, int ld, int n) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_trans<4>(b, rows + lane % 16 * ld + n + lane / 16 * 8);
}

// d[0] += a b[0..1], d[1] += a b[2..3]: 16 columns.
template <class T>
__device__ __forceinline__ void mma_16(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4]) {
  const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  ptx::mma<T>(d0, a, low);
  ptx::mma<T>(d1, a, high);
}

// A of a product, from 16 columns of the accumulators of another.
template <class T>
__device__ __forceinline__ void as_a(uint32_t (&a)[4], const float (&d0)[4], const float (&d1)[4]) {
  a[0] = ptx::pack<T>(d0[0], d0[1]);
  a[1] = ptx::pack<T>(d0[2], d0[3]);
  a[2] = ptx::pack<T>(d1[0], d1[1]);
  a[3] = ptx::pack<T>(d1[2], d1[3]);
}

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---------------------------------------------------------------------------------------------
// The kernels, file by file; each function returns nullptr, or why a kernel did not start.

// attention_packed.cu
constexpr int packed_tiles(int64_t rows, int64_t segments) {
  return static_cast<int>(ceil_div(rows, kTileRows) + segments + 1);
}
// Fills packed_tiles(queries, segments) tiles of queries and as many as that of the keys (null:
// none). Rows in no segment come in tiles that meet nothing.
const char* find_packed_tiles(const AttentionCall& call, PackedTile* query_tiles,
                              PackedTile* key_tiles);

// attention_rows.cu
// to (batch, heads, rows, dim), contiguous: the rows of `from`, normalised and rotated. `tiles`
// (tile_count) of packed queries, or null.
const char* prepare_rows(const HeadsRef& from, void* to, DType dtype, int batch, int heads,
                         int rows, int dim, const RowTransform& transform, const PackedTile* tiles,
                         int tile_count, cudaStream_t stream);
// Bytes that finish_rows needs for the sums of the norm's gradients.
int64_t finish_rows_scratch_bytes(int batch, int heads, int rows, int dim,
                                  const RowTransform& transform, int tile_count);
// The gradient of the raw rows, `to` (data == nullptr: not needed), from that of the prepared
// ones, (batch, heads, rows, dim), contiguous; and the norm's gradients (null: not needed).
const char* finish_rows(const HeadsRef& from, const void* grad, const MutableHeadsRef& to,
                        DType dtype, int batch, int heads, int rows, int dim,
                        const RowTransform& transform, const PackedTile* tiles, int tile_count,
                        float* weight_grad, float* bias_grad, void* scratch, cudaStream_t stream);

// attention_short_sm80.cu: keys and values of a head stay in shared memory. Not of packed calls.
bool short_takes(const Problem& p);
const char* short_fwd(const Problem& p, DType dtype, const RowTransform& query,
                      const RowTransform& key, const ForwardOut& out, cudaStream_t stream);

// attention_short_bwd_sm80.cu: one launch. Not of packed calls, nor of grouped heads.
bool short_bwd_takes(const Problem& p);
const char* short_bwd(const Problem& p, DType dtype, const BackwardArgs& args, cudaStream_t stream);

// attention_long_sm80.cu: any length; keys split over CTAs where there are too few otherwise.
int64_t long_scratch_bytes(const Problem& p);
const char* long_fwd(const Problem& p, DType dtype, const ForwardOut& out, void* scratch,
                     cudaStream_t stream);

// attention_long_bwd_sm80.cu
int64_t long_bwd_scratch_bytes(const Problem& p, const BackwardArgs& args);
const char* long_bwd(const Problem& p, DType dtype, const BackwardArgs& args, void* scratch,
                     cudaStream_t stream);

// attention_mask_bwd_sm80.cu: the gradient of an additive mask. Not of packed calls.
int64_t mask_bwd_scratch_bytes(const Problem& p, const AttentionGrads& grads);
const char* mask_bwd(const Problem& p, DType dtype, const BackwardArgs& args,
                     const AttentionGrads& grads, void* scratch, cudaStream_t stream);

}  // namespace vlm::cuda
