// Rows of one head made ready for the products of attention, and the way back for their gradient:
// normalisation (QK-norm), rotary position embedding, conversion. Each row is read once and written
// once.
//
// A row of d >= 16 features is walked in whole vectors, the last of which ends with the row and
// repeats lanes of the one before where d is no multiple of 16: nothing is read or written beyond
// the row, and only sums need a mask. Rows of less than 16 features take plain loops.
#pragma once

#include "cpu/pack.h"
#include "vlm/attention.h"

namespace vlm::cpu::VLM_ISA {

constexpr int64_t kRowBlock = 16;     // rows that are normalised at once
constexpr int64_t kMaxHeadDim = 256;  // of a row that is staged

// x rounded to the nearest fp16 (even), as a float.
VLM_INLINE vf round_f16(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vu bits = (vu)magnitude;
  const vu normal = (bits + (0xfffu + ((bits >> 13) & 1u))) & ~0x1fffu;
  const vu finite = select(less((vi)normal, 0x47800000), normal, vu{} + 0x7f800000u);
  const vu subnormal = (vu)((magnitude + 0.75f) - 0.75f);  // 0.75 has steps of 2^-24
  const vu rounded = select(less(magnitude, 0x1p-14f), subnormal, finite);
  return select(is_nan(x), x, (vf)(rounded | sign));
}

// x as the products take it: rounded to the dtype of the inputs, held in T.
template <DType kType, class T>
VLM_INLINE void store_prepared(T* p, vf x) {
  if constexpr (sizeof(T) == 2) {
    static_assert(kType == DType::bf16);
    store(p, to_bf16_native(x));
  } else if constexpr (kType == DType::bf16) {
    store(p, (vf)(bf16_bits(x) & 0xffff0000u));
  } else {
    store(p, kType == DType::f16 ? round_f16(x) : x);
  }
}

// put(j, get(j)) for the whole vectors that cover [0, n), n >= 16. The last one is taken before
// anything is put, so that both may work on the same memory.
template <class Get, class Put>
VLM_INLINE void map_vectors(int64_t n, Get get, Put put) {
  const auto last = get(n - kLanes);
  for (int64_t j = 0; j < n - kLanes; j += kLanes) put(j, get(j));
  put(n - kLanes, last);
}

// visit(j, fresh) for the same vectors; fresh: all bits set in the lanes not seen before.
template <class Visit>
VLM_INLINE void visit_vectors(int64_t n, Visit visit) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) visit(j, ~vi{});
  if (j < n) {
    const int64_t last = n - kLanes;
    visit(last, ~less(iota(static_cast<int32_t>(last)), static_cast<int32_t>(j)));
  }
}

VLM_INLINE vf keep(vf x, vi lanes) { return (vf)((vi)x & lanes); }

// ---------------------------------------------------------------------------------------------
// Rotation.

// Tables of the rows at hand: `half` floats a row, contiguous rows; none: half is 0.
struct RowRope {
  const float* cos;
  const float* sin;
  int64_t half;
  bool interleaved;
};

struct Pair {
  vf a, b;
};

// Eight words, each twice.
VLM_INLINE vu twice(const float* p) {
  typedef uint32_t v8 __attribute__((vector_size(32)));
  return by_parts<vu>(
      [](auto words) {
        const auto wide = __builtin_convertvector(words, Part<uint64_t>);
        return (Part<uint32_t>)(wide | (wide << 32));
      },
      load_as<v8>(p));
}

// Cosines, and sines with their signs, of sixteen features in eight interleaved pairs.
VLM_INLINE Pair interleaved_angles(const float* cos, const float* sin) {
  const vu sign = (vu)~iota(0) << 31;  // of the even lanes
  return {(vf)twice(cos), (vf)(twice(sin) ^ sign)};
}

VLM_INLINE vf swap_pairs(vf x) {
  return by_parts<vf>(
      [](auto p) {
        Part<int32_t> lanes;
        for (int k = 0; k < kPartLanes; ++k) lanes[k] = k ^ 1;
        return __builtin_shuffle(p, lanes);
      },
      x);
}

// One pair at a time, in place. kSign = -1 turns backwards.
template <int kSign, class Float>
VLM_INLINE void rotate_pairs(const RowRope& rope, int64_t row, Float* x) {
  for (int64_t i = 0; i < rope.half; ++i) {
    const float c = rope.cos[row * rope.half + i], s = kSign * rope.sin[row * rope.half + i];
    Float& a = x[rope.interleaved ? 2 * i : i];
    Float& b = x[rope.interleaved ? 2 * i + 1 : rope.half + i];
    const Float rotated = a * c - b * s;
    b = b * c + a * s;
    a = rotated;
  }
}

