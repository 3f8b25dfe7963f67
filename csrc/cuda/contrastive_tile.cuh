// A tile of the similarity matrix in the registers of one CTA, and what the losses do with it.
//
// Shared by the kernels that read S from a block in the workspace (contrastive.cu) and those that
// compute it in place (contrastive_fused_sm80.cu): both hand over a pointer to the tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#include "vlm/contrastive.h"

namespace vlm::cuda {

struct TileTraits {
  static constexpr int kRows = 64, kCols = 128, kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWarpRows = kRows / kWarps;  // a warp takes whole rows,
  static constexpr int kLaneCols = kCols / 32;      // a lane adjacent columns of each
};
static_assert(TileTraits::kWarpRows == 8 && TileTraits::kLaneCols == 4);

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e+38f;
constexpr float kInfinity = __builtin_huge_valf();

// exp2(x - shift) of one shift for a whole tile keeps every row and column whose own shift is at
// most this far below it: with 2^-126 as the smallest number, sums still have all their bits, and
// probabilities lose what is below 2^-62.
constexpr float kStatsSpan = 96.f, kGradSpan = 64.f;

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = op(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// Reduces 8 rows over the warp; each lane gets row lane / 4. Lanes halve the rows they carry at
// each step: 9 shuffles instead of 40.
template <class Op>
__device__ __forceinline__ float reduce_rows(const float (&v)[TileTraits::kWarpRows], Op op) {
  const int lane = threadIdx.x % 32;
  const auto exchange = [&](float low, float high, int mask) {
    const bool keeps_high = lane & mask;
    const float other = __shfl_xor_sync(~0u, keeps_high ? low : high, mask);
    return op(keeps_high ? high : low, other);
  };
  float a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = exchange(v[i], v[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = exchange(a[i], a[i + 2], 8);
  float x = exchange(b[0], b[1], 4);
  x = op(x, __shfl_xor_sync(~0u, x, 2));
  return op(x, __shfl_xor_sync(~0u, x, 1));
}

struct TileShared {
  float part[TileTraits::kWarps][TileTraits::kCols];
  float row_max[TileTraits::kRows];
  float col_max[TileTraits::kCols];
};

// Reduces each column over the warps; threads below kCols get theirs.
template <class Op>
__device__ __forceinline__ float reduce_cols(const float (&v)[TileTraits::kLaneCols], Op op,
                                             TileShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < TileTraits::kLaneCols; ++c) {
    shared.part[warp][lane * TileTraits::kLaneCols + c] = v[c];
  }
  __syncthreads();
  float x = 0.f;
  if (threadIdx.x < TileTraits::kCols) {
    x = shared.part[0][threadIdx.x];
    for (int w = 1; w < TileTraits::kWarps; ++w) x = op(x, shared.part[w][threadIdx.x]);
  }
  __syncthreads();  // before the next reduction writes there
  return x;
}

// The sum of the CTA's values, for thread 0.
__device__ __forceinline__ float block_sum(float x, TileShared& shared) {
  x = warp_reduce(x, Add{});
  if (threadIdx.x % 32 == 0) shared.part[0][threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.x == 0) {
    for (int w = 0; w < TileTraits::kWarps; ++w) sum += shared.part[0][w];
  }
  __syncthreads();
  return sum;
}

// Which pairs are positives, and which are left out. Ids are compared as they come.
struct PairMask {
  Positives kind;
  const int64_t* row_ids;  // null: i
  const int64_t* col_ids;  // null: j
  int64_t n, m;

  __device__ __forceinline__ int64_t row_id(int64_t i) const { return row_ids ? row_ids[i] : i; }
  __device__ __forceinline__ int64_t col_id(int64_t j) const { return col_ids ? col_ids[j] : j; }
};

// Rows [row, row + rows) and columns [col, col + cols) of S.
struct Block {
  PairMask mask;
  const float* scale;  // one number
  int64_t row, rows, col, cols;
};

__device__ __forceinline__ float sign_of(const float* scale) { return *scale < 0.f ? -1.f : 1.f; }

// |scale| * log2(e), and never 0, so that excluded entries (-inf) times it stay -inf.
__device__ __forceinline__ float log2_scale(const float* scale) {
  return fmaxf(fabsf(*scale) * kLog2e, 1.2e-38f);
}

// sign(scale) * S, excluded entries -inf.
struct Tile {
  float x[TileTraits::kWarpRows][TileTraits::kLaneCols];
  uint32_t positive = 0, excluded = 0;  // bit 4 r + c
  bool masked;                          // whether any bit of the CTA may be set
  int64_t row, col;                     // of x[0][0] in the block
  int64_t rows, cols;                   // of the block

  static __device__ __forceinline__ uint32_t bit(int r, int c) {
    return 1u << (r * TileTraits::kLaneCols + c);
  }
  __device__ __forceinline__ bool is_positive(int r, int c) const { return positive & bit(r, c); }
  __device__ __forceinline__ bool is_excluded(int r, int c) const { return excluded & bit(r, c); }
  // The row that reduce_rows leaves with this lane, in the block.
  __device__ __forceinline__ int64_t own_row() const { return row + threadIdx.x % 32 / 4; }
};

// The tile whose first entry is at (tile_row, tile_col) of the block; `s` points to that entry.
__device__ __forceinline__ Tile load_tile(const float* s, int64_t ld, const Block& block,
                                          int64_t tile_row, int64_t tile_col) {
  using K = TileTraits;
  Tile t;
  const int warp_row = threadIdx.x / 32 * K::kWarpRows;
  const int lane_col = threadIdx.x % 32 * K::kLaneCols;
  t.row = tile_row + warp_row;
  t.col = tile_col + lane_col;
  t.rows = block.rows;
  t.cols = block.cols;
  const float sign = sign_of(block.scale);
  const int64_t left = t.cols - t.col;
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
    const float* from = s + (warp_row + r) * ld + lane_col;
    if (t.row + r < t.rows && left >= K::kLaneCols) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      t.x[r][0] = sign * v.x, t.x[r][1] = sign * v.y;
      t.x[r][2] = sign * v.z, t.x[r][3] = sign * v.w;
    } else {
#pragma unroll
      for (int c = 0; c < K::kLaneCols; ++c) {
        t.x[r][c] = t.row + r < t.rows && c < left ? sign * from[c] : -kInfinity;
      }
    }
  }
  const PairMask& mask = block.mask;
  const int64_t first_row = block.row + tile_row, first_col = block.col + tile_col;
  t.masked = mask.kind != Positives::diagonal || tile_row + K::kRows > t.rows ||
             tile_col + K::kCols > t.cols ||
             (first_row < first_col + K::kCols && first_col < first_row + K::kRows);
  if (!t.masked) return t;
  int64_t col_ids[K::kLaneCols];
#pragma unroll
  for (int c = 0; c < K::kLaneCols; ++c) {
    col_ids[c] = c < left ? mask.col_id(block.col + t.col + c) : 0;
  }
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
    const bool inside = t.row + r < t.rows;
    const int64_t i = block.row + t.row + r;
    const int64_t id = inside && mask.kind != Positives::diagonal ? mask.row_id(i) : 0;
#pragma unroll
    for (int c = 0; c < K::kLaneCols; ++c) {
      const bool diagonal = i == block.col + t.col + c;
      const bool same = id == col_ids[c];
      const bool excluded =
          !inside || c >= left ||
          (mask.kind == Positives::diagonal_without_same_ids && same && !diagonal);
      const bool positive = mask.kind == Positives::ids ? same : diagonal;
      if (positive && !excluded) t.positive |= Tile::bit(r, c);
      if (excluded) {
        t.excluded |= Tile::bit(r, c);
        t.x[r][c] = -kInfinity;
      }
    }
  }
  return t;
}

