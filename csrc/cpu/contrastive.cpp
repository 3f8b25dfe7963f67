// CPU kernels of the contrastive losses, compiled once per ISA.
//
// The similarity is walked in blocks of `bm` rows (image) x `bn` columns (text). A block of text is
// packed once and all images stream past it. Per block:
//   1. threads own row tiles: S (128 x 256 at a time) -> epilogue -> G = dLoss/dS, dX += G Y;
//   2. threads own column panels: dY^T += X^T G.
// Sums run over rows and columns in an order that only the shapes and the workspace decide, so the
// result does not depend on the number of threads.
#include "vlm/contrastive.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

#ifdef VLM_ISA
#include "cpu/matmul.h"
#include "cpu/pack.h"

namespace vlm::cpu::VLM_ISA {
namespace {

constexpr int64_t kRows = 128;      // rows of a tile
constexpr int64_t kTilePanels = 2;  // panels an epilogue sees at once
constexpr int64_t kTileCols = kTilePanels * kPanel;
constexpr int64_t kSplit = 256;  // columns of X one unit of dY^T takes
constexpr int64_t kTerms =
    512;                      // of S summed in a row at most: sums of one sign drift as they grow
constexpr int64_t kPad = 32;  // keeps leading dimensions off multiples of a page
constexpr int64_t kMaxBlock = 8192;

static_assert(kPanel == kKeptPanelColumns);

// A tile of S: rows [row, row + rows), columns [col, col + 64 * panels), in panels of 64 columns.
struct Tile {
  const float* s;
  int64_t panel_stride;
  int64_t row, rows, col, panels;

  VLM_INLINE vf at(const Tile& t, int64_t r, int64_t p, int64_t v) {
    return load(t.s + p * t.panel_stride + r * kPanel + v * kLanes);
  }
};

// Which entries of a tile are positives and which are left out.
struct Masks {
  Positives kind;
  const int32_t* row_ids;
  const int32_t* col_ids;  // padded to whole panels
  int64_t cols;            // M: columns from here on are padding

  // Whether the tile holds positives, excluded pairs or padding.
  bool touches(const Tile& t) const {
    const int64_t end = t.col + t.panels * kPanel;
    return kind != Positives::diagonal || end > cols || (t.row < end && t.col < t.row + t.rows);
  }

  VLM_INLINE void get(const Masks& m, int64_t row, int64_t col, vi& positive, vi& excluded) {
    const vi j = iota(static_cast<int32_t>(col));
    excluded = ~less(j, static_cast<int32_t>(m.cols));
    positive = equal(j, static_cast<int32_t>(row));
    if (m.kind != Positives::diagonal) {
      const vi same = equal(load(m.col_ids + col), m.row_ids[row]);
      if (m.kind == Positives::ids) {
        positive = same;
      } else {
        excluded |= same & ~positive;
      }
    }
    positive &= ~excluded;
  }
};

// ---------------------------------------------------------------------------------------------
// Forward of InfoNCE: softmax statistics.

constexpr int kFields = 5;  // what a row tile hands on for its columns
enum { kMax, kSum, kEntropy, kBestPositive, kBestNegative };

struct StatsTile {
  Masks masks;
  SoftmaxStats row, col;
  int64_t bn;
  float log2_scale;  // |scale| * log2(e)

  bool metrics() const { return row.entropy != nullptr; }

