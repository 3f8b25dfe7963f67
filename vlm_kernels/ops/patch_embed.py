"""patch_embed: from raw pixels to tokens in one op.

With it its helpers: patch_embed_packed (images of many sizes), patchify (the patches alone, as
image processors make them), fold_normalization and interpolate_pos_embed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backends, reference
from .._load import _C

__all__ = [
    "fold_normalization",
    "interpolate_pos_embed",
    "patch_embed",
    "patch_embed_packed",
    "patchify",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIXELS = (torch.uint8, *_DTYPES)
_LAYOUTS = ("nchw", "nhwc")
_ORDERS = ("cyx", "yxc", "ctyx")
_PAD_SPACES = ("raw", "normalised")
_MODES = ("nearest", "bilinear", "bicubic")

Pair = int | tuple[int, int]
Grid = tuple[int, int] | tuple[int, int, int]


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
    backend: str = "auto",
) -> Tensor:
    """Tokens of images: normalise, cut into patches, project, add what belongs around them.

    The stem of a ViT (Dosovitskiy et al., arXiv:2010.11929) from the pixels that a decoder gives:
    (x - mean) / std is folded into the weight, so that no normalised image, no matrix of patches
    and no second copy of the tokens is ever written.

    Args:
        images: uint8 or floating point, (B, C, H, W) as layout="nchw" or (B, H, W, C) as "nhwc";
            with `temporal` also videos, (B, F, C, H, W) or (B, F, H, W, C), F a multiple of
            `temporal`. Any strides with a contiguous last dimension are read in place.
        weight: (E, K), or the native shape of the layer it comes from: Conv2d's (E, C, Py, Px),
            Conv3d's (E, C, T, Py, Px). fp32, bf16 or fp16; the products run and the tokens come in
            its dtype, sums are fp32. Its gradient is that of the weight as it stands, un-folded.
        bias: (E,) or None.
        patch_size: P or (Py, Px).
        stride: between patches, default the patch size; a smaller one overlaps them (slower).
        layout: "nchw" or "nhwc", of `images`.
        k_order: how the K columns of a weight run: "cyx" (Conv2d models), "yxc" (SigLIP 2, Fuyu),
            or with `temporal` "ctyx" (the Qwen-VL family).
        mean, std: of each channel, in units after `rescale`; None is 0 and 1.
        rescale: multiplies the pixels of uint8 images; floating-point ones are taken as they are.
        pos: (L, E) or (1 or B, L, E): added to the tokens of the patches, in their order; with
            n more rows for n `prefix` tokens, to those first.
        prefix: (n, E) or (1 or B, n, E): class and register tokens, in front.
        newline: (E,): a token after each row of patches (Fuyu, LLaVA-NeXT); not with `merge`.
        merge: tokens in the order of blocks of merge x merge patches (2 in Qwen2-VL).
        temporal: frames of a patch. A still image counts as `temporal` equal frames, and its
            patches are multiplied by the sum of the weight over time.
        pad_space: where an image is not covered by whole patches it is padded on the right and at
            the bottom, with 0 before ("raw") or after ("normalised") normalisation.
        backend: "auto", "cuda", "cpu", "triton" or "reference"; see `vlm_kernels.explain`.

    Returns:
        (B, n + frames * gh * (gw + newline), E) in the dtype of the weight, where
        gh = ceil((H - Py) / stride) + 1 and frames = 1 for still images.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work: an image smaller than a
            patch, a wrong number of channels, mean or std of the wrong length; the message names
            what came, what was expected and the fix.
        RuntimeError: the backend asked for cannot run this call.
    """
    _check_choices("patch_embed", layout, k_order, pad_space)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        images, weight = _autocast(images), _autocast(weight)
    size = _pair("patch_size", patch_size)
    step = size if stride is None else _pair("stride", stride)
    args = (
        *(images, weight, bias, pos, prefix, newline, *size, *step, layout == "nhwc"),
        *(k_order == "yxc", _channels("mean", mean), _channels("std", std), rescale, merge),
        *(temporal, pad_space == "normalised"),
    )
    if _choose(images, weight, backend) == "reference":
        _check_reference(args)
        return reference.patch_embed(
            images,
            weight,
            bias,
            patch_size=size,
            stride=step,
            layout=layout,
            k_order=k_order,
            mean=mean,
            std=std,
            rescale=rescale,
            pos=pos,
            prefix=prefix,
            newline=newline,
            merge=merge,
            temporal=temporal,
            pad_space=pad_space,
        )
    if torch.compiler.is_compiling():
        return torch.ops.vlm_kernels.patch_embed_fwd(*args)
    try:
        return _C.patch_embed_fwd(*args)
    except TypeError:
        _check_types(args)  # pybind11 lists signatures instead of naming the argument
        raise


def _check_choices(op: str, layout: str, k_order: str, pad_space: str = "raw") -> None:
    for name, value, choices in (
        ("layout", layout, _LAYOUTS),
        ("k_order", k_order, _ORDERS),
        ("pad_space", pad_space, _PAD_SPACES),
    ):
        if value not in choices:
            raise ValueError(
                f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
            )


def _pair(name: str, value: Any, op: str = "patch_embed") -> tuple[Any, Any]:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"{op}: {name} is {value!r}, expected a number or (height, width)")


def _channels(name: str, values: Any, op: str = "patch_embed") -> list[float]:
    if values is None:
        return []
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{op}: {name} is {type(values).__name__}, expected a sequence of Python "
            "numbers, one for each channel (a tensor's: .tolist())"
        )
    return [float(value) for value in values]


_TENSORS = ("images", "weight", "bias", "pos", "prefix", "newline")
_NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("patch_size[0]", "patch_size[1]", "stride[0]", "stride[1]"), (int, torch.SymInt)
    ),
    "layout": (bool,),
    "k_order": (bool,),
    "mean": (list,),
    "std": (list,),
    "rescale": (int, float, torch.SymFloat),
    "merge": (int, torch.SymInt),
    "temporal": (int, torch.SymInt),
    "pad_space": (bool,),
}


def _check_types(args: tuple[Any, ...]) -> None:
    for i, (name, value) in enumerate(zip(_TENSORS, args)):
        if not isinstance(value, Tensor) and (value is not None or i < 2):
            raise TypeError(f"patch_embed: {name} is {type(value).__name__}, expected a tensor")
    for (name, types), value in zip(_NUMBERS.items(), args[len(_TENSORS) :], strict=True):
        if not isinstance(value, types):
            raise TypeError(f"patch_embed: {name} is {type(value).__name__}, expected a number")


def _check_images(
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
        if values and (len(values) != channels or (name == "std" and 0.0 in values)):
            raise ValueError(
                f"{op}: {name} is {values}, expected a number for each of the {channels} channels"
            )
    return channels, frames // temporal, gh, gw


def _check_reference(args: tuple[Any, ...]) -> None:
    """What csrc/ops/patch_embed.cpp checks for the kernels, for the arguments of its schema."""
    _check_types(args)
    images, weight, bias, pos, prefix, newline, *size, nhwc, yxc, mean, std, rescale = args[:15]
    merge, temporal = args[15], args[16]
    py, px, _, _ = size
    if not weight.is_floating_point():
        raise TypeError(f"patch_embed: weight is {weight.dtype}, expected floating point")
    channels, frames, gh, gw = _check_images(
        "patch_embed", images, size, nhwc, mean, std, rescale, merge, temporal
    )
    k, native = temporal * channels * py * px, tuple(weight.shape[1:])
    allowed: list[tuple[int, ...]] = [(k,)]
    if not yxc:
        allowed += [(channels, temporal, py, px)] + [(channels, py, px)] * (temporal == 1)
    if native not in allowed:
        raise ValueError(
            f"patch_embed: weight has shape {tuple(weight.shape)}, expected E and one of {allowed} "
            f"for images of shape {tuple(images.shape)}"
        )
    e, b, count = weight.shape[0], images.shape[0], frames * gh * gw
    before = 0 if prefix is None or prefix.dim() < 2 else prefix.shape[-2]
    for name, x, rows in (
        ("bias", bias, None),
        ("newline", newline, None),
        ("prefix", prefix, (before,)),
        ("pos", pos, (count, before + count)),
    ):
        if x is None:
            continue
        if x.device != images.device:
            raise ValueError(f"patch_embed: {name} is on {x.device}, images on {images.device}")
        fits = x.shape == (e,)
        if rows is not None:
            fits = x.dim() in (2, 3) and x.shape[-1] == e and x.shape[-2] in rows
            fits = fits and (x.dim() == 2 or x.shape[0] in (1, b))
        if not fits:
            expected = f"({e},)" if rows is None else f"({rows[-1]}, {e}) or (1 or {b}, ...)"
            raise ValueError(f"patch_embed: {name} has shape {tuple(x.shape)}, expected {expected}")
    if newline is not None and merge > 1:
        raise ValueError(f"patch_embed: newline came with merge = {merge}")


def _autocast(x: Any) -> Any:
    """As torch's own autocast of linear, which leaves fp64 and pixels of 8 bits alone."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        return x
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _choose(images: Any, weight: Any, backend: str) -> str:
    if not (isinstance(images, Tensor) and isinstance(weight, Tensor)):
        raise TypeError(
            f"patch_embed: images and weight are {type(images).__name__} and "
            f"{type(weight).__name__}; expected two tensors"
        )
    if (
        _C is not None
        and (backend == "cpu" or (backend == "auto" and "VLM_BACKEND" not in os.environ))
        and images.is_cpu
        and weight.is_cpu
        and weight.dtype in _DTYPES
        and images.dtype in _PIXELS
    ):
        return "cpu"
    return _backends.select("patch_embed", backend, images, weight)


