// The forward for rows of any length: FlashAttention-2's loop (Dao 2023, 2307.08691). A CTA keeps a
// tile of queries in registers and walks the keys that any of them sees; probabilities are relative
// to the largest logit so far, and what was summed is rescaled when that grows.
//
// Where there are fewer CTAs than multiprocessors, the keys of a tile are split over several, whose
// results a second kernel weights and adds in their order (Flash-Decoding, Dao et al. 2023). Where
// heads share keys and have few queries, a tile takes all heads of a group, so that each key is
// read once.
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWarpRows = 16;
constexpr int kMostSplits = 32;  // a lane each where they are combined
// Up to so many last keys have a shorter step: 257, 577 and 1025 tokens are common.
constexpr int kTailKeys = 16;
static_assert(kWarps * kWarpRows == kTileRows);

// Head dims up to D, a multiple of 16.
template <int D>
struct LongTraits {
  static constexpr int kLd = shared_ld(D);
  static constexpr int kTile = kTileRows * kLd;  // elements
  // Two tiles of keys, two of values; the queries lie in the second one of values until they are in
  // registers.
  static constexpr size_t kSharedBytes = 4 * kTile * 2;
  // CTAs a multiprocessor: as many as registers allow without spills.
  static constexpr int kResident = D <= 64 ? 4 : D <= 112 ? 3 : 2;
};

// Which rows a CTA takes, and how many CTAs there are.
struct LongPlan {
  int tiles;  // of a head, or of a group of heads
  int heads;  // or groups
  bool grouped;
  bool negate;  // the queries: the scale is negative, and Problem has its absolute value
  int splits;   // of the keys of a tile
};

// What the CTAs that share a tile hand on, each divided by its own sum: (splits, rows, value_dim)
// and the logarithm to base 2 of the sums, (splits, rows). Of no keys only the latter: -inf.
struct Partial {
  float* out;
  float* lse;
  int64_t rows;  // batch * heads * queries
};

// The query in row r of a tile: `queries` of a head, then those of the next.
struct TilePlaces {
  int head, first, queries;

  __device__ __forceinline__ int head_of(int r) const { return head + r / queries; }
  __device__ __forceinline__ int query_of(int r) const { return first + r % queries; }
};

// Starts copies of kTileRows rows of D features: of `count` rows and `features` features, zeros
// beyond. Neighbouring threads copy neighbouring chunks of 128, 64, 32 or 16 features.
template <int D, int kFirst = 0, class T, class Row>
__device__ __forceinline__ void copy_tile(T* to, const Row& row, int count, int features) {
  constexpr int kLeft = D - kFirst;
  constexpr int kChunks = kLeft >= 128 ? 16 : kLeft >= 64 ? 8 : kLeft >= 32 ? 4 : 2;
  constexpr int kStep = kThreads / kChunks;
  const int first = threadIdx.x / kChunks, c = kFirst + threadIdx.x % kChunks * 8;
#pragma unroll
  for (int i = 0; i < kTileRows; i += kStep) {
    const int r = first + i;
    const bool inside = r < count && c < features;
    const T* const from = row(inside ? r : 0);
    ptx::cp_async_16(to + r * LongTraits<D>::kLd + c, inside ? from + c : from, inside ? 16 : 0);
  }
  if constexpr (kFirst + 8 * kChunks < D) {
    copy_tile<D, kFirst + 8 * kChunks>(to, row, count, features);
  }
}

// Products of a warp's queries and the first 8 N keys of a tile.
template <int D, int N, class T>
__device__ __forceinline__ void multiply_keys(float (&s)[N][4], const uint32_t (&q)[D / 16][4],
                                              const T* keys) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      uint32_t b[4];
      load_b(b, keys + 16 * n * LongTraits<D>::kLd, LongTraits<D>::kLd, 16 * k);
      mma_16<T>(s[2 * n], s[2 * n + 1], q[k], b);
    }
  }
}

// o += p values
template <int D, int N, class T>
__device__ __forceinline__ void add_values(float (&o)[D / 8][4], const float (&p)[N][4],
                                           const T* values) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t a[4];
    as_a<T>(a, p[2 * k], p[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_trans(b, values + 16 * k * LongTraits<D>::kLd, LongTraits<D>::kLd, 16 * n);
      mma_16<T>(o[2 * n], o[2 * n + 1], a, b);
    }
  }
}

