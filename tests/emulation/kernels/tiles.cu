// Kernels whose results the tests know: a tile GEMM of each operand type, a reduction, and every
// collective.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

using vlm::cuda::dynamic_shared;
using vlm::cuda::launch;
namespace ptx = vlm::ptx;

constexpr unsigned kFull = 0xffffffffu;

// C = A B^T for row-major A (m, k) and B (n, k): 64 x 64 tiles by 4 warps, two stages of cp.async.
// k is a multiple of 8; m and n are any.
struct GemmTraits {
  static constexpr int kTile = 64, kDepth = 32, kThreads = 128;
  static constexpr int kStride = kDepth + 8;  // rows of 80 bytes: ldmatrix without bank conflicts
  static constexpr int kStage = 2 * kTile * kStride;
  static constexpr size_t kBytes = 2 * kStage * 2;
};

template <class T>
__device__ void load_stage(T* s, const T* x, int rows, int k, int first_row, int first_k) {
  constexpr int kChunks = GemmTraits::kDepth / 8;
  for (int i = threadIdx.x; i < GemmTraits::kTile * kChunks; i += GemmTraits::kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const bool inside = first_row + row < rows && first_k + column < k;
    const int64_t offset = inside ? int64_t{first_row + row} * k + first_k + column : 0;
    ptx::cp_async_16(s + row * GemmTraits::kStride + column, x + offset, inside ? 16 : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(GemmTraits::kThreads)
    gemm_kernel(const T* a, const T* b, float* c, int m, int n, int k) {
  using K = GemmTraits;
  T* s = dynamic_shared<T>();
  const int row0 = blockIdx.y * K::kTile, column0 = blockIdx.x * K::kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto load = [&](int stage) {
    T* to = s + stage % 2 * K::kStage;
    load_stage(to, a, m, k, row0, stage * K::kDepth);
    load_stage(to + K::kTile * K::kStride, b, n, k, column0, stage * K::kDepth);
    ptx::cp_async_commit();
  };
  float d[8][4] = {};  // 16 rows a warp, all 64 columns
  const int stages = (k + K::kDepth - 1) / K::kDepth;
  load(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      load(stage + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const T* sa = s + stage % 2 * K::kStage;
    const T* sb = sa + K::kTile * K::kStride;
#pragma unroll
    for (int step = 0; step < K::kDepth; step += 16) {
      uint32_t fa[4];
      ptx::ldmatrix(fa, sa + (16 * warp + lane % 16) * K::kStride + step + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t fb[2];
        ptx::ldmatrix(fb, sb + (8 * j + lane % 8) * K::kStride + step + lane / 8 % 2 * 8);
        ptx::mma<T>(d[j], fa, fb);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * warp + lane / 4 + i / 2 * 8;
      const int column = column0 + 8 * j + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[int64_t{row} * n + column] = d[j][i];
    }
  }
}

template <class T>
const char* gemm(const T* a, const T* b, float* c, int m, int n, int k) {
  using K = GemmTraits;
  const auto tiles = [](int size) {
    return static_cast<unsigned>((size + K::kTile - 1) / K::kTile);
  };
  return launch(gemm_kernel<T>, {{tiles(n), tiles(m)}, K::kThreads, K::kBytes}, a, b, c, m, n, k);
}

// One warp, one tile: fragments are filled from global memory by the tables of the PTX ISA.
template <class T>
__global__ void mma_tile(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const T* low, const T* high) {
    return ptx::pack<T>(static_cast<float>(*low), static_cast<float>(*high));
  };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const T* p = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fa[i] = pair(p, p + 1);
  }
  for (int i = 0; i < 2; ++i) {
    const T* p = b + (2 * t + i * 8) * 8 + g;
    fb[i] = pair(p, p + 8);
  }
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  ptx::mma<T>(d, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void mma_tile_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = ptx::round_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = ptx::round_tf32(b[(t + i * 4) * 8 + g]);
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  ptx::mma_tf32(d, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// out (32, N): the registers of each lane after loading N 8 x 8 matrices, which lie one after the
// other in `in`.
template <int N, bool kTransposed>
__global__ void matrices(const uint16_t* in, uint32_t* out) {
  uint4* s = dynamic_shared<uint4>();
  if (threadIdx.x < 8 * N) s[threadIdx.x] = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  __syncwarp();
  uint32_t r[N];
  const uint4* row = s + threadIdx.x % (8 * N);
  if (kTransposed) {
    ptx::ldmatrix_trans(r, row);
  } else {
    ptx::ldmatrix(r, row);
  }
  for (int i = 0; i < N; ++i) out[threadIdx.x * N + i] = r[i];
}

// Sums of rows, a block each, and their maxima.
__global__ void reduce_rows(const float* x, float* sums, float* largest, int columns) {
  __shared__ float warp_sum[8], warp_max[8];
  float sum = 0.f, most = -INFINITY;
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    const float v = x[int64_t{blockIdx.x} * columns + j];
    sum += v;
    most = fmaxf(most, v);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(kFull, sum, mask);
    most = fmaxf(most, __shfl_xor_sync(kFull, most, mask));
  }
  if (threadIdx.x % 32 == 0) {
    warp_sum[threadIdx.x / 32] = sum;
    warp_max[threadIdx.x / 32] = most;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const bool mine = threadIdx.x < blockDim.x / 32;
  sum = mine ? warp_sum[threadIdx.x] : 0.f;
  most = mine ? warp_max[threadIdx.x] : -INFINITY;
  for (int delta = 4; delta > 0; delta /= 2) {
    sum += __shfl_down_sync(kFull, sum, delta);
    most = fmaxf(most, __shfl_down_sync(kFull, most, delta));
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = sum, largest[blockIdx.x] = most;
}

// out (kCollectives, 64): each lane's result of every collective of an int.
__global__ void collectives(const int* in, int* out) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  const int x = in[t];
  const unsigned half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int* to = out + t;
  const auto put = [&](int value) {
    *to = value;
    to += n;
  };
  put(__shfl_sync(kFull, x, 5));
  put(__shfl_sync(kFull, x, x));      // a source of each lane's own, modulo the width
  put(__shfl_sync(kFull, x, 11, 8));  // in segments
  put(__shfl_up_sync(kFull, x, 3));
  put(__shfl_up_sync(kFull, x, 3, 16));
  put(__shfl_down_sync(kFull, x, 3));
  put(__shfl_down_sync(kFull, x, 3, 16));
  put(__shfl_xor_sync(kFull, x, 9));
  put(__shfl_xor_sync(kFull, x, 9, 8));  // later segments are out of reach, earlier ones not
  put(__shfl_xor_sync(half, x, 9));      // two halves at once
  put(static_cast<int>(__ballot_sync(kFull, x % 3 == 0)));
  put(__any_sync(kFull, x == 40));
  put(__all_sync(kFull, x < 60));
  put(static_cast<int>(__match_any_sync(kFull, x % 3)));
  put(__reduce_add_sync(half, x));
  put(__reduce_min_sync(kFull, x));
  put(static_cast<int>(__reduce_max_sync(kFull, static_cast<unsigned>(x))));
  put(static_cast<int>(__reduce_xor_sync(kFull, static_cast<unsigned>(x))));
  put(__syncthreads_count(x % 3 == 0));
  put(__syncthreads_or(x == 100));
  put(__syncthreads_and(x > 0));
  put(static_cast<int>(__shfl_xor_sync(kFull, int64_t{x} << 33, 1) >> 33));
  put(static_cast<int>(__shfl_xor_sync(kFull, static_cast<double>(x), 1)));
}

// counters (8,): one of each atomic.
__global__ void atomics(int* counters) {
  const int t = static_cast<int>(threadIdx.x + blockDim.x * blockIdx.x);
  atomicAdd(counters, t);
  atomicMin(counters + 1, -t);
  atomicMax(counters + 2, t);
  atomicOr(counters + 3, 1 << t % 31);
  atomicXor(counters + 4, t);
  atomicAnd(counters + 5, ~(1 << t % 5));
  if (atomicCAS(counters + 6, 0, 7) == 7) atomicExch(counters + 7, 1);
  atomicMax(reinterpret_cast<unsigned*>(counters) + 8, static_cast<unsigned>(-1 - t));
}

__global__ void convert(const float* x, uint32_t* bf16, uint32_t* f16, uint32_t* tf32, float* exp2,
                        int n) {
  const int i = static_cast<int>(threadIdx.x + blockDim.x * blockIdx.x);
  if (i >= n) return;
  bf16[i] = ptx::pack<__nv_bfloat16>(x[i], 1.f);
  f16[i] = ptx::pack<__half>(x[i], -1.f);
  tf32[i] = ptx::round_tf32(x[i]);
  exp2[i] = ptx::exp2_approx(x[i]);
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*

ENTRY gemm_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  return gemm(a, b, c, m, n, k);
}
ENTRY gemm_f16(const __half* a, const __half* b, float* c, int m, int n, int k) {
  return gemm(a, b, c, m, n, k);
}
ENTRY mma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  return launch(mma_tile<__nv_bfloat16>, {1, 32}, a, b, c);
}
ENTRY mma_f16(const __half* a, const __half* b, float* c) {
  return launch(mma_tile<__half>, {1, 32}, a, b, c);
}
ENTRY mma_tf32(const float* a, const float* b, float* c) {
  return launch(mma_tile_tf32, {1, 32}, a, b, c);
}
ENTRY load_matrices(const uint16_t* in, uint32_t* out, int count, int transposed) {
  const auto kernel = count == 1   ? transposed ? matrices<1, true> : matrices<1, false>
                      : count == 2 ? transposed ? matrices<2, true> : matrices<2, false>
                      : transposed ? matrices<4, true>
                                   : matrices<4, false>;
  return launch(kernel, {1, 32, 512}, in, out);
}
ENTRY row_sums(const float* x, float* sums, float* largest, int rows, int columns) {
  return launch(reduce_rows, {static_cast<unsigned>(rows), 256}, x, sums, largest, columns);
}
ENTRY all_collectives(const int* in, int* out) { return launch(collectives, {1, 64}, in, out); }
ENTRY all_atomics(int* counters) { return launch(atomics, {3, 64}, counters); }
ENTRY all_conversions(const float* x, uint32_t* bf16, uint32_t* f16, uint32_t* tf32, float* exp2,
                      int n) {
  const auto blocks = static_cast<unsigned>((n + 127) / 128);
  return launch(convert, {blocks, 128}, x, bf16, f16, tf32, exp2, n);
}
