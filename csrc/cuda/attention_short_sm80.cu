// Forward of attention where keys and values of a head fit shared memory: 50 to 320 tokens.
//
// A CTA keeps those of one head and takes the queries that read them, or a part of them: its warps
// take 16 queries each in turn. The 16 x keys logits of a warp stay in registers, so that softmax
// is exact and in one pass, and nothing is ever rescaled. Neither queries nor outputs take
// registers by head dim: S grows by 16 features a step, O is formed 32 features at a time. So one
// instance serves all head dims; there is one for each kTiles of with_tiles and each dtype: 10.
#include <algorithm>

#include "cuda/attention_rows.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

constexpr int kRows = 16;  // queries of a warp, and keys of a tile

template <int kTiles>
struct ShortTraits {
  // The most, and so what registers a thread may have: those of a multiprocessor hold as many.
  static constexpr int kWarps = kTiles <= 4 ? 20 : kTiles <= 8 ? 16 : kTiles <= 13 ? 12 : 8;
  static constexpr int kThreads = 32 * kWarps;
};

// Rows in shared memory as slices of 16 features: a slice is all rows, 32 bytes each, and 32 bytes
// more, so that the slices of a row lie in different banks. In rows 4 to 7 of 8 the two chunks of
// 16 bytes change places: then the eight rows of an ldmatrix meet all banks. Tiles of 16 rows are a
// constant apart, whatever the head dim.
constexpr __host__ __device__ int slice_size(int rows) { return (rows + 1) * 16; }
constexpr __host__ __device__ int slices(int features) { return (features + 15) / 16; }
constexpr int kTileSize = kRows * 16;

// Where a chunk of 8 features lies in a slice.
__device__ __forceinline__ int in_slice(int row, int chunk) {
  return row * 16 + (chunk ^ (row / 4 % 2)) * 8;
}

// One of them, by its features.
template <class T>
struct SlicedRow {
  T* rows;
  int slice, row;
  __device__ __forceinline__ T& operator[](int feature) const {
    return rows[feature / 16 * slice + in_slice(row, feature / 8 % 2) + feature % 8];
  }
};

// Normalises and rotates rows [first, end) where they lie, by a warp.
template <class T>
__device__ __forceinline__ void transform_sliced(T* rows, int slice, const RowLane& lane, int batch,
                                                 int shift, int first, int end) {
  const auto at = [&](int r) { return SlicedRow<T>{rows, slice, r}; };
  transform_rows<4>(lane, batch, shift, first, end, lane.dim, at, at);
}