def _why_not_cpu(images: Tensor, weight: Tensor, *_: Any, **__: Any) -> str | None:
    for name, x, dtypes in (("images", images, _PIXELS), ("weight", weight, _DTYPES)):
        if x.device.type != "cpu":
            return f"{name} is on {x.device}"
        if x.dtype not in dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"{name} is {x.dtype}; the kernels take {known}"
    return None


_backends.register("patch_embed", "cpu", _why_not_cpu)
_backends.register("patch_embed", "reference", lambda *_, **__: None)


def register_fakes(namespace: str) -> None:
    """Shapes of the ops' results, for meta tensors and torch.compile."""

    @torch.library.register_fake(f"{namespace}::patch_embed_fwd")
    def _(images: Tensor, weight: Tensor, *args: Any) -> Tensor:
        _, _, prefix, newline, py, px, sy, sx, nhwc, *_, temporal, _ = args
        height, width = images.shape[-3:-1] if nhwc else images.shape[-2:]
        frames = images.shape[1] // temporal if images.dim() == 5 else 1
        gh, gw = (height - py + sy - 1) // sy + 1, (width - px + sx - 1) // sx + 1
        before = 0 if prefix is None else prefix.shape[-2]
        tokens = before + frames * gh * (gw + (newline is not None))
        return weight.new_empty((images.shape[0], tokens, weight.shape[0]))

    @torch.library.register_fake(f"{namespace}::patch_embed_bwd")
    def _(grad: Tensor, *args: Any) -> Any:
        needs, found = args[-1], []
        for bit, x in enumerate(args[:6]):
            wanted = x is not None and needs >> bit & 1 and x.dtype != torch.uint8
            found.append(torch.empty_like(x) if wanted else grad.new_empty(0))
        return tuple(found)


