// The emulator's own state. One launch runs at a time, on the thread that asked for it.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace vlm::emu {

constexpr int kWarp = 32;
constexpr int kMaxLanes = 1024;
constexpr size_t kDynamicSharedLimit = 163 << 10;  // sm_80, the smallest that the kernels run on
constexpr size_t kDynamicSharedDefault = 48 << 10;

using Pc = const void*;  // a return address in a kernel

enum class Meet : uint8_t {
  none,
  sync_threads,
  sync_threads_count,
  sync_warp,
  shuffle,
  vote,
  match,
  reduce,
  mma_bf16,
  mma_f16,
  mma_tf32,
  ldmatrix,
};

struct Copy {
  char* shared;
  const char* global;
  int size, bytes;
  Pc pc;
};

struct Lane {
  jmp_buf context;
  bool started = false;  // its stack holds a context to go on with
  bool done = false;
  int thread = 0;  // in the block
  Index index{};
  // What it waits for.
  Meet meet = Meet::none;
  unsigned mask = 0;
  Pc pc = nullptr;
  void* operand = nullptr;
  // cp.async: committed groups, oldest first, and the open one.
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  uint32_t accesses = 0;  // since it last waited

  int warp() const { return thread / kWarp; }
  int lane() const { return thread % kWarp; }
  unsigned bit() const { return 1u << lane(); }
};

// What each lane of a warp knows of the others: the last __syncwarp of theirs that it has seen.
struct WarpClocks {
  uint32_t seen[kWarp][kWarp];
};

struct Block {
  Launch launch{};
  Index index{};
  int lanes = 0;
  uint32_t epoch = 1;        // counts __syncthreads of all blocks of all launches
  uint32_t first_epoch = 1;  // of this block
  uint32_t number = 1;       // counts blocks of all launches
  uint32_t first_number = 1;
  bool fenced = false;  // has used __threadfence and an atomic: reads what other blocks published
  bool atomic = false;
  std::vector<WarpClocks> clocks;
};

extern thread_local Lane* t_lane;  // null on the host
extern Block g_block;
extern Lane g_lanes[kMaxLanes];

// lanes.cpp
void wait_for_others();          // hands over to the next lane that can go on
[[noreturn]] void stop_block();  // after a finding that the lane cannot go on from
bool on_stack(const Lane& lane, const void* p, size_t size);
const Lane* owner_of_stack(const void* p);

// memory.cpp
enum class Access : uint8_t { read, write, atomic };
void touch(Access access, const void* p, size_t size, Pc pc);
// By one lane on behalf of a collective or a copy.
void touch_as(const Lane& lane, Access access, const void* p, size_t size, Pc pc);
void begin_copy(const Lane& lane, const Copy& copy);
void land_copy(const Lane& lane, const Copy& copy);
void begin_block_memory();
bool is_shared(const void* p, size_t size);
bool is_global(const void* p, size_t size);
void mark_written(void* p, size_t size);
std::string describe(const void* p);  // "at byte 4 of the 256 bytes of x"

// report.cpp
enum class Kind : uint8_t {
  uninitialised,
  out_of_bounds,
  misaligned,
  race,
  in_flight,
  barrier,
  collective,
  host_access,
  endless,
};
// One finding: `text` may hold %1 for the place of `other`.
void report(Kind kind, const Lane* lane, Pc pc, const std::string& text, Pc other = nullptr);
std::string place(Pc pc);          // file:line
std::string function_name(Pc pc);  // of a function's own address
std::string thread_name(int thread);
const char* findings_text();  // null if there are none; clears them
bool same_line(Pc a, Pc b);

struct Variable {
  size_t offset, size;  // in the module's thread-local block
  std::string name;
};
struct Module {
  const char* base = nullptr;
  std::string file;
  const char* tls = nullptr;  // of the thread that asked first
  size_t tls_size = 0;
  ptrdiff_t tls_lane = 0;                                 // offset of t_lane
  std::vector<Variable> variables;                        // static __shared__ among them, by offset
  std::vector<std::pair<const char*, const char*>> data;  // constants and __device__ variables
};
const Module& module();
const char* thread_local_block();  // of this thread, module().tls_size bytes

}  // namespace vlm::emu
