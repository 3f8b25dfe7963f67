// Normalisation and rotation of rows of heads, a row by a warp.
#pragma once

#include <type_traits>

#include "cuda/attention.cuh"

namespace vlm::cuda {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// A lane's part of the rows of one head. The features of a row are dealt out in pairs: those that
// the rotation turns, and neighbours beyond them. A lane reads and writes its own pairs only, so
// that a row may be transformed in place without a barrier.
struct RowLane {
  static constexpr int kPairs = 2;  // pairs lane and lane + 32: rows of up to 128 features

  const RowTransform& t;
  int dim, half;
  int a[kPairs], b[kPairs];  // the features of the pairs
  float2 weight[kPairs], bias[kPairs];

  __device__ __forceinline__ RowLane(const RowTransform& transform, int features, int head)
      : t(transform), dim(features), half(t.rope.cos ? static_cast<int>(t.rope.half) : 0) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const bool apart = turned(k) && !t.rope.interleaved;
      a[k] = apart ? pair(k) : 2 * pair(k);
      b[k] = apart ? pair(k) + half : 2 * pair(k) + 1;
      const int64_t at = head * t.norm.head_stride;
      const bool scaled = t.norm.kind != HeadNorm::none && inside(k);
      const bool shifted = scaled && t.norm.bias;
      weight[k] = {scaled ? t.norm.weight[at + a[k]] : 0.f,
                   scaled ? t.norm.weight[at + b[k]] : 0.f};
      bias[k] = {shifted ? t.norm.bias[at + a[k]] : 0.f, shifted ? t.norm.bias[at + b[k]] : 0.f};
    }
  }

  static __device__ __forceinline__ int pair(int k) { return threadIdx.x % 32 + 32 * k; }
  __device__ __forceinline__ bool inside(int k) const { return 2 * pair(k) < dim; }
  __device__ __forceinline__ bool turned(int k) const { return pair(k) < half; }

  struct Pairs {
    float2 of[kPairs];  // 0 outside of the row
  };

  // `row[i]` is feature i: a pointer, or what knows where the features of a row lie.
  template <class Row>
  __device__ __forceinline__ Pairs read(const Row& row) const {
    Pairs x = {};
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (inside(k)) x.of[k] = {static_cast<float>(row[a[k]]), static_cast<float>(row[b[k]])};
    }
    return x;
  }

  // Also zeros up to `padded` features, a multiple of 2.
  template <class Row>
  __device__ __forceinline__ void write(const Row& row, const Pairs& x, int padded) const {
    using T = std::remove_cvref_t<decltype(row[0])>;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (2 * pair(k) >= padded) continue;
      row[a[k]] = static_cast<T>(x.of[k].x);
      row[b[k]] = static_cast<T>(x.of[k].y);
    }
  }

  // Cosines and sines of the angles of row `place` of the tables, clamped to those there are.
  __device__ __forceinline__ Pairs angles(int batch, int place) const {
    Pairs angle = {};
    const int row = min(max(place, 0), t.table_rows - 1);
    const int64_t at = batch * t.rope.batch_stride + static_cast<int64_t>(row) * half;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (turned(k)) angle.of[k] = {t.rope.cos[at + pair(k)], t.rope.sin[at + pair(k)]};
    }
    return angle;
  }

  // x becomes (x - mean) / deviation, of "rms" without the mean; returns 1 / deviation. By a warp.
  __device__ __forceinline__ float standardise(Pairs& x) const {
    const float each = 1.f / static_cast<float>(dim);
    if (t.norm.kind == HeadNorm::layer) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) sum += x.of[k].x + x.of[k].y;
      const float mean = warp_sum(sum) * each;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        if (inside(k)) x.of[k] = {x.of[k].x - mean, x.of[k].y - mean};
      }
    }
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      squares += x.of[k].x * x.of[k].x + x.of[k].y * x.of[k].y;
    }
    const float inverse = rsqrtf(warp_sum(squares) * each + t.norm.eps);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) x.of[k] = {x.of[k].x * inverse, x.of[k].y * inverse};
    return inverse;
  }

  // kSign = -1 turns backwards.
  template <int kSign>
  __device__ __forceinline__ void rotate(Pairs& x, const Pairs& angle) const {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!turned(k)) continue;
      const float cos = angle.of[k].x, sin = kSign * angle.of[k].y;
      const float2 v = x.of[k];
      x.of[k] = {v.x * cos - v.y * sin, v.y * cos + v.x * sin};
    }
  }

  // The row as the products take it. By a warp.
  __device__ __forceinline__ void transform(Pairs& x, const Pairs& angle) const {
    if (t.norm.kind != HeadNorm::none) {
      standardise(x);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        x.of[k] = {x.of[k].x * weight[k].x + bias[k].x, x.of[k].y * weight[k].y + bias[k].y};
      }
    }
    rotate<1>(x, angle);
  }
};

// Rows `from(r)` to `to(r)`, which may be the same, for r = first, first + 1, ... below `end`, by a
// warp; row r takes row r + shift of the tables. kRows at a time, since what is read of them comes
// late. `padded`: see RowLane::write.
template <int kRows, class From, class To>
__device__ __forceinline__ void transform_rows(const RowLane& lane, int batch, int shift, int first,
                                               int end, int padded, From from, To to) {
#pragma unroll 1
  for (; first < end; first += kRows) {
    RowLane::Pairs x[kRows], angle[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = min(first + i, end - 1);
      x[i] = lane.read(from(r));
      angle[i] = lane.angles(batch, r + shift);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i == end) break;
      lane.transform(x[i], angle[i]);
      lane.write(to(first + i), x[i], padded);
    }
  }
}

}  // namespace vlm::cuda
