// clip_loss and siglip_loss: checks, allocation and the O(N + M) work around the kernels.
//
// The kernels know vectors only. Here ids become dense, weights, reductions and smoothing become
// coefficients, and statistics become the loss.
#include "ops/contrastive.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <unordered_map>
#include <vector>

#include "ops/bind.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/workspace.h"

namespace vlm {
namespace {

constexpr int64_t kMinScratch = 1 << 20;

void check_ids(const Args& a, const char* name, const Tensor& ids, int64_t length, const char* of) {
  TORCH_CHECK_TYPE(at::isIntegralType(ids.scalar_type(), false), a.op, ": ", name, " is ",
                   ids.scalar_type(), ", expected an integer tensor");
  check_length(a.op, name, ids, length, of);
  check_same_device(a.op, name, ids, a.image);
}

void check_weight(const Args& a, const char* name, const OptionalTensor& weight, int64_t length,
                  const char* of) {
  if (!weight) return;
  TORCH_CHECK_TYPE(at::isFloatingType(weight->scalar_type()), a.op, ": ", name, " is ",
                   weight->scalar_type(), ", expected a floating-point tensor");
  check_length(a.op, name, *weight, length, of);
  check_same_device(a.op, name, *weight, a.image);
}

}  // namespace

void check(const Args& a) {
  check_dim(a.op, "image_features", a.image, 2, "(N, D)");
  check_dim(a.op, "text_features", a.text, 2, "(M, D)");
  TORCH_CHECK_VALUE(a.image.size(1) == a.text.size(1), a.op, ": image_features has shape ",
                    a.image.sizes(), " and text_features ", a.text.sizes(),
                    "; expected the same embedding size D in both");
  TORCH_CHECK_VALUE(a.d() > 0, a.op, ": the features have D = 0, expected at least one column");
  feature_dtype(a.op, "image_features", a.image);
  TORCH_CHECK_TYPE(a.image.scalar_type() == a.text.scalar_type(), a.op, ": image_features is ",
                   a.image.scalar_type(), " and text_features ", a.text.scalar_type(),
                   "; expected one dtype, convert one with .to(dtype)");
  check_same_device(a.op, "text_features", a.text, a.image);
  constexpr int64_t kMost = int64_t{1} << 30;
  TORCH_CHECK_VALUE(a.n() < kMost && a.m() < kMost, a.op, ": ", a.n(), " x ", a.m(),
                    " pairs; at most 2^30 rows a side are supported");
  if (a.logit_scale) check_scalar(a.op, "logit_scale", *a.logit_scale);
  if (a.logit_bias) check_scalar(a.op, "logit_bias", *a.logit_bias);
  TORCH_CHECK_VALUE(
      a.image_ids.has_value() == a.text_ids.has_value(), a.op, ": only ",
      a.image_ids ? "image_ids" : "text_ids",
      " came; pass image_ids and text_ids together (the same tensor for paired data)");
  TORCH_CHECK_VALUE(!a.labels || !a.image_ids, a.op,
                    ": labels came with image_ids and text_ids; both name the positives, pass one");
  TORCH_CHECK_VALUE(!a.ignore_same_ids || a.image_ids, a.op,
                    ": ignore_same_ids=True needs image_ids and text_ids, ",
                    a.labels ? "and labels came instead" : "and none came");
  if (a.image_ids) {
    check_ids(a, "image_ids", *a.image_ids, a.n(), "image_features");
    check_ids(a, "text_ids", *a.text_ids, a.m(), "text_features");
  }
  if (a.labels) check_ids(a, "labels", *a.labels, a.n(), "image_features");
  check_weight(a, "weights[0]", a.row_weight, a.n(), "image_features");
  check_weight(a, "weights[1]", a.col_weight, a.m(), "text_features");
  TORCH_CHECK_VALUE(a.workspace_mb > 0, a.op, ": workspace_mb is ", a.workspace_mb,
                    ", expected a positive number of MiB, or None for the default");
}

void check_choice(const char* op, const char* name, int64_t value, int64_t last) {
  TORCH_CHECK_VALUE(value >= 0 && value <= last, op, ": unknown ", name, " code ", value);
}

void clip_check(const Args& a, double label_smoothing, int64_t directions, int64_t reduction) {
  check(a);
  TORCH_CHECK_VALUE(label_smoothing >= 0.0 && label_smoothing < 1.0, a.op, ": label_smoothing is ",
                    label_smoothing, ", expected a number in [0, 1)");
  check_choice(a.op, "directions", directions, kImageToText | kTextToImage);
  check_choice(a.op, "reduction", reduction, kNone);
}

namespace {

float scalar_value(const OptionalTensor& x, double fallback) {
  return static_cast<float>(x ? x->item<double>() : fallback);
}

// Which pairs are positives: the kernels' view (dense ids) and the counts of each row and column.
class Pairs {
 public:
  explicit Pairs(const Args& a) : n_(a.n()), m_(a.m()) {
    if (!a.image_ids && !a.labels) return;
    kind_ = a.ignore_same_ids ? Positives::diagonal_without_same_ids : Positives::ids;
    if (a.labels) {
      use_labels(a);
    } else {
      use_ids(a);
    }
    row_count_.assign(ids_, 0);
    col_count_.assign(ids_, 0);
    for (const int32_t id : row_ids_) {
      if (id >= 0) ++row_count_[id];
    }
    for (const int32_t id : col_ids_) ++col_count_[id];
  }

