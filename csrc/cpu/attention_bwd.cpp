// CPU kernel of the backward of attention, compiled once per ISA.
//
// A unit of work is a key head of a segment, or a part of its keys. Each block of about 128 keys
// meets all queries in the transposed form, S^T = K Q^T and dP^T = V dO^T, since then dV = P^T dO
// and dK = dS^T Q are complete after one product; only dQ^T, D x queries, is summed over the
// blocks. Where units are few the keys are split and the parts' dQ added in order. How is decided
// by the shapes alone, so that the result does not depend on the number of threads.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "vlm/attention.h"

#ifdef VLM_ISA
#include "cpu/attention_tiles.h"

namespace vlm::cpu::VLM_ISA {
namespace {

constexpr int64_t kKeys = 128;     // of a block at most
constexpr int64_t kQueries = 768;  // of a tile at most; longer sequences take tiles of kLongTile
constexpr int64_t kLongTile = 256;
constexpr int64_t kSplitKeys = 256;   // of a part where the keys are split, at least
constexpr int64_t kEnoughUnits = 16;  // of work for the keys not to be split

struct Plan {
  int64_t keys, queries;           // of the longest segment
  int64_t total_rows;              // queries x heads of all segments
  int64_t key_words, value_words;  // words of a row of Q, of dO
  int64_t ldk, ldv;                // of rows of K and Q, of V and dO: round_up(D, 16)
  int64_t key_block, tile;         // most keys of a block, most queries of a tile
  int64_t lds;                     // floats of a row of S^T, words of a row of Q^T and dO^T
  int64_t splits, split_keys;      // parts of the keys, keys of one
  int64_t ldt;                     // elements of a row of K^T
  bool sorted;                     // segments come in order of cost
  bool in_turn;                    // heads run one after the other: they add to one mask gradient
};

template <class T>
Plan make_plan(const AttentionInputs& in, const AttentionGrads& grads) {
  Plan p{};
  int64_t smallest = INT64_MAX;
  for (int64_t i = 0; i < in.segment_count; ++i) {
    const AttentionSegment& s = in.segments[i];
    p.keys = max(p.keys, s.keys);
    p.queries = max(p.queries, s.queries);
    smallest = min(smallest, s.queries * s.keys);
    p.total_rows += in.heads * s.queries;
  }
  p.key_words = ceil_div(in.head_dim, kPerWord<T>);
  p.value_words = ceil_div(in.value_dim, kPerWord<T>);
  p.ldk = round_up(in.head_dim, 16);
  p.ldv = round_up(in.value_dim, 16);
  p.sorted = smallest < p.queries * p.keys;
  p.in_turn = grads.mask && ((grads.mask_batch_stride == 0 && in.segment_count > 1) ||
                             (grads.mask_head_stride == 0 && in.heads > 1));
  const int64_t units = p.in_turn ? 1 : in.segment_count * in.kv_heads;
  const int64_t least = p.in_turn ? kKeys : kSplitKeys;
  p.splits = 1;
  if (units < kEnoughUnits) {
    p.splits = max(1, min(p.keys / least, ceil_div(kEnoughUnits, max(1, units))));
  }
  p.split_keys = round_up(ceil_div(p.keys, p.splits), 16);
  p.splits = max(1, ceil_div(p.keys, max(1, p.split_keys)));
  p.key_block =
      min(kKeys, round_up(ceil_div(p.split_keys, max(1, ceil_div(p.split_keys, kKeys))), 2));
  p.tile = p.queries <= kQueries ? p.queries : kLongTile;
  p.lds = round_up(p.tile, 64) + 16;
  p.ldt = round_up(p.split_keys, 32) + 32;
  return p;
}

// Scratch of one thread.
template <class T>
struct Buffers {
  T *key, *value;                    // K (keys, ldk), V (keys, ldv)
  T* key_columns;                    // K^T (D, ldt)
  float *key_grad, *value_grad;      // (keys or a block of them, ldk | ldv)
  uint32_t *query, *grad;            // Q^T (tiles, key words, lds), dO^T (tiles, value words, lds)
  uint32_t *query_rows, *grad_rows;  // Q (queries / per word, ldk), dO (queries / per word, ldv)
  float* query_grad;                 // dQ^T (tiles, D, lds)
  float *lse, *count, *delta;        // (queries): see load_queries()
  int32_t *first, *last;             // (queries): the keys that a query sees
  float *s, *dp;                     // S^T, then P^T; dP^T, then dS^T: (key block, lds)
  uint32_t* ds;                      // dS^T in row pairs (key block / 2, lds), where T is bf16
  float* mask;                       // mask^T, then its gradient^T (key block, lds)
  T* prepared;                       // Q (queries, ldk), normalised and rotated
  float* rows;                       // (max(16, key block), max(ldk, ldv))
};

struct Scratch {
  int32_t* order;     // (segments)
  int64_t* first;     // (segments): row of a segment's results
  float* query_grad;  // (splits, total_rows, ldk)
  // Gradients of weight and bias of the norms: (segments x heads, 2, ldk), and of the keys'
  // (segments x key heads x splits, 2, ldk).
  float *query_norm, *key_norm;
  char* threads;
  int64_t thread_bytes;
};

template <class T>
int64_t carve_thread(const AttentionInputs& in, const Plan& p, char* base, Buffers<T>* b) {
  Arena arena{base};
  Buffers<T> x;
  const int64_t keys = round_up(p.split_keys, 16), queries = round_up(p.queries, 16) + 16;
  const int64_t tiles = ceil_div(p.queries, max(1, p.tile));
  const int64_t kept = in.heads > in.kv_heads ? keys : p.key_block;
  x.key = arena.take<T>(keys * p.ldk);
  x.value = arena.take<T>(keys * p.ldv);
  x.key_columns = arena.take<T>((in.head_dim + 1) * p.ldt);
  x.key_grad = arena.take<float>(kept * p.ldk);
  x.value_grad = arena.take<float>(kept * p.ldv);
  x.query = arena.take<uint32_t>(tiles * p.key_words * p.lds);
  x.grad = arena.take<uint32_t>(tiles * p.value_words * p.lds);
  x.query_rows = arena.take<uint32_t>(queries / kPerWord<T> * p.ldk);
  x.grad_rows = arena.take<uint32_t>(queries / kPerWord<T> * p.ldv);
  x.query_grad = arena.take<float>(tiles * in.head_dim * p.lds);
  x.lse = arena.take<float>(queries);
  x.count = arena.take<float>(queries);
  x.delta = arena.take<float>(queries);
  x.first = arena.take<int32_t>(queries);
  x.last = arena.take<int32_t>(queries);
  x.s = arena.take<float>(p.key_block * p.lds);
  x.dp = arena.take<float>(p.key_block * p.lds);
  x.ds = arena.take<uint32_t>(sizeof(T) == 2 ? ceil_div(p.key_block, 2) * p.lds : 0);
  x.mask = arena.take<float>(in.mask.kind != AttentionMask::none ? p.key_block * p.lds : 0);
  x.rows = arena.take<float>(max(16, p.key_block) * max(p.ldk, p.ldv));
  const bool prepares = in.query_norm.kind != HeadNorm::none || in.rope.cos;
  x.prepared = arena.take<T>(prepares ? queries * p.ldk : 0);
  if (b) *b = x;
  return arena.used;
}

template <class T>
int64_t carve(const AttentionInputs& in, const Plan& p, char* base, Scratch* s) {
  Arena arena{base};
  Scratch x{};
  if (p.sorted) x.order = arena.take<int32_t>(in.segment_count);
  if (p.splits > 1) {
    x.first = arena.take<int64_t>(in.segment_count);
    x.query_grad = arena.take<float>(p.splits * p.total_rows * p.ldk);
  }
  if (in.query_norm.kind != HeadNorm::none) {
    x.query_norm = arena.take<float>(in.segment_count * in.heads * 2 * p.ldk);
  }
  if (in.key_norm.kind != HeadNorm::none) {
    x.key_norm = arena.take<float>(in.segment_count * in.kv_heads * p.splits * 2 * p.ldk);
  }
  x.thread_bytes = round_up(carve_thread<T>(in, p, nullptr, nullptr), 4096) + 64;
  x.threads = arena.take<char>(x.thread_bytes * num_threads());
  if (s) *s = x;
  return arena.used + 64;
}

template <class T>
class Backward {
 public:
  Backward(const AttentionInputs& in, const HeadsRef& grad, const float* grad_lse,
           const HeadsRef& out, const float* lse, const AttentionGrads& grads, void* scratch)
      : in_(in),
        grad_(grad),
        out_(out),
        grad_lse_(grad_lse),
        lse_(lse),
        grads_(grads),
        plan_(make_plan<T>(in, grads)),
        gemm_{sizeof(T) == 2 || brgemm_runs_f32()},
        need_query_(grads.query.data || grads.query_norm_weight || grads.query_norm_bias),
        need_key_(grads.key.data || grads.key_norm_weight || grads.key_norm_bias),
        transformed_(in.mask.kind != AttentionMask::none || in.softcap > 0.f),
        ranged_(false),
        exponent_(__builtin_fabsf(in.scale) * kLog2e) {
    for (int64_t i = 0; i < in.segment_count; ++i) ranged_ |= in.segments[i].range != nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch);
    carve<T>(in, plan_, reinterpret_cast<char*>((address + 63) & ~uintptr_t{63}), &scratch_);
  }

