"""Softmax attention in plain, dense PyTorch: the ground truth of the op `attention`.

Everything is written from the definition, holds the (B, H, Nq, Nk) matrix and leaves the gradients
to autograd. Inputs of 16 bits and fp32 are multiplied and reduced in fp32, fp64 ones in fp64.
Arguments are taken as valid: the public functions in `vlm_kernels.ops.attention` check them.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, str]
HeadNorm = tuple[Tensor, Tensor | None, float, str]
Window = tuple[int, int]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    kv_range: Tensor | None = None,
    softcap: float = 0.0,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * query key^T + mask) value for each head, over the keys that a query may see.

    Args:
        query: (B, H, Nq, D), fp64, fp32, bf16 or fp16.
        key: (B, Hkv, Nk, D), value: (B, Hkv, Nk, Dv), the same dtype; H is a multiple of Hkv.
        attn_mask: broadcastable to (B, H, Nq, Nk). Bool: True where a query may see a key; float:
            added to the scaled product.
        dropout_p: 0.
        is_causal: query i sees keys j <= i.
        scale: 1 / sqrt(D) unless given.
        enable_gqa: whether H may differ from Hkv.
        window: (left, right): query i sees keys i - left to i + right; -1 is no limit.
        kv_range: (B or 1, H or 1, Nq, 2) integers: query i sees keys begin <= j < end.
        softcap: s -> softcap * tanh(s / softcap) before the mask; 0 is none.
        rope: (cos, sin) or (cos, sin, "half" | "interleaved"), (B or 1, Nk, R/2) or (Nk, R/2), for
            the first R features. Key j takes row j, query i row i + Nk - Nq.
        q_norm: (weight (D,) or (H, D), bias or None, eps, "rms" | "layer") of the rows of each
            head, before the rotation; k_norm alike, (D,) or (Hkv, D).

    Returns:
        (B, H, Nq, Dv) in the dtype of the inputs; with `return_lse` a tuple with the logarithm of
        the softmax' denominator, (B, H, Nq) fp32 (fp64 for fp64). A query that sees no key has 0
        and -inf.
    """
    visible = _visible(query, key, 0, is_causal, window, kv_range)
    with _no_autocast(query):
        s = _scores(query, key, scale, softcap, rope, q_norm, k_norm)
        out, lse = _softmax_times_value(_masked(s, attn_mask, visible), value)
    if query.transpose(1, 2).is_contiguous():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention within each of S packed segments: images, or sequences of any length.

    Args: as `attention`, except
        query: (Tq, H, D), key: (Tk, Hkv, D), value: (Tk, Hkv, Dv).
        cu_seqlens_q: (S + 1,) integers, non-decreasing from 0: segment s has the queries
            cu_seqlens_q[s] to cu_seqlens_q[s + 1]; cu_seqlens_k alike.
        is_causal: aligned at the last query and the last key of a segment, as in flash-attention:
            query i of nq sees the keys j <= i + nk - nq of nk; window alike.
        rope: rows (Tk, R/2); those of a segment's keys, of which its queries take the last.

    Returns:
        (Tq, H, Dv); with `return_lse` a tuple with (H, Tq). Rows of no segment have 0 and -inf.
    """
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for i in range(len(queries) - 1):
        q = query[queries[i] : queries[i + 1]].transpose(0, 1)[None]
        k, v = (t[keys[i] : keys[i + 1]].transpose(0, 1)[None] for t in (key, value))
        visible = _visible(q, k, k.shape[2] - q.shape[2], is_causal, window, None)
        rows: Rope | None = None
        if rope is not None:
            cos, sin = (t[keys[i] : keys[i + 1]] for t in rope[:2])
            rows = (cos, sin, _style(rope))
        with _no_autocast(query):
            s = _scores(q, k, scale, softcap, rows, q_norm, k_norm)
            out, lse = _softmax_times_value(_masked(s, None, visible), v)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    h, outside = query.shape[1], query.shape[0] - queries[-1]
    outs.append(query.new_zeros(outside, h, value.shape[2]))
    lses.append(torch.full((h, outside), -math.inf, dtype=_compute(query), device=query.device))
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would turn products back into 16 bits."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _visible(
    query: Tensor,
    key: Tensor,
    shift: int,
    is_causal: bool,
    window: Window | None,
    kv_range: Tensor | None,
) -> Tensor | None:
    """Which keys a query may see, (B or 1, H or 1, Nq, Nk) bool; None: all.

    Query i stands at the place of key i + shift.
    """
    left, right = (-1, -1) if window is None else window
    if not is_causal and left < 0 and right < 0 and kv_range is None:
        return None
    place = torch.arange(query.shape[2], device=query.device)[:, None] + shift
    j = torch.arange(key.shape[2], device=query.device)
    visible = torch.ones_like(place == j)
    if is_causal:
        visible = visible & (j <= place)
    if left >= 0:
        visible = visible & (j >= place - left)
    if right >= 0:
        visible = visible & (j <= place + right)
    visible = visible[None, None]
    if kv_range is not None:
        visible = visible & (kv_range[..., :1] <= j) & (j < kv_range[..., 1:])
    return visible


def _scores(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    softcap: float,
    rope: Rope | None,
    q_norm: HeadNorm | None,
    k_norm: HeadNorm | None,
) -> Tensor:
    """Scaled products before the mask, (B, H, Nq, Nk)."""
    nq, nk, d = query.shape[2], key.shape[2], query.shape[3]
    q, k = _rows(query, q_norm, rope, nk - nq), _rows(key, k_norm, rope, 0)
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q @ k.mT) * (1 / math.sqrt(d) if scale is None else scale)
    return softcap * torch.tanh(s / softcap) if softcap else s


def _rows(x: Tensor, norm: HeadNorm | None, rope: Rope | None, first: int) -> Tensor:
    """Queries or keys as they are multiplied; row i takes row first + i of the tables."""
    rows = x.to(_compute(x))
    if norm is not None:
        rows = _norm(rows, *norm)
    if rope is not None:
        rows = _rotate(rows, rope, first)
    if x.dtype.itemsize == 2 and (norm is not None or rope is not None):
        # Rounded to the dtype of the input, once; its gradient is not. The difference is exact.
        rows = rows + (rows.detach().to(x.dtype).to(rows.dtype) - rows.detach())
    return rows


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    # (D,) or (heads, 1, D)
    x = x * (weight if weight.ndim == 1 else weight[:, None]).to(x.dtype)
    if bias is not None:
        x = x + (bias if bias.ndim == 1 else bias[:, None]).to(x.dtype)
    return x


def _style(rope: Rope) -> str:
    return rope[2] if len(rope) == 3 else "half"


def _rotate(x: Tensor, rope: Rope, first: int) -> Tensor:
    """Turns each pair (a, b) of features by its angle, to (a cos - b sin, b cos + a sin)."""
    cos, sin = (t[..., first : first + x.shape[2], :].to(x.dtype) for t in rope[:2])
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]  # heads share them
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if _style(rope) == "interleaved":
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


def _masked(s: Tensor, attn_mask: Tensor | None, visible: Tensor | None) -> Tensor:
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = attn_mask if visible is None else visible & attn_mask
        else:
            s = s + attn_mask.to(s.dtype)
    return s if visible is None else torch.where(visible, s, -torch.inf)


def _softmax_times_value(s: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # A row without a key gets scores of 0, whose gradient is finite, and its values afterwards.
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = torch.where(empty, 0, s)
    lse = torch.where(empty[..., 0], -torch.inf, torch.logsumexp(s, -1))
    p = torch.where(empty, 0, torch.softmax(s, -1))
    v = value.to(s.dtype)
    if v.shape[1] != s.shape[1]:
        v = v.repeat_interleave(s.shape[1] // v.shape[1], 1)
    return (p @ v).to(value.dtype), lse