// Adds what `masked` gives for entries of type M, where a query sees the key. Entry (n, 2 h + e) is
// of row `row` + 8 h of the tile and of key first + 8 n + e.
template <class M, int N>
__device__ __forceinline__ void add_mask(float (&s)[N][4], const AttentionMask& mask, int batch,
                                         const TilePlaces& places, int row,
                                         const Interval (&seen)[2], int first) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const M* const entries = static_cast<const M*>(mask.data) + batch * mask.batch_stride +
                             places.head_of(row + 8 * h) * mask.head_stride +
                             places.query_of(row + 8 * h) * mask.row_stride;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const int key = first + i / 2 * 8 + i % 2;
      if (!seen[h].has(key)) continue;
      float& x = s[i / 2][2 * h + i % 2];
      if constexpr (std::is_same_v<M, bool>) {
        x = entries[key] ? x : -kInfinity;
      } else {
        x += bias_log2(static_cast<float>(entries[key]));
      }
    }
  }
}

// From products to logits, -inf where a query does not see the key; entries as in add_mask.
template <class T, int N>
__device__ __forceinline__ void mask_tile(float (&s)[N][4], const Problem& p, const Logit& logit,
                                          int batch, const TilePlaces& places, int row,
                                          const Interval (&seen)[2], int first) {
  if (logit.capped()) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = logit(s[n][i]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= logit.scale;
    }
  }
  if (p.mask.kind == AttentionMask::boolean) {
    add_mask<bool>(s, p.mask, batch, places, row, seen, first);
  } else if (p.mask.kind == AttentionMask::additive) {
    if (p.mask.dtype == DType::f32) add_mask<float>(s, p.mask, batch, places, row, seen, first);
    if (p.mask.dtype != DType::f32) add_mask<T>(s, p.mask, batch, places, row, seen, first);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!seen[i / 2].has(first + 8 * n + i % 2)) s[n][i] = -kInfinity;
    }
  }
}

// Of a row, as far as this thread knows: the largest logit of the row, its own share of the sum.
struct RowState {
  float largest = -kInfinity, sum = 0.f;

  // What exponents are relative to: -inf where there was no key yet would give NaN.
  __device__ __forceinline__ float base() const { return largest == -kInfinity ? 0.f : largest; }
};

// From logits s * scale to probabilities relative to the largest so far.
template <int N, int V>
__device__ __forceinline__ void online_softmax(float (&s)[N][4], float (&o)[V][4],
                                               RowState (&rows)[2], float scale) {
  float largest[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
    for (int n = 1; n < N; ++n) x = fmaxf(x, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    largest[h] = fmaxf(rows[h].largest, quad_max(x) * scale);
  }
  if (__any_sync(~0u, largest[0] > rows[0].largest || largest[1] > rows[1].largest)) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = rows[h].largest;
      rows[h].largest = largest[h];
      const float factor = ptx::exp2_approx(before - rows[h].base());
      rows[h].sum *= factor;
#pragma unroll
      for (int n = 0; n < V; ++n) {
        o[n][2 * h] *= factor;
        o[n][2 * h + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float base = rows[h].base();
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = ptx::exp2_approx(fmaf(x, scale, -base));
        sum += x;
      }
    }
    rows[h].sum += sum;
  }
}

