// CPU kernel of the forward of attention, compiled once per ISA.
//
// A unit of work is the queries of all heads that share a key head, or a part of them. It packs K^T
// and V once; then each tile of about 100 queries: S = Q K^T (rows x up to 1024 keys, in L2),
// softmax in place, O = P V. Longer rows take several such blocks with a running maximum. Where
// units are few and rows short, the keys are split and the parts combined in order; how is decided
// by the shapes alone, so that the result does not depend on the number of threads.
#include "vlm/attention.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

#ifdef VLM_ISA
#include "cpu/attention_tiles.h"

namespace vlm::cpu::VLM_ISA {
namespace {

constexpr int64_t kRows = 128;        // queries of a tile at most
constexpr int64_t kGroup = 4;         // rows of S whose softmax overlaps
constexpr int64_t kKeys = 1024;       // keys of a block of S at most
constexpr int64_t kSplitKeys = 256;   // keys of a part where the keys are split, at least
constexpr int64_t kEnoughUnits = 32;  // of work for the keys not to be split
constexpr double kUnitsPerThread = 4;

struct Plan {
  int64_t words, depth;     // of a row of Q: words, elements of T
  int64_t keys, key_block;  // of the longest segment, of a block of S
  int64_t lds, ldv;         // floats of a row of S (and words of a row of K^T), words of one of V
  int64_t rows;             // most of a tile
  int64_t splits;           // parts of the keys
  int64_t split_keys;       // of one part
  int64_t parts;            // parts of the queries
  int64_t total_rows;       // of all splits' partial results
  bool sorted;              // segments come in order of cost
};

template <class T>
Plan make_plan(const AttentionInputs& in) {
  Plan p{};
  const int64_t group = in.heads / in.kv_heads;
  int64_t queries = 0, smallest = INT64_MAX;
  double total = 0;
  for (int64_t i = 0; i < in.segment_count; ++i) {
    const AttentionSegment& s = in.segments[i];
    p.keys = max(p.keys, s.keys);
    queries = max(queries, s.queries);
    smallest = min(smallest, s.queries * s.keys);
    p.rows = max(p.rows, tile_rows(s.queries, group, kRows));
    p.total_rows += s.queries * in.heads;
    total += static_cast<double>(s.queries) * static_cast<double>(s.keys);
  }
  p.words = ceil_div(in.head_dim, kPerWord<T>);
  p.depth = p.words * kPerWord<T>;
  p.sorted = smallest < queries * p.keys;
  const int64_t units = in.segment_count * in.kv_heads;
  p.splits = 1;
  p.split_keys = p.keys;
  if (group * queries <= kRows && units < kEnoughUnits && p.keys >= 2 * kSplitKeys) {
    p.splits = min(p.keys / kSplitKeys, ceil_div(kEnoughUnits, units));
    p.split_keys = round_up(ceil_div(p.keys, p.splits), 32);
    p.splits = ceil_div(p.keys, p.split_keys);
  }
  p.key_block = round_up(ceil_div(p.split_keys, max(1, ceil_div(p.split_keys, kKeys))), 16);
  p.lds = round_up(p.key_block, 64) + 16;  // never a multiple of 1 KiB, and the same for many sizes
  p.ldv = round_up(in.value_dim, 16);
  // Parts of the queries, for threads to end together: of units that are as large as the largest.
  const double largest = static_cast<double>(queries) * static_cast<double>(p.keys);
  const double even = largest > 0 ? static_cast<double>(in.kv_heads) * total / largest : 1;
  const int64_t tiles = ceil_div(group * queries, max(1, p.rows));
  const double wanted = kUnitsPerThread * num_threads() / (even > 1 ? even : 1);
  p.parts = p.splits > 1 ? 1 : max(1, min(tiles, static_cast<int64_t>(__builtin_ceil(wanted))));
  return p;
}

// Scratch of one thread.
template <class T>
struct Buffers {
  uint32_t* keys;    // K^T (blocks, words, lds)
  uint32_t* values;  // V (keys / per word, ldv)
  T* query;          // Q (rows, round_up(D, 16))
  T* prepared;       // K (key block, round_up(D, 16)), normalised and rotated
  float* s;          // S, then P (rows, lds)
  float* out;        // O (rows, ldv)
  float* max;        // (rows), in the units of the exponent
  float* sum;        // (rows)
};

struct Scratch {
  int32_t* order;  // (segments)
  float* out;      // (splits, total_rows, ldv)
  float* max;      // (splits, total_rows)
  float* sum;      // (splits, total_rows)
  int64_t* first;  // (segments): row of a segment's results
  char* threads;
  int64_t thread_bytes;
};

template <class T>
int64_t carve_thread(const AttentionInputs& in, const Plan& p, char* base, Buffers<T>* b) {
  Arena arena{base};
  const int64_t blocks = ceil_div(p.split_keys, max(1, p.key_block));
  Buffers<T> buffers;
  buffers.keys = arena.take<uint32_t>(blocks * p.words * p.lds);
  buffers.values = arena.take<uint32_t>((round_up(p.split_keys, 16) + 32) / kPerWord<T> * p.ldv);
  buffers.query = arena.take<T>(p.rows * round_up(in.head_dim, 16));
  const bool prepares = in.key_norm.kind != HeadNorm::none || in.rope.cos;
  buffers.prepared = arena.take<T>(prepares ? p.key_block * round_up(in.head_dim, 16) : 0);
  buffers.s = arena.take<float>(p.rows * p.lds);
  buffers.out = arena.take<float>(p.rows * p.ldv);
  buffers.max = arena.take<float>(round_up(p.rows, 16));
  buffers.sum = arena.take<float>(round_up(p.rows, 16));
  if (b) *b = buffers;
  return arena.used;
}

template <class T>
int64_t carve(const AttentionInputs& in, const Plan& p, char* base, Scratch* s) {
  Arena arena{base};
  Scratch scratch{};
  if (p.sorted) scratch.order = arena.take<int32_t>(in.segment_count);
  if (p.splits > 1) {
    scratch.out = arena.take<float>(p.splits * p.total_rows * p.ldv);
    scratch.max = arena.take<float>(p.splits * p.total_rows);
    scratch.sum = arena.take<float>(p.splits * p.total_rows);
    scratch.first = arena.take<int64_t>(in.segment_count);
  }
  scratch.thread_bytes = round_up(carve_thread<T>(in, p, nullptr, nullptr), 4096) + 64;
  scratch.threads = arena.take<char>(scratch.thread_bytes * num_threads());
  if (s) *s = scratch;
  return arena.used + 64;
}

template <class T>
class Forward {
 public:
  Forward(const AttentionInputs& in, const MutableHeadsRef& out, float* lse, void* scratch)
      : in_(in),
        out_(out),
        lse_(lse),
        plan_(make_plan<T>(in)),
        ldq_(round_up(in.head_dim, 16)),
        gemm_{sizeof(T) == 2 || brgemm_runs_f32()},
        transformed_(in.mask.kind != AttentionMask::none || in.softcap > 0.f || in.scale == 0.f),
        exponent_(__builtin_fabsf(in.scale) * kLog2e),
        unit_(transformed_ ? kLog2e : 1.f) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch);
    carve<T>(in, plan_, reinterpret_cast<char*>((address + 63) & ~uintptr_t{63}), &scratch_);
  }