  void fill(ContrastiveInputs& in) const {
    in.positives = kind_;
    in.image_ids = row_ids_.data();
    in.text_ids = col_ids_.data();
  }

  // Positives and kept entries of row i (or column j).
  int64_t positives(bool rows, int64_t i) const {
    if (kind_ != Positives::ids) return i < std::min(n_, m_);
    return same(rows, i);
  }
  int64_t kept(bool rows, int64_t i) const {
    const int64_t all = rows ? m_ : n_;
    if (kind_ != Positives::diagonal_without_same_ids) return all;
    const bool diagonal_is_same = i < std::min(n_, m_) && row_ids_[i] == col_ids_[i];
    return all - same(rows, i) + diagonal_is_same;
  }

 private:
  int64_t same(bool rows, int64_t i) const {
    const int32_t id = rows ? row_ids_[i] : col_ids_[i];
    return id < 0 ? 0 : rows ? col_count_[id] : row_count_[id];
  }

  void use_labels(const Args& a) {
    const Tensor labels = a.labels->to(at::kLong).contiguous();
    const int64_t* values = labels.const_data_ptr<int64_t>();
    ids_ = m_;
    row_ids_.resize(n_);
    col_ids_.resize(m_);
    for (int64_t i = 0; i < n_; ++i) {
      TORCH_CHECK_VALUE(values[i] >= -1 && values[i] < m_, a.op, ": labels[", i, "] is ", values[i],
                        ", expected a row of text_features in [0, ", m_, ") or -1 for none");
      row_ids_[i] = static_cast<int32_t>(values[i]);
    }
    for (int64_t j = 0; j < m_; ++j) col_ids_[j] = static_cast<int32_t>(j);
  }

  void use_ids(const Args& a) {
    std::unordered_map<int64_t, int32_t> dense;
    dense.reserve(n_ + m_);
    const auto densify = [&](const Tensor& ids, std::vector<int32_t>& out) {
      const Tensor wide = ids.to(at::kLong).contiguous();
      const int64_t* values = wide.const_data_ptr<int64_t>();
      out.resize(wide.size(0));
      for (size_t i = 0; i < out.size(); ++i) {
        out[i] = dense.emplace(values[i], static_cast<int32_t>(dense.size())).first->second;
      }
    };
    densify(*a.image_ids, row_ids_);
    densify(*a.text_ids, col_ids_);
    ids_ = static_cast<int64_t>(dense.size());
  }

  int64_t n_, m_, ids_ = 0;
  Positives kind_ = Positives::diagonal;
  std::vector<int32_t> row_ids_, col_ids_;
  std::vector<int64_t> row_count_, col_count_;  // by id
};

// The weight of each row (column): null means ones.
struct Weight {
  Tensor values;
  const float* data = nullptr;

  explicit Weight(const OptionalTensor& weight) {
    if (!weight) return;
    values = weight->to(at::kFloat).contiguous();
    data = values.const_data_ptr<float>();
  }
  float operator[](int64_t i) const { return data ? data[i] : 1.f; }
};

// A call with its inputs readable by the kernels.
struct Call {
  Tensor image, text;
  Pairs pairs;
  Weight row_weight, col_weight;
  ContrastiveInputs in;

  explicit Call(const Args& a)
      : image(rows_contiguous(a.image)),
        text(rows_contiguous(a.text)),
        pairs(a),
        row_weight(a.row_weight),
        col_weight(a.col_weight) {
    in.image = matrix(image);
    in.text = matrix(text);
    in.dtype = feature_dtype(a.op, "image_features", image);
    in.scale = scalar_value(a.logit_scale, a.scale);
    in.bias = scalar_value(a.logit_bias, a.bias);
    in.scratch_budget = a.workspace_mb << 20;
    pairs.fill(in);
  }

  bool empty() const { return in.image.rows == 0 || in.text.rows == 0; }

  Tensor scratch(ContrastivePass pass) const {
    return take_workspace({cpu::contrastive_scratch_bytes(in, pass)}, at::kByte);
  }
};

// One softmax direction: its statistics and what its losses weigh.
struct Side {
  const Pairs& pairs;
  const Weight& weight;
  bool rows;
  int64_t length, offset;  // in the (N + M) vectors
  bool active;

  bool counts(int64_t i) const { return pairs.positives(rows, i) > 0 && weight[i] != 0.f; }
};

struct Sides {
  Side row, col;

  Sides(const Call& call, int64_t directions)
      : row{call.pairs, call.row_weight,
            true,       call.in.image.rows,
            0,          (directions & kImageToText) != 0},
        col{call.pairs,        call.col_weight,    false,
            call.in.text.rows, call.in.image.rows, (directions & kTextToImage) != 0} {}

