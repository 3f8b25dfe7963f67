// The backward of heads whose rows fit shared memory, in one launch: no sums between CTAs or warps.
//
// A CTA of one kind has all queries of a head and their gradients of out in shared memory, and each
// of its warps takes blocks of 16 keys, for dK and dV; one of the other kind has the keys and
// values, and its warps take blocks of 16 queries, for dQ. Both form P and dS anew, 7 products
// instead of 5. They are the same code: "own" rows are the 16 of a warp, as fragments, "others" the
// ones in shared memory, met 16 at a time; x is what logits are products of (keys and queries), y
// what dP is one of (values and gradients of out).
#include <algorithm>

#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

constexpr int kTile = 16;       // own rows of a warp, others of a step
constexpr int kRowChunks = 16;  // of 16 bytes, in a row of the largest head dim
// Beyond, a multiprocessor has room for a single CTA at most head dims. An estimate: where the
// kernels for long rows become faster has not been measured.
constexpr int kMaxRows = 320;

// Head dims up to `features`. exact: both are that when rounded to 16, else what lies beyond them
// is left out at run time.
template <int features, bool exact, int warps, int ctas>
struct Bucket {
  static constexpr int kSteps = features / 16;
  static constexpr int kThreads = 32 * warps, kWarps = warps;
  static constexpr int kCtas = ctas;  // of an SM, by registers
  // Own rows stay in registers; beyond, with two accumulators of features * 16, they do not fit.
  static constexpr bool kInRegisters = features <= 96;

  static __device__ __forceinline__ bool has(int k, int dim) { return exact || k < dim; }
  static constexpr __host__ __device__ int ld(int dim) {
    return exact ? features + 8 : shared_ld(dim);
  }
};

// Elements of a warp's buffer: own rows where they do not stay in registers, and what is stored.
template <class B>
constexpr __host__ __device__ int buffer_elements(int ld_x, int ld_y) {
  return kTile * (B::kInRegisters ? (ld_x > ld_y ? ld_x : ld_y) : ld_x + ld_y);
}

// The others' x, y, log-sum-exp and delta, interval; the warps' buffers.
template <class B>
int64_t shared_bytes(const Problem& p, int others) {
  const int ld_x = B::ld(p.head_dim), ld_y = B::ld(p.value_dim);
  const int64_t rows = round_up(others, kTile);
  return 2 * (rows * (ld_x + ld_y) + B::kWarps * buffer_elements<B>(ld_x, ld_y)) +
         rows * (2 * sizeof(float) + sizeof(int2)) + sizeof(int2);
}

// Rows [0, rows) that `keep` has; zeros in place of the others and of features up to the next
// multiple of 16. The caller commits and waits.
template <class T, class Keep>
__device__ __forceinline__ void copy_kept(T* to, const T* from, int64_t stride, int rows,
                                          int features, int thread, int threads, Keep keep) {
  const int ld = shared_ld(features), c = thread % kRowChunks * 8;
  if (c >= ld - 8) return;
#pragma unroll 1
  for (int r = thread / kRowChunks; r < rows; r += threads / kRowChunks) {
    const bool inside = c < features && keep(r);
    ptx::cp_async_16(to + r * ld + c, inside ? from + r * stride + c : from, inside ? 16 : 0);
  }
}

// The own rows of a warp as A: in registers, or in its buffer.
template <class T, class B>
struct OwnRows {
  uint32_t fragments[B::kInRegisters ? B::kSteps : 1][4];
  const T* buffer;
  int ld;

  __device__ __forceinline__ void load(T* to, const T* from, int64_t stride, int rows,
                                       int features) {
    const int lane = threadIdx.x % 32;
    if constexpr (B::kInRegisters) {
#pragma unroll
      for (int k = 0; k < B::kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = lane / 4 + i % 2 * 8, c = 16 * k + i / 2 * 8 + lane % 4 * 2;
          fragments[k][i] = r < rows && c < features
                                ? *reinterpret_cast<const uint32_t*>(from + r * stride + c)
                                : 0;
        }
      }
    } else {
      copy_kept(to, from, stride, kTile, features, lane, 32, [&](int r) { return r < rows; });
      buffer = to;
      ld = shared_ld(features);
    }
  }

  __device__ __forceinline__ void get(uint32_t (&a)[4], int k) const {
    if constexpr (B::kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
    } else {
      load_a(a, buffer, ld, 16 * k);
    }
  }
};

