// The backward for rows of any length. The logits are computed again from lse, as in FlashAttention
// (Dao et al. 2022), but twice: CTAs that own a tile of keys sum over its queries, CTAs that own a
// tile of queries over its keys. No sum has more than one owner, so that there are no atomics and
// the order is always the same.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTile = kTileRows;  // rows of either side; a warp owns 16
constexpr int kStep = 32;         // rows of the other side that a warp multiplies with at a time
constexpr int kBiasLd = kTile + 8;
static_assert(kTile == 16 * kWarps && kTile % kStep == 0);

struct LongBwd {
  Problem p;
  BackwardArgs a;
  Logit logit;
  float2* rows = nullptr;    // (batch, heads, queries): see rows_kernel
  float* spread = nullptr;   // likewise; null without an additive mask
  int2* bounds = nullptr;    // (range batches, range heads, row_tiles); null without ranges
  float* partial = nullptr;  // (splits, batch, heads, queries, head_dim); null where splits == 1
  int row_tiles = 0;
  int splits = 0;      // of the keys, for the gradient of the queries
  int key_blocks = 0;  // CTAs that own keys; those that own queries come after them

  __device__ __forceinline__ int64_t row(int batch, int head, int query) const {
    return (static_cast<int64_t>(batch) * p.heads + head) * p.queries + query;
  }
  __device__ __forceinline__ int2& bound(int batch, int head, int tile) const {
    const int64_t heads = p.range_head_stride ? p.heads : 1;
    const int64_t row = (p.range_batch_stride ? batch * heads : 0) + (heads > 1 ? head : 0);
    return bounds[row * row_tiles + tile];
  }
};

// ---------------------------------------------------------------------------------------------
// What of a query's row all its keys need.

// Of a query whose every key has a mask so low, such as the lowest float, that nothing else shows
// in its log-sum-exp: the largest mask, and log2 of how many keys have it and share the softmax.
struct Drowned {
  float lse, spread;
};

__device__ __forceinline__ Drowned drowned(const Problem& p, int batch, int head, int row,
                                           int lane) {
  const Interval seen = seen_keys(p, batch, head, row, 0, p.keys, 0);
  float lse = -kInfinity, count = 0.f;
  for (int key = seen.begin + lane; key < seen.end; key += 8) {
    const float x = masked(p.mask, batch, head, row, key);
    count = x > lse ? 1.f : count + (x == lse);
    lse = fmaxf(lse, x);
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    const float other = __shfl_xor_sync(~0u, lse, step), more = __shfl_xor_sync(~0u, count, step);
    count = other > lse ? more : other == lse ? count + more : count;
    lse = fmaxf(lse, other);
  }
  return {lse, log2f(count)};
}