  void run() {
    if (plan_.sorted) sort_segments(in_, scratch_.order);
    if (scratch_.first) first_rows(in_, scratch_.first);
    const int64_t parts = plan_.parts * plan_.splits;
    parallel_for(in_.segment_count * in_.kv_heads * parts, [&](int64_t unit, int thread) {
      Ahead ahead = parts == 1 ? after(unit) : Ahead{};
      unit_of(segment_of(in_, scratch_.order, unit / parts), unit / parts % in_.kv_heads,
              unit % parts, ahead, thread);
      gemm_.release();
    });
    if (plan_.splits > 1) {
      parallel_for(in_.segment_count * in_.kv_heads,
                   [&](int64_t unit, int) { combine(unit / in_.kv_heads, unit % in_.kv_heads); });
    }
  }

 private:
  // What this thread's next unit will probably read.
  struct Ahead {
    Prefetch query, key, value;
    int64_t at = 0;

    __attribute__((always_inline)) void row() {
      query.row(at);
      key.row(at);
      value.row(at++);
    }
  };

  Ahead after(int64_t unit) const {
    unit += num_threads();
    if (unit >= in_.segment_count * in_.kv_heads) return {};
    const AttentionSegment& s = in_.segments[segment_of(in_, scratch_.order, unit)];
    const int64_t head = unit % in_.kv_heads;
    return {
        {head_rows(in_.query, in_.dtype, s, head * (in_.heads / in_.kv_heads), s.query_begin,
                   s.queries, in_.head_dim),
         in_.dtype},
        {head_rows(in_.key, in_.dtype, s, head, s.key_begin, s.keys, in_.head_dim), in_.dtype},
        {head_rows(in_.value, in_.dtype, s, head, s.key_begin, s.keys, in_.value_dim), in_.dtype}};
  }