// The sum of a row's products, on each lane of its quad.
template <class T, class B>
__device__ __forceinline__ float quad_dot(const T* a, const T* b, int features) {
  constexpr int kLoads = (B::kSteps + 1) / 2;
  uint4 packed_a[kLoads], packed_b[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int c = (4 * k + threadIdx.x % 4) * 8;
    const bool inside = c < features;
    packed_a[k] = inside ? *reinterpret_cast<const uint4*>(a + c) : uint4{};
    packed_b[k] = inside ? *reinterpret_cast<const uint4*>(b + c) : uint4{};
  }
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const T* const x = reinterpret_cast<const T*>(&packed_a[k]);
    const T* const y = reinterpret_cast<const T*>(&packed_b[k]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
  }
  return quad_sum(sum);
}

struct QueryStats {
  float lse, delta;
};

// What P and dS need of a query: lse in units of log2, and delta. A row that is none, or that sees
// nothing, has the lse +inf, for which P is 0. By the row's quad.
template <class T, class B>
__device__ __forceinline__ QueryStats query_stats(const Problem& p, const BackwardArgs& args,
                                                  int batch, int head, int row) {
  const bool inside = row < p.queries;
  const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + row;
  float delta = quad_dot<T, B>(head_rows<T>(args.grad, batch, head, inside ? row : 0),
                               head_rows<T>(args.out, batch, head, inside ? row : 0), p.value_dim);
  if (inside && args.grad_lse) delta -= args.grad_lse[at];
  const float lse = inside ? args.lse[at] : -kInfinity;
  if (lse == -kInfinity) return {kInfinity, 0.f};
  return {bias_log2(lse), delta};
}

// Some query does not see all keys, by window or range.
__device__ __forceinline__ bool limited(const Problem& p) {
  return p.range || p.window_left < p.queries || p.window_right < p.keys;
}

__device__ __forceinline__ Interval query_interval(const Problem& p, int batch, int head, int row) {
  if (row >= p.queries) return {0, 0};
  return seen_keys(p, batch, head, row, 0, p.keys, 0);
}

// The least interval with all keys that some query of [first, first + count) sees. By a warp.
__device__ __forceinline__ Interval seen_by_any(const Problem& p, int batch, int head, int first,
                                                int count) {
  int begin = p.keys, end = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const Interval seen = query_interval(p, batch, head, first + i);
    if (seen.empty()) continue;
    begin = min(begin, seen.begin);
    end = max(end, seen.end);
  }
  begin = __reduce_min_sync(~0u, begin);
  end = __reduce_max_sync(~0u, end);
  return {min(begin, end), end};
}

// The gradients of a warp's own rows, in 16-byte stores by way of its buffer.
template <class T, class B>
__device__ __forceinline__ void store_rows(const float (&acc)[2 * B::kSteps][4], float factor,
                                           T* buffer, T* to, int64_t stride, int rows,
                                           int features) {
  const int lane = threadIdx.x % 32, ld = B::ld(features);
  T* const at = buffer + lane / 4 * ld + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 2 * B::kSteps; ++n) {
    if (!B::has(n / 2 * 16, features)) continue;
    *reinterpret_cast<uint32_t*>(at + 8 * n) = ptx::pack<T>(acc[n][0] * factor, acc[n][1] * factor);
    *reinterpret_cast<uint32_t*>(at + 8 * ld + 8 * n) =
        ptx::pack<T>(acc[n][2] * factor, acc[n][3] * factor);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTile * kRowChunks / 32; ++i) {
    const int r = (32 * i + lane) / kRowChunks, c = lane % kRowChunks * 8;
    if (r >= rows || c >= features) continue;
    *reinterpret_cast<uint4*>(to + r * stride + c) =
        *reinterpret_cast<const uint4*>(buffer + r * ld + c);
  }
  __syncwarp();
}

// Of the queries lane / 4 and lane / 4 + 8 of a warp's own.
struct OwnQueries {
  float lse[2], delta[2];
  Interval seen[2];
};

