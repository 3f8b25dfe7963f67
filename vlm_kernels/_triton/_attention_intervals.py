"""Which keys a query of attention sees, as one interval a row: all masks but attn_mask.

Causal rule, window, kv_range and packed segments become `rows` (Rb, Rh, Nq, 2) int32 in one kernel,
and its bounds say which tiles of keys and queries meet. Values come from device tensors and are
clamped; nothing waits for them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import _attention_kernels as kernels

_INT32_MAX = 2**31 - 1
_PAIRS = 1 << 24  # of a query tile and a key tile that `key_bounds` looks at in one go
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


def query_bounds(rows: Tensor, tile: int) -> Tensor:
    """Least begin and greatest end of what each tile of queries sees.

    Args:
        rows: (Rb, Rh, Nq, 2).

    Returns:
        (Rb, Rh, ceil(Nq / tile), 2) int32, (0, 0) where the tile sees nothing.
    """
    rb, rh, nq, _ = rows.shape
    tiles = -(-nq // tile)
    padded = rows.new_zeros(rb, rh, tiles * tile, 2)
    padded[:, :, :nq] = rows
    begin, end = padded.view(rb, rh, tiles, tile, 2).unbind(-1)
    begin = torch.where(begin < end, begin, _INT32_MAX).amin(-1)
    end = end.amax(-1)
    return torch.stack([torch.minimum(begin, end), end], -1)


def key_bounds(bounds: Tensor, nk: int, key_tile: int) -> Tensor:
    """First and last + 1 tile of queries that may see each tile of keys.

    Args:
        bounds: (Rb, Rh, Tq, 2), as from `query_bounds`.

    Returns:
        (Rb, Rh, ceil(Nk / key_tile), 2) int32, (0, 0) where no query does.
    """
    rb, rh, tiles, _ = bounds.shape
    begin, end = (t[..., None] for t in bounds.unbind(-1))  # (Rb, Rh, Tq, 1)
    index = torch.arange(tiles, dtype=torch.int32, device=bounds.device)[:, None]
    starts = torch.arange(0, nk, key_tile, dtype=torch.int32, device=bounds.device)
    found = []
    for part in starts.split(max(1, _PAIRS // max(1, rb * rh * tiles))):
        meets = (begin < part + key_tile) & (end > part) & (begin < end)  # (Rb, Rh, Tq, keys)
        if tiles == 0:
            found.append(bounds.new_zeros(rb, rh, len(part), 2))
            continue
        last = torch.where(meets, index + 1, 0).amax(-2)
        first = torch.where(meets, index, _INT32_MAX).amin(-2)
        found.append(torch.stack([torch.minimum(first, last), last], -1))
    return torch.cat(found, 2) if found else bounds.new_zeros(rb, rh, 0, 2)
