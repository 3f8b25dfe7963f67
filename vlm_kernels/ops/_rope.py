"""Builders of the (cos, sin) tables that `attention` takes as `rope`.

Rotary position embedding (RoFormer, arXiv:2104.09864) turns pairs of the first R features of
queries and keys by position times frequency. A table is fp32, (N, R/2) or (B, N, R/2): one row a
key, one column a pair. `attention` rotates key j by row j and query i by row i + Nk - Nq:
bottom-right aligned, so that with a KV cache the queries are the last rows.

A table does not say which features make a pair. Checkpoints in transformers' format pair
(i, i + R/2), "half", the default of `attention`. Original Llama and Pixtral checkpoints, GPT-J and
Cohere pair (2 i, 2 i + 1): give rope=(cos, sin, "interleaved"). What a transformers model hands to
its layers holds each column twice: `(cos[..., : R // 2], sin[..., : R // 2])` is the table for
"half", `(cos[..., ::2], sin[..., ::2])` for "interleaved".

Angles are fp32 products, as in the systems named below, so that tables match theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]


def rope_1d(
    positions: Tensor | int,
    rotary_dim: int,
    theta: float = 10000.0,
    *,
    device: torch.device | str | None = None,
) -> Table:
    """Positions along a sequence: pair k turns by position * theta^(-2 k / R) (RoFormer, Llama).

    Args:
        positions: (N,) or (B, N), integers or floats; or N, for positions 0 to N - 1.
        rotary_dim: R, the features that rotate, even: the head dim, or less of it (GPT-NeoX, Phi).
        theta: base of the frequencies.
        device: where the table lies, if positions is a number.

    Returns:
        (cos, sin), fp32, (N, R/2) or (B, N, R/2).

    Raises:
        ValueError: an odd R, a theta that is not positive, or positions of another shape.
        TypeError: positions that are neither a number nor a tensor of numbers.

    >>> cos, sin = rope_1d(16, 64)
    >>> cos.shape
    torch.Size([16, 32])
    """
    if isinstance(positions, Tensor):
        _check_positions("rope_1d", positions, "(N,) or (B, N)", positions.dim() in (1, 2))
    elif positions < 0:
        raise ValueError(
            f"rope_1d: positions is {positions}, expected a number of tokens, or a tensor"
        )
    else:
        positions = torch.arange(positions, device=device)
    frequencies = _frequencies("rope_1d", rotary_dim, 2, theta, positions.device)
    return _table(positions[..., None], frequencies)


def rope_2d(
    positions: Tensor | tuple[int, int],
    rotary_dim: int,
    theta: float = 10000.0,
    *,
    convention: str = "qwen2_vl",
    merge_size: int = 1,
    device: torch.device | str | None = None,
) -> Table:
    """Patches of an image: half of the pairs turn by a patch's row, half by its column.

    Columns [0, R/4) of the table belong to the row, [R/4, R/2) to the column. "qwen2_vl" gives both
    the frequencies theta^(-4 k / R), k < R/4 (the vision towers of Qwen2-VL, arXiv:2409.12191,
    Qwen2.5-VL and Qwen3-VL). "pixtral" deals out theta^(-2 k / R), k < R/2, the even k to the row,
    the odd ones to the column (Pixtral, arXiv:2410.07073).

    Args:
        positions: (N, 2) or (B, N, 2), row and column of each patch, integers or floats; or a grid
            (height, width), whose patches come row by row.
        rotary_dim: R, the features that rotate, a multiple of 4: mostly the head dim.
        theta: base of the frequencies.
        convention: "qwen2_vl" or "pixtral".
        merge_size: of a grid; see `grid_positions`.
        device: where the table lies, if positions is a grid.

    Returns:
        (cos, sin), fp32, (N, R/2) or (B, N, R/2).

    Raises:
        ValueError: an R that is no multiple of 4, an unknown convention, a theta that is not
            positive, or positions that do not fit.
        TypeError: positions that are neither a grid nor a tensor of numbers.

    >>> cos, sin = rope_2d((16, 16), 80)
    >>> cos.shape
    torch.Size([256, 40])
    >>> images = torch.cat([grid_positions(4, 6), grid_positions(8, 2)])  # packed
    >>> rope_2d(images, 64, convention="pixtral")[0].shape
    torch.Size([40, 32])
    """
    if convention not in ("qwen2_vl", "pixtral"):
        raise ValueError(f"rope_2d: convention is {convention!r}, expected 'qwen2_vl' or 'pixtral'")
    if isinstance(positions, Tensor):
        fits = positions.dim() in (2, 3) and positions.shape[-1] == 2
        _check_positions("rope_2d", positions, "(N, 2) or (B, N, 2)", fits)
        if merge_size != 1:
            raise ValueError(
                "rope_2d: merge_size orders the patches of a grid; give it to grid_positions"
            )
    else:
        if not isinstance(positions, Sequence) or len(positions) != 2:
            raise TypeError(
                f"rope_2d: positions is {positions!r}, expected (height, width) or a tensor"
            )
        positions = grid_positions(*positions, merge_size=merge_size, device=device)
    frequencies = _frequencies("rope_2d", rotary_dim, 4, theta, positions.device)
    if convention == "pixtral":
        frequencies = torch.cat([frequencies[0::2], frequencies[1::2]])
    else:
        frequencies = frequencies[0::2].repeat(2)
    return _table(positions.repeat_interleave(rotary_dim // 4, dim=-1), frequencies)


def mrope(
    position_ids: Tensor,
    sections: Sequence[int],
    theta: float,
    *,
    layout: str = "chunked",
) -> Table:
    """Multimodal RoPE: each pair turns by the time, the row or the column of its token.

    R/2 = sum(sections) pairs with the frequencies theta^(-2 k / R). "chunked" gives the first
    sections[0] pairs to the time, the next to the row, the last to the column (Qwen2-VL,
    arXiv:2409.12191, and Qwen2.5-VL: sections (16, 24, 24), theta 1e6). "interleaved" deals them
    out in turn, time, row, column, time, ..., until a section is used up; what is left is time's
    (Qwen3-VL, arXiv:2511.21631: sections (24, 20, 20), theta 5e6).

    Args:
        position_ids: (3, N) or (3, B, N), time, row and column of each token, as the models'
            `get_rope_index` returns them; text has three equal ones.
        sections: pairs of time, row and column.
        theta: base of the frequencies.
        layout: "chunked" or "interleaved".

    Returns:
        (cos, sin), fp32, (N, R/2) or (B, N, R/2).

    Raises:
        ValueError: position_ids or sections that do not fit, an unknown layout, or a theta that is
            not positive.
        TypeError: position_ids that are no tensor of numbers.

    >>> text = torch.arange(10).expand(3, 1, 10)
    >>> cos, sin = mrope(text, (16, 24, 24), 1e6)
    >>> cos.shape, torch.equal(cos[0], rope_1d(10, 128, 1e6)[0])
    (torch.Size([1, 10, 64]), True)
    """
    if layout not in ("chunked", "interleaved"):
        raise ValueError(f"mrope: layout is {layout!r}, expected 'chunked' or 'interleaved'")
    if len(sections) != 3 or min(sections) < 0 or sum(sections) == 0:
        raise ValueError(
            f"mrope: sections are {tuple(sections)}, expected the pairs of time, row and column"
        )
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"mrope: position_ids is {type(position_ids).__name__}, expected a tensor")
    fits = position_ids.dim() in (2, 3) and position_ids.shape[0] == 3
    _check_positions("mrope", position_ids, "(3, N) or (3, B, N)", fits)
    pairs, (time, row, column) = sum(sections), sections
    if layout == "chunked":
        rows, columns = slice(time, time + row), slice(time + row, pairs)
    elif max(3 * row - 1, 3 * column) > pairs:
        raise ValueError(
            f"mrope: sections are {tuple(sections)}, expected row and column to find their turns "
            f"within the {pairs} pairs of an interleaved layout"
        )
    else:
        rows, columns = slice(1, 3 * row, 3), slice(2, 3 * column, 3)
    places = position_ids[0].unsqueeze(-1).repeat_interleave(pairs, dim=-1)
    places[..., rows] = position_ids[1].unsqueeze(-1)
    places[..., columns] = position_ids[2].unsqueeze(-1)
    return _table(places, _frequencies("mrope", 2 * pairs, 2, theta, position_ids.device))


def grid_positions(
    height: int,
    width: int,
    *,
    merge_size: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Row and column of each patch of an image, for `rope_2d`.

    Args:
        height, width: patches.
        merge_size: patches come row by row; from 2 on, in blocks of merge_size x merge_size that
            are merged behind the tower (Qwen2-VL's order), each block row by row.
        device: where the result lies.

    Returns:
        (height * width, 2) int64. `.repeat(frames, 1)` has those of a video.

    Raises:
        ValueError: sizes that are negative, or no multiples of merge_size.

    >>> grid_positions(2, 4, merge_size=2).tolist()[:5]
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    """
    if height < 0 or width < 0 or merge_size < 1 or height % merge_size or width % merge_size:
        raise ValueError(
            f"grid_positions: height, width are {height}, {width}, expected multiples of "
            f"merge_size, {merge_size}"
        )
    row = torch.arange(height, device=device)[:, None].expand(height, width)
    column = torch.arange(width, device=device)[None].expand(height, width)
    m = merge_size
    grid = torch.stack([row, column], dim=-1).reshape(height // m, m, width // m, m, 2)
    return grid.transpose(1, 2).reshape(height * width, 2)


def _frequencies(
    name: str, rotary_dim: int, multiple: int, theta: float, device: torch.device
) -> Tensor:
    """theta^(-2 k / R), k < R/2, fp32."""
    if rotary_dim < multiple or rotary_dim % multiple:
        raise ValueError(
            f"{name}: rotary_dim is {rotary_dim}, expected a positive multiple of {multiple}"
        )
    if not theta > 0:
        raise ValueError(f"{name}: theta is {theta}, expected a positive number")
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    return 1.0 / theta**exponent


def _table(positions: Tensor, frequencies: Tensor) -> Table:
    angles = positions.detach().to(torch.float32) * frequencies
    return angles.cos(), angles.sin()


def _check_positions(name: str, positions: Tensor, shape: str, fits: bool) -> None:
    if positions.dtype == torch.bool or positions.dtype.is_complex:
        raise TypeError(f"{name}: positions are {positions.dtype}, expected integers or floats")
    if not fits:
        raise ValueError(f"{name}: positions have shape {tuple(positions.shape)}, expected {shape}")