// A CTA's part: kKeys says whose gradients.
template <class T, class B, bool kKeys>
struct Part {
  const Problem& p;
  const BackwardArgs& args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own_rows = kKeys ? p.keys : p.queries, others = kKeys ? p.queries : p.keys;
  const int tiles = (others + kTile - 1) / kTile;
  const int ld_x = B::ld(p.head_dim), ld_y = B::ld(p.value_dim);
  const bool is_limited = limited(p);
  T* const x = dynamic_shared<T>();       // (tiles * 16, ld_x)
  T* const y = x + tiles * kTile * ld_x;  // (tiles * 16, ld_y)
  T* const buffers = y + tiles * kTile * ld_y;
  T* const buffer = buffers + warp * buffer_elements<B>(ld_x, ld_y);
  T* const buffer_y = B::kInRegisters ? buffer : buffer + kTile * ld_x;
  // Of the queries, where they are the others.
  float* const lses =
      reinterpret_cast<float*>(buffers + B::kWarps * buffer_elements<B>(ld_x, ld_y));
  float* const deltas = lses + tiles * kTile;
  int2* const intervals = reinterpret_cast<int2*>(deltas + tiles * kTile);
  // Batch and head, read again where they are needed: what follows from them would otherwise be
  // kept in registers all the time.
  int2* const place = intervals + tiles * kTile;

  __device__ __forceinline__ void run(int batch, int head) const {
    if (threadIdx.x == 0) *place = make_int2(batch, head);
    // Rows that meet nothing are not loaded: their products with P = 0 would keep a NaN of theirs.
    if constexpr (kKeys) {
      const bool all = !is_limited && p.mask.kind == AttentionMask::none;
      if (all) copy_others(batch, head, [&](int r) { return r < others; });
#pragma unroll 1
      for (int first = 8 * warp; first < tiles * kTile; first += 8 * B::kWarps) {
        const int row = first + lane / 4;
        const QueryStats of_row = query_stats<T, B>(p, args, batch, head, row);
        if (lane % 4 != 0) continue;
        lses[row] = of_row.lse;
        deltas[row] = of_row.delta;
        if (!is_limited) continue;
        const Interval seen = query_interval(p, batch, head, row);
        intervals[row] = make_int2(seen.begin, seen.end);
      }
      if (!all) {
        __syncthreads();
        copy_others(batch, head, [&](int r) { return lses[r] != kInfinity; });
      }
    } else {
      const Interval any =
          is_limited ? seen_by_any(p, batch, head, 0, p.queries) : Interval{0, p.keys};
      copy_others(batch, head, [&](int r) { return any.has(r); });
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int first = kTile * warp; first < own_rows; first += kTile * B::kWarps) block(first);
  }

  template <class Keep>
  __device__ __forceinline__ void copy_others(int batch, int head, Keep keep) const {
    const HeadsRef &from_x = kKeys ? p.query : p.key, &from_y = kKeys ? args.grad : p.value;
    copy_kept(x, head_rows<T>(from_x, batch, head, 0), from_x.row_stride, tiles * kTile, p.head_dim,
              threadIdx.x, B::kThreads, keep);
    copy_kept(y, head_rows<T>(from_y, batch, head, 0), from_y.row_stride, tiles * kTile,
              p.value_dim, threadIdx.x, B::kThreads, keep);
  }

  // Own rows from `first`.
  __device__ __forceinline__ void block(int first) const {
    const auto [batch, head] = *place;
    const int count = min(kTile, own_rows - first), d = p.head_dim, dv = p.value_dim;
    const HeadsRef &from_x = kKeys ? p.key : p.query, &from_y = kKeys ? p.value : args.grad;
    OwnRows<T, B> own_x, own_y;
    own_x.load(buffer, head_rows<T>(from_x, batch, head, first), from_x.row_stride, count, d);
    own_y.load(buffer_y, head_rows<T>(from_y, batch, head, first), from_y.row_stride, count, dv);
    if constexpr (!B::kInRegisters) {
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncwarp();
    }

    OwnQueries own{};
    Interval some{0, others}, every{0, others};  // others that some, every own query sees
    if constexpr (!kKeys) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + lane / 4 + 8 * h;
        const QueryStats of_row = query_stats<T, B>(p, args, batch, head, row);
        own.lse[h] = of_row.lse;
        own.delta[h] = of_row.delta;
        own.seen[h] = query_interval(p, batch, head, row);
      }
      if (is_limited) {
        some = seen_by_any(p, batch, head, first, count);
        // A row that is none sees nothing, but its P is 0 anyway.
        const int row = min(first + lane % kTile, p.queries - 1);
        const Interval seen = query_interval(p, batch, head, row);
        every = {__reduce_max_sync(~0u, seen.begin), __reduce_min_sync(~0u, seen.end)};
      }
    }

    const bool want_x = kKeys ? args.grad_key.data : args.grad_query.data;
    const bool want_y = kKeys && args.grad_value.data;
    float acc_x[2 * B::kSteps][4] = {}, acc_y[2 * B::kSteps][4] = {};
