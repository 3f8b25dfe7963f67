// One kernel for each kind of fault that the emulator knows, beside the same kernel without it.
// Every entry launches one kernel on fp32 buffers `in` and `out` of `n` elements.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

using vlm::cuda::dynamic_shared;
using vlm::cuda::launch;
namespace ptx = vlm::ptx;

constexpr unsigned kFull = 0xffffffffu;

// Reverses 64 numbers through shared memory.
template <bool kBarrier>
__global__ void reverse(const float* in, float* out, int n) {
  __shared__ float s[64];
  s[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = s[n - 1 - threadIdx.x];
}

// The second round writes what another warp may still be reading.
template <bool kBarrier>
__global__ void write_after_read(const float* in, float* out, int n) {
  __shared__ float s[64];
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[n - 1 - threadIdx.x];
    if (kBarrier) __syncthreads();
  }
}

__global__ void write_write(const float* in, float* out, int) {
  float* s = dynamic_shared<float>();
  s[0] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[0];
}

// Neighbours of one warp: __syncwarp orders them, a shuffle does not.
template <bool kSyncWarp>
__global__ void neighbours(const float* in, float* out, int) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x] = in[threadIdx.x];
  if (kSyncWarp) {
    __syncwarp();
  } else {
    __shfl_sync(kFull, 0, 0);
  }
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// __syncwarp of one half: pairs inside it are ordered, pairs across are not.
template <int kDistance>
__global__ void half_warp(const float* in, float* out, int) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x] = in[threadIdx.x];
  __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = s[threadIdx.x ^ kDistance];
}

__global__ void unwritten_dynamic_shared(const float*, float* out, int) {
  const float* s = dynamic_shared<float>();
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void unwritten_static_shared(const float* in, float* out, int n) {
  __shared__ float s[64];
  if (n < 0) s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void unwritten_global(const float*, float* out, int) { out[threadIdx.x] += 1.f; }

__global__ void read_past_the_end(const float* in, float* out, int n) {
  out[threadIdx.x] = in[threadIdx.x + n];
}

__global__ void write_past_the_end(const float*, float* out, int n) { out[threadIdx.x + 1] = n; }

__global__ void dynamic_shared_past_the_end(const float* in, float* out, int) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0.f;
}

__global__ void static_shared_past_the_end(const float* in, float* out, int) {
  __shared__ float s[32];
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void host_pointer(const float*, float* out, const float* p) { *out = *p; }

__global__ void null_pointer(const float*, float* out, const float* p) { out[0] = p[threadIdx.x]; }

__global__ void another_stack(const float*, float* out, int) {
  __shared__ float* local;
  float mine[2] = {1.f, 2.f};
  if (threadIdx.x == 0) local = mine;
  __syncthreads();
  out[threadIdx.x] = local[threadIdx.x & 1];
  __syncthreads();
}

template <int kOffset>
__global__ void vector_load(const float* in, float* out, int) {
  const float4 v = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + kOffset);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void misaligned_store(const float*, float* out, int) {
  *reinterpret_cast<float2*>(out + 2 * threadIdx.x + 1) = {1.f, 2.f};
}

__global__ void barrier_some_skip(const float* in, float* out, int) {
  if (threadIdx.x < 33) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_in_a_branch(const float* in, float* out, int) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_some_skip(const float* in, float* out, int) {
  float x = in[threadIdx.x];
  if (threadIdx.x != 7) x += __shfl_xor_sync(kFull, x, 1);
  out[threadIdx.x] = x;
}

__global__ void shuffle_outside_its_mask(const float* in, float* out, int) {
  const float x = in[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(0xffff, x, 3);
}

__global__ void shuffle_from_outside_the_mask(const float* in, float* out, int) {
  float x = in[threadIdx.x];
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffff, x, 16);
  out[threadIdx.x] = x;
}

__global__ void two_collectives(const float* in, float* out, int) {
  float x = in[threadIdx.x];
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(kFull, x, 1);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = x;
}

__global__ void two_instructions(const float*, float* out, int) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) {
    ptx::mma<__half>(d, a, b);
  } else {
    ptx::mma<__half>(d, a, b);
  }
  out[threadIdx.x] = d[0];
}

enum Async { kGood, kNoWait, kNoBarrier, kOverwrite, kWaitsForTheWrongGroup, kShared, kGlobal };

template <Async kMode>
__global__ void copy(const float* in, float* out, int n) {
  float* s = dynamic_shared<float>();
  const int i = 4 * threadIdx.x;
  const int shared_skew = kMode == kShared, global_skew = kMode == kGlobal;
  ptx::cp_async_16(s + i + shared_skew, in + i + global_skew);
  ptx::cp_async_commit();
  ptx::cp_async_commit();  // an empty group
  if (kMode == kOverwrite) s[i] = 0.f;
  if (kMode == kWaitsForTheWrongGroup) ptx::cp_async_wait<2>();
  if (kMode == kGood || kMode == kNoBarrier) ptx::cp_async_wait<1>();
  if (kMode != kNoBarrier) __syncthreads();
  for (int k = 0; k < 4; ++k) out[i + k] = s[n - 1 - i - k];
}

__global__ void copy_out_of_bounds(const float* in, float*, int n) {
  ptx::cp_async_4(dynamic_shared<float>() + threadIdx.x, in + threadIdx.x + n);
}

__global__ void copy_past_shared(const float* in, float*, int) {
  ptx::cp_async_4(dynamic_shared<float>() + threadIdx.x + 1, in + threadIdx.x);
}

template <int kStride>
__global__ void matrix_rows(const float*, float* out, int) {
  char* s = dynamic_shared<char>();
  for (int i = threadIdx.x; i < 512; i += 32) s[i] = 0;
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix(r, s + kStride * threadIdx.x);
  out[threadIdx.x] = __uint_as_float(r[0]);
}

__global__ void matrix_race(const float*, float* out, int) {
  uint4* s = dynamic_shared<uint4>();
  s[threadIdx.x] = {0, 0, 0, 0};
  uint32_t r[4];
  ptx::ldmatrix(r, s + threadIdx.x);  // each lane reads the row that it wrote, and gets others'
  out[threadIdx.x] = __uint_as_float(r[0]);
}

__global__ void matrix_in_global_memory(const float* in, float* out, int) {
  uint32_t r[1];
  ptx::ldmatrix(r, in);
  out[threadIdx.x] = __uint_as_float(r[0]);
}

__global__ void blocks_race(const float*, float* out, int) { out[threadIdx.x] = blockIdx.x; }

// The last block to come adds what the others left; `ticket` counts them.
template <bool kTicket>
__global__ void last_block(float* partial, float* out, int* ticket) {
  __shared__ int order;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1.f;
    __threadfence();
    order = kTicket ? atomicAdd(ticket, 1) : static_cast<int>(blockIdx.x);
  }
  __syncthreads();
  if (order != static_cast<int>(gridDim.x) - 1 || threadIdx.x != 0) return;
  float sum = 0.f;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *out = sum;
}