  // Log-sum-exp of both directions with a shift each: one shared shift underflows at scale 100.
  template <bool kMasked, bool kRow, bool kCol>
  void softmax(const Tile& t, float* part) const {
    const vf c = broadcast(log2_scale);
    const float minus_inf = -__builtin_inff();  // marks excluded entries
    const auto s = [&](int64_t r, int64_t p, int64_t v) __attribute__((always_inline)) {
      const vf x = Tile::at(t, r, p, v);
      if (!kMasked) return x;
      vi positive, excluded;
      Masks::get(masks, t.row + r, t.col + p * kPanel + v * kLanes, positive, excluded);
      return select(excluded, broadcast(minus_inf), x);
    };
    const auto exponential = [&](vf x, vf shift) __attribute__((always_inline)) {
      const vf e = exp2((x - shift) * c);
      return kMasked ? select(equal(x, minus_inf), vf{}, e) : e;
    };
    alignas(64) float row_max[kRows];
    vf col_max[kTileCols / kLanes];
    for (vf& x : col_max) x = broadcast(kLowest);
    for (int64_t r = 0; r < t.rows; ++r) {
      vf best = broadcast(kLowest);
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const vf x = s(r, p, v);
          if (kRow) best = max(best, x);
          if (kCol) col_max[4 * p + v] = max(col_max[4 * p + v], x);
        }
      }
      if (kRow) row_max[r] = hmax(best);
    }
    if (kRow) {  // the running sums move to the new maxima
      for (int64_t r = 0; r < t.rows; ++r) {
        const float old = row.max[t.row + r];
        const float now = row_max[r] > old ? row_max[r] : old;
        row_max[r] = now;
        if (now == old) continue;
        const float shift = (old - now) * log2_scale;
        const float factor = exp2(broadcast(shift))[0];
        if (row.entropy) {
          const float moved = shift > -126.f ? shift * (1.f / kLog2e) * row.sum[t.row + r] : 0.f;
          row.entropy[t.row + r] = factor * (row.entropy[t.row + r] + moved);
        }
        row.sum[t.row + r] *= factor;
        row.max[t.row + r] = now;
      }
    }
    vf col_sum[kTileCols / kLanes] = {};
    for (int64_t r = 0; r < t.rows; ++r) {
      const vf shift = broadcast(kRow ? row_max[r] : 0.f);
      vf sum = {};
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const vf x = s(r, p, v);
          if (kRow) sum += exponential(x, shift);
          if (kCol) col_sum[4 * p + v] += exponential(x, col_max[4 * p + v]);
        }
      }
      if (kRow) row.sum[t.row + r] += hsum(sum);
    }
    if (kCol) {
      for (int64_t v = 0; v < 4 * t.panels; ++v) {
        store(part + kMax * bn + v * kLanes, col_max[v]);
        store(part + kSum * bn + v * kLanes, col_sum[v]);
      }
    }
  }

  // Entropy and best positive and negative, only when metrics are asked for.
  void measures(const Tile& t, float* part) const {
    const vf c = broadcast(log2_scale), lowest = broadcast(kLowest);
    const float to_nats = 1.f / kLog2e;
    for (int64_t p = 0; p < t.panels; ++p) {
      for (int64_t v = 0; v < kPanel / kLanes; ++v) {
        const int64_t at = p * kPanel + v * kLanes;
        const vf col_max = load(part + kMax * bn + at);
        vf sum = {}, best_positive = lowest, best_negative = lowest;
        for (int64_t r = 0; r < t.rows; ++r) {
          vi positive, excluded;
          Masks::get(masks, t.row + r, t.col + at, positive, excluded);
          const vf x = Tile::at(t, r, p, v);
          const vf y = (x - col_max) * c;
          sum += select(excluded, vf{}, exp2(y) * y);
          best_positive = max(best_positive, select(positive, x, lowest));
          best_negative = max(best_negative, select(positive | excluded, lowest, x));
        }
        store(part + kEntropy * bn + at, sum * to_nats);
        store(part + kBestPositive * bn + at, best_positive);
        store(part + kBestNegative * bn + at, best_negative);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const vf row_max = broadcast(row.max[t.row + r]);
      vf sum = {}, best_positive = lowest, best_negative = lowest;
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          vi positive, excluded;
          Masks::get(masks, t.row + r, t.col + p * kPanel + v * kLanes, positive, excluded);
          const vf x = Tile::at(t, r, p, v);
          const vf y = (x - row_max) * c;
          sum += select(excluded, vf{}, exp2(y) * y);
          best_positive = max(best_positive, select(positive, x, lowest));
          best_negative = max(best_negative, select(positive | excluded, lowest, x));
        }
      }
      row.entropy[t.row + r] += hsum(sum) * to_nats;
      float& positive = row.best_positive[t.row + r];
      float& negative = row.best_negative[t.row + r];
      positive = hmax(max(broadcast(positive), best_positive));
      negative = hmax(max(broadcast(negative), best_negative));
    }
  }

  // Sums of S over positives and over kept entries.
  void sums(const Tile& t, float* positive_part, float* kept_part) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      vf positive_sum = {}, kept_sum = {};
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const int64_t at = p * kPanel + v * kLanes;
          vi positive, excluded;
          Masks::get(masks, t.row + r, t.col + at, positive, excluded);
          const vf x = Tile::at(t, r, p, v);
          const vf a = select(positive, x, vf{}), b = select(excluded, vf{}, x);
          positive_sum += a;
          kept_sum += b;
          store(positive_part + at, load(positive_part + at) + a);
          if (kept_part) store(kept_part + at, load(kept_part + at) + b);
        }
      }
      row.positive[t.row + r] += hsum(positive_sum);
      if (kept_part) row.kept[t.row + r] += hsum(kept_sum);
    }
  }

  // part: (kFields + 2, bn) column statistics of this row tile, at the tile's first column.
  void run(const Tile& t, float* part) const {
    const bool masked = masks.touches(t), rows = row.max, cols = col.max;
    if (rows && cols) {
      masked ? softmax<true, true, true>(t, part) : softmax<false, true, true>(t, part);
    } else if (rows) {
      masked ? softmax<true, true, false>(t, part) : softmax<false, true, false>(t, part);
    } else {
      masked ? softmax<true, false, true>(t, part) : softmax<false, false, true>(t, part);
    }
    if (metrics()) measures(t, part);
    float* positive_part = part + kFields * bn;
    float* kept_part = row.kept ? part + (kFields + 1) * bn : nullptr;
    if (masked || kept_part) {
      for (int64_t p = 0; p < t.panels * kPanel; ++p) {
        positive_part[p] = 0.f;
        if (kept_part) kept_part[p] = 0.f;
      }
      sums(t, positive_part, kept_part);
    } else {
      for (int64_t p = 0; p < t.panels * kPanel; ++p) positive_part[p] = 0.f;
    }
  }

  // Merges the row tiles' statistics of columns [col, col + 16), in order.
  void merge(int64_t column, int64_t tiles, const float* parts, int64_t count) const {
    const vf c = broadcast(log2_scale);
    const auto get = [&](const float* p) {
      alignas(64) float tail[kLanes] = {};
      std::memcpy(tail, p + column, count * sizeof(float));
      return load(tail);
    };
    const auto put = [&](float* p, vf x) { std::memcpy(p + column, &x, count * sizeof(float)); };
    vf best = {}, sum = {}, entropy = {}, best_positive = {}, best_negative = {};
    if (col.max) best = get(col.max), sum = get(col.sum);
    if (col.entropy) {
      entropy = get(col.entropy);
      best_positive = get(col.best_positive);
      best_negative = get(col.best_negative);
    }
    vf positive = get(col.positive), kept = col.kept ? get(col.kept) : vf{};
    for (int64_t t = 0; t < tiles; ++t, parts += (kFields + 2) * bn) {
      if (col.max) {
        const vf other = load(parts + kMax * bn), other_sum = load(parts + kSum * bn);
        const vf now = max(best, other);
        const vf a = (best - now) * c, b = (other - now) * c;
        const vf fa = exp2(a), fb = exp2(b);
        if (col.entropy) {
          const vf zero = {};
          const vf moved_a = select(less(-126.f, a), a * (1.f / kLog2e) * sum, zero);
          const vf moved_b = select(less(-126.f, b), b * (1.f / kLog2e) * other_sum, zero);
          entropy = fa * (entropy + moved_a) + fb * (load(parts + kEntropy * bn) + moved_b);
          best_positive = max(best_positive, load(parts + kBestPositive * bn));
          best_negative = max(best_negative, load(parts + kBestNegative * bn));
        }
        sum = sum * fa + other_sum * fb;
        best = now;
      }
      positive += load(parts + kFields * bn);
      if (col.kept) kept += load(parts + (kFields + 1) * bn);
    }
    if (col.max) put(col.max, best), put(col.sum, sum);
    if (col.entropy) {
      put(col.entropy, entropy);
      put(col.best_positive, best_positive);
      put(col.best_negative, best_negative);
    }
    put(col.positive, positive);
    if (col.kept) put(col.kept, kept);
  }
};

