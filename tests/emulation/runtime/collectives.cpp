// Meeting points: a lane leaves its operands and waits; the last one to come computes for all what
// the hardware would. Fragment layouts are the tables of the PTX ISA.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "emulator_float.h"
#include "state.h"

#define VLM_CALLER __builtin_return_address(0)

namespace vlm::emu {
namespace {

constexpr unsigned kFull = 0xffffffffu;

Lane* warp_of(const Lane& lane) { return g_lanes + lane.warp() * kWarp; }

[[noreturn]] void fault(Kind kind, Pc pc, const std::string& text) {
  report(kind, t_lane, pc, text);
  stop_block();
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// All lanes of the mask, then combine(lanes of the warp). `aligned`: all at one instruction.
template <class Combine>
void meet_warp(Meet meet, unsigned mask, void* operand, Pc pc, bool aligned, Combine combine) {
  Lane& self = *t_lane;
  if ((mask & self.bit()) == 0) {
    fault(Kind::collective, pc, "the mask " + hex(mask) + " leaves out the thread that gives it");
  }
  self.meet = meet;
  self.mask = mask;
  self.pc = pc;
  self.operand = operand;
  Lane* const lanes = warp_of(self);
  const int count = std::min(kWarp, g_block.lanes - self.warp() * kWarp);
  bool complete = count == kWarp || mask >> count == 0;
  for (int i = count - 1; i >= 0 && complete; --i) {
    if ((mask >> i & 1) == 0) continue;
    complete = !lanes[i].done && lanes[i].meet == meet && lanes[i].mask == mask;
  }
  if (!complete) return wait_for_others();
  if (aligned) {
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i].pc == pc || same_line(lanes[i].pc, pc)) continue;
      report(Kind::collective, &self, pc,
             "the warp meets at two instructions, the other one at %1; it must be one",
             lanes[i].pc);
      break;
    }
  }
  combine(lanes);
  for (int i = 0; i < count; ++i) {
    if (mask >> i & 1) lanes[i].meet = Meet::none, lanes[i].mask = 0;
  }
}

template <class Combine>
void meet_block(Meet meet, void* operand, Pc pc, Combine combine) {
  Lane& self = *t_lane;
  self.meet = meet;
  self.pc = pc;
  self.operand = operand;
  for (int i = g_block.lanes - 1; i >= 0; --i) {
    if (g_lanes[i].done || g_lanes[i].meet != meet) return wait_for_others();
  }
  for (int i = 0; i < g_block.lanes; ++i) {
    if (g_lanes[i].pc == pc || same_line(g_lanes[i].pc, pc)) continue;
    report(Kind::barrier, &self, pc,
           "the block meets at two barriers, the other one at %1; it must be one", g_lanes[i].pc);
    break;
  }
  combine();
  ++g_block.epoch;
  for (int i = 0; i < g_block.lanes; ++i) g_lanes[i].meet = Meet::none;
}

template <class T>
T& operand(const Lane& lane) {
  return *static_cast<T*>(lane.operand);
}

void join_clocks(const Lane* lanes, unsigned mask) {
  auto& seen = g_block.clocks[lanes->warp()].seen;
  uint32_t joined[kWarp] = {};
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    for (int j = 0; j < kWarp; ++j) joined[j] = std::max(joined[j], seen[i][j]);
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    std::copy(joined, joined + kWarp, seen[i]);
    ++seen[i][i];
  }
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

uint16_t part(uint32_t r, int i) { return static_cast<uint16_t>(r >> 16 * i); }

// D += A B with exact products, added one after the other in fp32.
template <int K>
void multiply(Lane* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int l = 0; l < kWarp; ++l) {
    float* d = operand<MmaOperand>(lanes[l]).d;
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      for (int k = 0; k < K; ++k) d[i] += a[row][k] * b[k][column];
    }
  }
}

template <float (*to_float)(uint16_t)>
void multiply_16_bit(Lane* lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const MmaOperand& o = operand<MmaOperand>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = to_float(part(o.a[i], e));
      }
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + e][g] = to_float(part(o.b[i], e));
    }
  }
  multiply(lanes, a, b);
}

// The hardware reads the upper 19 bits of a tf32 register.
float tf32_to_float(uint32_t r) { return std::bit_cast<float>(r & 0xffffe000u); }