  void run() {
    if (plan_.sorted) sort_segments(in_, scratch_.order);
    if (scratch_.first) first_rows(in_, scratch_.first);
    const int64_t heads = in_.segment_count * in_.kv_heads;
    const int64_t norm = 2 * plan_.ldk * static_cast<int64_t>(sizeof(float));
    if (scratch_.query_norm) {
      std::memset(scratch_.query_norm, 0, in_.segment_count * in_.heads * norm);
    }
    if (scratch_.key_norm) std::memset(scratch_.key_norm, 0, heads * plan_.splits * norm);
    const auto unit = [&](int64_t head, int64_t split, int thread) {
      const int64_t segment = segment_of(in_, scratch_.order, head);
      Ahead ahead = plan_.splits == 1 ? ahead_of(head) : Ahead{};
      unit_of(segment, head % in_.kv_heads, split, ahead, thread);
      gemm_.release();
    };
    if (plan_.in_turn) {
      for (int64_t head = 0; head < heads; ++head) {
        parallel_for(plan_.splits, [&](int64_t split, int thread) { unit(head, split, thread); });
      }
    } else {
      parallel_for(heads * plan_.splits, [&](int64_t i, int thread) {
        unit(i / plan_.splits, i % plan_.splits, thread);
      });
    }
    if (plan_.splits > 1 && need_query_) {
      parallel_for(in_.segment_count * in_.heads,
                   [&](int64_t i, int) { add_query_grads(i / in_.heads, i % in_.heads); });
    }
    add_norm_grads(in_.query_norm, in_.heads, 1, scratch_.query_norm, grads_.query_norm_weight,
                   grads_.query_norm_bias);
    add_norm_grads(in_.key_norm, in_.kv_heads, plan_.splits, scratch_.key_norm,
                   grads_.key_norm_weight, grads_.key_norm_bias);
  }