// ---------------------------------------------------------------------------------------------
// Gradient epilogues: S -> G.

// Where an epilogue puts G: row-major, the A operand of dX = G Y, and as panels, the B operand of
// dY^T = X^T G. All pointers are at the tile's first entry.
template <class T>
struct GradTile {
  T* rows;
  int64_t ld;
  uint32_t* panels;      // null: dY is not needed
  int64_t panel_stride;  // words from one panel to the next

  // Rows r and r + 1 (r even) at panel p, vector v.
  VLM_INLINE void put(const GradTile& g, int64_t r, int64_t p, int64_t v, vf x, vf y) {
    const int64_t at = r * g.ld + p * kPanel + v * kLanes;
    const int64_t panel = p * g.panel_stride + r / kPerWord<T> * kPanel + v * kLanes;
    if constexpr (sizeof(T) == 4) {
      store(g.rows + at, x);
      store(g.rows + at + g.ld, y);
      if (g.panels) {
        store(g.panels + panel, (vu)x);
        store(g.panels + panel + kPanel, (vu)y);
      }
    } else {
      const vh a = to_bf16_native(x), b = to_bf16_native(y);
      store(g.rows + at, a);
      store(g.rows + at + g.ld, b);
      if (g.panels) {
        store(g.panels + panel, convert<vu>(a) | convert<vu>(b) << 16);
      }
    }
  }
};

// InfoNCE: G = a_i exp(.) + b_j exp(.) - kept terms - positive terms.
struct ClipEpilogue {
  Masks masks;
  SoftmaxGrad row, col;  // columns padded to whole panels
  float log2_scale;
  float* similarity;  // (N,) sums of G * S

  template <class T, bool kMasked, bool kRow, bool kCol>
  void tile(const Tile& t, const GradTile<T>& out) const {
    const vf c = broadcast(log2_scale);
    for (int64_t r = 0; r < t.rows; r += 2) {
      vf sums[2] = {};
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const int64_t j = t.col + p * kPanel + v * kLanes;
          vf g[2] = {};
          for (int64_t h = 0; h < 2; ++h) {
            if (r + h >= t.rows) break;
            const int64_t i = t.row + r + h;
            const vf x = Tile::at(t, r + h, p, v);
            vf y = {};
            if (kRow) y += row.softmax[i] * exp2((x - row.max[i]) * c);
            if (kCol) y += load(col.softmax + j) * exp2((x - load(col.max + j)) * c);
            if (kMasked) {
              vi positive, excluded;
              Masks::get(masks, i, j, positive, excluded);
              const vf zero = {};
              if (row.kept) y -= row.kept[i];
              if (col.kept) y -= load(col.kept + j);
              vf taken = zero;
              if (kRow) taken += row.positive[i];
              if (kCol) taken += load(col.positive + j);
              y = y - select(positive, taken, zero);
              y = select(excluded, zero, y);
              sums[h] += select(excluded, zero, y * x);
            } else {
              sums[h] += y * x;
            }
            g[h] = y;
          }
          GradTile<T>::put(out, r, p, v, g[0], g[1]);
        }
      }
      similarity[t.row + r] += hsum(sums[0]);
      if (r + 1 < t.rows) similarity[t.row + r + 1] += hsum(sums[1]);
    }
  }

  // Both directions from one exponential: with h = max_i, k = max_j and u = exp((h - k) / 2),
  //   a exp(x - h) + b exp(x - k) = exp(x - (h + k) / 2) (a / u + b u),
  // and u is a row's factor times a column's. The rounding of (h + k) / 2 costs fp32's last digits,
  // which G in 16 bits does not have. False where the maxima are too far apart for the exponent.
  template <class T>
  bool tile_of_one_exponential(const Tile& t, const GradTile<T>& out) const {
    constexpr float kRange = 60.f;
    const vf c = broadcast(log2_scale);
    const int64_t cols = t.panels * kPanel;
    vf least = broadcast(kLowest), most = broadcast(kLowest);  // of -max and of max, never NaN
    const auto widen = [&](const float* maxima, int64_t count) {
      for (int64_t v = 0; v < count; v += kLanes) {
        vf x = broadcast(maxima[v]);
        std::memcpy(&x, maxima + v, min(kLanes, count - v) * sizeof(float));
        least = max(least, -x);
        most = max(most, x);
      }
    };
    widen(row.max + t.row, t.rows);
    widen(col.max + t.col, cols);
    const float from = -hmax(least), to = hmax(most);
    if (!((to - from) * log2_scale <= kRange)) return false;
    const vf middle = broadcast(0.5f * (from + to)), half = 0.5f * c;
    alignas(64) float row_factor[kRows], half_max[kTileCols], factor[kTileCols], ratio[kTileCols];
    for (int64_t v = 0; v < t.rows; v += kLanes) {
      vf x = {};
      std::memcpy(&x, row.max + t.row + v, min(kLanes, t.rows - v) * sizeof(float));
      store(row_factor + v, exp2((x - middle) * half));
    }
    for (int64_t v = 0; v < cols; v += kLanes) {
      const vf x = load(col.max + t.col + v), u = exp2((x - middle) * half);
      store(half_max + v, x * 0.5f);
      store(factor + v, u);
      store(ratio + v, load(col.softmax + t.col + v) / u);
    }
    for (int64_t r = 0; r < t.rows; r += 2) {
      vf sums[2] = {}, u[2] = {}, a[2] = {}, h[2] = {};
      const int64_t pair = min(2, t.rows - r);
      for (int64_t k = 0; k < pair; ++k) {
        u[k] = broadcast(row_factor[r + k]);
        a[k] = broadcast(row.softmax[t.row + r + k] / row_factor[r + k]);
        h[k] = broadcast(row.max[t.row + r + k] * 0.5f);
      }
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const int64_t j = p * kPanel + v * kLanes;
          const vf kj = load(half_max + j), uj = load(factor + j), bj = load(ratio + j);
          vf g[2] = {};
          for (int64_t k = 0; k < pair; ++k) {
            const vf x = Tile::at(t, r + k, p, v);
            g[k] = exp2((x - (h[k] + kj)) * c) * (a[k] * uj + u[k] * bj);
            sums[k] += g[k] * x;
          }
          GradTile<T>::put(out, r, p, v, g[0], g[1]);
        }
      }
      for (int64_t k = 0; k < pair; ++k) similarity[t.row + r + k] += hsum(sums[k]);
    }
    return true;
  }

  template <class T>
  void run(const Tile& t, const GradTile<T>& out) const {
    const bool masked = masks.touches(t) || row.kept || col.kept;
    if (row.max && col.max) {
      if constexpr (sizeof(T) == 2) {
        if (!masked && tile_of_one_exponential(t, out)) return;
      }
      masked ? tile<T, true, true, true>(t, out) : tile<T, false, true, true>(t, out);
    } else if (row.max) {
      masked ? tile<T, true, true, false>(t, out) : tile<T, false, true, false>(t, out);
    } else {
      masked ? tile<T, true, false, true>(t, out) : tile<T, false, false, true>(t, out);
    }
  }
};

