// Rows made ready for the products of attention, and the way back for their gradient.
#include "cuda/attention_rows.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

struct RowsTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kPrepared = 4, kFinished = 2;  // rows that a warp has at once
  static constexpr int kMaxDim = 128;
  static constexpr int kGrid = 1024;  // CTAs that sum the gradients of weight and bias, about
  static constexpr int kSumWarps = 32;
};
using R = RowsTraits;

// The tiles of a head: those of packed rows, or `rows` of each entry of the batch in turn.
struct HeadTiles {
  const PackedTile* packed;
  int per_batch, rows, shift;

  HeadTiles(const PackedTile* tiles, int tile_count, int rows, const RowTransform& transform)
      : packed(tiles),
        per_batch(tiles ? tile_count : static_cast<int>(ceil_div(rows, kTileRows))),
        rows(rows),
        shift(transform.shift) {}

  __device__ __forceinline__ int batch(int tile) const { return tile / per_batch; }
  __device__ __forceinline__ TileRows operator[](int tile) const {
    TileRows t = tile_rows(packed, tile % per_batch, rows, 0);
    if (!packed) t.shift = shift;
    return t;
  }
};

// 2 instances
// limits: registers 80, shared 0, spills 0
template <class T>
__global__ void __launch_bounds__(R::kThreads)
    prepare_rows_kernel(HeadsRef from, MutableHeadsRef to, int dim, RowTransform transform,
                        HeadTiles tiles) {
  const int tile = blockIdx.x, head = blockIdx.y, batch = tiles.batch(tile);
  const TileRows rows = tiles[tile];
  const RowLane lane(transform, dim, head);
  constexpr int kEach = kTileRows / R::kWarps;
  const int begin = rows.first + threadIdx.x / 32 * kEach;
  const int end = min(begin + kEach, rows.first + rows.count);
  transform_rows<R::kPrepared>(
      lane, batch, rows.shift, begin, end, dim,
      [&](int r) { return head_rows<T>(from, batch, head, r); },
      [&](int r) { return head_rows<T>(to, batch, head, r); });
}

struct AffineSums {
  RowLane::Pairs weight = {}, bias = {};

  __device__ __forceinline__ void add(const RowLane::Pairs& grad, const RowLane::Pairs& s) {
#pragma unroll
    for (int k = 0; k < RowLane::kPairs; ++k) {
      weight.of[k].x += grad.of[k].x * s.of[k].x, weight.of[k].y += grad.of[k].y * s.of[k].y;
      bias.of[k].x += grad.of[k].x, bias.of[k].y += grad.of[k].y;
    }
  }
};

// From the gradient of a normalised row to that of the row x. By a warp.
__device__ __forceinline__ void standardise_back(const RowLane& lane, RowLane::Pairs x,
                                                 RowLane::Pairs& grad, AffineSums& sums) {
  const float inverse = lane.standardise(x);
  sums.add(grad, x);
  float dot = 0.f, sum = 0.f;
#pragma unroll
  for (int k = 0; k < RowLane::kPairs; ++k) {
    grad.of[k] = {grad.of[k].x * lane.weight[k].x, grad.of[k].y * lane.weight[k].y};
    dot += grad.of[k].x * x.of[k].x + grad.of[k].y * x.of[k].y;
    sum += grad.of[k].x + grad.of[k].y;
  }
  const float each = 1.f / static_cast<float>(lane.dim);
  const float along_x = warp_sum(dot) * each;
  const float along_one = lane.t.norm.kind == HeadNorm::layer ? warp_sum(sum) * each : 0.f;
#pragma unroll
  for (int k = 0; k < RowLane::kPairs; ++k) {
    grad.of[k].x = inverse * (grad.of[k].x - x.of[k].x * along_x - along_one);
    grad.of[k].y = inverse * (grad.of[k].y - x.of[k].y * along_x - along_one);
  }
}

// The sums of the CTA, warp after warp, to sums (2, dim).
__device__ __forceinline__ void write_sums(const RowLane& lane, const AffineSums& own,
                                           float* sums) {
  __shared__ float shared[R::kWarps][2][R::kMaxDim];
  float (&mine)[2][R::kMaxDim] = shared[threadIdx.x / 32];
#pragma unroll
  for (int k = 0; k < RowLane::kPairs; ++k) {
    if (!lane.inside(k)) continue;
    mine[0][lane.a[k]] = own.weight.of[k].x, mine[0][lane.b[k]] = own.weight.of[k].y;
    mine[1][lane.a[k]] = own.bias.of[k].x, mine[1][lane.b[k]] = own.bias.of[k].y;
  }
  __syncthreads();
  const int which = threadIdx.x / R::kMaxDim, feature = threadIdx.x % R::kMaxDim;
  static_assert(R::kThreads == 2 * R::kMaxDim);
  if (feature >= lane.dim) return;
  float sum = 0.f;
  for (int w = 0; w < R::kWarps; ++w) sum += shared[w][which][feature];
  sums[which * lane.dim + feature] = sum;
}