 private:
  // What this thread's next unit will probably read.
  struct Ahead {
    Prefetch query, key, value, grad, out;
    // And what this one will write.
    Prefetch query_grad = {}, key_grad = {}, value_grad = {};
    int64_t at = 0;

    __attribute__((always_inline)) void row() {
      query.row(at);
      key.row(at);
      value.row(at);
      grad.row(at);
      out.row(at);
      query_grad.row<1>(at);
      key_grad.row<1>(at);
      value_grad.row<1>(at++);
    }
  };

  Ahead ahead_of(int64_t unit) const {
    Ahead a{};
    const int64_t now = segment_of(in_, scratch_.order, unit), kv_head = unit % in_.kv_heads;
    a.query_grad = queries(grads_.query, now, kv_head, in_.head_dim);
    a.key_grad = keys(grads_.key, now, kv_head, in_.head_dim);
    a.value_grad = keys(grads_.value, now, kv_head, in_.value_dim);
    unit += num_threads();
    if (unit >= in_.segment_count * in_.kv_heads) return a;
    const int64_t next = segment_of(in_, scratch_.order, unit), head = unit % in_.kv_heads;
    a.query = queries(in_.query, next, head, in_.head_dim);
    a.key = keys(in_.key, next, head, in_.head_dim);
    a.value = keys(in_.value, next, head, in_.value_dim);
    a.grad = queries(grad_, next, head, in_.value_dim);
    a.out = queries(out_, next, head, in_.value_dim);
    return a;
  }
  template <class Ref>
  Prefetch queries(const Ref& x, int64_t index, int64_t kv_head, int64_t dim) const {
    const AttentionSegment& s = in_.segments[index];
    if (!x.data) return {};
    return {head_rows(x, in_.dtype, s, kv_head * group(), s.query_begin, s.queries, dim),
            in_.dtype};
  }
  template <class Ref>
  Prefetch keys(const Ref& x, int64_t index, int64_t kv_head, int64_t dim) const {
    const AttentionSegment& s = in_.segments[index];
    if (!x.data) return {};
    return {head_rows(x, in_.dtype, s, kv_head, s.key_begin, s.keys, dim), in_.dtype};
  }

  int64_t group() const { return in_.heads / in_.kv_heads; }
  int64_t tile_begin(int64_t tile) const { return tile * plan_.tile; }

