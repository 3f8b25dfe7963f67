// clip_loss and siglip_loss with gradients, eager: autograd nodes around the registered ops. In C++
// since a Python autograd.Function costs more than the kernels of a small batch; torch.compile and
// Triton keep those of vlm_kernels/ops/contrastive.py.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/graph_task.h>

#include <vector>

#include "ops/autograd.h"
#include "ops/bind.h"
#include "ops/contrastive.h"
#include "ops/ops.h"

namespace vlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Everything but features, scale and bias, in the order of the schemas.
struct Options {
  double scale, bias;
  const OptionalTensor &image_ids, &text_ids, &labels, &row_weight, &col_weight;
  double label_smoothing;
  bool ignore_same_ids;
  int64_t directions, reduction, workspace_mb;
  c10::SymInt kept_panels = 0;
  Tensor* metrics = nullptr;  // where they go, null if nobody asked: no output of the node
};

// What comes back in the backward: tensors in this order, after them the kernels' results.
enum Saved { kImage, kText, kScale, kBias, kImageIds, kTextIds, kLabels, kRow, kCol, kResults };
enum Number { kScaleValue, kBiasValue, kSmoothing };
enum Integer { kIgnoreSameIds, kDirections, kReduction, kWorkspaceMb, kDType };

int64_t wanted(const Tensor& image, const Tensor& text, const OptionalTensor& scale,
               const OptionalTensor& bias) {
  return kNeedImage * image.requires_grad() + kNeedText * text.requires_grad() +
         kNeedScale * (scale && scale->requires_grad()) +
         kNeedBias * (bias && bias->requires_grad());
}

variable_list inputs(const Tensor& image, const Tensor& text, const OptionalTensor& scale,
                     const OptionalTensor& bias, const Options& o) {
  return {image,
          text,
          or_undefined(scale),
          or_undefined(bias),
          or_undefined(o.image_ids),
          or_undefined(o.text_ids),
          or_undefined(o.labels),
          or_undefined(o.row_weight),
          or_undefined(o.col_weight)};
}

void save(AutogradContext* ctx, const Options& o, at::ScalarType dtype, variable_list tensors,
          std::initializer_list<Tensor> results) {
  tensors.resize(kResults);
  tensors.insert(tensors.end(), results);
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["numbers"] = std::vector<double>{o.scale, o.bias, o.label_smoothing};
  ctx->saved_data["integers"] = std::vector<int64_t>{o.ignore_same_ids, o.directions, o.reduction,
                                                     o.workspace_mb, static_cast<int64_t>(dtype)};
}

// A backward, seen from the node: what was saved, and which gradients this pass is to find.
struct Backward {
  const char* op;
  variable_list saved;
  std::vector<double> numbers;
  std::vector<int64_t> integers;
  int64_t needs = 0;

  Backward(const char* name, AutogradContext* ctx)
      : op(name),
        saved(ctx->get_saved_variables()),
        numbers(ctx->saved_data["numbers"].toDoubleVector()),
        integers(ctx->saved_data["integers"].toIntVector()) {
    size_t edge = 0;
    for (const int i : {kImage, kText, kScale, kBias}) {
      if (i >= kScale && !saved[i].defined()) continue;  // a number has no edge
      if (ctx->needs_input_grad(edge++)) needs |= int64_t{1} << i;
    }
  }

  const Tensor& result(int i) const { return saved[kResults + i]; }
  OptionalTensor optional(Saved i) const { return or_none(saved[i]); }

  variable_list grads(Tensor image, Tensor text, Tensor scale, Tensor bias) const;
};

variable_list Backward::grads(Tensor image, Tensor text, Tensor scale, Tensor bias) const {
  variable_list all{std::move(image), std::move(text), std::move(scale), std::move(bias), Tensor()};
  for (const int i : {kImage, kText, kScale, kBias}) {
    if (!(needs >> i & 1)) all[i] = Tensor();
  }
  return once_differentiable(std::move(all), saved, op);
}

// Whether the forward's gradients may be overwritten: plain CPU tensors, no backward after this.
bool may_overwrite([[maybe_unused]] const Tensor& grad, [[maybe_unused]] const Tensor& formed) {
#ifdef VLM_EMULATED  // CPU tensors, but by the rules of CUDA
  return false;
#else
  return grad.is_cpu() && !torch::autograd::get_current_graph_task_keep_graph() &&
         !at::isTensorSubclassLike(grad) && !at::isTensorSubclassLike(formed);
#endif
}

