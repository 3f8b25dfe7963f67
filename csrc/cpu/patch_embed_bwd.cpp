// The backward of patch embedding, compiled once per ISA.
//
// dW' = dY^T X is formed in blocks of tokens: dY^T and the gathered patches are packed by all
// threads, then multiplied tile by tile into fp32 sums, each owned by one thread; at the end the
// normalisation is unfolded. dX = dY W' goes straight back to the pixels. Sums run over tokens in
// an order that only the shapes decide.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "vlm/patch_embed.h"

#ifdef VLM_ISA
#include "cpu/patch_embed_rows.h"

namespace vlm::cpu::VLM_ISA {
namespace {

constexpr int64_t kTokens = 1024;   // of a block
constexpr int64_t kFeatures = 128;  // of a tile of dW'
constexpr int64_t kRows = 64;       // tokens of a block of dX
constexpr int64_t kPad = 32;        // keeps leading dimensions off multiples of a page

template <class T>
class Backward {
 public:
  Backward(const PatchEmbedInputs& in, const TokenRows& grad, const PatchEmbedGrads& grads,
           void* scratch)
      : in_(in),
        grad_(grad),
        grads_(grads),
        gemm_{brgemm_runs_f32()},
        tokens_(in.images.batch * in.patches()),
        ld_(patch_ld<T>(in)),
        panels_(ceil_div(in.columns(), kPanel)),
        embed_(round_up(in.embed_dim, kPanel)),
        words_(round_up(in.embed_dim, kPerWord<T>)),
        overlaps_(in.stride_height < in.patch_height || in.stride_width < in.patch_width),
        need_sums_(grads.weight || grads.bias) {
    Arena arena{static_cast<char*>(scratch)};
    shift_ = arena.take<float>(kPaddings * ld_);
    if (need_sums_) {
      turned_ = arena.take<T>(embed_ * (kTokens + kPad));
      bias_ = arena.take<float>(kPaddings * embed_);
    }
    if (grads.weight) {
      patches_ = arena.take<T>(panels_ * kPanel * kTokens);
      weight_ = arena.take<float>(embed_ * panels_ * kPanel);
    }
    if (grads.images) folded_ = arena.take<T>(panels_ * kPanel * round_up(words_, 2));
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
    if (need_sums_) sums();
    if (grads_.weight) {
      parallel_for(in_.embed_dim, [&](int64_t e, int thread) { unfold_row(e, buffers(thread)); });
    }
    if (grads_.bias) {
      for (int64_t e = 0; e < in_.embed_dim; ++e) grads_.bias[e] = bias_grad(e);
    }
    if (grads_.images) pixels_grad();
    rows_grads();
  }

 private:
  struct Buffers {
    T* rows;         // two patches, or (kRows, words) of dY
    float* wide;     // a row of the weight
    float* row;      // of the folded one
    float* product;  // (kRows, panels * 64) of dX
    float* image;    // sums of an image's pixels, where patches overlap
  };

  int64_t image_floats() const {  // at most: the extent of an image's pixels
    const PatchImages& im = in_.images;
    return (in_.grid_frames * in_.depth - 1) * im.frame_stride +
           (im.channels - 1) * im.channel_stride + (im.height - 1) * im.row_stride +
           (im.width - 1) * im.column_stride + 1;
  }

  void carve(Arena& arena, Buffers* b) const {
    Buffers unused;
    Buffers& to = b ? *b : unused;
    const int64_t dy = grads_.images ? kRows * (words_ + kPad) : 0;
    to.rows = arena.take<T>(max(2 * ld_, dy));
    to.wide = arena.take<float>(Columns(in_).weight_columns() + kLanes);
    to.row = arena.take<float>(ld_);
    to.product = arena.take<float>(grads_.images ? kRows * panels_ * kPanel : 0);
    to.image = arena.take<float>(grads_.images && overlaps_ ? image_floats() : 0);
  }

  Buffers buffers(int thread) const {
    Arena arena{threads_ + thread * thread_bytes_};
    Buffers b;
    carve(arena, &b);
    return b;
  }