  void unit_of(int64_t index, int64_t kv_head, int64_t split, Ahead& ahead, int thread) {
    const AttentionSegment& segment = in_.segments[index];
    Buffers<T> b;
    carve_thread<T>(in_, plan_, scratch_.threads + thread * scratch_.thread_bytes, &b);
    const Interval own{min(split * plan_.split_keys, segment.keys),
                       min((split + 1) * plan_.split_keys, segment.keys)};
    if (own.empty()) return no_keys(index, kv_head, split);
    const Keys loaded = load_keys(segment, kv_head, own, b);
    const int64_t blocks = ceil_div(own.length(), plan_.key_block);
    const int64_t block = ceil_div(own.length(), blocks);  // evenly
    const int64_t block_keys = min(plan_.key_block, round_up(block, 2));
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t head = kv_head * group() + g;
      load_queries(segment, head, b);
      for (int64_t k = own.begin; k < own.end; k += block_keys) {
        const Interval keys{k, min(k + block_keys, own.end)};
        // One head's gradient is complete with the block; those of several are summed.
        const int64_t at = group() > 1 ? k - own.begin : 0;
        float* key_grad = b.key_grad + at * plan_.ldk;
        float* value_grad = b.value_grad + at * plan_.ldv;
        key_block(segment, head, keys, loaded, g > 0, key_grad, value_grad, ahead, b);
        if (g == group() - 1) write_keys(index, kv_head, split, keys, key_grad, value_grad);
      }
      if (need_query_) write_queries(index, head, split, b);
    }
  }

  struct Keys {
    Operand<T> key, value;
    int64_t first;  // of the segment's keys
  };

  Keys load_keys(const AttentionSegment& segment, int64_t kv_head, Interval own,
                 const Buffers<T>& b) {
    const int64_t count = own.length();
    const SourceHead source = SourceHead::keys(in_, segment, kv_head, own.begin, count);
    const MatrixRef value = head_rows(in_.value, in_.dtype, segment, kv_head,
                                      segment.key_begin + own.begin, count, in_.value_dim);
    const Keys keys{source.operand(b.key, plan_.ldk),
                    rows_operand<T>(value, in_.dtype, b.value, plan_.ldv), own.begin};
    if (need_query_) {
      pack_transposed<T>({keys.key.data, count, in_.head_dim, keys.key.ld}, kDType<T>, 0, count,
                         b.key_columns, plan_.ldt);
    }
    return keys;
  }

  // Q and dO of a head in both forms; for each query what its exponent and dP are shifted by.
  // Queries that see nothing, and the padding after the last: P = 0.
  void load_queries(const AttentionSegment& segment, int64_t head, const Buffers<T>& b) {
    const int64_t count = segment.queries, padded = round_up(count, 16) + 16;
    const SourceHead source = SourceHead::queries(in_, segment, head, 0, count);
    MatrixRef query = source.rows;
    DType dtype = in_.dtype;
    if (!source.as_they_are()) {
      source.prepare(b.prepared, plan_.ldk);
      query = {b.prepared, count, in_.head_dim, plan_.ldk};
      dtype = kDType<T>;
    }
    const MatrixRef grad =
        head_rows(grad_, in_.dtype, segment, head, segment.query_begin, count, in_.value_dim);
    const MatrixRef out =
        head_rows(out_, in_.dtype, segment, head, segment.query_begin, count, in_.value_dim);
    for (int64_t t = 0; tile_begin(t) < count; ++t) {
      const int64_t begin = tile_begin(t), rows = min(plan_.tile, count - begin);
      const auto part = [&](const MatrixRef& x, DType type) {
        return MatrixRef{row_ptr(x, type, begin), rows, x.cols, x.stride};
      };
      pack_as_columns<T>(part(query, dtype), dtype, in_.scale < 0.f,
                         b.query + t * plan_.key_words * plan_.lds, plan_.lds);
      pack_as_columns<T>(part(grad, in_.dtype), in_.dtype, false,
                         b.grad + t * plan_.value_words * plan_.lds, plan_.lds);
    }
    if (need_key_) pack_as_rows<T>(query, dtype, padded, b.query_rows, plan_.ldk);
    if (grads_.value.data) pack_as_rows<T>(grad, in_.dtype, padded, b.grad_rows, plan_.ldv);
    const int64_t row =
        segment.batch * in_.lse_batch_stride + head * in_.lse_head_stride + segment.query_begin;
    for (int64_t q = 0; q < padded; ++q) {
      b.lse[q] = 1e30f;
      b.count[q] = b.delta[q] = 0.f;
      b.first[q] = b.last[q] = 0;
      if (q >= count || lse_[row + q] == kNegativeInfinity) continue;
      vf dot = {};
      for (int64_t d = 0; d < in_.value_dim; d += kLanes) {
        dot += load_f32(row_ptr(grad, in_.dtype, q), in_.dtype, d, in_.value_dim) *
               load_f32(row_ptr(out, in_.dtype, q), in_.dtype, d, in_.value_dim);
      }
      b.delta[q] = hsum(dot) - (grad_lse_ ? grad_lse_[row + q] : 0.f);
      b.lse[q] = transformed_ ? lse_[row + q] : lse_[row + q] * kLog2e;
      if (transformed_) b.count[q] = absorbed(segment, head, q, lse_[row + q]);
      b.last[q] = static_cast<int32_t>(segment.keys);
      if (segment.range) {
        const int32_t* range = segment.range + head * in_.range_head_stride + 2 * q;
        b.first[q] = range[0];
        b.last[q] = range[1];
      }
    }
    if (need_query_) {
      std::memset(b.query_grad, 0,
                  ceil_div(count, plan_.tile) * in_.head_dim * plan_.lds * sizeof(float));
    }
  }

