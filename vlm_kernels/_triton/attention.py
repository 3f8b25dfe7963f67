"""attention and attention_varlen in Triton: the ops of csrc/ops/attention.cpp once more, the same
schemas in the namespace `vlm_kernels_triton`.

Whatever says which keys a query sees, but attn_mask, becomes one interval a row
(`_attention_intervals`). Forward: `prepare_kernel` normalises and rotates where that is asked for,
`attention_kernel` walks the keys of a tile of queries (FlashAttention, Dao et al.,
arXiv:2205.14135), and where there are too few tiles to fill the device its programs share the keys
and `combine_kernel` puts the shares together in their order. Nothing is read back to the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.attention import register_fakes
from . import _attention_bwd, _attention_tiles, _tiles
from . import _attention_kernels as kernels
from ._attention_call import Call, Norm, broadcast_strides
from ._compat import INTERPRET
from .contrastive import NAMESPACE as NAMESPACE
from .contrastive import _guarded, _precision

_ALIGNMENTS = (8, 4, 2, 1)  # of rows, in features: how many are loaded at a time
# Queries of the heads of one key head, up to which they share a program: with more, the addresses
# of their rows spill.
TOGETHER = 32
_KEY_TILES = 4  # of a program, at least, where programs share the keys
PREPARED, COMBINED = 2048, 1024  # features of a block of rows of the small kernels

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? kv_range, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal, int window_left, "
    "int window_right, float? scale, float softcap, Tensor? rope_cos, Tensor? rope_sin, "
    "bool rope_interleaved, Tensor? q_norm_weight, Tensor? q_norm_bias, float q_norm_eps, "
    "bool q_norm_layer, Tensor? k_norm_weight, Tensor? k_norm_bias, float k_norm_eps, "
    "bool k_norm_layer"
)
SCHEMAS = {
    "attention_fwd": f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    "attention_bwd": f"(Tensor grad, Tensor? grad_lse, {_ARGUMENTS}, Tensor out, Tensor lse, "
    "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """-> out, in the layout of the queries, and lse (B, H, Nq) or (H, Tq)."""
    call = Call(*args)
    query = args[0]
    out = call.like(query, call.dv)
    lse = query.new_empty(call.lse_shape(), dtype=torch.float32)
    if call.empty:
        return out.zero_(), lse.fill_(-torch.inf)
    prepare(call)
    _forward(call, out, lse)
    return out, lse


def attention_bwd(grad: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """-> gradients of query, key, value, attn_mask, and weight and bias of q_norm and k_norm; (0,)
    where not needed."""
    *call_args, out, lse, needs = args
    call = Call(*call_args)
    if not call.empty:
        prepare(call)
    return _attention_bwd.backward(call, grad, grad_lse, out, lse, needs)


# --- forward ---


def prepare(call: Call) -> None:
    """Sets call.q and call.k where they are not query and key."""
    rope = call.rope
    if call.q_norm or rope:
        places = rope.places if rope else None
        call.q = _prepared(call, call.query, call.q_norm, rope.first if rope else 0, places)
    if call.k_norm or rope:
        call.k = _prepared(call, call.key, call.k_norm, 0, None)


def _prepared(
    call: Call, x: Tensor, norm: Norm | None, first: int, places: Tensor | None
) -> Tensor:
    b, heads, rows, d = x.shape
    out = x.new_empty(x.shape)
    width = triton.next_power_of_2(d)
    block = max(1, min(triton.next_power_of_2(rows), PREPARED // width))
    blocks = triton.cdiv(rows, block)
    rope, kind, turn = call.rope, kernels.NO_NORM, kernels.NO_ROPE
    if norm is not None:
        kind = kernels.LAYER if norm.layer else kernels.RMS
    if rope is not None:
        turn = kernels.INTERLEAVED if rope.interleaved else kernels.HALVES
    kernels.prepare_kernel[(b * heads * blocks,)](
        x,
        out,
        x if norm is None else norm.weight,
        x if norm is None or norm.bias is None else norm.bias,
        x if rope is None else rope.cos,
        x if rope is None else rope.sin,
        x if places is None else places,
        rows,
        heads,
        blocks,
        *x.stride()[:3],
        d if norm is not None and norm.weight.dim() == 2 else 0,
        0 if rope is None else rope.batch_stride,
        first,
        0.0 if norm is None else norm.eps,
        NORM=kind,
        BIAS=norm is not None and norm.bias is not None,
        ROPE=turn,
        PLACES=places is not None,
        HALF=0 if rope is None else rope.half,
        D=d,
        BD=width,
        BR=block,
        num_warps=4,
    )
    return out


def _forward(call: Call, out: Tensor, lse: Tensor) -> None:
    arch = _tiles.architecture(call.device)
    dim = max(sum(call.pieces), sum(call.value_pieces))
    side_by_side = _attention_tiles.multiprocessors(call.device)
    together = call.group > 1 and call.nq * call.group <= TOGETHER
    queries, own_heads = call.nq, call.b * call.h
    if together:
        queries, own_heads = call.nq * call.group, call.b * call.kv_heads
    typical = min(queries, call.typical * (queries // call.nq))
    tile = _attention_tiles.choose(
        arch,
        out.element_size(),
        dim,
        call.mask is not None,
        typical,
        own_heads * triton.cdiv(queries, typical),
        side_by_side,
    )
    tiles = triton.cdiv(queries, tile.queries)
    # programs share the keys of a tile of queries where multiprocessors would have nothing to do
    free = side_by_side // (own_heads * tiles)
    splits = max(1, min(free, triton.cdiv(call.nk, tile.keys * _KEY_TILES)))
    heads = call.heads(out)
    target, target_lse, split_stride, lse_stride = heads, lse, 0, 0
    if splits > 1:
        target = out.new_empty((splits, call.b, call.h, call.nq, call.dv), dtype=torch.float32)
        target_lse = out.new_empty((splits, *lse.shape), dtype=torch.float32)
        split_stride, lse_stride = target.stride(0), lse.numel()
    rows, mask = call.rows, call.mask
    strides = (call.q.stride()[:3], call.k.stride()[:3], call.value.stride()[:3])
    of_out = (split_stride, *target.stride()[-4:-1])
    every_stride = (*sum(strides, ()), *of_out)
    kernels.attention_kernel[(own_heads * splits * tiles,)](
        call.q,
        call.k,
        call.value,
        call.q if mask is None else mask,
        call.q if rows is None else rows,
        target,
        target_lse,
        call.nq,
        call.nk,
        call.kv_heads,
        call.group,
        tiles,
        splits,
        *strides[0],
        *strides[1],
        *strides[2],
        *((0,) * 4 if mask is None else mask.stride()),
        *broadcast_strides(rows),
        *of_out,
        lse_stride,
        abs(call.scale),
        call.softcap,
        MASK=call.mask_kind,
        ROWS=rows is not None,
        SOFTCAP=call.softcap != 0.0,
        NEGATE=call.scale < 0,
        TOGETHER=together,
        **call.piece_options(),
        ALIGN=next(n for n in _ALIGNMENTS if all(stride % n == 0 for stride in every_stride)),
        PRECISION=_precision(),
        BM=tile.queries,
        BN=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        width = triton.next_power_of_2(call.dv)
        block = max(1, min(triton.next_power_of_2(call.nq), COMBINED // width))
        blocks = triton.cdiv(call.nq, block)
        kernels.combine_kernel[(call.b * call.h * blocks,)](
            target, target_lse, heads, lse, call.nq, call.h, blocks, splits, split_stride,
            lse_stride, *heads.stride()[:3], DV=call.dv, BV=width, BR=block, num_warps=4,
        )  # fmt: skip


# --- gradients ---

_DIFFERENTIABLE = (0, 1, 2, 3, 15, 16, 19, 20)  # arguments of the forward, in the order of `needs`


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)  # few use lse, and a gradient of zeros would cost a tensor


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    args = [x if t is None else t for t, x in zip(tensors, ctx.others, strict=True)]
    needs = sum(1 << bit for bit, i in enumerate(_DIFFERENTIABLE) if ctx.needs_input_grad[i])
    grads: list[Tensor | None] = [None] * len(args)
    if needs and not (grad is None and grad_lse is None):
        grad = torch.zeros_like(out) if grad is None else grad
        bwd = torch.ops.vlm_kernels_triton.attention_bwd
        found = bwd(grad, grad_lse, *args, out, lse, needs)
        for bit, i in enumerate(_DIFFERENTIABLE):
            grads[i] = found[bit] if needs >> bit & 1 else None
    return tuple(grads)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        f"{ctx.op} has no second derivative: its backward is once_differentiable; use "
        "backend='reference'"
    )


def _name_of_call(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.op = "attention" if inputs[7] is None else "attention_varlen"


# --- registration ---

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _guarded(globals()[_name]), "CPU" if INTERPRET.value else "CUDA")
register_fakes(NAMESPACE)
torch.library.register_autograd(
    f"{NAMESPACE}::attention_fwd", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    f"{NAMESPACE}::attention_bwd", _no_second_derivative, setup_context=_name_of_call
)
