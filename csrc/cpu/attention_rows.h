// Rows of one head made ready for the products of attention, and the way back for their gradient:
// normalisation (QK-norm), rotary position embedding, conversion. Each row is read once from memory
// (twice from L1 with a normalisation) and written once.
//
// A row of d >= 16 features is walked in whole vectors, the last of which ends with the row and
// repeats lanes of the one before where d is no multiple of 16: nothing is read or written beyond
// the row, and no lane needs a mask. Sums leave the repeated lanes out.
#pragma once

#include "cpu/pack.h"
#include "vlm/attention.h"

namespace vlm::cpu::VLM_ISA {

constexpr int64_t kRowBlock = 16;     // rows whose statistics are taken at once
constexpr int64_t kMaxHeadDim = 256;  // of a row that is staged

// Tables of the rows at hand: `half` floats a row, contiguous rows. cos == nullptr: no rotation.
struct RowRope {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t half = 0;
  bool interleaved = false;
};

// x rounded to the nearest fp16 (even), as a float.
VLM_INLINE vf round_f16(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vu bits = (vu)magnitude;
  const vu normal = (bits + (0xfffu + ((bits >> 13) & 1u))) & ~0x1fffu;
  const vu finite = normal >= 0x47800000u ? vu{} + 0x7f800000u : normal;
  const vu subnormal = (vu)((magnitude + 0.75f) - 0.75f);  // 0.75 has steps of 2^-24
  const vu rounded = magnitude < 0x1p-14f ? subnormal : finite;
  return magnitude == magnitude ? (vf)(rounded | sign) : x;
}

// x as the attention kernels keep it: rounded to the dtype of the inputs, held in T.
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

VLM_INLINE vf load_floats(const float* p, int64_t first, int64_t count) {
  return load_f32(reinterpret_cast<const char*>(p), DType::f32, first, count);
}

// The first `count` <= 16 lanes.
template <class T>
VLM_INLINE void store_lanes(T* p, int64_t count, const T (&lanes)[kLanes]) {
  std::memcpy(p, lanes, count * sizeof(T));
}

// put(j, get(j)) for whole vectors that cover [0, n), n >= 16. The last vector is taken before
// anything is put, so that both may work on the same memory.
template <class Get, class Put>
VLM_INLINE void map_vectors(int64_t n, Get get, Put put) {
  const bool ragged = n % kLanes != 0;
  const auto last = get(n - kLanes);
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += kLanes) put(j, get(j));
  if (ragged) put(j, get(j));
  put(n - kLanes, last);
}

// visit(j, fresh) for the same vectors; fresh: all bits set in lanes not seen before (and within
// the row, if that has less than 16 features).
template <class Visit>
VLM_INLINE void visit_vectors(int64_t n, Visit visit) {
  const vi all = ~vi{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) visit(j, all);
  if (j == n) return;
  const int64_t first = max(n - kLanes, int64_t{0});
  const vi lane = iota(static_cast<int32_t>(first));
  visit(first, (lane >= static_cast<int32_t>(j)) & (lane < static_cast<int32_t>(n)));
}

VLM_INLINE vf keep(vf x, vi lanes) { return (vf)((vi)x & lanes); }

struct Pair {
  vf a, b;
};

// Cosines, and sines with their signs, of sixteen features in eight interleaved pairs.
VLM_INLINE Pair interleaved_angles(const float* cos, const float* sin) {
  vf c = {}, s = {};
  std::memcpy(&c, cos, 32);
  std::memcpy(&s, sin, 32);
  return {__builtin_shuffle(c, vi{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7}),
          __builtin_shuffle(s, -s, vi{16, 0, 17, 1, 18, 2, 19, 3, 20, 4, 21, 5, 22, 6, 23, 7})};
}

