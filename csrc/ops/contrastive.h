// What the CPU and the CUDA side of clip_loss and siglip_loss share: arguments, their checks, and
// the tensors that a forward hands to its backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>

#include "ops/check.h"
#include "vlm/contrastive.h"

namespace vlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Direction : int64_t { kImageToText = 1, kTextToImage = 2 };
enum Reduction : int64_t { kMean = 0, kSum = 1, kNone = 2 };
enum Need : int64_t { kNeedImage = 1, kNeedText = 2, kNeedScale = 4, kNeedBias = 8 };
// Rows of `stats` (3 | 4 | 7, N + M).
enum StatsRow { kMax, kSum_, kPositive, kKept, kEntropy, kBestPositive, kBestNegative };
constexpr int64_t kLossStats = 3, kSmoothStats = 4, kMetricStats = 7;
constexpr int64_t kMetrics = 10;

// Who multiplies the similarity on CUDA: our own mma.sync tiles, fused with what follows, or
// torch's GEMM. Chosen through set_contrastive_tiles().
inline std::atomic<bool> fused_tiles{false};

// Every argument that both losses share, in the order of the schemas.
struct Args {
  const char* op;
  const Tensor& image;  // (N, D)
  const Tensor& text;   // (M, D)
  const OptionalTensor& logit_scale;
  double scale;
  const OptionalTensor& logit_bias;
  double bias;
  const OptionalTensor& image_ids;
  const OptionalTensor& text_ids;
  const OptionalTensor& labels;
  const OptionalTensor& row_weight;
  const OptionalTensor& col_weight;
  bool ignore_same_ids;
  int64_t workspace_mb;

  int64_t n() const { return image.size(0); }
  int64_t m() const { return text.size(0); }
  int64_t d() const { return image.size(1); }
};

void check(const Args& a);
void check_choice(const char* op, const char* name, int64_t value, int64_t last);
void clip_check(const Args& a, double label_smoothing, int64_t directions, int64_t reduction);

inline MatrixRef matrix(const Tensor& x) {
  return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0)};
}

inline MutableMatrixRef output(const Tensor& x) {
  return x.dim() == 2 ? MutableMatrixRef{x.mutable_data_ptr(), x.size(0), x.size(1), x.stride(0)}
                      : MutableMatrixRef{};
}

inline at::TensorOptions f32(const Tensor& like) { return like.options().dtype(at::kFloat); }

inline Tensor grad_like(const Tensor& x, bool needed) {
  return needed ? at::empty({x.size(0), x.size(1)}, x.options()) : at::empty({0}, x.options());
}

// Gradients formed in a forward have seen neither 1 / N nor the incoming gradient: in fp16 many
// would flush to zero, so that they wait in fp32.
inline Tensor formed_like(const Tensor& x, bool needed) {
  const auto dtype = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  return needed ? at::empty({x.size(0), x.size(1)}, x.options().dtype(dtype))
                : at::empty({0}, x.options().dtype(dtype));
}

// The registered ops.
using ClipLossFwd = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, double label_smoothing,
    bool ignore_same_ids, int64_t directions, int64_t reduction, int64_t workspace_mb,
    c10::SymInt kept_panels, bool metrics);
using ClipLossBwd = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad, const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
    double scale, const OptionalTensor& image_ids, const OptionalTensor& text_ids,
    const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, double label_smoothing, bool ignore_same_ids,
    int64_t directions, int64_t reduction, int64_t workspace_mb, const Tensor& stats,
    const Tensor& kept, int64_t needs);
using ClipLossOneWayFwd = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, double label_smoothing,
    bool ignore_same_ids, int64_t directions, int64_t reduction, int64_t workspace_mb,
    int64_t needs);
using ClipLossOneWayBwd = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad, const OptionalTensor& logit_scale, double scale, const Tensor& formed_image,
    const Tensor& formed_text, const Tensor& sums, int64_t needs);
using SiglipLossFwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& logit_bias, double bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction, int64_t workspace_mb,
    int64_t needs, bool metrics);
using SiglipLossBwd = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& grad, const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
    double scale, const OptionalTensor& logit_bias, double bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction, int64_t workspace_mb,
    const Tensor& formed_image, const Tensor& formed_text, const Tensor& sums, int64_t needs);

// On the CPU and where nobody else will read the forward's gradients: saves a second copy of them.
ClipLossOneWayBwd clip_loss_one_way_bwd_in_place;
SiglipLossBwd siglip_loss_bwd_in_place;

}  // namespace vlm
