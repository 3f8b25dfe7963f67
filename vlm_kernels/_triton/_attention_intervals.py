"""Which keys a query of attention sees, as one interval a row: all masks but attn_mask.

Causal rule, window, kv_range and packed segments become `rows` (Rb, Rh, Nq, 2) int32 in one kernel.
Values come from device tensors and are clamped; nothing waits for them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import _attention_kernels as kernels

BLOCK = 256


def intervals(
    nq: int,
    nk: int,
    device: torch.device,
    is_causal: bool,
    window_left: int,
    window_right: int,
    kv_range: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The keys begin <= j < end that each query sees.

    Returns:
        rows: (1 or B, 1 or H, Nq, 2) int32, contiguous, 0 <= begin <= end <= Nk, empty ones (0, 0);
            None where every query sees every key.
        places: of packed segments (Nq,) int32, the key row at which each query stands, from 0 to
            Nk - 1; else None.
    """
    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    limits = (
        is_causal and (packed or nk > 1),
        window_left >= 0 and (packed or window_left < nq - 1),
        window_right >= 0 and (packed or window_right < nk - 1),
    )
    if not packed and kv_range is None and not any(limits):
        return None, None
    whose = (1, 1) if kv_range is None else kv_range.shape[:2]
    rows = torch.empty((*whose, nq, 2), dtype=torch.int32, device=device)
    places = torch.empty(nq if packed else 0, dtype=torch.int32, device=device)
    blocks = triton.cdiv(nq, BLOCK)
    segments = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else 0
    if rows.numel():
        kernels.intervals_kernel[(whose[0] * whose[1] * blocks,)](
            rows if kv_range is None else kv_range,
            rows if cu_seqlens_q is None else cu_seqlens_q,
            rows if cu_seqlens_k is None else cu_seqlens_k,
            rows,
            places,
            nq,
            nk,
            whose[1],
            blocks,
            segments,
            segments.bit_length(),
            *((0,) * 4 if kv_range is None else kv_range.stride()),
            0 if cu_seqlens_q is None else cu_seqlens_q.stride(0),
            0 if cu_seqlens_k is None else cu_seqlens_k.stride(0),
            min(window_left, nq + nk),  # beyond, a window has no limit
            min(window_right, nq + nk),
            CAUSAL=limits[0],
            LEFT=limits[1],
            RIGHT=limits[2],
            RANGE=kv_range is not None,
            PACKED=packed,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return rows, places if packed else None
