"""Patch embedding in plain PyTorch: the ground truth of the op `patch_embed`.

Pixels are normalised, cut into patches and multiplied by the weight as it stands: nothing is
folded. Weights of 16 bits and fp32 compute in fp32, fp64 ones in fp64. Arguments are taken as
valid: the public functions in `vlm_kernels.ops.patch_embed` check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | tuple[int, int]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: Pair,
    stride: Pair | None = None,
    layout: str = "nchw",
    k_order: str = "cyx",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rescale: float = 1 / 255,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    newline: Tensor | None = None,
    merge: int = 1,
    temporal: int = 1,
    pad_space: str = "raw",
) -> Tensor:
    """Tokens of images: each patch's normalised pixels times `weight`, and what belongs around it.

    Args: as `vlm_kernels.ops.patch_embed.patch_embed`.

    Returns:
        (B, L, E) in the dtype of the weight, fp32 inside for 16 bits.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    patches, grid = _patches(
        images, wide, patch_size, stride, layout, mean, std, rescale, temporal, pad_space
    )
    matrix = weight.to(wide).reshape(weight.shape[0], -1)  # (E, K)
    if temporal > 1 and images.dim() == 4:  # a still image is its own next frame
        patches = torch.cat([patches] * temporal, 4)
    tokens = _ordered(patches, k_order).flatten(-3) @ matrix.T  # (B, frames, gh, gw, E)
    tokens = tokens if bias is None else tokens + bias.to(wide)
    b, e = images.shape[0], weight.shape[0]
    frames, gh, gw = grid
    if merge > 1:
        blocks = tokens.reshape(b, frames, gh // merge, merge, gw // merge, merge, e)
        tokens = blocks.transpose(3, 4).reshape(b, frames, gh, gw, e)
    before = 0 if prefix is None else prefix.shape[-2]
    position = None if pos is None else pos.to(wide).expand(b, -1, -1)
    if position is not None:
        tokens = tokens + position[:, position.shape[1] - frames * gh * gw :].reshape(tokens.shape)
    if newline is not None:
        ends = newline.to(wide).expand(b, frames, gh, 1, e)
        tokens = torch.cat([tokens, ends], 3)
    tokens = tokens.reshape(b, frames * gh * tokens.shape[3], e)
    if prefix is not None:
        first = prefix.to(wide).expand(b, -1, -1)
        if position is not None and position.shape[1] > frames * gh * gw:
            first = first + position[:, :before]
        tokens = torch.cat([first, tokens], 1)
    return tokens.to(weight.dtype)


def patchify(
    images: Tensor,
    patch_size: Pair,
    *,
    stride: Pair | None = None,
    layout: str = "nchw",
    k_order: str = "cyx",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rescale: float = 1 / 255,
    merge: int = 1,
    temporal: int = 1,
    pad_space: str = "raw",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The patches themselves, normalised: (B, frames * gh * gw, K) in `dtype`."""
    patches, (frames, gh, gw) = _patches(
        images,
        torch.promote_types(dtype, torch.float32),
        *(patch_size, stride, layout, mean, std, rescale, temporal, pad_space),
    )
    if temporal > 1 and images.dim() == 4:
        patches = torch.cat([patches] * temporal, 4)
    rows = _ordered(patches, k_order).flatten(-3)
    b, k = rows.shape[0], rows.shape[-1]
    if merge > 1:
        rows = rows.reshape(b, frames, gh // merge, merge, gw // merge, merge, k).transpose(3, 4)
    return rows.reshape(b, frames * gh * gw, k).to(dtype)


def _pair(x: Pair) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else (x[0], x[1])


def _patches(
    images: Tensor,
    dtype: torch.dtype,
    patch_size: Pair,
    stride: Pair | None,
    layout: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale: float,
    temporal: int,
    pad_space: str,
) -> tuple[Tensor, tuple[int, int, int]]:
    """-> (B, frames, gh, gw) + (T, C, Py, Px) with T = 1 for still images, and (frames, gh, gw)."""
    (py, px), (sy, sx) = _pair(patch_size), _pair(patch_size if stride is None else stride)
    x = images if layout == "nchw" else images.movedim(-1, -3)
    still = x.dim() == 4
    x = x[:, None] if still else x  # (B, F, C, H, W)
    x = x.to(dtype) * rescale if images.dtype == torch.uint8 else x.to(dtype)
    height, width = x.shape[-2:]

    def normalised(x: Tensor) -> Tensor:
        if mean is not None:
            x = x - torch.tensor(mean, dtype=dtype, device=x.device).view(-1, 1, 1)
        if std is not None:
            x = x / torch.tensor(std, dtype=dtype, device=x.device).view(-1, 1, 1)
        return x

    down, right = -(height - py) % sy, -(width - px) % sx
    if pad_space == "raw":
        x = normalised(F.pad(x, (0, right, 0, down)))
    else:
        x = F.pad(normalised(x), (0, right, 0, down))
    step = 1 if still else temporal
    x = x.unflatten(1, (x.shape[1] // step, step))  # (B, frames, T, C, H, W)
    x = x.unfold(-2, py, sy).unfold(-2, px, sx)  # (B, frames, T, C, gh, gw, Py, Px)
    x = x.permute(0, 1, 4, 5, 2, 3, 6, 7)
    return x, (x.shape[1], x.shape[2], x.shape[3])


def _ordered(patches: Tensor, k_order: str) -> Tensor:
    """The last four dimensions (T, C, Py, Px) in the order of the weight's columns, as three."""
    if k_order == "yxc":  # (T Py, Px, C)
        return patches.movedim(-3, -1).flatten(-4, -3)
    return patches.transpose(-4, -3).flatten(-3, -2)  # (C, T Py, Px)