// rows: lse in units of log2, or -inf of a query that sees nothing, and sum(dO * O) - dlse. A block
// does kTile queries of a head, eight lanes a query; where there are ranges, also their bounds.
// Instances: 2.
// limits: registers 64, shared 0, spills 0
template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(LongBwd x) {
  const Problem& p = x.p;
  const int tile = static_cast<int>(blockIdx.x) % x.row_tiles;
  const int rest = static_cast<int>(blockIdx.x) / x.row_tiles;
  const int head = rest % p.heads, batch = rest / p.heads, lane = threadIdx.x % 8;
#pragma unroll 1
  for (int first = 0; first < kTile; first += kThreads / 8) {
    const int row = tile * kTile + first + static_cast<int>(threadIdx.x) / 8;
    const bool inside = row < p.queries;
    const int64_t at = x.row(batch, head, inside ? row : 0);
    float dot = 0.f;
    if (inside) {
      const T* const grad = head_rows<T>(x.a.grad, batch, head, row);
      const T* const out = head_rows<T>(x.a.out, batch, head, row);
      for (int c = 8 * lane; c < p.value_dim; c += 64) {
        const uint4 a = *reinterpret_cast<const uint4*>(grad + c);
        const uint4 b = *reinterpret_cast<const uint4*>(out + c);
        const T* const u = reinterpret_cast<const T*>(&a);
        const T* const v = reinterpret_cast<const T*>(&b);
#pragma unroll
        for (int i = 0; i < 8; ++i) dot += static_cast<float>(u[i]) * static_cast<float>(v[i]);
      }
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
    float lse = inside ? x.a.lse[at] : 0.f, spread = 0.f;
    const bool low = x.spread && lse < -1e30f && lse != -kInfinity;
    lse *= kLog2e;
    if (__any_sync(~0u, low)) {
      const Drowned d = drowned(p, batch, head, inside ? row : 0, lane);
      if (low) {
        lse = d.lse;
        spread = d.spread;
      }
    }
    if (inside && lane == 0) {
      x.rows[at] = make_float2(lse, dot - (x.a.grad_lse ? x.a.grad_lse[at] : 0.f));
      if (x.spread) x.spread[at] = spread;
    }
  }
  const bool own_range =
      x.bounds && (head == 0 || p.range_head_stride) && (batch == 0 || p.range_batch_stride);
  if (!own_range || threadIdx.x >= 32) return;
  int begin = INT_MAX, end = 0;
#pragma unroll
  for (int i = 0; i < kTile; i += 32) {
    const int row = tile * kTile + i + static_cast<int>(threadIdx.x);
    if (row >= p.queries) continue;
    const Interval seen = seen_keys(p, batch, head, row, 0, p.keys, 0);
    if (seen.empty()) continue;
    begin = min(begin, seen.begin);
    end = max(end, seen.end);
  }
  begin = __reduce_min_sync(~0u, begin);
  end = __reduce_max_sync(~0u, end);
  if (threadIdx.x == 0) x.bound(batch, head, tile) = make_int2(begin, end);
}

// ---------------------------------------------------------------------------------------------
// Shared memory, and products with it.

template <int D>
struct Traits {
  static constexpr int kLd = shared_ld(D);
  static constexpr int kTileElements = kTile * kLd;
  static constexpr int kResident = D <= 64 ? 3 : 2;  // CTAs a multiprocessor: registers
  // Whether the keys and values that a CTA owns are in registers too, where these suffice. They
  // come by way of a stage that is not used yet; else they have a tile of shared memory each.
  static constexpr bool kHeldKeys = D <= 80, kHeldValues = kHeldKeys && D != 64;
  static constexpr int kTiles = 4 + !kHeldKeys + !kHeldValues;
  static constexpr size_t kRowBytes = 2 * kTile * (sizeof(float2) + sizeof(int2));
  static constexpr size_t kTileBytes = size_t{kTiles} * kTileElements * 2;
  static constexpr size_t shared_bytes(bool masked) {
    return kTileBytes + kRowBytes + (masked ? kTile * kBiasLd * sizeof(float) : 0);
  }
};

template <class T, int D>
struct Shared {
  using S = Traits<D>;
  // Of a stage: queries and gradients of the output, or keys and values.
  __device__ __forceinline__ T* first(int stage) const {
    return dynamic_shared<T>() + 2 * stage * S::kTileElements;
  }
  __device__ __forceinline__ T* second(int stage) const { return first(stage) + S::kTileElements; }
  __device__ __forceinline__ T* keys() const { return first(S::kHeldKeys ? 1 : 2); }
  __device__ __forceinline__ T* values() const {
    return S::kHeldValues ? second(1) : first(2) + !S::kHeldKeys * S::kTileElements;
  }
  __device__ __forceinline__ float2* rows(int stage) const {
    return reinterpret_cast<float2*>(dynamic_shared<char>() + S::kTileBytes) + stage * kTile;
  }
  __device__ __forceinline__ int2* seen(int stage) const {
    return reinterpret_cast<int2*>(rows(2)) + stage * kTile;
  }
  // (queries, kBiasLd): what the mask adds; in column kTile the row's spread.
  __device__ __forceinline__ float* bias() const { return reinterpret_cast<float*>(seen(2)); }
};

// Starts copies of a tile; rows from `rows` on and features from `features` on become zero.
template <int D, class T>
__device__ __forceinline__ void copy_tile(T* to, const T* from, int64_t stride, int rows,
                                          int features) {
  constexpr int kRows = kThreads / 4;
  const int chunk = 8 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int i = 0; i < kTile / kRows; ++i) {
    const int r = static_cast<int>(threadIdx.x) / 4 + i * kRows;
    const T* const source = r < rows ? from + r * stride : from;
#pragma unroll
    for (int j = 0; j < (D + 31) / 32; ++j) {
      const int c = chunk + 32 * j;
      if (D % 32 != 0 && c >= D) continue;
      const bool inside = r < rows && c < features;
      ptx::cp_async_16(to + r * Traits<D>::kLd + c, source + (inside ? c : 0), inside ? 16 : 0);
    }
  }
}

