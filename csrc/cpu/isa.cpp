#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace vlm {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::isa_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
  }
  if (isa == Isa::isa_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  }
#endif
  return isa == Isa::isa_default;
}

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

Isa best_isa() {
  if (supported(Isa::isa_avx512)) return Isa::isa_avx512;
  return supported(Isa::isa_avx2) ? Isa::isa_avx2 : Isa::isa_default;
}

std::atomic<Isa>& isa() {
  static std::atomic<Isa> value{best_isa()};
  return value;
}

}  // namespace

Isa current_isa() { return isa().load(std::memory_order_relaxed); }

bool has_bf16_dot() {
#if defined(__x86_64__)
  return current_isa() == Isa::isa_avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* cpu_isa() { return kNames[static_cast<int>(current_isa())]; }

bool set_cpu_isa(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) == 0 && supported(static_cast<Isa>(i))) {
      isa().store(static_cast<Isa>(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

const char* cpu_isas() {
  if (supported(Isa::isa_avx512)) return "default,avx2,avx512";
  return supported(Isa::isa_avx2) ? "default,avx2" : "default";
}

}  // namespace vlm
