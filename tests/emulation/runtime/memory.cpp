// Which bytes a lane may touch, and in which order. Shared memory has a record for each byte: who
// wrote it and who has read it since the last barrier. Global memory records who wrote and who read
// each byte last, which finds uninitialised reads and most races, those between blocks included.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "state.h"

namespace vlm::emu {
namespace {

struct Cell {
  uint32_t write_epoch, write_clock;
  uint32_t read_epoch, read_clock;
  uint32_t read_warps;  // that have read it in read_epoch
  uint32_t read_lanes;  // of the last warp of them
  Pc write_pc, read_pc, other_pc;
  uint16_t write_thread, read_thread;
  uint16_t other_thread;  // the last reader of another warp than read_thread's
  bool atomic, in_flight;
};

struct GlobalCell {
  uint32_t write_block, read_block;  // Block::number
  uint32_t write_epoch, read_epoch;
  uint16_t write_thread, read_thread;
  bool atomic;
};

struct Range {
  char* begin;
  size_t size;
  bool initialised;
  int users;
  std::string name;
  GlobalCell* cells;  // calloc: pages nobody looks at take no memory
};

// not static: what lies past its end must not pass for a variable of the module
char* const g_dynamic = static_cast<char*>(std::aligned_alloc(1024, kDynamicSharedLimit));
Cell g_dynamic_cells[kDynamicSharedLimit];
std::unique_ptr<Cell[]> g_static_cells;  // of the module's thread-local block

std::mutex g_ranges_lock;
std::map<char*, Range> g_ranges;       // by begin
thread_local Range* t_last = nullptr;  // found for the access before
thread_local bool t_has_memory = false;

// NaN as fp32, and both halves NaN as bf16 and fp16.
constexpr unsigned char kPattern[4] = {0xe5, 0x7f, 0xad, 0xff};

bool has_pattern(const Range& range, const char* p) {
  return static_cast<unsigned char>(*p) == kPattern[(p - range.begin) % 4];
}

std::string bytes(size_t n) { return std::to_string(n) + (n == 1 ? " byte" : " bytes"); }

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
}

Range* range_at(const void* p) {
  auto* byte = const_cast<char*>(static_cast<const char*>(p));
  if (t_last != nullptr && byte >= t_last->begin && byte < t_last->begin + t_last->size) {
    return t_last;
  }
  auto it = g_ranges.upper_bound(byte);
  if (it == g_ranges.begin()) return nullptr;
  Range& range = std::prev(it)->second;
  return byte < range.begin + range.size ? t_last = &range : nullptr;
}

struct Place {
  Cell* cells = nullptr;
  const char* what = "";
};

// The records of shared memory at p, or none.
Place dynamic_at(const char* p, size_t size) {
  if (p < g_dynamic || p + size > g_dynamic + g_block.launch.smem_bytes) return {};
  return {g_dynamic_cells + (p - g_dynamic), "dynamic shared memory"};
}

Place static_at(const char* p, size_t size) {
  const Module& m = module();
  const char* block = thread_local_block();
  const size_t offset = p - block;
  if (p < block || offset >= m.tls_size) return {};
  auto it = std::upper_bound(m.variables.begin(), m.variables.end(), offset,
                             [](size_t o, const Variable& v) { return o < v.offset; });
  if (it == m.variables.begin()) return {};
  const Variable& variable = *std::prev(it);
  if (offset + size > variable.offset + variable.size) return {};
  return {g_static_cells.get() + offset, variable.name.c_str()};
}

Place shared_at(const void* p, size_t size) {
  const auto* byte = static_cast<const char*>(p);
  const Place place = dynamic_at(byte, size);
  return place.cells != nullptr ? place : static_at(byte, size);
}

// Whether what `thread` did happened before what the lane does now.
bool ordered(const Lane& lane, int thread, uint32_t epoch, uint32_t clock) {
  if (thread == lane.thread || epoch < g_block.epoch) return true;
  return thread / kWarp == lane.warp() &&
         g_block.clocks[lane.warp()].seen[lane.lane()][thread % kWarp] >= clock;
}

void note_reader(const Lane& lane, Cell& cell, Pc pc) {
  const auto& seen = g_block.clocks[lane.warp()].seen[lane.lane()];
  const uint32_t clock = seen[lane.lane()], warp = 1u << lane.warp();
  if (cell.read_epoch != g_block.epoch) {
    cell.read_warps = cell.read_lanes = 0;
    cell.read_clock = clock;
  } else if (cell.read_warps == warp && cell.read_clock < clock) {
    // readers that this one has synchronised with need no record of their own
    for (unsigned rest = cell.read_lanes; rest != 0; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      if (seen[l] >= cell.read_clock) cell.read_lanes &= ~(1u << l);
    }
    if (cell.read_lanes == 0) cell.read_clock = clock;
  } else if (!(cell.read_warps & warp)) {
    cell.read_lanes = 0;
  }
  if (cell.read_warps != 0 && cell.read_thread / kWarp != lane.warp()) {
    cell.other_thread = cell.read_thread;
    cell.other_pc = cell.read_pc;
  }
  cell.read_epoch = g_block.epoch;
  cell.read_warps |= warp;
  cell.read_lanes |= lane.bit();
  cell.read_thread = static_cast<uint16_t>(lane.thread);
  cell.read_pc = pc;
}

struct Reader {
  int thread = -1;
  Pc pc = nullptr;
};

// A read of this epoch that the lane has not synchronised with.
Reader unordered_reader(const Lane& lane, const Cell& cell) {
  if (cell.read_epoch != g_block.epoch) return {};
  if (cell.read_warps & ~(1u << lane.warp())) {
    const bool own = cell.read_thread / kWarp == lane.warp();
    return own ? Reader{cell.other_thread, cell.other_pc} : Reader{cell.read_thread, cell.read_pc};
  }
  for (unsigned rest = cell.read_lanes & ~lane.bit(); rest != 0; rest &= rest - 1) {
    const int thread = lane.warp() * kWarp + __builtin_ctz(rest);
    if (!ordered(lane, thread, cell.read_epoch, cell.read_clock)) return {thread, cell.read_pc};
  }
  return {};
}

void race(const Lane& lane, Access access, size_t size, const char* where, const char* other,
          int thread, Pc pc, Pc other_pc) {
  report(Kind::race, &lane, pc,
         std::string("race: ") + verb(access) + " of " + bytes(size) + " of " + where +
             " that thread " + thread_name(thread) + " " + other +
             " at %1, with no barrier in between",
         other_pc);
}

// True when there was something to report; one finding an access is enough.
bool touch_cell(const Lane& lane, Access access, size_t size, const char* where, Cell& cell,
                Pc pc) {
  const bool written = cell.write_epoch >= g_block.first_epoch;
  if (cell.in_flight && written) {
    report(Kind::in_flight, &lane, pc,
           std::string(verb(access)) + " of " + bytes(size) + " of " + where +
               " while the cp.async at %1 of thread " + thread_name(cell.write_thread) +
               " is on its way there: its group has not been waited for",
           cell.write_pc);
    cell.in_flight = false;
    return true;
  }
  if (access != Access::write && !written) {
    report(Kind::uninitialised, &lane, pc,
           std::string(verb(access)) + " of " + bytes(size) + " of " + where +
               " that nobody has written in this block");
    if (access == Access::read) note_reader(lane, cell, pc);
    return true;
  }
  const bool both_atomic = access == Access::atomic && cell.atomic;
  if (written && !both_atomic &&
      !ordered(lane, cell.write_thread, cell.write_epoch, cell.write_clock)) {
    race(lane, access, size, where, "wrote", cell.write_thread, pc, cell.write_pc);
    return true;
  }
  if (access == Access::read) {
    note_reader(lane, cell, pc);
    return false;
  }
  if (const Reader reader = unordered_reader(lane, cell); reader.thread >= 0) {
    race(lane, access, size, where, "read", reader.thread, pc, reader.pc);
    cell.read_warps = cell.read_lanes = 0;
    return true;
  }
  return false;
}

void write_cell(const Lane& lane, Access access, Cell& cell, Pc pc) {
  cell.write_epoch = g_block.epoch;
  cell.write_clock = g_block.clocks[lane.warp()].seen[lane.lane()][lane.lane()];
  cell.write_thread = static_cast<uint16_t>(lane.thread);
  cell.write_pc = pc;
  cell.atomic = access == Access::atomic;
  cell.in_flight = false;
}

void touch_shared(const Lane& lane, Access access, const Place& place, size_t size, Pc pc) {
  bool reported = false;
  for (size_t i = 0; i < size; ++i) {
    Cell& cell = place.cells[i];
    if (!reported) reported = touch_cell(lane, access, size, place.what, cell, pc);
    if (access != Access::read) write_cell(lane, access, cell, pc);
  }
}

// Whether another block of this launch did it, or another warp of this block since the last
// barrier.
bool unordered_global(const Lane& lane, uint32_t block, uint32_t epoch, int thread,
                      bool published) {
  if (block < g_block.first_number) return false;
  if (block != g_block.number) return !published;
  return epoch == g_block.epoch && thread / kWarp != lane.warp();
}

std::string who(uint32_t block, int thread) {
  if (block == g_block.number) return "thread " + thread_name(thread);
  return "block " + std::to_string(block - g_block.first_number) + " of this launch";
}

void touch_global(const Lane& lane, Access access, Range& range, const char* p, size_t size,
                  Pc pc) {
  GlobalCell* cells = range.cells + (p - range.begin);
  // a block that took part in an atomic and a fence may read what others published with theirs
  const bool published = g_block.fenced && g_block.atomic && access != Access::write;
  bool unwritten = false, pattern = access != Access::write && !range.initialised;
  GlobalCell writer{}, reader{};
  for (size_t i = 0; i < size; ++i) {
    GlobalCell& cell = cells[i];
    if (pattern && cell.write_block == 0) {
      unwritten = true;
      pattern = has_pattern(range, p + i);
    }
    if (!(cell.atomic && access == Access::atomic) &&
        unordered_global(lane, cell.write_block, cell.write_epoch, cell.write_thread,
                         published || cell.atomic)) {
      writer = cell;
    }
    if (access != Access::read &&
        unordered_global(lane, cell.read_block, cell.read_epoch, cell.read_thread, published)) {
      reader = cell;
    }
    if (access == Access::read) {
      cell.read_block = g_block.number;
      cell.read_epoch = g_block.epoch;
      cell.read_thread = static_cast<uint16_t>(lane.thread);
    } else {
      cell.write_block = g_block.number;
      cell.write_epoch = g_block.epoch;
      cell.write_thread = static_cast<uint16_t>(lane.thread);
      cell.atomic = access == Access::atomic;
    }
  }
  const bool uninitialised = unwritten && pattern;
  if (!uninitialised && writer.write_block == 0 && reader.read_block == 0) return;
  const std::string what =
      std::string(verb(access)) + " of " + bytes(size) + " of global memory (" + describe(p) + ")";
  if (uninitialised) {
    report(Kind::uninitialised, &lane, pc, what + " that nobody has written");
  }
  if (writer.write_block != 0) {
    report(Kind::race, &lane, pc,
           "race: " + what + " that " + who(writer.write_block, writer.write_thread) + " wrote");
  }
  if (reader.read_block != 0) {
    report(Kind::race, &lane, pc,
           "race: " + what + " that " + who(reader.read_block, reader.read_thread) + " read");
  }
}

bool in_module_data(const char* p, size_t size) {
  const auto& data = module().data;
  return std::any_of(data.begin(), data.end(), [=](const auto& segment) {
    return p >= segment.first && p + size <= segment.second;
  });
}

bool in_call(const char* p, size_t size) {
  const auto* call = static_cast<const char*>(g_block.launch.call);
  return p >= call && p + size <= call + g_block.launch.call_bytes;
}

void touch_host(Access access, const void* p, size_t size, Pc pc) {
  if (!t_has_memory) return;
  const std::lock_guard<std::mutex> lock(g_ranges_lock);
  if (range_at(p) == nullptr) return;
  report(Kind::host_access, nullptr, pc,
         std::string("host code: ") + verb(access) + " of " + bytes(size) + " of device memory (" +
             describe(p) + ")");
}

}  // namespace

