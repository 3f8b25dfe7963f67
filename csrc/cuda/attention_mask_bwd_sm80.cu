// The gradient of an additive mask: dS = P (dP - delta) with delta = rowsum(dO O) - dlse, of the
// logits as the mask meets them, summed over what the mask broadcasts.
//
// A CTA owns a tile of the mask's own shape and adds up the tiles of dS that fall into it, each
// from two products; none of them is stored. Where there are too few tiles to fill a device their
// sums are split, and a second kernel adds the parts in order.
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

struct MaskTraits {
  static constexpr int kRows = kTileRows, kKeys = kTileRows;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;  // 16 rows a warp
  static constexpr int kBlocks = kKeys / 8;                 // of a warp's accumulators
  static constexpr int kGrid = 512, kTerms = 4;  // splits fill a grid, with so many terms at least
  static constexpr int kDeltaThreads = 256, kDeltaLanes = 16;  // of a row: 16 bytes each
  static constexpr int kSumThreads = 256, kSumGroups = kSumThreads / kKeys;
};
using M = MaskTraits;

// Which tiles of the mask there are, and what falls into each.
struct MaskTiles {
  float* grad;
  int64_t batch_stride, head_stride, row_stride;
  int batches, heads, row_tiles, key_tiles;  // of the mask's own
  int over_batches, over_heads, over_rows;   // what each is a sum of; rows in tiles
  int splits;

  MaskTiles(const Problem& p, const AttentionGrads& grads)
      : grad(grads.mask),
        batch_stride(grads.mask_batch_stride),
        head_stride(grads.mask_head_stride),
        row_stride(grads.mask_row_stride) {
    const auto deal = [](bool own, int count, int& mine, int& over) {
      mine = own ? count : 1;
      over = own ? 1 : count;
    };
    deal(batch_stride != 0, p.batch, batches, over_batches);
    deal(head_stride != 0, p.heads, heads, over_heads);
    deal(row_stride != 0, p.query_tile_count, row_tiles, over_rows);
    key_tiles = p.key_tile_count;
    const int64_t wanted = std::min(terms() / M::kTerms, ceil_div(M::kGrid, count()));
    splits = static_cast<int>(std::max<int64_t>(wanted, 1));
  }

  int64_t count() const { return int64_t{batches} * heads * row_tiles * key_tiles; }
  __host__ __device__ int64_t terms() const {
    return int64_t{over_batches} * over_heads * over_rows;
  }
  // Rows of a tile: of one that all queries share, a single one.
  __host__ __device__ int rows() const { return row_stride == 0 ? 1 : M::kRows; }

  struct Tile {
    int batch, head, row, key;  // of its first entry
  };
  __device__ __forceinline__ Tile tile(int i) const {
    const int rest = i / key_tiles, head = rest / row_tiles;
    return {head / heads, head % heads, rest % row_tiles * M::kRows, i % key_tiles * M::kKeys};
  }
  // The tile of dS that is term i of a tile.
  __device__ __forceinline__ Tile term(const Tile& t, int64_t i) const {
    const int64_t head = i / over_rows;
    return {t.batch + static_cast<int>(head / over_heads),
            t.head + static_cast<int>(head % over_heads),
            t.row + static_cast<int>(i % over_rows) * M::kRows, t.key};
  }
  __device__ __forceinline__ float* entry(const Tile& t, int row) const {
    return grad + t.batch * batch_stride + t.head * head_stride + (t.row + row) * row_stride +
           t.key;
  }
};
using Tile = MaskTiles::Tile;