// This lane's row of an ldmatrix, of a tile of 16 rows: as A, or as B where the rows are summed
// over; and as B where the rows are columns of the product.
__device__ __forceinline__ int lane_of_rows() {
  const int lane = threadIdx.x % 32;
  return in_slice(lane % 16, lane / 16);
}
__device__ __forceinline__ int lane_of_columns() {
  const int lane = threadIdx.x % 32;
  return in_slice(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// Starts copies of rows [0, rows) of `features` features; rows up to `all_rows` and features up to
// the next multiple of 16 become zero. By `threads`, of which this is `thread`.
template <class T>
__device__ __forceinline__ void copy_sliced(T* to, const T* from, int64_t stride, int rows,
                                            int all_rows, int features, int thread, int threads) {
  const int chunks = 2 * slices(features), more_rows = threads / chunks, more = threads % chunks;
  int r = thread / chunks, c = thread % chunks;
#pragma unroll 1
  while (r < all_rows) {
    const bool inside = r < rows && c * 8 < features;
    ptx::cp_async_16(to + c / 2 * slice_size(all_rows) + in_slice(r, c % 2),
                     inside ? from + r * stride + c * 8 : from, inside ? 16 : 0);
    r += more_rows;
    c += more;
    if (c >= chunks) c -= chunks, ++r;
  }
}

// The same of the 16 rows of a warp: each lane has a chunk of one row in each slice.
template <class T>
__device__ __forceinline__ void copy_queries(T* to, const T* from, int64_t stride, int rows,
                                             int features) {
  const int r = threadIdx.x % 32 / 2, c = threadIdx.x % 2;
  to += in_slice(r, c);
  from += r < rows ? r * stride : 0;
#pragma unroll 1
  for (int feature = 0; feature < features; feature += 16, to += slice_size(kRows)) {
    const bool inside = r < rows && feature + c * 8 < features;
    ptx::cp_async_16(to, inside ? from + feature + c * 8 : from, inside ? 16 : 0);
  }
}

// body(j) for the tiles j of [first, last), which is the same in a warp. Four at a time where it
// has them all, without branches between them, so that their loads overlap.
template <int kTiles, class Body>
__device__ __forceinline__ void for_tiles(int first, int last, const Body& body) {
#pragma unroll
  for (int j = 0; j < kTiles; j += 4) {
    if (j + 4 <= kTiles && first <= j && j + 4 <= last) {
#pragma unroll
      for (int i = j; i < j + 4 && i < kTiles; ++i) body(i);
    } else {
#pragma unroll
      for (int i = j; i < j + 4 && i < kTiles; ++i) {
        if (first <= i && i < last) body(i);
      }
    }
  }
}

// body(i) of the i in [kBegin, kEnd) that is j. Registers have no index, but a branch does.
template <int kBegin, int kEnd, class Body>
__device__ __forceinline__ void at_tile(int j, const Body& body) {
  constexpr int kMiddle = (kBegin + kEnd) / 2;
  if constexpr (kBegin == kMiddle) {
    body(kBegin);
  } else if (j < kMiddle) {
    at_tile<kBegin, kMiddle>(j, body);
  } else {
    at_tile<kMiddle, kEnd>(j, body);
  }
}

// A tile of S: rows lane / 4 and lane / 4 + 8, keys 16 j + 8 half + lane % 4 * 2 + {0, 1}.
using TileLogits = float[2][4];

// s = Q K^T of the first 16 * `steps` features. `query` and `keys` point to this lane's rows.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_keys(TileLogits (&s)[kTiles], const T* query,
                                              const T* keys, int key_slice, int steps, int first,
                                              int last) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][0][i] = s[j][1][i] = 0.f;
  }
  uint32_t a[4];
  ptx::ldmatrix<4>(a, query);
#pragma unroll 1
  while (true) {
    const bool more = --steps > 0;
    uint32_t next[4];
    query += more ? slice_size(kRows) : 0;
    ptx::ldmatrix<4>(next, query);
    for_tiles<kTiles>(first, last, [&](int j) {
      uint32_t b[4];
      ptx::ldmatrix<4>(b, keys + j * kTileSize);
      mma_16<T>(s[j][0], s[j][1], a, b);
    });
    if (!more) break;
    keys += key_slice;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = next[i];
  }
}

// o = P V of kSlices slices from `values`, which points to this lane's row. p[j][0] are the bits of
// 16-bit P.
template <class T, int kTiles, int kSlices>
__device__ __forceinline__ void multiply_values(float (&o)[2 * kSlices][4],
                                                const TileLogits (&p)[kTiles], const T* values,
                                                int value_slice, int first, int last) {
#pragma unroll
  for (int i = 0; i < 2 * kSlices; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[i][e] = 0.f;
  }
  for_tiles<kTiles>(first, last, [&](int j) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(p[j][0][i]);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      uint32_t b[4];
      ptx::ldmatrix_trans<4>(b, values + i * value_slice + j * kTileSize);
      mma_16<T>(o[2 * i], o[2 * i + 1], a, b);
    }
  });
}

// The keys that this lane's two rows see, less the lane's first key of a tile: those of its logit e
// of tile j and half h are 16 j + 8 h + e % 2.
struct SeenKeys {
  Interval rows[2];

