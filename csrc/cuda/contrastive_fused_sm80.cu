#include "cuda/contrastive_fused.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

struct FusedTraits {
  static constexpr int kRows = 128, kCols = 128, kDepth = 32;  // of a CTA's product, of a stage
  static constexpr int kStages = 4;
  static constexpr int kThreads = TileTraits::kThreads;
  static constexpr int kWarpRows = 64, kWarpCols = 32;  // 2 x 4 warps
  static constexpr int kChunk = 8;                      // elements that one cp.async copies
  static constexpr int kRowChunks = kDepth / kChunk;
  static constexpr int kStageElements = (kRows + kCols) * kDepth;
  static constexpr int kSLd = kCols + 8;  // floats; keeps the accumulators' stores off each other
  static constexpr size_t kSharedBytes = kStages * kStageElements * 2 > kRows * kSLd * 4
                                             ? kStages * kStageElements * 2
                                             : kRows * kSLd * 4;
};
using F = FusedTraits;
static_assert(F::kCols == TileTraits::kCols && F::kRows % TileTraits::kRows == 0);

// Where chunk c of row r lies in a stage: rows of 64 bytes, their four chunks permuted so that the
// 8 rows of an ldmatrix meet all banks.
__device__ __forceinline__ int swizzled(int r, int c) {
  return r * F::kDepth + (c ^ (r / 2 % F::kRowChunks)) * F::kChunk;
}

// One operand's rows [first, first + 128) and what a thread copies of them: a chunk of row r and of
// row r + 64. Everything that does not change over the stages is here, in few registers.
template <class T>
struct Lines {
  static constexpr int kSecond = F::kThreads / F::kRowChunks;  // rows from one copy to the next
  static_assert(F::kRows == 2 * kSecond && kSecond % (2 * F::kRowChunks) == 0);
  const T* from;
  int to;      // elements into the stage
  int column;  // of the chunk
  int rows;    // copies with a row inside of x

  __device__ __forceinline__ Lines(const T* x, int64_t stride, int64_t count, int64_t first) {
    const int r = threadIdx.x / F::kRowChunks, c = threadIdx.x % F::kRowChunks;
    rows = (first + r < count) + (first + r + kSecond < count);
    from = rows > 0 ? x + (first + r) * stride : x;
    column = c * F::kChunk;
    to = swizzled(r, c);
  }

  // Columns [k, k + kDepth), zeros outside of x.
  __device__ __forceinline__ void copy(T* stage, int64_t stride, int d, int k) const {
    const int left = d - k - column;
    const int bytes = left >= F::kChunk ? 16 : left > 0 ? 2 * left : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = i < rows && bytes > 0;
      ptx::cp_async_16(stage + to + i * kSecond * F::kDepth,
                       inside ? from + i * kSecond * stride + k + column : from,
                       inside ? bytes : 0);
    }
  }
};

template <class T>
__device__ __forceinline__ void multiply_stage(const T* image, const T* text, int warp_row,
                                               int warp_col, float (&acc)[4][4][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < F::kDepth / 16; ++k) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // 16 columns of S: two B fragments
      const int row = warp_col + 16 * j + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix<4>(b[j], text + swizzled(row, 2 * k + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      ptx::ldmatrix<4>(a, image + swizzled(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t fragment[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        ptx::mma<T>(acc[i][j], a, fragment);
      }
    }
  }
}

// limits: registers 128, spills 0
template <class T, class Epilogue>
__global__ void __launch_bounds__(F::kThreads, 2)
    fused_kernel(FusedOperands x, Block block, Epilogue epilogue) {
  T* const stages = dynamic_shared<T>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * F::kRows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * F::kCols;
  const Lines<T> image(static_cast<const T*>(x.image), x.image_stride, block.rows, first_row);
  const Lines<T> text(static_cast<const T*>(x.text), x.text_stride, block.cols, first_col);
  const int d = static_cast<int>(x.d), steps = (d + F::kDepth - 1) / F::kDepth;
  const auto load = [&](int step) {
    if (step < steps) {
      T* const to = stages + step % F::kStages * F::kStageElements;
      image.copy(to, x.image_stride, d, step * F::kDepth);
      text.copy(to + F::kRows * F::kDepth, x.text_stride, d, step * F::kDepth);
    }
    ptx::cp_async_commit();  // empty groups keep the count
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 4 * F::kWarpRows, warp_col = warp % 4 * F::kWarpCols;
  float acc[4][4][4] = {};
#pragma unroll
  for (int s = 0; s < F::kStages - 1; ++s) load(s);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<F::kStages - 2>();
    __syncthreads();  // the stage has landed, and the one before it is free
    load(step + F::kStages - 1);
    const T* const from = stages + step % F::kStages * F::kStageElements;
    multiply_stage(from, from + F::kRows * F::kDepth, warp_row, warp_col, acc);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  float* const s = dynamic_shared<float>();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = warp_col + 8 * j + lane % 4 * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * i + lane / 4 + 8 * h;
        *reinterpret_cast<float2*>(s + row * F::kSLd + col) =
            make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  __shared__ TileShared shared;
#pragma unroll 1
  for (int half = 0; half < F::kRows / TileTraits::kRows; ++half) {
    const int64_t row = first_row + half * TileTraits::kRows;
    if (row >= block.rows) break;
    const Tile tile =
        load_tile(s + half * TileTraits::kRows * F::kSLd, F::kSLd, block, row, first_col);
    epilogue(tile, block, row / TileTraits::kRows, blockIdx.x, shared);
  }
}

unsigned tiles(int64_t length, int64_t tile) {
  return static_cast<unsigned>((length + tile - 1) / tile);
}

}  // namespace

template <class T, class Epilogue>
const char* launch_fused(const FusedOperands& operands, const Block& block,
                         const Epilogue& epilogue, cudaStream_t stream) {
  const dim3 grid(tiles(block.cols, F::kCols), tiles(block.rows, F::kRows));
  return launch(fused_kernel<T, Epilogue>, {grid, dim3(F::kThreads), F::kSharedBytes, stream},
                operands, block, epilogue);
}

#define VLM_FUSED(T, ...)                                                               \
  template const char* launch_fused<T, __VA_ARGS__>(const FusedOperands&, const Block&, \
                                                    const __VA_ARGS__&, cudaStream_t);
#define VLM_FUSED_ALL(T)                  \
  VLM_FUSED(T, StatsEpilogue<false>)      \
  VLM_FUSED(T, StatsEpilogue<true>)       \
  VLM_FUSED(T, ClipEpilogue<T>)           \
  VLM_FUSED(T, SigmoidEpilogue<T, false>) \
  VLM_FUSED(T, SigmoidEpilogue<T, true>)
VLM_FUSED_ALL(__nv_bfloat16)
VLM_FUSED_ALL(__half)
#undef VLM_FUSED_ALL
#undef VLM_FUSED

}  // namespace vlm::cuda
