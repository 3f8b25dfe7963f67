#include "cuda/contrastive_vectors.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

struct VectorTraits {
  static constexpr int kThreads = 256;
  static constexpr int kReduceThreads = 512;  // of the one CTA that sums everything
};

LaunchConfig over(int64_t count, cudaStream_t stream) {
  constexpr int kThreads = VectorTraits::kThreads;
  return {dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
          stream};
}

LaunchConfig one_block(cudaStream_t stream) {
  return {dim3(1), dim3(VectorTraits::kReduceThreads), 0, stream};
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * VectorTraits::kThreads + threadIdx.x;
}

// Reduces x over the CTA in an order of its own; all threads get the result.
template <class Op>
__device__ double reduce(double x, double start, Op op) {
  constexpr int kThreads = VectorTraits::kReduceThreads, kLanes = 32;
  __shared__ double shared[kThreads];
  __syncthreads();  // an earlier reduction may still be read
  shared[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x < kLanes) {
    x = shared[threadIdx.x];
    for (int i = threadIdx.x + kLanes; i < kThreads; i += kLanes) x = op(x, shared[i]);
    shared[threadIdx.x] = x;
  }
  __syncthreads();
  x = start;
  for (int i = 0; i < kLanes; ++i) x = op(x, shared[i]);
  return x;
}

__device__ double reduce_sum(double x) {
  return reduce(x, 0.0, [](double a, double b) { return a + b; });
}
__device__ double reduce_max(double x) {
  return reduce(x, 0.0, [](double a, double b) { return fmax(a, b); });
}

template <class F>
__device__ double sum_over(int64_t n, F f) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += VectorTraits::kReduceThreads) sum += f(i);
  return reduce_sum(sum);
}

template <class F>
__device__ double max_over(int64_t n, F f) {
  double most = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += VectorTraits::kReduceThreads) most = fmax(most, f(i));
  return reduce_max(most);
}

// A power of two that no |G| exceeds. In fp16 the fractions are spread over its range, since many
// are below the least fp16 number.
__device__ void write_unit(double bound, DType dtype, double* numbers) {
  const bool usable = bound > 0.0 && bound < 1e300;
  int exponent = usable ? ilogb(bound) + 1 : 0;
  if (dtype == DType::f16) exponent -= 14;
  numbers[kUnit] = ldexp(1.0, exponent);
  numbers[kInverseUnit] = ldexp(1.0, -exponent);
}

__global__ void __launch_bounds__(VectorTraits::kThreads)
    count_kernel(PairMask mask, bool rows, int32_t* positives, int32_t* kept) {
  constexpr int kThreads = VectorTraits::kThreads;
  __shared__ int64_t ids[kThreads];
  const int64_t length = rows ? mask.n : mask.m, others = rows ? mask.m : mask.n;
  const int64_t i = thread_index();
  const bool inside = i < length;
  const bool diagonal = i < others;
  int32_t same = diagonal;
  bool diagonal_is_same = true;
  if (mask.kind != Positives::diagonal) {
    const auto id_of = [&](bool row, int64_t k) { return row ? mask.row_id(k) : mask.col_id(k); };
    const int64_t id = inside ? id_of(rows, i) : 0;
    same = 0;
    for (int64_t first = 0; first < others; first += kThreads) {
      const int64_t count = others - first < kThreads ? others - first : kThreads;
      if (threadIdx.x < count) ids[threadIdx.x] = id_of(!rows, first + threadIdx.x);
      __syncthreads();
      for (int64_t k = 0; k < count; ++k) same += ids[k] == id;
      __syncthreads();
    }
    diagonal_is_same = inside && diagonal && id_of(!rows, i) == id;
  }
  if (!inside) return;
  const int32_t all = static_cast<int32_t>(others);
  if (mask.kind == Positives::diagonal_without_same_ids) {
    positives[i] = diagonal;
    kept[i] = all - same + diagonal_is_same;
  } else {
    positives[i] = same;
    kept[i] = all;
  }
}

// A row's loss is its log-sum-exp minus the mean logit of its target, both above the maximum.
__device__ float loss_of(const Side& side, float magnitude, float smoothing, int64_t i) {
  if (!side.counts(i)) return 0.f;
  const SoftmaxStats& s = side.stats;
  float target = (1.f - smoothing) * (s.positive[i] / side.positives[i] - s.max[i]);
  if (smoothing > 0.f) target += smoothing * (s.kept[i] / side.kept[i] - s.max[i]);
  return side.weight_of(i) * (logf(s.sum[i]) - magnitude * target);
}

