// Contrastive losses over an N x M similarity matrix that is never held: InfoNCE (CLIP, Radford et
// al. 2021) and sigmoid (SigLIP, Zhai et al. 2023). Torch-free: pointers, strides, sizes, scratch.
//
// similarity S = sign(scale) * image text^T, so that |scale| * S is the scaled logit in both signs.
#pragma once

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
}  // namespace vlm