  // log2 of the number of keys that share the softmax of a query whose every key has a mask so low,
  // such as the lowest float, that neither the logits nor log(count) show in its log-sum-exp.
  float absorbed(const AttentionSegment& segment, int64_t head, int64_t query, float lse) const {
    if (in_.mask.kind != AttentionMask::additive || !(lse < -1e30f)) return 0.f;
    Interval keys{0, segment.keys};
    if (segment.range) {
      const int32_t* range = segment.range + head * in_.range_head_stride + 2 * query;
      keys = {range[0], range[1]};
    }
    const MaskRow mask(in_.mask, segment, head, query);
    int64_t count = 0;
    for (int64_t j = keys.begin; j < keys.end; j += kLanes) {
      const vf entry = mask.apply(vf{}, j, keys.end);
      for (int64_t i = 0; i < min(kLanes, keys.end - j); ++i) count += entry[i] == lse;
    }
    return count > 1 ? __builtin_log2f(static_cast<float>(count)) : 0.f;
  }

  // Queries of [begin, end) that see one of `keys`, whole vectors of them; `all`: and every one of
  // the keys.
  Interval seeing(const Buffers<T>& b, Interval keys, Interval queries, bool& all) const {
    all = true;
    if (!ranged_) return queries;
    Interval seen{queries.end, queries.begin};
    for (int64_t q = queries.begin; q < queries.end; ++q) {
      if (b.first[q] < keys.end && b.last[q] > keys.begin) {
        seen.begin = min(seen.begin, q);
        seen.end = q + 1;
      }
    }
    if (seen.empty()) return seen;
    seen.begin = queries.begin + ((seen.begin - queries.begin) & ~int64_t{15});
    seen.end = min(queries.end, queries.begin + round_up(seen.end - queries.begin, 16));
    for (int64_t q = seen.begin; q < seen.end; ++q) {
      all &= b.first[q] <= keys.begin && b.last[q] >= keys.end;
    }
    return seen;
  }

  // dK and dV of a block of keys for one head, and its share of dQ^T.
  void key_block(const AttentionSegment& segment, int64_t head, Interval keys, const Keys& loaded,
                 bool accumulate, float* key_grad, float* value_grad, Ahead& ahead,
                 const Buffers<T>& b) {
    const int64_t rows = keys.length(), at = keys.begin - loaded.first;
    for (int64_t t = 0; tile_begin(t) < segment.queries; ++t) {
      const int64_t begin = tile_begin(t);
      bool all;
      const Interval queries =
          seeing(b, keys, {begin, min(begin + plan_.tile, segment.queries)}, all);
      if (queries.empty()) continue;
      const int64_t column = queries.begin - begin, count = queries.length();
      // Few sizes for many lengths, so that brgemm need not be compiled for each.
      const bool whole = !ranged_ && !plan_.sorted;
      const int64_t columns = round_up(count, whole ? kColumns<T> : 16),
                    padded = round_up(count, 16);
      const int64_t depth = whole ? round_up(count, kPerWord<T>) : padded;
      multiply<T>(gemm_, rows, columns, plan_.key_words * kPerWord<T>, loaded.key.row(at),
                  loaded.key.ld, b.query + t * plan_.key_words * plan_.lds + column, plan_.lds, b.s,
                  plan_.lds, false);
      multiply<T>(gemm_, rows, columns, plan_.value_words * kPerWord<T>, loaded.value.row(at),
                  loaded.value.ld, b.grad + t * plan_.value_words * plan_.lds + column, plan_.lds,
                  b.dp, plan_.lds, false);
      if (in_.mask.kind != AttentionMask::none) load_mask(segment, head, keys, queries, b);
      all ? gradients<false>(keys, queries.begin, padded, ahead, b)
          : gradients<true>(keys, queries.begin, padded, ahead, b);
      if (grads_.mask) add_mask_grad(segment, head, keys, queries, b);
      if (grads_.value.data) {
        multiply<T>(gemm_, rows, in_.value_dim, depth, reinterpret_cast<const T*>(b.s),
                    plan_.lds * kPerWord<T>, b.grad_rows + queries.begin / kPerWord<T> * plan_.ldv,
                    plan_.ldv, value_grad, plan_.ldv, accumulate);
      }
      if (need_key_) {
        multiply<T>(gemm_, rows, in_.head_dim, depth, reinterpret_cast<const T*>(b.dp),
                    plan_.lds * kPerWord<T>, b.query_rows + queries.begin / kPerWord<T> * plan_.ldk,
                    plan_.ldk, key_grad, plan_.ldk, accumulate);
      }
      if (need_query_) {
        const uint32_t* ds = sizeof(T) == 2 ? b.ds : reinterpret_cast<const uint32_t*>(b.dp);
        multiply<T>(gemm_, in_.head_dim, columns, round_up(rows, kPerWord<T>), b.key_columns + at,
                    plan_.ldt, ds, plan_.lds, b.query_grad + t * in_.head_dim * plan_.lds + column,
                    plan_.lds, true);
      }
      accumulate = true;
    }
    if (!accumulate) {
      std::memset(key_grad, 0, rows * plan_.ldk * sizeof(float));
      std::memset(value_grad, 0, rows * plan_.ldv * sizeof(float));
    }
  }

