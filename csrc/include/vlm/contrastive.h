// Contrastive losses over an N x M similarity matrix that is never held: InfoNCE (CLIP, Radford et
// al. 2021) and sigmoid (SigLIP, Zhai et al. 2023). Torch-free: pointers, strides, sizes, scratch.
//
// similarity S = sign(scale) * image text^T, so that |scale| * S is the scaled logit in both signs.
#pragma once

#include "vlm/gemm.h"
#include "vlm/types.h"

namespace vlm {

enum class Positives {
  diagonal,                   // (i, i)
  ids,                        // image_ids[i] == text_ids[j]
  diagonal_without_same_ids,  // (i, i); other pairs of the same id leave the denominators
};

struct ContrastiveInputs {
  MatrixRef image;  // (N, D)
  MatrixRef text;   // (M, D)
  DType dtype = DType::f32;
  float scale = 1.f, bias = 0.f;
  Positives positives = Positives::diagonal;
  const int32_t* image_ids = nullptr;  // (N,) dense ids, unless positives == diagonal
  const int32_t* text_ids = nullptr;   // (M,)
  int64_t scratch_budget = 0;          // bytes the blocks are sized for
};

// Per-row or per-column sums of one softmax direction. Null members are not computed; `max` and
// `sum` go together.
struct SoftmaxStats {
  float* max = nullptr;            // largest kept S
  float* sum = nullptr;            // sum of exp(|scale| * (S - max)) over kept entries
  float* positive = nullptr;       // sum of S over positives
  float* kept = nullptr;           // sum of S over kept entries
  float* entropy = nullptr;        // sum of e * |scale| * (S - max), e as in `sum`
  float* best_positive = nullptr;  // largest S over positives
  float* best_negative = nullptr;  // largest kept S over the rest
};

// What dLoss/dS needs of one side, already multiplied by the incoming gradient and the scale.
struct SoftmaxGrad {
  const float* max = nullptr;       // shift of the exponential
  const float* softmax = nullptr;   // coefficient of exp(|scale| * (S - max))
  const float* positive = nullptr;  // taken from each positive entry
  const float* kept = nullptr;      // taken from each kept entry (label smoothing)
};

// Similarity panels kept between forward and backward: (panels, N, 64) floats hold the first
// `panels` groups of 64 columns.
struct KeptSimilarity {
  float* data = nullptr;
  int64_t panels = 0;
  int64_t first = 0;  // panel that data begins with
};

constexpr int64_t kKeptPanelColumns = 64;

// What a pass forms; all false is a forward without gradients.
struct ContrastivePass {
  bool grads = false;          // G at all: of the scale and the bias
  bool image = false;          // dLoss/dimage
  bool text = false;           // dLoss/dtext
  bool f32_grads = false;      // in fp32 whatever the inputs are
  bool whole_columns = false;  // clip_columns
};

struct ContrastiveGrads {
  MutableMatrixRef image;        // (N, D) in the input dtype, or fp32; data == nullptr: not needed
  MutableMatrixRef text;         // (M, D)
  double* similarity = nullptr;  // sum of G * S (one number): gives the gradient of the scale
  double* logit = nullptr;       // sum of G (one number): gives the gradient of the bias
  bool f32 = false;              // image and text are fp32