// The 16 rows of its tile that a warp owns, as A of products.
template <class T, int D, bool kHeld>
struct OwnRows {
  const T* rows;
  uint32_t held[kHeld ? D / 16 : 1][4];

  __device__ __forceinline__ void take(const T* tile) {
    rows = tile + threadIdx.x / 32 * 16 * Traits<D>::kLd;
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) load_a(held[k], rows, Traits<D>::kLd, 16 * k);
    }
  }
  __device__ __forceinline__ void fragment(uint32_t (&a)[4], int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[k][i];
    } else {
      load_a(a, rows, Traits<D>::kLd, 16 * k);
    }
  }
};

using Scores = float[kStep / 8][4];  // of 16 rows x kStep columns

// own * others^T
template <class T, int D, bool kHeld>
__device__ __forceinline__ void multiply(Scores& s, const OwnRows<T, D, kHeld>& own,
                                         const T* others) {
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    own.fragment(a, k);
#pragma unroll
    for (int j = 0; j < kStep / 16; ++j) {
      uint32_t b[4];
      load_b(b, others + 16 * j * Traits<D>::kLd, Traits<D>::kLd, 16 * k);
      mma_16<T>(s[2 * j], s[2 * j + 1], a, b);
    }
  }
}

// sum += s * others, with s in T
template <int D, class T>
__device__ __forceinline__ void accumulate(float (&sum)[D / 8][4], const Scores& s,
                                           const T* others) {
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    uint32_t a[4];
    as_a<T>(a, s[2 * k], s[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_trans(b, others + 16 * k * Traits<D>::kLd, Traits<D>::kLd, 16 * n);
      mma_16<T>(sum[2 * n], sum[2 * n + 1], a, b);
    }
  }
}

// Which entries of a tile a step is about, as a lane holds them: entry e of block n is of row
// own + e / 2 * 8 of the tile that the CTA owns, of row other + 8 * n + e % 2 of the other one.
struct Entries {
  int own, other;
  const float* bias;  // of the tile, see load_bias; null without a mask
  bool additive, all_seen;

  template <bool kOwnQueries>
  __device__ __forceinline__ const float* bias_row(int n, int e) const {
    return bias + (kOwnQueries ? own + e / 2 * 8 : other + 8 * n + e % 2) * kBiasLd;
  }
  template <bool kOwnQueries>
  __device__ __forceinline__ float bias_of(int n, int e) const {
    return bias_row<kOwnQueries>(n, e)[kOwnQueries ? other + 8 * n + e % 2 : own + e / 2 * 8];
  }
};

struct TwoRows {
  float2 of[2];  // lse and delta
};

// s, dp: from the products to P and dS / scale. rows_of(n): the two queries of block n that a lane
// holds; seen(n, e): whether one sees the other, the mask aside. What differs from call to call is
// in passes of its own, so that there is little code.
template <bool kOwnQueries, class RowsOf, class Seen>
__device__ __forceinline__ void gradients(Scores& s, Scores& dp, const Logit& logit,
                                          const Entries& x, const RowsOf& rows_of,
                                          const Seen& seen) {
  const auto query = [](int e) { return kOwnQueries ? e / 2 : e % 2; };
  float factor = logit.scale;
  if (logit.capped()) {
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const TwoRows rows = rows_of(n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float t = tanh_approx(s[n][e] * logit.scale * logit.inverse_cap);
        const float delta = rows.of[query(e)].y;
        s[n][e] = logit.cap * t;
        dp[n][e] = (dp[n][e] - delta) * (1.f - t * t) + delta;
      }
    }
    factor = 1.f;
  }
  if (x.additive) {
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const TwoRows rows = rows_of(n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float lse = rows.of[query(e)].x;  // may be as low as the mask: first these
        const float spread = x.bias_row<kOwnQueries>(n, e)[kTile];
        s[n][e] = s[n][e] * factor + x.bias_of<kOwnQueries>(n, e) - lse - spread;
      }
    }
    factor = 1.f;
  }
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
    const TwoRows rows = rows_of(n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 row = rows.of[query(e)];
      s[n][e] = ptx::exp2_approx(s[n][e] * factor - (x.additive ? 0.f : row.x));
      dp[n][e] = s[n][e] * (dp[n][e] - row.y);
    }
  }
  if (x.all_seen) return;
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < kStep / 8; ++n) {
    uint32_t four = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool hidden = x.bias && x.bias_of<kOwnQueries>(n, e) == -kInfinity;
      four |= static_cast<uint32_t>(seen(n, e) && !hidden) << e;
    }
    bits |= four << 4 * n;
  }
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // selected, since either may be NaN
      const bool is_seen = bits >> (4 * n + e) & 1;
      s[n][e] = is_seen ? s[n][e] : 0.f;
      dp[n][e] = is_seen ? dp[n][e] : 0.f;
    }
  }
}

