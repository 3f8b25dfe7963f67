// CUDA backend of the contrastive losses: the block scheme.
//
// S is walked in blocks that stay in L2. Per block: the caller's GEMM writes S, kernels here turn
// it into partial statistics (merged in a fixed order) or into G = dLoss/dLogits, and two more
// GEMMs add G Y to dX and G^T X to dY in fp32. S is of the raw features and G of the logits,
// without 1/N or the scale: those come in fp32, when the sums are rounded to the output. Block
// sizes depend on shapes and on the workspace only, so that results repeat bit by bit.
#include "cuda/contrastive_fused.cuh"
#include "cuda/contrastive_vectors.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

using K = TileTraits;

struct BlockTraits {
  // 22 tiles of 128 rows, times the 6 of D = 768, are one wave of 132 SMs for the two gradient
  // GEMMs, and a block's S and G take 48 MB: to be measured.
  static constexpr int64_t kSide = 2816;
  static constexpr int64_t kStep = 128;  // sides are multiples, and at least this
  static constexpr int kMergeThreads = 128;
};

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// ---------------------------------------------------------------------------------------------
// Kernels.

// One CTA a tile of the block's S.
template <class Epilogue>
__global__ void __launch_bounds__(K::kThreads, 2)
    tile_kernel(const float* s, int64_t ld, Block block, Epilogue epilogue) {
  __shared__ TileShared shared;
  const int64_t m = blockIdx.y, n = blockIdx.x;
  const int64_t row = m * K::kRows, col = n * K::kCols;
  const Tile tile = load_tile(s + row * ld + col, ld, block, row, col);
  epilogue(tile, block, m, n, shared);
}

// The running statistics of one direction and the tiles' share of them.
struct MergeSide {
  SoftmaxStats stats;  // at the block's first row
  const float* parts;  // (tiles, fields, ld)
  int64_t ld, tiles, length;
  bool first;  // whether the running statistics begin here
};

template <bool kMetrics>
__device__ __forceinline__ void merge_one(const MergeSide& side, float c, int64_t i) {
  const SoftmaxStats& s = side.stats;
  constexpr int kFields = kMetrics ? kMetricFields : kLossFields;
  float best = kLowest, sum = 0.f, positive = 0.f, kept = 0.f;
  float entropy = 0.f, best_positive = kLowest, best_negative = kLowest;
  if (!side.first) {
    best = s.max[i], sum = s.sum[i], positive = s.positive[i];
    if (s.kept) kept = s.kept[i];
    if constexpr (kMetrics) {
      entropy = s.entropy[i];
      best_positive = s.best_positive[i], best_negative = s.best_negative[i];
    }
  }
  const float* part = side.parts + i;
  for (int64_t t = 0; t < side.tiles; ++t, part += kFields * side.ld) {
    const float other = part[kMaxField * side.ld], other_sum = part[kSumField * side.ld];
    const float now = fmaxf(best, other);
    const float a = (best - now) * c, b = (other - now) * c;
    const float fa = ptx::exp2_approx(a), fb = ptx::exp2_approx(b);
    if constexpr (kMetrics) {
      // a sum's terms e log e, moved to another maximum; where e vanishes, so do they
      const float moved_a = a > -126.f ? a * (1.f / kLog2e) * sum : 0.f;
      const float moved_b = b > -126.f ? b * (1.f / kLog2e) * other_sum : 0.f;
      entropy = fa * (entropy + moved_a) + fb * (part[kEntropyField * side.ld] + moved_b);
      best_positive = fmaxf(best_positive, part[kBestPositiveField * side.ld]);
      best_negative = fmaxf(best_negative, part[kBestNegativeField * side.ld]);
    }
    sum = sum * fa + other_sum * fb;
    best = now;
    positive += part[kPositiveField * side.ld];
    if (s.kept) kept += part[kKeptField * side.ld];
  }
  s.max[i] = best, s.sum[i] = sum, s.positive[i] = positive;
  if (s.kept) s.kept[i] = kept;
  if constexpr (kMetrics) {
    s.entropy[i] = entropy;
    s.best_positive[i] = best_positive, s.best_negative[i] = best_negative;
  }
}

template <bool kMetrics>
__global__ void __launch_bounds__(BlockTraits::kMergeThreads)
    merge_kernel(MergeSide row, MergeSide col, const float* scale) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BlockTraits::kMergeThreads + threadIdx.x;
  const float c = log2_scale(scale);
  if (i < row.length) {
    merge_one<kMetrics>(row, c, i);
  } else if (i < row.length + col.length) {
    merge_one<kMetrics>(col, c, i - row.length);
  }
}