  double share() const { return row.active && col.active ? 0.5 : 1.0; }
};

double total_weight(const Side& side) {
  double total = 0.0;
  for (int64_t i = 0; i < side.length; ++i) {
    if (side.counts(i)) total += side.weight[i];
  }
  return total;
}

KeptSimilarity kept_similarity(const Tensor& kept, int64_t n) {
  const int64_t panels = kept.numel() / (n * kKeptPanelColumns);
  return {panels > 0 ? kept.mutable_data_ptr<float>() : nullptr, panels};
}

SoftmaxStats stats_view(const Tensor& stats, const Side& side, bool smoothing) {
  const auto at = [&](StatsRow row) {
    return row < stats.size(0) ? stats.mutable_data_ptr<float>() + row * stats.size(1) + side.offset
                               : nullptr;
  };
  const bool metrics = stats.size(0) == kMetricStats;
  SoftmaxStats s;
  if (side.active || metrics) s.max = at(kMax), s.sum = at(kSum_);
  s.positive = at(kPositive);
  if (smoothing || metrics) s.kept = at(kKept);
  s.entropy = at(kEntropy);
  s.best_positive = at(kBestPositive);
  s.best_negative = at(kBestNegative);
  return s;
}

// The statistics that a direction nobody asked for leaves unwritten.
void clear_inactive(const Tensor& stats, const Sides& sides, bool metrics) {
  const Side& side = sides.row.active ? sides.col : sides.row;
  if (!metrics) stats.narrow(0, kMax, 2).narrow(1, side.offset, side.length).zero_();
}

// The weighted loss of row i: log-sum-exp minus the target's mean logit, both above the maximum.
double row_loss(const Side& side, const SoftmaxStats& s, float scale, double smoothing, int64_t i) {
  if (!side.active || !side.counts(i)) return 0.0;
  const double positives = static_cast<double>(side.pairs.positives(side.rows, i));
  double target = (1.0 - smoothing) * (s.positive[i] / positives - s.max[i]);
  if (smoothing > 0.0) {
    const double kept = static_cast<double>(side.pairs.kept(side.rows, i));
    target += smoothing * (s.kept[i] / kept - s.max[i]);
  }
  return side.weight[i] * (std::log(static_cast<double>(s.sum[i])) - std::fabs(scale) * target);
}

// The detached metrics, in the order of ops/contrastive.py. Logit means come without the bias, and
// the last two say whether there were positives and negatives at all.
void write_metrics(const Sides& sides, const SoftmaxStats& row, const SoftmaxStats& col,
                   float scale, float* out) {
  const double magnitude = std::fabs(scale);
  double positive = 0.0, kept = 0.0, positives = 0.0, all = 0.0;
  const auto side = [&](const Side& s, const SoftmaxStats& stats, float* top1, float* entropy) {
    double hits = 0.0, with_positive = 0.0, nats = 0.0;
    for (int64_t i = 0; i < s.length; ++i) {
      if (s.pairs.positives(s.rows, i) > 0) {
        with_positive += 1.0;
        // at scale 0 all logits tie
        hits += magnitude > 0.0 && stats.best_positive[i] > stats.best_negative[i];
      }
      if (s.pairs.kept(s.rows, i) > 0) {
        nats += std::log(static_cast<double>(stats.sum[i])) -
                static_cast<double>(stats.entropy[i]) / stats.sum[i];
      }
      if (!s.rows) continue;
      positive += stats.positive[i];
      kept += stats.kept[i];
      positives += static_cast<double>(s.pairs.positives(true, i));
      all += static_cast<double>(s.pairs.kept(true, i));
    }
    *top1 = static_cast<float>(with_positive > 0.0 ? hits / with_positive : 0.0);
    *entropy = static_cast<float>(s.length > 0 ? nats / static_cast<double>(s.length) : 0.0);
  };
  side(sides.row, row, out + 0, out + 4);
  side(sides.col, col, out + 1, out + 5);
  const double negatives = all - positives;
  out[2] = static_cast<float>(positives > 0.0 ? magnitude * positive / positives : 0.0);
  out[3] = static_cast<float>(negatives > 0.0 ? magnitude * (kept - positive) / negatives : 0.0);
  out[6] = std::exp(out[4]);
  out[7] = std::exp(out[5]);
  out[8] = positives > 0.0;
  out[9] = negatives > 0.0;
}

// -> loss () or (N + M,), stats (3 | 4 | 7, N + M), kept (panels * N * 64,), metrics (10,) or (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss_fwd(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, double label_smoothing,
    bool ignore_same_ids, int64_t directions, int64_t reduction, int64_t workspace_mb,
    c10::SymInt symbolic_panels, bool metrics) {
  const int64_t kept_panels = symbolic_panels.expect_int();
  const OptionalTensor no_bias;
  const Args args{
      "clip_loss", image,    text,   logit_scale, scale,      no_bias,         0.0,
      image_ids,   text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  clip_check(args, label_smoothing, directions, reduction);
  const int64_t n = args.n(), m = args.m();
  TORCH_CHECK_VALUE(kept_panels >= 0 && kept_panels * kKeptPanelColumns < m + kKeptPanelColumns,
                    "clip_loss: kept_panels is ", kept_panels, " for ", m, " columns");
  Call call(args);

  const auto options = f32(image);
  const bool smoothing = label_smoothing > 0.0;
  const Tensor loss = reduction == kNone ? at::empty({n + m}, options) : at::empty({}, options);
  const Tensor stats = at::empty({metrics     ? kMetricStats
                                  : smoothing ? kSmoothStats
                                              : kLossStats,
                                  n + m},
                                 options);
  const Tensor kept = take_workspace({kept_panels * n * kKeptPanelColumns}, at::kFloat);
  const Tensor measured = at::empty({metrics ? kMetrics : 0}, options);

  const Sides sides(call, directions);
  const SoftmaxStats row = stats_view(stats, sides.row, smoothing);
  const SoftmaxStats col = stats_view(stats, sides.col, smoothing);
  if (call.empty()) {
    loss.zero_();
    stats.zero_();
  } else {
    call.in.scratch_budget =
        std::max(call.in.scratch_budget - static_cast<int64_t>(kept.nbytes()), kMinScratch);
    const Tensor scratch = call.scratch({});
    cpu::clip_stats(call.in, row, col, kept_similarity(kept, n), scratch.mutable_data_ptr());
    if (!sides.row.active || !sides.col.active) clear_inactive(stats, sides, metrics);
    float* out = loss.mutable_data_ptr<float>();
    double result = 0.0;
    for (const Side* side : {&sides.row, &sides.col}) {
      double sum = 0.0;
      for (int64_t i = 0; i < side->length; ++i) {
        const double l = row_loss(*side, side->rows ? row : col, call.in.scale, label_smoothing, i);
        if (reduction == kNone) out[side->offset + i] = static_cast<float>(l);
        sum += l;
      }
      if (!side->active) continue;
      const double weight = reduction == kMean ? total_weight(*side) : 1.0;
      result += weight != 0.0 ? sides.share() * sum / weight : 0.0;
    }
    if (reduction != kNone) *out = static_cast<float>(result);
  }
  if (metrics) {
    write_metrics(sides, row, col, call.in.scale, measured.mutable_data_ptr<float>());
  }
  return {loss, stats, kept, measured};
}

// The coefficients of one direction's gradient, times the incoming gradient and `fold`.
struct Coefficients {
  std::vector<float> softmax, positive, kept;
  SoftmaxGrad view;

  Coefficients(const Side& side, const SoftmaxStats& s, const float* grad, int64_t reduction,
               double share, double smoothing, double fold) {
    if (!side.active) return;
    const double weight = reduction == kMean ? total_weight(side) : 1.0;
    const double common = reduction == kNone ? fold
                          : weight != 0.0    ? fold * share * grad[0] / weight
                                             : 0.0;
    softmax.assign(side.length, 0.f);
    positive.assign(side.length, 0.f);
    if (smoothing > 0.0) kept.assign(side.length, 0.f);
    for (int64_t i = 0; i < side.length; ++i) {
      if (!side.counts(i)) continue;
      const double own = reduction == kNone ? grad[side.offset + i] : 1.0;
      const double g = common * own * side.weight[i];
      softmax[i] = static_cast<float>(g / s.sum[i]);
      positive[i] = static_cast<float>(g * (1.0 - smoothing) /
                                       static_cast<double>(side.pairs.positives(side.rows, i)));
      if (smoothing > 0.0) {
        kept[i] =
            static_cast<float>(g * smoothing / static_cast<double>(side.pairs.kept(side.rows, i)));
      }
    }
    view = {s.max, softmax.data(), positive.data(), smoothing > 0.0 ? kept.data() : nullptr};
  }
};

Tensor scalar_grad(const OptionalTensor& x, bool needed, const Tensor& features, double value) {
  if (!needed || !x) return at::empty({0}, f32(features));
  return at::empty_like(*x).fill_(value);
}

// -> gradients of image, text, logit_scale; (0,) where not needed.
std::tuple<Tensor, Tensor, Tensor> clip_loss_bwd(
    const Tensor& grad, const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
    double scale, const OptionalTensor& image_ids, const OptionalTensor& text_ids,
    const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, double label_smoothing, bool ignore_same_ids,
    int64_t directions, int64_t reduction, int64_t workspace_mb, const Tensor& stats,
    const Tensor& kept, int64_t needs) {
  const OptionalTensor no_bias;
  const Args args{
      "clip_loss", image,    text,   logit_scale, scale,      no_bias,         0.0,
      image_ids,   text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  clip_check(args, label_smoothing, directions, reduction);
  const int64_t n = args.n(), m = args.m();
  TORCH_CHECK_VALUE(grad.numel() == (reduction == kNone ? n + m : 1),
                    "clip_loss backward: the gradient has shape ", grad.sizes());
  TORCH_CHECK_VALUE(
      stats.dim() == 2 && stats.size(0) >= (label_smoothing > 0.0 ? kSmoothStats : kLossStats) &&
          stats.size(1) == n + m && stats.scalar_type() == at::kFloat && stats.is_contiguous(),
      "clip_loss backward: stats do not belong to these features");
  const int64_t panel = n * kKeptPanelColumns;
  TORCH_CHECK_VALUE(kept.dim() == 1 && kept.is_contiguous() && kept.scalar_type() == at::kFloat &&
                        (panel == 0 || kept.numel() % panel == 0) &&
                        kept.numel() <= n * (m + kKeptPanelColumns - 1),
                    "clip_loss backward: the kept similarity does not belong to these features");
  Call call(args);

  const Tensor grad_image = grad_like(image, needs & kNeedImage);
  const Tensor grad_text = grad_like(text, needs & kNeedText);
  if (call.empty()) {
    grad_image.zero_();
    grad_text.zero_();
    return {grad_image, grad_text, scalar_grad(logit_scale, needs & kNeedScale, image, 0.0)};
  }
  const Sides sides(call, directions);
  const SoftmaxStats row_stats = stats_view(stats, sides.row, label_smoothing > 0.0);
  const SoftmaxStats col_stats = stats_view(stats, sides.col, label_smoothing > 0.0);
  const Tensor grads = grad.to(at::kFloat).contiguous();
  // dLoss/dX = scale * G Y: the scale rides on the coefficients, except a zero one.
  const double fold = call.in.scale != 0.f ? call.in.scale : 1.0;
  const float* g = grads.const_data_ptr<float>();
  const Coefficients row(sides.row, row_stats, g, reduction, sides.share(), label_smoothing, fold);
  const Coefficients col(sides.col, col_stats, g, reduction, sides.share(), label_smoothing, fold);
  call.in.scratch_budget =
      std::max(call.in.scratch_budget - static_cast<int64_t>(kept.nbytes()), kMinScratch);
  double similarity = 0.0;
  const ContrastiveGrads out{output(grad_image), output(grad_text), &similarity, nullptr};
  const Tensor scratch = call.scratch(out.pass());
  cpu::clip_grads(call.in, row.view, col.view, kept_similarity(kept, n), out,
                  scratch.mutable_data_ptr());
  if (call.in.scale == 0.f) {
    grad_image.mul_(0.0);
    grad_text.mul_(0.0);
  }
  return {grad_image, grad_text,
          scalar_grad(logit_scale, needs & kNeedScale, image, similarity / std::fabs(fold))};
}

// What a forward that already formed gradients leaves for the backward: a factor.
Tensor scaled(const Tensor& formed, double factor, bool needed, bool in_place) {
  if (!needed) return at::empty({0}, formed.options());
  if (in_place) return factor == 1.0 ? formed : formed.mul_(factor);
  return formed.mul(factor);
}

// One direction of clip_loss, "mean" or "sum", its gradients formed in the same pass.
// -> loss (), gradients with respect to the similarity of image (N, D) and text (M, D), and fp64
// sums (2,): of G * S, and the divisor that none of them has seen.
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss_one_way_fwd(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, double label_smoothing,
    bool ignore_same_ids, int64_t directions, int64_t reduction, int64_t workspace_mb,
    int64_t needs) {
  const OptionalTensor no_bias;
  const Args args{
      "clip_loss", image,    text,   logit_scale, scale,      no_bias,         0.0,
      image_ids,   text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  clip_check(args, label_smoothing, directions, reduction);
  TORCH_CHECK_VALUE(
      (directions == kImageToText || directions == kTextToImage) && reduction != kNone,
      "clip_loss: one pass needs one direction and the reduction mean or sum");
  Call call(args);

  const Tensor loss = at::empty({}, f32(image));
  const Tensor grad_image = formed_like(image, needs & kNeedImage);
  const Tensor grad_text = formed_like(text, needs & kNeedText);
  const Tensor sums = at::empty({2}, f32(image).dtype(at::kDouble));
  if (call.empty()) {
    for (const Tensor* x : {&loss, &grad_image, &grad_text, &sums}) x->zero_();
    return {loss, grad_image, grad_text, sums};
  }
  const Sides sides(call, directions);
  const bool rows = directions == kImageToText;
  const Side& side = rows ? sides.row : sides.col;
  ContrastiveGrads out{output(grad_image), output(grad_text), sums.mutable_data_ptr<double>(),
                       nullptr, call.in.dtype == DType::f16};
  if (rows) {  // the kernel's softmax runs down columns
    std::swap(call.in.image, call.in.text);
    std::swap(call.in.image_ids, call.in.text_ids);
    std::swap(out.image, out.text);
  }
  const bool smoothing = label_smoothing > 0.0;
  const Tensor stats = at::empty({kSmoothStats, side.length}, f32(image));
  SoftmaxStats s;
  float* values = stats.mutable_data_ptr<float>();
  s.max = values + kMax * side.length;
  s.sum = values + kSum_ * side.length;
  s.positive = values + kPositive * side.length;
  s.kept = smoothing ? values + kKept * side.length : nullptr;
  std::vector<float> softmax(side.length), positive(side.length), kept;
  if (smoothing) kept.resize(side.length);
  for (int64_t i = 0; i < side.length; ++i) {
    if (!side.counts(i)) continue;
    const double weight = side.weight[i];
    softmax[i] = side.weight[i];
    positive[i] = static_cast<float>(weight * (1.0 - label_smoothing) /
                                     static_cast<double>(side.pairs.positives(side.rows, i)));
    if (smoothing) {
      kept[i] = static_cast<float>(weight * label_smoothing /
                                   static_cast<double>(side.pairs.kept(side.rows, i)));
    }
  }
  ContrastivePass pass = out.pass();
  pass.whole_columns = true;
  const Tensor scratch = call.scratch(pass);
  cpu::clip_columns(call.in, s,
                    {nullptr, softmax.data(), positive.data(), smoothing ? kept.data() : nullptr},
                    out, scratch.mutable_data_ptr());
  double sum = 0.0;
  for (int64_t i = 0; i < side.length; ++i) {
    sum += row_loss(side, s, call.in.scale, label_smoothing, i);
  }
  const double divisor = reduction == kMean ? total_weight(side) : 1.0;
  loss.fill_(divisor != 0.0 ? sum / divisor : 0.0);
  sums.mutable_data_ptr<double>()[1] = divisor;
  return {loss, grad_image, grad_text, sums};
}

// -> gradients of image, text, logit_scale; (0,) where not needed.
std::tuple<Tensor, Tensor, Tensor> one_way_bwd(bool in_place, const Tensor& grad,
                                               const OptionalTensor& logit_scale, double scale,
                                               const Tensor& formed_image,
                                               const Tensor& formed_text, const Tensor& sums,
                                               int64_t needs) {
  TORCH_CHECK_VALUE(grad.numel() == 1 && sums.numel() == 2 && sums.scalar_type() == at::kDouble,
                    "clip_loss backward: the gradient has shape ", grad.sizes());
  const double similarity = sums.const_data_ptr<double>()[0];
  const double divisor = sums.const_data_ptr<double>()[1];
  const double factor = divisor != 0.0 ? grad.item<double>() / divisor : 0.0;
  const float s = scalar_value(logit_scale, scale);
  return {scaled(formed_image, factor * s, needs & kNeedImage, in_place),
          scaled(formed_text, factor * s, needs & kNeedText, in_place),
          scalar_grad(logit_scale, needs & kNeedScale, formed_image,
                      (s < 0.f ? -factor : factor) * similarity)};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_one_way_bwd(const Tensor& grad,
                                                         const OptionalTensor& logit_scale,
                                                         double scale, const Tensor& formed_image,
                                                         const Tensor& formed_text,
                                                         const Tensor& sums, int64_t needs) {
  return one_way_bwd(false, grad, logit_scale, scale, formed_image, formed_text, sums, needs);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> clip_loss_one_way_bwd_in_place(
    const Tensor& grad, const OptionalTensor& logit_scale, double scale, const Tensor& formed_image,
    const Tensor& formed_text, const Tensor& sums, int64_t needs) {
  return one_way_bwd(true, grad, logit_scale, scale, formed_image, formed_text, sums, needs);
}

namespace {

double siglip_divisor(const Call& call, int64_t reduction) {
  if (reduction != kMean) return 1.0;
  double sum = 0.0;
  for (int64_t i = 0; i < call.in.image.rows; ++i) sum += call.row_weight[i];
  return sum;
}

// Runs the sigmoid kernel, row weights times `row_grad` (N,) where given.
void run_sigmoid(const Call& call, const float* row_grad, float* row_loss, const SoftmaxStats& row,
                 const SoftmaxStats& col, const ContrastiveGrads& out) {
  std::vector<float> weight;
  SigmoidTerms terms{call.row_weight.data, call.col_weight.data, row_loss};
  if (row_grad) {
    weight.resize(call.in.image.rows);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = row_grad[i] * call.row_weight[i];
    terms.row_weight = weight.data();
  }
  const bool grads = out.image.data || out.text.data || out.similarity || out.logit;
  const Tensor scratch = call.scratch(grads ? out.pass() : ContrastivePass{});
  cpu::sigmoid_loss(call.in, terms, row, col, out, scratch.mutable_data_ptr());
}

// -> loss () or (N,), and for "mean" and "sum" where needed the gradients of the pair sum with
// respect to the similarity: of image (N, D), of text (M, D), and of scale and bias (2,) fp64;
// metrics (10,) or (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_loss_fwd(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& logit_bias, double bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction, int64_t workspace_mb,
    int64_t needs, bool metrics) {
  const Args args{
      "siglip_loss", image,    text,   logit_scale, scale,      logit_bias,      bias,
      image_ids,     text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  check(args);
  check_choice(args.op, "reduction", reduction, kNone);
  const int64_t n = args.n();
  Call call(args);

  const auto options = f32(image);
  const Tensor loss = reduction == kNone ? at::empty({n}, options) : at::empty({}, options);
  const int64_t now = reduction == kNone ? 0 : needs;
  const Tensor grad_image = formed_like(image, now & kNeedImage);
  const Tensor grad_text = formed_like(text, now & kNeedText);
  const Tensor sums = at::empty({now ? 2 : 0}, options.dtype(at::kDouble));
  const Tensor measured = at::empty({metrics ? kMetrics : 0}, options);
  if (call.empty()) {
    for (const Tensor* x : {&loss, &grad_image, &grad_text, &sums, &measured}) x->zero_();
    if (metrics) measured.slice(0, 6, 8).fill_(1.0);  // the perplexities of nothing
    return {loss, grad_image, grad_text, sums, measured};
  }
  std::vector<float> rows;
  float* row_loss = loss.mutable_data_ptr<float>();
  if (reduction != kNone) {
    rows.resize(n);
    row_loss = rows.data();
  }
  ContrastiveGrads out{output(grad_image), output(grad_text), nullptr, nullptr,
                       call.in.dtype == DType::f16};
  if (now) {
    out.similarity = sums.mutable_data_ptr<double>();
    out.logit = out.similarity + 1;
  }
  const Sides sides(call, kImageToText | kTextToImage);
  const Tensor stats = at::empty({metrics ? kMetricStats : 0, n + args.m()}, options);
  SoftmaxStats row, col;
  if (metrics) row = stats_view(stats, sides.row, false), col = stats_view(stats, sides.col, false);
  run_sigmoid(call, nullptr, row_loss, row, col, out);
  if (reduction != kNone) {
    double sum = 0.0;
    for (const float l : rows) sum += l;
    const double divisor = siglip_divisor(call, reduction);
    loss.fill_(divisor != 0.0 ? sum / divisor : 0.0);
  }
  if (metrics) {
    write_metrics(sides, row, col, call.in.scale, measured.mutable_data_ptr<float>());
  }
  return {loss, grad_image, grad_text, sums, measured};
}

// -> gradients of image, text, logit_scale, logit_bias; (0,) where not needed. `in_place` scales
// the forward's gradients where they lie instead of into new tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_bwd(
    bool in_place, const Tensor& grad, const Tensor& image, const Tensor& text,
    const OptionalTensor& logit_scale, double scale, const OptionalTensor& logit_bias, double bias,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, bool ignore_same_ids,
    int64_t reduction, int64_t workspace_mb, const Tensor& formed_image, const Tensor& formed_text,
    const Tensor& sums, int64_t needs) {
  const Args args{
      "siglip_loss", image,    text,   logit_scale, scale,      logit_bias,      bias,
      image_ids,     text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  check(args);
  check_choice(args.op, "reduction", reduction, kNone);
  TORCH_CHECK_VALUE(grad.numel() == (reduction == kNone ? args.n() : 1),
                    "siglip_loss backward: the gradient has shape ", grad.sizes());
  Call call(args);
  const Tensor grads = grad.to(at::kFloat).contiguous();
  const bool need_image = needs & kNeedImage, need_text = needs & kNeedText;
  Tensor grad_image = formed_image, grad_text = formed_text;
  double by_similarity = 0.0, by_logit = 0.0, factor = 1.0;
  if (call.empty()) {
    grad_image = grad_like(image, need_image).zero_();
    grad_text = grad_like(text, need_text).zero_();
    factor = 0.0;
    in_place = true;
  } else if (reduction == kNone) {
    grad_image = formed_like(image, need_image);
    grad_text = formed_like(text, need_text);
    run_sigmoid(call, grads.const_data_ptr<float>(), nullptr, {}, {},
                {output(grad_image), output(grad_text), &by_similarity, &by_logit,
                 call.in.dtype == DType::f16});
    in_place = true;
  } else {
    TORCH_CHECK_VALUE(
        sums.numel() == 2 && (!need_image || formed_image.sizes() == image.sizes()) &&
            (!need_text || formed_text.sizes() == text.sizes()),
        "siglip_loss backward: the forward's gradients do not belong to these features");
    const double divisor = siglip_divisor(call, reduction);
    factor = divisor != 0.0 ? *grads.const_data_ptr<float>() / divisor : 0.0;
    by_similarity = factor * sums.const_data_ptr<double>()[0];
    by_logit = factor * sums.const_data_ptr<double>()[1];
  }
  const double of_features = factor * call.in.scale;
  const double sign = call.in.scale < 0.f ? -1.0 : 1.0;
  const auto dtype = image.scalar_type();
  return {scaled(grad_image, of_features, need_image, in_place).to(dtype),
          scaled(grad_text, of_features, need_text, in_place).to(dtype),
          scalar_grad(logit_scale, needs & kNeedScale, image, sign * by_similarity),
          scalar_grad(logit_bias, needs & kNeedBias, image, by_logit)};
}

#define VLM_SIGLIP_BWD(name, in_place)                                                      \
  std::tuple<Tensor, Tensor, Tensor, Tensor> name(                                          \
      const Tensor& grad, const Tensor& image, const Tensor& text,                          \
      const OptionalTensor& logit_scale, double scale, const OptionalTensor& logit_bias,    \
      double bias, const OptionalTensor& image_ids, const OptionalTensor& text_ids,         \
      const OptionalTensor& labels, const OptionalTensor& row_weight,                       \
      const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction,            \
      int64_t workspace_mb, const Tensor& formed_image, const Tensor& formed_text,          \
      const Tensor& sums, int64_t needs) {                                                  \
    return siglip_bwd(in_place, grad, image, text, logit_scale, scale, logit_bias, bias,    \
                      image_ids, text_ids, labels, row_weight, col_weight, ignore_same_ids, \
                      reduction, workspace_mb, formed_image, formed_text, sums, needs);     \
  }
VLM_SIGLIP_BWD(siglip_loss_bwd, false)

}  // namespace

VLM_SIGLIP_BWD(siglip_loss_bwd_in_place, true)
#undef VLM_SIGLIP_BWD

namespace {

#define VLM_PAIR_ARGS \
  "Tensor? image_ids, Tensor? text_ids, Tensor? labels, Tensor? row_weight, Tensor? col_weight, "

constexpr const char* kClipFwd =
    "clip_loss_fwd(Tensor image, Tensor text, Tensor? logit_scale, float scale, " VLM_PAIR_ARGS
    "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, SymInt kept_panels, bool metrics) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kClipBwd =
    "clip_loss_bwd(Tensor grad, Tensor image, Tensor text, Tensor? logit_scale, float "
    "scale, " VLM_PAIR_ARGS
    "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, Tensor stats, Tensor kept, int needs) -> (Tensor, Tensor, Tensor)";
constexpr const char* kOneWayFwd =
    "clip_loss_one_way_fwd(Tensor image, Tensor text, Tensor? logit_scale, float "
    "scale, " VLM_PAIR_ARGS
    "float label_smoothing, bool ignore_same_ids, int directions, int reduction, "
    "int workspace_mb, int needs) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kOneWayBwd =
    "clip_loss_one_way_bwd(Tensor grad, Tensor? logit_scale, float scale, Tensor formed_image, "
    "Tensor formed_text, Tensor sums, int needs) -> (Tensor, Tensor, Tensor)";
constexpr const char* kSiglipFwd =
    "siglip_loss_fwd(Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    "Tensor? logit_bias, float bias, " VLM_PAIR_ARGS
    "bool ignore_same_ids, int reduction, int workspace_mb, int needs, bool metrics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kSiglipBwd =
    "siglip_loss_bwd(Tensor grad, Tensor image, Tensor text, Tensor? logit_scale, float scale, "
    "Tensor? logit_bias, float bias, " VLM_PAIR_ARGS
    "bool ignore_same_ids, int reduction, int workspace_mb, Tensor formed_image, "
    "Tensor formed_text, Tensor sums, int needs) -> (Tensor, Tensor, Tensor, Tensor)";

TORCH_LIBRARY_FRAGMENT(VLM_LIBRARY, m) {
  m.def(kClipFwd);
  m.def(kClipBwd);
  m.def(kOneWayFwd);
  m.def(kOneWayBwd);
  m.def(kSiglipFwd);
  m.def(kSiglipBwd);
}

#ifndef VLM_EMULATED  // there the CPU key belongs to the emulated kernels
TORCH_LIBRARY_IMPL(vlm_kernels, CPU, m) {
  m.impl("clip_loss_fwd", clip_loss_fwd);
  m.impl("clip_loss_bwd", clip_loss_bwd);
  m.impl("clip_loss_one_way_fwd", clip_loss_one_way_fwd);
  m.impl("clip_loss_one_way_bwd", clip_loss_one_way_bwd);
  m.impl("siglip_loss_fwd", siglip_loss_fwd);
  m.impl("siglip_loss_bwd", siglip_loss_bwd);
}
#endif

}  // namespace

void set_contrastive_tiles(const std::string& kind) {
  TORCH_CHECK_VALUE(kind == "gemm" || kind == "fused", "set_contrastive_tiles: kind is '", kind,
                    "', expected 'gemm' or 'fused'");
  fused_tiles = kind == "fused";
}

void bind_contrastive(pybind11::module_& m) {
  m.def("set_contrastive_tiles", &set_contrastive_tiles, pybind11::arg("kind"),
        "Who multiplies the similarity on CUDA: 'gemm', torch's, or 'fused', our own mma.sync "
        "tiles (16-bit inputs in 16-byte aligned rows; others stay with torch's).");
  bind_op<ClipLossFwd>(m, "clip_loss_fwd");
  bind_op<ClipLossBwd>(m, "clip_loss_bwd");
  bind_op<ClipLossOneWayFwd>(m, "clip_loss_one_way_fwd");
  bind_op<ClipLossOneWayBwd>(m, "clip_loss_one_way_bwd");
  bind_op<SiglipLossFwd>(m, "siglip_loss_fwd");
  bind_op<SiglipLossBwd>(m, "siglip_loss_bwd");
  bind_contrastive_autograd(m);
}

}  // namespace vlm