// The mask of a tile, by all threads; 0 outside of it. U is bool, or what is added.
template <class U>
__device__ __forceinline__ void copy_mask(float* bias, const AttentionMask& mask, int64_t at,
                                          int queries, int keys) {
  const int c = static_cast<int>(threadIdx.x) % kTile, first = threadIdx.x / kTile;
  const U* from = static_cast<const U*>(mask.data) + at + first * mask.row_stride + c;
  float* to = bias + first * kBiasLd + c;
  const int rows = c < keys ? queries : 0;
#pragma unroll 4
  for (int r = 0; r < kTile; r += kThreads / kTile) {
    float x = 0.f;
    if (first + r < rows) {
      const U entry = *from;
      if constexpr (std::is_same_v<U, bool>) {
        x = entry ? 0.f : -kInfinity;
      } else {
        x = bias_log2(static_cast<float>(entry));
      }
    }
    *to = x;
    from += kThreads / kTile * mask.row_stride;
    to += kThreads / kTile * kBiasLd;
  }
}

template <class T>
__device__ __forceinline__ void load_bias(float* bias, const LongBwd& x, int batch, int head,
                                          int query, int queries, int key, int keys) {
  const AttentionMask& mask = x.p.mask;
  const int64_t at =
      batch * mask.batch_stride + head * mask.head_stride + query * mask.row_stride + key;
  if (mask.kind == AttentionMask::boolean) {
    copy_mask<bool>(bias, mask, at, queries, keys);
  } else if (mask.dtype == DType::f32) {
    copy_mask<float>(bias, mask, at, queries, keys);
  } else {  // that of the inputs
    copy_mask<T>(bias, mask, at, queries, keys);
  }
  if (!x.spread || threadIdx.x >= kTile) return;
  const int r = threadIdx.x;
  bias[r * kBiasLd + kTile] = r < queries ? x.spread[x.row(batch, head, query + r)] : 0.f;
}

// The 16 rows of a warp, times `scale`, through shared memory of its own: `rows` of them.
template <int D, class T>
__device__ __forceinline__ void store_rows(T* staging, const float (&sum)[D / 8][4], float scale,
                                           T* to, int64_t stride, int rows, int features) {
  constexpr int kLd = Traits<D>::kLd, kChunks = D / 8;
  const int lane = threadIdx.x % 32;
  T* const at = staging + lane / 4 * kLd + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    *reinterpret_cast<uint32_t*>(at + 8 * n) = ptx::pack<T>(sum[n][0] * scale, sum[n][1] * scale);
    *reinterpret_cast<uint32_t*>(at + 8 * kLd + 8 * n) =
        ptx::pack<T>(sum[n][2] * scale, sum[n][3] * scale);
  }
  __syncwarp();
#pragma unroll 2
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, c = i % kChunks * 8;
    if (r >= rows || c >= features) continue;
    *reinterpret_cast<uint4*>(to + r * stride + c) =
        *reinterpret_cast<const uint4*>(staging + r * kLd + c);
  }
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------
// Gradients of keys and values.

// A tile of queries of one of the heads that share the keys.
struct Walk {
  int head, first;
};