void touch_as(const Lane& lane, Access access, const void* p, size_t size, Pc pc) {
  const auto* byte = static_cast<const char*>(p);
  if (const Place place = dynamic_at(byte, size); place.cells != nullptr) {
    return touch_shared(lane, access, place, size, pc);
  }
  Range* range = range_at(p);
  if (range != nullptr && byte + size <= range->begin + range->size) {
    return touch_global(lane, access, *range, byte, size, pc);
  }
  if (const Place place = static_at(byte, size); place.cells != nullptr) {
    return touch_shared(lane, access, place, size, pc);
  }
  if (access == Access::read && in_call(byte, size)) return;
  if (in_module_data(byte, size)) return;
  report(Kind::out_of_bounds, &lane, pc,
         std::string("out of bounds: ") + verb(access) + " of " + bytes(size) + " of what is " +
             describe(p));
  stop_block();
}

void touch(Access access, const void* p, size_t size, Pc pc) {
  if (t_lane == nullptr) return touch_host(access, p, size, pc);
  Lane& lane = *t_lane;
  if (on_stack(lane, p, size)) return;
  constexpr uint32_t kEndless = 1u << 24;
  if (++lane.accesses == kEndless) {
    report(Kind::endless, &lane, pc, "2^24 accesses without a barrier or an end: an endless loop?");
    stop_block();
  }
  touch_as(lane, access, p, size, pc);
}

