// Which kernels a call of attention runs on, in which order, and the scratch they share.
//
// Keys and values of a head that fit shared memory go to the kernels for short rows, everything
// else to those for long ones. The short forward normalises and rotates while it loads; the others
// take copies of queries and keys that were prepared before, and their gradients are finished
// after.
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {
namespace {

int limit(int64_t window) {
  return window < 0 || window > Problem::kNoLimit ? Problem::kNoLimit : static_cast<int>(window);
}

// Hands out parts of the scratch. Where that is only counted they are addresses of nothing, but not
// null, which would say that something is not wanted.
struct Carver {
  char* base;
  int64_t used = 0;

  void* take(int64_t bytes) {
    void* const part = base + used;
    used += round_up(bytes, 256);
    return part;
  }
};

HeadsRef as_input(const MutableHeadsRef& x) {
  return {x.data, x.batch_stride, x.head_stride, x.row_stride};
}

class Run {
 public:
  // Without a scratch nothing is started, and bytes() is what it must have.
  explicit Run(const AttentionCall& call, void* scratch = nullptr)
      : call_(call),
        in_(call.in),
        counting_(scratch == nullptr),
        carve_{counting_ ? reinterpret_cast<char*>(256) : static_cast<char*>(scratch)} {
    p_.query = in_.query;
    p_.key = in_.key;
    p_.value = in_.value;
    p_.batch = static_cast<int>(call.batch);
    p_.heads = static_cast<int>(in_.heads);
    p_.group = static_cast<int>(in_.heads / in_.kv_heads);
    p_.queries = static_cast<int>(call.queries);
    p_.keys = static_cast<int>(call.keys);
    p_.head_dim = static_cast<int>(in_.head_dim);
    p_.value_dim = static_cast<int>(in_.value_dim);
    p_.window_left = limit(call.window_left);
    p_.window_right = limit(call.window_right);
    p_.range = call.range;
    p_.range_batch_stride = call.range_batch_stride;
    p_.range_head_stride = in_.range_head_stride;
    p_.query_tile_count = static_cast<int>(ceil_div(call.queries, kTileRows));
    p_.key_tile_count = static_cast<int>(ceil_div(call.keys, kTileRows));
    p_.scale = in_.scale;
    p_.softcap = in_.softcap;
    p_.mask = in_.mask;
    query_ = {in_.query_norm, in_.rope, p_.keys, p_.keys - p_.queries};
    key_ = {in_.key_norm, in_.rope, p_.keys, 0};
  }

  const char* forward(const ForwardOut& out) {
    if (short_rows() && short_takes(p_)) {
      return start([&] { return short_fwd(p_, in_.dtype, query_, key_, out, stream()); });
    }
    cut_segments(/*keys=*/false);
    prepare();
    void* const own = carve_.take(long_scratch_bytes(p_));
    return start([&] { return long_fwd(p_, in_.dtype, out, own, stream()); });
  }

  const char* backward(BackwardArgs args, const AttentionGrads& grads) {
    cut_segments(/*keys=*/true);
    prepare();
    const bool query = wants(grads.query, grads.query_norm_weight, grads.query_norm_bias);
    const bool key = wants(grads.key, grads.key_norm_weight, grads.key_norm_bias);
    args.grad_query = target(query, grads.query, query_, p_.heads, p_.queries);
    args.grad_key = target(key, grads.key, key_, p_.heads / p_.group, p_.keys);
    args.grad_value = grads.value;
    if (query || key || grads.value.data) {
      if (short_rows() && short_bwd_takes(p_)) {
        start([&] { return short_bwd(p_, in_.dtype, args, stream()); });
      } else {
        void* const own = carve_.take(long_bwd_scratch_bytes(p_, args));
        start([&] { return long_bwd(p_, in_.dtype, args, own, stream()); });
      }
    }
    if (grads.mask) {
      void* const own = carve_.take(mask_bwd_scratch_bytes(p_, grads));
      start([&] { return mask_bwd(p_, in_.dtype, args, grads, own, stream()); });
    }
    finish(query, in_.query, args.grad_query, grads.query, query_, p_.heads, p_.queries,
           p_.query_tiles, p_.query_tile_count, grads.query_norm_weight, grads.query_norm_bias);
    finish(key, in_.key, args.grad_key, grads.key, key_, p_.heads / p_.group, p_.keys, nullptr, 0,
           grads.key_norm_weight, grads.key_norm_bias);
    return error_;
  }

  int64_t bytes() const { return carve_.used; }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(call_.stream); }

  // Keeps the first error; starts nothing after it, nor where only the scratch is counted.
  template <class Start>
  const char* start(const Start& kernel) {
    if (!counting_ && !error_) error_ = kernel();
    return error_;
  }

  bool short_rows() const {
    return call_.kernels != AttentionKernels::long_rows && !call_.query_offsets;
  }

  void cut_segments(bool keys) {
    if (!call_.query_offsets) return;
    constexpr int64_t kBytes = sizeof(PackedTile);
    PackedTile *query_tiles, *key_tiles = nullptr;
    p_.query_tile_count = packed_tiles(call_.queries, call_.segments);
    query_tiles = static_cast<PackedTile*>(carve_.take(kBytes * p_.query_tile_count));
    if (keys) {
      p_.key_tile_count = packed_tiles(call_.keys, call_.segments);
      key_tiles = static_cast<PackedTile*>(carve_.take(kBytes * p_.key_tile_count));
    }
    p_.query_tiles = query_tiles;
    p_.key_tiles = key_tiles;
    start([&] { return find_packed_tiles(call_, query_tiles, key_tiles); });
  }

  void prepare() {
    prepare(p_.query, query_, p_.heads, p_.queries, p_.query_tiles, p_.query_tile_count);
    prepare(p_.key, key_, p_.heads / p_.group, p_.keys, nullptr, 0);
  }

  // Replaces `rows` by their copy.
  void prepare(HeadsRef& rows, const RowTransform& transform, int heads, int count,
               const PackedTile* tiles, int tile_count) {
    if (!transform.any()) return;
    const MutableHeadsRef to = fresh(heads, count);
    const HeadsRef from = rows;
    start([&] {
      return prepare_rows(from, to.data, in_.dtype, p_.batch, heads, count, p_.head_dim, transform,
                          tiles, tile_count, stream());
    });
    rows = as_input(to);
  }

  // (batch, heads, rows, head_dim), contiguous
  MutableHeadsRef fresh(int heads, int rows) {
    const int64_t head = static_cast<int64_t>(rows) * p_.head_dim;
    void* const data = carve_.take(p_.batch * heads * head * element_size(in_.dtype));
    return {data, heads * head, head, p_.head_dim};
  }

  static bool wants(const MutableHeadsRef& grad, const float* weight, const float* bias) {
    return grad.data || weight || bias;
  }

  // Where the gradient of the prepared rows goes: where that of the rows does, if they are the
  // same.
  MutableHeadsRef target(bool wanted, const MutableHeadsRef& grad, const RowTransform& transform,
                         int heads, int rows) {
    if (!wanted) return {};
    return transform.any() ? fresh(heads, rows) : grad;
  }

  void finish(bool wanted, const HeadsRef& rows, const MutableHeadsRef& from,
              const MutableHeadsRef& to, const RowTransform& transform, int heads, int count,
              const PackedTile* tiles, int tile_count, float* weight, float* bias) {
    if (!wanted || !transform.any()) return;
    void* const own = carve_.take(
        finish_rows_scratch_bytes(p_.batch, heads, count, p_.head_dim, transform, tile_count));
    start([&] {
      return finish_rows(rows, from.data, to, in_.dtype, p_.batch, heads, count, p_.head_dim,
                         transform, tiles, tile_count, weight, bias, own, stream());
    });
  }

  const AttentionCall& call_;
  const AttentionInputs& in_;
  Problem p_{};
  RowTransform query_, key_;
  const bool counting_;
  Carver carve_;
  const char* error_ = nullptr;
};

}  // namespace

int64_t attention_scratch_bytes(const AttentionCall& call) {
  Run run(call);
  run.forward({});
  return run.bytes();
}

const char* attention_fwd(const AttentionCall& call, const MutableHeadsRef& out, float* lse,
                          void* scratch) {
  return Run(call, scratch).forward({out, lse});
}

int64_t attention_bwd_scratch_bytes(const AttentionCall& call, const AttentionGrads& grads) {
  Run run(call);
  run.backward({}, grads);
  return run.bytes();
}

const char* attention_bwd(const AttentionCall& call, const HeadsRef& grad, const float* grad_lse,
                          const HeadsRef& out, const float* lse, const AttentionGrads& grads,
                          void* scratch) {
  return Run(call, scratch).backward({grad, out, grad_lse, lse, {}, {}, {}}, grads);
}

}  // namespace vlm::cuda
