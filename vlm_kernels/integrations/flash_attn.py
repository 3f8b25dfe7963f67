"""The functions of flash-attn 2.8 (Dao-AILab) under their own names, arguments and layouts.

Code written for flash-attn runs on these by changing its import. What differs: there is no dropout
and no ALiBi, head dims need no padding, float32 and CPU tensors work, results are always
deterministic, and max_seqlen arguments are not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention, attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention in flash-attn's layout.

    Args:
        q: (B, Nq, H, D); k (B, Nk, Hkv, D); v (B, Nk, Hkv, Dv), with H a multiple of Hkv. fp32,
            bf16 or fp16, any strides with a contiguous last dimension.
        dropout_p: 0.
        softmax_scale: 1 / sqrt(D) unless given.
        causal: query i sees keys j <= i + Nk - Nq (aligned at the last key).
        window_size: (left, right), inclusive, -1 unbounded, aligned alike.
        softcap: s -> softcap * tanh(s / softcap); 0 is none.
        alibi_slopes: None.
        deterministic: accepted; results always are.
        return_attn_probs: return (out, lse (B, H, Nq) fp32, None): probabilities are never formed.

    Returns:
        (B, Nq, H, Dv); rows that see no key are 0.

    Raises:
        ValueError: dropout or ALiBi; and what `vlm_kernels.attention` raises.
    """
    _check("flash_attn_func", dropout_p, alibi_slopes)
    length, keys = q.shape[1], k.shape[1]
    left, right = _window(window_size, causal)
    arguments: dict[str, Any] = {}
    if length == keys:  # both alignments agree
        arguments = {"is_causal": right == 0, "window": (left, -1 if right == 0 else right)}
    elif left >= 0 or right >= 0:
        last = torch.arange(length, device=q.device) + (keys - length)
        begin = last - left if left >= 0 else torch.zeros_like(last)
        end = last + right + 1 if right >= 0 else torch.full_like(last, keys)
        both = torch.stack((begin, end), -1).clamp(0, keys)
        arguments = {"kv_range": both.to(torch.int32)[None, None]}
    out = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=softmax_scale,
        enable_gqa=True,
        softcap=softcap,
        return_lse=return_attn_probs,
        **arguments,
    )
    if return_attn_probs:
        return out[0].transpose(1, 2), out[1], None
    return out.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of one tensor qkv (B, N, 3, H, D), read in place."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` within packed segments.

    Args: as there, except
        q: (Tq, H, D); k (Tk, Hkv, D); v (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, where each segment begins, and the end.
        max_seqlen_q, max_seqlen_k: accepted, not needed.
        block_table: None; there is no paged cache.

    Returns:
        (Tq, H, Dv); with return_attn_probs (out, lse (H, Tq) fp32, None).
    """
    _check("flash_attn_varlen_func", dropout_p, alibi_slopes)
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table came, expected None: there is no paged cache; "
            "gather its pages into k and v"
        )
    left, right = _window(window_size, causal)
    out = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        is_causal=right == 0,
        scale=softmax_scale,
        window=(left, -1 if right == 0 else right),
        softcap=softcap,
        return_lse=return_attn_probs,
    )
    return (*out, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of one tensor qkv (T, 3, H, D), read in place."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _check(name: str, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p:
        raise ValueError(
            f"{name}: dropout_p is {dropout_p}, expected 0: the kernels have no dropout; pass 0.0, "
            "or drop the projected output instead"
        )
    if alibi_slopes is not None:
        raise ValueError(
            f"{name}: alibi_slopes came, expected None; pass the bias as vlm_kernels.attention's "
            "attn_mask"
        )


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    left, right = window_size
    return left, 0 if causal else right