// Sigmoid: the loss of a pair is softplus(t), t = -logit for a positive and logit otherwise.
struct SigmoidEpilogue {
  Masks masks;
  const float* row_weight;  // or null
  const float* col_weight;  // padded to whole panels, or null
  float scale, bias;
  float* row_loss;
  float* similarity;  // (N,) sums of G * S, or null
  float* logit;       // (N,) sums of G, or null

  template <class T, bool kPlain, bool kGrad>
  void tile(const Tile& t, const GradTile<T>& out) const {
    const vf zero = {};
    for (int64_t r = 0; r < t.rows; r += 2) {
      vf losses[2] = {}, products[2] = {}, by_similarity[2] = {}, by_logit[2] = {};
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) {
          const int64_t j = t.col + p * kPanel + v * kLanes;
          vf g[2] = {};
          for (int64_t h = 0; h < 2; ++h) {
            if (r + h >= t.rows) break;
            const int64_t i = t.row + r + h;
            const vf x = Tile::at(t, r + h, p, v);
            vf z = x * scale + bias, w = broadcast(row_weight ? row_weight[i] : 1.f);
            vi positive = {}, excluded = {};
            if (!kPlain) {
              Masks::get(masks, i, j, positive, excluded);
              z = select(positive, -z, z);
              if (col_weight) w *= load(col_weight + j);
            }
            const vi above = less(0.f, z);
            const vf e = exp(select(above, -z, z)), linear = select(above, z, zero);
            if (kPlain) {  // the logarithm of a product, kept as what it is above 1
              losses[h] += linear;
              products[h] += e * products[h] + e;
            } else {
              losses[h] += select(excluded, zero, w * (linear + log1p_unit(e)));
            }
            if constexpr (kGrad) {
              const vf inverse = reciprocal(e + 1.f);
              vf y = w * select(above, inverse, e * inverse);
              if (!kPlain) {
                y = select(positive, -y, y);
                y = select(excluded, zero, y);
              }
              by_similarity[h] += kPlain ? y * x : select(excluded, zero, y * x);
              by_logit[h] += y;
              g[h] = y;
            }
          }
          if constexpr (kGrad) GradTile<T>::put(out, r, p, v, g[0], g[1]);
        }
      }
      for (int64_t h = 0; h < 2 && r + h < t.rows; ++h) {
        const int64_t i = t.row + r + h;
        if (kPlain) {
          const float w = row_weight ? row_weight[i] : 1.f;
          row_loss[i] += w * hsum(losses[h] + log1p(products[h]));
        } else {
          row_loss[i] += hsum(losses[h]);
        }
        if (kGrad) {
          similarity[i] += hsum(by_similarity[h]);
          logit[i] += hsum(by_logit[h]);
        }
      }
    }
  }

  template <class T, bool kGrad>
  void run(const Tile& t, const GradTile<T>& out) const {
    static_assert(kTileCols / kLanes <= 100);  // a product of as many factors, each at most 2
    const bool plain = !masks.touches(t) && !col_weight;
    plain ? tile<T, true, kGrad>(t, out) : tile<T, false, kGrad>(t, out);
  }
};

// ---------------------------------------------------------------------------------------------
// Blocks.

using Pass = ContrastivePass;

// Scratch of one call, carved for `threads` threads.
template <class T>
struct Scratch {
  uint32_t* text_t;       // text^T as B operand of S: [panel][D words][64]
  T* text_rows;           // text as B operand of dX: [D / 64][bn][64]
  T* image_t;             // image^T as A operand of dY^T: [block of rows, or 1](D, bm + pad)
  uint32_t* grad_panels;  // G as B operand of dY^T: [panel][bm][64]
  float* text_grad;       // dY^T of the block: [panel][D][64]
  float* image_grad;      // dX (N, D) of 16-bit inputs
  float* columns;         // S of whole columns: [panel][N][64]
  float* partial;         // statistics: (bm / 128, kFields + 2, bn)
  float* row_vectors;     // up to 3 x N
  float* col_vectors;     // up to 4 x M padded
  int32_t* col_ids;       // M padded
  char* per_thread;
  int64_t per_thread_bytes;

  T* image_rows(int thread) const {
    return reinterpret_cast<T*>(per_thread + thread * per_thread_bytes);
  }
};

struct Plan {
  int64_t n, m, d;
  int64_t bm, bn;
  int64_t depth;        // rows that one multiply of dY^T sums
  int64_t image_ld;     // of converted image rows
  bool transpose_once;  // image^T of all rows is kept, not of one block
  Pass pass;
  bool f32_out;

  int64_t words(int64_t per_word) const { return ceil_div(d, per_word); }
  int64_t image_t_size() const { return d * (bm + kPad); }
};