  void unit_of(int64_t index, int64_t kv_head, int64_t part, Ahead& ahead, int thread) {
    const AttentionSegment& segment = in_.segments[index];
    const QueryRows rows{in_, segment, kv_head};
    Buffers<T> b;
    carve_thread<T>(in_, plan_, scratch_.threads + thread * scratch_.thread_bytes, &b);
    const int64_t split = plan_.splits > 1 ? part : 0;
    const Interval own{split * plan_.split_keys, min((split + 1) * plan_.split_keys, segment.keys)};

    // What any row sees, whichever rows are this part's: where a block of keys begins shows in the
    // last bits of a sum.
    const int64_t most = tile_rows(segment.queries, rows.group(), kRows);
    Interval packed;
    for (int64_t r = 0; r < rows.count();) {
      const QueryTile tile = next_tile(rows, r, rows.count(), most);
      packed.add(tile.keys.within(own));
      r = tile.end;
    }
    const Values values = packed.empty() ? Values{} : pack(segment, kv_head, packed, b);
    int64_t tiles = 0;
    for (int64_t r = 0; r < rows.count(); ++tiles) {
      const QueryTile tile = next_tile(rows, r, rows.count(), most);
      if (mine(tiles, part)) {
        attend(rows, tile, own, packed.begin, values, ahead, b);
        plan_.splits > 1 ? keep(index, rows, tile, split, b) : write(rows, tile, b);
      }
      r = tile.end;
    }
  }

  bool mine(int64_t tile, int64_t part) const {
    return plan_.splits > 1 || tile % plan_.parts == part;
  }

  // V as the B operand.
  struct Values {
    const uint32_t* data = nullptr;
    int64_t ld = 0;
  };

  // Whether all queries see all keys and segments are equally long: sizes are then taken as they
  // are; else they are rounded up, so that brgemm need not be compiled for each.
  bool whole(const AttentionSegment& segment) const { return !segment.range && !plan_.sorted; }

  Values pack(const AttentionSegment& segment, int64_t kv_head, Interval keys,
              const Buffers<T>& b) {
    for (int64_t block = 0; block * plan_.key_block < keys.length(); ++block) {
      const int64_t begin = keys.begin + block * plan_.key_block;
      const int64_t count = min(plan_.key_block, keys.end - begin);
      const SourceHead source = SourceHead::keys(in_, segment, kv_head, begin, count);
      MatrixRef rows = source.rows;
      DType dtype = in_.dtype;
      if (!source.as_they_are()) {
        source.prepare(b.prepared, ldq_);
        rows = {b.prepared, count, in_.head_dim, ldq_};
        dtype = kDType<T>;
      }
      pack_as_columns<T>(rows, dtype, in_.scale < 0.f, b.keys + block * plan_.words * plan_.lds,
                         plan_.lds);
    }
    const MatrixRef value = head_rows(in_.value, in_.dtype, segment, kv_head,
                                      segment.key_begin + keys.begin, keys.length(), in_.value_dim);
    // fp32 needs no packing where nothing beyond a row or the last one will be read.
    if (sizeof(T) == 4 && whole(segment) && in_.value_dim % 16 == 0 &&
        is_close<T>(value, in_.dtype)) {
      return {static_cast<const uint32_t*>(value.data), value.stride};
    }
    pack_as_rows<T>(value, in_.dtype, round_up(keys.length(), 16) + 16, b.values, plan_.ldv);
    return {b.values, plan_.ldv};
  }

  Operand<T> query_rows(const QueryRows& rows, const QueryTile& tile, const Buffers<T>& b) {
    for (int64_t r = tile.begin; r < tile.end;) {
      const int64_t count = min(tile.end - r, rows.segment.queries - rows.query(r));
      const SourceHead source =
          SourceHead::queries(in_, rows.segment, rows.head(r), rows.query(r), count);
      if (count == tile.rows()) return source.operand(b.query, ldq_);
      source.prepare(b.query + (r - tile.begin) * ldq_, ldq_);
      r += count;
    }
    return {b.query, ldq_};
  }