bool is_shared(const void* p, size_t size) { return shared_at(p, size).cells != nullptr; }

bool is_global(const void* p, size_t size) {
  const Range* range = range_at(p);
  return range != nullptr && static_cast<const char*>(p) + size <= range->begin + range->size;
}

std::string describe(const void* p) {
  const auto* byte = static_cast<const char*>(p);
  if (const Lane* owner = owner_of_stack(p)) {
    return "the stack of thread " + thread_name(owner->thread) + ", which only that thread has";
  }
  if (byte >= g_dynamic && byte < g_dynamic + kDynamicSharedLimit) {
    return "at byte " + std::to_string(byte - g_dynamic) + " of the " +
           bytes(g_block.launch.smem_bytes) + " of dynamic shared memory";
  }
  const Module& m = module();
  const char* block = thread_local_block();
  if (byte >= block && byte < block + m.tls_size) {
    for (const Variable& v : m.variables) {
      const char* begin = block + v.offset;
      if (byte >= begin && byte < begin + v.size + 64) {
        return "at byte " + std::to_string(byte - begin) + " of the " + bytes(v.size) + " of " +
               v.name;
      }
    }
    return "between the variables of shared memory";
  }
  const Range* near = nullptr;
  ptrdiff_t nearest = 4096;
  for (const auto& [begin, range] : g_ranges) {
    const char* end = range.begin + range.size;
    const ptrdiff_t distance = byte < begin ? begin - byte : byte < end ? -1 : byte - end;
    if (distance < nearest) nearest = distance, near = &range;
  }
  if (near == nullptr) return "no memory of the device";
  return "at byte " + std::to_string(byte - near->begin) + " of the " + bytes(near->size) + " of " +
         near->name;
}