// total[i] (+)= sum over tiles of parts[tile * ld + i]
__global__ void __launch_bounds__(BlockTraits::kMergeThreads)
    add_rows_kernel(const float* parts, int64_t ld, int64_t tiles, int64_t rows, bool first,
                    float* total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BlockTraits::kMergeThreads + threadIdx.x;
  if (i >= rows) return;
  float sum = first ? 0.f : total[i];
  for (int64_t t = 0; t < tiles; ++t) sum += parts[t * ld + i];
  total[i] = sum;
}

LaunchConfig merge_config(int64_t count, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, BlockTraits::kMergeThreads));
  return {dim3(blocks), dim3(BlockTraits::kMergeThreads), 0, stream};
}

// ---------------------------------------------------------------------------------------------
// Blocks and scratch.

struct Plan {
  int64_t n, m, d;
  int64_t bm, bn, ld;  // rows and columns of a block, and the stride of its rows
  int64_t tiles_m, tiles_n;
  int fields;
  ContrastivePass pass;
  bool grads_16, out_f32;

  int64_t area() const { return bm * ld; }
};

struct Scratch {
  float* s;
  void* g;            // may be s
  float* row_parts;   // (tiles_n, fields, bm)
  float* col_parts;   // (tiles_m, fields, ld)
  float* image_grad;  // (bm, D) sums of a block of dX, if the output is of 16 bits
  float* text_grad;   // (M, D)
  int32_t* positives;
  int32_t* kept;
  float* softmax;  // coefficients
  float* positive;
  float* smoothing;
  float* stats;       // (kMetricFields, N + M)
  float* losses;      // (N + M)
  double* tile_sums;  // (tiles_m, tiles_n, 2)
  double* numbers;
};

// Hands out pieces of the scratch; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
};

// The part that the workspace limits.
void carve_block(const Plan& p, Arena& arena, Scratch& s) {
  s.s = arena.take<float>(p.area());
  s.g = p.grads_16 ? arena.take<uint16_t>(p.area()) : static_cast<void*>(s.s);
  s.row_parts = arena.take<float>(p.tiles_n * p.fields * p.bm);
  s.col_parts = arena.take<float>(p.tiles_m * p.fields * p.ld);
  s.image_grad = p.pass.image && !p.out_f32 ? arena.take<float>(p.bm * p.d) : nullptr;
}

int64_t carve(const Plan& p, char* base, Scratch* out) {
  Arena arena{base};
  Scratch s{};
  carve_block(p, arena, s);
  const int64_t vector = p.n + p.m;
  s.text_grad = p.pass.text && !p.out_f32 ? arena.take<float>(p.m * p.d) : nullptr;
  s.positives = arena.take<int32_t>(vector);
  s.kept = arena.take<int32_t>(vector);
  s.softmax = arena.take<float>(vector);
  s.positive = arena.take<float>(vector);
  s.smoothing = arena.take<float>(vector);
  s.stats = arena.take<float>(kMetricFields * vector);
  s.losses = arena.take<float>(vector);
  s.tile_sums = arena.take<double>(2 * p.tiles_m * p.tiles_n);
  s.numbers = arena.take<double>(kNumbers);
  if (out) *out = s;
  return arena.used;
}

Plan make_plan(const ContrastiveCall& call, ContrastivePass pass, bool metrics) {
  Plan p{};
  p.n = call.image.rows, p.m = call.text.rows, p.d = call.image.cols;
  p.pass = pass;
  p.fields = metrics ? kMetricFields : kLossFields;
  p.grads_16 = pass.grads && call.dtype != DType::f32;
  p.out_f32 = call.dtype == DType::f32 || pass.f32_grads;
  const int64_t most_rows = round_up(p.n, K::kRows), most_cols = round_up(p.m, K::kCols);
  for (int64_t side = BlockTraits::kSide;; side -= BlockTraits::kStep) {
    // A side shorter than a square block's leaves more of the other.
    const auto within = [&](int64_t other) {
      return larger(side * side / other / BlockTraits::kStep * BlockTraits::kStep,
                    BlockTraits::kStep);
    };
    p.bn = pass.whole_columns ? most_cols : smaller(most_cols, side);
    p.bm = smaller(most_rows, within(p.bn));
    if (!pass.whole_columns) p.bn = smaller(most_cols, within(p.bm));
    p.ld = p.bn;
    p.tiles_m = ceil_div(p.bm, K::kRows), p.tiles_n = ceil_div(p.bn, K::kCols);
    Arena arena{nullptr};
    Scratch ignored{};
    carve_block(p, arena, ignored);
    if (arena.used <= call.workspace || side == BlockTraits::kStep) return p;
  }
}