// 12 instances: 6 buckets of head dims, 2 dtypes.
// limits: registers 255, shared 128, spills 0
template <class T, int D>
__global__ void __launch_bounds__(kThreads, LongTraits<D>::kResident)
    long_fwd_kernel(Problem p, ForwardOut to, LongPlan plan, Partial partial) {
  using K = LongTraits<D>;
  T* const shared = dynamic_shared<T>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Later queries see more keys where the rule is causal: they start first.
  int block = blockIdx.x;
  const int tile = plan.tiles - 1 - block % plan.tiles;
  block /= plan.tiles;
  const int split = block % plan.splits;
  block /= plan.splits;
  const int batch = block / plan.heads, first_head = block % plan.heads;
  const int kv_head = plan.grouped ? first_head : first_head / p.group;
  TileRows rows;
  TilePlaces places;
  if (plan.grouped) {
    rows = {0, p.group * p.queries, 0, p.keys, 0};
    places = {first_head * p.group, 0, p.queries};
  } else {
    rows = tile_rows(p.query_tiles, tile, p.queries, p.keys);
    places = {first_head, rows.first, kTileRows};
  }
  if (rows.count == 0) return;

  T* const query_tile = shared + 3 * K::kTile;
  const auto query_row = [&](int r) {
    if (!plan.grouped) return head_rows<T>(p.query, batch, places.head, places.first + r);
    return head_rows<T>(p.query, batch, places.head_of(r), places.query_of(r));
  };
  copy_tile<D>(query_tile, query_row, rows.count, p.head_dim);

  // The keys that this thread's rows see, and those that one or all of the warp's do, which are
  // kept in shared memory, since registers are scarce.
  Interval seen[2];
  const int row = warp * kWarpRows + lane / 4;  // and row + 8
  Interval some{1 << 30, -1}, all{-1, 1 << 30};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
    seen[h] = {0, 0};
    if (r < rows.count) {
      seen[h] = seen_keys(p, batch, places.head_of(r), places.query_of(r), rows.begin, rows.end,
                          rows.shift);
      all = {max(all.begin, seen[h].begin), min(all.end, seen[h].end)};
      if (!seen[h].empty()) {
        some = {min(some.begin, seen[h].begin), max(some.end, seen[h].end)};
      }
    }
  }
  some = {__reduce_min_sync(~0u, some.begin), __reduce_max_sync(~0u, some.end)};
  all = {__reduce_max_sync(~0u, all.begin), __reduce_min_sync(~0u, all.end)};
  __shared__ Interval some_of[kWarps], all_of[kWarps];
  if (lane == 0) {
    some_of[warp] = some;
    all_of[warp] = all;
  }
  __syncthreads();
  Interval keys = some_of[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    keys = {min(keys.begin, some_of[w].begin), max(keys.end, some_of[w].end)};
  }
  const int wanted = max(0, keys.end - keys.begin);
  const int each = ((wanted + kTileRows - 1) / kTileRows + plan.splits - 1) / plan.splits;
  keys.begin += split * each * kTileRows;
  keys.end = min(keys.end, keys.begin + each * kTileRows);

  const Logit logit(p);
  RowState state[2];
  float o[D / 8][4] = {};
  if (keys.begin < keys.end) {
    // The tile of keys or values from row `first`.
    const auto copy = [&](const HeadsRef& x, T* to, int first, int features) {
      if (first < keys.end) {
        const T* const from = head_rows<T>(x, batch, kv_head, first);
        const auto row = [&](int r) { return from + r * x.row_stride; };
        copy_tile<D>(to, row, keys.end - first, features);
      }
      ptx::cp_async_commit();  // empty groups keep the count
    };
    copy(p.key, shared, keys.begin, p.head_dim);
    copy(p.value, shared + 2 * K::kTile, keys.begin, p.value_dim);
    ptx::cp_async_wait<1>();
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      load_a(q[k], query_tile + warp * kWarpRows * K::kLd, K::kLd, 16 * k);
      if (plan.negate) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] ^= 0x80008000u;
      }
    }
    // A step: the first 8 N keys of the tile at `first`, which lies `at` elements into each pair.
    const auto step = [&]<int N>(int first, int at) {
      const T* const key_tile = shared + at;
      const T* const value_tile = key_tile + 2 * K::kTile;
      const bool here = some_of[warp].begin < first + kTileRows && first < some_of[warp].end;
      copy(p.key, shared + (at ^ K::kTile), first + kTileRows, p.head_dim);
      float s[N][4];
      if (here) {
        multiply_keys<D>(s, q, key_tile);
        const bool whole = all_of[warp].begin <= first && first + 8 * N <= all_of[warp].end;
        const bool plain = whole && p.mask.kind == AttentionMask::none && !logit.capped();
        if (!plain) mask_tile<T>(s, p, logit, batch, places, row, seen, first + lane % 4 * 2);
        online_softmax(s, o, state, plain ? logit.scale : 1.f);
      }
      ptx::cp_async_wait<1>();
      __syncthreads();  // the values have landed; the place of the next ones is free
      copy(p.value, shared + 2 * K::kTile + (at ^ K::kTile), first + kTileRows, p.value_dim);
      if (here) add_values<D>(o, s, value_tile);
      ptx::cp_async_wait<1>();
      __syncthreads();  // likewise the keys
    };
    int first = keys.begin, at = 0;