void begin_copy(const Lane& lane, const Copy& copy) {
  const auto fault = [&](Kind kind, const std::string& text) {
    report(kind, &lane, copy.pc, text);
    stop_block();
  };
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % copy.size != 0;
  };
  const std::string of = "a cp.async of " + bytes(copy.size);
  if (misaligned(copy.shared))
    fault(Kind::misaligned, "misaligned: " + of + " to what is " + describe(copy.shared));
  if (misaligned(copy.global))
    fault(Kind::misaligned, "misaligned: " + of + " from what is " + describe(copy.global));
  const Place place = shared_at(copy.shared, copy.size);
  if (place.cells == nullptr) {
    fault(Kind::out_of_bounds, "out of bounds: " + of + " to what is " + describe(copy.shared));
  }
  if (copy.bytes > 0) {
    if (!is_global(copy.global, copy.bytes)) {
      fault(Kind::out_of_bounds, "out of bounds: " + of + " from what is " + describe(copy.global));
    }
    touch_as(lane, Access::read, copy.global, copy.bytes, copy.pc);
  }
  touch_shared(lane, Access::write, place, copy.size, copy.pc);
  for (int i = 0; i < copy.size; ++i) place.cells[i].in_flight = true;
}

void land_copy(const Lane& lane, const Copy& copy) {
  const Place place = shared_at(copy.shared, copy.size);
  for (int i = 0; i < copy.size; ++i) write_cell(lane, Access::write, place.cells[i], copy.pc);
  std::memcpy(copy.shared, copy.global, copy.bytes);
  std::memset(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
}

void begin_block_memory() {
  if (g_static_cells == nullptr) g_static_cells = std::make_unique<Cell[]>(module().tls_size);
  std::memset(g_dynamic, 0xff, g_block.launch.smem_bytes);
  g_block.fenced = g_block.atomic = false;
}

void* dynamic_shared() { return g_dynamic; }

void mark_written(void* p, size_t size) {
  Range* range = range_at(p);
  if (range == nullptr) return;
  GlobalCell* cells = range->cells + (static_cast<char*>(p) - range->begin);
  for (size_t i = 0; i < size; ++i) {
    cells[i] = {};
    cells[i].write_block = 1;  // before any launch
  }
}

void add_memory(void* p, size_t size, bool initialised, const char* name) {
  if (size == 0) return;
  const std::lock_guard<std::mutex> lock(g_ranges_lock);
  t_has_memory = true;
  auto* begin = static_cast<char*>(p);
  if (const auto it = g_ranges.find(begin); it != g_ranges.end()) {
    ++it->second.users;
    return;
  }
  auto* cells = static_cast<GlobalCell*>(std::calloc(size, sizeof(GlobalCell)));
  if (cells == nullptr) std::abort();
  g_ranges[begin] = {begin, size, initialised, 1, name, cells};
  if (initialised) return;
  for (size_t i = 0; i < size; ++i) begin[i] = static_cast<char>(kPattern[i % 4]);
}

void remove_memory(void* p) {
  const std::lock_guard<std::mutex> lock(g_ranges_lock);
  const auto it = g_ranges.find(static_cast<char*>(p));
  if (it == g_ranges.end() || --it->second.users > 0) return;
  std::free(it->second.cells);
  t_last = nullptr;
  g_ranges.erase(it);
  t_has_memory = !g_ranges.empty();
}

}  // namespace vlm::emu