template <class T, int D>
__device__ __forceinline__ void own_keys(const LongBwd& x, int block) {
  using S = Traits<D>;
  const Problem& p = x.p;
  const int kv_heads = p.heads / p.group;
  const int tile = block % p.key_tile_count, rest = block / p.key_tile_count;
  const int kv_head = rest % kv_heads, batch = rest / kv_heads;
  const TileRows keys = tile_rows(p.key_tiles, tile, p.keys, p.queries);
  if (keys.count == 0) return;
  const int keys_end = keys.first + keys.count;
  // the queries that may see a key, in tiles that begin where those of the bounds do
  int begin = max(keys.begin, keys.first - keys.shift - p.window_right);
  const int end = min(keys.end, keys_end - keys.shift + p.window_left);
  begin = keys.begin + (begin - keys.begin) / kTile * kTile;

  const auto from = [&](Walk w) {  // the next tile that may see a key, this one included
    while (w.head < p.group) {
      if (w.first >= end) {
        w = {w.head + 1, begin};
        if (begin >= end) w.head = p.group;
        continue;
      }
      if (!x.bounds) break;
      const int2 bound = x.bound(batch, kv_head * p.group + w.head, w.first / kTile);
      if (bound.x < keys_end && bound.y > keys.first) break;
      w.first += kTile;
    }
    return w;
  };
  const Shared<T, D> shared;
  const auto copy = [&](Walk w, int stage) {
    const int head = kv_head * p.group + w.head, rows = end - w.first;
    copy_tile<D>(shared.first(stage), head_rows<T>(p.query, batch, head, w.first),
                 p.query.row_stride, rows, p.head_dim);
    copy_tile<D>(shared.second(stage), head_rows<T>(x.a.grad, batch, head, w.first),
                 x.a.grad.row_stride, rows, p.value_dim);
    if (threadIdx.x < kTile) {  // zeros for rows that are none: they have P = 1, but no gradient
      const bool inside = static_cast<int>(threadIdx.x) < rows;
      const int query = w.first + (inside ? static_cast<int>(threadIdx.x) : 0);
      ptx::cp_async_8(shared.rows(stage) + threadIdx.x, x.rows + x.row(batch, head, query),
                      inside ? 8 : 0);
      if (p.range) {
        const int32_t* const range = p.range + batch * p.range_batch_stride +
                                     head * p.range_head_stride + 2 * int64_t{query};
        ptx::cp_async_8(shared.seen(stage) + threadIdx.x, range);
      }
    }
    ptx::cp_async_commit();
  };

  const bool want_key = x.a.grad_key.data != nullptr, want_value = x.a.grad_value.data != nullptr;
  const bool has_mask = p.mask.kind != AttentionMask::none;
  const bool additive = p.mask.kind == AttentionMask::additive;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = 16 * warp + lane / 4;  // and own + 8
  float key_grad[D / 8][4] = {}, value_grad[D / 8][4] = {};
  OwnRows<T, D, S::kHeldKeys> key;
  OwnRows<T, D, S::kHeldValues> value;
  Walk w{0, begin - kTile};  // a round ahead, in which what the CTA owns is loaded
#pragma unroll 1
  for (int stage = 1;; stage ^= 1) {
    const int rows = w.first < begin ? 0 : min(kTile, end - w.first);  // that have been copied
    bool whole = false;
    if (rows > 0) {
      ptx::cp_async_wait<0>();
      whole = true;
      if (threadIdx.x < kTile) {  // what it copied itself needs no barrier
        const int place = w.first + static_cast<int>(threadIdx.x) + keys.shift;
        int2& seen = shared.seen(stage)[threadIdx.x];
        int first = max(keys.first, place - p.window_left);
        int last = min(keys_end, place + p.window_right + 1);
        if (p.range) {
          first = max(first, seen.x);
          last = min(last, seen.y);
        }
        if (shared.rows(stage)[threadIdx.x].x == -kInfinity) last = first;
        whole = static_cast<int>(threadIdx.x) >= rows || last - first == keys.count;
        seen = make_int2(first, last);
      }
      if (has_mask) {
        __syncthreads();  // nobody reads the last tile's
        load_bias<T>(shared.bias(), x, batch, kv_head * p.group + w.head, w.first, rows, keys.first,
                     keys.count);
      }
      whole = __syncthreads_and(whole);  // and nobody reads the other stage
    }
    w = from({w.head, w.first + kTile});
    if (w.head < p.group) copy(w, stage ^ 1);
    if (rows == 0) {
      if (w.head == p.group) break;
      copy_tile<D>(shared.keys(), head_rows<T>(p.key, batch, kv_head, keys.first), p.key.row_stride,
                   keys.count, p.head_dim);
      copy_tile<D>(shared.values(), head_rows<T>(p.value, batch, kv_head, keys.first),
                   p.value.row_stride, keys.count, p.value_dim);
      ptx::cp_async_commit();
      if constexpr (S::kHeldKeys) {
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      key.take(shared.keys());
      value.take(shared.values());
      continue;
    }
    const int steps = 16 * warp < keys.count ? rows : 0;
#pragma unroll 1
    for (int step = 0; step < steps; step += kStep) {
      const T* const query = shared.first(stage) + step * S::kLd;
      const T* const grad = shared.second(stage) + step * S::kLd;
      Scores s, dp;  // keys x queries
      multiply(s, key, query);
      multiply(dp, value, grad);
      const int other = step + lane % 4 * 2;
      const Entries entries{own, other, has_mask ? shared.bias() : nullptr, additive,
                            whole && !has_mask};
      const auto rows_of = [&](int n) {
        const float4 x = *reinterpret_cast<const float4*>(shared.rows(stage) + other + 8 * n);
        return TwoRows{{{x.x, x.y}, {x.z, x.w}}};
      };
      const auto sees = [&](int n, int e) {
        const int2 x = shared.seen(stage)[other + 8 * n + e % 2];
        return Interval{x.x, x.y}.has(keys.first + own + e / 2 * 8);
      };
      gradients<false>(s, dp, x.logit, entries, rows_of, sees);
      if (want_value) accumulate<D>(value_grad, s, grad);
      if (want_key) accumulate<D>(key_grad, dp, query);
    }
    if (w.head == p.group) break;
  }
  __syncthreads();
  T* const staging = shared.first(0) + 16 * warp * S::kLd;
  const int first = keys.first + 16 * warp, rows = keys.count - 16 * warp;
  if (rows <= 0) return;
  if (want_key) {
    store_rows<D>(staging, key_grad, p.scale, head_rows<T>(x.a.grad_key, batch, kv_head, first),
                  x.a.grad_key.row_stride, rows, p.head_dim);
  }
  if (want_value) {
    store_rows<D>(staging, value_grad, 1.f, head_rows<T>(x.a.grad_value, batch, kv_head, first),
                  x.a.grad_value.row_stride, rows, p.value_dim);
  }
}

// ---------------------------------------------------------------------------------------------
// Gradient of queries.

template <class T, int D>
__device__ __forceinline__ void own_queries(const LongBwd& x, int block) {
  using S = Traits<D>;
  const Problem& p = x.p;
  const int split = block % x.splits;
  block /= x.splits;
  // the last tile first: where rows are causal it has the most keys
  const int tile = p.query_tile_count - 1 - block % p.query_tile_count;
  const int rest = block / p.query_tile_count, head = rest % p.heads, batch = rest / p.heads;
  const TileRows queries = tile_rows(p.query_tiles, tile, p.queries, p.keys);
  if (queries.count == 0) return;
  const int kv_head = head / p.group, place = queries.first + queries.shift;
  int begin = max(queries.begin, place - p.window_left);
  int end = min(queries.end, place + queries.count + p.window_right);
  if (x.bounds) {
    const int2 bound = x.bound(batch, head, queries.first / kTile);
    begin = max(begin, bound.x);
    end = min(end, bound.y);
  }
  if (x.splits > 1 && begin < end) {
    const int tiles = (end - begin + kTile - 1) / kTile;
    const int share = (tiles + x.splits - 1) / x.splits * kTile;
    begin += split * share;
    end = min(end, begin + share);
  }

  const Shared<T, D> shared;
  const auto copy = [&](int first, int stage) {
    copy_tile<D>(shared.first(stage), head_rows<T>(p.key, batch, kv_head, first), p.key.row_stride,
                 end - first, p.head_dim);
    copy_tile<D>(shared.second(stage), head_rows<T>(p.value, batch, kv_head, first),
                 p.value.row_stride, end - first, p.value_dim);
    ptx::cp_async_commit();
  };
  const bool has_mask = p.mask.kind != AttentionMask::none;
  const bool additive = p.mask.kind == AttentionMask::additive;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = 16 * warp + lane / 4;  // and own + 8
  float2 row[2] = {make_float2(kInfinity, 0.f), make_float2(kInfinity, 0.f)};
  Interval by_row[2] = {{INT_MIN, INT_MAX}, {INT_MIN, INT_MAX}};  // rows without a query see all
  Interval by_all{INT_MIN, INT_MAX};                              // of the warp
  float sum[D / 8][4] = {};
  OwnRows<T, D, true> query, grad;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (own + 8 * h >= queries.count) continue;
    const int i = queries.first + own + 8 * h;
    row[h] = x.rows[x.row(batch, head, i)];
    by_row[h] = seen_keys(p, batch, head, i, queries.begin, queries.end, queries.shift);
    if (row[h].x == -kInfinity) by_row[h] = {0, 0};
  }
  by_all.begin = __reduce_max_sync(~0u, max(by_row[0].begin, by_row[1].begin));
  by_all.end = __reduce_min_sync(~0u, min(by_row[0].end, by_row[1].end));
  // a round ahead, in which what the CTA owns is loaded
  int stage = 1;
#pragma unroll 1
  for (int first = begin - kTile; first < end; first += kTile, stage ^= 1) {
    if (first >= begin) {
      ptx::cp_async_wait<0>();
      if (has_mask) {
        __syncthreads();
        load_bias<T>(shared.bias(), x, batch, head, queries.first, queries.count, first,
                     end - first);
      }
      __syncthreads();  // the tile has landed, and nobody reads the other stage
    }
    if (first + kTile < end) copy(first + kTile, stage ^ 1);
    if (first < begin) {
      if (begin >= end) break;
      copy_tile<D>(shared.first(1), head_rows<T>(p.query, batch, head, queries.first),
                   p.query.row_stride, queries.count, p.head_dim);
      copy_tile<D>(shared.second(1), head_rows<T>(x.a.grad, batch, head, queries.first),
                   x.a.grad.row_stride, queries.count, p.value_dim);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      query.take(shared.first(1));
      grad.take(shared.second(1));
      continue;
    }
    if (16 * warp >= queries.count) continue;
    const bool whole = by_all.begin <= first && first + kTile <= min(by_all.end, end);
#pragma unroll 1
    for (int step = 0; step < min(kTile, end - first); step += kStep) {
      const T* const key = shared.first(stage) + step * S::kLd;
      const T* const value = shared.second(stage) + step * S::kLd;
      Scores s, dp;  // queries x keys
      multiply(s, query, key);
      multiply(dp, grad, value);
      const int other = step + lane % 4 * 2;
      const Entries entries{own, other, has_mask ? shared.bias() : nullptr, additive,
                            whole && !has_mask};
      const auto rows_of = [&](int) { return TwoRows{{row[0], row[1]}}; };
      const auto sees = [&](int n, int e) {
        const int key = first + other + 8 * n + e % 2;
        return key < end && by_row[e / 2].has(key);
      };
      gradients<true>(s, dp, x.logit, entries, rows_of, sees);
      accumulate<D>(sum, dp, key);
    }
  }
  const int first = queries.first + 16 * warp, rows = queries.count - 16 * warp;
  if (x.partial) {
    const int64_t all = static_cast<int64_t>(p.batch) * p.heads * p.queries;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (lane / 4 + 8 * h >= rows) continue;
      const int64_t at = split * all + x.row(batch, head, first + lane / 4 + 8 * h);
      float* const to = x.partial + at * p.head_dim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        if (8 * n >= p.head_dim) continue;
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(sum[n][2 * h], sum[n][2 * h + 1]);
      }
    }
    return;
  }
  __syncthreads();
  if (rows <= 0) return;
  store_rows<D>(shared.first(0) + 16 * warp * S::kLd, sum, p.scale,
                head_rows<T>(x.a.grad_query, batch, head, first), x.a.grad_query.row_stride, rows,
                p.head_dim);
}