// Statistics that a tile hands on: field f of row i at rows[f * row_ld + i], i in the block.
enum StatsField { kMaxField, kSumField, kPositiveField, kKeptField, kEntropyField };
enum { kBestPositiveField = kEntropyField + 1, kBestNegativeField };
constexpr int kLossFields = 4, kMetricFields = 7;

struct StatsOut {
  float* rows;
  float* cols;
  int64_t row_ld, col_ld;
  bool kept;  // whether the sums over kept entries are wanted

  __device__ __forceinline__ void row(const Tile& t, int field, float x) const {
    if (threadIdx.x % 4 == 0 && t.own_row() < t.rows) rows[field * row_ld + t.own_row()] = x;
  }
  __device__ __forceinline__ void col(const Tile& t, int field, float x) const {
    const int64_t j = t.col - threadIdx.x % 32 * TileTraits::kLaneCols + threadIdx.x;
    if (threadIdx.x < TileTraits::kCols && j < t.cols) cols[field * col_ld + j] = x;
  }
};

// Sums f(r, c) over the rows and over the columns of the tile.
template <class Op, class F>
__device__ __forceinline__ void reduce_tile(const Tile& t, int field, float start, Op op,
                                            const StatsOut& out, TileShared& shared, F f) {
  using K = TileTraits;
  float rows[K::kWarpRows], cols[K::kLaneCols];
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) rows[r] = start;
#pragma unroll
  for (int c = 0; c < K::kLaneCols; ++c) cols[c] = start;
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
#pragma unroll
    for (int c = 0; c < K::kLaneCols; ++c) {
      const float x = f(r, c);
      rows[r] = op(rows[r], x);
      cols[c] = op(cols[c], x);
    }
  }
  out.row(t, field, reduce_rows(rows, op));
  out.col(t, field, reduce_cols(cols, op, shared));
}

