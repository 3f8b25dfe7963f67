// The gradients of patch_embed_fwd: one node at its Autograd key, as attention's.
#include <torch/library.h>

#include <vector>

#include "ops/autograd.h"
#include "ops/bind.h"
#include "ops/patch_embed.h"

namespace vlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Every argument that has no gradient.
struct Options {
  int64_t patch_height, patch_width, stride_height, stride_width;
  bool nhwc, yxc;
  at::ArrayRef<double> mean, std;
  double rescale;
  int64_t merge, temporal;
  bool pad_normalised;
};

struct PatchEmbedFn : Function<PatchEmbedFn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& images, const Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& pos,
                        const OptionalTensor& prefix, const OptionalTensor& newline,
                        const Options& o) {
    static const auto op = op_handle<PatchEmbedFwd>("patch_embed_fwd");
    const BelowAutograd guard;
    ctx->save_for_backward({images, weight, or_undefined(bias), or_undefined(pos),
                            or_undefined(prefix), or_undefined(newline)});
    ctx->saved_data["mean"] = o.mean.vec();
    ctx->saved_data["std"] = o.std.vec();
    ctx->saved_data["rescale"] = o.rescale;
    ctx->saved_data["integers"] = std::vector<int64_t>{
        o.patch_height, o.patch_width, o.stride_height, o.stride_width,  o.nhwc,
        o.yxc,          o.merge,       o.temporal,      o.pad_normalised};
    return op.call(images, weight, bias, pos, prefix, newline, o.patch_height, o.patch_width,
                   o.stride_height, o.stride_width, o.nhwc, o.yxc, o.mean, o.std, o.rescale,
                   o.merge, o.temporal, o.pad_normalised);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto op = op_handle<PatchEmbedBwd>("patch_embed_bwd");
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads(kPatchEmbedGrads + 1);  // one for the options
    int64_t needs = 0;
    size_t edge = 0;
    for (int i = 0; i < kPatchEmbedGrads; ++i) {
      if (!saved[i].defined()) continue;  // no tensor, no edge
      if (ctx->needs_input_grad(edge++)) needs |= int64_t{1} << i;
    }
    if (needs == 0 || !grad[0].defined()) return grads;
    const auto mean = ctx->saved_data["mean"].toDoubleVector();
    const auto std = ctx->saved_data["std"].toDoubleVector();
    const auto i = ctx->saved_data["integers"].toIntVector();
    {
      const BelowAutograd guard;
      std::tie(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]) =
          op.call(grad[0], saved[0], saved[1], or_none(saved[2]), or_none(saved[3]),
                  or_none(saved[4]), or_none(saved[5]), i[0], i[1], i[2], i[3], i[4], i[5], mean,
                  std, ctx->saved_data["rescale"].toDouble(), i[6], i[7], i[8], needs);
    }
    for (int g = 0; g < kPatchEmbedGrads; ++g) {
      if (!(needs >> g & 1)) grads[g] = Tensor();
    }
    return once_differentiable(std::move(grads), saved, "patch_embed");
  }
};

Tensor patch_embed_fwd(VLM_PATCH_EMBED_PARAMS) {
  static const auto op = op_handle<PatchEmbedFwd>("patch_embed_fwd");
  const Tensor* const given[kPatchEmbedGrads] = {&images,
                                                 &weight,
                                                 bias ? &*bias : nullptr,
                                                 pos ? &*pos : nullptr,
                                                 prefix ? &*prefix : nullptr,
                                                 newline ? &*newline : nullptr};
  bool needed = false;
  for (const Tensor* x : given) {
    if (!x) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(
        !x->_fw_grad(0).defined(),
        "patch_embed has no forward-mode derivative (jvp, jacfwd); use reverse mode, backward() or "
        "torch.autograd.grad, or backend='reference'");
    needed = needed || x->requires_grad();
  }
  if (!needed || !c10::GradMode::is_enabled()) {
    const BelowAutograd guard;
    return op.call(VLM_PATCH_EMBED_ARGS);
  }
  refuse_transforms("patch_embed");
  const Options options{patch_height, patch_width, stride_height, stride_width,
                        nhwc,         yxc,         mean,          std,
                        rescale,      merge,       temporal,      pad_normalised};
  return PatchEmbedFn::apply(images, weight, bias, pos, prefix, newline, options);
}

TORCH_LIBRARY_IMPL(VLM_LIBRARY, Autograd, m) { m.impl("patch_embed_fwd", patch_embed_fwd); }

}  // namespace
}  // namespace vlm