VLM_INLINE vf swap_pairs(vf x) {
  return __builtin_shuffle(x, vi{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

// Whether the vectors above fit the rotated part of a row.
VLM_INLINE bool rotates_in_vectors(const RowRope& rope, int64_t d) {
  return d >= kLanes && (rope.cos == nullptr || rope.half >= (rope.interleaved ? 8 : 16));
}

// put(j, rotated features [j, j + 16)) from get(j) for a whole row; kSign = -1 turns backwards.
template <int kSign, class Get, class Put>
VLM_INLINE void rotate_row(const RowRope& rope, int64_t row, int64_t d, Get get, Put put) {
  const int64_t width = rope.cos ? 2 * rope.half : 0;
  for (int64_t j = width; j < d; j += kLanes) {  // may touch rotated features: they come later
    const int64_t first = min(j, d - kLanes);
    put(first, get(first));
  }
  if (!width) return;
  const float* cos = rope.cos + row * rope.half;
  const float* sin = rope.sin + row * rope.half;
  if (rope.interleaved) {
    map_vectors(
        width,
        [&](int64_t j) __attribute__((always_inline)) {
          const Pair angle = interleaved_angles(cos + j / 2, sin + j / 2);
          const vf x = get(j);
          return x * angle.a + swap_pairs(x) * (static_cast<float>(kSign) * angle.b);
        },
        [&](int64_t j, vf x) __attribute__((always_inline)) { put(j, x); });
  } else {
    map_vectors(
        rope.half,
        [&](int64_t j) __attribute__((always_inline)) {
          const vf c = load(cos + j), s = static_cast<float>(kSign) * load(sin + j);
          const vf a = get(j), b = get(rope.half + j);
          return Pair{a * c - b * s, b * c + a * s};
        },
        [&](int64_t j, Pair x) __attribute__((always_inline)) {
          put(j, x.a);
          put(rope.half + j, x.b);
        });
  }
}

// The same in place, one pair at a time: rotations that are narrower than a vector.
template <int kSign>
static void rotate_narrow(const RowRope& rope, int64_t row, float* x) {
  for (int64_t i = 0; rope.cos && i < rope.half; ++i) {
    const float c = rope.cos[row * rope.half + i], s = kSign * rope.sin[row * rope.half + i];
    float& a = x[rope.interleaved ? 2 * i : i];
    float& b = x[rope.interleaved ? 2 * i + 1 : rope.half + i];
    const float rotated = a * c - b * s;
    b = b * c + a * s;
    a = rotated;
  }
}

// Rows of the input, in fp32.
template <DType kType>
struct SourceRows {
  const char* data;
  int64_t stride, d;

  VLM_INLINE vf at(const SourceRows& x, int64_t row, int64_t j) {
    return load_f32(x.data + row * x.stride * element_size(kType), kType, j, x.d);
  }
};

// A head's normalisation, and the statistics of a block of rows.
struct RowNorm {
  const float* weight;  // null: none
  const float* bias;
  int64_t d;
  alignas(64) float mean[kRowBlock];  // 0 for RMS
  alignas(64) float inverse[kRowBlock];

  RowNorm(const HeadNorm& norm, int64_t head, int64_t d)
      : weight(norm.kind == HeadNorm::none ? nullptr : norm.weight + head * norm.head_stride),
        bias(weight && norm.bias ? norm.bias + head * norm.head_stride : nullptr),
        d(d) {}

  template <DType kType>
  void measure(const HeadNorm& norm, const SourceRows<kType>& x, int64_t first, int64_t rows) {
    using Rows = SourceRows<kType>;
    const float count = static_cast<float>(d);
    for (int64_t r = 0; r < rows; ++r) {
      vf mu = {}, squares = {};
      if (norm.kind == HeadNorm::layer) {
        vf sum = {};
        visit_vectors(d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
          sum += keep(Rows::at(x, first + r, j), fresh);
        });
        mu = broadcast(hsum(sum) / count);
      }
      visit_vectors(d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
        const vf centred = keep(Rows::at(x, first + r, j) - mu, fresh);
        squares += centred * centred;
      });
      mean[r] = mu[0];
      inverse[r] = hsum(squares) / count + norm.eps;
    }
    for (int64_t r = 0; r < rows; ++r) inverse[r] = 1.f / __builtin_sqrtf(inverse[r]);
  }

  VLM_INLINE vf standard(const RowNorm& norm, int64_t r, vf x) {
    return (x - norm.mean[r]) * norm.inverse[r];
  }
  VLM_INLINE vf affine(const RowNorm& norm, int64_t j, vf x) {
    x *= load_floats(norm.weight, j, norm.d);
    return norm.bias ? x + load_floats(norm.bias, j, norm.d) : x;
  }
};

template <DType kType, bool kNorm, class T>
static void prepare_rows_as(const SourceRows<kType>& x, int64_t rows, const HeadNorm& head_norm,
                            int64_t head, const RowRope& rope, T* dst, int64_t ld) {
  using Rows = SourceRows<kType>;
  const int64_t d = x.d, padded = round_up(d, kLanes);
  const bool vectors = rotates_in_vectors(rope, d);
  RowNorm norm(head_norm, head, d);
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = min(kRowBlock, rows - first);
    if constexpr (kNorm) norm.measure(head_norm, x, first, count);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      T* out = dst + row * ld;
      const auto get = [&](int64_t j) __attribute__((always_inline)) {
        const vf value = Rows::at(x, row, j);
        if constexpr (!kNorm) return value;
        return RowNorm::affine(norm, j, RowNorm::standard(norm, r, value));
      };
      if (vectors) {
        if (padded <= ld) {  // what is not padding is written over
          store_prepared<kType>(out + padded - kLanes, vf{});
        } else {
          for (int64_t j = d; j < ld; ++j) out[j] = T{};
        }
        rotate_row<1>(rope, row, d, get, [&](int64_t j, vf value) __attribute__((always_inline)) {
          store_prepared<kType>(out + j, value);
        });
        continue;
      }
      alignas(64) float staged[kMaxHeadDim + kLanes];
      visit_vectors(
          d, [&](int64_t j, vi) __attribute__((always_inline)) { store(staged + j, get(j)); });
      rotate_narrow<1>(rope, row, staged);
      for (int64_t j = 0; j < min(padded, ld); j += kLanes) {
        alignas(64) T lanes[kLanes];
        store_prepared<kType>(lanes, load_floats(staged, j, d));
        store_lanes(out + j, min(kLanes, ld - j), lanes);
      }
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
  const RowRope rope{half ? cos : nullptr, sin, half, interleaved};
  const auto run = [&]<DType kType>(SourceRows<kType> x) {
    norm.kind == HeadNorm::none ? prepare_rows_as<kType, false>(x, rows, norm, head, rope, dst, ld)
                                : prepare_rows_as<kType, true>(x, rows, norm, head, rope, dst, ld);
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

// Gradient through the rotation of `count` rows: (rows, ld) -> (rows, ld_out), which may be the
// same memory.
static inline void rotate_back(const float* grad, int64_t ld, int64_t count, int64_t d,
                               const RowRope& rope, int64_t row, float* out, int64_t ld_out) {
  const bool vectors = rotates_in_vectors(rope, d);
  for (int64_t r = 0; r < count; ++r) {
    const float* g = grad + r * ld;
    float* to = out + r * ld_out;
    if (vectors) {
      rotate_row<-1>(
          rope, row + r, d, [&](int64_t j) __attribute__((always_inline)) { return load(g + j); },
          [&](int64_t j, vf value) __attribute__((always_inline)) { store(to + j, value); });
    } else {
      if (to != g) std::memcpy(to, g, d * sizeof(float));
      rotate_narrow<-1>(rope, row + r, to);
    }
  }
}

// Gradient through the normalisation: with s = (x - mean) / deviation and y = s w + b,
// dx = (w dy - s mean(w dy s) - mean(w dy)) / deviation, the last term for `layer` only.
template <DType kType>
static void norm_rows_backward(const float* grad, int64_t ld, const SourceRows<kType>& x,
                               int64_t rows, const HeadNorm& head_norm, int64_t head,
                               const RowRope& rope, float* out, int64_t ld_out, float* weight_grad,
                               float* bias_grad) {
  using Rows = SourceRows<kType>;
  constexpr int64_t kStride = kMaxHeadDim + kLanes;
  const int64_t d = x.d;
  const float each = 1.f / static_cast<float>(d);
  RowNorm norm(head_norm, head, d);
  alignas(64) float block[kRowBlock * kStride];  // gradient before the rotation
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = min(kRowBlock, rows - first);
    norm.measure(head_norm, x, first, count);
    rotate_back(grad + first * ld, ld, count, d, rope, first, block, kStride);
    // A block's sums on their own first: a long chain of additions would drift.
    alignas(64) float dw[kStride], db[kStride];
    for (int64_t j = 0; j < d; j += kLanes) {
      store(dw + j, vf{});
      store(db + j, vf{});
    }
    for (int64_t r = 0; r < count; ++r) {
      const float* g = block + r * kStride;
      vf along = {}, total = {};
      visit_vectors(d, [&](int64_t j, vi fresh) __attribute__((always_inline)) {
        const vf dy = keep(load(g + j), fresh);
        const vf s = keep(RowNorm::standard(norm, r, Rows::at(x, first + r, j)), fresh);
        const vf ds = dy * load_floats(norm.weight, j, d);
        along += ds * s;
        total += ds;
        store(dw + j, load(dw + j) + dy * s);
        store(db + j, load(db + j) + dy);
      });
      const float slope = hsum(along) * each;
      const float shift = head_norm.kind == HeadNorm::layer ? hsum(total) * each : 0.f;
      float* to = out + (first + r) * ld_out;
      visit_vectors(d, [&](int64_t j, vi) __attribute__((always_inline)) {
        const vf s = RowNorm::standard(norm, r, Rows::at(x, first + r, j));
        const vf ds = load(g + j) * load_floats(norm.weight, j, d);
        const vf dx = norm.inverse[r] * (ds - s * slope - shift);
        if (d >= kLanes) {
          store(to + j, dx);
        } else {
          alignas(64) float lanes[kLanes];
          store(lanes, dx);
          store_lanes(to + j, d, lanes);
        }
      });
    }
    for (int64_t j = 0; j < d; ++j) {
      if (weight_grad) weight_grad[j] += dw[j];
      if (bias_grad) bias_grad[j] += db[j];
    }
  }
}

// Backward of prepare_rows, for the same rows: from grad (rows, ld), the fp32 gradient of the
// prepared rows, to out (rows, ld_out), that of the source rows, of which columns [0, d) are
// written; out may be grad itself, with ld_out == ld. Adds to weight_grad and bias_grad (d), those
// of this head, or null, row after row.
static inline void prepare_rows_backward(const float* grad, int64_t ld, const char* src,
                                         int64_t row_stride, DType dtype, int64_t rows, int64_t d,
                                         const HeadNorm& norm, int64_t head, const float* cos,
                                         const float* sin, int64_t half, bool interleaved,
                                         float* out, int64_t ld_out, float* weight_grad,
                                         float* bias_grad) {
  const RowRope rope{half ? cos : nullptr, sin, half, interleaved};
  if (norm.kind == HeadNorm::none) {
    if (rope.cos || out != grad) rotate_back(grad, ld, rows, d, rope, 0, out, ld_out);
    return;
  }
  const auto run = [&]<DType kType>(SourceRows<kType> x) {
    norm_rows_backward(grad, ld, x, rows, norm, head, rope, out, ld_out, weight_grad, bias_grad);
  };
  if (dtype == DType::f32) {
    run(SourceRows<DType::f32>{src, row_stride, d});
  } else if (dtype == DType::bf16) {
    run(SourceRows<DType::bf16>{src, row_stride, d});
  } else {
    run(SourceRows<DType::f16>{src, row_stride, d});
  }
}

}  // namespace vlm::cpu::VLM_ISA