void multiply_tf32(Lane* lanes) {
  float a[16][8], b[8][8];
  for (int l = 0; l < kWarp; ++l) {
    const MmaOperand& o = operand<MmaOperand>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32_to_float(o.a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = tf32_to_float(o.b[i]);
  }
  multiply(lanes, a, b);
}

struct MatrixOperand {
  const char* row;
  uint32_t* r;
};

// Each lane is taken to read the bytes that it receives.
void load_matrices(Lane* lanes, int count, bool transposed, Pc pc) {
  for (int l = 0; l < 8 * count; ++l) {
    const char* row = operand<MatrixOperand>(lanes[l]).row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      report(Kind::misaligned, &lanes[l], pc,
             "misaligned: an ldmatrix row is no multiple of 16 bytes");
      stop_block();
    }
    if (!is_shared(row, 16)) {
      report(Kind::out_of_bounds, &lanes[l], pc,
             "out of bounds: an ldmatrix row of 16 bytes is " + describe(row));
      stop_block();
    }
  }
  for (int i = 0; i < count; ++i) {
    for (int l = 0; l < kWarp; ++l) {
      uint16_t elements[2];
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? 2 * (l % 4) + e : l / 4;
        const int column = transposed ? l / 4 : 2 * (l % 4) + e;
        const char* p = operand<MatrixOperand>(lanes[8 * i + row]).row + 2 * column;
        touch_as(lanes[l], Access::read, p, 2, pc);
        std::memcpy(&elements[e], p, 2);
      }
      operand<MatrixOperand>(lanes[l]).r[i] = elements[0] | static_cast<uint32_t>(elements[1])
                                                                << 16;
    }
  }
}

struct ShuffleOperand {
  uint64_t value;
  unsigned argument, width;
  Shuffle kind;
};

int shuffle_source(const ShuffleOperand& o, int lane) {
  const int width = static_cast<int>(o.width), first = lane / width * width;
  const int argument = static_cast<int>(o.argument % kWarp);
  int source = lane;
  switch (o.kind) {
    case Shuffle::index:
      return first + (argument & (width - 1));
    case Shuffle::up:
      source = lane - argument;
      return source < first ? lane : source;
    case Shuffle::down:
      source = lane + argument;
      return source >= first + width ? lane : source;
    case Shuffle::bitwise:
      source = lane ^ argument;  // into a later segment it reads itself
      return source >= first + width ? lane : source;
  }
  return lane;
}

int64_t reduced(Reduce op, int64_t a, int64_t b) {
  switch (op) {
    case Reduce::add:
      return a + b;
    case Reduce::min:
      return std::min(a, b);
    case Reduce::max:
      return std::max(a, b);
    case Reduce::bit_and:
      return a & b;
    case Reduce::bit_or:
      return a | b;
    case Reduce::bit_xor:
      return a ^ b;
  }
  return 0;
}

}  // namespace

void sync_threads() {
  meet_block(Meet::sync_threads, nullptr, VLM_CALLER, [] {});
}

int sync_threads_count(int predicate) {
  meet_block(Meet::sync_threads_count, &predicate, VLM_CALLER, [] {
    int count = 0;
    for (int i = 0; i < g_block.lanes; ++i) count += operand<int>(g_lanes[i]) != 0;
    for (int i = 0; i < g_block.lanes; ++i) operand<int>(g_lanes[i]) = count;
  });
  return predicate;
}

void sync_warp(unsigned mask) {
  meet_warp(Meet::sync_warp, mask, nullptr, VLM_CALLER, false,
            [mask](const Lane* lanes) { join_clocks(lanes, mask); });
}

void fence() { g_block.fenced = true; }

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width) {
  const Pc pc = VLM_CALLER;
  if (!std::has_single_bit(width) || width > kWarp) {
    fault(Kind::collective, pc,
          "the width of a shuffle is " + std::to_string(width) + ", not a power of two up to 32");
  }
  ShuffleOperand self{value, argument, width, kind};
  meet_warp(Meet::shuffle, mask, &self, pc, false, [mask, pc](const Lane* lanes) {
    uint64_t results[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const int source = shuffle_source(operand<ShuffleOperand>(lanes[i]), i);
      if ((mask >> source & 1) == 0) {
        report(Kind::collective, &lanes[i], pc,
               "a shuffle reads lane " + std::to_string(source) + ", which the mask " + hex(mask) +
                   " leaves out");
        results[i] = 0;
        continue;
      }
      results[i] = operand<ShuffleOperand>(lanes[source]).value;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) operand<ShuffleOperand>(lanes[i]).value = results[i];
    }
  });
  return self.value;
}

unsigned ballot(unsigned mask, bool predicate) {
  unsigned self = predicate;
  meet_warp(Meet::vote, mask, &self, VLM_CALLER, false, [mask](const Lane* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) votes |= operand<unsigned>(lanes[i]) << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) operand<unsigned>(lanes[i]) = votes;
    }
  });
  return self;
}