// Instances: 6 head dims x 2 dtypes.
// limits: registers 255, shared 0, spills 0
template <class T, int D>
__global__ void __launch_bounds__(kThreads, Traits<D>::kResident) grads_kernel(LongBwd x) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < x.key_blocks) {
    own_keys<T, D>(x, block);
  } else {
    own_queries<T, D>(x, block - x.key_blocks);
  }
}

// Adds the splits up, four features a thread. Instances: 2.
// limits: registers 40, shared 0, spills 0
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(LongBwd x) {
  const Problem& p = x.p;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  const int chunks = p.head_dim / 4;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * chunks) return;
  const int64_t row = i / chunks, head = row / p.queries;
  const int c = static_cast<int>(i % chunks) * 4;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int split = 0; split < x.splits; ++split) {
    const float4 part =
        *reinterpret_cast<const float4*>(x.partial + (split * rows + row) * p.head_dim + c);
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  T* const to = head_rows<T>(x.a.grad_query, static_cast<int>(head / p.heads),
                             static_cast<int>(head % p.heads), static_cast<int>(row % p.queries));
  *reinterpret_cast<uint2*>(to + c) = make_uint2(ptx::pack<T>(sum.x * p.scale, sum.y * p.scale),
                                                 ptx::pack<T>(sum.z * p.scale, sum.w * p.scale));
}