  __device__ __forceinline__ bool has(int j, int half, int e) const {
    return rows[e / 2].has(j * kRows + half * 8 + e % 2);
  }
};

__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// Hides what the rows do not see.
__device__ __forceinline__ void hide(TileLogits& s, const SeenKeys& seen, int j) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[half][e] = seen.has(j, half, e) ? s[half][e] : -kInfinity;
  }
}

__device__ __forceinline__ const void* mask_row(const AttentionMask& mask, int batch, int head,
                                                int row, int key) {
  const int size = mask.kind == AttentionMask::boolean ? 1 : mask.dtype == DType::f32 ? 4 : 2;
  const int64_t at =
      batch * mask.batch_stride + head * mask.head_stride + row * mask.row_stride + key;
  return static_cast<const char*>(mask.data) + at * size;
}

// Adds the masks of the two rows, which begin at the lane's first key and end after `keys`.
template <class M>
__device__ __forceinline__ void add_mask(TileLogits& s, const void* const (&rows)[2], int keys,
                                         int j) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = j * kRows + half * 8 + e % 2;
      M m{};
      if (key < keys) m = static_cast<const M*>(rows[e / 2])[key];
      if constexpr (std::is_same_v<M, bool>) {
        s[half][e] = m ? s[half][e] : -kInfinity;
      } else {
        s[half][e] += static_cast<float>(m);
      }
    }
  }
}

// Scale, softcap and mask of a tile of products; not the scale where they stay `plain`.
template <class T>
__device__ __forceinline__ void finish_logits(TileLogits& s, const Problem& p, bool plain,
                                              const void* const (&mask_rows)[2], int j) {
  if (!plain) {
#pragma unroll
    for (int e = 0; e < 8; ++e) s[e / 4][e % 4] *= p.scale;
  }
  if (p.softcap > 0.f) {
    const float inverse = __fdividef(1.f, p.softcap);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      s[e / 4][e % 4] = p.softcap * tanh_approx(s[e / 4][e % 4] * inverse);
    }
  }
  const int keys = p.keys - lane_column();
  if (p.mask.kind == AttentionMask::boolean) {
    add_mask<bool>(s, mask_rows, keys, j);
  } else if (p.mask.kind == AttentionMask::additive) {
    if (p.mask.dtype == DType::f32) {
      add_mask<float>(s, mask_rows, keys, j);
    } else {
      add_mask<T>(s, mask_rows, keys, j);
    }
  }
}

// Within each quad of lanes: word i of lane t becomes word t of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; ++bit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = (t & bit) != 0;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + bit], bit);
      w[i] = upper ? got : w[i];
      w[i + bit] = upper ? w[i + bit] : got;
    }
  }
}

// Where 16 queries are: `head` counts those that share the keys, and goes on behind the last.
struct QueryBlock {
  int head, first;

  __device__ __forceinline__ void advance(int by, int queries) {
    first += by * kRows;
    while (first >= queries) {
      first -= (queries + kRows - 1) / kRows * kRows;
      ++head;
    }
  }
  __device__ __forceinline__ bool any(const Problem& p) const { return head < p.group; }
  __device__ __forceinline__ int count(const Problem& p) const {
    return any(p) ? min(kRows, p.queries - first) : 0;
  }
  __device__ __forceinline__ int query_head(const Problem& p, int key_head) const {
    return key_head * p.group + min(head, p.group - 1);
  }
};

// What a warp wants to know of its 16 queries when it has multiplied them. It stays in shared
// memory, since the registers are full of S.
struct __align__(16) BlockNote {
  Interval rows[kRows];  // the keys that each sees
  Interval all;          // those that all of them see
  int head, first, count;
};

// Of shared memory, for a warp: a note and its queries.
constexpr __host__ __device__ int own_bytes(int head_dim) {
  return static_cast<int>(sizeof(BlockNote)) + 2 * slices(head_dim) * slice_size(kRows);
}