// put(j, rotated features [j, j + 16)) from get(j) for a row of d >= 16 features.
template <int kSign, class Get, class Put>
VLM_INLINE void rotate_row(const RowRope& rope, int64_t row, int64_t d, Get get, Put put) {
  constexpr float sign = kSign;
  const int64_t half = rope.half, width = 2 * half;
  for (int64_t j = width; j < d; j += kLanes) {  // may touch rotated features: they come later
    const int64_t first = min(j, d - kLanes);
    put(first, get(first));
  }
  if (half == 0) return;
  const float* cos = rope.cos + row * half;
  const float* sin = rope.sin + row * half;
  if (rope.interleaved && width >= kLanes) {
    map_vectors(
        width,
        [&](int64_t j) __attribute__((always_inline)) {
          const Pair angle = interleaved_angles(cos + j / 2, sin + j / 2);
          const vf x = get(j);
          return x * angle.a + swap_pairs(x) * (sign * angle.b);
        },
        put);
  } else if (!rope.interleaved && half >= kLanes) {
    map_vectors(
        half,
        [&](int64_t j) __attribute__((always_inline)) {
          const vf c = load(cos + j), s = sign * load(sin + j);
          const vf a = get(j), b = get(half + j);
          return Pair{a * c - b * s, b * c + a * s};
        },
        [&](int64_t j, const Pair& x) __attribute__((always_inline)) {
          put(j, x.a);
          put(half + j, x.b);
        });
  } else {  // narrower than a vector: at most 30 features
    alignas(64) float x[2 * kLanes];
    const int64_t second = min(kLanes, d - kLanes);
    store(x, get(0));
    store(x + second, get(second));
    rotate_pairs<kSign>(rope, row, x);
    put(0, load(x));
    if (width > kLanes) put(second, load(x + second));
  }
}

// ---------------------------------------------------------------------------------------------
// Normalisation.

// Rows of the input, in fp32.
template <DType kType>
struct SourceRows {
  const char* data;
  int64_t stride, d;

  VLM_INLINE vf at(const SourceRows& x, int64_t row, int64_t j) {
    return to_f32(x.data + (row * x.stride + j) * element_size(kType), kType);
  }
};

struct HeadAffine {
  const float* weight;
  const float* bias;  // null: none

  HeadAffine(const HeadNorm& norm, int64_t head)
      : weight(norm.weight + head * norm.head_stride),
        bias(norm.bias ? norm.bias + head * norm.head_stride : nullptr) {}
};

// What a block of rows summed lane by lane, a vector a row; the rows' sums come all at once.
struct RowSums {
  alignas(64) float lanes[kRowBlock * kLanes];

  VLM_INLINE vf total(const RowSums& sums, int64_t rows) {
    vu v[kRowBlock];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r) {
      v[r] = r < rows ? (vu)load(sums.lanes + r * kLanes) : vu{};
    }
    transpose16(v);
    vf a = {}, b = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes; i += 2) {
      a += (vf)v[i];
      b += (vf)v[i + 1];
    }
    return a + b;
  }
};

constexpr int64_t kStagedStride = kMaxHeadDim + kLanes;  // floats; off multiples of a page

// A block of rows in fp32, and their statistics. Rows of the input may lie a page apart, where few
// of them fit the first-level cache: each is read once.
struct StagedRows {
  alignas(64) float x[kRowBlock * kStagedStride];
  alignas(64) float mean[kRowBlock] = {};  // 0 for RMS
  alignas(64) float inverse[kRowBlock];    // 1 / deviation