// Softmax statistics of the tile's rows and columns, each with its own maximum as the shift.
template <bool kMetrics>
__device__ __forceinline__ void tile_stats(const Tile& t, float c, const StatsOut& out,
                                           TileShared& shared) {
  using K = TileTraits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float rows[K::kWarpRows], cols[K::kLaneCols];
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) rows[r] = kLowest;
#pragma unroll
  for (int k = 0; k < K::kLaneCols; ++k) cols[k] = kLowest;
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
#pragma unroll
    for (int k = 0; k < K::kLaneCols; ++k) {
      rows[r] = fmaxf(rows[r], t.x[r][k]);
      cols[k] = fmaxf(cols[k], t.x[r][k]);
    }
  }
  const float row_max = reduce_rows(rows, Max{});
  const float col_max = reduce_cols(cols, Max{}, shared);
  if (lane % 4 == 0) shared.row_max[warp * K::kWarpRows + lane / 4] = row_max;
  if (threadIdx.x < K::kCols) shared.col_max[threadIdx.x] = col_max;
  __syncthreads();
  out.row(t, kMaxField, row_max);
  out.col(t, kMaxField, col_max);

  // One exponential serves rows and columns where a single shift reaches them all.
  float high = kLowest, low = kInfinity;
  for (int i = lane; i < K::kRows + K::kCols; i += 32) {
    const float x = i < K::kRows ? shared.row_max[i] : shared.col_max[i - K::kRows];
    high = fmaxf(high, x);
    if (x != kLowest) low = fminf(low, x);
  }
  high = warp_reduce(high, Max{});
  low = -warp_reduce(-low, Max{});
  const float minus_inf = -kInfinity;
  if (!kMetrics && (high - low) * c <= kStatsSpan) {
#pragma unroll
    for (int r = 0; r < K::kWarpRows; ++r) rows[r] = 0.f;
#pragma unroll
    for (int k = 0; k < K::kLaneCols; ++k) cols[k] = 0.f;
#pragma unroll
    for (int r = 0; r < K::kWarpRows; ++r) {
#pragma unroll
      for (int k = 0; k < K::kLaneCols; ++k) {
        const float e = ptx::exp2_approx((t.x[r][k] - high) * c);
        rows[r] += e;
        cols[k] += e;
      }
    }
    // A row without entries has a sum of 0, or of NaN, that no factor may touch.
    const auto rescale = [&](float sum, float own) {
      return own == kLowest ? sum : sum * ptx::exp2_approx((high - own) * c);
    };
    out.row(t, kSumField, rescale(reduce_rows(rows, Add{}), row_max));
    out.col(t, kSumField, rescale(reduce_cols(cols, Add{}, shared), col_max));
  } else {
    const auto e = [&](int r, int k, float shift) {
      return t.x[r][k] == minus_inf ? 0.f : ptx::exp2_approx((t.x[r][k] - shift) * c);
    };
    const auto e_log_e = [&](int r, int k, float shift) {
      const float y = (t.x[r][k] - shift) * c;
      return t.x[r][k] == minus_inf ? 0.f : ptx::exp2_approx(y) * y * (1.f / kLog2e);
    };
    const auto both = [&](int field, const auto& f) {
#pragma unroll
      for (int r = 0; r < K::kWarpRows; ++r) rows[r] = 0.f;
#pragma unroll
      for (int k = 0; k < K::kLaneCols; ++k) cols[k] = 0.f;
#pragma unroll
      for (int r = 0; r < K::kWarpRows; ++r) {
        const float of_row = shared.row_max[warp * K::kWarpRows + r];
#pragma unroll
        for (int k = 0; k < K::kLaneCols; ++k) {
          rows[r] += f(r, k, of_row);
          cols[k] += f(r, k, shared.col_max[lane * K::kLaneCols + k]);
        }
      }
      out.row(t, field, reduce_rows(rows, Add{}));
      out.col(t, field, reduce_cols(cols, Add{}, shared));
    };
    both(kSumField, e);
    if constexpr (kMetrics) both(kEntropyField, e_log_e);
  }
  if (t.masked) {
    reduce_tile(t, kPositiveField, 0.f, Add{}, out, shared,
                [&](int r, int k) { return t.is_positive(r, k) ? t.x[r][k] : 0.f; });
  } else {
    out.row(t, kPositiveField, 0.f);
    out.col(t, kPositiveField, 0.f);
  }
  if (out.kept) {
    reduce_tile(t, kKeptField, 0.f, Add{}, out, shared,
                [&](int r, int k) { return t.is_excluded(r, k) ? 0.f : t.x[r][k]; });
  }
  if constexpr (kMetrics) {
    reduce_tile(t, kBestPositiveField, kLowest, Max{}, out, shared,
                [&](int r, int k) { return t.is_positive(r, k) ? t.x[r][k] : kLowest; });
    reduce_tile(t, kBestNegativeField, kLowest, Max{}, out, shared,
                [&](int r, int k) { return t.is_positive(r, k) ? kLowest : t.x[r][k]; });
  }
}

