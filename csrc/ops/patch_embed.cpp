// patch_embed: checks, allocation, and the factors that fold normalisation into the weight.
#include "ops/patch_embed.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/bind.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/workspace.h"
#include "vlm/patch_embed.h"

namespace vlm {
namespace {

constexpr const char* kOp = "patch_embed";

struct Args {
  const Tensor& images;
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& pos;
  const OptionalTensor& prefix;
  const OptionalTensor& newline;
  int64_t patch_height, patch_width, stride_height, stride_width;
  bool nhwc, yxc;
  at::ArrayRef<double> mean, std;
  double rescale;
  int64_t merge, temporal;
  bool pad_normalised;

  bool video() const { return images.dim() == 5; }
  int64_t batch() const { return images.size(0); }
  int64_t frames() const { return video() ? images.size(1) : 1; }
  int64_t channels() const { return images.size(nhwc ? -1 : -3); }
  int64_t height() const { return images.size(nhwc ? -3 : -2); }
  int64_t width() const { return images.size(nhwc ? -2 : -1); }
  int64_t depth() const { return video() ? temporal : 1; }  // frames of a patch
  int64_t grid_frames() const { return frames() / depth(); }
  int64_t grid_height() const { return grid(height(), patch_height, stride_height); }
  int64_t grid_width() const { return grid(width(), patch_width, stride_width); }
  int64_t patches() const { return grid_frames() * grid_height() * grid_width(); }
  int64_t prefixes() const { return prefix ? prefix->size(-2) : 0; }
  int64_t embed_dim() const { return weight.size(0); }
  int64_t tokens() const {
    return prefixes() + grid_frames() * grid_height() * (grid_width() + (newline ? 1 : 0));
  }

  static int64_t grid(int64_t size, int64_t patch, int64_t stride) {
    return (size - patch + stride - 1) / stride + 1;
  }
};

// --- checks ---

void check_pixels(const Tensor& images) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kByte || images.scalar_type() == at::kFloat ||
                       images.scalar_type() == at::kBFloat16 || images.scalar_type() == at::kHalf,
                   kOp, ": images are ", images.scalar_type(),
                   ", expected uint8, float32, bfloat16 or float16");
}

void check_images(const Args& a) {
  const char* still = a.nhwc ? "(B, H, W, C)" : "(B, C, H, W)";
  const char* video = a.nhwc ? "(B, F, H, W, C)" : "(B, F, C, H, W)";
  TORCH_CHECK_VALUE(a.images.dim() == 4 || a.images.dim() == 5, kOp, ": images have shape ",
                    a.images.sizes(), ", expected ", still, " or, for videos, ", video,
                    "; add a dimension with images[None]");
  check_pixels(a.images);
  TORCH_CHECK_VALUE(a.temporal >= 1 && a.merge >= 1, kOp, ": temporal is ", a.temporal,
                    " and merge ", a.merge, ", expected numbers from 1 on");
  TORCH_CHECK_VALUE(
      a.patch_height >= 1 && a.patch_width >= 1 && a.stride_height >= 1 && a.stride_width >= 1, kOp,
      ": patch_size is (", a.patch_height, ", ", a.patch_width, ") and stride (", a.stride_height,
      ", ", a.stride_width, "), expected numbers from 1 on");
  TORCH_CHECK_VALUE(a.height() >= a.patch_height && a.width() >= a.patch_width, kOp,
                    ": images are ", a.height(), " x ", a.width(), " pixels, smaller than a patch ",
                    "of ", a.patch_height, " x ", a.patch_width, " (images have shape ",
                    a.images.sizes(), " as ", a.video() ? video : still, "; layout is the other?)");
  TORCH_CHECK_VALUE(a.frames() % a.depth() == 0, kOp, ": videos have ", a.frames(),
                    " frames, expected a multiple of temporal = ", a.temporal,
                    "; repeat the last frame");
  TORCH_CHECK_VALUE(a.grid_height() % a.merge == 0 && a.grid_width() % a.merge == 0, kOp,
                    ": images are ", a.grid_height(), " x ", a.grid_width(),
                    " patches, which blocks of merge = ", a.merge, " do not cover; resize them");
}