// A row by 16 lanes.
// 2 instances
// limits: registers 64, shared 0, spills 0
template <class T>
__global__ void __launch_bounds__(M::kDeltaThreads)
    mask_delta_kernel(Problem p, BackwardArgs args, float* delta) {
  struct __align__(16) Chunk {
    T x[8];
  };
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * M::kDeltaThreads + threadIdx.x;
  const int64_t at = thread / M::kDeltaLanes;
  const int feature = thread % M::kDeltaLanes * 8;
  float sum = 0.f;
  if (at < rows && feature < p.value_dim) {
    const int64_t head = at / p.queries;
    const int b = static_cast<int>(head / p.heads), h = static_cast<int>(head % p.heads);
    const int row = static_cast<int>(at % p.queries);
    const auto chunk = [&](const HeadsRef& x) {
      return *reinterpret_cast<const Chunk*>(head_rows<T>(x, b, h, row) + feature);
    };
    const Chunk grad = chunk(args.grad), out = chunk(args.out);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += static_cast<float>(grad.x[i]) * static_cast<float>(out.x[i]);
  }
#pragma unroll
  for (int i = M::kDeltaLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (at < rows && feature == 0) delta[at] = args.grad_lse ? sum - args.grad_lse[at] : sum;
}

// d (16 x 64 of a warp) = x y^T over rows of `features` features in shared memory.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[M::kBlocks][4], const T* x, const T* y,
                                         int features) {
  const int ld = shared_ld(features);
#pragma unroll
  for (auto& block : d) block[0] = block[1] = block[2] = block[3] = 0.f;
  for (int k = 0; k < features; k += 16) {
    uint32_t a[4], b[4];
    load_a(a, x, ld, k);
#pragma unroll
    for (int n = 0; n < M::kBlocks / 2; ++n) {
      load_b(b, y + 16 * n * ld, ld, k);
      mma_16<T>(d[2 * n], d[2 * n + 1], a, b);
    }
  }
}

// Whether any query of the tile may see any of its keys. Ranges are not looked at.
__device__ __forceinline__ bool meets(const Problem& p, const Tile& t) {
  const int last_row = min(t.row + M::kRows, p.queries) - 1;
  const int last_key = min(t.key + M::kKeys, p.keys) - 1;
  return t.key - p.window_right <= last_row && t.row - p.window_left <= last_key;
}

// A thread's accumulators are those of rows own(0) and own(1), and of keys own_key(n), ... + 1.
__device__ __forceinline__ int own_row(int i) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
}
__device__ __forceinline__ int own_key(int n) { return 8 * n + threadIdx.x % 4 * 2; }

// s: from products to probabilities, and `delta` of the thread's rows.
__device__ __forceinline__ void probabilities(const Problem& p, const Tile& t, const float* lse,
                                              const float* deltas, float (&s)[M::kBlocks][4],
                                              float (&delta)[2]) {
  const Logit logit(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = t.row + own_row(i);
    const int64_t at = (static_cast<int64_t>(t.batch) * p.heads + t.head) * p.queries + row;
    Interval seen = {0, 0};
    float total = -kInfinity;
    delta[i] = 0.f;
    if (row < p.queries && lse[at] != -kInfinity) {
      seen = seen_keys(p, t.batch, t.head, row, 0, p.keys, 0);
      total = bias_log2(lse[at]);
      delta[i] = deltas[at];
    }
#pragma unroll
    for (int n = 0; n < M::kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = t.key + own_key(n) + e;
        float& x = s[n][2 * i + e];
        const float bias = seen.has(key) ? masked(p.mask, t.batch, t.head, row, key) : -kInfinity;
        const float sum = logit(x) + bias;
        // Hidden by select, since a NaN would stay one. No P is above 1: an lse as large as the
        // lowest float may be off by more than what is left of the logit.
        x = bias == -kInfinity ? 0.f : ptx::exp2_approx((sum > total ? total : sum) - total);
      }
    }
  }
}

// Writes a warp's 16 x 64 to `to`, of which only `rows` and `keys` are there.
__device__ __forceinline__ void write_tile(const float (&sum)[M::kBlocks][4], float* to,
                                           int64_t stride, int rows, int keys) {
#pragma unroll
  for (int n = 0; n < M::kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = own_row(e / 2), key = own_key(n) + e % 2;
      if (row < rows && key < keys) to[row * stride + key] = sum[n][e];
    }
  }
}

