// attention and attention_varlen: checks, allocation and the O(N) work around the kernels.
//
// The kernels know intervals of keys only. Here causality, windows, kv_range and packed segments
// become one interval for each query, once for all heads and entries of a batch that share them.
#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "ops/bind.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/workspace.h"
#include "vlm/attention.h"

namespace vlm {
namespace {

constexpr int64_t kMaxHeadDim = 256;

using Args = AttentionArgs;
using NormArgs = AttentionNorm;

// --- checks ---

void check_tensors(const Args& a) {
  const char* op = a.op();
  TORCH_CHECK_VALUE(a.cu_seqlens_q.has_value() == a.cu_seqlens_k.has_value(), op, ": only ",
                    a.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k",
                    " came; pass both, the same tensor for self-attention");
  const int64_t dim = a.packed() ? 3 : 4;
  const char* rows = a.packed() ? "(Tq, H, D)" : "(B, H, Nq, D)";
  check_dim(op, "query", a.query, dim, rows);
  check_dim(op, "key", a.key, dim, a.packed() ? "(Tk, Hkv, D)" : "(B, Hkv, Nk, D)");
  check_dim(op, "value", a.value, dim, a.packed() ? "(Tk, Hkv, Dv)" : "(B, Hkv, Nk, Dv)");
  feature_dtype(op, "query", a.query);
  TORCH_CHECK_TYPE(a.key.scalar_type() == a.query.scalar_type() &&
                       a.value.scalar_type() == a.query.scalar_type(),
                   op, ": query is ", a.query.scalar_type(), ", key ", a.key.scalar_type(),
                   " and value ", a.value.scalar_type(),
                   "; expected one dtype, convert with .to(dtype)");
  for (const auto& [name, x] : {std::pair{"key", &a.key}, std::pair{"value", &a.value}}) {
    TORCH_CHECK_VALUE(x->device() == a.query.device(), op, ": ", name, " is on ", x->device(),
                      " but query is on ", a.query.device(), "; move it there with .to()");
  }
  TORCH_CHECK_VALUE(a.key.size(-1) == a.query.size(-1), op, ": query has shape ", a.query.sizes(),
                    " and key ", a.key.sizes(), "; expected the same head dim D in both");
  TORCH_CHECK_VALUE(a.head_dim() >= 1 && a.head_dim() <= kMaxHeadDim && a.value_dim() >= 1 &&
                        a.value_dim() <= kMaxHeadDim,
                    op, ": the head dims are ", a.head_dim(), " of query and key and ",
                    a.value_dim(), " of value; expected 1 to ", kMaxHeadDim,
                    ", or backend='reference'");
  TORCH_CHECK_VALUE(a.key.sizes().slice(0, dim - 1) == a.value.sizes().slice(0, dim - 1), op,
                    ": key has shape ", a.key.sizes(), " and value ", a.value.sizes(),
                    "; expected them to differ in the last dimension only");
  TORCH_CHECK_VALUE(a.packed() || a.key.size(0) == a.query.size(0), op, ": query has batch ",
                    a.query.size(0), " and key ", a.key.size(0), "; expected the same");
  TORCH_CHECK_VALUE(a.heads() > 0 && a.kv_heads() > 0 && a.heads() % a.kv_heads() == 0, op,
                    ": query has ", a.heads(), " heads and key ", a.kv_heads(),
                    "; expected a multiple of the key heads");
  TORCH_CHECK_VALUE(std::max(a.queries(), a.keys()) < std::numeric_limits<int32_t>::max(), op, ": ",
                    a.queries(), " queries and ", a.keys(),
                    " keys; at most 2^31 - 2 are supported");
}

void check_masks(const Args& a) {
  const char* op = a.op();
  TORCH_CHECK_VALUE(a.window_left >= -1 && a.window_right >= -1, op, ": window is (", a.window_left,
                    ", ", a.window_right, "), expected two numbers of keys, -1 for no limit");
  TORCH_CHECK_VALUE(!a.packed() || (!a.mask && !a.kv_range), op, ": ",
                    a.mask ? "attn_mask" : "kv_range",
                    " came with cu_seqlens; packed segments take is_causal and window only");
  if (a.mask) {
    const Tensor& mask = *a.mask;
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kFloat ||
                         mask.scalar_type() == a.query.scalar_type(),
                     op, ": attn_mask is ", mask.scalar_type(),
                     ", expected bool (True may attend), float32 or the dtype of query, ",
                     a.query.scalar_type());
    check_same_device(op, "attn_mask", mask, a.query);
    const int64_t full[4] = {a.batch(), a.heads(), a.queries(), a.keys()};
    bool fits = mask.dim() <= 4;
    for (int64_t i = 1; fits && i <= mask.dim(); ++i) {
      fits = mask.size(-i) == 1 || mask.size(-i) == full[4 - i];
    }
    TORCH_CHECK_VALUE(
        fits, op, ": attn_mask has shape ", mask.sizes(),
        ", expected one that broadcasts to (B, H, Nq, Nk) = ", at::IntArrayRef(full, 4));
  }
  if (a.kv_range) {
    const Tensor& range = *a.kv_range;
    TORCH_CHECK_TYPE(range.scalar_type() == at::kInt, op, ": kv_range is ", range.scalar_type(),
                     ", expected int32; convert it with .to(torch.int32)");
    check_same_device(op, "kv_range", range, a.query);
    TORCH_CHECK_VALUE(range.dim() == 4 && (range.size(0) == 1 || range.size(0) == a.batch()) &&
                          (range.size(1) == 1 || range.size(1) == a.heads()) &&
                          range.size(2) == a.queries() && range.size(3) == 2,
                      op, ": kv_range has shape ", range.sizes(), ", expected (1 or ", a.batch(),
                      ", 1 or ", a.heads(), ", ", a.queries(),
                      ", 2): a half-open interval of keys ", "for each query");
  }
}

void check_segments(const Args& a) {
  if (!a.packed()) return;
  const char* op = a.op();
  for (const auto& [name, cu] :
       {std::pair{"cu_seqlens_q", &*a.cu_seqlens_q}, std::pair{"cu_seqlens_k", &*a.cu_seqlens_k}}) {
    TORCH_CHECK_TYPE(cu->scalar_type() == at::kInt || cu->scalar_type() == at::kLong, op, ": ",
                     name, " is ", cu->scalar_type(), ", expected int32 or int64");
    TORCH_CHECK_VALUE(cu->dim() == 1 && cu->size(0) >= 1, op, ": ", name, " has shape ",
                      cu->sizes(), ", expected (segments + 1,)");
    check_same_device(op, name, *cu, a.query);
  }
  TORCH_CHECK_VALUE(a.cu_seqlens_q->size(0) == a.cu_seqlens_k->size(0), op, ": cu_seqlens_q has ",
                    a.cu_seqlens_q->size(0), " entries and cu_seqlens_k ", a.cu_seqlens_k->size(0),
                    "; expected the same number of segments");
}

void check_numbers(const Args& a) {
  TORCH_CHECK_VALUE(a.softcap >= 0.0 && std::isfinite(a.softcap), a.op(), ": softcap is ",
                    a.softcap, ", expected 0 for none or a positive number");
  TORCH_CHECK_VALUE(!a.scale || std::isfinite(*a.scale), a.op(), ": scale is ", *a.scale,
                    ", expected a finite number or None for 1 / sqrt(D)");
}

void check_rope(const Args& a) {
  const char* op = a.op();
  TORCH_CHECK_VALUE(a.rope_cos.has_value() == a.rope_sin.has_value(), op,
                    ": rope needs both cos and sin");
  if (!a.rope_cos) return;
  const Tensor &cos = *a.rope_cos, &sin = *a.rope_sin;
  TORCH_CHECK_TYPE(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat, op,
                   ": rope's cos is ", cos.scalar_type(), " and sin ", sin.scalar_type(),
                   ", expected float32 for both; convert them with .float()");
  check_same_device(op, "rope's cos", cos, a.query);
  check_same_device(op, "rope's sin", sin, a.query);
  const bool tables = cos.dim() == 2 || (!a.packed() && cos.dim() == 3 &&
                                         (cos.size(0) == 1 || cos.size(0) == a.batch()));
  TORCH_CHECK_VALUE(tables && cos.sizes() == sin.sizes() && cos.size(-2) == a.keys() &&
                        cos.size(-1) >= 1 && 2 * cos.size(-1) <= a.head_dim(),
                    op, ": rope's cos has shape ", cos.sizes(), " and sin ", sin.sizes(),
                    ", expected (", a.keys(), ", R / 2) ",
                    a.packed() ? "" : "or (1 or B, keys, R / 2) ", "for both: a row for each key, ",
                    "and R of at most ", a.head_dim(), " features");
  TORCH_CHECK_VALUE(a.packed() || a.queries() <= a.keys(), op, ": rope came with ", a.queries(),
                    " queries and ", a.keys(),
                    " keys; the queries are the last of the keys, so at most as many");
}

void check_norm(const Args& a, const NormArgs& norm, int64_t heads) {
  const char* op = a.op();
  if (!norm.weight) {
    TORCH_CHECK_VALUE(!norm.bias, op, ": ", norm.name, " has a bias but no weight");
    return;
  }
  TORCH_CHECK_VALUE(norm.eps >= 0.0 && std::isfinite(norm.eps), op, ": ", norm.name, " has eps ",
                    norm.eps, ", expected a number of at least 0");
  const int64_t d = a.head_dim();
  const auto fits = [&](const Tensor& x) {
    return x.dim() >= 1 && x.dim() <= 2 && x.size(-1) == d && (x.dim() == 1 || x.size(0) == heads);
  };
  TORCH_CHECK_VALUE(fits(*norm.weight), op, ": ", norm.name, "'s weight has shape ",
                    norm.weight->sizes(), ", expected (", d, ",) or (", heads, ", ", d, ")");
  TORCH_CHECK_VALUE(!norm.bias || norm.bias->sizes() == norm.weight->sizes(), op, ": ", norm.name,
                    "'s bias has shape ", norm.bias->sizes(), " and its weight ",
                    norm.weight->sizes(), "; expected the same");
  for (const OptionalTensor* x : {&norm.weight, &norm.bias}) {
    if (!*x) continue;
    TORCH_CHECK_TYPE(at::isFloatingType((*x)->scalar_type()), op, ": ", norm.name, " holds ",
                     (*x)->scalar_type(), ", expected floating-point tensors");
    check_same_device(op, norm.name, **x, a.query);
  }
}

// --- the call, as the kernels see it ---

// A fresh tensor with the layout of the rows of heads `x`, (B, H, N, D) data or (B, N, H, D) data.
Tensor heads_like(const Tensor& x, int64_t features, const at::TensorOptions& options) {
  if (x.dim() == 4 && x.stride(1) < x.stride(2)) {
    return at::empty({x.size(0), x.size(2), x.size(1), features}, options).transpose(1, 2);
  }
  at::DimVector sizes(x.sizes());
  sizes.back() = features;
  return at::empty(sizes, options);
}

template <class Ref, class Data>
Ref heads_ref(const Tensor& x, Data* data) {
  if (x.dim() == 4) return {data, x.stride(0), x.stride(1), x.stride(2)};
  return {data, 0, x.stride(1), x.stride(0)};
}

Tensor f32_contiguous(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

int64_t stride_or_0(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

// `x` with leading dimensions of size 1, to four.
Tensor four_dims(const Tensor& x) {
  at::DimVector sizes(4 - x.dim(), 1), strides(4 - x.dim(), 0);
  sizes.append(x.sizes().begin(), x.sizes().end());
  strides.append(x.strides().begin(), x.strides().end());
  return x.as_strided(sizes, strides);
}

HeadNorm norm(const NormArgs& args, Tensor* held) {
  HeadNorm n;
  if (!args.weight) return n;
  n.kind = args.layer ? HeadNorm::layer : HeadNorm::rms;
  held[0] = f32_contiguous(*args.weight);
  n.weight = held[0].const_data_ptr<float>();
  if (args.bias) {
    held[1] = f32_contiguous(*args.bias);
    n.bias = held[1].const_data_ptr<float>();
  }
  n.head_stride = args.weight->dim() == 2 ? args.weight->size(1) : 0;
  n.eps = static_cast<float>(args.eps);
  return n;
}

}  // namespace

void check(const Args& a) {
  check_tensors(a);
  check_masks(a);
  check_segments(a);
  check_numbers(a);
  check_rope(a);
  check_norm(a, a.q_norm, a.heads());
  check_norm(a, a.k_norm, a.kv_heads());
}

void check_saved(const Args& a, const Tensor& grad, const OptionalTensor& grad_lse,
                 const Tensor& out, const Tensor& lse) {
  at::DimVector rows(a.query.sizes());
  rows.back() = a.value_dim();
  const auto fits = [&](const Tensor& x) {
    return x.sizes() == rows && x.scalar_type() == a.query.scalar_type();
  };
  TORCH_CHECK_VALUE(fits(out) && fits(grad), a.op(), " backward: out has shape ", out.sizes(),
                    " and its gradient ", grad.sizes(), ", which do not belong to these queries");
  const auto lengths = [&](const Tensor& x) {
    return x.numel() == a.batch() * a.heads() * a.queries() && x.scalar_type() == at::kFloat;
  };
  TORCH_CHECK_VALUE(lengths(lse) && (!grad_lse || lengths(*grad_lse)), a.op(),
                    " backward: lse has shape ", lse.sizes(),
                    " and does not belong to these queries");
}

HeadsRef heads_of(const Tensor& x) { return heads_ref<HeadsRef>(x, x.const_data_ptr()); }

MutableHeadsRef mutable_heads(const Tensor& x) {
  return heads_ref<MutableHeadsRef>(x, x.mutable_data_ptr());
}

AttentionOperands::AttentionOperands(const Args& a, Tensor (*readable)(const Tensor&))
    : query_(readable(a.query)), key_(readable(a.key)), value_(readable(a.value)) {
  in.query = heads_of(query_);
  in.key = heads_of(key_);
  in.value = heads_of(value_);
  in.dtype = feature_dtype(a.op(), "query", a.query);
  in.heads = a.heads();
  in.kv_heads = a.kv_heads();
  in.head_dim = a.head_dim();
  in.value_dim = a.value_dim();
  in.scale =
      static_cast<float>(a.scale.value_or(1.0 / std::sqrt(static_cast<double>(a.head_dim()))));
  in.softcap = static_cast<float>(a.softcap);
  in.lse_head_stride = a.queries();
  in.lse_batch_stride = a.heads() * a.queries();
  if (a.mask) use_mask(a);
  if (a.rope_cos) use_rope(a);
  in.query_norm = norm(a.q_norm, norms_);
  in.key_norm = norm(a.k_norm, norms_ + 2);
}

void AttentionOperands::use_mask(const Args& a) {
  mask_ = four_dims(*a.mask);
  if (mask_.size(3) != a.keys()) {
    mask_ = mask_.expand({-1, -1, -1, a.keys()}).contiguous();
  } else if (mask_.stride(3) != 1 && mask_.size(3) != 1) {
    mask_ = mask_.contiguous();
  }
  const bool boolean = mask_.scalar_type() == at::kBool;
  in.mask.kind = boolean ? AttentionMask::boolean : AttentionMask::additive;
  in.mask.data = mask_.const_data_ptr();
  if (!boolean) in.mask.dtype = feature_dtype(a.op(), "attn_mask", mask_);
  in.mask.batch_stride = stride_or_0(mask_, 0);
  in.mask.head_stride = stride_or_0(mask_, 1);
  in.mask.row_stride = stride_or_0(mask_, 2);
}

void AttentionOperands::use_rope(const Args& a) {
  cos_ = a.rope_cos->contiguous();
  sin_ = a.rope_sin->contiguous();
  in.rope.cos = cos_.const_data_ptr<float>();
  in.rope.sin = sin_.const_data_ptr<float>();
  in.rope.half = cos_.size(-1);
  in.rope.batch_stride = cos_.dim() == 3 ? stride_or_0(cos_, 0) : 0;
  in.rope.interleaved = a.rope_interleaved;
}

AttentionFwdResult empty_results(const Args& a) {
  const auto f32 = a.query.options().dtype(at::kFloat);
  return {heads_like(a.query, a.value_dim(), a.query.options()),
          a.packed() ? at::empty({a.heads(), a.queries()}, f32)
                     : at::empty({a.batch(), a.heads(), a.queries()}, f32)};
}

AttentionGradients::AttentionGradients(const Args& a, int64_t needs) : a_(a) {
  const auto like = [&](const Tensor& x, int64_t need, MutableHeadsRef& ref) {
    if (!(needs & need)) return at::empty({0}, x.options());
    const Tensor grad = heads_like(x, x.size(-1), x.options());
    ref = mutable_heads(grad);
    return grad;
  };
  query_ = like(a.query, kNeedQuery, grads.query);
  key_ = like(a.key, kNeedKey, grads.key);
  value_ = like(a.value, kNeedValue, grads.value);

  const auto f32 = a.query.options().dtype(at::kFloat);
  if (a.mask && needs & kNeedMask && a.mask->scalar_type() != at::kBool) {
    at::DimVector sizes(four_dims(*a.mask).sizes());
    sizes[3] = a.keys();
    f32_[0] = at::zeros(sizes, f32);
    grads.mask = f32_[0].mutable_data_ptr<float>();
    grads.mask_batch_stride = stride_or_0(f32_[0], 0);
    grads.mask_head_stride = stride_or_0(f32_[0], 1);
    grads.mask_row_stride = stride_or_0(f32_[0], 2);
  }
  const auto sums = [&](const OptionalTensor& x, int64_t need, Tensor& grad) -> float* {
    if (!x || !(needs & need)) return nullptr;
    grad = at::zeros(x->sizes(), f32);
    return grad.mutable_data_ptr<float>();
  };
  grads.query_norm_weight = sums(a.q_norm.weight, kNeedQueryWeight, f32_[1]);
  grads.query_norm_bias = sums(a.q_norm.bias, kNeedQueryBias, f32_[2]);
  grads.key_norm_weight = sums(a.k_norm.weight, kNeedKeyWeight, f32_[3]);
  grads.key_norm_bias = sums(a.k_norm.bias, kNeedKeyBias, f32_[4]);
}

void AttentionGradients::zero() {
  for (const Tensor* x : {&query_, &key_, &value_}) x->zero_();
}

AttentionBwdResult AttentionGradients::results() {
  if (f32_[0].defined() && four_dims(*a_.mask).size(3) != a_.keys()) {
    f32_[0] = f32_[0].sum(3, /*keepdim=*/true);
  }
  const auto like = [&](const Tensor& grad, const OptionalTensor& x) {
    if (!grad.defined()) return at::empty({0}, a_.query.options());
    return grad.view(x->sizes()).to(x->scalar_type());
  };
  return {query_,
          key_,
          value_,
          like(f32_[0], a_.mask),
          like(f32_[1], a_.q_norm.weight),
          like(f32_[2], a_.q_norm.bias),
          like(f32_[3], a_.k_norm.weight),
          like(f32_[4], a_.k_norm.bias)};
}

namespace {

// --- on the CPU ---

std::vector<int64_t> segment_ends(const Args& a, const char* name, const Tensor& cu, int64_t rows) {
  std::vector<int64_t> ends(cu.size(0));
  const Tensor values = cu.to(at::kLong).contiguous();
  std::copy_n(values.const_data_ptr<int64_t>(), ends.size(), ends.begin());
  TORCH_CHECK_VALUE(ends.front() == 0, a.op(), ": ", name, " begins with ", ends.front(),
                    ", expected 0");
  for (size_t i = 1; i < ends.size(); ++i) {
    TORCH_CHECK_VALUE(ends[i] >= ends[i - 1], a.op(), ": ", name, " falls from ", ends[i - 1],
                      " to ", ends[i], " at entry ", i, ", expected non-decreasing offsets");
  }
  TORCH_CHECK_VALUE(ends.back() <= rows, a.op(), ": ", name, " ends with ", ends.back(),
                    ", expected at most the number of rows, ", rows);
  return ends;
}

// Which keys each query sees, as segments and intervals.
class Call : public AttentionOperands {
 public:
  bool gaps = false;  // some rows are in no segment, or in one without queries or keys

  explicit Call(const Args& a) : AttentionOperands(a, rows_contiguous), a_(a) {
    if (a.packed()) {
      add_packed();
    } else {
      add_batch();
    }
    in.segments = segments_.data();
    in.segment_count = static_cast<int64_t>(segments_.size());
  }

  bool empty() const { return segments_.empty(); }

 private:
  // The keys of a segment that its queries see by their place, which is that of key i + shift;
  // false: all of them.
  bool intervals(int64_t queries, int64_t keys, int64_t shift, int32_t* range) const {
    const int64_t all = queries + keys;  // beyond, a window has no limit
    bool limited = false;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t place = i + shift;
      int64_t begin = 0, end = keys;
      if (a_.is_causal) end = std::min(end, place + 1);
      if (a_.window_left >= 0) begin = std::max(begin, place - std::min(a_.window_left, all));
      if (a_.window_right >= 0) end = std::min(end, place + std::min(a_.window_right, all) + 1);
      limited = limited || begin > 0 || end < keys;
      put(range, i, begin, end, keys);
    }
    return limited;
  }

  static void put(int32_t* range, int64_t i, int64_t begin, int64_t end, int64_t keys) {
    begin = std::min(begin, keys);
    range[2 * i] = static_cast<int32_t>(begin);
    range[2 * i + 1] = static_cast<int32_t>(std::max(begin, end));
  }

  bool by_place() const { return a_.is_causal || a_.window_left >= 0 || a_.window_right >= 0; }

  void add_batch() {
    const int64_t batch = a_.batch(), queries = a_.queries(), keys = a_.keys();
    gaps = queries == 0 || keys == 0;
    if (gaps) return;
    int64_t batch_stride = 0;
    if (a_.kv_range) {
      const int64_t entries = a_.kv_range->size(0), heads = a_.kv_range->size(1);
      in.range_head_stride = heads == 1 ? 0 : 2 * queries;
      batch_stride = entries == 1 ? 0 : 2 * heads * queries;
      use_range(a_.kv_range->contiguous(), entries * heads, queries, keys);
    } else if (by_place()) {
      ranges_.resize(2 * queries);
      if (!intervals(queries, keys, 0, ranges_.data())) ranges_.clear();
    }
    segments_.resize(batch);
    for (int64_t b = 0; b < batch; ++b) {
      segments_[b] = {b,       0,    0,
                      queries, keys, ranges_.empty() ? nullptr : ranges_.data() + b * batch_stride};
    }
  }

  // What kv_range and the places of the queries both allow.
  void use_range(const Tensor& kv_range, int64_t count, int64_t queries, int64_t keys) {
    std::vector<int32_t> places(2 * queries);
    intervals(queries, keys, 0, places.data());
    ranges_.resize(2 * count * queries);
    const int32_t* given = kv_range.const_data_ptr<int32_t>();
    for (int64_t j = 0; j < count; ++j, given += 2 * queries) {
      int32_t* range = ranges_.data() + 2 * j * queries;
      for (int64_t i = 0; i < queries; ++i) {
        put(range, i, std::max(given[2 * i], places[2 * i]),
            std::min(given[2 * i + 1], places[2 * i + 1]), keys);
      }
    }
  }

  void add_packed() {
    const auto q = segment_ends(a_, "cu_seqlens_q", *a_.cu_seqlens_q, a_.queries());
    const auto k = segment_ends(a_, "cu_seqlens_k", *a_.cu_seqlens_k, a_.keys());
    gaps = q.back() < a_.queries() || k.back() < a_.keys();
    segments_.reserve(q.size() - 1);
    for (size_t s = 0; s + 1 < q.size(); ++s) {
      const int64_t queries = q[s + 1] - q[s], keys = k[s + 1] - k[s];
      TORCH_CHECK_VALUE(!a_.rope_cos || queries <= keys, a_.op(), ": rope came, and segment ", s,
                        " has ", queries, " queries and ", keys,
                        " keys; the queries are the last of the keys, so at most as many");
      if (queries > 0 && keys > 0) {
        segments_.push_back({0, q[s], k[s], queries, keys, nullptr});
      } else {
        gaps = gaps || queries > 0 || keys > 0;
      }
    }
    if (by_place()) add_ranges();
  }

  // Segments of equal lengths, such as windows, share their intervals where they are neighbours.
  void add_ranges() {
    constexpr size_t kAll = std::numeric_limits<size_t>::max();
    std::vector<size_t> at(segments_.size(), kAll);
    for (size_t s = 0; s < segments_.size(); ++s) {
      const AttentionSegment& own = segments_[s];
      if (s > 0 && own.queries == segments_[s - 1].queries && own.keys == segments_[s - 1].keys) {
        at[s] = at[s - 1];
        continue;
      }
      const size_t begin = ranges_.size();
      ranges_.resize(begin + 2 * own.queries);
      if (intervals(own.queries, own.keys, own.keys - own.queries, ranges_.data() + begin)) {
        at[s] = begin;
      } else {
        ranges_.resize(begin);
      }
    }
    for (size_t s = 0; s < segments_.size(); ++s) {
      if (at[s] != kAll) segments_[s].range = ranges_.data() + at[s];
    }
  }

  const Args& a_;
  std::vector<AttentionSegment> segments_;
  std::vector<int32_t> ranges_;
};

// -> out, in the layout of the queries, and lse (B, H, Nq) or (H, Tq)
[[maybe_unused]] AttentionFwdResult attention_fwd(VLM_ATTENTION_PARAMS) {
  const Args a(VLM_ATTENTION_ARGS);
  check(a);
  const Call call(a);

  const auto [out, lse] = empty_results(a);
  if (call.gaps) {
    out.zero_();
    lse.fill_(-std::numeric_limits<float>::infinity());
  }
  if (call.empty()) return {out, lse};
  const Tensor scratch = take_workspace({cpu::attention_scratch_bytes(call.in)}, at::kByte);
  cpu::attention_fwd(call.in, mutable_heads(out), lse.mutable_data_ptr<float>(),
                     scratch.mutable_data_ptr());
  return {out, lse};
}

// -> gradients of query, key, value, mask, and weight and bias of q_norm and k_norm; (0,) where not
// needed.
[[maybe_unused]] AttentionBwdResult attention_bwd(const Tensor& grad,
                                                  const OptionalTensor& grad_lse,
                                                  VLM_ATTENTION_PARAMS, const Tensor& out,
                                                  const Tensor& lse, int64_t needs) {
  const Args a(VLM_ATTENTION_ARGS);
  check(a);
  check_saved(a, grad, grad_lse, out, lse);
  const Call call(a);

  AttentionGradients gradients(a, needs);
  if (call.gaps) gradients.zero();
  if (!call.empty()) {
    const Tensor g = rows_contiguous(grad), o = rows_contiguous(out), l = lse.contiguous();
    const Tensor gl = grad_lse ? grad_lse->contiguous() : Tensor();
    const AttentionGrads& grads = gradients.grads;
    const Tensor scratch =
        take_workspace({cpu::attention_bwd_scratch_bytes(call.in, grads)}, at::kByte);
    cpu::attention_bwd(call.in, heads_of(g), gl.defined() ? gl.const_data_ptr<float>() : nullptr,
                       heads_of(o), l.const_data_ptr<float>(), grads, scratch.mutable_data_ptr());
  }
  return gradients.results();
}

#define VLM_ATTENTION_SCHEMA                                                              \
  "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? kv_range, "         \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal, int window_left, "         \
  "int window_right, float? scale, float softcap, Tensor? rope_cos, Tensor? rope_sin, "   \
  "bool rope_interleaved, Tensor? q_norm_weight, Tensor? q_norm_bias, float q_norm_eps, " \
  "bool q_norm_layer, Tensor? k_norm_weight, Tensor? k_norm_bias, float k_norm_eps, "     \
  "bool k_norm_layer"

TORCH_LIBRARY_FRAGMENT(VLM_LIBRARY, m) {
  m.def("attention_fwd(" VLM_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("attention_bwd(Tensor grad, Tensor? grad_lse, " VLM_ATTENTION_SCHEMA
        ", Tensor out, Tensor lse, int needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#ifndef VLM_EMULATED  // there the CPU key belongs to the emulated kernels
TORCH_LIBRARY_IMPL(vlm_kernels, CPU, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
}
#endif

}  // namespace

void set_attention_kernels(const std::string& kind) {
  using cuda::AttentionKernels;
  TORCH_CHECK_VALUE(kind == "auto" || kind == "short" || kind == "long",
                    "set_attention_kernels: kind is '", kind,
                    "', expected 'auto', 'short' or 'long'");
  attention_kernels = kind == "short"  ? AttentionKernels::short_rows
                      : kind == "long" ? AttentionKernels::long_rows
                                       : AttentionKernels::automatic;
}

void bind_attention(pybind11::module_& m) {
  m.def("set_attention_kernels", &set_attention_kernels, pybind11::arg("kind"),
        "Which CUDA kernels run attention: 'auto', by shape, or 'short' (keys and values of a head "
        "in shared memory) or 'long' wherever they can.");
  bind_op<AttentionFwd>(m, "attention_fwd");
  bind_op<AttentionBwd>(m, "attention_bwd");
}

}  // namespace vlm