template <class T>
int64_t carve(const Plan& p, int threads, char* base, Scratch<T>* out) {
  Arena arena{base};
  Scratch<T> s{};
  const int64_t panels = p.bn / kPanel;
  s.text_t = arena.take<uint32_t>(panels * p.words(kPerWord<T>) * kPanel);
  if (p.pass.image) s.text_rows = arena.take<T>(ceil_div(p.d, kPanel) * p.bn * kPanel);
  if (p.pass.image && !p.f32_out) s.image_grad = arena.take<float>(p.n * p.d);
  if (p.pass.text) {
    s.image_t = arena.take<T>((p.transpose_once ? ceil_div(p.n, p.bm) : 1) * p.image_t_size());
    s.grad_panels = arena.take<uint32_t>(panels * p.bm / kPerWord<T> * kPanel);
    s.text_grad = arena.take<float>(panels * p.d * kPanel);
  }
  if (p.pass.whole_columns) s.columns = arena.take<float>(panels * p.n * kPanel);
  s.partial = arena.take<float>(p.bm / kRows * (kFields + 2) * p.bn);
  s.row_vectors = arena.take<float>(3 * p.n);
  s.col_vectors = arena.take<float>(4 * round_up(p.m, kPanel));
  s.col_ids = arena.take<int32_t>(round_up(p.m, kPanel));
  Arena thread{nullptr};
  thread.take<T>(kRows * p.image_ld);
  thread.take<float>(kRows * kTileCols);
  if (p.pass.grads) thread.take<T>(kRows * (p.bn + kPad));
  s.per_thread_bytes = thread.used;
  s.per_thread = arena.take<char>(threads * thread.used);
  if (out) *out = s;
  return arena.used;
}

template <class T>
Plan make_plan(const ContrastiveInputs& in, Pass pass) {
  const int64_t budget = in.scratch_budget;
  Plan p{};
  p.n = in.image.rows, p.m = in.text.rows, p.d = in.image.cols;
  p.pass = pass;
  p.f32_out = in.dtype == DType::f32 || pass.f32_grads;
  p.image_ld = round_up(p.d, kLanes);
  const int64_t most_rows = round_up(p.n, kRows), most_cols = round_up(p.m, kTileCols);
  // The block's columns, and the rows summed at once decide the order of sums: never the threads.
  int64_t block = 2048 / sizeof(T);  // measured: 2 KiB of G a row; twice and half lose 3 to 10 %
  const auto bytes = [&](int64_t rows, int threads) {
    p.bn = min(block, most_cols);
    p.bm = min(rows, most_rows);
    const int64_t outputs = pass.image && !p.f32_out ? 4 * p.n * p.d : 0;
    return carve<T>(p, threads, nullptr, nullptr) - outputs;
  };
  while (block > kTileCols && bytes(block, 2) > budget) block /= 2;
  p.depth = block;
  const int threads = num_threads();
  const int64_t wanted = pass.grads ? 2 * kRows * threads : kMaxBlock;
  int64_t rows = block;
  while (rows < min(wanted, kMaxBlock) && rows < most_rows && bytes(2 * rows, threads) <= budget) {
    rows *= 2;
  }
  bytes(rows, threads);
  p.transpose_once = true;
  p.transpose_once = bytes(rows, threads) <= budget;
  return p;
}

template <class T>
class Blocks {
 public:
  Blocks(const ContrastiveInputs& in, Pass pass, void* workspace)
      : in_(in), plan_(make_plan<T>(in, pass)), gemm_{brgemm_runs_f32()} {
    carve<T>(plan_, num_threads(), static_cast<char*>(workspace), &scratch_);
    masks_ = {in.positives, in.image_ids, scratch_.col_ids, plan_.m};
    if (in.positives != Positives::diagonal) {
      std::memcpy(scratch_.col_ids, in.text_ids, plan_.m * sizeof(int32_t));
    }
  }

  const Plan& plan() const { return plan_; }
  const Masks& masks() const { return masks_; }

  // A zeroed (N,) vector.
  float* row_vector(int index) const {
    float* v = scratch_.row_vectors + index * plan_.n;
    std::memset(v, 0, plan_.n * sizeof(float));
    return v;
  }

  // A copy of an (M,) vector, padded to whole panels with zeros; null stays null.
  float* col_vector(int index, const float* values) const {
    if (!values) return nullptr;
    const int64_t padded = round_up(plan_.m, kPanel);
    float* v = scratch_.col_vectors + index * padded;
    std::memcpy(v, values, plan_.m * sizeof(float));
    std::memset(v + plan_.m, 0, (padded - plan_.m) * sizeof(float));
    return v;
  }

  // Shows every tile of S to `epilogue` and, where given, to `stats`; fills `kept`.
  template <class Epilogue>
  void forward(const KeptSimilarity& kept, const StatsTile* stats, const Epilogue& epilogue) const {
    for_text_blocks([&](int64_t j0, int64_t panels) {
      for_image_blocks([&](int64_t i0, int64_t rows) {
        forward_block(j0, panels, i0, rows, kept, stats, epilogue);
      });
    });
  }

  // The same, and G of every tile into the gradients.
  template <class Epilogue>
  void grads(const KeptSimilarity& kept, const StatsTile* stats, const ContrastiveGrads& out,
             const Epilogue& epilogue) const {
    for_text_blocks([&](int64_t j0, int64_t panels) {
      for_image_blocks([&](int64_t i0, int64_t rows) {
        grads_block(j0, panels, i0, rows, kept, stats, out, epilogue);
      });
    });
    round_image_grads(out.image);
  }

  // Statistics of whole columns, `between` them on columns [j, end), then their gradients from the
  // similarity that was kept meanwhile.
  template <class Between, class Epilogue>
  void columns(const StatsTile& stats, const ContrastiveGrads& out, const Between& between,
               const Epilogue& epilogue) const {
    for_text_blocks([&](int64_t j0, int64_t panels) {
      const KeptSimilarity kept{scratch_.columns, panels, j0 / kPanel};
      for_image_blocks([&](int64_t i0, int64_t rows) {
        forward_block(j0, panels, i0, rows, kept, &stats, [](const Tile&) {});
      });
      between(j0, min(plan_.m, j0 + panels * kPanel));
      for_image_blocks([&](int64_t i0, int64_t rows) {
        grads_block(j0, panels, i0, rows, kept, nullptr, out, epilogue);
      });
    });
    round_image_grads(out.image);
  }

 private:
  struct RowTile {
    const T* a;
    int64_t lda, row, rows;
  };

  void observe(const StatsTile* stats, const Tile& tile, int64_t t, int64_t p) const {
    if (stats) stats->run(tile, scratch_.partial + t * (kFields + 2) * plan_.bn + p * kPanel);
  }