  const char* grad_row(int64_t row) const {
    const int64_t image = row / in_.tokens(), inside = row % in_.tokens();
    return static_cast<const char*>(grad_.data) +
           (image * grad_.batch_stride + inside * grad_.row_stride) * element_size(in_.dtype);
  }

  // --- dW' and the sums of dY ---

  void sums() {
    if (tokens_ == 0) {  // videos without frames: no block begins the sums
      std::memset(bias_, 0, kPaddings * embed_ * sizeof(float));
      if (grads_.weight) std::memset(weight_, 0, embed_ * panels_ * kPanel * sizeof(float));
      return;
    }
    const int64_t step = kPerWord<T>;
    const int64_t blocks = max(1, ceil_div(tokens_, kTokens));  // evenly
    const int64_t most = max(kLanes, round_up(ceil_div(tokens_, blocks), kLanes));
    for (int64_t first = 0; first < tokens_; first += most) {
      const int64_t count = min(most, tokens_ - first);
      const int64_t depth = round_up(count, step);
      const int64_t turns = embed_ / kPanel, pairs = grads_.weight ? depth / step : 0;
      constexpr int64_t kPairs = 32;  // of a unit
      parallel_for(turns + ceil_div(pairs, kPairs), [&](int64_t i, int thread) {
        if (i < turns) {
          turn(i * kPanel, first, count);
        } else {
          const int64_t begin = (i - turns) * kPairs;
          pack_patches(first, count, begin, min(begin + kPairs, pairs), depth, buffers(thread));
        }
      });
      if (!grads_.weight) continue;
      const int64_t tiles = ceil_div(in_.embed_dim, kFeatures);
      constexpr int64_t kGroup = 4;  // panels of a unit
      const int64_t groups = ceil_div(panels_, kGroup);
      parallel_for(tiles * groups, [&](int64_t i, int) {
        const int64_t e = i / groups * kFeatures;
        const int64_t last = min((i % groups + 1) * kGroup, panels_);
        for (int64_t panel = i % groups * kGroup; panel < last; ++panel) {
          const GemmShape shape{min(kFeatures, in_.embed_dim - e),
                                kPanel,
                                depth,
                                kTokens + kPad,
                                kPanel,
                                panels_ * kPanel,
                                first > 0};
          gemm_(shape, turned_ + e * (kTokens + kPad), patches_ + panel * kPanel * depth,
                weight_ + e * panels_ * kPanel + panel * kPanel);
        }
        gemm_.release();
      });
    }
  }

  // Features [e, e + 64) of tokens [first, first + count) as rows of dY^T, and their sums.
  void turn(int64_t e, int64_t first, int64_t count) {
    constexpr int64_t kLd = kTokens + kPad, kFew = kPanel / kPerWord<T>;  // words of the features
    T* const to = turned_ + e * kLd;
    const char* rows[kTokens];
    int shifts[kTokens];
    bool plain = true;
    for (int64_t r = 0; r < count; ++r) {
      const Token t = token_at(in_, first + r);
      rows[r] = grad_row(token_row(in_, t));
      shifts[r] = shift_of(in_, t);
      plain = plain && shifts[r] == 0;
    }
    const int64_t left = in_.embed_dim - e;
    for (int64_t group = 0; group < count; group += kLanes) {
      for (int64_t w = 0; w < kFew; w += kLanes) {
        vu v[16];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          v[i] = group + i < count ? load_words<T>(rows[group + i] + e * element_size(in_.dtype),
                                                   in_.dtype, w, left > 0 ? left : 0)
                                   : vu{};
        }
        transpose16(v);
        for (int64_t i = 0; i < kLanes; ++i) {
          if constexpr (sizeof(T) == 4) {
            store(to + (w + i) * kLd + group, (vf)v[i]);
          } else {
            store(to + 2 * (w + i) * kLd + group, convert<vh>(v[i] & 0xffffu));
            store(to + (2 * (w + i) + 1) * kLd + group, convert<vh>(v[i] >> 16));
          }
        }
      }
    }
    for (int64_t i = 0; i < kPanel; ++i) {
      float sums[kPaddings] = {};
      const char* row = reinterpret_cast<const char*>(to + i * kLd);
      if (plain) {
        vf sum = {};
        for (int64_t r = 0; r < count; r += kLanes) sum += load_f32(row, kType, r, count);
        sums[0] = hsum(sum);
      } else {
        for (int64_t r = 0; r < count; ++r) sums[shifts[r]] += load_f32(row, kType, r, count)[0];
      }
      for (int p = 0; p < kPaddings; ++p) {
        float& total = bias_[p * embed_ + e + i];
        total = first > 0 ? total + sums[p] : sums[p];
      }
    }
  }