// ---------------------------------------------------------------------------------------------
// One call.

class Run {
 public:
  Run(const ContrastiveCall& call, ContrastivePass pass, bool metrics, void* scratch)
      : call_(call),
        plan_(make_plan(call, pass, metrics)),
        stream_(static_cast<cudaStream_t>(call.stream)),
        fused_(call.fused && can_fuse(call)) {
    carve(plan_, static_cast<char*>(scratch), &scratch_);
    mask_ = {call.positives, call.image_ids, call.text_ids, plan_.n, plan_.m};
  }

  const char* error() const { return error_; }
  const Scratch& scratch() const { return scratch_; }
  cudaStream_t stream() const { return stream_; }

  // Keeps the first error; afterwards nothing more is started.
  void check(const char* error) {
    if (!error_) error_ = error;
  }

  Side side(bool rows, bool active, const SoftmaxStats& stats) const {
    const int64_t offset = rows ? 0 : plan_.n;
    return {scratch_.positives + offset,
            scratch_.kept + offset,
            rows ? call_.row_weight : call_.col_weight,
            stats,
            rows ? plan_.n : plan_.m,
            active};
  }

  ClipVectors vectors(const ClipOptions& o, const SoftmaxStats& row,
                      const SoftmaxStats& col) const {
    return {side(true, o.rows, row), side(false, o.cols, col), call_.scale, o.smoothing,
            o.reduction};
  }

  // Statistics in the scratch, of both directions.
  SoftmaxStats own_stats(bool rows, bool metrics, bool kept) const {
    const int64_t length = plan_.n + plan_.m;
    float* s = scratch_.stats + (rows ? 0 : plan_.n);
    const auto at = [&](int field) { return s + field * length; };
    SoftmaxStats stats{at(kMaxField), at(kSumField), at(kPositiveField)};
    if (kept) stats.kept = at(kKeptField);
    if (metrics) {
      stats.entropy = at(kEntropyField);
      stats.best_positive = at(kBestPositiveField);
      stats.best_negative = at(kBestNegativeField);
    }
    return stats;
  }

  void count() {
    for (const bool rows : {true, false}) {
      if (error_) return;
      const int64_t offset = rows ? 0 : plan_.n;
      check(count_pairs(mask_, rows, scratch_.positives + offset, scratch_.kept + offset, stream_));
    }
  }

  // body(block) for each block: all columns of a block of rows before the next.
  template <class Body, class RowsDone>
  void for_blocks(const Body& body, const RowsDone& rows_done) {
    for (int64_t i0 = 0; i0 < plan_.n && !error_; i0 += plan_.bm) {
      const int64_t rows = smaller(plan_.bm, plan_.n - i0);
      for (int64_t j0 = 0; j0 < plan_.m && !error_; j0 += plan_.bn) {
        body(Block{mask_, call_.scale, i0, rows, j0, smaller(plan_.bn, plan_.m - j0)});
      }
      if (!error_) rows_done(i0, rows);
    }
  }

  // S of the block into the scratch, unless its tiles are computed where they are used.
  void similarity(const Block& b) {
    if (error_ || fused_) return;
    call_.gemm({.transpose_b = true,
                .m = b.rows,
                .n = b.cols,
                .k = plan_.d,
                .a = row_of(call_.image, b.row),
                .lda = call_.image.stride,
                .b = row_of(call_.text, b.col),
                .ldb = call_.text.stride,
                .dtype = call_.dtype,
                .c = scratch_.s,
                .ldc = plan_.ld});
  }

  // Statistics of the block, into the running ones.
  void stats(const Block& b, const SoftmaxStats& row, const SoftmaxStats& col) {
    const bool metrics = row.entropy != nullptr;
    const StatsOut out{scratch_.row_parts, scratch_.col_parts, plan_.bm, plan_.ld,
                       row.kept != nullptr};
    metrics ? start(b, StatsEpilogue<true>{out}) : start(b, StatsEpilogue<false>{out});
    const MergeSide rows{shifted(row, b.row), scratch_.row_parts, plan_.bm, tiles_n(b), b.rows,
                         b.col == 0};
    const MergeSide cols{shifted(col, b.col), scratch_.col_parts, plan_.ld, tiles_m(b), b.cols,
                         b.row == 0};
    if (error_) return;
    check(launch(metrics ? merge_kernel<true> : merge_kernel<false>,
                 merge_config(b.rows + b.cols, stream_), rows, cols, call_.scale));
  }

