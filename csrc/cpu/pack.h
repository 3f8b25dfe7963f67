// Operand packing for the GEMM seam. T is the type the products run in: float (any input dtype,
// converted) or bf16_t (bf16 input). A word is one float or a pair of bf16.
//
// B operands are panels of 64 columns, [panel][k][64]; in bf16 their rows come in pairs,
// [panel][k / 2][64][2], so that one word holds rows k and k + 1. Padding is zero.
#pragma once

#include "cpu/gemm.h"
#include "cpu/vec.h"
#include "vlm/types.h"

namespace vlm::cpu::VLM_ISA {

constexpr int64_t kPanel = 64;

template <class T>
constexpr int64_t kPerWord = 4 / sizeof(T);

VLM_INLINE const char* row_ptr(const MatrixRef& x, DType dtype, int64_t row) {
  return static_cast<const char*>(x.data) + row * x.stride * element_size(dtype);
}

VLM_INLINE vf to_f32(const char* p, DType dtype) {
  if (dtype == DType::f32) return load(reinterpret_cast<const float*>(p));
  const vh half = load(reinterpret_cast<const uint16_t*>(p));
  return dtype == DType::bf16 ? from_bf16(half) : from_f16(half);
}

// Elements [first, first + 16) of a row of `count`, zero beyond the end.
VLM_INLINE vf load_f32(const char* row, DType dtype, int64_t first, int64_t count) {
  const int64_t size = element_size(dtype);
  if (first + kLanes <= count) return to_f32(row + first * size, dtype);
  alignas(64) char tail[64] = {};
  if (first < count) std::memcpy(tail, row + first * size, (count - first) * size);
  return to_f32(tail, dtype);
}

VLM_INLINE vh load_h(const char* row, int64_t first, int64_t count) {
  if (first + kLanes <= count) return load(reinterpret_cast<const uint16_t*>(row) + first);
  alignas(64) uint16_t tail[kLanes] = {};
  if (first < count) std::memcpy(tail, row + first * 2, (count - first) * 2);
  return load(tail);
}

// Words [first, first + 16) of a row of `count` elements.
template <class T>
VLM_INLINE vu load_words(const char* row, DType dtype, int64_t first, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return (vu)load_f32(row, dtype, first, count);
  } else {
    vu words = {};  // a row need not be word-aligned
    const int64_t left = count - 2 * first;
    if (left >= 2 * kLanes) {
      std::memcpy(&words, row + first * 4, sizeof(words));
    } else if (left > 0) {
      std::memcpy(&words, row + first * 4, left * 2);
    }
    return words;
  }
}

// A 16 x 16 block of words, transposed: rows [row, row + 16), words [word, word + 16).
template <class T>
VLM_INLINE void load_transposed(vu (&v)[16], const MatrixRef& x, DType dtype, int64_t row,
                                int64_t word) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    v[i] = row + i < x.rows ? load_words<T>(row_ptr(x, dtype, row + i), dtype, word, x.cols) : vu{};
  }
  transpose16(v);
}

// Rows [row, row + 64) of x (R, D) as one panel of the B operand x^T: dst [ceil(D / per word)][64]
// words. `flip` negates.
template <class T>
[[maybe_unused]] static void pack_transposed_panel(const MatrixRef& x, DType dtype, int64_t row,
                                                   bool flip, uint32_t* dst) {
  const uint32_t sign = flip ? (sizeof(T) == 4 ? 0x80000000u : 0x80008000u) : 0u;
  const int64_t words = ceil_div(x.cols, kPerWord<T>);
  for (int64_t w = 0; w < words; w += kLanes) {
    for (int64_t group = 0; group < kPanel; group += kLanes) {
      vu v[16];
      load_transposed<T>(v, x, dtype, row + group, w);
      const int64_t count = min(kLanes, words - w);
      for (int64_t i = 0; i < count; ++i) store(dst + (w + i) * kPanel + group, v[i] ^ sign);
    }
  }
}