#pragma unroll 1
    for (int other = some.begin / kTile * kTile; other < some.end; other += kTile) {
      bool check = !kKeys && (other < every.begin || other + kTile > every.end);
      if (kKeys && is_limited) {
        const int row = other + lane % kTile;
        const int2 seen = intervals[row];
        const bool meets = seen.x < min(seen.y, first + count) && seen.y > first;
        if (!__any_sync(~0u, meets)) continue;
        const bool all = seen.x <= first && seen.y >= first + count;
        check = !__all_sync(~0u, all || row >= p.queries);
      }
      const T *const x_rows = x + other * ld_x, *const y_rows = y + other * ld_y;
      float s[2][4] = {}, dp[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const OfQuery delta = of_query(deltas, own.delta, other, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[j][i] = -delta(i);
      }
#pragma unroll
      for (int k = 0; k < B::kSteps; ++k) {
        uint32_t a[4], b[4];
        if (B::has(16 * k, d)) {
          own_x.get(a, k);
          load_b(b, x_rows, ld_x, 16 * k);
          mma_16<T>(s[0], s[1], a, b);
        }
        if (B::has(16 * k, dv)) {
          own_y.get(a, k);
          load_b(b, y_rows, ld_y, 16 * k);
          mma_16<T>(dp[0], dp[1], a, b);
        }
      }
      gradient(first, other, check, own, s, dp);
      uint32_t probabilities[4], gradients[4];
      as_a<T>(probabilities, s[0], s[1]);
      as_a<T>(gradients, dp[0], dp[1]);
      if (want_x) add_product(acc_x, gradients, x_rows, ld_x, d);
      if (want_y) add_product(acc_y, probabilities, y_rows, ld_y, dv);
    }

    if constexpr (!B::kInRegisters) __syncwarp();  // the buffer is still read
    if (want_x) store(kKeys ? args.grad_key : args.grad_query, first, acc_x, p.scale, buffer, d);
    if (want_y) store(args.grad_value, first, acc_y, 1.f, buffer_y, dv);
  }

  __device__ __forceinline__ void store(const MutableHeadsRef& to, int first,
                                        const float (&acc)[2 * B::kSteps][4], float factor,
                                        T* buffer, int features) const {
    const auto [batch, head] = *place;
    store_rows<T, B>(acc, factor, buffer, head_rows<T>(to, batch, head, first), to.row_stride,
                     min(kTile, own_rows - first), features);
  }

  __device__ __forceinline__ void add_product(float (&acc)[2 * B::kSteps][4],
                                              const uint32_t (&a)[4], const T* rows, int ld,
                                              int dim) const {
#pragma unroll
    for (int k = 0; k < B::kSteps; ++k) {
      if (!B::has(16 * k, dim)) continue;
      uint32_t b[4];
      load_b_trans(b, rows, ld, 16 * k);
      mma_16<T>(acc[2 * k], acc[2 * k + 1], a, b);
    }
  }

  // What entries of an accumulator, 8 columns from others other + 8 j, have of their queries.
  struct OfQuery {
    float low, high;  // by column, or by row
    __device__ __forceinline__ float operator()(int i) const {
      return (kKeys ? i % 2 : i / 2) ? high : low;
    }
  };
  __device__ __forceinline__ OfQuery of_query(const float* of_others, const float (&of_own)[2],
                                              int other, int j) const {
    if constexpr (kKeys) {
      const int column = other + 8 * j + lane % 4 * 2;
      const float2 pair = *reinterpret_cast<const float2*>(of_others + column);
      return {pair.x, pair.y};
    } else {
      return {of_own[0], of_own[1]};
    }
  }

  // From S in s to P, and from dP - delta in dp to dS / p.scale, for own rows from `first` and
  // others from `other`.
  __device__ __forceinline__ void gradient(int first, int other, bool check, const OwnQueries& own,
                                           float (&s)[2][4], float (&dp)[2][4]) const {
    const auto each = [&](auto&& fn) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + lane / 4 + i / 2 * 8;
          const int column = other + 8 * j + lane % 4 * 2 + i % 2;
          fn(j, i, kKeys ? column : row, kKeys ? row : column);
        }
      }
    };
    const Logit logit(p);
    if (logit.capped()) {
      each([&](int j, int i, int, int) {
        s[j][i] = logit(s[j][i]);
        dp[j][i] *= logit.slope(s[j][i]);
      });
    } else {  // not by logit(), which would ask for each
      each([&](int j, int i, int, int) { s[j][i] *= logit.scale; });
    }
    // Hidden entries by select: a NaN would survive an addition.
    if (p.mask.kind != AttentionMask::none) {
      const auto [batch, head] = *place;
      // Not unrolled, the halves trade places: few need masks, and all would pay in registers.
#pragma unroll 1
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + lane / 4 + i / 2 * 8;
          const int column = other + 8 * j + lane % 4 * 2 + i % 2;
          const int query = kKeys ? column : row, key = kKeys ? row : column;
          const bool inside = query < p.queries && key < p.keys;
          const float m = inside ? masked(p.mask, batch, head, query, key) : -kInfinity;
          const float sum = m == -kInfinity ? m : s[0][i] + m;
          s[0][i] = s[1][i];
          s[1][i] = sum;
        }
      }
    }
    if (check) {
      each([&](int j, int i, int query, int key) {
        bool seen;
        if constexpr (kKeys) {
          const int2 interval = intervals[query];
          seen = interval.x <= key && key < interval.y;
        } else {
          seen = own.seen[i / 2].has(key);
        }
        if (!seen) s[j][i] = -kInfinity;
      });
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const OfQuery lse = of_query(lses, own.lse, other, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Where the lowest float as a mask drowns all logits P is 1, however lse was rounded.
        const float x = s[j][i] > lse(i) ? lse(i) : s[j][i];
        const float probability = s[j][i] == -kInfinity ? 0.f : ptx::exp2_approx(x - lse(i));
        dp[j][i] = probability == 0.f ? 0.f : probability * dp[j][i];
        s[j][i] = probability;
      }
    }
  }
};