void check_weight(const Args& a) {
  const Tensor& w = a.weight;
  feature_dtype(kOp, "weight", w);
  check_same_device(kOp, "weight", w, a.images);
  const int64_t c = a.channels(), t = a.temporal, h = a.patch_height, x = a.patch_width;
  bool fits = w.dim() == 2 && w.size(1) == t * c * h * x;
  if (!a.yxc && w.dim() == 4) fits = t == 1 && w.sizes().slice(1) == at::IntArrayRef({c, h, x});
  if (!a.yxc && w.dim() == 5) fits = w.sizes().slice(1) == at::IntArrayRef({c, t, h, x});
  TORCH_CHECK_VALUE(fits && w.size(0) >= 1, kOp, ": weight has shape ", w.sizes(),
                    ", expected (E, ", t * c * h * x, ") or as a convolution's (E, C = ", c,
                    t > 1 ? ", T = " + std::to_string(t) : std::string(), ", ", h, ", ", x,
                    ") for images of shape ", a.images.sizes(), " and k_order '",
                    a.yxc ? "yxc" : "cyx", "'");
  for (const auto& [name, values] : {std::pair{"mean", a.mean}, std::pair{"std", a.std}}) {
    TORCH_CHECK_VALUE(values.empty() || static_cast<int64_t>(values.size()) == c, kOp, ": ", name,
                      " has ", values.size(), " values, expected one for each of the ", c,
                      " channels");
    for (const double value : values) {
      TORCH_CHECK_VALUE(std::isfinite(value) && (value != 0.0 || name[0] == 'm'), kOp, ": ", name,
                        " holds ", value, ", expected finite numbers",
                        name[0] == 'm' ? "" : " other than 0");
    }
  }
  TORCH_CHECK_VALUE(std::isfinite(a.rescale) && a.rescale != 0.0, kOp, ": rescale is ", a.rescale,
                    ", expected a finite number other than 0");
}

void check_added(const Args& a, const char* name, const OptionalTensor& x, bool fits,
                 const std::string& expected) {
  if (!x) return;
  check_same_device(kOp, name, *x, a.images);
  TORCH_CHECK_TYPE(at::isFloatingType(x->scalar_type()), kOp, ": ", name, " is ", x->scalar_type(),
                   ", expected a floating-point tensor");
  TORCH_CHECK_VALUE(fits, kOp, ": ", name, " has shape ", x->sizes(), ", expected ", expected);
}

// (rows, E), or (1 or B, rows, E)
bool is_rows(const Args& a, const OptionalTensor& x) {
  return x && (x->dim() == 2 || (x->dim() == 3 && (x->size(0) == 1 || x->size(0) == a.batch()))) &&
         x->size(-1) == a.embed_dim();
}

void check(const Args& a) {
  check_images(a);
  check_weight(a);
  const std::string e = std::to_string(a.embed_dim());
  const auto vector = [&](const OptionalTensor& x) {
    return x && x->dim() == 1 && x->size(0) == a.embed_dim();
  };
  check_added(a, "bias", a.bias, vector(a.bias), "(" + e + ",)");
  check_added(a, "newline", a.newline, vector(a.newline), "(" + e + ",)");
  check_added(a, "prefix", a.prefix, is_rows(a, a.prefix),
              "(n, " + e + ") or (1 or B, n, " + e + ")");
  const std::string l = std::to_string(a.patches());
  check_added(a, "pos", a.pos,
              is_rows(a, a.pos) &&
                  (a.pos->size(-2) == a.patches() || a.pos->size(-2) == a.prefixes() + a.patches()),
              "(L, " + e + ") or (1 or B, L, " + e + "), L = " + l + " patches or " + l +
                  " and the prefix");
  TORCH_CHECK_VALUE(!a.newline || a.merge == 1, kOp, ": newline came with merge = ", a.merge,
                    "; blocks of tokens have no rows");
}

// --- the call, as the kernels see it ---

// Images whose pixels or channels lie together: as they are wherever they do.
Tensor readable(const Args& a) {
  const int64_t c = a.nhwc ? a.images.dim() - 1 : a.images.dim() - 3;
  const int64_t x = a.images.dim() - (a.nhwc ? 2 : 1);
  const auto& im = a.images;
  const bool planar = im.stride(x) == 1;
  const bool interleaved = im.stride(c) == 1 && im.stride(x) == im.size(c);
  bool distinct = true;  // a gradient could not be written to pixels that are one
  for (int64_t i = 0; i < im.dim(); ++i)
    distinct = distinct && (im.stride(i) > 0 || im.size(i) == 1);
  return distinct && (planar || interleaved) ? im : im.contiguous();
}

