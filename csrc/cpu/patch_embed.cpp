// Patch embedding on the CPU, compiled once per ISA.
//
// The weight is folded and packed once a call. Blocks of tokens are gathered from the pixels
// straight into the left operand, multiplied with one panel of 64 features after the other, and
// written with bias and position where they belong: neither a normalised image nor a matrix of all
// patches exists. A token's sums run over its pixels in the same order wherever it is.
#include "vlm/patch_embed.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

#ifdef VLM_ISA
#include "cpu/patch_embed_rows.h"

namespace vlm::cpu::VLM_ISA {
namespace {

constexpr int64_t kRows = 128;  // tokens of a block
constexpr int64_t kEven = 4;
constexpr int64_t kDepth = 1024;  // pixels multiplied at once, so that both operands stay in L2

template <class T>
class Forward {
 public:
  Forward(const PatchEmbedInputs& in, void* out, void* scratch)
      : in_(in),
        out_(static_cast<char*>(out)),
        gemm_{brgemm_runs_f32()},
        ld_(patch_ld<T>(in)),
        depth_(round_up(in.columns(), kPerWord<T>)),
        panels_(ceil_div(in.embed_dim, kPanel)) {
    Arena arena{static_cast<char*>(scratch)};
    weight_ = arena.take<T>(panels_ * kPanel * depth_);
    bias_ = arena.take<float>(kPaddings * panels_ * kPanel);
    shift_ = arena.take<float>(kPaddings * ld_);
    threads_ = arena.base;
    const int64_t shared = arena.used;
    Arena own{nullptr};
    carve(own, nullptr);
    thread_bytes_ = own.used;
    if (threads_) threads_ += shared;
    bytes_ = shared + num_threads() * thread_bytes_;
  }

  int64_t bytes() const { return bytes_; }

  void run() {
    fold_shift<T>(in_, shift_);
    parallel_for(panels_, [&](int64_t panel, int thread) { fold_panel(panel, thread); });
    const int64_t tokens = in_.images.batch * in_.patches();
    // evenly, and a multiple of most numbers of threads
    const int64_t rows = max(1, ceil_div(tokens, max(1, round_up(ceil_div(tokens, kRows), kEven))));
    const int64_t blocks = ceil_div(tokens, rows);
    parallel_for(blocks + in_.images.batch, [&](int64_t i, int thread) {
      if (i < blocks) {
        block(i * rows, min(rows, tokens - i * rows), thread);
        gemm_.release();
      } else {
        other_rows(i - blocks);
      }
    });
  }

 private:
  struct Buffers {
    T* rows;         // (kRows, ld): patches, or rows of the folded weight
    float* wide;     // a row of the weight
    float* row;      // of the folded weight
    float* product;  // (kRows, kPanel)
  };

  void carve(Arena& arena, Buffers* b) const {
    Buffers unused;
    Buffers& to = b ? *b : unused;
    to.rows = arena.take<T>(kRows * ld_);
    to.wide = arena.take<float>(Columns(in_).weight_columns() + kLanes);
    to.row = arena.take<float>(ld_);
    to.product = arena.take<float>(kRows * kPanel);
  }

  Buffers buffers(int thread) const {
    Arena arena{threads_ + thread * thread_bytes_};
    Buffers b;
    carve(arena, &b);
    return b;
  }

  // Features [64 panel, 64 panel + 64) of the weight and of the biases.
  void fold_panel(int64_t panel, int thread) {
    static_assert(kRows >= kPanel);
    const Buffers b = buffers(thread);
    const int64_t first = panel * kPanel, count = min(kPanel, in_.embed_dim - first);
    const int64_t columns = in_.columns();
    const int paddings = in_.pad_normalised ? kPaddings : 1;
    const char* given = static_cast<const char*>(in_.bias);
    for (int64_t r = 0; r < count; ++r) {
      fold_row(in_, first + r, b.wide, b.row);
      for (int64_t k = columns; k < round_up(columns, kLanes); ++k) b.row[k] = 0.f;
      vf lowered[kPaddings] = {};
      T* const row = b.rows + r * ld_;
      for (int64_t k = 0; k < columns; k += kLanes) {
        put(row + k, load(b.row + k));
        const vf rounded = to_f32(reinterpret_cast<const char*>(row + k), kType);
        for (int p = 0; p < paddings; ++p) lowered[p] += rounded * load(shift_ + p * ld_ + k);
      }
      const float own = given ? load_f32(given, in_.dtype, first + r, in_.embed_dim)[0] : 0.f;
      for (int p = 0; p < paddings; ++p) {
        bias_[p * panels_ * kPanel + first + r] = own - hsum(lowered[p]);
      }
    }
    const MatrixRef folded{b.rows, count, columns, ld_};
    pack_transposed_panel<T>(folded, kType, 0, false,
                             reinterpret_cast<uint32_t*>(weight_ + panel * kPanel * depth_));
  }

