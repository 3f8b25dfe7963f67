// Lanes with their own stacks, and the blocks they run in. A lane runs until it has to wait for
// others, so that every run takes the same path. Switching is setjmp and longjmp: swapcontext makes
// a system call each time, and a block of 256 lanes switches tens of thousands of times.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "state.h"

namespace vlm::emu {

thread_local Lane* t_lane = nullptr;
Block g_block;
Lane g_lanes[kMaxLanes];

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;

enum Outcome { kFinished = 1, kStopped, kStuck };

jmp_buf g_host;
std::recursive_mutex g_launch;  // a lane must not launch, but its findings should say so
char* g_stacks = nullptr;

char* stacks() {
  if (g_stacks == nullptr) {
    void* p = mmap(nullptr, kMaxLanes * kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    g_stacks = static_cast<char*>(p);
    for (int i = 0; i < kMaxLanes; ++i) mprotect(g_stacks + i * kStack, kGuard, PROT_NONE);
  }
  return g_stacks;
}

bool ready(const Lane& lane) { return !lane.done && lane.meet == Meet::none; }

Lane* next_ready(int after) {
  for (int i = 1; i <= g_block.lanes; ++i) {
    Lane& lane = g_lanes[(after + i) % g_block.lanes];
    if (ready(lane)) return &lane;
  }
  return nullptr;
}

[[noreturn]] void leave(Outcome outcome) {
  t_lane = nullptr;
  _longjmp(g_host, outcome);
}

void lane_main();

[[noreturn]] void resume(Lane& lane) {
  t_lane = &lane;
  if (lane.started) _longjmp(lane.context, 1);
  lane.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = g_stacks + (&lane - g_lanes) * kStack + kGuard;
  context.uc_stack.ss_size = kStack - kGuard;
  context.uc_link = nullptr;
  makecontext(&context, lane_main, 0);
  setcontext(&context);
  __builtin_unreachable();
}

[[noreturn]] void next(int after) {
  if (Lane* lane = next_ready(after)) resume(*lane);
  const bool finished =
      std::all_of(g_lanes, g_lanes + g_block.lanes, [](const Lane& lane) { return lane.done; });
  leave(finished ? kFinished : kStuck);
}

// A lane outlives its block: it waits here for the next one.
void lane_main() {
  for (;;) {
    g_block.launch.enter(g_block.launch.call);
    t_lane->done = true;
    if (_setjmp(t_lane->context) == 0) next(t_lane->thread);
  }
}

const char* name(Meet meet) {
  switch (meet) {
    case Meet::none:
      return "nothing";
    case Meet::sync_threads:
      return "__syncthreads";
    case Meet::sync_threads_count:
      return "__syncthreads_and, _or or _count";
    case Meet::sync_warp:
      return "__syncwarp";
    case Meet::shuffle:
      return "__shfl_sync";
    case Meet::vote:
      return "a vote";
    case Meet::match:
      return "__match_any_sync";
    case Meet::reduce:
      return "__reduce_sync";
    case Meet::mma_bf16:
    case Meet::mma_f16:
    case Meet::mma_tf32:
      return "mma";
    case Meet::ldmatrix:
      return "ldmatrix";
  }
  return "?";
}

// Where each lane stands when none can go on, alike neighbours together.
void report_stuck() {
  std::string text;
  const Lane* first = nullptr;
  for (int begin = 0, end; begin < g_block.lanes; begin = end) {
    const Lane& lane = g_lanes[begin];
    const auto alike = [&](const Lane& other) {
      return other.done == lane.done && other.meet == lane.meet && other.pc == lane.pc &&
             other.mask == lane.mask;
    };
    for (end = begin + 1; end < g_block.lanes && alike(g_lanes[end]);) ++end;
    text += text.empty() ? "" : "; ";
    text += end - begin == 1 ? "thread " + thread_name(begin)
                             : "threads " + thread_name(begin) + " to " + thread_name(end - 1);
    if (lane.done) {
      text += end - begin == 1 ? " has ended" : " have ended";
      continue;
    }
    if (first == nullptr) first = &lane;
    text += std::string(end - begin == 1 ? " waits in " : " wait in ") + name(lane.meet);
    if (lane.mask != 0) {
      char mask[32];
      std::snprintf(mask, sizeof(mask), " (mask 0x%08x)", lane.mask);
      text += mask;
    }
    text += " at " + place(lane.pc);
  }
  const bool barrier = first->meet == Meet::sync_threads || first->meet == Meet::sync_threads_count;
  report(barrier ? Kind::barrier : Kind::collective, first, first->pc,
         std::string(name(first->meet)) + " is not reached by all its threads: " + text);
}

Outcome run_block(const Launch& launch) {
  begin_block_memory();
  g_block.clocks.assign((g_block.lanes + kWarp - 1) / kWarp, {});
  for (WarpClocks& clocks : g_block.clocks) {
    for (int i = 0; i < kWarp; ++i) clocks.seen[i][i] = 1;
  }
  const Index n = launch.block;
  for (int i = 0; i < g_block.lanes; ++i) {
    Lane& lane = g_lanes[i];
    const unsigned t = i;
    lane.done = false;
    lane.thread = i;
    lane.index = {t % n.x, t / n.x % n.y, t / n.x / n.y};
    lane.meet = Meet::none;
    lane.groups.clear();
    lane.open.clear();
    lane.accesses = 0;
  }
  const int outcome = _setjmp(g_host);
  if (outcome == 0) next(g_block.lanes - 1);
  return static_cast<Outcome>(outcome);
}

}  // namespace

void wait_for_others() {
  Lane& lane = *t_lane;
  lane.accesses = 0;
  if (_setjmp(lane.context) == 0) next(lane.thread);
}

void stop_block() { leave(kStopped); }

const Lane* owner_of_stack(const void* p) {
  const auto* byte = static_cast<const char*>(p);
  if (g_stacks == nullptr || byte < g_stacks || byte >= g_stacks + kMaxLanes * kStack) {
    return nullptr;
  }
  return &g_lanes[(byte - g_stacks) / kStack];
}

bool on_stack(const Lane& lane, const void* p, size_t size) {
  const auto* stack = g_stacks + (&lane - g_lanes) * kStack;
  const auto* byte = static_cast<const char*>(p);
  return byte >= stack + kGuard && byte + size <= stack + kStack;
}

const char* run(const Launch& launch) {
  if (t_lane != nullptr) {
    report(Kind::collective, t_lane, __builtin_return_address(0), "a kernel launches a kernel");
    stop_block();
  }
  const std::lock_guard<std::recursive_mutex> lock(g_launch);
  if (stacks() == nullptr) return "the emulator has no memory for the stacks of its lanes";
  const Index grid = launch.grid, block = launch.block;
  g_block.launch = launch;
  g_block.lanes = static_cast<int>(block.x * block.y * block.z);
  g_block.first_number = ++g_block.number;
  Outcome outcome = kFinished;
  for (unsigned z = 0; z < grid.z && outcome == kFinished; ++z) {
    for (unsigned y = 0; y < grid.y && outcome == kFinished; ++y) {
      for (unsigned x = 0; x < grid.x && outcome == kFinished; ++x) {
        g_block.index = {x, y, z};
        outcome = run_block(launch);
        g_block.first_epoch = ++g_block.epoch;
        ++g_block.number;
      }
    }
  }
  if (outcome == kStuck) report_stuck();
  if (outcome != kFinished) {
    // what is left on their stacks is given up
    for (Lane& lane : g_lanes) lane.started = false;
  }
  return findings_text();
}

Index thread_index() { return t_lane->index; }
Index block_index() { return g_block.index; }
Index block_dim() { return g_block.launch.block; }
Index grid_dim() { return g_block.launch.grid; }

}  // namespace vlm::emu