// What -fsanitize=thread puts before each access. The library that belongs to it is not linked.
#define VLM_HOOK(name, access, bytes)                              \
  void __tsan_##name(void* p) {                                    \
    const vlm::emu::Pc pc = __builtin_return_address(0);           \
    vlm::emu::hook(vlm::emu::Access::access, p, bytes, true, pc);  \
  }                                                                \
  void __tsan_unaligned_##name(void* p) {                          \
    const vlm::emu::Pc pc = __builtin_return_address(0);           \
    vlm::emu::hook(vlm::emu::Access::access, p, bytes, false, pc); \
  }

namespace vlm::emu {
namespace {

[[noreturn]] void misaligned(const void* p, Pc pc) {
  report(Kind::misaligned, t_lane, pc,
         "misaligned: the address, " + describe(p) + ", is no multiple of the type's alignment");
  stop_block();
}

void hook(Access access, const void* p, size_t size, bool aligned, Pc pc) {
  if (aligned && reinterpret_cast<uintptr_t>(p) % size != 0 && t_lane != nullptr) misaligned(p, pc);
  touch(access, p, size, pc);
}

}  // namespace
}  // namespace vlm::emu

extern "C" {
VLM_HOOK(read1, read, 1)
VLM_HOOK(read2, read, 2)
VLM_HOOK(read4, read, 4)
VLM_HOOK(read8, read, 8)
VLM_HOOK(read16, read, 16)
VLM_HOOK(write1, write, 1)
VLM_HOOK(write2, write, 2)
VLM_HOOK(write4, write, 4)
VLM_HOOK(write8, write, 8)
VLM_HOOK(write16, write, 16)

void __tsan_read_range(void* p, size_t size) {
  vlm::emu::hook(vlm::emu::Access::read, p, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  vlm::emu::hook(vlm::emu::Access::write, p, size, false, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// What -fsanitize=alignment calls: an access by way of a type that is aligned more strictly than
// the address. It sees what the hooks above cannot, such as float2 members stored one by one.
void __ubsan_handle_type_mismatch_v1(void*, void* p) {
  if (vlm::emu::t_lane != nullptr) vlm::emu::misaligned(p, __builtin_return_address(0));
}

// Guards of function-local statics in host code.
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}