// Writes the sums over the CTA's rows.
__device__ __forceinline__ void write_sums(const float (&sum)[M::kBlocks][4], float* to, int keys) {
  __shared__ float shared[M::kWarps][M::kKeys];
#pragma unroll
  for (int n = 0; n < M::kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = sum[n][e] + sum[n][e + 2];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
      if (threadIdx.x % 32 < 4) shared[threadIdx.x / 32][own_key(n) + e] = x;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= keys) return;
  float x = 0.f;
  for (int w = 0; w < M::kWarps; ++w) x += shared[w][threadIdx.x];
  to[threadIdx.x] = x;
}

// parts (tiles, splits, rows of a tile, 64); not read where there is one.
// 2 instances
// limits: registers 168, shared 1024, spills 0
template <class T>
__global__ void __launch_bounds__(M::kThreads, 3)
    mask_bwd_kernel(Problem p, BackwardArgs args, MaskTiles tiles, const float* delta,
                    float* parts) {
  T* const query = dynamic_shared<T>();
  T* const key = query + M::kRows * shared_ld(p.head_dim);
  T* const grad = key + M::kKeys * shared_ld(p.head_dim);
  T* const value = grad + M::kRows * shared_ld(p.value_dim);
  const Tile own = tiles.tile(blockIdx.x);
  const int keys = min(M::kKeys, p.keys - own.key);
  const int64_t terms = tiles.terms(), end = terms * (blockIdx.y + 1) / tiles.splits;
  const auto next = [&](int64_t i) {
    while (i < end && !meets(p, tiles.term(own, i))) ++i;
    return i;
  };
  const auto copy = [&](T* x, const HeadsRef& rows, T* y, const HeadsRef& others, int64_t i,
                        int features) {
    if (i < end) {
      const Tile t = tiles.term(own, i);
      copy_rows(x, head_rows<T>(rows, t.batch, t.head, t.row), rows.row_stride,
                min(M::kRows, p.queries - t.row), M::kRows, features, threadIdx.x, M::kThreads);
      copy_rows(y, head_rows<T>(others, t.batch, t.head / p.group, t.key), others.row_stride, keys,
                M::kKeys, features, threadIdx.x, M::kThreads);
    }
    ptx::cp_async_commit();  // empty groups keep the count
  };
  const int warp_row = threadIdx.x / 32 * 16;
  float sum[M::kBlocks][4] = {};
  int64_t i = next(terms * blockIdx.y / tiles.splits);
  copy(query, p.query, key, p.key, i, p.head_dim);
  copy(grad, args.grad, value, p.value, i, p.value_dim);
#pragma unroll 1
  while (i < end) {
    const Tile t = tiles.term(own, i);
    float s[M::kBlocks][4], dp[M::kBlocks][4], row_delta[2];
    i = next(i + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    multiply(s, query + warp_row * shared_ld(p.head_dim), key, p.head_dim);
    __syncthreads();  // queries and keys are free
    copy(query, p.query, key, p.key, i, p.head_dim);
    probabilities(p, t, args.lse, delta, s, row_delta);
    ptx::cp_async_wait<1>();
    __syncthreads();
    multiply(dp, grad + warp_row * shared_ld(p.value_dim), value, p.value_dim);
    __syncthreads();
    copy(grad, args.grad, value, p.value, i, p.value_dim);
#pragma unroll
    for (int n = 0; n < M::kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // 0, not 0 * NaN
        sum[n][e] += s[n][e] == 0.f ? 0.f : s[n][e] * (dp[n][e] - row_delta[e / 2]);
      }
    }
  }
  ptx::cp_async_wait<0>();

  float* to = tiles.entry(own, 0);
  int64_t stride = tiles.row_stride;
  int rows = p.queries - own.row, columns = keys;
  if (tiles.splits > 1) {
    const int64_t part = static_cast<int64_t>(blockIdx.x) * tiles.splits + blockIdx.y;
    to = parts + part * tiles.rows() * M::kKeys;
    stride = M::kKeys;
    rows = M::kRows, columns = M::kKeys;
  }
  if (tiles.row_stride != 0) {
    write_tile(sum, to, stride, rows, columns);
  } else {
    write_sums(sum, to, columns);
  }
}

