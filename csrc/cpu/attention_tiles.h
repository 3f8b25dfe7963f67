// What the forward and the backward of attention share: operands of one head, tiles of queries, the
// exponential. Per ISA.
//
// T is the type the products run in (pack.h). A word is one float or a pair of bf16.
#pragma once

#include "cpu/attention_rows.h"
#include "cpu/matmul.h"
#include "cpu/pack.h"
#include "vlm/attention.h"

namespace vlm::cpu::VLM_ISA {

constexpr float kLn2 = 6.93147180559945309417e-1f;
constexpr float kNegativeInfinity = -__builtin_inff();

// 2^x for x <= 0, exactly 0 for -inf and 1 for 0; NaN stays NaN. Relative error 1e-4 (degree 3,
// well below the rounding of bf16) or 7e-8 (degree 5): minimax fits on [0, 1], exact at both ends.
template <int kDegree>
VLM_INLINE vf exp2_of(vf x) {
  const Floored n = Floored::of(x);
  const vf f = n.fraction;
  vf p;
  if constexpr (kDegree == 3) {
    p = f * 7.8268009e-2f + 2.2630766e-1f;
    p = p * f + 6.9542434e-1f;
  } else {
    p = f * 1.8771391e-3f + 8.9957401e-3f;
    p = p * f + 5.5815224e-2f;
    p = p * f + 2.4016028e-1f;
    p = p * f + 6.9315162e-1f;
  }
  return Floored::scale(n, p * f + 1.f);
}

template <class T>
constexpr int kExpDegree = sizeof(T) == 4 ? 5 : 3;

// An entry of P or dS as the products take it.
VLM_INLINE void put(float* p, vf x) { store(p, x); }
VLM_INLINE void put(bf16_t* p, vf x) { store(p, to_bf16_native(x)); }

// tanh(x), relative error 2e-7: a rational function of 2^y away from 0, a polynomial near it.
VLM_INLINE vf tanh(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  const vf magnitude = (vf)((vu)x ^ sign);
  const vf e = exp(magnitude * -2.f);
  const vf far = (1.f - e) / (1.f + e);
  const vf z = x * x;
  vf p = z * 1.984081e-2f - 5.381646e-2f;
  p = p * z + 1.3332966e-1f;
  p = p * z - 3.3333332e-1f;
  const vf near = magnitude + magnitude * z * p;
  const vf r = select(less(magnitude, 0.35f), near, far);
  return (vf)((vu)r | sign);
}

// C (kRows, n) = A (kRows, k) B (k, n) [+ C] of n <= 8 columns; B in words, 8 of which can be read.
// Head dims such as 72 and 88 end in 8 columns, for which brgemm takes the time of 16.
template <int kRows, class T>
VLM_INLINE void multiply_narrow(int64_t k, int64_t n, const T* a, int64_t lda, const uint32_t* b,
                                int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  vf8 sums[kRows] = {};
  for (int64_t i = 0; i < k; i += kPerWord<T>) {
    vf8 row;
    std::memcpy(&row, b + i / kPerWord<T> * ldb, sizeof(row));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float word;
      std::memcpy(&word, a + r * lda + i, sizeof(word));
      if constexpr (sizeof(T) == 4) {
        sums[r] += word * row;
      } else {
        sums[r] = dot_pairs(sums[r], vf8{word, word, word, word, word, word, word, word}, row);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < n; ++j) {
      c[r * ldc + j] = accumulate ? c[r * ldc + j] + sums[r][j] : sums[r][j];
    }
  }
}

// C (m, n) = A (m, k) B (k, n) [+ C]; B in words, `ldb` words a row of them. Columns beyond a
// multiple of 64 are products of their own: brgemm spreads them over all others otherwise.
template <class T>
[[maybe_unused]] static void multiply(const Gemm& gemm, int64_t m, int64_t n, int64_t k, const T* a,
                                      int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                                      int64_t ldc, bool accumulate) {
  int64_t done = 0;
  const auto columns = [&](int64_t count) {
    if (count > 0) {
      gemm({m, count, k, lda, ldb, ldc, accumulate}, a, reinterpret_cast<const T*>(b + done),
           c + done);
      done += count;
    }
  };
  if (n % 64 == 0) return columns(n);
  if (n < 256) columns(n & ~int64_t{63});
#ifdef __AVX512F__
  const int64_t narrow = n % 16;
  if (narrow > 0 && narrow <= 8 && n > 16 && k % kPerWord<T> == 0) {
    columns((n - done) & ~int64_t{15});
    int64_t r = 0;
    const auto rows = [&]<int kRows>() {
      for (; r + kRows <= m; r += kRows) {
        multiply_narrow<kRows>(k, narrow, a + r * lda, lda, b + done, ldb, c + r * ldc + done, ldc,
                               accumulate);
      }
    };
    rows.template operator()<12>();
    rows.template operator()<6>();
    rows.template operator()<3>();
    rows.template operator()<1>();
    return;
  }
#endif
  columns(n - done);
}

// What the columns of S are rounded up to: 8 more by multiply_narrow() gain in fp32 alone.
template <class T>
constexpr int64_t kColumns = sizeof(T) == 4 ? 8 : 16;

// x (R, D) as the B operand x^T: dst (ceil(D / per word), ld) words, columns [R, round_up(R, 16))
// zero. `flip` negates.
template <class T>
[[maybe_unused]] static void pack_as_columns(const MatrixRef& x, DType dtype, bool flip,
                                             uint32_t* dst, int64_t ld) {
  const uint32_t sign = flip ? (sizeof(T) == 4 ? 0x80000000u : 0x80008000u) : 0u;
  const int64_t words = ceil_div(x.cols, kPerWord<T>);
  for (int64_t row = 0; row < x.rows; row += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      vu v[16];
      load_transposed<T>(v, x, dtype, row, w);
      const int64_t count = min(kLanes, words - w);
      for (int64_t i = 0; i < count; ++i) store(dst + (w + i) * ld + row, v[i] ^ sign);
    }
  }
}