  struct Row {
    float* s;
    Interval seen;  // columns of S that count
    float largest = 0.f;

    int64_t begin() const { return seen.begin & ~int64_t{15}; }  // of the vectors that hold them
    int64_t end() const { return round_up(seen.end, 16); }
  };

  // O, maxima and sums of a tile over its keys within `own`, of which `first` was packed first.
  void attend(const QueryRows& rows, const QueryTile& tile, Interval own, int64_t first,
              const Values& values, Ahead& ahead, const Buffers<T>& b) {
    const int64_t count = tile.rows();
    Interval keys = tile.keys.within(own);
    for (int64_t r = 0; r < round_up(count, 16); ++r) {  // finish() takes whole vectors
      b.max[r] = kNegativeInfinity;
      b.sum[r] = 0.f;
    }
    if (keys.empty()) {
      std::memset(b.out, 0, count * plan_.ldv * sizeof(float));
      return;
    }
    const Operand<T> query = query_rows(rows, tile, b);
    const MutableMatrixRef to =
        head_rows(out_, in_.dtype, rows.segment, rows.head(tile.begin),
                  rows.segment.query_begin + rows.query(tile.begin),
                  min(count, rows.segment.queries - rows.query(tile.begin)), in_.value_dim);
    const Prefetch results(to, in_.dtype);
    keys = {keys.begin - first, keys.end - first};
    keys.begin &= ~int64_t{1};  // rows of V come in pairs
    bool accumulate = false;
    for (int64_t block = keys.begin / plan_.key_block; block * plan_.key_block < keys.end;
         ++block) {
      const int64_t start = block * plan_.key_block;
      const Interval part = keys.within({start, start + plan_.key_block});
      const bool exact = whole(rows.segment);
      const int64_t columns = round_up(part.length(), exact ? kColumns<T> : 16);
      const int64_t depth = exact ? round_up(part.length(), kPerWord<T>) : columns;
      multiply<T>(gemm_, count, columns, plan_.depth, query.data, query.ld,
                  b.keys + block * plan_.words * plan_.lds + part.begin - start, plan_.lds, b.s,
                  plan_.lds, false);
      for (int64_t r = 0; r < count; r += kGroup) {
        Row group[kGroup];
        const int64_t rows_left = min(kGroup, count - r);
        // All maxima first: the exponentials of one row need not wait for its own.
        for (int64_t i = 0; i < rows_left; ++i) {
          Interval seen = rows.keys(tile.begin + r + i).within(own);
          seen = Interval{seen.begin - first, seen.end - first}.within(part);
          group[i] = {b.s + (r + i) * plan_.lds, {seen.begin - part.begin, seen.end - part.begin}};
          if (group[i].seen.empty()) continue;
          if (transformed_) transform(rows, tile.begin + r + i, first + part.begin, group[i]);
          find_largest(group[i]);
          ahead.row();
          results.template row<1>(r + i);
        }
        for (int64_t i = 0; i < rows_left; ++i) {
          float* out = accumulate ? b.out + (r + i) * plan_.ldv : nullptr;
          transformed_ ? softmax<true>(group[i], depth, b.max[r + i], b.sum[r + i], out)
                       : softmax<false>(group[i], depth, b.max[r + i], b.sum[r + i], out);
        }
      }
      multiply<T>(gemm_, count, in_.value_dim, depth, reinterpret_cast<const T*>(b.s),
                  plan_.lds * kPerWord<T>, values.data + part.begin / kPerWord<T> * values.ld,
                  values.ld, b.out, plan_.ldv, accumulate);
      accumulate = true;
    }
  }

  void find_largest(Row& row) {
    mask_ends(row.s, row.seen);
    vf m0 = broadcast(kNegativeInfinity), m1 = m0, m2 = m0, m3 = m0;
    int64_t j = row.begin();
    for (; j + 4 * kLanes <= row.end(); j += 4 * kLanes) {
      m0 = max(m0, load(row.s + j));
      m1 = max(m1, load(row.s + j + kLanes));
      m2 = max(m2, load(row.s + j + 2 * kLanes));
      m3 = max(m3, load(row.s + j + 3 * kLanes));
    }
    for (; j < row.end(); j += kLanes) m0 = max(m0, load(row.s + j));
    row.largest = hmax(max(max(m0, m1), max(m2, m3)));
  }

