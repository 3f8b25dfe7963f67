#include "cpu/gemm.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/parallel.h"

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

// The best of many rounds of 128 x 512 x 256 multiplies from L2, all threads at once.
template <class T>
double probe(double seconds) {
  constexpr int64_t m = 128, n = 64, k = 512, panels = 4, rounds = 8;
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const int threads = num_threads();
  const std::vector<T> ones((m * k + n * k * panels) * threads, T(1.f));
  std::vector<float> out(m * n * threads);
  double best = 0.0;
  for (const auto start = Clock::now(); since(start) < seconds;) {
    const auto round = Clock::now();
    parallel_for(threads, [&](int64_t i, int) {
      const T* a = ones.data() + (m * k + n * k * panels) * i;
      for (int64_t r = 0; r < rounds * panels; ++r) {
        at::native::cpublas::brgemm(m, n, k, k, n, n, false, a, a + m * k + r % panels * n * k,
                                    out.data() + m * n * i, sizeof(T) == 2);
      }
    });
    const double flops = 2.0 * m * n * k * rounds * panels * threads;
    best = std::max(best, flops / since(round));
  }
  return best;
}

}  // namespace

double gemm_probe(bool bf16, double seconds) {
  if (bf16) return brgemm_runs_bf16() ? probe<at::BFloat16>(seconds) : 0.0;
  return brgemm_runs_f32() ? probe<float>(seconds) : 0.0;
}

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