// Where G = dLoss/dLogits of a block goes: 16-bit or fp32, ld a multiple of 8.
struct GradOut {
  void* g;
  int64_t ld;
  double* sums;     // a tile's sums of G * S and of G: two numbers
  bool accumulate;  // into `sums`

  template <class T>
  __device__ __forceinline__ void store(const Tile& t, int r,
                                        const float (&v)[TileTraits::kLaneCols]) const {
    if (t.row + r >= t.rows || t.col >= t.cols) return;
    const int64_t at = (t.row + r) * ld + t.col;
    const bool whole = t.col + TileTraits::kLaneCols <= t.cols;
    if constexpr (sizeof(T) == 4) {
      float* to = static_cast<float*>(g) + at;
      if (whole) {
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
        for (int c = 0; c < TileTraits::kLaneCols; ++c) {
          if (t.col + c < t.cols) to[c] = v[c];
        }
      }
    } else {
      uint16_t* to = static_cast<uint16_t*>(g) + at;
      const uint32_t low = ptx::pack<T>(v[0], v[1]), high = ptx::pack<T>(v[2], v[3]);
      if (whole) {
        *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
      } else {
        for (int c = 0; c < TileTraits::kLaneCols; ++c) {
          const uint32_t two = c < 2 ? low : high;
          if (t.col + c < t.cols) to[c] = static_cast<uint16_t>(c % 2 ? two >> 16 : two);
        }
      }
    }
  }

  __device__ __forceinline__ void add(int which, float x, TileShared& shared) const {
    const float sum = block_sum(x, shared);
    if (threadIdx.x == 0) sums[which] = (accumulate ? sums[which] : 0.0) + sum;
  }
};