__global__ void __launch_bounds__(VectorTraits::kThreads)
    clip_losses_kernel(ClipVectors v, float* losses) {
  const int64_t i = thread_index();
  if (i >= v.row.length + v.col.length) return;
  const float magnitude = fabsf(*v.scale);
  losses[i] = i < v.row.length ? loss_of(v.row, magnitude, v.smoothing, i)
                               : loss_of(v.col, magnitude, v.smoothing, i - v.row.length);
}

__device__ double total_weight(const Side& side) {
  return sum_over(side.length,
                  [&](int64_t i) { return side.counts(i) ? double(side.weight_of(i)) : 0.0; });
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    clip_loss_kernel(ClipVectors v, const float* losses, float* loss, double* divisor) {
  double result = 0.0, last = 1.0;
  const auto add = [&](const Side& side, const float* own) {
    if (!side.active) return;
    const double sum = sum_over(side.length, [&](int64_t i) { return double(own[i]); });
    last = v.reduction == Reduction::mean ? total_weight(side) : 1.0;
    result += last != 0.0 ? v.share() * sum / last : 0.0;
  };
  add(v.row, losses);
  add(v.col, losses + v.row.length);
  if (threadIdx.x > 0) return;
  if (loss) *loss = static_cast<float>(result);
  if (divisor) *divisor = last;
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    clip_numbers_kernel(ClipVectors v, const float* grad, DType dtype, double* numbers) {
  double bound = 0.0;
  const bool unreduced = grad && v.reduction == Reduction::none;
  // The factor that all gradients of a direction share.
  const auto common = [&](const Side& side, const float* own) {
    double factor = 1.0;
    if (!side.active) return factor;
    if (grad && !unreduced) {
      const double weight = v.reduction == Reduction::mean ? total_weight(side) : 1.0;
      factor = weight != 0.0 ? v.share() * grad[0] / weight : 0.0;
    }
    const double most = max_over(side.length, [&](int64_t i) {
      const float g = side.counts(i) ? side.weight_of(i) * (unreduced ? own[i] : 1.f) : 0.f;
      return double(fabsf(g));
    });
    bound += fabs(factor) * most;
    return factor;
  };
  const double row = common(v.row, grad),
               col = common(v.col, unreduced ? grad + v.row.length : nullptr);
  if (threadIdx.x > 0) return;
  write_unit(bound, dtype, numbers);
  numbers[kRowCommon] = row;
  numbers[kColCommon] = col;
  numbers[kFeatures] = grad ? numbers[kUnit] * *v.scale : numbers[kUnit];
}

__global__ void __launch_bounds__(VectorTraits::kThreads)
    clip_coefficients_kernel(ClipVectors v, bool rows, const float* grad, const double* numbers,
                             Coefficients out, int64_t begin, int64_t end) {
  const int64_t i = begin + thread_index();
  if (i >= end) return;
  const Side& side = rows ? v.row : v.col;
  float softmax = 0.f, positive = 0.f, kept = 0.f;
  if (side.counts(i)) {
    double g = numbers[rows ? kRowCommon : kColCommon] * numbers[kInverseUnit] * side.weight_of(i);
    if (grad && v.reduction == Reduction::none) g *= grad[rows ? i : v.row.length + i];
    softmax = static_cast<float>(g / side.stats.sum[i]);
    positive = static_cast<float>(g * (1.0 - v.smoothing) / side.positives[i]);
    kept = static_cast<float>(g * v.smoothing / side.kept[i]);
  }
  out.softmax[i] = softmax;
  out.positive[i] = positive;
  if (out.kept) out.kept[i] = kept;
}

// The order of the metrics is that of vlm_kernels/ops/contrastive.py. Logit means come without the
// bias, and the last two say whether there were positives and negatives at all.
__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    metrics_kernel(ClipVectors v, float* out) {
  const double magnitude = fabsf(*v.scale);
  const auto direction = [&](const Side& side, float* top1, float* entropy, float* perplexity) {
    const SoftmaxStats& stats = side.stats;
    const double with_positive =
        sum_over(side.length, [&](int64_t i) { return side.positives[i] > 0 ? 1.0 : 0.0; });
    const double hits = sum_over(side.length, [&](int64_t i) {
      // at scale 0 all logits tie
      const bool hit = side.positives[i] > 0 && magnitude > 0.0 &&
                       stats.best_positive[i] > stats.best_negative[i];
      return hit ? 1.0 : 0.0;
    });
    const double nats = sum_over(side.length, [&](int64_t i) {
      if (side.kept[i] == 0) return 0.0;
      return double(logf(stats.sum[i])) - double(stats.entropy[i] / stats.sum[i]);
    });
    if (threadIdx.x > 0) return;
    *top1 = static_cast<float>(with_positive > 0.0 ? hits / with_positive : 0.0);
    *entropy = static_cast<float>(side.length > 0 ? nats / double(side.length) : 0.0);
    *perplexity = expf(*entropy);
  };
  direction(v.row, out + 0, out + 4, out + 6);
  direction(v.col, out + 1, out + 5, out + 7);
  const Side& rows = v.row;
  const auto total = [&](const auto* values) {
    return sum_over(rows.length, [&](int64_t i) { return double(values[i]); });
  };
  const double positive = total(rows.stats.positive), kept = total(rows.stats.kept);
  const double positives = total(rows.positives), negatives = total(rows.kept) - positives;
  if (threadIdx.x > 0) return;
  out[2] = static_cast<float>(positives > 0.0 ? magnitude * positive / positives : 0.0);
  out[3] = static_cast<float>(negatives > 0.0 ? magnitude * (kept - positive) / negatives : 0.0);
  out[8] = positives > 0.0;
  out[9] = negatives > 0.0;
}

__device__ double sum_of_weights(const float* weight, int64_t n, Reduction reduction) {
  if (reduction != Reduction::mean) return 1.0;
  return weight ? sum_over(n, [&](int64_t i) { return double(weight[i]); }) : double(n);
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    sigmoid_numbers_kernel(SigmoidVectors v, int64_t n, int64_t m, Reduction reduction, DType dtype,
                           double* numbers) {
  const double rows = max_over(n, [&](int64_t i) {
    const float w = v.row_weight ? v.row_weight[i] : 1.f;
    return double(fabsf(v.row_grad ? w * v.row_grad[i] : w));
  });
  const double cols =
      max_over(m, [&](int64_t j) { return double(fabsf(v.col_weight ? v.col_weight[j] : 1.f)); });
  const double divisor = sum_of_weights(v.row_weight, n, reduction);
  if (threadIdx.x > 0) return;
  write_unit(rows * cols, dtype, numbers);
  numbers[kFeatures] = numbers[kUnit];
  numbers[kDivisor] = divisor;
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    mean_loss_kernel(const float* row_loss, int64_t n, const double* divisor, float* loss) {
  const double sum = sum_over(n, [&](int64_t i) { return double(row_loss[i]); });
  if (threadIdx.x == 0) *loss = static_cast<float>(*divisor != 0.0 ? sum / *divisor : 0.0);
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads) total_sums_kernel(TileSums s) {
  for (int k = 0; k < s.count; ++k) {
    double sum = sum_over(s.tiles, [&](int64_t i) { return s.sums[2 * i + k]; });
    if (threadIdx.x > 0) continue;
    sum *= *s.unit;
    if (s.signed_by) sum *= sign_of(s.signed_by);
    if (s.out) s.out[k] = sum;
    if (s.as_float && k == 0) *s.as_float = static_cast<float>(sum);
  }
}

__global__ void __launch_bounds__(VectorTraits::kReduceThreads)
    formed_factors_kernel(FormedGrads f, double* factor) {
  double divisor = 1.0;
  if (f.divisor) {
    divisor = *f.divisor;
  } else {
    divisor = sum_of_weights(f.row_weight, f.rows, f.reduction);
  }
  if (threadIdx.x > 0) return;
  const double grad = f.grad ? *f.grad : 1.0;
  const double common = divisor != 0.0 ? grad / divisor : 0.0;
  *factor = common * *f.scale;
  if (f.scale_grad) *f.scale_grad = static_cast<float>(common * sign_of(f.scale) * f.sums[0]);
  if (f.bias_grad) *f.bias_grad = static_cast<float>(common * f.sums[1]);
}

__device__ __forceinline__ float load_as_float(const float* p) { return *p; }
__device__ __forceinline__ float load_as_float(const __nv_bfloat16* p) {
  return __bfloat162float(*p);
}
__device__ __forceinline__ void store_float(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_float(__nv_bfloat16* p, float x) {
  *p = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void store_float(__half* p, float x) { *p = __float2half_rn(x); }

// One thread an element: `from` and `to` may be the same memory.
template <class From, class To>
__global__ void __launch_bounds__(VectorTraits::kThreads)
    scale_rows_kernel(const From* from, int64_t from_ld, To* to, int64_t to_ld, int64_t rows,
                      int64_t cols, const double* factor) {
  const int64_t at = thread_index();
  if (at >= rows * cols) return;
  const int64_t row = at / cols, col = at % cols;
  const float f = static_cast<float>(*factor);
  store_float(to + row * to_ld + col, load_as_float(from + row * from_ld + col) * f);
}

}  // namespace

const char* count_pairs(const PairMask& mask, bool rows, int32_t* positives, int32_t* kept,
                        cudaStream_t stream) {
  return launch(count_kernel, over(rows ? mask.n : mask.m, stream), mask, rows, positives, kept);
}

const char* clip_losses(const ClipVectors& v, float* losses, float* loss, double* divisor,
                        cudaStream_t stream) {
  const char* error =
      launch(clip_losses_kernel, over(v.row.length + v.col.length, stream), v, losses);
  if (error || (!loss && !divisor)) return error;
  return launch(clip_loss_kernel, one_block(stream), v, losses, loss, divisor);
}

const char* clip_numbers(const ClipVectors& v, const float* grad, DType dtype, double* numbers,
                         cudaStream_t stream) {
  return launch(clip_numbers_kernel, one_block(stream), v, grad, dtype, numbers);
}

const char* clip_coefficients(const ClipVectors& v, bool rows, const float* grad,
                              const double* numbers, const Coefficients& out, int64_t begin,
                              int64_t end, cudaStream_t stream) {
  return launch(clip_coefficients_kernel, over(end - begin, stream), v, rows, grad, numbers, out,
                begin, end);
}

const char* contrastive_metrics(const ClipVectors& v, float* out, cudaStream_t stream) {
  return launch(metrics_kernel, one_block(stream), v, out);
}

const char* sigmoid_numbers(const SigmoidVectors& v, int64_t n, int64_t m, Reduction reduction,
                            DType dtype, double* numbers, cudaStream_t stream) {
  return launch(sigmoid_numbers_kernel, one_block(stream), v, n, m, reduction, dtype, numbers);
}

const char* mean_loss(const float* row_loss, int64_t n, const double* divisor, float* loss,
                      cudaStream_t stream) {
  return launch(mean_loss_kernel, one_block(stream), row_loss, n, divisor, loss);
}

const char* total_sums(const TileSums& s, cudaStream_t stream) {
  return launch(total_sums_kernel, one_block(stream), s);
}

const char* scale_rows(const void* from, DType from_dtype, int64_t from_ld, void* to,
                       DType to_dtype, int64_t to_ld, int64_t rows, int64_t cols,
                       const double* factor, cudaStream_t stream) {
  const auto run = [&](auto* typed_from, auto* typed_to) {
    using From = std::remove_pointer_t<decltype(typed_from)>;
    using To = std::remove_pointer_t<decltype(typed_to)>;
    return launch(scale_rows_kernel<From, To>, over(rows * cols, stream),
                  static_cast<const From*>(from), from_ld, static_cast<To*>(to), to_ld, rows, cols,
                  factor);
  };
  float* const f32 = nullptr;
  __nv_bfloat16* const bf16 = nullptr;
  if (from_dtype == DType::bf16) return run(bf16, bf16);
  if (to_dtype == DType::bf16) return run(f32, bf16);
  if (to_dtype == DType::f16) return run(f32, static_cast<__half*>(nullptr));
  return run(f32, f32);
}

const char* finish_formed(const FormedGrads& formed, FormedMatrix image, FormedMatrix text,
                          DType from, DType to, double* factor, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const char* error = launch(formed_factors_kernel, one_block(s), formed, factor);
  for (const FormedMatrix& x : {image, text}) {
    if (error || !x.to) continue;
    error = scale_rows(x.from, from, x.count, x.to, to, x.count, 1, x.count, factor, s);
  }
  return error;
}

}  // namespace vlm::cuda
