// The O(N + M) work around the similarity: counts, losses, coefficients, metrics. Sums are fp64 and
// in one order; what the host needs to know stays on the device.
#pragma once

#include "cuda/contrastive_tile.cuh"

namespace vlm::cuda {

// Numbers that one kernel leaves for another.
enum Number {
  kUnit,         // G is stored as a fraction of this power of two
  kInverseUnit,  // 1 / kUnit
  kFeatures,     // what the fp32 sums of G Y and G^T X lack
  kRowCommon,    // the factor of all rows' gradients
  kColCommon,
  kDivisor,
  kNumbers,
};

// One softmax direction: its statistics and what its losses weigh.
struct Side {
  const int32_t* positives;  // of each row (column)
  const int32_t* kept;
  const float* weight;  // or null
  SoftmaxStats stats;
  int64_t length;
  bool active;

  __device__ __forceinline__ float weight_of(int64_t i) const { return weight ? weight[i] : 1.f; }
  __device__ __forceinline__ bool counts(int64_t i) const {
    return active && positives[i] > 0 && weight_of(i) != 0.f;
  }
};

struct ClipVectors {
  Side row, col;
  const float* scale;
  float smoothing;
  Reduction reduction;

  __host__ __device__ double share() const { return row.active && col.active ? 0.5 : 1.0; }
};

// Coefficients of one direction (see SoftmaxGrad), to be written.
struct Coefficients {
  float* softmax;
  float* positive;
  float* kept;  // null without smoothing
};

// Positives and kept entries of each row, or column.
const char* count_pairs(const PairMask& mask, bool rows, int32_t* positives, int32_t* kept,
                        cudaStream_t stream);

// losses (N + M); loss and divisor (one number each) may be null.
const char* clip_losses(const ClipVectors& v, float* losses, float* loss, double* divisor,
                        cudaStream_t stream);

// numbers[kUnit .. kColCommon]. Without `grad` the gradients are those of the sum of the losses.
const char* clip_numbers(const ClipVectors& v, const float* grad, DType dtype, double* numbers,
                         cudaStream_t stream);

// The coefficients of rows (columns) [begin, end), in terms of kUnit. `grad`: one number, or one a
// row for Reduction::none, or null.
const char* clip_coefficients(const ClipVectors& v, bool rows, const float* grad,
                              const double* numbers, const Coefficients& out, int64_t begin,
                              int64_t end, cudaStream_t stream);

const char* contrastive_metrics(const ClipVectors& v, float* out, cudaStream_t stream);

// numbers[kUnit .. kFeatures] and [kDivisor] of the sigmoid loss.
const char* sigmoid_numbers(const SigmoidVectors& v, int64_t n, int64_t m, Reduction reduction,
                            DType dtype, double* numbers, cudaStream_t stream);

// loss = sum of row_loss (n) / *divisor, or 0.
const char* mean_loss(const float* row_loss, int64_t n, const double* divisor, float* loss,
                      cudaStream_t stream);

// out[k] = factor * sum over tiles of sums[2 * tile + k], for k < count. factor: *unit, or for
// `signed_by` (a scale) also its sign.
struct TileSums {
  const double* sums;
  int64_t tiles;
  int count;
  const double* unit;
  const float* signed_by;
  double* out;
  float* as_float;  // out[0] once more, or null
};
const char* total_sums(const TileSums& s, cudaStream_t stream);

// to = from * *factor, rounded once, row by row.
const char* scale_rows(const void* from, DType from_dtype, int64_t from_ld, void* to,
                       DType to_dtype, int64_t to_ld, int64_t rows, int64_t cols,
                       const double* factor, cudaStream_t stream);

}  // namespace vlm::cuda