  void block(int64_t first, int64_t count, int thread) {
    const Buffers b = buffers(thread);
    const char* const end = images_end(in_);
    int64_t to[kRows];
    TokenAdds adds[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const Token t = token_at(in_, first + r);
      gather(in_, t, end, b.rows + r * ld_);
      to[r] = token_row(in_, t);
      adds[r] = {bias_ + shift_of(in_, t) * panels_ * kPanel,
                 pos_row(t.image, in_.pos_prefixed + t.patch)};
    }
    const int64_t steps = ceil_div(depth_, kDepth);
    const int64_t step = round_up(ceil_div(depth_, steps), kLanes);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      for (int64_t k = 0; k < depth_; k += step) {
        const GemmShape shape{count, kPanel, min(step, depth_ - k), ld_, kPanel, kPanel, k > 0};
        gemm_(shape, b.rows + k, weight_ + (panel * depth_ + k) * kPanel, b.product);
      }
      write(b.product, panel, count, to, adds);
    }
  }

  struct TokenAdds {
    const float* bias;
    const char* pos;  // of in.dtype, or null
  };

  const char* pos_row(int64_t image, int64_t row) const {
    if (!in_.pos.data) return nullptr;
    return static_cast<const char*>(in_.pos.data) +
           (image * in_.pos.batch_stride + row * in_.pos.row_stride) * element_size(in_.dtype);
  }

  void write(const float* product, int64_t panel, int64_t count, const int64_t* to,
             const TokenAdds* adds) {
    const int64_t first = panel * kPanel, last = min(first + kPanel, in_.embed_dim);
    for (int64_t r = 0; r < count; ++r, product += kPanel) {
      for (int64_t e = first; e < last; e += kLanes) {
        vf x = load(product + e - first) + load(adds[r].bias + e);
        if (adds[r].pos) x += load_f32(adds[r].pos, in_.dtype, e, in_.embed_dim);
        store_as<sizeof(T) == 2>(out_, in_.dtype, to[r] * in_.embed_dim + e, x, last - e);
      }
    }
  }

  // Prefix and newlines of an image.
  void other_rows(int64_t image) {
    const int64_t row = image * in_.tokens();
    for (int64_t i = 0; i < in_.prefix_count; ++i) {
      const char* from =
          static_cast<const char*>(in_.prefix.data) +
          (image * in_.prefix.batch_stride + i * in_.prefix.row_stride) * element_size(in_.dtype);
      copy_row(from, in_.pos_prefixed ? pos_row(image, i) : nullptr, row + i);
    }
    if (!in_.newline) return;
    for (int64_t i = 1; i <= in_.grid_frames * in_.grid_height; ++i) {
      copy_row(static_cast<const char*>(in_.newline), nullptr,
               row + in_.prefix_count + i * in_.row_tokens() - 1);
    }
  }

  void copy_row(const char* from, const char* pos, int64_t to) {
    for (int64_t e = 0; e < in_.embed_dim; e += kLanes) {
      vf x = load_f32(from, in_.dtype, e, in_.embed_dim);
      if (pos) x += load_f32(pos, in_.dtype, e, in_.embed_dim);
      store_as(out_, in_.dtype, to * in_.embed_dim + e, x, in_.embed_dim - e);
    }
  }

  static constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;

  const PatchEmbedInputs& in_;
  char* out_;
  Gemm gemm_;
  int64_t ld_, depth_, panels_;
  T* weight_;     // panels of W'^T
  float* bias_;   // (kPaddings, panels * 64)
  float* shift_;  // (kPaddings, ld)
  char* threads_;
  int64_t thread_bytes_, bytes_;
};

}  // namespace

int64_t patch_embed_scratch_bytes(const PatchEmbedInputs& in) {
  return runs_in_bf16(in.dtype) ? Forward<bf16_t>(in, nullptr, nullptr).bytes()
                                : Forward<float>(in, nullptr, nullptr).bytes();
}

void patch_embed_fwd(const PatchEmbedInputs& in, void* out, void* scratch) {
  runs_in_bf16(in.dtype) ? Forward<bf16_t>(in, out, scratch).run()
                         : Forward<float>(in, out, scratch).run();
}

}  // namespace vlm::cpu::VLM_ISA

#else

namespace vlm::cpu {

VLM_DISPATCH(int64_t, patch_embed_scratch_bytes, (const PatchEmbedInputs& in), (in))
VLM_DISPATCH(void, patch_embed_fwd, (const PatchEmbedInputs& in, void* out, void* scratch),
             (in, out, scratch))

}  // namespace vlm::cpu

#endif