struct ClipLossFn : Function<ClipLossFn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& image, const Tensor& text,
                        const OptionalTensor& scale, const OptionalTensor& bias, const Options& o) {
    static const auto op = op_handle<ClipLossFwd>("clip_loss_fwd");
    const BelowAutograd guard;
    auto [loss, stats, kept, measured] =
        op.call(image, text, scale, o.scale, o.image_ids, o.text_ids, o.labels, o.row_weight,
                o.col_weight, o.label_smoothing, o.ignore_same_ids, o.directions, o.reduction,
                o.workspace_mb, o.kept_panels, o.metrics != nullptr);
    save(ctx, o, image.scalar_type(), inputs(image, text, scale, bias, o), {stats, kept});
    if (o.metrics) *o.metrics = measured;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto op = op_handle<ClipLossBwd>("clip_loss_bwd");
    const Backward b("clip_loss", ctx);
    Tensor image, text, scale, bias;
    {
      const BelowAutograd guard;
      if (b.needs & (kNeedImage | kNeedText | kNeedScale)) {
        std::tie(image, text, scale) =
            op.call(grad[0], b.saved[kImage], b.saved[kText], b.optional(kScale),
                    b.numbers[kScaleValue], b.optional(kImageIds), b.optional(kTextIds),
                    b.optional(kLabels), b.optional(kRow), b.optional(kCol), b.numbers[kSmoothing],
                    b.integers[kIgnoreSameIds], b.integers[kDirections], b.integers[kReduction],
                    b.integers[kWorkspaceMb], b.result(0), b.result(1), b.needs);
      }
      // no softmax depends on the bias
      if (b.needs & kNeedBias) bias = at::zeros_like(b.saved[kBias]);
    }
    return b.grads(image, text, scale, bias);
  }
};

// One direction, its gradients formed in the forward: 6 N M D instead of 8.
struct ClipLossOneWayFn : Function<ClipLossOneWayFn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& image, const Tensor& text,
                        const OptionalTensor& scale, const OptionalTensor& bias, const Options& o) {
    static const auto op = op_handle<ClipLossOneWayFwd>("clip_loss_one_way_fwd");
    const BelowAutograd guard;
    const int64_t needs = wanted(image, text, scale, bias) & ~kNeedBias;
    auto [loss, formed_image, formed_text, sums] = op.call(
        image, text, scale, o.scale, o.image_ids, o.text_ids, o.labels, o.row_weight, o.col_weight,
        o.label_smoothing, o.ignore_same_ids, o.directions, o.reduction, o.workspace_mb, needs);
    const variable_list needed{Tensor(), Tensor(), or_undefined(scale), or_undefined(bias)};
    save(ctx, o, image.scalar_type(), needed, {formed_image, formed_text, sums});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto op = op_handle<ClipLossOneWayBwd>("clip_loss_one_way_bwd");
    const Backward b("clip_loss", ctx);
    Tensor image, text, scale, bias;
    {
      const BelowAutograd guard;
      const auto run = [&](const auto& bwd) {
        return bwd(grad[0], b.optional(kScale), b.numbers[kScaleValue], b.result(0), b.result(1),
                   b.result(2), b.needs);
      };
      std::tie(image, text, scale) =
          may_overwrite(grad[0], b.result(2))
              ? run(clip_loss_one_way_bwd_in_place)
              : run([&](const auto&... args) { return op.call(args...); });
      const auto dtype = static_cast<at::ScalarType>(b.integers[kDType]);
      image = image.to(dtype);
      text = text.to(dtype);
      if (b.needs & kNeedBias) bias = at::zeros_like(b.saved[kBias]);
    }
    return b.grads(image, text, scale, bias);
  }
};