// Rows [row, row + rows) of x as the A operand x^T: dst (D, ld), columns [0, round_up(rows, 16)).
template <class T>
[[maybe_unused]] static void pack_transposed(const MatrixRef& x, DType dtype, int64_t row,
                                             int64_t rows, T* dst, int64_t ld) {
  const int64_t words = ceil_div(x.cols, kPerWord<T>);
  for (int64_t group = 0; group < rows; group += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      vu v[16];
      load_transposed<T>(v, x, dtype, row + group, w);
      const int64_t count = min(kLanes, words - w);
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (sizeof(T) == 4) {
          store(reinterpret_cast<uint32_t*>(dst) + (w + i) * ld + group, v[i]);
        } else {
          const int64_t k = 2 * (w + i);
          store(dst + k * ld + group, convert<vh>(v[i] & 0xffffu));
          if (k + 1 < x.cols) {
            store(dst + (k + 1) * ld + group, convert<vh>(v[i] >> 16));
          }
        }
      }
    }
  }
}

// Rows [row, row + 64) of x as k-rows [k, k + 64) of the B operand x: dst [D / 64][depth][64].
template <class T>
[[maybe_unused]] static void pack_panel_rows(const MatrixRef& x, DType dtype, int64_t row,
                                             int64_t k, int64_t depth, T* dst) {
  const int64_t step = kPerWord<T>;
  uint32_t* words = reinterpret_cast<uint32_t*>(dst);
  for (int64_t r = 0; r < kPanel; r += step) {
    for (int64_t d = 0; d < x.cols; d += kLanes) {
      uint32_t* out =
          words + (d / kPanel) * (depth / step) * kPanel + (k + r) / step * kPanel + d % kPanel;
      const bool inside = row + r < x.rows;
      const char* p = inside ? row_ptr(x, dtype, row + r) : nullptr;
      if constexpr (sizeof(T) == 4) {
        store(out, inside ? (vu)load_f32(p, dtype, d, x.cols) : vu{});
      } else {
        const vh low = inside ? load_h(p, d, x.cols) : vh{};
        const vh high =
            row + r + 1 < x.rows ? load_h(row_ptr(x, dtype, row + r + 1), d, x.cols) : vh{};
        store(out, convert<vu>(low) | (convert<vu>(high) << 16));
      }
    }
  }
}

// Rows [row, row + rows) of x in T, ld >= round_up(D, 16) elements, zero beyond column D.
template <class T>
[[maybe_unused]] static void pack_rows(const MatrixRef& x, DType dtype, int64_t row, int64_t rows,
                                       T* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* p = row_ptr(x, dtype, row + r);
    for (int64_t d = 0; d < x.cols; d += kLanes) {
      if constexpr (sizeof(T) == 4) {
        store(dst + r * ld + d, load_f32(p, dtype, d, x.cols));
      } else {
        store(dst + r * ld + d, load_h(p, d, x.cols));
      }
    }
  }
}

// Writes `count` <= 16 floats as the output dtype; kNative: bf16 by the CPU's own instruction.
template <bool kNative = false>
VLM_INLINE void store_as(void* dst, DType dtype, int64_t offset, vf x, int64_t count) {
  char* p = static_cast<char*>(dst) + offset * element_size(dtype);
  alignas(64) char tail[64];
  char* out = count >= kLanes ? p : tail;
  if (dtype == DType::f32) {
    store(reinterpret_cast<float*>(out), x);
  } else {
    store(reinterpret_cast<uint16_t*>(out),
          kNative ? to_bf16_native(x) : (dtype == DType::bf16 ? to_bf16(x) : to_f16(x)));
  }
  if (out == tail) std::memcpy(p, tail, count * element_size(dtype));
}

// One panel of y^T, src (D, 64), into rows [row, row + rows) of y (R, D).
[[maybe_unused]] static void unpack_transposed_panel(const float* src, int64_t rows,
                                                     const MutableMatrixRef& y, DType dtype,
                                                     int64_t row) {
  for (int64_t d = 0; d < y.cols; d += kLanes) {
    for (int64_t group = 0; group < rows; group += kLanes) {
      vu v[16];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = d + i < y.cols ? (vu)load(src + (d + i) * kPanel + group) : vu{};
      }
      transpose16(v);
      const int64_t count = min(kLanes, rows - group);
      for (int64_t i = 0; i < count; ++i) {
        store_as(y.data, dtype, (row + group + i) * y.stride + d, (vf)v[i], y.cols - d);
      }
    }
  }
}

}  // namespace vlm::cpu::VLM_ISA