  void clip_grads(const Block& b, const SoftmaxGrad& row, const SoftmaxGrad& col) {
    by_dtype([&](auto t) { start(b, ClipEpilogue<decltype(t)>{row, col, grad_out(b)}); });
  }

  void sigmoid(const Block& b, const SigmoidVectors& v, bool grads, float* row_loss) {
    by_dtype([&](auto t) {
      using T = decltype(t);
      float* const parts = scratch_.row_parts;
      grads ? start(b, SigmoidEpilogue<T, true>{v, parts, plan_.bm, grad_out(b)})
            : start(b, SigmoidEpilogue<T, false>{v, parts, plan_.bm, grad_out(b)});
    });
    if (error_) return;
    check(launch(add_rows_kernel, merge_config(b.rows, stream_), scratch_.row_parts, plan_.bm,
                 tiles_n(b), b.rows, b.col == 0, row_loss + b.row));
  }

  // dX += G Y and dY += G^T X, from the block's G.
  void products(const Block& b, const ContrastiveGrads& out) {
    if (error_) return;
    GemmCall call{.dtype = call_.dtype};
    call.n = plan_.d;
    call.a = scratch_.g;
    call.lda = plan_.ld;
    if (out.image.data) {
      call.m = b.rows, call.k = b.cols;
      call.b = row_of(call_.text, b.col), call.ldb = call_.text.stride;
      call.c = image_sums(out, b.row), call.ldc = image_ld(out);
      call.accumulate = b.col > 0;
      call_.gemm(call);
    }
    if (out.text.data) {
      call.transpose_a = true;
      call.m = b.cols, call.k = b.rows;
      call.b = row_of(call_.image, b.row), call.ldb = call_.image.stride;
      call.ldc = plan_.out_f32 ? out.text.stride : plan_.d;
      call.c = (plan_.out_f32 ? static_cast<float*>(out.text.data) : scratch_.text_grad) +
               b.col * call.ldc;
      call.accumulate = b.row > 0;
      call_.gemm(call);
    }
  }

  // The finished sums of rows [row, row + rows) of dX, or of all of dY, to the output.
  void finish_image(const ContrastiveGrads& out, int64_t row, int64_t rows) {
    if (out.image.data) finish(image_sums(out, row), image_ld(out), out.image, row, rows);
  }
  void finish_text(const ContrastiveGrads& out) {
    float* sums = plan_.out_f32 ? static_cast<float*>(out.text.data) : scratch_.text_grad;
    if (out.text.data) {
      finish(sums, plan_.out_f32 ? out.text.stride : plan_.d, out.text, 0, plan_.m);
    }
  }

  TileSums tile_sums(int count, bool signed_by_scale, double* out, float* as_float) const {
    return {scratch_.tile_sums,
            used_tiles(),
            count,
            scratch_.numbers + kUnit,
            signed_by_scale ? call_.scale : nullptr,
            out,
            as_float};
  }

 private:
  static int64_t tiles_m(const Block& b) { return ceil_div(b.rows, K::kRows); }
  static int64_t tiles_n(const Block& b) { return ceil_div(b.cols, K::kCols); }

  template <class Epilogue>
  void start(const Block& b, const Epilogue& epilogue) {
    if (error_) return;
    if (fused_) return start_fused(b, epilogue);
    const dim3 grid(static_cast<unsigned>(tiles_n(b)), static_cast<unsigned>(tiles_m(b)));
    check(launch(tile_kernel<Epilogue>, {grid, dim3(K::kThreads), 0, stream_}, scratch_.s, plan_.ld,
                 b, epilogue));
  }

  template <class Epilogue>
  void start_fused(const Block& b, const Epilogue& epilogue) {
    using Element = typename Epilogue::Element;
    const FusedOperands operands{row_of(call_.image, b.row), call_.image.stride,
                                 row_of(call_.text, b.col), call_.text.stride, plan_.d};
    if constexpr (std::is_void_v<Element>) {
      check(call_.dtype == DType::bf16 ? launch_fused<__nv_bfloat16>(operands, b, epilogue, stream_)
                                       : launch_fused<__half>(operands, b, epilogue, stream_));
    } else if constexpr (sizeof(Element) == 2) {
      check(launch_fused<Element>(operands, b, epilogue, stream_));
    }
  }