  // P^T = exp(S^T - lse) and dS^T = P^T (dP^T - delta), in T, of `padded` queries from `begin` on.
  template <bool kPartial>
  void gradients(Interval keys, int64_t begin, int64_t padded, Ahead& ahead, const Buffers<T>& b) {
    transformed_ ? gradients_as<kPartial, true>(keys, begin, padded, ahead, b)
                 : gradients_as<kPartial, false>(keys, begin, padded, ahead, b);
  }

  template <bool kPartial, bool kTransformed>
  void gradients_as(Interval keys, int64_t begin, int64_t padded, Ahead& ahead,
                    const Buffers<T>& b) {
    const int64_t rows = keys.length();
    // One entry: P to `p`, dS returned.
    const auto entry = [&](int64_t r, int64_t q, T* p) {
      const int64_t at = r * plan_.lds + q;
      vf x = load(b.s + at), slope = broadcast(1.f), e;
      if constexpr (kTransformed) {
        x = x * __builtin_fabsf(in_.scale);
        if (in_.softcap > 0.f) {
          const vf t = tanh(x / in_.softcap);
          x = t * in_.softcap;
          slope = 1.f - t * t;
        }
        if (in_.mask.kind != AttentionMask::none) x += load(b.mask + at);
        e = exp2_of<kExpDegree<T>>((x - load(b.lse + begin + q)) * kLog2e -
                                   load(b.count + begin + q));
      } else {
        e = exp2_of<kExpDegree<T>>(x * exponent_ - load(b.lse + begin + q));
      }
      vf ds = e * (load(b.dp + at) - load(b.delta + begin + q));
      if constexpr (kPartial) {
        const int32_t j = static_cast<int32_t>(keys.begin + r);
        const vi seen = less(load(b.first + begin + q), j + 1) & less(j, load(b.last + begin + q));
        e = select(seen, e, vf{});
        ds = select(seen, ds, vf{});
      }
      put(p + q, e);
      if constexpr (kTransformed) {
        if (grads_.mask) store(b.mask + at, ds);
        ds = ds * slope;
      }
      return ds;
    };
    for (int64_t r = 0; r < rows; r += kPerWord<T>) {
      T* p = reinterpret_cast<T*>(b.s + r * plan_.lds);
      T* ds = reinterpret_cast<T*>(b.dp + r * plan_.lds);
      const int64_t next = plan_.lds * kPerWord<T>;  // elements to the next row
      for (int64_t i = 0; i < kPerWord<T>; ++i) ahead.row();
      if constexpr (sizeof(T) == 4) {
        for (int64_t q = 0; q < padded; q += kLanes) put(ds + q, entry(r, q, p));
      } else {
        uint32_t* pairs = b.ds + r / 2 * plan_.lds;
        const bool odd = r + 1 == rows;
        for (int64_t q = 0; q < padded; q += kLanes) {
          const vh low = to_bf16_native(entry(r, q, p));
          const vh high = odd ? vh{} : to_bf16_native(entry(r + 1, q, p + next));
          store(ds + q, low);
          if (!odd) store(ds + next + q, high);
          store(pairs + q, convert<vu>(low) | (convert<vu>(high) << 16));
        }
      }
    }
  }

