// What the forward and the backward of patch embedding share: patches as rows of an operand, the
// folded weight, and where tokens lie. T is the type the products run in, float or bf16_t.
//
// The columns of an operand run as the pixels lie in memory: (time, y, x, channel) of interleaved
// images, else (time, channel, y, x). The weight follows.
#pragma once

#include "cpu/matmul.h"
#include "cpu/pack.h"
#include "vlm/patch_embed.h"

namespace vlm::cpu::VLM_ISA {

typedef uint8_t vb __attribute__((vector_size(16)));

// Sixteen pixels.
struct Bytes {
  static constexpr int64_t kSize = 1;
  VLM_INLINE vf read(const char* p) { return convert<vf>(convert<vi>(load_as<vb>(p))); }
};
template <DType kType>
struct Floats {
  static constexpr int64_t kSize = element_size(kType);
  VLM_INLINE vf read(const char* p) { return to_f32(p, kType); }
};

VLM_INLINE void put(float* to, vf x) { store(to, x); }
VLM_INLINE void put(bf16_t* to, vf x) { store(to, to_bf16_native(x)); }

// Some of an image's pixels may lie beyond it: those of the last column of patches on the right
// (1), of the last row at the bottom (2), of the corner (3).
constexpr int kPaddings = 4;

struct Token {
  int64_t image, patch;  // in the order of the tokens
  int64_t frame, y, x;   // of the patch, in patches
};

VLM_INLINE Token token_at(const PatchEmbedInputs& in, int64_t index) {
  Token t;
  t.image = index / in.patches();
  t.patch = index % in.patches();
  const int64_t area = in.grid_height * in.grid_width;
  t.frame = t.patch / area;
  const int64_t i = t.patch % area, m = in.merge;
  if (m == 1) {
    t.y = i / in.grid_width;
    t.x = i % in.grid_width;
  } else {
    const int64_t block = i / (m * m), inner = i % (m * m), across = in.grid_width / m;
    t.y = block / across * m + inner / m;
    t.x = block % across * m + inner % m;
  }
  return t;
}

// Its row of the output.
VLM_INLINE int64_t token_row(const PatchEmbedInputs& in, const Token& t) {
  const int64_t inside =
      in.newline ? (t.frame * in.grid_height + t.y) * in.row_tokens() + t.x : t.patch;
  return t.image * in.tokens() + in.prefix_count + inside;
}

VLM_INLINE int padding_of(const PatchEmbedInputs& in, const Token& t) {
  const bool right = t.x * in.stride_width + in.patch_width > in.images.width;
  const bool bottom = t.y * in.stride_height + in.patch_height > in.images.height;
  return (right ? 1 : 0) + (bottom ? 2 : 0);
}

VLM_INLINE bool is_padded(const PatchEmbedInputs& in) {
  return padding_of(in, {0, 0, 0, in.grid_height - 1, in.grid_width - 1}) != 0;
}

// Rows of pixels that lie together in a patch: `length` pixels each.
struct Runs {
  int64_t channels, length;  // runs of a row of an image, one after the other
  int64_t pixels_x;          // elements from a column of the image to the next

