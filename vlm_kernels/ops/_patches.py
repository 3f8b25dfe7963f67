"""Patches of images, and normalisation folded into a weight: what `patch_embed` shares with
`patchify` and `fold_normalization`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LAYOUTS = ("nchw", "nhwc")
_ORDERS = ("cyx", "yxc", "ctyx")
_PAD_SPACES = ("raw", "normalised")

Pair = int | tuple[int, int]


def fold_normalization(
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None = None,
    *,
    rescale: float = 1 / 255,
    k_order: str = "cyx",
) -> tuple[Tensor, Tensor]:
    """The layer that takes raw pixels for one that takes (pixel * rescale - mean) / std.

    W' = W * rescale / std, rounded to `dtype`, and b' = b - sum over k of W'_k * mean / rescale,
    of W' as it was rounded: then a pixel near the mean adds the little that it should, and the
    whole is more accurate than normalising, rounding and multiplying (docs/numerics.md).
    `patch_embed` does the same by itself, without a second weight.

    Args:
        weight: (E, K), or Conv2d's (E, C, Py, Px) or Conv3d's (E, C, T, Py, Px).
        bias: (E,) or None.
        mean, std: of each channel, in units after `rescale`; None is 0 and 1.
        dtype: of the folded weight; default that of `weight`.
        rescale: what normalisation multiplies pixels by first; 1 where they come rescaled.
        k_order: how the columns of a two-dimensional weight run, as in `patch_embed`.

    Returns:
        The folded weight, of the shape of `weight`, and the bias, (E,), in fp32 (fp64 for fp64):
        rounding it to 16 bits may cost more than the fold gains. Both carry gradients.

    Raises:
        ValueError, TypeError: mean or std that do not fit the channels or columns of the weight.
    """
    op = "fold_normalization"
    check_choices(op, "nchw", k_order)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() < 2:
        raise TypeError(f"{op}: weight is no floating-point tensor of two dimensions or more")
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype is {dtype}, expected floating point")
    shifts, scales = channels_of("mean", mean, op), channels_of("std", std, op)
    channels = len(shifts or scales) or 1
    native = weight.dim() > 2
    columns = weight.shape[1] if native else weight[0].numel() if weight.shape[0] else 0
    if native and not (shifts or scales):
        channels = columns
    if (native and k_order == "yxc") or columns % channels or (native and columns != channels):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} and k_order is {k_order!r}, which "
            f"{channels} channels of mean and std do not fit"
        )
    shifts, scales = shifts or [0.0] * channels, scales or [1.0] * channels
    if len(scales) != channels or 0.0 in scales or rescale == 0 or not math.isfinite(rescale):
        raise ValueError(
            f"{op}: std is {std} and rescale {rescale}; expected a number other than 0 for each of "
            f"the {channels} channels"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected {weight.shape[:1]}")
    rows = weight.double().reshape(weight.shape[0], -1)
    by_channel = rows.unflatten(1, (-1, channels) if k_order == "yxc" else (channels, -1))
    dim = 2 if k_order == "yxc" else 1
    folded = torch.stack(  # Python numbers, so that nothing is copied to the device
        [part * (rescale / scale) for part, scale in zip(by_channel.unbind(dim), scales)], dim
    ).to(dtype)
    exact = folded.double()
    offset = torch.zeros_like(exact[:, 0, 0]) if bias is None else bias.double()
    for part, shift in zip(exact.unbind(dim), shifts):
        offset = offset - part.sum(1) * (shift / rescale)
    wide = torch.promote_types(dtype, torch.float32)
    return folded.reshape(weight.shape), offset.to(wide)


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
    """The patches of images as rows, as image processors hand them to models.

    Those of Fuyu and SigLIP 2 (k_order="yxc") and of Qwen2-VL (k_order="ctyx", merge=2,
    temporal=2) in one copy: bit for bit the same for floating-point images without mean and std,
    which are taken to be normalised. Else each value is that of exact arithmetic, rounded once.

    Args: as `patch_embed`; a still image with `temporal` is repeated.
        dtype: of the result.

    Returns:
        (B, frames * gh * gw, K), contiguous; its product with a (E, K) weight is `patch_embed`.

    Raises:
        ValueError, TypeError: arguments that do not fit, as `patch_embed`.
    """
    op = "patchify"
    check_choices(op, layout, k_order, pad_space)
    size = pair("patch_size", patch_size, op)
    step = size if stride is None else pair("stride", stride, op)
    shifts, scales = channels_of("mean", mean, op), channels_of("std", std, op)
    nhwc = layout == "nhwc"
    if not isinstance(images, Tensor):
        raise TypeError(f"{op}: images is {type(images).__name__}, expected a tensor")
    if not dtype.is_floating_point and (dtype != images.dtype or shifts or scales or rescale != 1):
        raise TypeError(f"{op}: dtype is {dtype}, expected floating point")
    check_images(op, images, (*size, *step), nhwc, shifts, scales, rescale, merge, temporal)
    patches, down, right = cut(images, size, step, nhwc, merge, temporal)
    if images.dim() == 4:
        patches = patches.expand(*patches.shape[:6], temporal, *patches.shape[7:])
    order, back = ((6, 8, 9, 7), (6, 9, 7, 8)) if k_order == "yxc" else ((7, 6, 8, 9),) * 2
    lead = range(6)
    values = _normalised(
        patches.permute(*lead, *order), 6 + order.index(7), shifts, scales, rescale, dtype
    )
    if pad_space == "normalised" and any(shifts):  # only the last patches hold pixels beyond
        cells = values.permute(*lead, *back).transpose(3, 4)  # (B, F, gh/m, m, gw/m, m) + patch
        if down:
            cells[:, :, -1, -1, ..., size[0] - down :, :] = 0
        if right:
            cells[:, :, :, :, -1, -1, ..., size[1] - right :] = 0
    return values.flatten(6).flatten(1, 5)


def cut(
    images: Tensor, size: tuple[int, int], step: tuple[int, int], nhwc: bool, merge: int, depth: int
) -> tuple[Tensor, int, int]:
    """A view (B, frames, gh / m, gw / m, m, m, T, C, Py, Px), and the rows and columns padded."""
    x = images.movedim(-1, -3) if nhwc else images
    x = x[:, None] if x.dim() == 4 else x.unflatten(1, (-1, depth)).flatten(1, 2)
    (py, px), (sy, sx) = size, step
    down, right = -(x.shape[-2] - py) % sy, -(x.shape[-1] - px) % sx
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    x = x.unflatten(1, (-1, 1 if images.dim() == 4 else depth))
    x = x.unfold(-2, py, sy).unfold(-2, px, sx)  # (B, frames, T, C, gh, gw, Py, Px)
    x = x.unflatten(5, (-1, merge)).unflatten(4, (-1, merge))
    return x.permute(0, 1, 4, 6, 5, 7, 2, 3, 8, 9), down, right


def _normalised(
    x: Tensor,
    channel: int,
    mean: list[float],
    std: list[float],
    rescale: float,
    dtype: torch.dtype,
) -> Tensor:
    """A contiguous copy of x in `dtype`, rounded once; `channel` is the dimension of channels."""
    layout = torch.contiguous_format
    pixels = x.dtype == torch.uint8
    if not (mean or std or (pixels and rescale != 1)):
        return x.to(dtype, copy=True, memory_format=layout)
    channels = x.shape[channel]
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    if pixels:  # 256 values a channel; twice as fast as fp64 arithmetic
        levels = torch.arange(256, dtype=torch.float64, device=x.device) * rescale
        table = torch.cat([(levels - a) / b for a, b in zip(mean, std)]).to(dtype)
        index = x.to(torch.int32, memory_format=layout)
        for c in range(channels):
            index.select(channel, c).add_(256 * c)
        return table.index_select(0, index.view(-1)).view(index.shape)
    wide = x.to(torch.float64, copy=True, memory_format=layout)
    for c in range(channels):
        wide.select(channel, c).sub_(mean[c]).div_(std[c])
    return wide.to(dtype)


def check_choices(op: str, layout: str, k_order: str, pad_space: str = "raw") -> None:
    for name, value, choices in (
        ("layout", layout, _LAYOUTS),
        ("k_order", k_order, _ORDERS),
        ("pad_space", pad_space, _PAD_SPACES),
    ):
        if value not in choices:
            raise ValueError(
                f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
            )


def pair(name: str, value: Any, op: str = "patch_embed") -> tuple[Any, Any]:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"{op}: {name} is {value!r}, expected a number or (height, width)")


def channels_of(name: str, values: Any, op: str = "patch_embed") -> list[float]:
    if values is None:
        return []
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{op}: {name} is {type(values).__name__}, expected a sequence of Python "
            "numbers, one for each channel (a tensor's: .tolist())"
        )
    return [float(value) for value in values]


def check_images(
    op: str,
    images: Tensor,
    sizes: Sequence[int],
    nhwc: bool,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
    temporal: int,
) -> tuple[int, int, int, int]:
    """-> channels, and patches over time, height and width; `sizes` are of patches and strides."""
    py, px, sy, sx = sizes
    if images.dim() not in (4, 5):
        raise ValueError(f"{op}: images have shape {tuple(images.shape)}, expected 4 or 5 D")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{op}: images are {images.dtype}, expected uint8 or floating point")
    if min(py, px, sy, sx, merge, temporal) < 1 or rescale == 0 or not math.isfinite(rescale):
        raise ValueError(
            f"{op}: patch_size is {(py, px)}, stride {(sy, sx)}, merge {merge}, temporal "
            f"{temporal} and rescale {rescale}; expected positive numbers"
        )
    shape = images.shape
    channels = shape[-1] if nhwc else shape[-3]
    height, width = (shape[-3], shape[-2]) if nhwc else (shape[-2], shape[-1])
    if height < py or width < px:
        raise ValueError(
            f"{op}: images are {height} x {width} pixels, smaller than a patch of {py} x {px} "
            f"(images have shape {tuple(shape)}; layout is the other?)"
        )
    frames = shape[1] if images.dim() == 5 else temporal
    if frames % temporal:
        raise ValueError(
            f"{op}: videos have {frames} frames, expected a multiple of temporal = {temporal}"
        )
    gh, gw = -(-(height - py) // sy) + 1, -(-(width - px) // sx) + 1
    if gh % merge or gw % merge:
        raise ValueError(
            f"{op}: images are {gh} x {gw} patches, which blocks of merge = {merge} do not cover"
        )
    for name, values in (("mean", mean), ("std", std)):
        fits = not values or len(values) == channels
        if not (fits and all(map(math.isfinite, values)) and (name == "mean" or 0.0 not in values)):
            raise ValueError(
                f"{op}: {name} is {values}, expected a finite number for each of the {channels} "
                f"channels{' other than 0' * (name == 'std')}"
            )
    return channels, frames // temporal, gh, gw