  void merge(const StatsTile* stats, int64_t j0, int64_t panels, int64_t rows) const {
    if (!stats) return;
    const int64_t end = min(plan_.m - j0, panels * kPanel);
    parallel_for(ceil_div(end, kLanes), [&](int64_t v, int) {
      const int64_t at = v * kLanes;
      stats->merge(j0 + at, ceil_div(rows, kRows), scratch_.partial + at, min(kLanes, end - at));
    });
  }

  // body(j0, panels) for each block of text, packed.
  template <class Body>
  void for_text_blocks(const Body& body) const {
    for (int64_t j0 = 0; j0 < plan_.m; j0 += plan_.bn) {
      const int64_t panels = ceil_div(min(plan_.bn, plan_.m - j0), kPanel);
      parallel_for(panels, [&](int64_t p, int) {
        pack_transposed_panel<T>(in_.text, in_.dtype, j0 + p * kPanel, in_.scale < 0.f,
                                 text_panel(p));
        if (plan_.pass.image) {
          pack_panel_rows<T>(in_.text, in_.dtype, j0 + p * kPanel, p * kPanel, plan_.bn,
                             scratch_.text_rows);
        }
      });
      body(j0, panels);
    }
  }

  template <class Body>
  void for_image_blocks(const Body& body) const {
    for (int64_t i0 = 0; i0 < plan_.n; i0 += plan_.bm) body(i0, min(plan_.bm, plan_.n - i0));
  }

  template <class Epilogue>
  void forward_block(int64_t j0, int64_t panels, int64_t i0, int64_t rows,
                     const KeptSimilarity& kept, const StatsTile* stats,
                     const Epilogue& epilogue) const {
    parallel_for(ceil_div(rows, kRows), [&](int64_t t, int thread) {
      const RowTile row = row_tile(i0 + t * kRows, i0 + rows, thread);
      for (int64_t p = 0; p < panels; p += kTilePanels) {
        const Tile tile = similarity(row, j0, p, min(kTilePanels, panels - p), kept, true, thread);
        epilogue(tile);
        observe(stats, tile, t, p);
      }
      gemm_.release();
    });
    merge(stats, j0, panels, rows);
  }

  template <class Epilogue>
  void grads_block(int64_t j0, int64_t panels, int64_t i0, int64_t rows, const KeptSimilarity& kept,
                   const StatsTile* stats, const ContrastiveGrads& out,
                   const Epilogue& epilogue) const {
    float* dx = plan_.f32_out ? static_cast<float*>(out.image.data) : scratch_.image_grad;
    const int64_t dx_ld = plan_.f32_out ? out.image.stride : plan_.d;
    const int64_t cols = panels * kPanel, depth = round_up(rows, kLanes);
    parallel_for(ceil_div(rows, kRows), [&](int64_t t, int thread) {
      const RowTile row = row_tile(i0 + t * kRows, i0 + rows, thread);
      const int64_t local = t * kRows;
      if (plan_.pass.text && (j0 == 0 || !plan_.transpose_once)) {
        pack_transposed<T>(in_.image, in_.dtype, row.row, row.rows, image_t(i0) + local,
                           plan_.bm + kPad);
      }
      const GradTile<T> g = grad_tile(local, thread);
      for (int64_t p = 0; p < panels; p += kTilePanels) {
        const Tile tile = similarity(row, j0, p, min(kTilePanels, panels - p), kept, false, thread);
        epilogue(tile, at_panel(g, p));
        observe(stats, tile, t, p);
        clear_rows(at_panel(g, p), tile, min(depth - local, kRows));
      }
      for (int64_t k = 0; plan_.pass.image && k < plan_.d; k += kPanel) {
        gemm_({row.rows, min(kPanel, plan_.d - k), cols, g.ld, kPanel, dx_ld, j0 > 0}, g.rows,
              scratch_.text_rows + k * plan_.bn, dx + row.row * dx_ld + k);
      }
      gemm_.release();
    });
    merge(stats, j0, panels, rows);
    if (plan_.pass.text) text_grads(j0, panels, i0, rows, depth, out.text);
  }

  // dX of 16-bit inputs: from its fp32 sums to the output, rounded once.
  void round_image_grads(const MutableMatrixRef& out) const {
    if (!scratch_.image_grad) return;
    parallel_for(ceil_div(plan_.n, kRows), [&](int64_t t, int) {
      for (int64_t i = t * kRows; i < min(plan_.n, (t + 1) * kRows); ++i) {
        const char* sums = reinterpret_cast<const char*>(scratch_.image_grad + i * plan_.d);
        for (int64_t k = 0; k < plan_.d; k += kLanes) {
          store_as(out.data, in_.dtype, i * out.stride + k, load_f32(sums, DType::f32, k, plan_.d),
                   plan_.d - k);
        }
      }
    });
  }

  T* image_t(int64_t i0) const {
    return scratch_.image_t + (plan_.transpose_once ? i0 / plan_.bm * plan_.image_t_size() : 0);
  }

  uint32_t* text_panel(int64_t p) const {
    return scratch_.text_t + p * plan_.words(kPerWord<T>) * kPanel;
  }

  // The rows of the image as an A operand: in place where dtype and width allow, else converted.
  RowTile row_tile(int64_t row, int64_t end, int thread) const {
    const int64_t rows = min(kRows, end - row);
    const bool native = sizeof(T) == 4 ? in_.dtype == DType::f32 : in_.image.cols % 2 == 0;
    if (native) {
      const T* a = reinterpret_cast<const T*>(row_ptr(in_.image, in_.dtype, row));
      return {a, in_.image.stride, row, rows};
    }
    T* a = scratch_.image_rows(thread);
    pack_rows<T>(in_.image, in_.dtype, row, rows, a, plan_.image_ld);
    return {a, plan_.image_ld, row, rows};
  }