  explicit Runs(const PatchEmbedInputs& in)
      : channels(in.images.interleaved() ? 1 : in.images.channels),
        length(in.patch_width * (in.images.interleaved() ? in.images.channels : 1)),
        pixels_x(in.images.interleaved() ? in.images.channels : 1) {}
};

// f(first column of the run in the operand, offset of its first pixel, pixels inside the image) for
// each run of a patch.
template <class F>
VLM_INLINE void for_runs(const PatchEmbedInputs& in, const Token& t, const F& f) {
  const PatchImages& im = in.images;
  const Runs runs(in);
  const int64_t x = t.x * in.stride_width, y = t.y * in.stride_height;
  const int64_t inside = min(in.patch_width, im.width - x) * runs.pixels_x;
  int64_t column = 0;
  for (int64_t d = 0; d < in.depth; ++d) {
    for (int64_t c = 0; c < runs.channels; ++c) {
      int64_t at = t.image * im.batch_stride + (t.frame * in.depth + d) * im.frame_stride +
                   c * im.channel_stride + y * im.row_stride + x * im.column_stride;
      for (int64_t r = 0; r < in.patch_height; ++r) {
        f(column, at, y + r < im.height ? inside : 0);
        column += runs.length;
        at += im.row_stride;
      }
    }
  }
}

// Leading dimension of patches as rows: vectors may be written past the end of one.
template <class T>
VLM_INLINE int64_t patch_ld(const PatchEmbedInputs& in) {
  return round_up(in.columns(), kLanes) + 2 * kLanes;
}

// The end of the images' memory: vectors must not be read past it.
VLM_INLINE const char* images_end(const PatchEmbedInputs& in) {
  const PatchImages& im = in.images;
  const int64_t last = (im.batch - 1) * im.batch_stride +
                       (in.grid_frames * in.depth - 1) * im.frame_stride +
                       (im.channels - 1) * im.channel_stride + (im.height - 1) * im.row_stride +
                       (im.width - 1) * im.column_stride;
  return static_cast<const char*>(im.data) + (last + 1) * im.pixel_size();
}

// The pixels of a patch less in.centre, those beyond the image as padding says, and 0 up to the
// next even column. Centred pixels lose nothing in T, and their sums cancel less against the bias.
template <class T, class Pixels>
VLM_INLINE void gather_patch(const PatchEmbedInputs& in, const Token& t, const char* end, T* row) {
  constexpr int64_t kSize = Pixels::kSize;
  const char* const data = static_cast<const char*>(in.images.data);
  const int64_t length = Runs(in).length;
  const vf centre = broadcast(in.centre);
  for_runs(in, t, [&](int64_t column, int64_t at, int64_t inside) __attribute__((always_inline)) {
    const char* p = data + at * kSize;
    T* const to = row + column;
    if (inside == length && p + round_up(length, kLanes) * kSize <= end) {
      for (int64_t i = 0; i < length; i += kLanes)
        put(to + i, Pixels::read(p + i * kSize) - centre);
      return;
    }
    for (int64_t i = 0; i < length; i += kLanes) {
      alignas(64) char tail[64] = {};
      if (i < inside) std::memcpy(tail, p + i * kSize, min(kLanes, inside - i) * kSize);
      const vf x = Pixels::read(tail) - centre;
      const vi there = less(iota(static_cast<int32_t>(i)), static_cast<int32_t>(inside));
      put(to + i, in.pad_normalised ? select(there, x, vf{}) : x);
    }
  });
  put(row + in.columns(), vf{});
}

template <class T>
VLM_INLINE void gather(const PatchEmbedInputs& in, const Token& t, const char* end, T* row) {
  if (in.images.bytes) return gather_patch<T, Bytes>(in, t, end, row);
  switch (in.images.dtype) {
    case DType::f32:
      return gather_patch<T, Floats<DType::f32>>(in, t, end, row);
    case DType::bf16:
      return gather_patch<T, Floats<DType::bf16>>(in, t, end, row);
    case DType::f16:
      return gather_patch<T, Floats<DType::f16>>(in, t, end, row);
  }
}

// ---------------------------------------------------------------------------------------------
// The folded weight.

// Where column k of an operand is among the weight's columns: at offset + (its time) * step, and of
// which channel it is. `collapse` times add up.
struct Columns {
  int64_t patch, step, collapse;  // pixels of a channel of a frame; from a time to the next
  int64_t channels, depth;
  bool interleaved, channels_last;

  explicit Columns(const PatchEmbedInputs& in)
      : patch(in.patch_height * in.patch_width),
        step(in.channels_last ? patch * in.images.channels : patch),
        collapse(in.collapse),
        channels(in.images.channels),
        depth(in.depth),
        interleaved(in.images.interleaved()),
        channels_last(in.channels_last) {}

  int64_t times() const { return depth * collapse; }  // of the weight
  int64_t weight_columns() const { return times() * patch * channels; }