// x (R, D) as the B operand x: dst (ceil(depth / per word), ld) words, ld >= round_up(D, 16); rows
// [R, depth) are zero.
template <class T>
[[maybe_unused]] static void pack_as_rows(const MatrixRef& x, DType dtype, int64_t depth,
                                          uint32_t* dst, int64_t ld) {
  for (int64_t r = 0; r < depth; r += kPerWord<T>) {
    uint32_t* out = dst + r / kPerWord<T> * ld;
    for (int64_t d = 0; d < x.cols; d += kLanes) {
      vu words = {};
      if constexpr (sizeof(T) == 4) {
        if (r < x.rows) words = (vu)load_f32(row_ptr(x, dtype, r), dtype, d, x.cols);
      } else {
        if (r < x.rows) {
          words = convert<vu>(load_h(row_ptr(x, dtype, r), d, x.cols));
        }
        if (r + 1 < x.rows) {
          words |= convert<vu>(load_h(row_ptr(x, dtype, r + 1), d, x.cols)) << 16;
        }
      }
      store(out + d, words);
    }
  }
}

// Rows that will soon be read or written: they are far away, and a loop over vectors has time to
// send for them.
struct Prefetch {
  const char* data = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0;  // of a row

  Prefetch() = default;
  Prefetch(const MatrixRef& x, DType dtype)
      : data(static_cast<const char*>(x.data)),
        rows(x.rows),
        stride(x.stride * element_size(dtype)),
        bytes(x.cols * element_size(dtype)) {}
  Prefetch(const MutableMatrixRef& x, DType dtype)
      : Prefetch(MatrixRef{x.data, x.rows, x.cols, x.stride}, dtype) {}

  // GCC takes a function that only prefetches for one without effect, unless it is inlined.
  template <int kWrite = 0>
  __attribute__((always_inline)) void row(int64_t i) const {
    if (i >= rows) return;
    for (int64_t b = 0; b < bytes; b += 64) {
      __builtin_prefetch(data + i * stride + b, kWrite, kWrite ? 3 : 2);
    }
  }
};

// The rows of one head of a segment, as they lie in memory.
inline MatrixRef head_rows(const HeadsRef& x, DType dtype, const AttentionSegment& segment,
                           int64_t head, int64_t begin, int64_t rows, int64_t dim) {
  const int64_t offset =
      segment.batch * x.batch_stride + head * x.head_stride + begin * x.row_stride;
  return {static_cast<const char*>(x.data) + offset * element_size(dtype), rows, dim, x.row_stride};
}

inline MutableMatrixRef head_rows(const MutableHeadsRef& x, DType dtype,
                                  const AttentionSegment& segment, int64_t head, int64_t begin,
                                  int64_t rows, int64_t dim) {
  if (!x.data) return {nullptr, rows, dim, x.row_stride};
  const MatrixRef view = head_rows(HeadsRef{x.data, x.batch_stride, x.head_stride, x.row_stride},
                                   dtype, segment, head, begin, rows, dim);
  return {x.data ? const_cast<void*>(view.data) : nullptr, rows, dim, view.stride};
}

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::f32 : DType::bf16;

