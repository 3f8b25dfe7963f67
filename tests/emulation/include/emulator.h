// What the shadow headers call: the emulated device, as plain host functions. A lane is one
// emulated CUDA thread. Each function that a lane calls notes its return address, which names the
// line in a finding, so the wrappers around it are always inlined.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlm::emu {

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index block_dim();
Index grid_dim();

// Barriers.
void sync_threads();
int sync_threads_count(int predicate);
void sync_warp(unsigned mask);
void fence();

// Collectives of a warp.
enum class Shuffle { index, up, down, bitwise };
enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width);
unsigned ballot(unsigned mask, bool predicate);
unsigned match_any(unsigned mask, uint64_t value);
int64_t reduce(Reduce op, unsigned mask, int64_t value);
void mma_m16n8k16(bool bf16, float* d, const uint32_t* a, const uint32_t* b);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b);
void ldmatrix(int count, bool transposed, uint32_t* r, const void* row);

// Copies that land at the wait.
void cp_async(void* shared, const void* global, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int newest);

// The old value; `size` is 4 or 8 bytes.
enum class Atomic { add, min, max, unsigned_min, unsigned_max, bit_and, bit_or, bit_xor, exchange };
uint64_t atomic(Atomic op, void* p, int size, uint64_t operand);
uint64_t atomic_cas(void* p, int size, uint64_t expected, uint64_t desired);

void* dynamic_shared();

// Runs a kernel to its end, one block after the other. nullptr, or the findings as a text.
struct Launch {
  const void* kernel;
  Index grid, block;
  size_t smem_bytes;
  void (*enter)(void* call);  // calls the kernel with the arguments of `call`
  void* call;
  size_t call_bytes;
};
const char* run(const Launch& launch);

// Global memory: what kernels and copies may touch. Uninitialised memory is filled with a pattern
// of NaNs; a byte counts as written once a kernel wrote it or the pattern is gone.
void add_memory(void* p, size_t bytes, bool initialised, const char* name);
void remove_memory(void* p);
// The findings that no launch has returned yet (host code that touched device memory), or nullptr.
const char* take_findings();

}  // namespace vlm::emu