  // Row `at` of words of a right operand, panels of (depth, 64) words: one row of elements, or two.
  void put_words(const T* rows, T* to, int64_t at, int64_t depth) const {
    uint32_t* const words = reinterpret_cast<uint32_t*>(to) + at * kPanel;
    for (int64_t k = 0; k < panels_ * kPanel; k += kLanes) {
      uint32_t* const word = words + k / kPanel * depth * kPanel + k % kPanel;
      if (k >= in_.columns()) {
        store(word, vu{});
      } else if constexpr (sizeof(T) == 4) {
        store(word, (vu)load(rows + k));
      } else {
        store(word, convert<vu>(load(rows + k)) | (convert<vu>(load(rows + ld_ + k)) << 16));
      }
    }
  }

  // Words [begin, end) of the block's patches as the right operand: panels of (depth, 64).
  void pack_patches(int64_t first, int64_t count, int64_t begin, int64_t end, int64_t depth,
                    const Buffers& b) {
    constexpr int64_t kStep = kPerWord<T>;
    const char* const last = images_end(in_);
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int64_t i = 0; i < kStep; ++i) {
        T* const row = b.rows + i * ld_;
        if (pair * kStep + i < count) {
          gather(in_, token_at(in_, first + pair * kStep + i), last, row);
        } else {
          std::memset(row, 0, ld_ * sizeof(T));
        }
      }
      put_words(b.rows, patches_, pair, depth / kStep);
    }
  }

  // The sum of dY over the tokens.
  float bias_grad(int64_t e) const {
    float sum = 0.f;
    for (int p = 0; p < kPaddings; ++p) sum += bias_[p * embed_ + e];
    return sum;
  }

  // dW = scale * (dW' - shift * sum dY), at the weight's columns.
  void unfold_row(int64_t e, const Buffers& b) {
    const float* const from = weight_ + e * panels_ * kPanel;
    for (int64_t k = 0; k < in_.columns(); k += kLanes) {
      vf x = load(from + k);
      for (int p = 0; p < kPaddings; ++p) {
        x -= bias_[p * embed_ + e] * load(shift_ + p * ld_ + k);
      }
      store(b.row + k, x);
    }
    const Columns c(in_);
    Columns::for_each(c, [&](int64_t k, int64_t to, int64_t channel) {
      b.wide[to] = b.row[k] * in_.scale[channel];
    });
    // the times of a still image share its weight's gradient
    for (int64_t t = 1; t < c.collapse; ++t) {
      if (c.channels_last) {
        std::memcpy(b.wide + t * c.step, b.wide, c.step * sizeof(float));
      } else {
        for (int64_t channel = 0; channel < c.channels; ++channel) {
          float* first = b.wide + channel * c.collapse * c.patch;
          std::memcpy(first + t * c.patch, first, c.patch * sizeof(float));
        }
      }
    }
    const int64_t count = c.weight_columns();
    for (int64_t k = 0; k < count; k += kLanes) {
      store_as(grads_.weight, in_.dtype, e * count + k, load(b.wide + k), count - k);
    }
  }

  // --- dX ---

  void pixels_grad() {
    // W' as the right operand, its rows the features
    parallel_for(ceil_div(words_, kPerWord<T>), [&](int64_t i, int thread) {
      constexpr int64_t kStep = kPerWord<T>;
      const Buffers b = buffers(thread);
      for (int64_t j = 0; j < kStep; ++j) {
        T* const row = b.rows + j * ld_;
        if (i * kStep + j >= in_.embed_dim) {
          std::memset(row, 0, ld_ * sizeof(T));
          continue;
        }
        fold_row(in_, i * kStep + j, b.wide, b.row);
        for (int64_t k = 0; k < in_.columns(); k += kLanes) put(row + k, load(b.row + k));
      }
      put_words(b.rows, folded_, i, words_ / kStep);
    });
    const bool gaps = in_.stride_height > in_.patch_height || in_.stride_width > in_.patch_width;
    if (overlaps_ || gaps) {
      parallel_for(in_.images.batch, [&](int64_t image, int thread) {
        const Buffers b = buffers(thread);
        if (gaps) clear(image);
        if (overlaps_) std::memset(b.image, 0, image_floats() * sizeof(float));
        for (int64_t i = 0; i < in_.patches(); i += kRows) {
          block(image * in_.patches() + i, min(kRows, in_.patches() - i), b);
        }
        if (overlaps_) round_image(image, b.image);
        gemm_.release();
      });
      return;
    }
    parallel_for(ceil_div(tokens_, kRows), [&](int64_t i, int thread) {
      block(i * kRows, min(kRows, tokens_ - i * kRows), buffers(thread));
      gemm_.release();
    });
  }

  void block(int64_t first, int64_t count, const Buffers& b) {
    const int64_t ld = words_ + kPad;
    for (int64_t r = 0; r < count; ++r) {
      const char* from = grad_row(token_row(in_, token_at(in_, first + r)));
      T* const row = b.rows + r * ld;
      for (int64_t e = 0; e < words_; e += kLanes) {
        const vf x = load_f32(from, in_.dtype, e, in_.embed_dim);
        put(row + e, x);
      }
    }
    const int64_t columns = panels_ * kPanel;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const GemmShape shape{count, kPanel, words_, ld, kPanel, columns, false};
      gemm_(shape, b.rows, folded_ + panel * kPanel * words_, b.product + panel * kPanel);
    }
    const int64_t length = Runs(in_).length;
    for (int64_t r = 0; r < count; ++r) {
      const float* product = b.product + r * columns;
      const Token t = token_at(in_, first + r);
      for_runs(in_, t, [&](int64_t column, int64_t at, int64_t inside) {
        (void)length;
        if (overlaps_) {
          float* to = b.image + at - t.image * in_.images.batch_stride;
          for (int64_t i = 0; i < inside; ++i) to[i] += product[column + i];
          return;
        }
        for (int64_t i = 0; i < inside; i += kLanes) {
          store_as(grads_.images, in_.images.dtype, at + i, load(product + column + i), inside - i);
        }
      });
    }
  }

  // f(offset of its first pixel, its length) for each row of pixels of an image.
  template <class F>
  void for_rows(int64_t image, const F& f) const {
    const PatchImages& im = in_.images;
    const Runs runs(in_);
    for (int64_t frame = 0; frame < in_.grid_frames * in_.depth; ++frame) {
      for (int64_t c = 0; c < runs.channels; ++c) {
        for (int64_t y = 0; y < im.height; ++y) {
          f(image * im.batch_stride + frame * im.frame_stride + c * im.channel_stride +
                y * im.row_stride,
            im.width * runs.pixels_x);
        }
      }
    }
  }

  void clear(int64_t image) {
    const int64_t size = element_size(in_.images.dtype);
    for_rows(image, [&](int64_t at, int64_t count) {
      std::memset(static_cast<char*>(grads_.images) + at * size, 0, count * size);
    });
  }

  void round_image(int64_t image, const float* sums) {
    for_rows(image, [&](int64_t at, int64_t count) {
      const float* from = sums + at - image * in_.images.batch_stride;
      for (int64_t i = 0; i < count; i += kLanes) {
        const char* p = reinterpret_cast<const char*>(from);
        store_as(grads_.images, in_.images.dtype, at + i, load_f32(p, DType::f32, i, count),
                 count - i);
      }
    });
  }

  // --- positions, prefix, newline: sums over rows of dY ---

  void rows_grads() {
    const int64_t batch = in_.images.batch, n = in_.prefix_count, prefixed = in_.pos_prefixed;
    const int64_t rows = prefixed + in_.patches();
    if (grads_.pos) {
      parallel_for(rows, [&](int64_t row, int) {
        for (int64_t image = 0; image < batch; ++image) {
          const int64_t from =
              row < prefixed
                  ? image * in_.tokens() + row
                  : token_row(in_, token_at(in_, image * in_.patches() + row - prefixed));
          add_row(grads_.pos + ((grads_.pos_batched ? image * rows : 0) + row) * in_.embed_dim,
                  from);
        }
      });
    }
    if (grads_.prefix) {
      parallel_for(n, [&](int64_t row, int) {
        for (int64_t image = 0; image < batch; ++image) {
          add_row(grads_.prefix + ((grads_.prefix_batched ? image * n : 0) + row) * in_.embed_dim,
                  image * in_.tokens() + row);
        }
      });
    }
    if (grads_.newline) {
      for (int64_t image = 0; image < batch; ++image) {
        for (int64_t i = 1; i <= in_.grid_frames * in_.grid_height; ++i) {
          add_row(grads_.newline, image * in_.tokens() + n + i * in_.row_tokens() - 1);
        }
      }
    }
  }

  void add_row(float* sum, int64_t row) {
    const char* from = grad_row(row);
    for (int64_t e = 0; e < in_.embed_dim; e += kLanes) {
      const vf x = load_f32(reinterpret_cast<const char*>(sum), DType::f32, e, in_.embed_dim) +
                   load_f32(from, in_.dtype, e, in_.embed_dim);
      store_as(sum, DType::f32, e, x, in_.embed_dim - e);
    }
  }

  static constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;

  const PatchEmbedInputs& in_;
  const TokenRows& grad_;
  const PatchEmbedGrads& grads_;
  Gemm gemm_;
  int64_t tokens_, ld_, panels_, embed_, words_;
  bool overlaps_, need_sums_;
  float* shift_ = nullptr;   // (kPaddings, ld)
  T* turned_ = nullptr;      // (embed, kTokens + kPad): dY^T of a block
  float* bias_ = nullptr;    // (kPaddings, embed): sums of dY
  T* patches_ = nullptr;     // panels of a block's patches
  float* weight_ = nullptr;  // (embed, panels * 64): dW'
  T* folded_ = nullptr;      // panels of W'
  char* threads_ = nullptr;
  int64_t thread_bytes_, bytes_;
};

}  // namespace

int64_t patch_embed_bwd_scratch_bytes(const PatchEmbedInputs& in, const PatchEmbedGrads& grads) {
  return runs_in_bf16(in.dtype) ? Backward<bf16_t>(in, {}, grads, nullptr).bytes()
                                : Backward<float>(in, {}, grads, nullptr).bytes();
}

void patch_embed_bwd(const PatchEmbedInputs& in, const TokenRows& grad,
                     const PatchEmbedGrads& grads, void* scratch) {
  runs_in_bf16(in.dtype) ? Backward<bf16_t>(in, grad, grads, scratch).run()
                         : Backward<float>(in, grad, grads, scratch).run();
}

}  // namespace vlm::cpu::VLM_ISA

#else

namespace vlm::cpu {

VLM_DISPATCH(int64_t, patch_embed_bwd_scratch_bytes,
             (const PatchEmbedInputs& in, const PatchEmbedGrads& grads), (in, grads))
VLM_DISPATCH(void, patch_embed_bwd,
             (const PatchEmbedInputs& in, const TokenRows& grad, const PatchEmbedGrads& grads,
              void* scratch),
             (in, grad, grads, scratch))

}  // namespace vlm::cpu

#endif