unsigned match_any(unsigned mask, uint64_t value) {
  struct Match {
    uint64_t value;
    unsigned alike;
  } self{value, 0};
  meet_warp(Meet::match, mask, &self, VLM_CALLER, false, [mask](const Lane* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      for (int j = 0; j < kWarp; ++j) {
        const bool alike =
            (mask >> j & 1) && operand<Match>(lanes[i]).value == operand<Match>(lanes[j]).value;
        operand<Match>(lanes[i]).alike |= static_cast<unsigned>(alike) << j;
      }
    }
  });
  return self.alike;
}

int64_t reduce(Reduce op, unsigned mask, int64_t value) {
  meet_warp(Meet::reduce, mask, &value, VLM_CALLER, false, [op, mask](const Lane* lanes) {
    int64_t result = 0;
    bool first = true;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const int64_t x = operand<int64_t>(lanes[i]);
      result = first ? x : reduced(op, result, x);
      first = false;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) operand<int64_t>(lanes[i]) = result;
    }
  });
  return value;
}

void mma_m16n8k16(bool bf16, float* d, const uint32_t* a, const uint32_t* b) {
  MmaOperand self{d, a, b};
  meet_warp(bf16 ? Meet::mma_bf16 : Meet::mma_f16, kFull, &self, VLM_CALLER, true,
            bf16 ? multiply_16_bit<bf16_to_float> : multiply_16_bit<half_to_float>);
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  MmaOperand self{d, a, b};
  meet_warp(Meet::mma_tf32, kFull, &self, VLM_CALLER, true, multiply_tf32);
}

void ldmatrix(int count, bool transposed, uint32_t* r, const void* row) {
  MatrixOperand self{static_cast<const char*>(row), r};
  const Pc pc = VLM_CALLER;
  meet_warp(Meet::ldmatrix, kFull, &self, pc, true,
            [=](Lane* lanes) { load_matrices(lanes, count, transposed, pc); });
}

void cp_async(void* shared, const void* global, int size, int bytes) {
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), size, bytes,
                  VLM_CALLER};
  if (bytes < 0 || bytes > size) {
    fault(Kind::out_of_bounds, copy.pc,
          "a cp.async of " + std::to_string(size) + " bytes is to read " + std::to_string(bytes));
  }
  begin_copy(*t_lane, copy);
  t_lane->open.push_back(copy);
}

void cp_async_commit() {
  t_lane->groups.push_back(std::move(t_lane->open));
  t_lane->open.clear();
}

void cp_async_wait(int newest) {
  auto& groups = t_lane->groups;
  const int landing = std::max(0, static_cast<int>(groups.size()) - newest);
  for (int i = 0; i < landing; ++i) {
    for (const Copy& copy : groups[i]) land_copy(*t_lane, copy);
  }
  groups.erase(groups.begin(), groups.begin() + landing);
}

uint64_t atomic(Atomic op, void* p, int size, uint64_t operand) {
  touch(Access::atomic, p, size, VLM_CALLER);
  g_block.atomic = true;
  uint64_t old = 0;
  std::memcpy(&old, p, size);
  const auto wide = [size](uint64_t x) {
    return size == 4 ? static_cast<int64_t>(static_cast<int32_t>(x)) : static_cast<int64_t>(x);
  };
  uint64_t result = operand;
  switch (op) {
    case Atomic::add:
      result = old + operand;
      break;
    case Atomic::min:
      result = wide(operand) < wide(old) ? operand : old;
      break;
    case Atomic::max:
      result = wide(operand) > wide(old) ? operand : old;
      break;
    case Atomic::unsigned_min:
      result = std::min(old, operand);
      break;
    case Atomic::unsigned_max:
      result = std::max(old, operand);
      break;
    case Atomic::bit_and:
      result = old & operand;
      break;
    case Atomic::bit_or:
      result = old | operand;
      break;
    case Atomic::bit_xor:
      result = old ^ operand;
      break;
    case Atomic::exchange:
      break;
  }
  std::memcpy(p, &result, size);
  return old;
}

uint64_t atomic_cas(void* p, int size, uint64_t expected, uint64_t desired) {
  touch(Access::atomic, p, size, VLM_CALLER);
  g_block.atomic = true;
  uint64_t old = 0;
  std::memcpy(&old, p, size);
  if (old == expected) std::memcpy(p, &desired, size);
  return old;
}

}  // namespace vlm::emu