TokenRows token_rows(const Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 3 && x.size(0) > 1 ? x.stride(0) : 0, x.stride(-2)};
}

// What the kernels take, and the memory it points to.
struct Call {
  PatchEmbedInputs in;

  explicit Call(const Args& a) : images_(readable(a)) {
    const int64_t n = images_.dim();
    PatchImages& im = in.images;
    im.data = images_.const_data_ptr();
    im.bytes = images_.scalar_type() == at::kByte;
    if (!im.bytes) im.dtype = feature_dtype(kOp, "images", images_);
    im.batch = a.batch();
    im.channels = a.channels();
    im.height = a.height();
    im.width = a.width();
    im.batch_stride = images_.stride(0);
    im.frame_stride = a.video() ? images_.stride(1) : 0;
    im.channel_stride = images_.stride(a.nhwc ? n - 1 : n - 3);
    im.row_stride = images_.stride(a.nhwc ? n - 3 : n - 2);
    im.column_stride = images_.stride(a.nhwc ? n - 2 : n - 1);
    if (im.width == 1) im.column_stride = im.channel_stride == 1 ? im.channels : 1;
    if (im.channels == 1) im.column_stride = 1, im.channel_stride = 1;
    in.depth = a.depth();
    in.patch_height = a.patch_height;
    in.patch_width = a.patch_width;
    in.stride_height = a.stride_height;
    in.stride_width = a.stride_width;
    in.grid_frames = a.grid_frames();
    in.grid_height = a.grid_height();
    in.grid_width = a.grid_width();
    in.merge = a.merge;

    weight_ = a.weight.reshape({a.embed_dim(), -1}).contiguous();
    in.weight = weight_.const_data_ptr();
    in.dtype = feature_dtype(kOp, "weight", weight_);
    in.embed_dim = a.embed_dim();
    in.weight_stride = weight_.size(1);
    in.channels_last = a.yxc;
    in.collapse = a.video() ? 1 : a.temporal;
    const double rescale = im.bytes ? a.rescale : 1.0;
    for (int64_t c = 0; c < im.channels; ++c) {
      scale_.push_back(static_cast<float>(rescale / (a.std.empty() ? 1.0 : a.std[c])));
      shift_.push_back(static_cast<float>((a.mean.empty() ? 0.0 : a.mean[c]) / rescale));
    }
    for (const float shift : shift_) in.centre += shift / static_cast<float>(shift_.size());
    if (im.bytes) in.centre = std::round(std::clamp(in.centre, 0.f, 255.f));
    in.scale = scale_.data();
    in.shift = shift_.data();
    in.pad_normalised = a.pad_normalised;

    const auto data = [&](const OptionalTensor& x, Tensor& held) -> const void* {
      if (!x) return nullptr;
      held = rows_contiguous(x->to(a.weight.scalar_type()));
      return held.const_data_ptr();
    };
    in.bias = data(a.bias, bias_);
    in.newline = data(a.newline, newline_);
    if (data(a.pos, pos_)) in.pos = token_rows(pos_);
    in.prefix_count = a.prefixes();
    if (data(a.prefix, prefix_)) in.prefix = token_rows(prefix_);
    if (a.pos && a.pos->size(-2) > a.patches()) in.pos_prefixed = a.prefixes();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Tensor& images() const { return images_; }

 private:
  Tensor images_, weight_, bias_, pos_, prefix_, newline_;
  std::vector<float> scale_, shift_;
};

[[maybe_unused]] Tensor patch_embed_fwd(VLM_PATCH_EMBED_PARAMS) {
  const Args a{VLM_PATCH_EMBED_ARGS};
  check(a);
  const Call call(a);
  const Tensor out = at::empty({a.batch(), a.tokens(), a.embed_dim()}, weight.options());
  if (out.numel() == 0) return out;
  const Tensor scratch = take_workspace({cpu::patch_embed_scratch_bytes(call.in)}, at::kByte);
  cpu::patch_embed_fwd(call.in, out.mutable_data_ptr(), scratch.mutable_data_ptr());
  return out;
}

// An fp32 gradient of `x`, with a batch dimension where `x` has one.
struct RowGrad {
  Tensor grad;
  float* data = nullptr;
  bool batched = false;

