"""The backward of attention in Triton: gradients from `out`, lse and the scores computed again.

Two passes, each program the only writer of what it owns (Dao, FlashAttention-2, arXiv:2307.08691,
without its atomics): over the queries for each tile of keys, over the keys for each tile of
queries. A third forms the gradient of an additive mask, a fourth takes gradients of queries and
keys back through rotation and normalisation. Sums have an order that shapes and the architecture
decide. What no one needs is not computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import _attention_bwd_kernels as kernels
from . import _attention_bwd_tiles, _tiles
from ._attention_call import Call, Norm, Rope, broadcast_strides, rows_contiguous
from ._attention_kernels import HALVES, INTERLEAVED, LAYER, NO_NORM, NO_ROPE, RMS
from ._attention_tiles import Tile
from .contrastive import _precision

QUERY, KEY, VALUE, MASK, Q_WEIGHT, Q_BIAS, K_WEIGHT, K_BIAS = (1 << i for i in range(8))
"""Bits of `needs`, as csrc/ops/attention.h has them, in the order of the gradients."""

ALIGNMENTS = (8, 4, 2, 1)  # of rows, in features: how many are loaded at a time
DELTA_ROWS = 64
BOUNDS_BLOCK = 1024
PREPARED, PREPARED_TILES = 1024, 32  # features of a tile of rows, tiles of a program
_PROGRAMS = 264  # two for each multiprocessor of an H200
_LEAST = 4  # tiles that a split is worth


def backward(
    call: Call, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: int
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, attn_mask, and weight and bias of q_norm and k_norm.

    Args:
        grad, out: (B, H, Nq, Dv), packed (Tq, H, Dv); grad_lse, lse: (B, H, Nq), packed (H, Tq).
        needs: bits of those that are wanted.

    Returns:
        Eight tensors in the shapes and dtypes of the arguments, (0,) where not wanted.
    """
    return _Backward(call, grad, grad_lse, out, lse, needs).gradients()