  // Panels [p, p + count) of the block's S for one row tile: from `kept`, into it (`fill`), or
  // computed into this thread's scratch.
  Tile similarity(const RowTile& row, int64_t j0, int64_t p, int64_t count,
                  const KeptSimilarity& kept, bool fill, int thread) const {
    float* s = reinterpret_cast<float*>(reinterpret_cast<char*>(scratch_.image_rows(thread)) +
                                        round_up(kRows * plan_.image_ld * sizeof(T), 64));
    int64_t stride = kRows * kPanel;
    const int64_t panel = j0 / kPanel + p;
    const bool held = kept.data && panel + count <= kept.first + kept.panels;
    if (held) {
      stride = plan_.n * kPanel;
      s = kept.data + (panel - kept.first) * stride + row.row * kPanel;
    }
    if (!held || fill) {
      const int64_t k = kPerWord<T> * plan_.words(kPerWord<T>);
      const int64_t terms = sizeof(T) == 4 ? round_up(ceil_div(k, ceil_div(k, kTerms)), kLanes) : k;
      for (int64_t q = 0; q < count; ++q) {
        const T* b = reinterpret_cast<const T*>(text_panel(p + q));
        for (int64_t first = 0; first < k; first += terms) {
          gemm_({row.rows, kPanel, min(terms, k - first), row.lda, kPanel, kPanel, first > 0},
                row.a + first, b + first * kPanel, s + q * stride);
        }
      }
    }
    return {s, stride, row.row, row.rows, j0 + p * kPanel, count};
  }

  // G of the row tile at row `local` of the block: row-major in this thread's scratch.
  GradTile<T> grad_tile(int64_t local, int thread) const {
    char* base = reinterpret_cast<char*>(scratch_.image_rows(thread));
    const int64_t offset = round_up(kRows * plan_.image_ld * sizeof(T), 64) +
                           round_up(kRows * kTileCols * sizeof(float), 64);
    uint32_t* panels = scratch_.grad_panels;
    return {reinterpret_cast<T*>(base + offset), plan_.bn + kPad,
            panels ? panels + local / kPerWord<T> * kPanel : nullptr,
            plan_.bm / kPerWord<T> * kPanel};
  }

  static GradTile<T> at_panel(GradTile<T> g, int64_t p) {
    g.rows += p * kPanel;
    if (g.panels) g.panels += p * g.panel_stride;
    return g;
  }

  // Zeros the rows between the last one and the multiply's depth.
  static void clear_rows(const GradTile<T>& g, const Tile& t, int64_t depth) {
    for (int64_t r = round_up(t.rows, 2); r < depth; r += 2) {
      for (int64_t p = 0; p < t.panels; ++p) {
        for (int64_t v = 0; v < kPanel / kLanes; ++v) GradTile<T>::put(g, r, p, v, vf{}, vf{});
      }
    }
  }

  // dY^T += X^T G for each panel of the block, and out once the last rows are in.
  void text_grads(int64_t j0, int64_t panels, int64_t i0, int64_t rows, int64_t depth,
                  const MutableMatrixRef& out) const {
    const int64_t d = plan_.d, splits = ceil_div(d, kSplit);
    parallel_for(panels * splits, [&](int64_t unit, int) {
      const int64_t p = unit % panels, first = unit / panels * kSplit;  // X^T stays in the cache
      float* c = scratch_.text_grad + p * d * kPanel + first * kPanel;
      for (int64_t k = 0; k < depth; k += plan_.depth) {
        const T* a = image_t(i0) + first * (plan_.bm + kPad) + k;
        const T* b = reinterpret_cast<const T*>(scratch_.grad_panels) + (p * plan_.bm + k) * kPanel;
        gemm_({min(kSplit, d - first), kPanel, min(plan_.depth, depth - k), plan_.bm + kPad, kPanel,
               kPanel, i0 + k > 0},
              a, b, c);
      }
      gemm_.release();
    });
    if (i0 + rows < plan_.n) return;
    parallel_for(panels, [&](int64_t p, int) {
      const int64_t row = j0 + p * kPanel;
      unpack_transposed_panel(scratch_.text_grad + p * d * kPanel, min(kPanel, plan_.m - row), out,
                              plan_.f32_out ? DType::f32 : in_.dtype, row);
    });
  }

  const ContrastiveInputs& in_;
  Plan plan_;
  Scratch<T> scratch_;
  Masks masks_;
  Gemm gemm_;
};

float magnitude(float x) { return x < 0.f ? -x : x; }