  // One row of S becomes one of P in T, (depth), zero where a key is not seen. `out`, if it holds a
  // sum already, is rescaled to the new maximum.
  template <bool kTransformed>
  void softmax(const Row& row, int64_t depth, float& maximum, float& sum, float* out) {
    T* p = reinterpret_cast<T*>(row.s);
    if (row.seen.empty()) {
      std::memset(p, 0, depth * sizeof(T));
      return;
    }
    const int64_t begin = row.begin(), end = row.end();
    const float scaled = kTransformed ? row.largest : row.largest * exponent_;
    const float now = scaled > maximum ? scaled : maximum;
    const float shift = now == kNegativeInfinity ? 0.f : now;
    if (out && now != maximum) {
      const float factor = __builtin_exp2f((maximum - shift) * unit_);
      for (int64_t d = 0; d < plan_.ldv; d += kLanes) store(out + d, load(out + d) * factor);
      sum *= factor;
    }
    maximum = now;
    vf s0 = {}, s1 = {};
    const auto probability = [&](int64_t at, vf& total) {
      const vf x = load(row.s + at);
      const vf e =
          exp2_of<kExpDegree<T>>(kTransformed ? (x - shift) * kLog2e : x * exponent_ - shift);
      total += e;
      put(p + at, e);
    };
    int64_t j = begin;
    for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
      probability(j, s0);
      probability(j + kLanes, s1);
    }
    for (; j < end; j += kLanes) probability(j, s0);
    sum += hsum(s0 + s1);
    if (begin > 0) std::memset(p, 0, begin * sizeof(T));
    if (end < depth) std::memset(p + end, 0, (depth - end) * sizeof(T));
  }

  // Entries of the outer vectors that are not seen: -inf.
  VLM_INLINE void mask_ends(float* s, Interval seen) {
    const vf none = broadcast(kNegativeInfinity);
    const int64_t begin = seen.begin & ~int64_t{15}, end = seen.end & ~int64_t{15};
    if (begin < seen.begin) {
      const vi j = iota(static_cast<int32_t>(begin));
      const vi hidden = less(j, static_cast<int32_t>(seen.begin));
      store(s + begin, select(hidden, none, load(s + begin)));
    }
    if (end < seen.end) {
      const vi j = iota(static_cast<int32_t>(end));
      const vi kept = less(j, static_cast<int32_t>(seen.end));
      store(s + end, select(kept, load(s + end), none));
    }
  }

  // Softcap and mask: from products to what the exponential takes, in natural units.
  void transform(const QueryRows& rows, int64_t index, int64_t first_key, const Row& row) {
    const float scale = __builtin_fabsf(in_.scale);
    const MaskRow mask(in_.mask, rows.segment, rows.head(index), rows.query(index));
    for (int64_t j = row.begin(); j < row.seen.end; j += kLanes) {
      vf x = load(row.s + j) * scale;
      if (in_.softcap > 0.f) x = tanh(x / in_.softcap) * in_.softcap;
      store(row.s + j, mask.apply(x, first_key + j, first_key + row.seen.end));
    }
  }

  // From the maxima and sums of 16 rows: log-sum-exp, and what O is still to be multiplied by.
  // A sum is at least 1, that of the maximum's own term, unless a row saw nothing.
  VLM_INLINE void finish(float* max_to_lse, float* sum_to_factor, float unit) {
    const vf maximum = load(max_to_lse), sum = load(sum_to_factor), none = {};
    const vf shift = select(equal(maximum, kNegativeInfinity), none, maximum);
    const vi empty = equal(sum, 0.f);
    const vf lse = shift * (unit * kLn2) + log1p(sum - 1.f);
    store(max_to_lse, select(empty, broadcast(kNegativeInfinity), lse));
    store(sum_to_factor, select(empty, none, 1.f / sum));
  }

  void write(const QueryRows& rows, const QueryTile& tile, const Buffers<T>& b) {
    for (int64_t r = 0; r < tile.rows(); r += kLanes) finish(b.max + r, b.sum + r, unit_);
    for (int64_t r = tile.begin; r < tile.end;) {
      const int64_t head = rows.head(r), query = rows.query(r);
      const int64_t count = min(tile.end - r, rows.segment.queries - query);
      const int64_t at = r - tile.begin;
      write_rows(rows.segment, head, query, count, b.out + at * plan_.ldv, b.max + at, b.sum + at);
      r += count;
    }
  }

  void write_rows(const AttentionSegment& segment, int64_t head, int64_t query, int64_t count,
                  const float* o, const float* lse, const float* factor) {
    const MutableMatrixRef to = head_rows(out_, in_.dtype, segment, head,
                                          segment.query_begin + query, count, in_.value_dim);
    for (int64_t r = 0; r < count; ++r) {
      write_row<T>(o + r * plan_.ldv, factor[r], to, r, in_.dtype);
    }
    if (lse_) {
      std::memcpy(lse_ + segment.batch * in_.lse_batch_stride + head * in_.lse_head_stride +
                      segment.query_begin + query,
                  lse, count * sizeof(float));
    }
  }

  // The result of one part of the keys, for combine().
  void keep(int64_t index, const QueryRows& rows, const QueryTile& tile, int64_t split,
            const Buffers<T>& b) {
    const int64_t at =
        split * plan_.total_rows + scratch_.first[index] + rows.kv_head * rows.count() + tile.begin;
    std::memcpy(scratch_.out + at * plan_.ldv, b.out, tile.rows() * plan_.ldv * sizeof(float));
    std::memcpy(scratch_.max + at, b.max, tile.rows() * sizeof(float));
    std::memcpy(scratch_.sum + at, b.sum, tile.rows() * sizeof(float));
  }

  void combine(int64_t index, int64_t kv_head) {
    const QueryRows rows{in_, in_.segments[index], kv_head};
    const int64_t first = scratch_.first[index] + kv_head * rows.count();
    for (int64_t r = 0; r < rows.count(); ++r) {
      alignas(64) float maximum[kLanes] = {}, sum[kLanes] = {};
      maximum[0] = kNegativeInfinity;
      for (int64_t i = 0; i < plan_.splits; ++i) {
        const float m = scratch_.max[i * plan_.total_rows + first + r];
        maximum[0] = m > maximum[0] ? m : maximum[0];
      }
      const float shift = maximum[0] == kNegativeInfinity ? 0.f : maximum[0];
      float* o = scratch_.out + (first + r) * plan_.ldv;  // of the first part: takes the others' in
      for (int64_t i = 0; i < plan_.splits; ++i) {
        const int64_t from = i * plan_.total_rows + first + r;
        const float factor = __builtin_exp2f((scratch_.max[from] - shift) * unit_);
        sum[0] += scratch_.sum[from] * factor;
        for (int64_t d = 0; d < plan_.ldv; d += kLanes) {
          const vf part = load(scratch_.out + from * plan_.ldv + d) * factor;
          store(o + d, i == 0 ? part : load(o + d) + part);
        }
      }
      finish(maximum, sum, unit_);
      write_rows(rows.segment, rows.head(r), rows.query(r), 1, o, maximum, sum);
    }
  }

  const AttentionInputs& in_;
  const MutableHeadsRef& out_;
  float* lse_;
  const Plan plan_;
  const int64_t ldq_;
  const Gemm gemm_;
  const bool transformed_;  // S is more than a product, or less (0): see transform()
  const float exponent_;    // from a product to an exponent of 2
  const float unit_;        // from a maximum to an exponent of 2
  Scratch scratch_;
};

}  // namespace

int64_t attention_scratch_bytes(const AttentionInputs& in) {
  return runs_in_bf16(in.dtype) ? carve<bf16_t>(in, make_plan<bf16_t>(in), nullptr, nullptr)
                                : carve<float>(in, make_plan<float>(in), nullptr, nullptr);
}

void attention_fwd(const AttentionInputs& in, const MutableHeadsRef& out, float* lse,
                   void* scratch) {
  runs_in_bf16(in.dtype) ? Forward<bf16_t>(in, out, lse, scratch).run()
                         : Forward<float>(in, out, lse, scratch).run();
}

}  // namespace vlm::cpu::VLM_ISA

#else  // compiled once more without VLM_ISA: chooses at run time

namespace vlm::cpu {

VLM_DISPATCH(int64_t, attention_scratch_bytes, (const AttentionInputs& in), (in))
VLM_DISPATCH(void, attention_fwd,
             (const AttentionInputs& in, const MutableHeadsRef& out, float* lse, void* scratch),
             (in, out, lse, scratch))

}  // namespace vlm::cpu
#endif