class _Backward:
    def __init__(
        self,
        call: Call,
        grad: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: int,
    ) -> None:
        self.call, self.needs = call, needs
        self.grad, self.out = (call.heads(rows_contiguous(x)) for x in (grad, out))
        self.lse = lse.contiguous()
        self.grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self.tiles = _attention_bwd_tiles.choose(
            _tiles.architecture(call.device),
            call.dtype.itemsize,
            max(sum(call.pieces), sum(call.value_pieces)),
            call.mask is not None,
        )

    def gradients(self) -> tuple[Tensor, ...]:
        call, needs = self.call, self.needs
        query, key, value = (
            call.like(x, x.shape[-1]) if needs & bit else x.new_empty(0)
            for x, bit in zip(call.given, (QUERY, KEY, VALUE), strict=True)
        )
        of_q = self._rows(call.query, query, call.q_norm, QUERY, Q_WEIGHT, Q_BIAS)
        of_k = self._rows(call.key, key, call.k_norm, KEY, K_WEIGHT, K_BIAS)
        of_v = call.heads(value) if needs & VALUE else None
        if call.empty:
            for x in (of_q, of_k, of_v):
                if x is not None:
                    x.zero_()
        else:
            # the gradient of the values alone has no use for it
            self.delta = self._delta() if needs & ~VALUE else self.lse
            if of_k is not None or of_v is not None:
                self._dkdv(of_k, of_v)
            if of_q is not None:
                self._dq(of_q)
        mask = self._dmask()
        rope = call.rope
        q_norm = self._before(call.query, of_q, query, call.q_norm, rope, Q_WEIGHT, Q_BIAS)
        if rope is not None:  # a key's row is its own
            rope = rope._replace(first=0, places=None)
        k_norm = self._before(call.key, of_k, key, call.k_norm, rope, K_WEIGHT, K_BIAS)
        return query, key, value, mask, *q_norm, *k_norm

    def _rows(
        self, x: Tensor, result: Tensor, norm: Norm | None, bit: int, weight: int, bias: int
    ) -> Tensor | None:
        """Where the gradient of what is multiplied goes, (B, H, N, D): fp32 if it goes on."""
        wanted = bit if norm is None else bit | weight | (bias if norm.bias is not None else 0)
        if not self.needs & wanted:
            return None
        if norm is None and self.call.rope is None:
            return self.call.heads(result)
        return x.new_empty(x.shape, dtype=torch.float32)

    # --- launches ---

    def _delta(self) -> Tensor:
        call = self.call
        delta = torch.empty_like(self.lse)
        grid = (triton.cdiv(call.nq, DELTA_ROWS) * call.b * call.h,)
        kernels.delta_kernel[grid](
            self.out,
            self.grad,
            self.lse,
            self.lse if self.grad_lse is None else self.grad_lse,
            delta,
            *self.out.stride()[:3],
            *self.grad.stride()[:3],
            call.h,
            call.nq,
            HAS_LSE=self.grad_lse is not None,
            D=call.dv,
            WIDTH=triton.next_power_of_2(call.dv),
            ALIGN=_align(self.out, self.grad),
            BM=DELTA_ROWS,
        )
        return delta

    def _operands(self) -> tuple[Any, ...]:
        """Tensors that each kernel of tiles reads; what there is not is never looked at."""
        call = self.call
        mask = call.q if call.mask is None else call.mask
        rows = call.q if call.rows is None else call.rows
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        return (call.q, call.k, call.value, self.grad, self.lse, self.delta, mask, rows)

    def _strides(self) -> tuple[int, ...]:
        call = self.call
        strides = [n for x in (call.q, call.k, call.value, self.grad) for n in x.stride()[:3]]
        strides += (0, 0, 0, 0) if call.mask is None else call.mask.stride()
        return (*strides, *broadcast_strides(call.rows))

    def _options(self, tile: Tile, *outs: Tensor) -> dict[str, Any]:
        call = self.call
        return {
            "HAS_ROWS": call.rows is not None,
            "MASK": call.mask_kind,
            "SOFTCAP": call.softcap != 0,
            **call.piece_options(),
            "ALIGN": _align(call.q, call.k, call.value, self.grad, *outs),
            "PRECISION": _precision(),
            "BM": tile.queries,
            "BN": tile.keys,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def _bounds(self, tile: Tile) -> Tensor | None:
        """First and last + 1 tile of queries that may see each tile of keys: (Rb, Rh, .., 2)."""
        call, rows = self.call, self.call.rows
        if rows is None:
            return None
        tiles = triton.cdiv(call.nk, tile.keys)
        bounds = rows.new_empty((*rows.shape[:2], tiles, 2))
        kernels.bounds_kernel[(bounds.numel() // 2,)](
            rows, bounds, call.nq, call.nk, BM=tile.queries, BN=tile.keys, BLOCK=BOUNDS_BLOCK
        )
        return bounds

    def _dkdv(self, of_key: Tensor | None, of_value: Tensor | None) -> None:
        call, tile = self.call, self.tiles.dkdv
        bounds = self._bounds(tile)
        outs = [call.q if x is None else x for x in (of_key, of_value)]
        grid = (triton.cdiv(call.nk, tile.keys) * call.b * call.kv_heads,)
        kernels.dkdv_kernel[grid](
            *self._operands(),
            call.q if bounds is None else bounds,
            *outs,
            *self._strides(),
            *broadcast_strides(bounds),
            *outs[0].stride()[:3],
            *outs[1].stride()[:3],
            call.kv_heads,
            call.group,
            call.nq,
            call.nk,
            call.scale,
            call.softcap,
            NEED_KEY=of_key is not None,
            NEED_VALUE=of_value is not None,
            **self._options(tile, *outs),
        )

    def _dq(self, of_query: Tensor) -> None:
        call, tile = self.call, self.tiles.dq
        programs = triton.cdiv(call.nq, tile.queries) * call.b * call.h
        splits = _splits(programs, triton.cdiv(call.nk, tile.keys))
        parts = of_query[None]
        if splits > 1:
            parts = of_query.new_empty((splits, *of_query.shape), dtype=torch.float32)
        kernels.dq_kernel[programs, splits](
            *self._operands(),
            parts,
            *self._strides(),
            *parts.stride()[:4],
            call.h,
            call.group,
            call.nq,
            call.nk,
            call.scale,
            call.softcap,
            **self._options(tile, parts),
        )
        if splits > 1:
            of_query.copy_(parts.sum(0))

    def _dmask(self) -> Tensor:
        call, tile, mask = self.call, self.tiles.dmask, self.call.attn_mask
        if mask is None or mask.dtype == torch.bool or not self.needs & MASK:
            return call.query.new_empty(0)
        if call.empty:
            return torch.zeros_like(mask, memory_format=torch.contiguous_format)
        batches, heads, rows, columns = (1,) * (4 - mask.dim()) + mask.shape
        row_tiles = triton.cdiv(call.nq, tile.queries)
        own = batches * heads * (row_tiles if rows == call.nq else 1)
        programs = triton.cdiv(call.nk, tile.keys) * own
        splits = _splits(programs, call.b * call.h * row_tiles // own)
        sums = mask.new_empty((splits, batches, heads, rows, call.nk), dtype=torch.float32)
        kernels.dmask_kernel[programs, splits](
            *self._operands(),
            sums,
            *self._strides(),
            batches,
            heads,
            call.b,
            call.h,
            call.group,
            call.nq,
            call.nk,
            call.scale,
            call.softcap,
            BY_ROW=rows == call.nq,
            **self._options(tile),
        )
        if columns != call.nk:
            sums = sums.sum(-1)
        return (sums[0] if splits == 1 else sums.sum(0)).reshape(mask.shape).to(mask.dtype)

    def _before(
        self,
        x: Tensor,
        of_rows: Tensor | None,
        result: Tensor,
        norm: Norm | None,
        rope: Rope | None,
        weight_bit: int,
        bias_bit: int,
    ) -> tuple[Tensor, Tensor]:
        """Fills `result`, of x before normalisation and rotation; gradients of weight and bias."""
        call, (b, h, n, d) = self.call, x.shape
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        need_weight = weight is not None and bool(self.needs & weight_bit)
        need_bias = bias is not None and bool(self.needs & bias_bit)
        width = triton.next_power_of_2(d)
        tile = max(1, PREPARED // width)
        chunks = triton.cdiv(n, tile * PREPARED_TILES)
        shape = (chunks, b, h, d)
        weights, biases = (
            x.new_zeros(shape if need else 0, dtype=torch.float32)
            for need in (need_weight, need_bias)
        )
        changed = norm is not None or rope is not None
        if of_rows is not None and changed and not call.empty:
            kind = NO_NORM
            if norm is not None:
                kind = LAYER if norm.layer else RMS
            turn = NO_ROPE
            if rope is not None:
                turn = INTERLEAVED if rope.interleaved else HALVES
            places = None if rope is None else rope.places
            need_x = result.dim() > 1
            out = call.heads(result) if need_x else x
            kernels.prepare_bwd_kernel[(chunks * b * h,)](
                of_rows,
                x,
                x if weight is None else weight,
                x if rope is None else rope.cos,
                x if rope is None else rope.sin,
                x if places is None else places,
                out,
                weights,
                biases,
                *x.stride()[:3],
                d if weight is not None and weight.dim() == 2 else 0,
                0 if rope is None else rope.batch_stride,
                *out.stride()[:3],
                h,
                n,
                0 if rope is None else rope.first,
                0 if rope is None else rope.half,
                0.0 if norm is None else norm.eps,
                NORM=kind,
                ROPE=turn,
                PLACES=places is not None,
                NEED_X=need_x,
                NEED_WEIGHT=need_weight,
                NEED_BIAS=need_bias,
                D=d,
                WIDTH=width,
                ALIGN=_align(x, out),
                BM=tile,
                TILES=PREPARED_TILES,
            )
        elif changed and result.dim() > 1:
            result.zero_()
        return _summed(weights, weight, need_weight), _summed(biases, bias, need_bias)


def _summed(parts: Tensor, parameter: Tensor | None, needed: bool) -> Tensor:
    """Sums (chunks, B, H, D), in the shape and dtype of the parameter."""
    if parameter is None or not needed:
        return parts
    over = (0, 1) if parameter.dim() == 2 else (0, 1, 2)
    return parts.sum(over, dtype=torch.float64).to(parameter.dtype)


def _splits(programs: int, steps: int) -> int:
    """Programs that share the `steps` of one, where there are too few to fill the device."""
    return max(1, min(_PROGRAMS // programs, steps // _LEAST))


def _align(*tensors: Tensor) -> int:
    """Features that all rows begin at multiples of."""
    strides = [n for x in tensors for n in x.stride()[:-1]]
    return next(k for k in ALIGNMENTS if all(n % k == 0 for n in strides))
