"""The arguments of attention_fwd and attention_bwd as their Triton kernels take them."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _attention_intervals as _intervals
from ._attention_math import ADDITIVE_MASK, BOOL_MASK, NO_MASK

MAX_PIECES = 3


class Norm(NamedTuple):
    """Normalisation of the rows of each head."""

    weight: Tensor  # (D,) or (heads, D)
    bias: Tensor | None  # the same
    eps: float
    layer: bool  # else root mean square


class Rope(NamedTuple):
    """Rotation of the first 2 `half` features."""

    cos: Tensor  # (1 or B, Nk, half) fp32, contiguous
    sin: Tensor
    half: int
    batch_stride: int  # 0 where entries of a batch share the tables
    interleaved: bool
    first: int  # query i takes row first + i,
    places: Tensor | None  # (Nq,) int32: or this one


@functools.cache
def pieces(dim: int) -> tuple[int, int, int]:
    """Powers of two of at least 16 that cover a head dim, the largest first, 0 where unused."""
    units = -(-dim // 16)
    while units.bit_count() > MAX_PIECES:
        units += units & -units
    found = [16 << i for i in reversed(range(units.bit_length())) if units >> i & 1]
    first, second, third = found + [0] * (MAX_PIECES - len(found))
    return first, second, third


class Call:
    """One call, dense (B, H, N, D) or packed (T, H, D); a packed one is a batch of one entry.

    Attributes:
        given: query, key and value as they came to the op.
        query, key, value: (B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), any strides but the
            last, which is 1.
        q, k: what is multiplied: query and key, or contiguous copies in the same dtype where a norm
            or a rotation changes them (`attention.prepare`).
        mask: (B, H, Nq, Nk) bool or floating, stride 0 where it broadcasts, or None; attn_mask:
            as it came.
        rows: (1 or B, 1 or H, Nq, 2) int32, the interval of keys that each query sees, or None.
        scale, softcap: of the scores; group: query heads of a key head.
        q_norm, k_norm, rope: None where there is none.
        pieces, value_pieces: of D and Dv, see `pieces`.
        typical: queries of a head, or on average of a packed segment.
        empty: no query or no key, so nothing to compute.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        kv_range: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        is_causal: bool,
        window_left: int,
        window_right: int,
        scale: float | None,
        softcap: float,
        rope_cos: Tensor | None,
        rope_sin: Tensor | None,
        rope_interleaved: bool,
        q_norm_weight: Tensor | None,
        q_norm_bias: Tensor | None,
        q_norm_eps: float,
        q_norm_layer: bool,
        k_norm_weight: Tensor | None,
        k_norm_bias: Tensor | None,
        k_norm_eps: float,
        k_norm_layer: bool,
    ) -> None:
        self.packed = cu_seqlens_q is not None
        self.given = (query, key, value)
        self.query, self.key, self.value = (self.heads(rows_contiguous(x)) for x in self.given)
        self.b, self.h, self.nq, self.d = self.query.shape
        _, self.kv_heads, self.nk, self.dv = self.value.shape
        self.device, self.dtype = query.device, query.dtype
        self.empty = 0 in (self.b, self.h, self.nq, self.nk)
        segments = 1 if cu_seqlens_q is None else max(1, cu_seqlens_q.shape[0] - 1)
        self.typical = -(-self.nq // segments)
        self.group = self.h // max(self.kv_heads, 1)
        self.scale = 1 / math.sqrt(self.d) if scale is None else scale
        self.softcap = softcap
        self.pieces, self.value_pieces = pieces(self.d), pieces(self.dv)
        self.q_norm = _norm(q_norm_weight, q_norm_bias, q_norm_eps, q_norm_layer)
        self.k_norm = _norm(k_norm_weight, k_norm_bias, k_norm_eps, k_norm_layer)
        self.attn_mask = attn_mask
        self.mask: Tensor | None = None
        if attn_mask is not None:
            self.mask = attn_mask.expand(self.b, self.h, self.nq, self.nk)
        self.rows, places = _intervals.intervals(
            self.nq,
            self.nk,
            self.device,
            is_causal,
            window_left,
            window_right,
            kv_range,
            cu_seqlens_q,
            cu_seqlens_k,
        )
        self.rope: Rope | None = None
        if rope_cos is not None and rope_sin is not None:
            self.rope = self._rope(rope_cos, rope_sin, rope_interleaved, places)
        self.q, self.k = self.query, self.key

    def heads(self, x: Tensor) -> Tensor:
        """(1, H, T, D) of packed rows (T, H, D); dense ones as they are."""
        return x.transpose(0, 1)[None] if self.packed else x

    def like(self, x: Tensor, features: int, dtype: torch.dtype | None = None) -> Tensor:
        """A fresh tensor with the rows of x, query, key or value as they came to the op, in their
        layout: (B, N, H, D) data for such."""
        if x.dim() == 4 and x.stride(1) < x.stride(2):
            b, h, n, _ = x.shape
            return x.new_empty((b, n, h, features), dtype=dtype).transpose(1, 2)
        return x.new_empty((*x.shape[:-1], features), dtype=dtype)

    @property
    def mask_kind(self) -> int:
        if self.mask is None:
            return NO_MASK
        return BOOL_MASK if self.mask.dtype == torch.bool else ADDITIVE_MASK

    def piece_options(self) -> dict[str, int]:
        """The head dims as the kernels are compiled for them."""
        names = ("D", "D0", "D1", "D2", "DV", "V0", "V1", "V2")
        values = (self.d, *self.pieces, self.dv, *self.value_pieces)
        return dict(zip(names, values, strict=True))

    def lse_shape(self) -> tuple[int, ...]:
        """Of the op's lse; as the kernels see it, (B, H, Nq), it is contiguous either way."""
        return (self.h, self.nq) if self.packed else (self.b, self.h, self.nq)

    def _rope(self, cos: Tensor, sin: Tensor, interleaved: bool, places: Tensor | None) -> Rope:
        cos, sin = (t.to(torch.float32).contiguous() for t in (cos, sin))
        half = cos.shape[-1]
        stride = self.nk * half if cos.dim() == 3 and cos.shape[0] > 1 else 0
        return Rope(cos, sin, half, stride, interleaved, self.nk - self.nq, places)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def broadcast_strides(rows: Tensor | None) -> tuple[int, int]:
    """Of batch and heads of intervals, 0 where they share them."""
    if rows is None:
        return 0, 0
    batch, head = (0 if n == 1 else s for n, s in zip(rows.shape[:2], rows.stride()[:2]))
    return batch, head


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool) -> Norm | None:
    if weight is None:
        return None
    return Norm(weight.contiguous(), None if bias is None else bias.contiguous(), eps, layer)