  // f(column of the operand, column of the weight at its first time, channel), in order of the
  // former.
  template <class F>
  VLM_INLINE void for_each(const Columns& c, const F& f) {
    int64_t k = 0;
    for (int64_t d = 0; d < c.depth; ++d) {
      if (c.interleaved) {
        for (int64_t i = 0; i < c.patch; ++i) {
          for (int64_t channel = 0; channel < c.channels; ++channel) {
            f(k++, c.at(d, channel, i), channel);
          }
        }
      } else {
        for (int64_t channel = 0; channel < c.channels; ++channel) {
          for (int64_t i = 0; i < c.patch; ++i) f(k++, c.at(d, channel, i), channel);
        }
      }
    }
  }
  int64_t at(int64_t d, int64_t channel, int64_t i) const {
    return channels_last ? (d * patch + i) * channels + channel
                         : (channel * times() + d) * patch + i;
  }
};

// to[3 i + c] = from[c * count + i] * scale[c], which the compiler turns into shuffles.
VLM_INLINE void interleave_3(const float* from, int64_t count, const float* scale,
                             float* __restrict to) {
  const float *a = from, *b = from + count, *c = from + 2 * count;
  const float x = scale[0], y = scale[1], z = scale[2];
  for (int64_t i = 0; i < count; ++i) {
    to[3 * i] = a[i] * x;
    to[3 * i + 1] = b[i] * y;
    to[3 * i + 2] = c[i] * z;
  }
}

// A row of the weight in fp32, its columns those of an operand, times the channel's scale. `wide`
// (weight columns + 16) and `to` (columns + 16) are scratch and result.
VLM_INLINE void fold_row(const PatchEmbedInputs& in, int64_t row, float* wide, float* to) {
  const Columns c(in);
  const int64_t count = c.weight_columns();
  const char* from =
      static_cast<const char*>(in.weight) + row * in.weight_stride * element_size(in.dtype);
  for (int64_t k = 0; k < count; k += kLanes) store(wide + k, load_f32(from, in.dtype, k, count));
  for (int64_t t = 1; t < c.collapse; ++t) {  // of a still image
    if (c.channels_last) {
      for (int64_t k = 0; k < c.step; ++k) wide[k] += wide[t * c.step + k];
    } else {
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        float* first = wide + channel * c.collapse * c.patch;
        for (int64_t k = 0; k < c.patch; ++k) first[k] += first[t * c.patch + k];
      }
    }
  }
  if (c.interleaved && !c.channels_last && c.channels == 3 && c.times() == 1) {
    return interleave_3(wide, c.patch, in.scale, to);
  }
  Columns::for_each(c,
                    [&](int64_t k, int64_t from, int64_t channel)
                        __attribute__((always_inline)) { to[k] = wide[from] * in.scale[channel]; });
}

// What each column's raw pixels are lowered by, (kPaddings, patch_ld): where the image is padded
// with 0 after normalisation, nothing.
template <class T>
[[maybe_unused]] static void fold_shift(const PatchEmbedInputs& in, float* shift) {
  const int64_t ld = patch_ld<T>(in);
  for (int padding = 0; padding < kPaddings; ++padding, shift += ld) {
    std::memset(shift, 0, ld * sizeof(float));
    Columns::for_each(Columns(in), [&](int64_t k, int64_t, int64_t channel) {
      shift[k] = in.shift[channel] - in.centre;
    });
    if (!in.pad_normalised || padding == 0) continue;
    // the last patch of its kind tells which of its columns lie beyond the image
    const Token last{0, 0, 0, padding & 2 ? in.grid_height - 1 : 0,
                     padding & 1 ? in.grid_width - 1 : 0};
    const int64_t length = Runs(in).length;
    for_runs(in, last, [&](int64_t column, int64_t, int64_t inside) {
      std::memset(shift + column + inside, 0, (length - inside) * sizeof(float));
    });
  }
}

// Which of them a token takes.
VLM_INLINE int shift_of(const PatchEmbedInputs& in, const Token& t) {
  return in.pad_normalised ? padding_of(in, t) : 0;
}

}  // namespace vlm::cpu::VLM_ISA