// ---------------------------------------------------------------------------------------------
// Launches.

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

// So many that CTAs of queries fill the device twice, where there are few queries and many keys.
int split_count(const Problem& p) {
  constexpr int kLeastTiles = 4;  // of keys, for which a sum of its own is worth its way
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * p.query_tile_count;
  const int64_t wanted = 2 * multiprocessors() / std::max<int64_t>(blocks, 1);
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(wanted, p.key_tile_count / kLeastTiles)));
}

// Takes its parts of `scratch`; returns how many bytes they are.
int64_t place(LongBwd& x, char* scratch) {
  const Problem& p = x.p;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  int64_t used = 0;
  const auto take = [&]<class U>(U*& part, bool wanted, int64_t count) {
    if (!wanted) return;
    if (scratch) part = reinterpret_cast<U*>(scratch + used);
    used += round_up(count * static_cast<int64_t>(sizeof(U)), 256);
  };
  x.row_tiles = static_cast<int>(ceil_div(p.queries, kTile));
  x.splits = x.a.grad_query.data ? split_count(p) : 1;
  take(x.rows, true, rows);
  take(x.spread, p.mask.kind == AttentionMask::additive, rows);
  take(x.bounds, p.range != nullptr,
       static_cast<int64_t>(x.row_tiles) * (p.range_batch_stride ? p.batch : 1) *
           (p.range_head_stride ? p.heads : 1));
  take(x.partial, x.splits > 1, x.splits * rows * p.head_dim);
  return used;
}