struct SiglipLossFn : Function<SiglipLossFn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& image, const Tensor& text,
                        const OptionalTensor& scale, const OptionalTensor& bias, const Options& o) {
    static const auto op = op_handle<SiglipLossFwd>("siglip_loss_fwd");
    const BelowAutograd guard;
    const int64_t needs = wanted(image, text, scale, bias);
    auto [loss, formed_image, formed_text, sums, measured] = op.call(
        image, text, scale, o.scale, bias, o.bias, o.image_ids, o.text_ids, o.labels, o.row_weight,
        o.col_weight, o.ignore_same_ids, o.reduction, o.workspace_mb, needs, o.metrics != nullptr);
    save(ctx, o, image.scalar_type(), inputs(image, text, scale, bias, o),
         {formed_image, formed_text, sums});
    if (o.metrics) *o.metrics = measured;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto op = op_handle<SiglipLossBwd>("siglip_loss_bwd");
    const Backward b("siglip_loss", ctx);
    Tensor image, text, scale, bias;
    {
      const BelowAutograd guard;
      const auto run = [&](const auto& bwd) {
        return bwd(grad[0], b.saved[kImage], b.saved[kText], b.optional(kScale),
                   b.numbers[kScaleValue], b.optional(kBias), b.numbers[kBiasValue],
                   b.optional(kImageIds), b.optional(kTextIds), b.optional(kLabels),
                   b.optional(kRow), b.optional(kCol), b.integers[kIgnoreSameIds],
                   b.integers[kReduction], b.integers[kWorkspaceMb], b.result(0), b.result(1),
                   b.result(2), b.needs);
      };
      std::tie(image, text, scale, bias) =
          may_overwrite(grad[0], b.result(2))
              ? run(siglip_loss_bwd_in_place)
              : run([&](const auto&... args) { return op.call(args...); });
    }
    return b.grads(image, text, scale, bias);
  }
};

std::tuple<Tensor, Tensor> clip_loss(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& logit_bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, double label_smoothing, bool ignore_same_ids,
    int64_t directions, int64_t reduction, int64_t workspace_mb, const c10::SymInt& kept_panels,
    bool return_metrics) {
  refuse_transforms("clip_loss");
  Tensor metrics;
  Options options{scale,      0.0,          image_ids,       text_ids,        labels,
                  row_weight, col_weight,   label_smoothing, ignore_same_ids, directions,
                  reduction,  workspace_mb, kept_panels};
  if (return_metrics) options.metrics = &metrics;
  const Tensor loss = ClipLossFn::apply(image, text, logit_scale, logit_bias, options);
  return {loss, metrics};
}

Tensor clip_loss_one_way(const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale,
                         double scale, const OptionalTensor& logit_bias,
                         const OptionalTensor& image_ids, const OptionalTensor& text_ids,
                         const OptionalTensor& labels, const OptionalTensor& row_weight,
                         const OptionalTensor& col_weight, double label_smoothing,
                         bool ignore_same_ids, int64_t directions, int64_t reduction,
                         int64_t workspace_mb) {
  refuse_transforms("clip_loss");
  const Options options{scale,           0.0,        image_ids,  text_ids,
                        labels,          row_weight, col_weight, label_smoothing,
                        ignore_same_ids, directions, reduction,  workspace_mb};
  return ClipLossOneWayFn::apply(image, text, logit_scale, logit_bias, options);
}

std::tuple<Tensor, Tensor> siglip_loss(
    const Tensor& image, const Tensor& text, const OptionalTensor& logit_scale, double scale,
    const OptionalTensor& logit_bias, double bias, const OptionalTensor& image_ids,
    const OptionalTensor& text_ids, const OptionalTensor& labels, const OptionalTensor& row_weight,
    const OptionalTensor& col_weight, bool ignore_same_ids, int64_t reduction, int64_t workspace_mb,
    bool return_metrics) {
  refuse_transforms("siglip_loss");
  Tensor metrics;
  Options options{scale,      bias,        image_ids, text_ids,        labels,
                  row_weight, col_weight,  0.0,       ignore_same_ids, kImageToText | kTextToImage,
                  reduction,  workspace_mb};
  if (return_metrics) options.metrics = &metrics;
  const Tensor loss = SiglipLossFn::apply(image, text, logit_scale, logit_bias, options);
  return {loss, metrics};
}

}  // namespace

void bind_contrastive_autograd(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("clip_loss", &clip_loss, no_gil);
  m.def("clip_loss_one_way", &clip_loss_one_way, no_gil);
  m.def("siglip_loss", &siglip_loss, no_gil);
}

}  // namespace vlm