// InfoNCE: G = a_i exp(.) + b_j exp(.) - kept terms - positive terms. The vectors are those of the
// whole of S; a direction whose `max` is null is skipped.
template <class T>
__device__ __forceinline__ void tile_clip_grads(const Tile& t, const Block& block, float c,
                                                const SoftmaxGrad& row, const SoftmaxGrad& col,
                                                const GradOut& out, TileShared& shared) {
  using K = TileTraits;
  const int64_t first_row = block.row + t.row, first_col = block.col + t.col;
  // One exponential serves both directions where a single shift reaches all of the tile's rows and
  // columns that have a coefficient. No entry is above the shift: it is a maximum of all of S.
  float high = kLowest, low = kInfinity;
  const auto consider = [&](const SoftmaxGrad& v, int64_t i, bool inside) {
    if (!v.max || !inside) return;
    high = fmaxf(high, v.max[i]);
    if (v.softmax[i] != 0.f) low = fminf(low, v.max[i]);
  };
  const int lane = threadIdx.x % 32;
  consider(row, first_row + lane, lane < K::kWarpRows && t.row + lane < t.rows);
#pragma unroll
  for (int k = 0; k < K::kLaneCols; ++k) consider(col, first_col + k, t.col + k < t.cols);
  high = warp_reduce(high, Max{});
  low = -warp_reduce(-low, Max{});
  if (lane == 0) {
    shared.row_max[threadIdx.x / 32] = high;
    shared.col_max[threadIdx.x / 32] = low;
  }
  __syncthreads();
  for (int w = 0; w < K::kWarps; ++w) {
    high = fmaxf(high, shared.row_max[w]);
    low = fminf(low, shared.col_max[w]);
  }
  const bool one_shift = (high - low) * c <= kGradSpan;

  // shift and coefficient of one row or column: with one shift for all, the rest of the own one
  // goes into the coefficient
  const auto softmax = [&](const SoftmaxGrad& v, int64_t i, bool inside, float& shift) {
    shift = high;
    if (!v.max || !inside || v.softmax[i] == 0.f) return 0.f;
    if (one_shift) return v.softmax[i] * ptx::exp2_approx((high - v.max[i]) * c);
    shift = v.max[i];
    return v.softmax[i];
  };
  const auto taken = [&](const SoftmaxGrad& v, const float* of, int64_t i, bool inside) {
    return v.max && of && inside ? of[i] : 0.f;
  };
  float col_shift[K::kLaneCols], col_softmax[K::kLaneCols];
  float col_positive[K::kLaneCols], col_kept[K::kLaneCols];
#pragma unroll
  for (int k = 0; k < K::kLaneCols; ++k) {
    const bool inside = t.col + k < t.cols;
    col_softmax[k] = softmax(col, first_col + k, inside, col_shift[k]);
    col_positive[k] = taken(col, col.positive, first_col + k, inside);
    col_kept[k] = taken(col, col.kept, first_col + k, inside);
  }
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
    const bool inside = t.row + r < t.rows;
    float row_shift;
    const float row_softmax = softmax(row, first_row + r, inside, row_shift);
    const float row_positive = taken(row, row.positive, first_row + r, inside);
    const float row_kept = taken(row, row.kept, first_row + r, inside);
    float g[K::kLaneCols];
#pragma unroll
    for (int k = 0; k < K::kLaneCols; ++k) {
      const float x = t.x[r][k];
      float y;
      if (one_shift) {
        y = ptx::exp2_approx((x - high) * c) * (row_softmax + col_softmax[k]);
      } else {
        // not of rows without a coefficient: their shift is not theirs
        y = row_softmax != 0.f ? row_softmax * ptx::exp2_approx((x - row_shift) * c) : 0.f;
        if (col_softmax[k] != 0.f) {
          y += col_softmax[k] * ptx::exp2_approx((x - col_shift[k]) * c);
        }
      }
      y -= row_kept + col_kept[k];
      if (t.is_positive(r, k)) y -= row_positive + col_positive[k];
      if (t.is_excluded(r, k)) y = 0.f;
      sum += t.is_excluded(r, k) ? 0.f : y * x;
      g[k] = y;
    }
    out.store<T>(t, r, g);
  }
  out.add(0, sum, shared);
}

struct SigmoidVectors {
  const float* row_weight;  // (N,) or null
  const float* row_grad;    // (N,) or null
  const float* col_weight;  // (M,) or null
  const float* scale;
  const float* bias;
  const double* inverse_unit;  // what G is multiplied by, one number; null without gradients
};