const char* launch_blocks(void (*kernel)(LongBwd), int64_t blocks, size_t smem_bytes,
                          const LongBwd& x, cudaStream_t stream) {
  if (blocks > INT_MAX) return "attention: too many rows for one launch";
  return launch(kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), smem_bytes, stream},
                x);
}

template <class T, int D>
const char* grads(const LongBwd& x, int64_t blocks, cudaStream_t stream) {
  const size_t bytes = Traits<D>::shared_bytes(x.p.mask.kind != AttentionMask::none);
  return launch_blocks(grads_kernel<T, D>, blocks, bytes, x, stream);
}

template <class T>
const char* run(LongBwd& x, cudaStream_t stream) {
  const Problem& p = x.p;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;
  const bool keys = x.a.grad_key.data || x.a.grad_value.data, queries = x.a.grad_query.data;
  const int64_t key_blocks = keys ? heads / p.group * p.key_tile_count : 0;
  const int64_t blocks = key_blocks + (queries ? heads * p.query_tile_count * x.splits : 0);
  x.key_blocks = static_cast<int>(key_blocks);
  const int d = std::max(p.head_dim, p.value_dim);
  const auto kernel = d <= 32    ? grads<T, 32>
                      : d <= 64  ? grads<T, 64>
                      : d <= 80  ? grads<T, 80>
                      : d <= 96  ? grads<T, 96>
                      : d <= 112 ? grads<T, 112>
                                 : grads<T, 128>;
  if (const char* e = launch_blocks(rows_kernel<T>, heads * x.row_tiles, 0, x, stream)) return e;
  if (const char* e = kernel(x, blocks, stream)) return e;
  if (!x.partial) return nullptr;
  const int64_t chunks = heads * p.queries * (p.head_dim / 4);
  return launch_blocks(sum_kernel<T>, ceil_div(chunks, kThreads), 0, x, stream);
}

}  // namespace

int64_t long_bwd_scratch_bytes(const Problem& p, const BackwardArgs& args) {
  LongBwd x{p, args, Logit(p)};
  return place(x, nullptr);
}

const char* long_bwd(const Problem& p, DType dtype, const BackwardArgs& args, void* scratch,
                     cudaStream_t stream) {
  LongBwd x{p, args, Logit(p)};
  place(x, static_cast<char*>(scratch));
  return dtype == DType::bf16 ? run<__nv_bfloat16>(x, stream) : run<__half>(x, stream);
}

}  // namespace vlm::cuda
