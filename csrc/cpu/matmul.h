// What kernels compiled per ISA multiply with, and where they put what they multiply.
#pragma once

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/vec.h"
#include "vlm/types.h"

namespace vlm::cpu::VLM_ISA {

// Hands out 64-byte aligned pieces of the workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// C = A B [+ C] where torch's brgemm cannot run (oneDNN switched off or too old a CPU). B can be
// read up to the next multiple of 16 columns.
[[maybe_unused]] static void gemm_plain(const GemmShape& s, const float* a, const float* b,
                                        float* c) {
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t v = 0; v < s.n; v += kLanes) {
      vf sum = {};
      for (int64_t k = 0; k < s.k; ++k) sum += a[i * s.lda + k] * load(b + k * s.ldb + v);
      float* out = c + i * s.ldc + v;
      const int64_t count = min(kLanes, s.n - v);
      for (int64_t n = 0; n < count; ++n) out[n] = s.accumulate ? out[n] + sum[n] : sum[n];
    }
  }
}

struct Gemm {
  bool native;

  void operator()(const GemmShape& s, const float* a, const float* b, float* c) const {
    native ? brgemm(s, a, b, c) : gemm_plain(s, a, b, c);
  }
  void operator()(const GemmShape& s, const bf16_t* a, const bf16_t* b, float* c) const {
    brgemm(s, a, b, c);
  }
  // Gives a thread's matrix tiles (AMX) back once its unit is done.
  void release() const {
    if (native) brgemm_release();
  }
};

static inline bool runs_in_bf16(DType dtype) {
  return dtype == DType::bf16 && has_bf16_dot() && brgemm_runs_bf16();
}

}  // namespace vlm::cpu::VLM_ISA
