// clip_loss and siglip_loss on CUDA tensors. Nothing here waits for the device or reads from it:
// scale, bias, ids and labels stay there, and so do the sums over rows.
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/bind.h"
#include "ops/check.h"
#include "ops/contrastive.h"
#include "ops/device.h"
#include "ops/gemm.h"

namespace vlm {
namespace {

using cuda::ClipOptions;
using cuda::ContrastiveCall;

Tensor as(const Tensor& x, at::ScalarType dtype) { return x.to(dtype).contiguous(); }

Tensor scalar_on_device(const Args& a, const char* name, const OptionalTensor& x, double value) {
  if (!x) return at::full({}, value, f32(a.image));
  check_same_device(a.op, name, *x, a.image);
  return as(*x, at::kFloat);
}

const float* data_or_null(const OptionalTensor& x) {
  return x ? x->const_data_ptr<float>() : nullptr;
}

// A call with its inputs readable by the kernels.
struct DeviceCall {
  c10::DeviceGuard guard;
  c10::Device device;
  Tensor image, text, scale, bias, ids[2];
  OptionalTensor row_weight, col_weight;
  ContrastiveCall call;

  explicit DeviceCall(const Args& a)
      : guard(a.image.device()),
        device(a.image.device()),
        image(rows_contiguous(a.image)),
        text(rows_contiguous(a.text)),
        scale(scalar_on_device(a, "logit_scale", a.logit_scale, a.scale)),
        bias(scalar_on_device(a, "logit_bias", a.logit_bias, a.bias)) {
    if (a.row_weight) row_weight = as(*a.row_weight, at::kFloat);
    if (a.col_weight) col_weight = as(*a.col_weight, at::kFloat);
    call.image = matrix(image);
    call.text = matrix(text);
    call.dtype = feature_dtype(a.op, "image_features", image);
    call.scale = scale.const_data_ptr<float>();
    call.bias = bias.const_data_ptr<float>();
    // A label is the id of a row whose columns are their own ids: what is no column has no
    // positive.
    if (a.labels) ids[0] = as(*a.labels, at::kLong);
    if (a.image_ids) ids[0] = as(*a.image_ids, at::kLong), ids[1] = as(*a.text_ids, at::kLong);
    if (ids[0].defined()) {
      call.positives = a.ignore_same_ids ? Positives::diagonal_without_same_ids : Positives::ids;
      call.image_ids = ids[0].const_data_ptr<int64_t>();
    }
    if (ids[1].defined()) call.text_ids = ids[1].const_data_ptr<int64_t>();
    call.row_weight = data_or_null(row_weight);
    call.col_weight = data_or_null(col_weight);
    call.workspace = a.workspace_mb << 20;
    call.fused = fused_tiles;
    call.gemm = torch_gemm(&device);
    call.stream = current_stream(image);
  }
  DeviceCall(const DeviceCall&) = delete;

  bool empty() const { return call.image.rows == 0 || call.text.rows == 0; }

  // The other direction: rows are texts.
  void swap_sides() {
    std::swap(call.image, call.text);
    std::swap(call.image_ids, call.text_ids);
    std::swap(call.row_weight, call.col_weight);
  }

  Tensor scratch(ContrastivePass pass, bool metrics = false) const {
    return at::empty({cuda::contrastive_scratch_bytes(call, pass, metrics)},
                     image.options().dtype(at::kByte));
  }
};

ClipOptions clip_options(int64_t directions, int64_t reduction, double smoothing) {
  return {(directions & kImageToText) != 0, (directions & kTextToImage) != 0,
          static_cast<cuda::Reduction>(reduction), static_cast<float>(smoothing)};
}

SoftmaxStats stats_view(const Tensor& stats, int64_t offset, bool kept) {
  float* data = stats.mutable_data_ptr<float>() + offset;
  const auto at = [&](StatsRow row) {
    return row < stats.size(0) ? data + row * stats.size(1) : nullptr;
  };
  return {at(kMax),     at(kSum_),         at(kPositive),    kept ? at(kKept) : nullptr,
          at(kEntropy), at(kBestPositive), at(kBestNegative)};
}

// An fp32 number for the gradient of a scalar argument; data() is null where nobody needs it.
struct ScalarGrad {
  Tensor value;
  bool needed;