  ContrastivePass pass() const {
    return {true, image.data != nullptr, text.data != nullptr, f32, false};
  }
};

struct SigmoidTerms {
  const float* row_weight = nullptr;  // (N,) or null
  const float* col_weight = nullptr;  // (M,) or null
  float* row_loss = nullptr;          // (N,) sum over columns of the weighted pair losses, or null
};

namespace cpu {

// Bytes of scratch that a pass needs: within in.scratch_budget where blocks can be made that small,
// plus the fp32 accumulator of dLoss/dimage for 16-bit inputs, plus O(N + M).
int64_t contrastive_scratch_bytes(const ContrastiveInputs& in, ContrastivePass pass);

// Softmax statistics of both directions (a direction whose `max` is null is skipped). Pass: {}.
// Fills `kept.panels` panels of similarity where kept.data is given.
void clip_stats(const ContrastiveInputs& in, const SoftmaxStats& row, const SoftmaxStats& col,
                const KeptSimilarity& kept, void* scratch);

// Gradients of InfoNCE from coefficient vectors (a direction whose `max` is null is skipped).
// Pass: what `out` asks for.
void clip_grads(const ContrastiveInputs& in, const SoftmaxGrad& row, const SoftmaxGrad& col,
                const KeptSimilarity& kept, const ContrastiveGrads& out, void* scratch);

// One direction of InfoNCE in one pass: the softmax of each column (over the images), its
// statistics and then, from the similarity of whole columns kept meanwhile, its gradients.
// `target.softmax` is the gradient of each column's loss; `target.max` is not read. Pass:
// whole_columns and what `out` asks for.
void clip_columns(const ContrastiveInputs& in, const SoftmaxStats& col, const SoftmaxGrad& target,
                  const ContrastiveGrads& out, void* scratch);

// Row losses of the sigmoid loss and, in the same pass, its gradients with respect to the
// similarity (not yet multiplied by the scale) and the softmax statistics whose members are given.
// Pass: what `out` asks for.
void sigmoid_loss(const ContrastiveInputs& in, const SigmoidTerms& terms, const SoftmaxStats& row,
                  const SoftmaxStats& col, const ContrastiveGrads& out, void* scratch);

}  // namespace cpu

namespace cuda {

// A call on the device: every pointer but `gemm`'s is one of the device, and no function below
// waits for it or reads from it. Each returns nullptr, or why a kernel did not start.
struct ContrastiveCall {
  MatrixRef image;  // (N, D)
  MatrixRef text;   // (M, D)
  DType dtype = DType::f32;
  const float* scale = nullptr;  // one number
  const float* bias = nullptr;   // one number; read by the sigmoid loss only
  Positives positives = Positives::diagonal;
  const int64_t* image_ids = nullptr;  // (N,); null: row i has the id i
  const int64_t* text_ids = nullptr;   // (M,); null: column j has the id j
  const float* row_weight = nullptr;   // (N,) or null: ones
  const float* col_weight = nullptr;   // (M,) or null: ones
  int64_t workspace = 0;               // bytes the blocks are sized for
  bool fused = false;                  // similarity by our own mma.sync tiles, 16-bit inputs only
  Gemm gemm;
  void* stream = nullptr;
};

enum class Reduction { mean, sum, none };

struct ClipOptions {
  bool rows = true, cols = true;  // image to text, text to image
  Reduction reduction = Reduction::mean;
  float smoothing = 0.f;
};

constexpr int kContrastiveMetrics = 10;

// Bytes of scratch of each function below, with the `pass` that it names: within call.workspace
// where blocks can be made that small, plus the fp32 accumulator of dLoss/dtext for 16-bit
// gradients, plus O(N + M).
int64_t contrastive_scratch_bytes(const ContrastiveCall& call, ContrastivePass pass, bool metrics);

// InfoNCE. Fills `row` (N) and `col` (M); losses (N + M), which is the result for
// Reduction::none; loss (one number) otherwise; metrics (kContrastiveMetrics) or null. Pass: {}.
const char* clip_forward(const ContrastiveCall& call, const ClipOptions& options,
                         const SoftmaxStats& row, const SoftmaxStats& col, float* losses,
                         float* loss, float* metrics, void* scratch);

// Gradients of InfoNCE times `grad` (one number, or (N + M) for Reduction::none), in the dtype of
// the inputs, and of the scale (one number, or null). Pass: what `out` asks for.
const char* clip_backward(const ContrastiveCall& call, const ClipOptions& options,
                          const SoftmaxStats& row, const SoftmaxStats& col, const float* grad,
                          const ContrastiveGrads& out, float* scale_grad, void* scratch);

// The row direction of InfoNCE with its gradients in one pass: loss (one number), gradients with
// respect to the similarity, sums (2): of G * S, and the divisor that none of them has seen. Pass:
// whole_columns (here whole rows) and what `out` asks for.
const char* clip_one_way(const ContrastiveCall& call, const ClipOptions& options, float* loss,
                         const ContrastiveGrads& out, double* sums, void* scratch);

// The sigmoid loss: row_loss (N,), loss (one number, or null), and where `out` asks for gradients
// those with respect to the similarity and sums (2): of G * S and of G. `row_grad` (N,) or null
// multiplies the row weights. Pass: what `out` asks for.
const char* siglip_pass(const ContrastiveCall& call, Reduction reduction, const float* row_grad,
                        float* row_loss, float* loss, const ContrastiveGrads& out, double* sums,
                        float* metrics, void* scratch);

// What gradients that a forward formed still lack, times `grad` (one number, or null for 1):
// factors (3): of the features, of the scale's sum and of the bias's sum. The divisor is
// *divisor, or if that is null the sum of row_weight (N,), or if `reduction` is not mean 1.
// scale_grad and bias_grad (one number each) may be null.
struct FormedGrads {
  const float* grad = nullptr;
  const float* scale = nullptr;
  const double* sums = nullptr;
  const double* divisor = nullptr;
  const float* row_weight = nullptr;
  int64_t rows = 0;
  Reduction reduction = Reduction::mean;
  float* scale_grad = nullptr;
  float* bias_grad = nullptr;
};

// to[i] = from[i] * what is still missing, rounded once, for `image` and `text`, each (from, to) of
// equal shape and contiguous, or null.
struct FormedMatrix {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t count = 0;
};

const char* finish_formed(const FormedGrads& formed, FormedMatrix image, FormedMatrix text,
                          DType from, DType to, double* factor, void* stream);

}  // namespace cuda
}  // namespace vlm