  template <class F>
  void by_dtype(const F& f) const {
    switch (call_.dtype) {
      case DType::f32:
        return f(float{});
      case DType::bf16:
        return f(__nv_bfloat16{});
      case DType::f16:
        return f(__half{});
    }
  }

  const void* row_of(const MatrixRef& x, int64_t row) const {
    return static_cast<const char*>(x.data) + row * x.stride * element_size(call_.dtype);
  }

  static SoftmaxStats shifted(SoftmaxStats s, int64_t by) {
    for (float** x :
         {&s.max, &s.sum, &s.positive, &s.kept, &s.entropy, &s.best_positive, &s.best_negative}) {
      if (*x) *x += by;
    }
    return s;
  }

  // A block at an edge has fewer tiles: they come first among the first block's slots.
  GradOut grad_out(const Block& b) const {
    return {scratch_.g, plan_.ld, scratch_.tile_sums, b.row > 0 || b.col > 0};
  }
  int64_t used_tiles() const {
    return ceil_div(smaller(plan_.bm, plan_.n), K::kRows) *
           ceil_div(smaller(plan_.bn, plan_.m), K::kCols);
  }

  int64_t image_ld(const ContrastiveGrads& out) const {
    return plan_.out_f32 ? out.image.stride : plan_.d;
  }
  float* image_sums(const ContrastiveGrads& out, int64_t row) const {
    return plan_.out_f32 ? static_cast<float*>(out.image.data) + row * out.image.stride
                         : scratch_.image_grad;
  }

  void finish(const float* sums, int64_t ld, const MutableMatrixRef& out, int64_t row,
              int64_t rows) {
    if (error_) return;
    const DType dtype = plan_.out_f32 ? DType::f32 : call_.dtype;
    char* to = static_cast<char*>(out.data) + row * out.stride * element_size(dtype);
    check(scale_rows(sums, DType::f32, ld, to, dtype, out.stride, rows, plan_.d,
                     scratch_.numbers + kFeatures, stream_));
  }

  const ContrastiveCall& call_;
  Plan plan_;
  cudaStream_t stream_;
  bool fused_;
  Scratch scratch_{};
  PairMask mask_{};
  const char* error_ = nullptr;
};

const auto kNothing = [](int64_t, int64_t) {};

}  // namespace

int64_t contrastive_scratch_bytes(const ContrastiveCall& call, ContrastivePass pass, bool metrics) {
  return carve(make_plan(call, pass, metrics), nullptr, nullptr);
}

const char* clip_forward(const ContrastiveCall& call, const ClipOptions& options,
                         const SoftmaxStats& row, const SoftmaxStats& col, float* losses,
                         float* loss, float* metrics, void* scratch) {
  Run run(call, {}, metrics != nullptr, scratch);
  run.count();
  run.for_blocks(
      [&](const Block& b) {
        run.similarity(b);
        run.stats(b, row, col);
      },
      kNothing);
  if (run.error()) return run.error();
  const ClipVectors v = run.vectors(options, row, col);
  run.check(clip_losses(v, losses, loss, nullptr, run.stream()));
  if (metrics && !run.error()) run.check(contrastive_metrics(v, metrics, run.stream()));
  return run.error();
}

namespace {

// The coefficients of one direction in the scratch.
Coefficients coefficients_at(const Scratch& s, int64_t offset, bool smoothing) {
  return {s.softmax + offset, s.positive + offset, smoothing ? s.smoothing + offset : nullptr};
}

SoftmaxGrad softmax_grad(const Side& side, const Coefficients& c) {
  if (!side.active) return {};
  return {side.stats.max, c.softmax, c.positive, c.kept};
}

}  // namespace

