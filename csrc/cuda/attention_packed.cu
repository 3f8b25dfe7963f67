// Tiles of packed rows, found on the device: the host knows how many there may be, not where the
// segments lie.
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

constexpr int kThreads = 256;

// Queries or keys.
struct Side {
  const int32_t* offsets;  // (segments + 1,), of any value
  int rows;
  PackedTile* tiles;
  int tile_count;

  // Where a piece ends: the rows before the first segment, each segment, the rows after the last.
  __device__ int end_of(int piece, int segments) const {
    return piece > segments ? rows : max(0, min(rows, offsets[piece]));
  }
};

// op of the x of this thread and of all before it. `totals` has an entry for each warp.
template <class Op>
__device__ int scan(int x, const Op& op, int* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x = op(before, x);
  }
  if (lane == 31) totals[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x = op(totals[w], x);
  __syncthreads();
  return x;
}

// A CTA for each side. Entry i + 1 of the arrays is of piece base + i, entry 0 of what came before.
// limits: registers 40, shared 3200, spills 0
__global__ void __launch_bounds__(kThreads)
    packed_tiles_kernel(Side queries, Side keys, int segments) {
  __shared__ int own_end[kThreads + 1], other_end[kThreads + 1], tiles_end[kThreads + 1];
  __shared__ int totals[kThreads / 32];
  const bool of_keys = blockIdx.x == 1;
  const Side own = of_keys ? keys : queries, other = of_keys ? queries : keys;
  const auto larger = [](int a, int b) { return max(a, b); };
  const auto sum = [](int a, int b) { return a + b; };
  const int thread = threadIdx.x;
  if (thread == 0) own_end[0] = other_end[0] = tiles_end[0] = 0;
  for (int base = 0; base < segments + 2; base += kThreads) {
    const int own_scan = scan(own.end_of(base + thread, segments), larger, totals);
    const int other_scan = scan(other.end_of(base + thread, segments), larger, totals);
    own_end[thread + 1] = max(own_end[0], own_scan);
    other_end[thread + 1] = max(other_end[0], other_scan);
    __syncthreads();
    const int length = own_end[thread + 1] - own_end[thread];
    const int last = scan((length + kTileRows - 1) / kTileRows, sum, totals);
    tiles_end[thread + 1] = tiles_end[0] + last;
    __syncthreads();
    for (int tile = tiles_end[0] + thread; tile < tiles_end[kThreads]; tile += kThreads) {
      int i = 0, after = kThreads;  // the piece with tiles_end[i] <= tile < tiles_end[i + 1]
      while (after - i > 1) {
        const int middle = (i + after) / 2;
        (tiles_end[middle] <= tile ? i : after) = middle;
      }
      const int piece = base + i, first = own_end[i] + (tile - tiles_end[i]) * kTileRows;
      const bool outside = piece == 0 || piece > segments;
      const int difference = other_end[i + 1] - own_end[i + 1];
      own.tiles[tile] = {first, min(kTileRows, own_end[i + 1] - first), outside ? 0 : other_end[i],
                         outside ? 0 : other_end[i + 1], of_keys ? -difference : difference};
    }
    __syncthreads();
    if (thread == 0) {
      own_end[0] = own_end[kThreads];
      other_end[0] = other_end[kThreads];
      tiles_end[0] = tiles_end[kThreads];
    }
    __syncthreads();
  }
  for (int tile = tiles_end[0] + thread; tile < own.tile_count; tile += kThreads) {
    own.tiles[tile] = {0, 0, 0, 0, 0};
  }
}

}  // namespace

const char* find_packed_tiles(const AttentionCall& call, PackedTile* query_tiles,
                              PackedTile* key_tiles) {
  const auto side = [&](const int32_t* offsets, int64_t rows, PackedTile* tiles) -> Side {
    return {offsets, static_cast<int>(rows), tiles, packed_tiles(rows, call.segments)};
  };
  return launch(
      packed_tiles_kernel,
      {dim3(key_tiles ? 2 : 1), dim3(kThreads), 0, static_cast<cudaStream_t>(call.stream)},
      side(call.query_offsets, call.queries, query_tiles),
      side(call.key_offsets, call.keys, key_tiles), static_cast<int>(call.segments));
}

}  // namespace vlm::cuda