  RowGrad(const OptionalTensor& x, bool needed, const Tensor& like) {
    if (!x || !needed) return;
    grad = at::zeros(x->sizes(), like.options().dtype(at::kFloat));
    data = grad.mutable_data_ptr<float>();
    batched = x->dim() == 3 && x->size(0) > 1;
  }
  Tensor as(const OptionalTensor& x, const Tensor& like) const {
    return grad.defined() ? grad.to(x->scalar_type()) : at::empty({0}, like.options());
  }
};

// The gradient that lies as torch's own would: without the gaps of a view.
Tensor as_like(const Tensor& grad, const Tensor& images) {
  if (grad.strides() == images.strides() && images.is_non_overlapping_and_dense()) return grad;
  return at::empty_like(images).copy_(grad);
}

// -> gradients in the order of PatchEmbedNeed; (0,) where not needed.
[[maybe_unused]] PatchEmbedBwdResult patch_embed_bwd(const Tensor& grad, VLM_PATCH_EMBED_PARAMS,
                                                     int64_t needs) {
  const Args a{VLM_PATCH_EMBED_ARGS};
  check(a);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({a.batch(), a.tokens(), a.embed_dim()}) &&
                        grad.scalar_type() == weight.scalar_type(),
                    kOp, " backward: the gradient has shape ", grad.sizes(),
                    ", which does not belong to these images");
  const bool need_images = needs & kNeedImages && images.scalar_type() != at::kByte;
  const Call call(a);
  const Tensor nothing = at::empty({0}, weight.options());
  // Strides of the images as the kernel reads them.
  const Tensor grad_images =
      need_images
          ? at::empty_strided(call.images().sizes(), call.images().strides(), images.options())
          : nothing;
  const Tensor grad_weight =
      needs & kNeedWeight ? at::empty(weight.sizes(), weight.options()) : nothing;
  const RowGrad of_bias(bias, needs & kNeedBias, grad), of_pos(pos, needs & kNeedPos, grad),
      of_prefix(prefix, needs & kNeedPrefix, grad), of_newline(newline, needs & kNeedNewline, grad);
  PatchEmbedGrads grads;
  if (need_images) grads.images = grad_images.mutable_data_ptr();
  if (needs & kNeedWeight) grads.weight = grad_weight.mutable_data_ptr();
  grads.bias = of_bias.data;
  grads.pos = of_pos.data;
  grads.pos_batched = of_pos.batched;
  grads.prefix = of_prefix.data;
  grads.prefix_batched = of_prefix.batched;
  grads.newline = of_newline.data;
  if (grad.numel() == 0) {
    if (grads.weight) grad_weight.zero_();
  } else {
    const Tensor g = rows_contiguous(grad);
    const Tensor scratch =
        take_workspace({cpu::patch_embed_bwd_scratch_bytes(call.in, grads)}, at::kByte);
    cpu::patch_embed_bwd(call.in, {g.const_data_ptr(), g.stride(0), g.stride(1)}, grads,
                         scratch.mutable_data_ptr());
  }
  return {need_images ? as_like(grad_images, images) : nothing,
          grad_weight,
          of_bias.as(bias, grad),
          of_pos.as(pos, grad),
          of_prefix.as(prefix, grad),
          of_newline.as(newline, grad)};
}

#define VLM_PATCH_EMBED_SCHEMA                                                                    \
  "Tensor images, Tensor weight, Tensor? bias, Tensor? pos, Tensor? prefix, Tensor? newline, "    \
  "int patch_height, int patch_width, int stride_height, int stride_width, bool nhwc, bool yxc, " \
  "float[] mean, float[] std, float rescale, int merge, int temporal, bool pad_normalised"

TORCH_LIBRARY_FRAGMENT(VLM_LIBRARY, m) {
  m.def("patch_embed_fwd(" VLM_PATCH_EMBED_SCHEMA ") -> Tensor");
  m.def("patch_embed_bwd(Tensor grad, " VLM_PATCH_EMBED_SCHEMA
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#ifndef VLM_EMULATED  // there the CPU key belongs to the emulated kernels
TORCH_LIBRARY_IMPL(vlm_kernels, CPU, m) {
  m.impl("patch_embed_fwd", patch_embed_fwd);
  m.impl("patch_embed_bwd", patch_embed_bwd);
}
#endif

}  // namespace

void bind_patch_embed(pybind11::module_& m) {
  bind_op<PatchEmbedFwd>(m, "patch_embed_fwd");
  bind_op<PatchEmbedBwd>(m, "patch_embed_bwd");
}

}  // namespace vlm
