"""The formula of `attention` with the products of hardware, and the size of what cancels in it.

Measures of accuracy for `attention.check`: what an error is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.attention import _masked, _rows, _visible
from ..tolerances import SEEDS
from .contrastive import product_in_order


class _Product(torch.autograd.Function):
    """q k^T as the three products are on hardware: operands of 16 bits stay in 16 bits, the
    gradient too, and all sums are in fp32, in order. The gradient is scaled by a number that
    decides which of its values are lucky enough to be rounded by little."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.dtype, ctx.largest = dtype, largest
        return _times(q, k.mT, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k = ctx.saved_tensors
        grad = _rounded(grad, ctx.dtype, ctx.largest)
        return _times(grad, k, ctx.dtype), _times(grad.mT, q, ctx.dtype), None, None


class _Flash(torch.autograd.Function):
    """softmax(s) v as fused kernels do it (FlashAttention, 2205.14135): probabilities of the dtype
    meet the values, and the backward takes sum(P * dP) from the output as it was rounded."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, v: Tensor, dtype: torch.dtype, largest: float
    ) -> tuple[Tensor, Tensor]:
        p, lse = _softmax(s)
        rounded = _rounded(p, dtype, largest)
        out = _times(rounded, v, dtype).to(dtype)
        ctx.save_for_backward(p, rounded, v, out.float())
        ctx.dtype = dtype
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None, None]:
        p, rounded, v, out = ctx.saved_tensors
        grad = grad.float()
        dp = _times(grad, v.mT, ctx.dtype)
        common = (grad * out).sum(-1) - grad_lse
        return p * (dp - common[..., None]), _times(rounded.mT, grad, ctx.dtype), None, None


class _Terms(torch.autograd.Function):
    """softmax(s) v, but for the gradient P (dP - sum P dP + dlse) of the scores, which is 0 where a
    query sees one key, and whose sums over keys are 0: in its place comes one of random signs and
    the size of its terms. What that becomes on its way back has the size of the terms there."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = _softmax(s)
        out = p @ v
        ctx.save_for_backward(p, v, out)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
        p, v, out = ctx.saved_tensors
        size = (grad @ v.mT).abs() + ((grad * out).sum(-1).abs() + grad_lse.abs())[..., None]
        signs = torch.randint(2, p.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
        return p * size * signs, p.mT @ grad


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    empty = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.where(empty, -torch.inf, torch.logsumexp(s, -1, keepdim=True))
    return torch.exp(s - torch.where(empty, 0, lse)), lse[..., 0]


def _rounded(x: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    if dtype.itemsize != 2 or x.numel() == 0:
        return x
    unit = x.abs().max().clamp(min=1e-30) / largest
    return (x / unit).to(dtype).float() * unit


def _times(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    # What rounding to 16 bits costs hides in which order sums are taken.
    return a @ b if dtype.itemsize == 2 else product_in_order(a, b)


def composed(
    product_of: Callable[[Tensor, Tensor], Tensor],
    softmax_times_value: Callable[..., tuple[Tensor, Tensor]],
    size_of_logits: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference's `attention` with other products; `size_of_logits` is returned for lse."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        kv_range: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        rope: Any = None,
        q_norm: Any = None,
        k_norm: Any = None,
        enable_gqa: bool = False,
        return_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        nq, nk = query.shape[2], key.shape[2]
        q, k = _rows(query, q_norm, rope, nk - nq), _rows(key, k_norm, rope, 0)
        groups = query.shape[1] // key.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, value.to(q.dtype)))
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        s = product_of(q, k) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        visible = _visible(query, key, 0, is_causal, window, kv_range)
        out, lse = softmax_times_value(_masked(s, attn_mask, visible), v)
        if size_of_logits and nk:
            sizes = abs(scale) * q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True)
            lse = torch.where(lse == -torch.inf, lse, sizes.detach() + 0 * lse)
        return out, lse

    return attend


def flash(seed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The formula with the products of hardware."""
    largest = 2.0 ** -((seed + 0.5) / SEEDS)

    def attend(query: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        rounding = (query.dtype, largest)
        formula = composed(
            lambda q, k: _Product.apply(q, k, *rounding), lambda s, v: _Flash.apply(s, v, *rounding)
        )
        return formula(query, *args, **keywords)

    return attend


def terms() -> Callable[..., tuple[Tensor, Tensor]]:
    """`attention` whose gradients have the size of the terms of the true ones, and whose lse that
    of the logits, which lse cannot be more exact than."""
    return composed(lambda q, k: q @ k.mT, _Terms.apply, size_of_logits=True)


def intervals(keywords: dict[str, Any], nq: int, nk: int, shift: int = 0) -> tuple[Tensor, Tensor]:
    """First key and end of the keys that each query sees, (B or 1, H or 1, Nq), begin <= end.

    Query i stands at the place of key i + shift.
    """
    place = torch.arange(nq) + shift
    begin, end = torch.zeros_like(place), torch.full_like(place, nk)
    left, right = keywords.get("window") or (-1, -1)
    if left >= 0:
        begin = torch.maximum(begin, place - left)
    if right >= 0:
        end = torch.minimum(end, place + right + 1)
    if keywords.get("is_causal"):
        end = torch.minimum(end, place + 1)
    begin, end = begin[None, None], end[None, None]
    if (kv_range := keywords.get("kv_range")) is not None:
        begin = torch.maximum(begin, kv_range[..., 0].cpu())
        end = torch.minimum(end, kv_range[..., 1].cpu())
    return begin, torch.maximum(begin, end)


def per_segment(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`attention_varlen` by a call of `attend`, which takes what `attention` takes, a segment."""

    def packed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        rope: Any = None,
        return_lse: bool = False,
        **keywords: Any,
    ) -> Any:
        out = [query.new_zeros(0, query.shape[1], value.shape[2])]
        lse = [query.new_zeros(query.shape[1], 0, dtype=torch.float32)]
        bounds = zip(*(c.tolist() for c in (cu_seqlens_q, cu_seqlens_k)), strict=True)
        begin_q, begin_k = next(bounds)
        for end_q, end_k in bounds:
            q = query[begin_q:end_q].transpose(0, 1)[None]
            k, v = (t[begin_k:end_k].transpose(0, 1)[None] for t in (key, value))
            if rope is not None:
                keywords["rope"] = (*(t[begin_k:end_k] for t in rope[:2]), *rope[2:])
            if is_causal or window:
                rules = {"is_causal": is_causal, "window": window}
                nq, nk = q.shape[2], k.shape[2]
                ends = torch.stack(intervals(rules, nq, nk, nk - nq), -1)
                keywords["kv_range"] = ends.to(torch.int32).to(query.device)
            if k.shape[1] != q.shape[1]:
                keywords["enable_gqa"] = True
            o, statistics = attend(q, k, v, return_lse=True, **keywords)
            out.append(o[0].transpose(0, 1))
            lse.append(statistics[0])
            begin_q, begin_k = end_q, end_k
        outside = query.shape[0] - begin_q
        whole = F.pad(torch.cat(out), (0, 0, 0, 0, 0, outside))
        statistics = F.pad(torch.cat(lse, 1), (0, outside), value=-math.inf)
        return (whole, statistics) if return_lse else whole

    return packed
