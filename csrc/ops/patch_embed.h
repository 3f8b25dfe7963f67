// What the torch side of patch_embed shares: the registered ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace vlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bits of `needs`: the gradients that a backward is to form, in the order it returns them.
enum PatchEmbedNeed : int64_t {
  kNeedImages = 1,
  kNeedWeight = 2,
  kNeedBias = 4,
  kNeedPos = 8,
  kNeedPrefix = 16,
  kNeedNewline = 32,
};
constexpr int kPatchEmbedGrads = 6;

// The arguments of a forward, in the order of its schema, as parameters and as arguments. Without
// mean or std these are empty.
#define VLM_PATCH_EMBED_PARAMS                                                                  \
  const Tensor &images, const Tensor &weight, const OptionalTensor &bias,                       \
      const OptionalTensor &pos, const OptionalTensor &prefix, const OptionalTensor &newline,   \
      int64_t patch_height, int64_t patch_width, int64_t stride_height, int64_t stride_width,   \
      bool nhwc, bool yxc, at::ArrayRef<double> mean, at::ArrayRef<double> std, double rescale, \
      int64_t merge, int64_t temporal, bool pad_normalised
#define VLM_PATCH_EMBED_ARGS                                                            \
  images, weight, bias, pos, prefix, newline, patch_height, patch_width, stride_height, \
      stride_width, nhwc, yxc, mean, std, rescale, merge, temporal, pad_normalised

using PatchEmbedBwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using PatchEmbedFwd = Tensor(VLM_PATCH_EMBED_PARAMS);
using PatchEmbedBwd = PatchEmbedBwdResult(const Tensor& grad, VLM_PATCH_EMBED_PARAMS,
                                          int64_t needs);

}  // namespace vlm