  ScalarGrad(const OptionalTensor& x, bool wanted, const Tensor& features) : needed(x && wanted) {
    value = needed ? at::zeros({}, f32(features)) : at::empty({0}, f32(features));
  }
  float* data() const { return needed ? value.mutable_data_ptr<float>() : nullptr; }
  Tensor like(const OptionalTensor& x) const {
    return needed ? value.to(x->scalar_type()).reshape(x->sizes()) : value;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss_fwd(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& labels,
    const OptionalTensor& row_weight, const OptionalTensor& col_weight, double label_smoothing,
    bool ignore_same_ids, int64_t directions, int64_t reduction, int64_t workspace_mb,
    c10::SymInt kept_panels, bool metrics) {
  const OptionalTensor no_bias;
  const Args args{
      "clip_loss", image,    text,   logit_scale, scale,      no_bias,         0.0,
      image_ids,   text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  clip_check(args, label_smoothing, directions, reduction);
  TORCH_CHECK_VALUE(kept_panels.expect_int() == 0, "clip_loss: kept_panels is ",
                    kept_panels.expect_int(), "; the CUDA kernels keep no similarity");
  const DeviceCall call(args);
  const int64_t n = args.n(), m = args.m();

  const auto options = f32(image);
  const bool smoothing = label_smoothing > 0.0;
  const Tensor losses = at::empty({n + m}, options);
  const Tensor loss = reduction == kNone ? losses : at::empty({}, options);
  const Tensor stats = at::empty({metrics     ? kMetricStats
                                  : smoothing ? kSmoothStats
                                              : kLossStats,
                                  n + m},
                                 options);
  const Tensor kept = at::empty({0}, options);
  const Tensor measured = at::empty({metrics ? kMetrics : 0}, options);
  if (call.empty()) {
    for (const Tensor* x : {&loss, &stats, &measured}) x->zero_();
    if (metrics) measured.slice(0, 6, 8).fill_(1.0);  // the perplexities of nothing
    return {loss, stats, kept, measured};
  }
  const bool sums_kept = smoothing || metrics;
  const Tensor scratch = call.scratch({}, metrics);
  check_launched(
      args.op, cuda::clip_forward(call.call, clip_options(directions, reduction, label_smoothing),
                                  stats_view(stats, 0, sums_kept), stats_view(stats, n, sums_kept),
                                  losses.mutable_data_ptr<float>(),
                                  reduction == kNone ? nullptr : loss.mutable_data_ptr<float>(),
                                  metrics ? measured.mutable_data_ptr<float>() : nullptr,
                                  scratch.mutable_data_ptr()));
  return {loss, stats, kept, measured};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_bwd(
    const Tensor& grad, const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
    double scale, const OptionalTensor& image_ids, const OptionalTensor& text_ids,
    const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, double label_smoothing, bool ignore_same_ids,
    int64_t directions, int64_t reduction, int64_t workspace_mb, const Tensor& stats, const Tensor&,
    int64_t needs) {
  const OptionalTensor no_bias;
  const Args args{
      "clip_loss", image,    text,   logit_scale, scale,      no_bias,         0.0,
      image_ids,   text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  clip_check(args, label_smoothing, directions, reduction);
  const int64_t n = args.n(), m = args.m();
  const bool smoothing = label_smoothing > 0.0;
  TORCH_CHECK_VALUE(grad.numel() == (reduction == kNone ? n + m : 1),
                    "clip_loss backward: the gradient has shape ", grad.sizes());
  TORCH_CHECK_VALUE(stats.dim() == 2 && stats.size(0) >= (smoothing ? kSmoothStats : kLossStats) &&
                        stats.size(1) == n + m && stats.scalar_type() == at::kFloat &&
                        stats.is_contiguous(),
                    "clip_loss backward: stats do not belong to these features");
  const DeviceCall call(args);

  const Tensor grad_image = grad_like(image, needs & kNeedImage);
  const Tensor grad_text = grad_like(text, needs & kNeedText);
  const ScalarGrad grad_scale(logit_scale, needs & kNeedScale, image);
  if (call.empty()) {
    return {grad_image.zero_(), grad_text.zero_(), grad_scale.like(logit_scale)};
  }
  const Tensor grads = as(grad, at::kFloat);
  ContrastiveGrads out;
  out.image = output(grad_image);
  out.text = output(grad_text);
  const Tensor scratch = call.scratch(out.pass());
  check_launched(
      args.op, cuda::clip_backward(call.call, clip_options(directions, reduction, label_smoothing),
                                   stats_view(stats, 0, smoothing), stats_view(stats, n, smoothing),
                                   grads.const_data_ptr<float>(), out, grad_scale.data(),
                                   scratch.mutable_data_ptr()));
  return {grad_image, grad_text, grad_scale.like(logit_scale)};
}

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
  DeviceCall call(args);

  const Tensor loss = at::empty({}, f32(image));
  const Tensor grad_image = formed_like(image, needs & kNeedImage);
  const Tensor grad_text = formed_like(text, needs & kNeedText);
  const Tensor sums = at::empty({2}, f32(image).dtype(at::kDouble));
  if (call.empty()) {
    for (const Tensor* x : {&loss, &grad_image, &grad_text, &sums}) x->zero_();
    return {loss, grad_image, grad_text, sums};
  }
  ContrastiveGrads out;
  out.image = output(grad_image);
  out.text = output(grad_text);
  out.f32 = call.call.dtype == DType::f16;
  if (directions == kTextToImage) {
    call.swap_sides();
    std::swap(out.image, out.text);
  }
  ContrastivePass pass = out.pass();
  pass.whole_columns = true;
  const Tensor scratch = call.scratch(pass);
  check_launched(
      args.op, cuda::clip_one_way(call.call, clip_options(kImageToText, reduction, label_smoothing),
                                  loss.mutable_data_ptr<float>(), out,
                                  sums.mutable_data_ptr<double>(), scratch.mutable_data_ptr()));
  return {loss, grad_image, grad_text, sums};
}

// The gradients that a forward formed, in the dtype of the inputs and complete.
struct Finished {
  Tensor image, text;

  Finished(const char* op, cuda::FormedGrads formed, const Tensor& formed_image,
           const Tensor& formed_text, at::ScalarType dtype, int64_t needs) {
    const bool wants[] = {(needs & kNeedImage) != 0, (needs & kNeedText) != 0};
    const auto options = formed_image.options().dtype(dtype);
    image = wants[0] ? at::empty(formed_image.sizes(), options) : at::empty({0}, options);
    text = wants[1] ? at::empty(formed_text.sizes(), options) : at::empty({0}, options);
    const Tensor factor = at::empty({}, options.dtype(at::kDouble));
    const auto pair = [](bool wanted, const Tensor& from, const Tensor& to) {
      return wanted ? cuda::FormedMatrix{from.const_data_ptr(), to.mutable_data_ptr(), to.numel()}
                    : cuda::FormedMatrix{};
    };
    check_launched(
        op, cuda::finish_formed(formed, pair(wants[0], formed_image, image),
                                pair(wants[1], formed_text, text),
                                feature_dtype(op, "the formed gradient", formed_image),
                                feature_dtype(op, "the gradient", image),
                                factor.mutable_data_ptr<double>(), current_stream(formed_image)));
  }
};

std::tuple<Tensor, Tensor, Tensor> clip_loss_one_way_bwd(const Tensor& grad,
                                                         const OptionalTensor& logit_scale,
                                                         double scale, const Tensor& formed_image,
                                                         const Tensor& formed_text,
                                                         const Tensor& sums, int64_t needs) {
  TORCH_CHECK_VALUE(grad.numel() == 1 && sums.numel() == 2 && sums.scalar_type() == at::kDouble,
                    "clip_loss backward: the gradient has shape ", grad.sizes());
  const c10::DeviceGuard guard(sums.device());
  const ScalarGrad grad_scale(logit_scale, needs & kNeedScale, formed_image);
  const Tensor value =
      logit_scale ? as(*logit_scale, at::kFloat) : at::full({}, scale, f32(formed_image));
  const Tensor grads = as(grad, at::kFloat);
  cuda::FormedGrads formed;
  formed.grad = grads.const_data_ptr<float>();
  formed.scale = value.const_data_ptr<float>();
  formed.sums = sums.const_data_ptr<double>();
  formed.divisor = formed.sums + 1;
  formed.scale_grad = grad_scale.data();
  const Finished out("clip_loss backward", formed, formed_image, formed_text,
                     formed_image.scalar_type(), needs);
  return {out.image, out.text, grad_scale.like(logit_scale)};
}

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
  const DeviceCall call(args);

  const auto options = f32(image);
  const Tensor loss = reduction == kNone ? at::empty({args.n()}, options) : at::empty({}, options);
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
  ContrastiveGrads out;
  out.image = output(grad_image);
  out.text = output(grad_text);
  out.f32 = call.call.dtype == DType::f16;
  const Tensor scratch = call.scratch(now ? out.pass() : ContrastivePass{}, metrics);
  float* value = loss.mutable_data_ptr<float>();
  check_launched(args.op, cuda::siglip_pass(call.call, static_cast<cuda::Reduction>(reduction),
                                            nullptr, reduction == kNone ? value : nullptr,
                                            reduction == kNone ? nullptr : value, out,
                                            now ? sums.mutable_data_ptr<double>() : nullptr,
                                            metrics ? measured.mutable_data_ptr<float>() : nullptr,
                                            scratch.mutable_data_ptr()));
  return {loss, grad_image, grad_text, sums, measured};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_loss_bwd(
    const Tensor& grad, const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
    double scale, const OptionalTensor& logit_bias, double bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction, int64_t workspace_mb,
    const Tensor& formed_image, const Tensor& formed_text, const Tensor& sums, int64_t needs) {
  const Args args{
      "siglip_loss", image,    text,   logit_scale, scale,      logit_bias,      bias,
      image_ids,     text_ids, labels, row_weight,  col_weight, ignore_same_ids, workspace_mb};
  check(args);
  check_choice(args.op, "reduction", reduction, kNone);
  TORCH_CHECK_VALUE(grad.numel() == (reduction == kNone ? args.n() : 1),
                    "siglip_loss backward: the gradient has shape ", grad.sizes());
  const DeviceCall call(args);
  const ScalarGrad grad_scale(logit_scale, needs & kNeedScale, image);
  const ScalarGrad grad_bias(logit_bias, needs & kNeedBias, image);
  if (call.empty()) {
    return {grad_like(image, needs & kNeedImage).zero_(),
            grad_like(text, needs & kNeedText).zero_(), grad_scale.like(logit_scale),
            grad_bias.like(logit_bias)};
  }
  const Tensor grads = as(grad, at::kFloat);
  Tensor now_image = formed_image, now_text = formed_text, now_sums = sums;
  cuda::FormedGrads formed;
  if (reduction == kNone) {
    now_image = formed_like(image, needs & kNeedImage);
    now_text = formed_like(text, needs & kNeedText);
    now_sums = at::empty({2}, f32(image).dtype(at::kDouble));
    ContrastiveGrads out;
    out.image = output(now_image);
    out.text = output(now_text);
    out.f32 = call.call.dtype == DType::f16;
    const Tensor scratch = call.scratch(out.pass());
    check_launched(
        args.op, cuda::siglip_pass(call.call, cuda::Reduction::none, grads.const_data_ptr<float>(),
                                   nullptr, nullptr, out, now_sums.mutable_data_ptr<double>(),
                                   nullptr, scratch.mutable_data_ptr()));
  } else {
    TORCH_CHECK_VALUE(
        sums.numel() == 2 && (!(needs & kNeedImage) || formed_image.sizes() == image.sizes()) &&
            (!(needs & kNeedText) || formed_text.sizes() == text.sizes()),
        "siglip_loss backward: the forward's gradients do not belong to these features");
    formed.grad = grads.const_data_ptr<float>();
  }
  formed.scale = call.call.scale;
  formed.sums = now_sums.const_data_ptr<double>();
  formed.row_weight = call.call.row_weight;
  formed.rows = args.n();
  formed.reduction = static_cast<cuda::Reduction>(reduction);
  formed.scale_grad = grad_scale.data();
  formed.bias_grad = grad_bias.data();
  const Finished out("siglip_loss backward", formed, now_image, now_text, image.scalar_type(),
                     needs);
  return {out.image, out.text, grad_scale.like(logit_scale), grad_bias.like(logit_bias)};
}

TORCH_LIBRARY_IMPL(VLM_LIBRARY, CUDA, m) {
  m.impl("clip_loss_fwd", clip_loss_fwd);
  m.impl("clip_loss_bwd", clip_loss_bwd);
  m.impl("clip_loss_one_way_fwd", clip_loss_one_way_fwd);
  m.impl("clip_loss_one_way_bwd", clip_loss_one_way_bwd);
  m.impl("siglip_loss_fwd", siglip_loss_fwd);
  m.impl("siglip_loss_bwd", siglip_loss_bwd);
}

}  // namespace
}  // namespace vlm