#pragma unroll 1
    for (; first + kTailKeys < keys.end; first += kTileRows, at ^= K::kTile) {
      step.template operator()<kTileRows / 8>(first, at);
    }
    if (first < keys.end) step.template operator()<kTailKeys / 8>(first, at);
  }
  ptx::cp_async_wait<0>();  // of queries that met no key
  __syncthreads();

  T* const out_tile = shared;  // each warp writes and reads its own rows
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(state[h].sum);
    const bool none = sum == 0.f;
    const float inverse = 1.f / sum;
    const float lse = none ? -kInfinity : state[h].largest + log2f(sum);
    const int r = row + 8 * h;
    const bool mine = r < rows.count;
    const int64_t head = static_cast<int64_t>(batch) * p.heads + places.head_of(r);
    const int64_t at = head * p.queries + places.query_of(r);
    const int64_t part = split * partial.rows + at;
    if (mine && lane % 4 == 0) {
      *(plan.splits > 1 ? partial.lse + part : to.lse + at) = plan.splits > 1 ? lse : lse * kLn2;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float x = none ? 0.f : o[n][2 * h] * inverse;
      const float y = none ? 0.f : o[n][2 * h + 1] * inverse;
      const int c = 8 * n + lane % 4 * 2;
      if (plan.splits == 1) {
        *reinterpret_cast<uint32_t*>(out_tile + r * K::kLd + c) = ptx::pack<T>(x, y);
      } else if (mine && !none && c < p.value_dim) {
        *reinterpret_cast<float2*>(partial.out + part * p.value_dim + c) = make_float2(x, y);
      }
    }
  }
  if (plan.splits > 1) return;
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kWarpRows * D / 8; i += 32) {
    const int r = warp * kWarpRows + i / (D / 8), c = i % (D / 8) * 8;
    if (r < rows.count && c < p.value_dim) {
      T* const out = head_rows<T>(to.out, batch, places.head_of(r), places.query_of(r));
      *reinterpret_cast<uint4*>(out + c) =
          *reinterpret_cast<const uint4*>(out_tile + r * K::kLd + c);
    }
  }
}

// A warp a row: the splits' results, weighted by their sums and added in their order. 2 instances.
// limits: registers 40, shared 0, spills 0
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Problem p, ForwardOut to, int splits, Partial partial) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= partial.rows) return;
  const float lse = lane < splits ? partial.lse[lane * partial.rows + row] : -kInfinity;
  float largest = lse;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
  const float weight = ptx::exp2_approx(lse - (largest == -kInfinity ? 0.f : largest));

  const int c = 4 * lane;
  float sum = 0.f, x[4] = {};
  for (int i = 0; i < splits; ++i) {
    const float w = __shfl_sync(~0u, weight, i);
    if (w == 0.f) continue;  // nothing was written
    sum += w;
    if (c < p.value_dim) {
      const float4 part = *reinterpret_cast<const float4*>(
          partial.out + (i * partial.rows + row) * p.value_dim + c);
      x[0] += w * part.x;
      x[1] += w * part.y;
      x[2] += w * part.z;
      x[3] += w * part.w;
    }
  }
  const bool none = sum == 0.f;
  const int64_t head = row / p.queries;
  const int query = static_cast<int>(row % p.queries);
  if (lane == 0) to.lse[row] = none ? -kInfinity : (largest + log2f(sum)) * kLn2;
  if (c < p.value_dim) {
    const float inverse = none ? 0.f : 1.f / sum;
    const uint2 packed = {ptx::pack<T>(x[0] * inverse, x[1] * inverse),
                          ptx::pack<T>(x[2] * inverse, x[3] * inverse)};
    T* const out = head_rows<T>(to.out, static_cast<int>(head / p.heads),
                                static_cast<int>(head % p.heads), query);
    *reinterpret_cast<uint2*>(out + c) = packed;
  }
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return max(1, count);
}