// Rows of an A operand, (R, ld).
template <class T>
struct Operand {
  const T* data;
  int64_t ld;

  const T* row(int64_t i) const { return data + i * ld; }
};

// Whether products can take x where it lies. Rows further apart would share too few sets of L1.
template <class T>
bool is_close(const MatrixRef& x, DType dtype) {
  constexpr int64_t kClose = 512;  // bytes
  return dtype == kDType<T> && x.cols % kPerWord<T> == 0 && x.stride >= x.cols &&
         x.stride * static_cast<int64_t>(sizeof(T)) <= kClose;
}

// Rows of x as an A operand: where they lie, or else in `buffer` (R, ld).
template <class T>
Operand<T> rows_operand(const MatrixRef& x, DType dtype, T* buffer, int64_t ld) {
  if (is_close<T>(x, dtype)) return {static_cast<const T*>(x.data), x.stride};
  pack_rows<T>(x, dtype, 0, x.rows, buffer, ld);
  return {buffer, ld};
}

// The rows of one head, which are normalised and rotated before the products see them.
struct SourceHead {
  const AttentionInputs& in;
  const HeadNorm& norm;
  int64_t head;
  MatrixRef rows;
  int64_t rope_row;  // of the first row

  static SourceHead queries(const AttentionInputs& in, const AttentionSegment& s, int64_t head,
                            int64_t begin, int64_t count) {
    return {in, in.query_norm, head,
            head_rows(in.query, in.dtype, s, head, s.query_begin + begin, count, in.head_dim),
            rope_row_of(in, s, begin + s.keys - s.queries)};
  }
  static SourceHead keys(const AttentionInputs& in, const AttentionSegment& s, int64_t head,
                         int64_t begin, int64_t count) {
    return {in, in.key_norm, head,
            head_rows(in.key, in.dtype, s, head, s.key_begin + begin, count, in.head_dim),
            rope_row_of(in, s, begin)};
  }
  static int64_t rope_row_of(const AttentionInputs& in, const AttentionSegment& s, int64_t row) {
    return s.batch * in.rope.batch_stride / (in.rope.half > 0 ? in.rope.half : 1) + s.key_begin +
           row;
  }

  bool as_they_are() const { return norm.kind == HeadNorm::none && !in.rope.cos; }
  const float* table(const float* x) const { return x ? x + rope_row * in.rope.half : nullptr; }
  const char* data() const { return static_cast<const char*>(rows.data); }

  template <class T>
  Operand<T> operand(T* buffer, int64_t ld) const {
    if (as_they_are()) return rows_operand<T>(rows, in.dtype, buffer, ld);
    prepare(buffer, ld);
    return {buffer, ld};
  }
  // Writes them to dst (rows, ld), zero beyond column D, in T.
  template <class T>
  void prepare(T* dst, int64_t ld) const {
    if (as_they_are()) return pack_rows<T>(rows, in.dtype, 0, rows.rows, dst, ld);
    prepare_rows<T>(data(), rows.stride, in.dtype, rows.rows, rows.cols, norm, head,
                    table(in.rope.cos), table(in.rope.sin), in.rope.half, in.rope.interleaved, dst,
                    ld);
  }
  // From the gradient of the prepared rows (rows, ld) to that of the source, in place.
  void prepare_backward(float* grad, int64_t ld, float* weight, float* bias) const {
    if (as_they_are()) return;
    prepare_rows_backward(grad, ld, data(), rows.stride, in.dtype, rows.rows, rows.cols, norm, head,
                          table(in.rope.cos), table(in.rope.sin), in.rope.half, in.rope.interleaved,
                          grad, ld, weight, bias);
  }
};

// to = factor * from (rows, ld).
template <class T>
VLM_INLINE void write_row(const float* from, float factor, const MutableMatrixRef& to, int64_t row,
                          DType dtype) {
  for (int64_t d = 0; d < to.cols; d += kLanes) {
    store_as<sizeof(T) == 2>(to.data, dtype, row * to.stride + d, load(from + d) * factor,
                             to.cols - d);
  }
}

// Half-open.
struct Interval {
  int64_t begin = 0, end = 0;

  int64_t length() const { return end - begin; }
  bool empty() const { return end <= begin; }
  void add(Interval x) {
    if (x.empty()) return;
    if (empty()) {
      *this = x;
      return;
    }
    begin = min(begin, x.begin);
    end = max(end, x.end);
  }
  Interval within(Interval x) const { return {max(begin, x.begin), min(end, x.end)}; }
};

// The queries of the heads that share a key head, as one list of rows: all of the first head's,
// then all of the second's.
struct QueryRows {
  const AttentionInputs& in;
  const AttentionSegment& segment;
  int64_t kv_head;