// By a warp. Returns the tiles of keys that any of the queries sees.
__device__ __forceinline__ Interval write_note(BlockNote& note, const Problem& p, int batch,
                                               int key_head, const QueryBlock& block) {
  const int count = block.count(p), head = block.query_head(p, key_head);
  // Lanes beyond the queries repeat one of them.
  const int r = threadIdx.x % kRows, query = min(block.first + r, p.queries - 1);
  const Interval seen = seen_keys(p, batch, head, query, 0, p.keys, 0);
  const int begin = __reduce_min_sync(~0u, seen.empty() ? p.keys : seen.begin);
  const int end = __reduce_max_sync(~0u, seen.empty() ? 0 : seen.end);
  const Interval all = {__reduce_max_sync(~0u, seen.begin), __reduce_min_sync(~0u, seen.end)};
  if (threadIdx.x % 32 < kRows) note.rows[r] = seen;
  if (threadIdx.x % 32 == 0) {
    note.all = all;
    note.head = head;
    note.first = block.first;
    note.count = count;
  }
  __syncwarp();
  return {begin / kRows, count > 0 ? (end + kRows - 1) / kRows : 0};
}

// limits: registers 232, spills 0
template <class T, int kTiles>
__global__ void __launch_bounds__(ShortTraits<kTiles>::kThreads)
    attention_short_kernel(Problem p, RowTransform query_rows, RowTransform key_rows,
                           ForwardOut out, int parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int part = blockIdx.x % parts, pair = blockIdx.x / parts, kv_heads = p.heads / p.group;
  const int batch = pair / kv_heads, key_head = pair % kv_heads;
  const int padded_keys = (p.keys + kRows - 1) / kRows * kRows, slice = slice_size(padded_keys);
  const int steps = slices(p.head_dim);
  T* const keys = dynamic_shared<T>();
  T* const values = keys + steps * slice;
  char* const own =
      reinterpret_cast<char*>(values + slices(p.value_dim) * slice) + warp * own_bytes(p.head_dim);
  BlockNote& note = *reinterpret_cast<BlockNote*>(own);
  T* const query = reinterpret_cast<T*>(own + sizeof(BlockNote));

  const auto load_queries = [&](const QueryBlock& block) {
    const int head = block.query_head(p, key_head);
    copy_queries(query, head_rows<T>(p.query, batch, head, block.first), p.query.row_stride,
                 block.count(p), p.head_dim);
  };
  QueryBlock next{0, 0};  // a warp may have none, and goes around once for the barriers
  next.advance(warp * parts + part, p.queries);
  copy_sliced(keys, head_rows<T>(p.key, batch, key_head, 0), p.key.row_stride, p.keys, padded_keys,
              p.head_dim, threadIdx.x, blockDim.x);
  load_queries(next);
  ptx::cp_async_commit();
  copy_sliced(values, head_rows<T>(p.value, batch, key_head, 0), p.value.row_stride, p.keys,
              padded_keys, p.value_dim, threadIdx.x, blockDim.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();  // keys and the first queries have landed
  if (key_rows.any()) {
    const int each = (p.keys + warps - 1) / warps;
    transform_sliced(keys, slice, RowLane(key_rows, p.head_dim, key_head), batch, key_rows.shift,
                     warp * each, min((warp + 1) * each, p.keys));
    __syncthreads();
  }

  // Logits are products still, which the exponential scales, or where that would not do in natural
  // units.
  const bool plain = p.softcap == 0.f && p.mask.kind != AttentionMask::additive && p.scale > 0.f;
  const float unit = plain ? p.scale : 1.f;
  bool values_landed = false;
#pragma unroll 1
  while (true) {
    const Interval tiles = write_note(note, p, batch, key_head, next);
    const int first = tiles.begin, last = tiles.end;
    if (query_rows.any()) {
      transform_sliced(query, slice_size(kRows), RowLane(query_rows, p.head_dim, note.head), batch,
                       query_rows.shift + note.first, 0, note.count);
      __syncwarp();
    }
    TileLogits s[kTiles];
    multiply_keys(s, query + lane_of_rows(), keys + lane_of_columns(), slice, steps, first, last);
    __syncwarp();  // the queries have been read
    next.advance(parts * warps, p.queries);
    const bool more = next.any(p);
    if (more) load_queries(next);
    ptx::cp_async_commit();

    const int head = note.head;
    const Interval all = note.all;
    SeenKeys seen;
    const void* mask_rows[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Interval row = note.rows[lane / 4 + 8 * i];
      seen.rows[i] = {row.begin - lane_column(), row.end - lane_column()};
      if (p.mask.kind != AttentionMask::none) {
        mask_rows[i] = mask_row(p.mask, batch, head,
                                min(note.first + lane / 4 + 8 * i, p.queries - 1), lane_column());
      }
    }
    float maximum[2] = {-kInfinity, -kInfinity};
    const bool as_is = plain && p.mask.kind == AttentionMask::none;
#pragma unroll 1
    for (int j = first; j < last; ++j) {
      const bool whole = all.begin <= j * kRows && (j + 1) * kRows <= all.end;
      if (as_is && whole) continue;
      TileLogits x;
      at_tile<0, kTiles>(j, [&](int i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e / 4][e % 4] = s[i][e / 4][e % 4];
      });
      finish_logits<T>(x, p, plain, mask_rows, j);
      if (!whole) hide(x, seen, j);
      at_tile<0, kTiles>(j, [&](int i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) s[i][e / 4][e % 4] = x[e / 4][e % 4];
      });
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < first || j >= last) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        maximum[e % 4 / 2] = fmaxf(maximum[e % 4 / 2], s[j][e / 4][e % 4]);
      }
    }

    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = quad_max(maximum[i]);
      if (maximum[i] == -kInfinity) maximum[i] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < first || j >= last) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& x = s[j][e / 4][e % 4];
        x = ptx::exp2_approx((x - maximum[e % 4 / 2]) * (unit * kLog2e));
        sum[e % 4 / 2] += x;
      }
      // In place of S: other registers would be kept for it all the time.
      uint32_t a[4];
      as_a<T>(a, s[j][0], s[j][1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][0][i] = __uint_as_float(a[i]);
    }
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = quad_sum(sum[i]);
      inverse[i] = __fdividef(1.f, sum[i]);
      const int row = lane / 4 + 8 * i;
      if (lane % 4 == 0 && row < note.count) {
        const int64_t at = static_cast<int64_t>(batch) * p.heads + head;
        out.lse[at * p.queries + note.first + row] =
            sum[i] == 0.f ? -kInfinity : maximum[i] * unit + logf(sum[i]);
      }
    }
    if (!values_landed) {
      ptx::cp_async_wait<1>();
      __syncthreads();
      values_landed = true;
    }

    // 16 bits of two neighbouring features; 0 of rows that see nothing, whatever the values are.
    const auto word = [&](const float (&o)[4], int i) {
      return sum[i] == 0.f ? 0u : ptx::pack<T>(o[2 * i] * inverse[i], o[2 * i + 1] * inverse[i]);
    };
    const auto store = [&](int row, int feature, const uint32_t (&w)[4]) {
      if (row >= note.count || feature >= p.value_dim) return;
      T* const to = head_rows<T>(out.out, batch, note.head, note.first + row) + feature;
      *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
    };
    const T* from = values + lane_of_rows();
    int n = 0;