// A CTA takes every gridDim.x-th tile of a head; sums (heads, gridDim.x, 2, dim), or null.
// 2 instances
// limits: registers 80, shared 8192, spills 0
template <class T>
__global__ void __launch_bounds__(R::kThreads)
    finish_rows_kernel(HeadsRef from, HeadsRef grad, MutableHeadsRef to, int dim,
                       RowTransform transform, HeadTiles tiles, int tile_count, float* sums) {
  const int head = blockIdx.y;
  const RowLane lane(transform, dim, head);
  const bool normed = transform.norm.kind != HeadNorm::none;
  AffineSums own;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tile_count; tile += gridDim.x) {
    const TileRows rows = tiles[tile];
    const int batch = tiles.batch(tile), end = rows.first + rows.count;
    constexpr int kEach = R::kFinished;
#pragma unroll 1
    for (int first = rows.first + threadIdx.x / 32 * kEach; first < end;
         first += R::kWarps * kEach) {
      RowLane::Pairs g[kEach], x[kEach] = {}, angle[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int r = min(first + i, end - 1);
        g[i] = lane.read(head_rows<T>(grad, batch, head, r));
        if (normed) x[i] = lane.read(head_rows<T>(from, batch, head, r));
        angle[i] = lane.angles(batch, r + rows.shift);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (first + i == end) break;
        lane.rotate<-1>(g[i], angle[i]);
        if (normed) standardise_back(lane, x[i], g[i], own);
        if (to.data) lane.write(head_rows<T>(to, batch, head, first + i), g[i], dim);
      }
    }
  }
  if (sums) {
    const int64_t part = static_cast<int64_t>(head) * gridDim.x + blockIdx.x;
    write_sums(lane, own, sums + part * 2 * dim);
  }
}

// Adds the parts of each head, or of all of them, one after the other. A CTA sums 32 features of
// weight (blockIdx.z == 0) or bias.
// limits: registers 64, shared 4096, spills 0
__global__ void __launch_bounds__(32 * R::kSumWarps)
    affine_sums_kernel(const float* sums, int parts, int dim, float* weight, float* bias) {
  float* const to = blockIdx.z == 0 ? weight : bias;
  if (!to) return;
  __shared__ float shared[R::kSumWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature = blockIdx.x * 32 + lane;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * parts;
  float sum = 0.f;
  if (feature < dim) {
#pragma unroll 4
    for (int part = warp; part < parts; part += R::kSumWarps) {
      sum += sums[((first + part) * 2 + blockIdx.z) * dim + feature];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || feature >= dim) return;
  sum = 0.f;
  for (int w = 0; w < R::kSumWarps; ++w) sum += shared[w][lane];
  to[static_cast<int64_t>(blockIdx.y) * dim + feature] += sum;
}

// CTAs that a head's tiles are dealt out to.
int parts_of(int heads, int64_t tiles) {
  return static_cast<int>(std::min<int64_t>(tiles, ceil_div(R::kGrid, heads)));
}

// (batch, heads, rows, dim)
template <class Ref, class Data>
Ref contiguous(Data* data, int heads, int rows, int dim) {
  const int64_t head = static_cast<int64_t>(rows) * dim;
  return {data, heads * head, head, dim};
}

}  // namespace

const char* prepare_rows(const HeadsRef& from, void* to, DType dtype, int batch, int heads,
                         int rows, int dim, const RowTransform& transform, const PackedTile* tiles,
                         int tile_count, cudaStream_t stream) {
  const HeadTiles all(tiles, tile_count, rows, transform);
  const LaunchConfig config{dim3(batch * all.per_batch, heads), dim3(R::kThreads), 0, stream};
  const auto kernel =
      dtype == DType::bf16 ? prepare_rows_kernel<__nv_bfloat16> : prepare_rows_kernel<__half>;
  return launch(kernel, config, from, contiguous<MutableHeadsRef>(to, heads, rows, dim), dim,
                transform, all);
}

int64_t finish_rows_scratch_bytes(int batch, int heads, int rows, int dim,
                                  const RowTransform& transform, int tile_count) {
  if (transform.norm.kind == HeadNorm::none) return 0;
  // As many tiles as packed rows have, or as rows that are not.
  const int64_t tiles = batch * std::max<int64_t>(tile_count, ceil_div(rows, kTileRows));
  return static_cast<int64_t>(heads) * parts_of(heads, tiles) * 2 * dim * sizeof(float);
}

const char* finish_rows(const HeadsRef& from, const void* grad, const MutableHeadsRef& to,
                        DType dtype, int batch, int heads, int rows, int dim,
                        const RowTransform& transform, const PackedTile* tiles, int tile_count,
                        float* weight_grad, float* bias_grad, void* scratch, cudaStream_t stream) {
  const HeadTiles all(tiles, tile_count, rows, transform);
  const int count = batch * all.per_batch, parts = parts_of(heads, count);
  float* const sums = weight_grad || bias_grad ? static_cast<float*>(scratch) : nullptr;
  const LaunchConfig config{dim3(parts, heads), dim3(R::kThreads), 0, stream};
  const auto kernel =
      dtype == DType::bf16 ? finish_rows_kernel<__nv_bfloat16> : finish_rows_kernel<__half>;
  const char* const error =
      launch(kernel, config, from, contiguous<HeadsRef>(grad, heads, rows, dim), to, dim, transform,
             all, count, sums);
  if (error || !sums) return error;
  const bool shared = transform.norm.head_stride == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(dim, 32)), shared ? 1 : heads, 2);
  return launch(affine_sums_kernel, LaunchConfig{grid, dim3(32 * R::kSumWarps), 0, stream}, sums,
                shared ? heads * parts : parts, dim, weight_grad, bias_grad);
}

}  // namespace vlm::cuda