__global__ void shared_atomics(const float*, float* out, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  __syncthreads();
  out[threadIdx.x] = count;
}

__global__ void atomic_and_plain(const float*, float* out, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x < 32) atomicAdd(&count, 1);
  if (threadIdx.x == 40) out[0] = count;
}

__global__ void endless(const float* in, float* out, int) {
  while (in[threadIdx.x] != 12345.f) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void fill(float* out, int n) {
  if (threadIdx.x < static_cast<unsigned>(n)) out[threadIdx.x] = 1.f;
}

const char* memset_then(float* out, int n, int bytes) {
  if (const char* error =
          vlm::cuda::error_text(cudaMemsetAsync(out, 0, static_cast<size_t>(bytes)))) {
    return error;
  }
  return launch(unwritten_global, {1, static_cast<unsigned>(n)}, out, out, n);
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*
#define PLAIN(name, kernel, threads, bytes)                 \
  ENTRY name(const float* in, float* out, int n) {          \
    return launch(kernel, {1, threads, bytes}, in, out, n); \
  }

PLAIN(reverse_clean, reverse<true>, 64, 0)
PLAIN(read_race, reverse<false>, 64, 0)
PLAIN(write_after_read_clean, write_after_read<true>, 64, 0)
PLAIN(write_after_read_race, write_after_read<false>, 64, 0)
PLAIN(write_race, write_write, 64, 4)
PLAIN(syncwarp_clean, neighbours<true>, 64, 256)
PLAIN(shuffle_is_no_barrier, neighbours<false>, 64, 256)
PLAIN(half_warp_clean, half_warp<1>, 32, 256)
PLAIN(half_warp_race, half_warp<16>, 32, 256)
PLAIN(unwritten_dynamic, unwritten_dynamic_shared, 64, 256)
PLAIN(unwritten_static, unwritten_static_shared, 64, 0)
PLAIN(unwritten_output, unwritten_global, 64, 0)
PLAIN(read_out_of_bounds, read_past_the_end, 64, 0)
PLAIN(write_out_of_bounds, write_past_the_end, 64, 0)
PLAIN(dynamic_out_of_bounds, dynamic_shared_past_the_end, 64, 256)
PLAIN(static_out_of_bounds, static_shared_past_the_end, 64, 0)
PLAIN(stack_of_another, another_stack, 64, 0)
PLAIN(vector_clean, vector_load<0>, 8, 0)
PLAIN(vector_misaligned, vector_load<1>, 8, 0)
PLAIN(store_misaligned, misaligned_store, 8, 0)
PLAIN(barrier_skipped, barrier_some_skip, 64, 0)
PLAIN(barrier_branch, barrier_in_a_branch, 64, 0)
PLAIN(shuffle_skipped, shuffle_some_skip, 32, 0)
PLAIN(shuffle_not_in_mask, shuffle_outside_its_mask, 32, 0)
PLAIN(shuffle_reads_outside, shuffle_from_outside_the_mask, 32, 0)
PLAIN(collectives_differ, two_collectives, 32, 0)
PLAIN(instructions_differ, two_instructions, 32, 0)
PLAIN(copy_clean, copy<kGood>, 16, 256)
PLAIN(copy_without_wait, copy<kNoWait>, 16, 256)
PLAIN(copy_without_barrier, copy<kNoBarrier>, 16, 256)
PLAIN(copy_overwritten, copy<kOverwrite>, 16, 256)
PLAIN(copy_of_a_later_group, copy<kWaitsForTheWrongGroup>, 16, 256)
PLAIN(copy_shared_misaligned, copy<kShared>, 16, 272)
PLAIN(copy_global_misaligned, copy<kGlobal>, 8, 256)
PLAIN(copy_global_bounds, copy_out_of_bounds, 64, 256)
PLAIN(copy_shared_bounds, copy_past_shared, 64, 256)
PLAIN(ldmatrix_clean, matrix_rows<16>, 32, 512)
PLAIN(ldmatrix_misaligned, matrix_rows<8>, 32, 512)
PLAIN(ldmatrix_bounds, matrix_rows<32>, 32, 512)
PLAIN(ldmatrix_race, matrix_race, 32, 512)
PLAIN(ldmatrix_global, matrix_in_global_memory, 32, 512)
PLAIN(atomics_clean, shared_atomics, 64, 0)
PLAIN(atomics_race, atomic_and_plain, 64, 0)
PLAIN(endless_loop, endless, 1, 0)
PLAIN(shared_memory_clean, write_write, 1, 100 << 10)
PLAIN(shared_memory_limit, write_write, 1, (163 << 10) + 1)
PLAIN(block_too_large, write_write, 1025, 4)

ENTRY blocks_write_the_same(const float* in, float* out, int n) {
  return launch(blocks_race, {2, 64}, in, out, n);
}

ENTRY last_block_clean(float* partial, float* out, int* ticket) {
  return launch(last_block<true>, {3, 64}, partial, out, ticket);
}

ENTRY last_block_race(float* partial, float* out, int* ticket) {
  return launch(last_block<false>, {3, 64}, partial, out, ticket);
}

ENTRY pointer_to_the_host(const float* in, float* out, int) {
  const float host = 1.f;
  return launch(host_pointer, {1, 1}, in, out, &host);
}

ENTRY pointer_to_nothing(const float* in, float* out, int) {
  return launch(null_pointer, {1, 1}, in, out, nullptr);
}

ENTRY host_reads_the_device(const float* in, float* out, int) {
  return launch(fill, {1, 64}, out, *in > 2.f ? 1 : 2);
}

ENTRY empty_grid(const float* in, float* out, int n) {
  return launch(write_write, {0, 64}, in, out, n);
}

ENTRY memset_clean(const float*, float* out, int n) { return memset_then(out, n, 4 * n); }
ENTRY memset_half(const float*, float* out, int n) { return memset_then(out, n, 2 * n); }
ENTRY memset_bounds(const float*, float* out, int n) { return memset_then(out, n, 4 * n + 1); }