  // mask^T of a block, what is boolean as 0 and -inf.
  void load_mask(const AttentionSegment& segment, int64_t head, Interval keys, Interval queries,
                 const Buffers<T>& b) {
    for (int64_t q = 0; q < queries.length(); q += kLanes) {
      for (int64_t k = 0; k < keys.length(); k += kLanes) {
        vu v[16];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          v[i] = vu{};
          if (q + i >= queries.length()) continue;
          const MaskRow mask(in_.mask, segment, head, queries.begin + q + i);
          v[i] = (vu)mask.apply(vf{}, keys.begin + k, keys.end);
        }
        transpose16(v);
        const int64_t count = min(kLanes, keys.length() - k);
        for (int64_t i = 0; i < count; ++i) {
          store(b.mask + (k + i) * plan_.lds + q, (vf)v[i]);
        }
      }
    }
  }

  void add_mask_grad(const AttentionSegment& segment, int64_t head, Interval keys, Interval queries,
                     const Buffers<T>& b) {
    float* to = grads_.mask + segment.batch * grads_.mask_batch_stride +
                head * grads_.mask_head_stride + keys.begin;
    for (int64_t q = 0; q < queries.length(); q += kLanes) {
      for (int64_t k = 0; k < keys.length(); k += kLanes) {
        vu v[16];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          v[i] = k + i < keys.length() ? (vu)load(b.mask + (k + i) * plan_.lds + q) : vu{};
        }
        transpose16(v);
        const int64_t count = min(kLanes, keys.length() - k);
        for (int64_t i = 0; i < min(kLanes, queries.length() - q); ++i) {
          float* row = to + (queries.begin + q + i) * grads_.mask_row_stride + k;
          const vf sum =
              load_f32(reinterpret_cast<const char*>(row), DType::f32, 0, count) + (vf)v[i];
          store_as(row, DType::f32, 0, sum, count);
        }
      }
    }
  }

  void write_keys(int64_t index, int64_t kv_head, int64_t split, Interval keys, float* key_grad,
                  const float* value_grad) {
    const AttentionSegment& segment = in_.segments[index];
    const int64_t begin = segment.key_begin + keys.begin, count = keys.length();
    if (need_key_) {
      float* norm = scratch_.key_norm;
      if (norm) norm += ((index * in_.kv_heads + kv_head) * plan_.splits + split) * 2 * plan_.ldk;
      write_source(SourceHead::keys(in_, segment, kv_head, keys.begin, count), key_grad, norm,
                   head_rows(grads_.key, in_.dtype, segment, kv_head, begin, count, in_.head_dim));
    }
    if (grads_.value.data) {
      write_rows(value_grad, plan_.ldv, 1.f,
                 head_rows(grads_.value, in_.dtype, segment, kv_head, begin, count, in_.value_dim));
    }
  }

  // Gradients of prepared rows, (rows, ldk), still without the scale, to those of their source.
  void write_source(const SourceHead& source, float* grad, float* norm,
                    const MutableMatrixRef& to) {
    float factor = in_.scale;
    if (!source.as_they_are()) {
      for (int64_t i = 0; i < to.rows * plan_.ldk; i += kLanes) {
        store(grad + i, load(grad + i) * factor);
      }
      factor = 1.f;
      source.prepare_backward(grad, plan_.ldk, norm, norm ? norm + plan_.ldk : nullptr);
    }
    if (to.data) write_rows(grad, plan_.ldk, factor, to);
  }

  void write_query_source(int64_t index, int64_t head, Interval queries, float* grad) {
    const AttentionSegment& segment = in_.segments[index];
    float* norm = scratch_.query_norm;
    if (norm) norm += (index * in_.heads + head) * 2 * plan_.ldk;
    write_source(SourceHead::queries(in_, segment, head, queries.begin, queries.length()), grad,
                 norm,
                 head_rows(grads_.query, in_.dtype, segment, head,
                           segment.query_begin + queries.begin, queries.length(), in_.head_dim));
  }

  // Sums the parts of all segments, in order, over the heads that share a weight.
  void add_norm_grads(const HeadNorm& norm, int64_t heads, int64_t splits, const float* parts,
                      float* weight, float* bias) {
    if (norm.kind == HeadNorm::none) return;
    float* const grads[] = {weight, bias};
    for (float* to : grads) {
      if (!to) continue;
      for (int64_t i = 0; i < in_.segment_count * heads * splits; ++i) {
        const float* from = parts + i * 2 * plan_.ldk + (to == bias ? plan_.ldk : 0);
        float* sum = to + i / splits % heads * norm.head_stride;
        for (int64_t d = 0; d < in_.head_dim; ++d) sum[d] += from[d];
      }
    }
  }

  void write_rows(const float* from, int64_t ld, float factor, const MutableMatrixRef& to) {
    for (int64_t r = 0; r < to.rows; ++r) write_row<T>(from + r * ld, factor, to, r, in_.dtype);
  }

  // 16 rows of dQ from dQ^T, (16, ldk).
  void query_grad_rows(const Buffers<T>& b, int64_t query, float* rows) {
    const float* from =
        b.query_grad + query / plan_.tile * in_.head_dim * plan_.lds + query % plan_.tile;
    for (int64_t d = 0; d < in_.head_dim; d += kLanes) {
      vu v[16];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = d + i < in_.head_dim ? (vu)load(from + (d + i) * plan_.lds) : vu{};
      }
      transpose16(v);
      for (int i = 0; i < kLanes; ++i) store(rows + i * plan_.ldk + d, (vf)v[i]);
    }
  }

  void write_queries(int64_t index, int64_t head, int64_t split, const Buffers<T>& b) {
    const AttentionSegment& segment = in_.segments[index];
    for (int64_t t = 0; tile_begin(t) < segment.queries; ++t) {
      const int64_t end = min(tile_begin(t) + plan_.tile, segment.queries);
      for (int64_t q = tile_begin(t); q < end; q += kLanes) {
        const int64_t count = min(kLanes, end - q);
        query_grad_rows(b, q, b.rows);
        if (plan_.splits > 1) {
          float* to = split_rows(index, head, split) + q * plan_.ldk;
          std::memcpy(to, b.rows, count * plan_.ldk * sizeof(float));
        } else {
          write_query_source(index, head, {q, q + count}, b.rows);
        }
      }
    }
  }

  // What one part of the keys gives to dQ of a head: (queries, ldk).
  float* split_rows(int64_t index, int64_t head, int64_t split) const {
    return scratch_.query_grad +
           (split * plan_.total_rows + scratch_.first[index] + head * in_.segments[index].queries) *
               plan_.ldk;
  }

  // Of a segment shorter than others there may be nothing left for this part.
  void no_keys(int64_t index, int64_t kv_head, int64_t split) {
    if (!need_query_) return;
    const int64_t values = in_.segments[index].queries * plan_.ldk;
    for (int64_t head = kv_head * group(); head < (kv_head + 1) * group(); ++head) {
      std::memset(split_rows(index, head, split), 0, values * sizeof(float));
    }
  }

  void add_query_grads(int64_t index, int64_t head) {
    const AttentionSegment& segment = in_.segments[index];
    float* sum = split_rows(index, head, 0);
    for (int64_t i = 1; i < plan_.splits; ++i) {
      const float* part = split_rows(index, head, i);
      for (int64_t j = 0; j < segment.queries * plan_.ldk; j += kLanes) {
        store(sum + j, load(sum + j) + load(part + j));
      }
    }
    write_query_source(index, head, {0, segment.queries}, sum);
  }

  const AttentionInputs& in_;
  const HeadsRef& grad_;
  const HeadsRef& out_;
  const float* grad_lse_;
  const float* lse_;
  const AttentionGrads& grads_;
  const Plan plan_;
  const Gemm gemm_;
  const bool need_query_, need_key_;
  const bool transformed_;  // S is more than a product: softcap or mask
  bool ranged_;             // some query does not see all keys
  const float exponent_;    // from a product to an exponent of 2
  Scratch scratch_;
};

}  // namespace

