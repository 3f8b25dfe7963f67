#include "cpu/gemm.h"

#include <ATen/native/CPUBlas.h>

namespace vlm {
namespace {

// brgemm has no query: it throws where it cannot run.
template <class T>
bool runs() {
  alignas(64) T a[32] = {}, b[32 * 32] = {};
  alignas(64) float c[32];
  try {
    at::native::cpublas::brgemm(1, 32, 32, 32, 32, 32, false, a, b, c, sizeof(T) == 2);
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

bool brgemm_runs_f32() { return runs<float>(); }
bool brgemm_runs_bf16() { return runs<at::BFloat16>(); }

void brgemm(const GemmShape& s, const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(s.m, s.n, s.k, s.lda, s.ldb, s.ldc, s.accumulate, a, b, c, false);
}

void brgemm(const GemmShape& s, const bf16_t* a, const bf16_t* b, float* c) {
  at::native::cpublas::brgemm(s.m, s.n, s.k, s.lda, s.ldb, s.ldc, s.accumulate,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

void brgemm_release() { at::native::cpublas::brgemm_release(true); }

}  // namespace vlm