double total(const float* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

void fill(float* x, int64_t n, float value) {
  if (!x) return;
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

void clear(const SoftmaxStats& s, int64_t n) {
  fill(s.max, n, kLowest);
  fill(s.best_positive, n, kLowest);
  fill(s.best_negative, n, kLowest);
  fill(s.sum, n, 0.f);
  fill(s.positive, n, 0.f);
  fill(s.kept, n, 0.f);
  fill(s.entropy, n, 0.f);
}

template <class T>
StatsTile start_stats(const ContrastiveInputs& in, const Blocks<T>& blocks, const SoftmaxStats& row,
                      const SoftmaxStats& col) {
  clear(row, in.image.rows);
  clear(col, in.text.rows);
  return {blocks.masks(), row, col, blocks.plan().bn, magnitude(in.scale) * kLog2e};
}

template <class T>
void clip_stats_as(const ContrastiveInputs& in, const SoftmaxStats& row, const SoftmaxStats& col,
                   const KeptSimilarity& kept, void* scratch) {
  const Blocks<T> blocks(in, {}, scratch);
  const StatsTile stats = start_stats(in, blocks, row, col);
  blocks.forward(kept, &stats, [](const Tile&) {});
}

template <class T>
void clip_grads_as(const ContrastiveInputs& in, const SoftmaxGrad& row, const SoftmaxGrad& col,
                   const KeptSimilarity& kept, const ContrastiveGrads& out, void* scratch) {
  const Blocks<T> blocks(in, out.pass(), scratch);
  const SoftmaxGrad padded = {blocks.col_vector(0, col.max), blocks.col_vector(1, col.softmax),
                              blocks.col_vector(2, col.positive), blocks.col_vector(3, col.kept)};
  const ClipEpilogue epilogue{blocks.masks(), row, padded, magnitude(in.scale) * kLog2e,
                              blocks.row_vector(0)};
  blocks.grads(kept, nullptr, out,
               [&](const Tile& t, const GradTile<T>& g) { epilogue.template run<T>(t, g); });
  if (out.similarity) *out.similarity = total(epilogue.similarity, in.image.rows);
}

template <class T>
void clip_columns_as(const ContrastiveInputs& in, const SoftmaxStats& col,
                     const SoftmaxGrad& target, const ContrastiveGrads& out, void* scratch) {
  Pass pass = out.pass();
  pass.whole_columns = true;
  const Blocks<T> blocks(in, pass, scratch);
  SoftmaxStats row;
  row.positive = blocks.row_vector(1);
  row.kept = col.kept ? blocks.row_vector(2) : nullptr;
  const StatsTile stats = start_stats(in, blocks, row, col);
  float* shift = blocks.col_vector(0, col.max);
  float* softmax = blocks.col_vector(1, target.softmax);
  const ClipEpilogue epilogue{
      blocks.masks(),
      {},
      {shift, softmax, blocks.col_vector(2, target.positive), blocks.col_vector(3, target.kept)},
      magnitude(in.scale) * kLog2e,
      blocks.row_vector(0)};
  blocks.columns(
      stats, out,
      [&](int64_t j, int64_t end) {
        for (; j < end; ++j) {
          shift[j] = col.max[j];
          if (softmax[j] != 0.f) softmax[j] /= col.sum[j];
        }
      },
      [&](const Tile& t, const GradTile<T>& g) { epilogue.template run<T>(t, g); });
  if (out.similarity) *out.similarity = total(epilogue.similarity, in.image.rows);
}

template <class T>
void sigmoid_loss_as(const ContrastiveInputs& in, const SigmoidTerms& terms,
                     const SoftmaxStats& row, const SoftmaxStats& col, const ContrastiveGrads& out,
                     void* scratch) {
  const bool grads = out.image.data || out.text.data || out.similarity || out.logit;
  const Blocks<T> blocks(in, grads ? out.pass() : Pass{}, scratch);
  SigmoidEpilogue epilogue{blocks.masks(),
                           terms.row_weight,
                           blocks.col_vector(0, terms.col_weight),
                           magnitude(in.scale),
                           in.bias,
                           blocks.row_vector(0),
                           blocks.row_vector(1),
                           blocks.row_vector(2)};
  const StatsTile stats = start_stats(in, blocks, row, col);
  const StatsTile* const wanted = row.max || col.max ? &stats : nullptr;
  if (!grads) {
    blocks.forward({}, wanted, [&](const Tile& t) { epilogue.template run<T, false>(t, {}); });
  } else {
    blocks.grads({}, wanted, out, [&](const Tile& t, const GradTile<T>& g) {
      epilogue.template run<T, true>(t, g);
    });
  }
  const int64_t n = in.image.rows;
  if (terms.row_loss) std::memcpy(terms.row_loss, epilogue.row_loss, n * sizeof(float));
  if (out.similarity) *out.similarity = total(epilogue.similarity, n);
  if (out.logit) *out.logit = total(epilogue.logit, n);
}

}  // namespace

int64_t contrastive_scratch_bytes(const ContrastiveInputs& in, ContrastivePass pass) {
  return runs_in_bf16(in.dtype)
             ? carve<bf16_t>(make_plan<bf16_t>(in, pass), num_threads(), nullptr, nullptr)
             : carve<float>(make_plan<float>(in, pass), num_threads(), nullptr, nullptr);
}

void clip_stats(const ContrastiveInputs& in, const SoftmaxStats& row, const SoftmaxStats& col,
                const KeptSimilarity& kept, void* scratch) {
  runs_in_bf16(in.dtype) ? clip_stats_as<bf16_t>(in, row, col, kept, scratch)
                         : clip_stats_as<float>(in, row, col, kept, scratch);
}

void clip_grads(const ContrastiveInputs& in, const SoftmaxGrad& row, const SoftmaxGrad& col,
                const KeptSimilarity& kept, const ContrastiveGrads& out, void* scratch) {
  runs_in_bf16(in.dtype) ? clip_grads_as<bf16_t>(in, row, col, kept, out, scratch)
                         : clip_grads_as<float>(in, row, col, kept, out, scratch);
}

void clip_columns(const ContrastiveInputs& in, const SoftmaxStats& col, const SoftmaxGrad& target,
                  const ContrastiveGrads& out, void* scratch) {
  runs_in_bf16(in.dtype) ? clip_columns_as<bf16_t>(in, col, target, out, scratch)
                         : clip_columns_as<float>(in, col, target, out, scratch);
}

void sigmoid_loss(const ContrastiveInputs& in, const SigmoidTerms& terms, const SoftmaxStats& row,
                  const SoftmaxStats& col, const ContrastiveGrads& out, void* scratch) {
  runs_in_bf16(in.dtype) ? sigmoid_loss_as<bf16_t>(in, terms, row, col, out, scratch)
                         : sigmoid_loss_as<float>(in, terms, row, col, out, scratch);
}

}  // namespace vlm::cpu::VLM_ISA

#else  // compiled once more without VLM_ISA: chooses at run time

namespace vlm::cpu {

VLM_DISPATCH(int64_t, contrastive_scratch_bytes,
             (const ContrastiveInputs& in, ContrastivePass pass), (in, pass))
VLM_DISPATCH(void, clip_stats,
             (const ContrastiveInputs& in, const SoftmaxStats& row, const SoftmaxStats& col,
              const KeptSimilarity& kept, void* scratch),
             (in, row, col, kept, scratch))
VLM_DISPATCH(void, clip_grads,
             (const ContrastiveInputs& in, const SoftmaxGrad& row, const SoftmaxGrad& col,
              const KeptSimilarity& kept, const ContrastiveGrads& out, void* scratch),
             (in, row, col, kept, out, scratch))
VLM_DISPATCH(void, clip_columns,
             (const ContrastiveInputs& in, const SoftmaxStats& col, const SoftmaxGrad& target,
              const ContrastiveGrads& out, void* scratch),
             (in, col, target, out, scratch))
VLM_DISPATCH(void, sigmoid_loss,
             (const ContrastiveInputs& in, const SigmoidTerms& terms, const SoftmaxStats& row,
              const SoftmaxStats& col, const ContrastiveGrads& out, void* scratch),
             (in, terms, row, col, out, scratch))

}  // namespace vlm::cpu
#endif