#pragma unroll 1
    for (; n + 16 < p.value_dim; n += 32, from += 2 * slice) {
      float o[4][4];
      multiply_values<T, kTiles, 2>(o, s, from, slice, first, last);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t w[4] = {word(o[0], i), word(o[1], i), word(o[2], i), word(o[3], i)};
        transpose_quad(w);
        store(lane / 4 + 8 * i, n + lane % 4 * 8, w);
      }
    }
    if (n < p.value_dim) {
      float o[2][4];
      multiply_values<T, kTiles, 1>(o, s, from, slice, first, last);
      uint32_t w[4] = {word(o[0], 0), word(o[1], 0), word(o[0], 1), word(o[1], 1)};
      transpose_quad(w);
      store(lane / 4 + lane % 4 / 2 * 8, n + lane % 2 * 8, w);
    }
    ptx::cp_async_wait<0>();
    __syncwarp();  // the next queries have landed
    if (!more) break;
  }
}

// f.template operator()<kTiles>() with the fewest that hold the keys, or nothing.
template <class F>
auto with_tiles(int keys, const F& f) {
  if (keys <= 4 * kRows) return f.template operator()<4>();
  if (keys <= 8 * kRows) return f.template operator()<8>();
  if (keys <= 13 * kRows) return f.template operator()<13>();
  if (keys <= 17 * kRows) return f.template operator()<17>();
  return f.template operator()<20>();
}
constexpr int kMostKeys = 20 * kRows;

