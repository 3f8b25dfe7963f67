// The seam to the CPU's matrix multiply: C (M, N) = A (M, K) B (K, N) [+ C], row-major, fp32 C.
// bf16 takes B with its rows interleaved in pairs, (K / 2, ldb, 2), and an even K.
#pragma once

#include <cstdint>

namespace vlm {

using bf16_t = uint16_t;  // bits of a bfloat16

struct GemmShape {
  int64_t m, n, k, lda, ldb, ldc;
  bool accumulate;
};

// Whether torch's brgemm runs here and now (oneDNN may be switched off at run time).
bool brgemm_runs_f32();
bool brgemm_runs_bf16();

void brgemm(const GemmShape& shape, const float* a, const float* b, float* c);
void brgemm(const GemmShape& shape, const bf16_t* a, const bf16_t* b, float* c);

// Gives the calling thread's matrix tiles (AMX) back.
void brgemm_release();

// FLOP/s of hot multiplies on all of torch's threads over `seconds`: the limit that benchmarks
// compare with. 0 where brgemm does not run.
double gemm_probe(bool bf16, double seconds);

}  // namespace vlm