// Instances: 4 buckets, two dtypes.
// limits: registers 232, shared 0, spills 0
template <class T, class B>
__global__ void __launch_bounds__(B::kThreads, B::kCtas)
    short_bwd_kernel(Problem p, BackwardArgs args, bool keys, int kinds) {
  const int problem = blockIdx.x / kinds;
  const int batch = problem / p.heads, head = problem % p.heads;
  if (keys && blockIdx.x % kinds == 0) {
    Part<T, B, true>{p, args}.run(batch, head);
  } else {
    Part<T, B, false>{p, args}.run(batch, head);
  }
}

// At 64 and 80 features and up to 272 rows two CTAs share the 228 KiB of sm_90; wider rows leave
// room for one, which then has more warps.
template <class Fn>
auto with_bucket(const Problem& p, const Fn& fn) {
  const auto d = round_up(p.head_dim, 16), dv = round_up(p.value_dim, 16);
  if (d == 64 && dv == 64) return fn(Bucket<64, true, 6, 2>{});
  if (d == 80 && dv == 80) return fn(Bucket<80, true, 4, 2>{});
  if (d == 96 && dv == 96) return fn(Bucket<96, true, 8, 1>{});
  return fn(Bucket<128, false, 8, 1>{});
}

int64_t optin_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

template <class T>
const char* start(const Problem& p, const BackwardArgs& args, cudaStream_t stream) {
  return with_bucket(p, [&](auto bucket) {
    using B = decltype(bucket);
    const bool keys = args.grad_key.data || args.grad_value.data, queries = args.grad_query.data;
    const int kinds = keys + queries;
    const int64_t bytes = std::max(keys ? shared_bytes<B>(p, p.queries) : 0,
                                   queries ? shared_bytes<B>(p, p.keys) : 0);
    const dim3 grid(static_cast<unsigned>(p.batch) * p.heads * kinds);
    return launch(short_bwd_kernel<T, B>,
                  {grid, dim3(B::kThreads), static_cast<size_t>(bytes), stream}, p, args, keys,
                  kinds);
  });
}

}  // namespace

bool short_bwd_takes(const Problem& p) {
  const int rows = std::max(p.queries, p.keys);
  if (p.packed() || p.group != 1 || rows > kMaxRows) return false;
  return with_bucket(p, [&](auto bucket) {
    return shared_bytes<decltype(bucket)>(p, rows) <= optin_shared_bytes();
  });
}

const char* short_bwd(const Problem& p, DType dtype, const BackwardArgs& args,
                      cudaStream_t stream) {
  return dtype == DType::bf16 ? start<__nv_bfloat16>(p, args, stream)
                              : start<__half>(p, args, stream);
}

}  // namespace vlm::cuda