struct Device {
  int multiprocessors = 0, shared_block = 0, shared_multiprocessor = 0;

  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&shared_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                           device);
  }
};

int64_t shared_bytes(const Problem& p, int warps) {
  constexpr int64_t kBytes = 2;
  const int key_rows = static_cast<int>(round_up(p.keys, kRows));
  return kBytes * (slice_size(key_rows) * (slices(p.head_dim) + slices(p.value_dim))) +
         static_cast<int64_t>(warps) * own_bytes(p.head_dim);
}

template <class T, int kTiles>
const char* launch_short(const Problem& p, const RowTransform& query, const RowTransform& key,
                         const ForwardOut& out, cudaStream_t stream) {
  constexpr int kReserved = 1024;  // of shared memory, by CUDA for each CTA
  const Device device;
  int warps = 4;
  int64_t bytes = shared_bytes(p, warps);
  if (2 * (bytes + kReserved) > device.shared_multiprocessor &&
      shared_bytes(p, 8) <= device.shared_block) {
    warps = 8;
    bytes = shared_bytes(p, warps);
  }
  const int64_t by_shared = device.shared_multiprocessor / (bytes + kReserved);
  const int64_t by_registers = ShortTraits<kTiles>::kThreads / (32 * warps);
  const int64_t slots =
      device.multiprocessors * std::max<int64_t>(std::min(by_shared, by_registers), 1);
  const int64_t heads = static_cast<int64_t>(p.batch) * (p.heads / p.group);
  const int64_t items = p.group * ceil_div(p.queries, kRows);
  const int64_t parts = std::clamp<int64_t>(ceil_div(slots, heads), 1, ceil_div(items, warps));
  return launch(attention_short_kernel<T, kTiles>,
                {dim3(static_cast<unsigned>(heads * parts)), dim3(32 * warps),
                 static_cast<size_t>(bytes), stream},
                p, query, key, out, static_cast<int>(parts));
}

}  // namespace

bool short_takes(const Problem& p) {
  return !p.packed() && p.keys <= kMostKeys && p.head_dim <= 128 && p.value_dim <= 128 &&
         shared_bytes(p, 4) <= Device().shared_block;
}

const char* short_fwd(const Problem& p, DType dtype, const RowTransform& query,
                      const RowTransform& key, const ForwardOut& out, cudaStream_t stream) {
  return with_tiles(p.keys, [&]<int kTiles>() {
    return dtype == DType::bf16 ? launch_short<__nv_bfloat16, kTiles>(p, query, key, out, stream)
                                : launch_short<__half, kTiles>(p, query, key, out, stream);
  });
}

}  // namespace vlm::cuda