if _C is not None:
    register_fakes("vlm_kernels")


# --- helpers ---


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
    _check_choices(op, "nchw", k_order)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() < 2:
        raise TypeError(f"{op}: weight is no floating-point tensor of two dimensions or more")
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype is {dtype}, expected floating point")
    shifts, scales = _channels("mean", mean, op), _channels("std", std, op)
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
    _check_choices(op, layout, k_order, pad_space)
    size = _pair("patch_size", patch_size, op)
    step = size if stride is None else _pair("stride", stride, op)
    shifts, scales = _channels("mean", mean, op), _channels("std", std, op)
    nhwc = layout == "nhwc"
    if not isinstance(images, Tensor):
        raise TypeError(f"{op}: images is {type(images).__name__}, expected a tensor")
    if not dtype.is_floating_point and (dtype != images.dtype or shifts or scales or rescale != 1):
        raise TypeError(f"{op}: dtype is {dtype}, expected floating point")
    _check_images(op, images, (*size, *step), nhwc, shifts, scales, rescale, merge, temporal)
    patches, down, right = _cut(images, size, step, nhwc, merge, temporal)
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


def _cut(
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


def patch_embed_packed(
    images: Sequence[Tensor],
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
    pos_table: Tensor | None = None,
    pos_mode: str | Mapping[str, Any] = "bicubic",
    prefix: Tensor | None = None,
    newline: Tensor | None = None,
    merge: int = 1,
    temporal: int = 1,
    pad_space: str = "raw",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens of S images of any sizes, one after the other: what `attention_varlen` takes.

    NaViT's packing (Dehghani et al., arXiv:2307.06304) without padding: patches are gathered as
    they are, 8-bit pixels as 8 bits, and one call of `patch_embed` projects them all. The kernels'
    tokens of an image are bit for bit those of `patch_embed` of it alone.

    Args: as `patch_embed`, except
        images: S tensors (C, H, W), as layout="nhwc" (H, W, C), or S videos (F, C, H, W) or
            (F, H, W, C); of one dtype, on one device, alike in memory.
        pos: (T, E), the rows of all images one after the other, each with those of its prefix
            first, if the prefix has any.
        pos_table: instead of `pos`, the table that `interpolate_pos_embed` resamples for each.
        pos_mode: its mode, or all its keywords as a mapping, such as
            {"mode": "bilinear", "antialias": True}; `merge` is this call's.
        prefix: (n, E) or (1 or S, n, E).

    Returns:
        Tokens (T, E) in the dtype of the weight, and cu_seqlens (S + 1,), int32, from 0 to T, on
        the device of the images.

    Raises:
        As `patch_embed`; also ValueError for images that differ in dtype, device or dimensions.
    """
    op = "patch_embed_packed"
    _check_choices(op, layout, k_order, pad_space)
    size = _pair("patch_size", patch_size, op)
    step = size if stride is None else _pair("stride", stride, op)
    shifts, scales = _channels("mean", mean, op), _channels("std", std, op)
    nhwc = layout == "nhwc"
    _check_pack(images, newline, merge, weight.shape[0])
    grids = [
        _check_images(op, x[None], (*size, *step), nhwc, shifts, scales, rescale, merge, temporal)
        for x in images
    ]
    firsts = _prefixes(prefix, len(grids), weight.shape[0])
    before = 0 if prefix is None else prefix.shape[-2]
    counts = [frames * gh * gw for _, frames, gh, gw in grids]
    if pos_table is not None:
        if pos is not None:
            raise ValueError(f"{op}: pos and pos_table came, expected one of them")
        keywords = {"mode": pos_mode} if isinstance(pos_mode, str) else dict(pos_mode)
        pos = interpolate_pos_embed(pos_table, [g[1:] for g in grids], merge=merge, **keywords)
    own = 0  # rows of pos that belong to each image's prefix
    if pos is not None:
        own = before if pos.shape[0] == sum(counts) + before * len(counts) else 0
        if pos.dim() != 2 or pos.shape[0] != sum(counts) + own * len(counts):
            raise ValueError(
                f"{op}: pos has shape {tuple(pos.shape)}, expected {sum(counts)} rows, those of "
                f"all patches, and {before} more for each of {len(counts)} prefixes or none"
            )
    ends = [0]
    for (_, frames, gh, _), count in zip(grids, counts):
        ends.append(ends[-1] + before + count + (frames * gh if newline is not None else 0))
    rest: dict[str, Any] = {
        **{"patch_size": size, "k_order": k_order, "mean": mean, "std": std, "rescale": rescale},
        **{"temporal": temporal, "backend": backend},
    }
    positions = None if pos is None else pos.split([own + count for count in counts])
    if pad_space == "normalised" and any(shifts) and _padded(images, size, step, nhwc):
        # What 0 after normalisation was before it is no pixel: it takes the kernel to pad.
        rest |= {"stride": step, "layout": layout, "newline": newline, "merge": merge}
        alone = [
            patch_embed(
                *(x[None], weight, bias),
                pos=None if positions is None else positions[i],
                prefix=None if firsts is None else firsts[i],
                pad_space=pad_space,
                **rest,
            )[0]
            for i, x in enumerate(images)
        ]
        return torch.cat(alone), _cu_seqlens(ends, weight.device)
    if not images:
        return weight.new_empty((0, weight.shape[0])), _cu_seqlens(ends, weight.device)
    patches, packed_layout = _pack(images, size, step, nhwc, merge, temporal)
    rows = pos
    if positions is not None and own:
        rows = torch.cat([each[own:] for each in positions])
    tokens = patch_embed(
        *(patches, weight, bias),
        layout=packed_layout,
        pos=None if rows is None else rows[:, None],
        **rest,
    ).flatten(0, 1)
    if prefix is not None or newline is not None:
        parts = []
        for i, ((_, _, _, gw), x) in enumerate(zip(grids, tokens.split(counts))):
            if firsts is not None:
                first = firsts[i].to(x.dtype)
                if positions is not None and own:
                    first = first + positions[i][:own].to(x.dtype)
                parts.append(first)
            if newline is not None:
                lines = x.unflatten(0, (-1, gw))
                last = newline.to(x.dtype).expand(lines.shape[0], 1, -1)
                x = torch.cat([lines, last], 1).flatten(0, 1)
            parts.append(x)
        tokens = torch.cat(parts)
    return tokens, _cu_seqlens(ends, tokens.device)


def _check_pack(
    images: Sequence[Tensor], newline: Tensor | None, merge: int, embed_dim: int
) -> None:
    op = "patch_embed_packed"
    if not isinstance(images, (list, tuple)) or not all(isinstance(x, Tensor) for x in images):
        raise TypeError(f"{op}: images are {type(images).__name__}, expected a list of tensors")
    for i, x in enumerate(images):
        first = images[0]
        if x.dim() not in (3, 4) or (x.dim(), x.dtype, x.device) != (
            *(first.dim(), first.dtype, first.device),
        ):
            raise ValueError(
                f"{op}: image {i} has shape {tuple(x.shape)}, is {x.dtype} and on {x.device}; "
                "expected all with three dimensions, or as videos with four, of one dtype and on "
                f"one device; image 0 has shape {tuple(first.shape)} and is {first.dtype}"
            )
    if newline is None:
        return
    if newline.shape != (embed_dim,):
        raise ValueError(f"{op}: newline has shape {tuple(newline.shape)}, expected ({embed_dim},)")
    if merge > 1:
        raise ValueError(f"{op}: newline came with merge = {merge}; blocks of tokens have no rows")


def _prefixes(prefix: Tensor | None, count: int, embed_dim: int) -> Any:
    """(n, E) of each image."""
    if prefix is None:
        return None
    shape = tuple(prefix.shape)
    if len(shape) not in (2, 3) or shape[-1] != embed_dim or shape[:-2] not in ((), (1,), (count,)):
        raise ValueError(
            f"patch_embed_packed: prefix has shape {shape}, expected (n, {embed_dim}) or "
            f"(1 or {count}, n, {embed_dim})"
        )
    return prefix.expand(count, *shape[-2:]).unbind(0)


def _padded(
    images: Sequence[Tensor], size: tuple[int, int], step: tuple[int, int], nhwc: bool
) -> bool:
    """Whether some image is not covered by whole patches."""
    sides = [x.shape[-3:-1] if nhwc else x.shape[-2:] for x in images]
    return any((h - size[0]) % step[0] or (w - size[1]) % step[1] for h, w in sides)


def _pack(
    images: Sequence[Tensor],
    size: tuple[int, int],
    step: tuple[int, int],
    nhwc: bool,
    merge: int,
    temporal: int,
) -> tuple[Tensor, str]:
    """Patches as images of one patch each, and their layout: that of the images in memory.

    The kernel sums in the order in which pixels lie, so that order makes the bits of a token.
    """
    c, x = (-1, -2) if nhwc else (-3, -1)
    first = images[0]
    interleaved = first.stride(c) == 1 and first.stride(x) == first.shape[c] > 1
    order = (6, 8, 9, 7) if interleaved else (6, 7, 8, 9)
    parts = []
    for image in images:
        cut = _cut(image[None], size, step, nhwc, merge, temporal)[0].permute(*range(6), *order)
        parts.append(cut.reshape(-1, *cut.shape[6:]))  # (L, T, C, Py, Px) or (L, T, Py, Px, C)
    patches = torch.cat(parts) if len(parts) > 1 else parts[0]
    return patches if first.dim() == 4 else patches[:, 0], "nhwc" if interleaved else "nchw"


def _cu_seqlens(ends: list[int], device: torch.device) -> Tensor:
    """On the device without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(ends, dtype=torch.int32, device=device)
    return torch.tensor(ends, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