// Adds the parts of row blockIdx.y of a tile, in order.
// limits: registers 64, shared 1024, spills 0
__global__ void __launch_bounds__(M::kSumThreads)
    mask_sum_kernel(Problem p, MaskTiles tiles, const float* parts) {
  __shared__ float shared[M::kSumGroups][M::kKeys];
  const int group = threadIdx.x / M::kKeys, key = threadIdx.x % M::kKeys, row = blockIdx.y;
  const int64_t part = static_cast<int64_t>(tiles.rows()) * M::kKeys;
  const float* const from = parts + blockIdx.x * tiles.splits * part + row * M::kKeys + key;
  float sum = 0.f;
#pragma unroll 4
  for (int i = group; i < tiles.splits; i += M::kSumGroups) sum += from[i * part];
  shared[group][key] = sum;
  __syncthreads();
  const Tile own = tiles.tile(blockIdx.x);
  if (group > 0 || own.key + key >= p.keys || own.row + row >= p.queries) return;
  sum = 0.f;
  for (int g = 0; g < M::kSumGroups; ++g) sum += shared[g][key];
  tiles.entry(own, row)[key] = sum;
}

// Where the parts begin: behind delta (batch, heads, queries).
int64_t delta_bytes(const Problem& p) {
  return round_up(int64_t{p.batch} * p.heads * p.queries * int64_t{sizeof(float)}, 256);
}

template <class T>
const char* run(const Problem& p, const BackwardArgs& args, const AttentionGrads& grads,
                void* scratch, cudaStream_t stream) {
  const MaskTiles tiles(p, grads);
  float* const delta = static_cast<float*>(scratch);
  float* const parts = reinterpret_cast<float*>(static_cast<char*>(scratch) + delta_bytes(p));
  constexpr int kRows = M::kDeltaThreads / M::kDeltaLanes;
  const int64_t rows = int64_t{p.batch} * p.heads * p.queries;
  const dim3 over_rows(static_cast<unsigned>(ceil_div(rows, kRows)));
  const char* error =
      launch(mask_delta_kernel<T>, {over_rows, dim3(M::kDeltaThreads), 0, stream}, p, args, delta);
  if (error) return error;

  const size_t bytes =
      (M::kRows + M::kKeys) * sizeof(T) * (shared_ld(p.head_dim) + shared_ld(p.value_dim));
  const auto count = static_cast<unsigned>(tiles.count());
  error = launch(mask_bwd_kernel<T>, {dim3(count, tiles.splits), dim3(M::kThreads), bytes, stream},
                 p, args, tiles, delta, parts);
  if (error || tiles.splits == 1) return error;
  return launch(mask_sum_kernel, {dim3(count, tiles.rows()), dim3(M::kSumThreads), 0, stream}, p,
                tiles, parts);
}

}  // namespace

int64_t mask_bwd_scratch_bytes(const Problem& p, const AttentionGrads& grads) {
  const MaskTiles tiles(p, grads);
  const int64_t part = int64_t{tiles.rows()} * M::kKeys * int64_t{sizeof(float)};
  return delta_bytes(p) + (tiles.splits > 1 ? tiles.count() * tiles.splits * part : 0);
}

const char* mask_bwd(const Problem& p, DType dtype, const BackwardArgs& args,
                     const AttentionGrads& grads, void* scratch, cudaStream_t stream) {
  return (dtype == DType::bf16 ? run<__nv_bfloat16> : run<__half>)(p, args, grads, scratch, stream);
}

}  // namespace vlm::cuda
