// Patch embedding: pixels -> tokens (ViT, Dosovitskiy et al. 2021). Torch-free: pointers, strides,
// sizes, scratch.
//
// A token is W x + b, x the pixels of its patch after (pixel * rescale - mean) / std. That is
// folded: W' = W * scale and b' = b - sum W' * shift of the raw pixels, with a scale and a shift
// for each channel, and b' of the W' as it is rounded for the products.
#pragma once

#include "vlm/types.h"

namespace vlm {

// Pixel (image, frame, channel, y, x) lies at the sum of the strides, in elements. Either x or the
// channel is innermost: column_stride == 1, or channel_stride == 1 and column_stride == channels.
struct PatchImages {
  const void* data = nullptr;
  bool bytes = true;  // uint8; else floating-point, of
  DType dtype = DType::f32;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t batch_stride = 0, frame_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;

  int64_t pixel_size() const { return bytes ? 1 : element_size(dtype); }
  bool interleaved() const { return column_stride != 1 || channels == 1; }
};

// Rows of E features.
struct TokenRows {
  const void* data = nullptr;  // null: none
  int64_t batch_stride = 0, row_stride = 0;
};

struct PatchEmbedInputs {
  PatchImages images;
  // A patch is `depth` frames of patch_height x patch_width pixels; there are
  // grid_frames x grid_height x grid_width of them in an image.
  int64_t depth = 1, patch_height = 0, patch_width = 0, stride_height = 0, stride_width = 0;
  int64_t grid_frames = 1, grid_height = 0, grid_width = 0;
  int64_t merge = 1;  // tokens run by blocks of merge x merge patches
  // (E, K) rows of `dtype`; columns run (channel, time, y, x), or (time, y, x, channel).
  const void* weight = nullptr;
  DType dtype = DType::f32;
  int64_t embed_dim = 0, weight_stride = 0;
  bool channels_last = false;    // of the weight's columns
  int64_t collapse = 1;          // times whose weights add up to that of a still image; else 1
  const float* scale = nullptr;  // (channels)
  const float* shift = nullptr;  // (channels), in raw pixels
  float centre = 0.f;            // of the shifts; a whole number where pixels are
  bool pad_normalised = false;   // pixels beyond an image are 0 after normalisation, else before
  const void* bias = nullptr;    // (E) of `dtype`, or null
  TokenRows pos;                 // (prefixed + patches) of `dtype`
  int64_t pos_prefixed = 0;      // rows of pos that belong to the prefix: 0 or prefix_count
  TokenRows prefix;              // (prefix_count)
  int64_t prefix_count = 0;
  const void* newline = nullptr;  // (E)

  int64_t patches() const { return grid_frames * grid_height * grid_width; }  // of an image
  int64_t depth_pixels() const { return patch_height * patch_width * images.channels; }
  int64_t columns() const { return depth * depth_pixels(); }  // of W', and so of a patch
  int64_t row_tokens() const { return grid_width + (newline ? 1 : 0); }
  int64_t tokens() const { return prefix_count + grid_frames * grid_height * row_tokens(); }
};

// Gradients, all contiguous; null: not needed. Those of the weight and of the images come in the
// dtype of what they belong to and at its strides, the others in fp32.
struct PatchEmbedGrads {
  void* images = nullptr;  // strides of PatchEmbedInputs::images; floating-point images only
  void* weight = nullptr;  // (E, K), rows of K elements
  float* bias = nullptr;   // (E)
  float* pos = nullptr;    // (batch or 1, pos_prefixed + patches, E)
  bool pos_batched = false;
  float* prefix = nullptr;  // (batch or 1, prefix_count, E)
  bool prefix_batched = false;
  float* newline = nullptr;  // (E)
};

namespace cpu {

int64_t patch_embed_scratch_bytes(const PatchEmbedInputs& in);
int64_t patch_embed_bwd_scratch_bytes(const PatchEmbedInputs& in, const PatchEmbedGrads& grads);

// out (batch, tokens, E) of in.dtype, contiguous.
void patch_embed_fwd(const PatchEmbedInputs& in, void* out, void* scratch);

// `grad` is that of out.
void patch_embed_bwd(const PatchEmbedInputs& in, const TokenRows& grad,
                     const PatchEmbedGrads& grads, void* scratch);

}  // namespace cpu
}  // namespace vlm