int64_t attention_bwd_scratch_bytes(const AttentionInputs& in, const AttentionGrads& grads) {
  return runs_in_bf16(in.dtype) ? carve<bf16_t>(in, make_plan<bf16_t>(in, grads), nullptr, nullptr)
                                : carve<float>(in, make_plan<float>(in, grads), nullptr, nullptr);
}

void attention_bwd(const AttentionInputs& in, const HeadsRef& grad, const float* grad_lse,
                   const HeadsRef& out, const float* lse, const AttentionGrads& grads,
                   void* scratch) {
  runs_in_bf16(in.dtype) ? Backward<bf16_t>(in, grad, grad_lse, out, lse, grads, scratch).run()
                         : Backward<float>(in, grad, grad_lse, out, lse, grads, scratch).run();
}

}  // namespace vlm::cpu::VLM_ISA

#else  // compiled once more without VLM_ISA: chooses at run time

namespace vlm::cpu {

VLM_DISPATCH(int64_t, attention_bwd_scratch_bytes,
             (const AttentionInputs& in, const AttentionGrads& grads), (in, grads))
VLM_DISPATCH(void, attention_bwd,
             (const AttentionInputs& in, const HeadsRef& grad, const float* grad_lse,
              const HeadsRef& out, const float* lse, const AttentionGrads& grads, void* scratch),
             (in, grad, grad_lse, out, lse, grads, scratch))

}  // namespace vlm::cpu
#endif
