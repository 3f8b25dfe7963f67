"""Which keys a query of attention sees, as one interval a row: all masks but attn_mask.

Causal rule, window, kv_range and packed segments become `rows` (Rb, Rh, Nq, 2) int32, and its
bounds say which tiles of keys and queries meet. Values come from device tensors and are clamped;
nothing waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1
_PAIRS = 1 << 24  # of a query tile and a key tile that `key_bounds` looks at in one go


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
) -> Tensor | None:
    """The keys begin <= j < end that each query sees.

    Returns:
        (1 or B, 1 or H, Nq, 2) int32, contiguous, 0 <= begin <= end <= Nk, empty ones (0, 0); None
        where every query sees every key.
    """
    begin: Tensor | int
    end: Tensor | int
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        begin, end, place = _segments(nq, nk, cu_seqlens_q, cu_seqlens_k)
    else:
        limits = is_causal and nk > 1, 0 <= window_left < nq - 1, 0 <= window_right < nk - 1
        if kv_range is None and not any(limits):
            return None
        begin, end, place = 0, nk, torch.arange(nq, device=device)
        if kv_range is not None:
            begin, end = kv_range.to(torch.int64).unbind(-1)  # (Rb, Rh, Nq)
    all_ = nq + nk  # beyond, a window has no limit
    if is_causal:
        end = torch.clamp(place + 1, max=end)
    if window_left >= 0:
        begin = torch.clamp(place - min(window_left, all_), min=begin)
    if window_right >= 0:
        end = torch.clamp(place + (min(window_right, all_) + 1), max=end)
    begin, end = (torch.as_tensor(t, device=device).clamp(0, nk) for t in (begin, end))
    found = torch.stack(torch.broadcast_tensors(begin, end), -1)
    found = torch.where((begin < end)[..., None], found, 0).to(torch.int32)
    return found.reshape(*(1,) * (4 - found.dim()), *found.shape).contiguous()


def places(nq: int, nk: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """(Nq,) int32: the key row whose rope row each query of a packed call takes."""
    place = _segments(nq, nk, cu_seqlens_q, cu_seqlens_k)[2]
    return place.clamp(0, max(nk - 1, 0)).to(torch.int32)


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


def _segments(nq: int, nk: int, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query, (Nq,) int64: begin and end of its segment's keys, and the key row it stands
    at, the last query of a segment at its last key. (0, 0) and 0 outside of all segments."""
    i = torch.arange(nq, device=cu_q.device)
    count = cu_q.shape[0] - 1
    if count == 0:
        nothing = torch.zeros_like(i)
        return nothing, nothing, nothing
    # Whatever the offsets are, they end as rising ones within the rows.
    q, k = (cu.to(torch.int64).clamp(0, n).cummax(0).values for cu, n in ((cu_q, nq), (cu_k, nk)))
    s = torch.searchsorted(q[1:].contiguous(), i, right=True)
    inside = (s < count) & (i >= q[0])
    s = s.clamp(max=count - 1)
    begin, end, place = k[s], k[s + 1], i + k[s + 1] - q[s + 1]
    return torch.where(inside, begin, 0), torch.where(inside, end, 0), torch.where(inside, place, 0)