  template <DType kType>
  void read(const SourceRows<kType>& source, int64_t first, int64_t rows, HeadNorm::Kind kind,
            float eps) {
    using Rows = SourceRows<kType>;
    const SourceRows<kType> from = source;
    const float each = 1.f / static_cast<float>(from.d);
    const bool layer = kind == HeadNorm::layer;
    RowSums sums;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = x + r * kStagedStride;
      vf sum = {};
      visit_vectors(from.d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
        const vf value = Rows::at(from, first + r, j);
        store(to + j, value);
        sum += keep(layer ? value : value * value, fresh);
      });
      store(sums.lanes + r * kLanes, sum);
    }
    if (layer) {
      store(mean, RowSums::total(sums, rows) * each);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * kStagedStride;
        const float mu = mean[r];
        vf squares = {};
        visit_vectors(from.d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
          const vf centred = keep(load(row + j) - mu, fresh);
          squares += centred * centred;
        });
        store(sums.lanes + r * kLanes, squares);
      }
    }
    store(inverse, 1.f / sqrt(RowSums::total(sums, rows) * each + eps));
  }

  void read(const char* src, int64_t stride, DType dtype, int64_t d, int64_t first, int64_t rows,
            const HeadNorm& norm) {
    if (dtype == DType::f32) {
      read(SourceRows<DType::f32>{src, stride, d}, first, rows, norm.kind, norm.eps);
    } else if (dtype == DType::bf16) {
      read(SourceRows<DType::bf16>{src, stride, d}, first, rows, norm.kind, norm.eps);
    } else {
      read(SourceRows<DType::f16>{src, stride, d}, first, rows, norm.kind, norm.eps);
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Rows of less than 16 features.

struct TinyRow {
  int64_t d;
  double x[kLanes];
  double inverse = 1;

  TinyRow(const char* row, DType dtype, int64_t d, const HeadNorm& norm) : d(d) {
    const vf features = load_f32(row, dtype, 0, d);
    for (int64_t i = 0; i < kLanes; ++i) x[i] = features[i];
    if (norm.kind == HeadNorm::none) return;
    double mean = 0, squares = 0;
    for (int64_t i = 0; norm.kind == HeadNorm::layer && i < d; ++i) mean += x[i] / d;
    for (int64_t i = 0; i < d; ++i) {
      x[i] -= mean;
      squares += x[i] * x[i];
    }
    inverse = 1 / __builtin_sqrt(squares / d + norm.eps);
    for (int64_t i = 0; i < d; ++i) x[i] *= inverse;
  }
};

template <DType kType, class T>
static void prepare_tiny_row(const char* src, int64_t d, const HeadNorm& norm, int64_t head,
                             const RowRope& rope, int64_t row, T* out, int64_t count) {
  TinyRow x(src, kType, d, norm);
  if (norm.kind != HeadNorm::none) {
    const HeadAffine affine(norm, head);
    for (int64_t i = 0; i < d; ++i) {
      x.x[i] = x.x[i] * affine.weight[i] + (affine.bias ? affine.bias[i] : 0.f);
    }
  }
  rotate_pairs<1>(rope, row, x.x);
  alignas(64) float features[kLanes] = {};
  for (int64_t i = 0; i < d; ++i) features[i] = static_cast<float>(x.x[i]);
  alignas(64) T lanes[kLanes];
  store_prepared<kType>(lanes, load(features));
  std::memcpy(out, lanes, min(kLanes, count) * sizeof(T));
}

// ---------------------------------------------------------------------------------------------
// Forward.

// A rotated row of d >= 16 features from get(j), with its padding.
template <DType kType, class T, class Get>
VLM_INLINE void write_row(const RowRope& rope, int64_t row, int64_t d, Get get, T* out,
                          int64_t ld) {
  const int64_t padded = round_up(d, kLanes);
  if (padded <= ld) {  // what is not padding is written over
    store_prepared<kType>(out + padded - kLanes, vf{});
  } else {
    for (int64_t j = d; j < ld; ++j) out[j] = T{};
  }
  rotate_row<1>(rope, row, d, get, [&](int64_t j, vf value) __attribute__((always_inline)) {
    store_prepared<kType>(out + j, value);
  });
}

template <DType kType, class T>
static void rotate_rows(const SourceRows<kType>& source, int64_t rows, const RowRope& rope, T* dst,
                        int64_t ld) {
  const SourceRows<kType> x = source;
  const RowRope tables = rope;
  for (int64_t row = 0; row < rows; ++row) {
    write_row<kType>(
        tables, row, x.d,
        [&](int64_t j) __attribute__((always_inline)) { return SourceRows<kType>::at(x, row, j); },
        dst + row * ld, ld);
  }
}

template <DType kType, class T>
static void norm_rows(const SourceRows<kType>& x, int64_t rows, const HeadNorm& norm, int64_t head,
                      const RowRope& rope, T* dst, int64_t ld) {
  const RowRope tables = rope;
  const HeadAffine affine(norm, head);
  const int64_t d = x.d;
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = min(kRowBlock, rows - first);
    StagedRows staged;
    staged.read(x, first, count, norm.kind, norm.eps);
    for (int64_t r = 0; r < count; ++r) {
      const float* row = staged.x + r * kStagedStride;
      const float mean = staged.mean[r], inverse = staged.inverse[r];
      write_row<kType>(
          tables, first + r, d,
          [&](int64_t j) __attribute__((always_inline)) {
            const vf value = (load(row + j) - mean) * inverse * load(affine.weight + j);
            return affine.bias ? value + load(affine.bias + j) : value;
          },
          dst + (first + r) * ld, ld);
    }
  }
}

// Rows of one head, from the input's dtype to T: normalised, rotated, and rounded once to the dtype
// of the input (fp16, which no product takes, is rounded and held as float). T is bf16_t for bf16
// inputs where the products run in bf16, else float.
//   src          first row, `row_stride` elements apart, d <= 256 features each
//   cos, sin     row of the table for the first row, the next ones `half` floats on; null: none
//   dst          (rows, ld), ld >= d; zero from column d to round_up(d, 16) or ld, if that is less
template <class T>
static void prepare_rows(const char* src, int64_t row_stride, DType dtype, int64_t rows, int64_t d,
                         const HeadNorm& norm, int64_t head, const float* cos, const float* sin,
                         int64_t half, bool interleaved, T* dst, int64_t ld) {
  const RowRope rope{cos, sin, cos ? half : 0, interleaved};
  const auto run = [&]<DType kType>(SourceRows<kType> x) {
    if (d < kLanes) {
      for (int64_t r = 0; r < rows; ++r) {
        prepare_tiny_row<kType>(src + r * row_stride * element_size(kType), d, norm, head, rope, r,
                                dst + r * ld, ld);
      }
    } else if (norm.kind == HeadNorm::none) {
      rotate_rows(x, rows, rope, dst, ld);
    } else {
      norm_rows(x, rows, norm, head, rope, dst, ld);
    }
  };
  if constexpr (sizeof(T) == 2) {
    run(SourceRows<DType::bf16>{src, row_stride, d});
  } else if (dtype == DType::f32) {
    run(SourceRows<DType::f32>{src, row_stride, d});
  } else if (dtype == DType::bf16) {
    run(SourceRows<DType::bf16>{src, row_stride, d});
  } else {
    run(SourceRows<DType::f16>{src, row_stride, d});
  }
}

// ---------------------------------------------------------------------------------------------
// Backward.

// Gradient through the rotation: (rows, ld) -> (rows, ld_out), which may be the same memory.
static inline void rotate_rows_back(const float* grad, int64_t ld, int64_t rows, int64_t d,
                                    const RowRope& rope, int64_t first, float* out,
                                    int64_t ld_out) {
  const RowRope tables = rope;
  for (int64_t r = 0; r < rows; ++r) {
    const float* g = grad + r * ld;
    float* to = out + r * ld_out;
    rotate_row<-1>(
        tables, first + r, d, [&](int64_t j) __attribute__((always_inline)) { return load(g + j); },
        [&](int64_t j, vf value) __attribute__((always_inline)) { store(to + j, value); });
  }
}

// Gradient through the normalisation: with s = (x - mean) / deviation and y = s w + b,
// dx = (w dy - s mean(w dy s) - mean(w dy)) / deviation, the last term for `layer` only.
static inline void norm_rows_backward(const float* grad, int64_t ld, const char* src,
                                      int64_t row_stride, DType dtype, int64_t rows, int64_t d,
                                      const HeadNorm& norm, int64_t head, const RowRope& rope,
                                      float* out, int64_t ld_out, float* weight_grad,
                                      float* bias_grad) {
  const float each = 1.f / static_cast<float>(d);
  const float* weight = HeadAffine(norm, head).weight;
  alignas(64) float before[kRowBlock * kStagedStride];  // gradient before the rotation
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = min(kRowBlock, rows - first);
    StagedRows staged;
    staged.read(src, row_stride, dtype, d, first, count, norm);
    rotate_rows_back(grad + first * ld, ld, count, d, rope, first, before, kStagedStride);
    // A block's sums on their own first: a long chain of additions would drift.
    alignas(64) float dw[kMaxHeadDim], db[kMaxHeadDim];
    for (int64_t j = 0; j < d; j += kLanes) {
      store(dw + j, vf{});
      store(db + j, vf{});
    }
    RowSums along, total;
    for (int64_t r = 0; r < count; ++r) {
      const float* g = before + r * kStagedStride;
      const float* row = staged.x + r * kStagedStride;
      const float mean = staged.mean[r], inverse = staged.inverse[r];
      vf dot = {}, sum = {};
      visit_vectors(d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
        const vf dy = keep(load(g + j), fresh);
        const vf s = keep((load(row + j) - mean) * inverse, fresh);
        const vf ds = keep(dy * load(weight + j), fresh);
        dot += ds * s;
        sum += ds;
        store(dw + j, load(dw + j) + dy * s);
        store(db + j, load(db + j) + dy);
      });
      store(along.lanes + r * kLanes, dot);
      store(total.lanes + r * kLanes, sum);
    }
    alignas(64) float slope[kRowBlock], shift[kRowBlock] = {};
    store(slope, RowSums::total(along, count) * each);
    if (norm.kind == HeadNorm::layer) store(shift, RowSums::total(total, count) * each);
    for (int64_t r = 0; r < count; ++r) {
      const float* g = before + r * kStagedStride;
      const float* row = staged.x + r * kStagedStride;
      float* to = out + (first + r) * ld_out;
      const float mean = staged.mean[r], inverse = staged.inverse[r];
      const float along_s = slope[r], along_one = shift[r];
      visit_vectors(d, [&](int64_t j, vi) __attribute__((always_inline)) {
        const vf s = (load(row + j) - mean) * inverse;
        store(to + j, inverse * (load(g + j) * load(weight + j) - s * along_s - along_one));
      });
    }
    for (int64_t j = 0; j < d; ++j) {
      if (weight_grad) weight_grad[j] += dw[j];
      if (bias_grad) bias_grad[j] += db[j];
    }
  }
}