// How often the keys of a tile are split: where the device would not be full otherwise, so that it
// is twice over, each split has two tiles of keys, and what is saved is worth a second launch.
int splits_of(const Problem& p, int64_t heads) {
  constexpr int64_t kLeastTiles = 2;
  constexpr int64_t kLaunchTiles = 4;  // an estimate
  const int64_t query_tiles = ceil_div(p.queries, kTileRows);
  // Of packed rows the host knows their number only: as if segments were of one length.
  const int64_t segments =
      p.packed() ? max(p.query_tile_count - 1 - query_tiles, int64_t{1}) : p.batch;
  const int64_t reach = int64_t{p.window_left} + p.window_right + kTileRows;
  const int64_t keys = min(p.packed() ? ceil_div(p.keys, segments) : p.keys, reach);
  const int64_t key_tiles = ceil_div(keys, kTileRows);
  const int64_t ctas = heads * (p.packed() ? max(query_tiles, segments) : p.batch * query_tiles);
  const int64_t device = multiprocessors();
  if (ctas >= device) return 1;
  const int64_t splits = min(min(2 * device / ctas, key_tiles / kLeastTiles), int64_t{kMostSplits});
  if (splits < 2 || key_tiles - ceil_div(key_tiles, splits) < kLaunchTiles) return 1;
  return static_cast<int>(splits);
}

LongPlan plan_of(const Problem& p) {
  LongPlan plan{};
  plan.grouped = p.group > 1 && !p.packed() && int64_t{p.group} * p.queries <= kTileRows;
  plan.tiles = p.query_tile_count;
  plan.heads = plan.grouped ? p.heads / p.group : p.heads;
  plan.negate = p.scale < 0.f;
  plan.splits = splits_of(p, plan.heads);
  return plan;
}

int64_t rows_of(const Problem& p) { return int64_t{p.batch} * p.heads * p.queries; }

template <class T, int D>
const char* start(const Problem& p, const ForwardOut& out, const LongPlan& plan,
                  const Partial& partial, cudaStream_t stream) {
  const int64_t ctas = int64_t{plan.tiles} * plan.splits * plan.heads * p.batch;
  return launch(
      long_fwd_kernel<T, D>,
      {dim3(static_cast<unsigned>(ctas)), dim3(kThreads), LongTraits<D>::kSharedBytes, stream}, p,
      out, plan, partial);
}

template <class T>
const char* start(const Problem& p, const ForwardOut& out, const LongPlan& plan,
                  const Partial& partial, cudaStream_t stream) {
  const auto bucket = [&]<int D>() { return start<T, D>(p, out, plan, partial, stream); };
  const int d = max(p.head_dim, p.value_dim);
  const char* const error = d <= 32    ? bucket.template operator()<32>()
                            : d <= 64  ? bucket.template operator()<64>()
                            : d <= 80  ? bucket.template operator()<80>()
                            : d <= 96  ? bucket.template operator()<96>()
                            : d <= 112 ? bucket.template operator()<112>()
                                       : bucket.template operator()<128>();
  if (error || plan.splits == 1) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(partial.rows, kWarps)));
  return launch(combine_kernel<T>, {grid, dim3(kThreads), 0, stream}, p, out, plan.splits, partial);
}

}  // namespace

int64_t long_scratch_bytes(const Problem& p) {
  const int64_t splits = plan_of(p).splits;
  return splits == 1 ? 0 : splits * rows_of(p) * (p.value_dim + 1) * int64_t{sizeof(float)};
}

const char* long_fwd(const Problem& given, DType dtype, const ForwardOut& out, void* scratch,
                     cudaStream_t stream) {
  Problem p = given;
  const LongPlan plan = plan_of(p);
  p.scale = p.scale < 0.f ? -p.scale : p.scale;
  const int64_t rows = rows_of(p);
  float* const partial = static_cast<float*>(scratch);
  const Partial parts{partial, partial + plan.splits * rows * p.value_dim, rows};
  return dtype == DType::bf16 ? start<__nv_bfloat16>(p, out, plan, parts, stream)
                              : start<__half>(p, out, plan, parts, stream);
}

}  // namespace vlm::cuda