const char* clip_backward(const ContrastiveCall& call, const ClipOptions& options,
                          const SoftmaxStats& row_stats, const SoftmaxStats& col_stats,
                          const float* grad, const ContrastiveGrads& out, float* scale_grad,
                          void* scratch) {
  Run run(call, out.pass(), false, scratch);
  run.count();
  if (run.error()) return run.error();
  const Scratch& s = run.scratch();
  const ClipVectors v = run.vectors(options, row_stats, col_stats);
  run.check(clip_numbers(v, grad, call.dtype, s.numbers, run.stream()));
  SoftmaxGrad grads[2];
  for (const bool rows : {true, false}) {
    const Side& side = rows ? v.row : v.col;
    const Coefficients c = coefficients_at(s, rows ? 0 : v.row.length, options.smoothing > 0.f);
    if (run.error()) return run.error();
    run.check(clip_coefficients(v, rows, grad, s.numbers, c, 0, side.length, run.stream()));
    grads[rows ? 0 : 1] = softmax_grad(side, c);
  }
  run.for_blocks(
      [&](const Block& b) {
        run.similarity(b);
        run.clip_grads(b, grads[0], grads[1]);
        run.products(b, out);
      },
      [&](int64_t i, int64_t rows) { run.finish_image(out, i, rows); });
  run.finish_text(out);
  if (!run.error() && scale_grad) {
    run.check(total_sums(run.tile_sums(1, true, nullptr, scale_grad), run.stream()));
  }
  return run.error();
}

const char* clip_one_way(const ContrastiveCall& call, const ClipOptions& options, float* loss,
                         const ContrastiveGrads& out, double* sums, void* scratch) {
  ContrastivePass pass = out.pass();
  pass.whole_columns = true;
  Run run(call, pass, false, scratch);
  run.count();
  if (run.error()) return run.error();
  const Scratch& s = run.scratch();
  ClipOptions rows_only = options;
  rows_only.cols = false;
  const bool smoothing = options.smoothing > 0.f;
  const ClipVectors v = run.vectors(rows_only, run.own_stats(true, false, smoothing),
                                    run.own_stats(false, false, smoothing));
  const Coefficients c = coefficients_at(s, 0, smoothing);
  run.check(clip_numbers(v, nullptr, call.dtype, s.numbers, run.stream()));
  run.for_blocks(
      [&](const Block& b) {  // whole rows: their statistics are complete before their gradients
        run.similarity(b);
        run.stats(b, v.row.stats, v.col.stats);
        if (run.error()) return;
        run.check(
            clip_coefficients(v, true, nullptr, s.numbers, c, b.row, b.row + b.rows, run.stream()));
        run.clip_grads(b, softmax_grad(v.row, c), {});
        run.products(b, out);
      },
      [&](int64_t i, int64_t rows) { run.finish_image(out, i, rows); });
  run.finish_text(out);
  if (run.error()) return run.error();
  run.check(total_sums(run.tile_sums(1, false, sums, nullptr), run.stream()));
  if (!run.error()) run.check(clip_losses(v, s.losses, loss, sums + 1, run.stream()));
  return run.error();
}

const char* siglip_pass(const ContrastiveCall& call, Reduction reduction, const float* row_grad,
                        float* row_loss, float* loss, const ContrastiveGrads& out, double* sums,
                        float* metrics, void* scratch) {
  const bool grads = sums != nullptr;
  Run run(call, grads ? out.pass() : ContrastivePass{}, metrics != nullptr, scratch);
  const Scratch& s = run.scratch();
  const SigmoidVectors v{call.row_weight, row_grad,  call.col_weight,
                         call.scale,      call.bias, s.numbers + kInverseUnit};
  run.check(sigmoid_numbers(v, call.image.rows, call.text.rows, reduction, call.dtype, s.numbers,
                            run.stream()));
  const bool wanted = metrics != nullptr;
  const SoftmaxStats row = run.own_stats(true, wanted, wanted),
                     col = run.own_stats(false, wanted, wanted);
  run.for_blocks(
      [&](const Block& b) {
        run.similarity(b);
        if (metrics) run.stats(b, row, col);
        run.sigmoid(b, v, grads, row_loss ? row_loss : s.losses);
        if (grads) run.products(b, out);
      },
      [&](int64_t i, int64_t rows) {
        if (grads) run.finish_image(out, i, rows);
      });
  if (grads) run.finish_text(out);
  if (run.error()) return run.error();
  if (loss) {
    run.check(mean_loss(row_loss ? row_loss : s.losses, call.image.rows, s.numbers + kDivisor, loss,
                        run.stream()));
  }
  if (grads && !run.error()) {
    run.check(total_sums(run.tile_sums(2, false, sums, nullptr), run.stream()));
  }
  if (metrics && !run.error()) {
    run.count();
    if (run.error()) return run.error();
    run.check(contrastive_metrics(run.vectors({}, row, col), metrics, run.stream()));
  }
  return run.error();
}

}  // namespace vlm::cuda