// Sigmoid: the loss of a pair is softplus(z), z = -logit for a positive and logit otherwise.
// row_loss: this tile's sums, by row of the block.
template <class T, bool kGrad>
__device__ __forceinline__ void tile_sigmoid(const Tile& t, const Block& block,
                                             const SigmoidVectors& v, float* row_loss,
                                             const GradOut& out, TileShared& shared) {
  using K = TileTraits;
  const float magnitude = fabsf(*v.scale), bias = *v.bias;
  const float inverse_unit = kGrad ? static_cast<float>(*v.inverse_unit) : 0.f;
  float col_weight[K::kLaneCols];
#pragma unroll
  for (int k = 0; k < K::kLaneCols; ++k) {
    const bool weighted = v.col_weight && t.col + k < t.cols;
    col_weight[k] = weighted ? v.col_weight[block.col + t.col + k] : 1.f;
  }
  float losses[K::kWarpRows], by_similarity = 0.f, by_logit = 0.f;
#pragma unroll
  for (int r = 0; r < K::kWarpRows; ++r) {
    losses[r] = 0.f;
    float row_weight = 1.f;
    if (t.row + r < t.rows) {
      const int64_t i = block.row + t.row + r;
      if (v.row_weight) row_weight = v.row_weight[i];
      if (v.row_grad) row_weight *= v.row_grad[i];
    }
    float g[K::kLaneCols];
#pragma unroll
    for (int k = 0; k < K::kLaneCols; ++k) {
      const bool positive = t.is_positive(r, k), excluded = t.is_excluded(r, k);
      const float x = excluded ? 0.f : t.x[r][k];
      const float logit = x * magnitude + bias;
      const float z = positive ? -logit : logit;
      const float e = ptx::exp2_approx(-fabsf(z) * kLog2e);
      const float w = excluded ? 0.f : row_weight * col_weight[k];
      // weights may be infinite where the pair is not one
      losses[r] += excluded ? 0.f : w * (fmaxf(z, 0.f) + log1pf(e));
      if constexpr (kGrad) {
        const float slope = __fdividef(z > 0.f ? 1.f : e, 1.f + e);
        float y = w * inverse_unit * slope;
        if (positive) y = -y;
        g[k] = excluded ? 0.f : y;
        by_similarity += g[k] * x;
        by_logit += g[k];
      }
    }
    if constexpr (kGrad) out.store<T>(t, r, g);
  }
  const float row_sum = reduce_rows(losses, Add{});
  if (threadIdx.x % 4 == 0 && t.own_row() < t.rows) row_loss[t.own_row()] = row_sum;
  if constexpr (kGrad) {
    out.add(0, by_similarity, shared);
    out.add(1, by_logit, shared);
  }
}

// ---------------------------------------------------------------------------------------------
// What a kernel does with its tiles; (m, n) counts the tile's rows and columns of tiles in the
// block. Buffers hold one slot for each. Element is the dtype of the features that an epilogue
// belongs to, void for any.

template <bool kMetrics>
struct StatsEpilogue {
  using Element = void;
  static constexpr int kFields = kMetrics ? kMetricFields : kLossFields;
  StatsOut out;

  __device__ __forceinline__ void operator()(const Tile& t, const Block& block, int64_t m,
                                             int64_t n, TileShared& shared) const {
    StatsOut slot = out;
    slot.rows += n * kFields * out.row_ld;
    slot.cols += m * kFields * out.col_ld;
    tile_stats<kMetrics>(t, log2_scale(block.scale), slot, shared);
  }
};

__device__ __forceinline__ GradOut grad_slot(GradOut out, const Block& block, int64_t m,
                                             int64_t n) {
  out.sums += 2 * (m * ((block.cols + TileTraits::kCols - 1) / TileTraits::kCols) + n);
  return out;
}

template <class T>
struct ClipEpilogue {
  using Element = T;
  SoftmaxGrad row, col;
  GradOut out;

  __device__ __forceinline__ void operator()(const Tile& t, const Block& block, int64_t m,
                                             int64_t n, TileShared& shared) const {
    tile_clip_grads<T>(t, block, log2_scale(block.scale), row, col, grad_slot(out, block, m, n),
                       shared);
  }
};

template <class T, bool kGrad>
struct SigmoidEpilogue {
  using Element = T;
  SigmoidVectors vectors;
  float* row_loss;  // (tiles, ld)
  int64_t ld;
  GradOut out;

  __device__ __forceinline__ void operator()(const Tile& t, const Block& block, int64_t m,
                                             int64_t n, TileShared& shared) const {
    tile_sigmoid<T, kGrad>(t, block, vectors, row_loss + n * ld, grad_slot(out, block, m, n),
                           shared);
  }
};

}  // namespace vlm::cuda