  int64_t group() const { return in.heads / in.kv_heads; }
  int64_t count() const { return group() * segment.queries; }
  int64_t head(int64_t row) const { return kv_head * group() + row / segment.queries; }
  int64_t query(int64_t row) const { return row % segment.queries; }

  // The segment's keys that a row may see.
  Interval keys(int64_t row) const {
    if (!segment.range) return {0, segment.keys};
    const int32_t* range = segment.range + head(row) * in.range_head_stride + 2 * query(row);
    return {range[0], range[1]};
  }
};

// Consecutive rows and the keys that at least one of them sees.
struct QueryTile {
  int64_t begin = 0, end = 0;
  Interval keys;

  int64_t rows() const { return end - begin; }
};

// The tile that begins at `begin`: at most `most` rows, cut where the keys of the next row would
// leave too much of the tile masked (images packed side by side, windows).
inline QueryTile next_tile(const QueryRows& rows, int64_t begin, int64_t end, int64_t most) {
  QueryTile tile{begin, min(end, begin + most), {}};
  if (!rows.segment.range) {
    tile.keys = {0, rows.segment.keys};
    return tile;
  }
  constexpr int64_t kFree = 2048;  // masked entries that cost less than another tile
  int64_t seen = 0;
  for (int64_t r = begin; r < tile.end; ++r) {
    const Interval keys = rows.keys(r);
    Interval all = tile.keys;
    all.add(keys);
    seen += keys.empty() ? 0 : keys.length();
    const int64_t masked = (r - begin + 1) * all.length() - seen;
    if (r > begin && masked > kFree && 3 * masked > seen) {
      tile.end = r;
      break;
    }
    tile.keys = all;
  }
  return tile;
}

// Rows of a tile: heads are split evenly, or several short ones fill a tile.
inline int64_t tile_rows(int64_t queries, int64_t group, int64_t most) {
  if (queries == 0) return 1;
  if (2 * queries <= most) return min(group, most / queries) * queries;
  return ceil_div(queries, ceil_div(queries, most));
}

// Segments in order of falling cost, so that no thread is left with a long one at the end.
inline void sort_segments(const AttentionInputs& in, int32_t* order) {
  const auto cost = [&](int32_t i) {
    return static_cast<double>(in.segments[i].queries) * static_cast<double>(in.segments[i].keys);
  };
  const int64_t n = in.segment_count;
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t gap = n / 2; gap > 0; gap /= 2) {
    for (int64_t i = gap; i < n; ++i) {
      const int32_t moved = order[i];
      int64_t j = i;
      for (; j >= gap && cost(order[j - gap]) < cost(moved); j -= gap) order[j] = order[j - gap];
      order[j] = moved;
    }
  }
}

// Where the results of each segment's heads begin in (rows of all segments and heads).
inline void first_rows(const AttentionInputs& in, int64_t* first) {
  int64_t row = 0;
  for (int64_t i = 0; i < in.segment_count; ++i) {
    first[i] = row;
    row += in.heads * in.segments[i].queries;
  }
}

// The segment of the i-th (segment, key head) in the order of work; null: as they come.
inline int64_t segment_of(const AttentionInputs& in, const int32_t* order, int64_t i) {
  return order ? order[i / in.kv_heads] : i / in.kv_heads;
}

// One query's row of the mask.
struct MaskRow {
  AttentionMask::Kind kind;
  DType dtype;
  const char* entries;

  MaskRow(const AttentionMask& mask, const AttentionSegment& segment, int64_t head, int64_t query)
      : kind(mask.kind), dtype(mask.dtype) {
    const int64_t offset =
        segment.batch * mask.batch_stride + head * mask.head_stride + query * mask.row_stride;
    entries = static_cast<const char*>(mask.data) +
              offset * (kind == AttentionMask::boolean ? 1 : element_size(dtype));
  }

  // What the mask makes of 16 logits, of keys [key, key + 16); entries from `end` on are not read.
  vf apply(vf x, int64_t key, int64_t end) const {
    if (kind == AttentionMask::none) return x;
    if (kind == AttentionMask::additive) return x + load_f32(entries, dtype, key, end);
    typedef uint8_t bytes __attribute__((vector_size(16)));
    bytes seen = {};
    std::memcpy(&seen, entries + key, min(kLanes, end - key));
    const vi hidden = equal(convert<vi>(seen), 0);
    return select(hidden, broadcast(kNegativeInfinity), x);
  }
};

}  // namespace vlm::cpu::VLM_ISA