static inline void prepare_tiny_row_backward(const float* grad, const char* src, DType dtype,
                                             int64_t d, const HeadNorm& norm, int64_t head,
                                             const RowRope& rope, int64_t row, float* out,
                                             float* weight_grad, float* bias_grad) {
  double dy[kLanes];
  for (int64_t i = 0; i < d; ++i) dy[i] = grad[i];
  rotate_pairs<-1>(rope, row, dy);
  if (norm.kind == HeadNorm::none) {
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(dy[i]);
    return;
  }
  const TinyRow s(src, dtype, d, norm);
  const float* weight = HeadAffine(norm, head).weight;
  double slope = 0, shift = 0;
  for (int64_t i = 0; i < d; ++i) {
    slope += dy[i] * weight[i] * s.x[i] / d;
    if (norm.kind == HeadNorm::layer) shift += dy[i] * weight[i] / d;
  }
  for (int64_t i = 0; i < d; ++i) {
    out[i] = static_cast<float>(s.inverse * (dy[i] * weight[i] - s.x[i] * slope - shift));
    if (weight_grad) weight_grad[i] += static_cast<float>(dy[i] * s.x[i]);
    if (bias_grad) bias_grad[i] += static_cast<float>(dy[i]);
  }
}

// Backward of prepare_rows, for the same rows: from grad (rows, ld), the fp32 gradient of the
// prepared rows, to out (rows, ld_out), that of the source rows, of which columns [0, d) are
// written; out may be grad itself, with ld_out == ld. Adds to weight_grad and bias_grad (d), those
// of this head, or null, in the order of the rows.
static inline void prepare_rows_backward(const float* grad, int64_t ld, const char* src,
                                         int64_t row_stride, DType dtype, int64_t rows, int64_t d,
                                         const HeadNorm& norm, int64_t head, const float* cos,
                                         const float* sin, int64_t half, bool interleaved,
                                         float* out, int64_t ld_out, float* weight_grad,
                                         float* bias_grad) {
  const RowRope rope{cos, sin, cos ? half : 0, interleaved};
  if (d < kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      prepare_tiny_row_backward(grad + r * ld, src + r * row_stride * element_size(dtype), dtype, d,
                                norm, head, rope, r, out + r * ld_out, weight_grad, bias_grad);
    }
  } else if (norm.kind == HeadNorm::none) {
    if (rope.half || out != grad) rotate_rows_back(grad, ld, rows, d, rope, 0, out, ld_out);
  } else {
    norm_rows_backward(grad, ld, src, row_stride, dtype, rows, d, norm, head, rope, out, ld_out,
                       weight_grad, bias_grad);
  }
}

}  // namespace vlm::cpu::VLM_ISA
