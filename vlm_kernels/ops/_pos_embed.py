"""Learned positions of one grid for images of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MODES = ("nearest", "bilinear", "bicubic")

Grid = tuple[int, int] | tuple[int, int, int]


def interpolate_pos_embed(
    table: Tensor,
    grid: Grid | Sequence[Grid],
    *,
    mode: str = "bicubic",
    antialias: bool = False,
    align_corners: bool = False,
    offset: float = 0.0,
    prefix: int = 0,
    merge: int = 1,
    table_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Learned positions, resampled from the grid they were trained on to those of images.

    As the published models do: mode="bicubic" (ViT, CLIP, SigLIP, BLIP-2, InternVL, GLM-4V, Kimi),
    with offset=0.1 DINOv2's own code, with `antialias` DINOv2 with registers;
    mode="bilinear" with `antialias` SigLIP 2, with `align_corners` and merge=2 Qwen3-VL;
    mode="nearest" Idefics 2 and 3, SmolVLM and Phi-4, which take the table's row at i / gh of its
    height (in their fp32 arithmetic, so that it is theirs at each boundary, where MiniCPM-V's
    rounding may take the next one).

    Args:
        table: (n + Gh * Gw, E) or (1, n + Gh * Gw, E), floating point.
        grid: (gh, gw) of an image, (frames, gh, gw) of a video, or a sequence of these: Python
            integers, of patches. Frames have the same positions.
        mode: "nearest", "bilinear" or "bicubic" (Keys' kernel, a = -0.75, or -0.5 with antialias).
        antialias: where the grid is smaller than the table's, the kernel widens to cover it.
        align_corners: corners of the two grids fall together, as torch's interpolate has it.
        offset: added to gh and gw in the scale gh / Gh, but not in the number of rows. The table's
            own grid stays as it is.
        prefix: n rows in front that are kept: of class tokens.
        merge: rows in the order of blocks of merge x merge patches, as `patch_embed`.
        table_grid: (Gh, Gw); default a square.

    Returns:
        (n + gh * gw, E) of one grid, those of all grids one after the other; in the dtype of the
        table, from fp64 sums, with its gradient: bitwise the same on a repeat. On the table's own
        grid it may be a view of the table.

    Raises:
        ValueError, TypeError: a table that is no square, a grid that is not made of positive
            integers or that `merge` does not divide, options that `mode` does not have.
    """
    op = "interpolate_pos_embed"
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"{op}: table is no floating-point tensor")
    if mode not in _MODES:
        raise ValueError(f"{op}: mode is {mode!r}, expected one of {', '.join(map(repr, _MODES))}")
    if (antialias and align_corners) or (mode == "nearest" and (antialias or align_corners)):
        raise ValueError(
            f"{op}: antialias = {antialias} and align_corners = {align_corners} do not go together "
            f"with mode = {mode!r}"
        )
    rows = table[0] if table.dim() == 3 and table.shape[0] == 1 else table
    count = rows.shape[0] - prefix
    side = math.isqrt(max(count, 0))
    height, width = (side, side) if table_grid is None else table_grid
    if rows.dim() != 2 or prefix < 0 or count != height * width or count < 1:
        square = "a square" if table_grid is None else f"{height} x {width}"
        raise ValueError(
            f"{op}: table has shape {tuple(table.shape)}, expected {square} of rows after a prefix "
            f"of {prefix}; pass prefix or table_grid"
        )
    grids, positions = _grids(op, grid, merge), {}
    wide = rows[prefix:].double().view(height, width, -1)
    for _, gh, gw in grids:
        if (gh, gw) in positions:
            continue
        if (gh, gw) == (height, width) and mode != "nearest":  # also with an offset
            x = rows[prefix:].view(height, width, -1)
        else:
            down, across = (
                _resampling(to, of, mode, antialias, align_corners, offset, table.device)
                for to, of in ((gh, height), (gw, width))
            )
            tall = (down @ wide.flatten(1)).unflatten(1, (width, -1))  # (gh, Gw, E)
            # In parts: fresh memory for all of it in fp64 takes longer than the products.
            parts = [(across @ part).to(table.dtype) for part in tall.split(16)]
            x = torch.cat(parts) if len(parts) > 1 else parts[0]  # (gh, gw, E)
        x = x.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2)
        positions[gh, gw] = x.flatten(0, 3)
    found = []
    for frames, gh, gw in grids:
        found += [rows[:prefix]] * (prefix > 0) + [positions[gh, gw]] * frames
    return torch.cat(found) if len(found) > 1 else found[0] if found else rows[:0]


def _grids(op: str, grid: Any, merge: int) -> list[tuple[int, int, int]]:
    """(frames, gh, gw) of each."""
    if isinstance(grid, Tensor):
        raise TypeError(f"{op}: grid is a tensor, expected Python integers (its .tolist())")
    found = []
    for each in [grid] if grid and isinstance(grid[0], (int, torch.SymInt)) else grid:
        sizes = tuple(each)
        frames, gh, gw = sizes if len(sizes) == 3 else (1, *sizes) if len(sizes) == 2 else (0,) * 3
        if min(frames, gh, gw, merge) < 1 or gh % merge or gw % merge:
            raise ValueError(
                f"{op}: grid has {each!r}, expected (gh, gw) or (frames, gh, gw) of positive "
                f"integers that merge = {merge} divides"
            )
        found.append((frames, gh, gw))
    return found


def _resampling(
    to: int,
    of: int,
    mode: str,
    antialias: bool,
    align_corners: bool,
    offset: float,
    device: torch.device,
) -> Tensor:
    """The matrix (to, of), fp64, that resamples one axis; a product with it has no atomics."""
    cells = torch.arange(of, dtype=torch.float64, device=device)
    if mode == "nearest":
        ends = torch.arange(1 / of, 1.0, 1 / of, device=device)
        step = torch.ones((), device=device) / to
        at = (torch.arange(to, dtype=torch.float32, device=device) * step).clamp(max=1 - 1e-6)
        bucket = torch.bucketize(at, ends, right=True)
        return (cells == bucket[:, None]).double()
    points = torch.arange(to, dtype=torch.float64, device=device)[:, None]
    scale = (of - 1) / max(to - 1, 1) if align_corners else of / (to + offset)
    centre = points * scale if align_corners else (points + 0.5) * scale - 0.5
    if antialias:
        weights = _kernel((cells - centre) / max(scale, 1.0), mode, -0.5)
        return weights / weights.sum(1, keepdim=True)
    first, matrix = centre.floor(), torch.zeros_like(centre - cells)
    for tap in (-1, 0, 1, 2):  # beyond the edge the edge's cell counts
        here = (first + tap).clamp(0, of - 1)
        matrix += (cells == here) * _kernel(first + tap - centre, mode, -0.75)
    return matrix


def _kernel(x: Tensor, mode: str, a: float) -> Tensor:
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x - 4
    return torch.where(x <= 1, near, torch.where(x < 2, a * far, 0.0))
