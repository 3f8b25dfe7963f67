"""patch_embed: from raw pixels to tokens in one op.

With it its helpers: patch_embed_packed (images of many sizes), patchify (the patches alone, as
image processors make them), fold_normalization and interpolate_pos_embed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _backends, reference
from .._load import _C
from ._autocast import cast
from ._patches import (
    Pair,
    channels_of,
    check_choices,
    check_images,
    cut,
    fold_normalization,
    pair,
    patchify,
)
from ._pos_embed import interpolate_pos_embed

__all__ = [
    "fold_normalization",
    "interpolate_pos_embed",
    "patch_embed",
    "patch_embed_packed",
    "patchify",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIXELS = (torch.uint8, *_DTYPES)


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
    check_choices("patch_embed", layout, k_order, pad_space)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        images, weight = cast(images), cast(weight)
    size = pair("patch_size", patch_size)
    step = size if stride is None else pair("stride", stride)
    args = (
        *(images, weight, bias, pos, prefix, newline, *size, *step, layout == "nhwc"),
        *(k_order == "yxc", channels_of("mean", mean), channels_of("std", std), rescale, merge),
        *(temporal, pad_space == "normalised"),
    )
    if _choose(images, weight, backend) == "reference":
        _check_reference(args)
        # what is cast is cast: its own products are wider than the weight
        with _no_autocast(images.device.type):
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


def _check_reference(args: tuple[Any, ...]) -> None:
    """What csrc/ops/patch_embed.cpp checks for the kernels, for the arguments of its schema."""
    _check_types(args)
    images, weight, bias, pos, prefix, newline, *size, nhwc, yxc, mean, std, rescale = args[:15]
    merge, temporal = args[15], args[16]
    py, px, _, _ = size
    if not weight.is_floating_point():
        raise TypeError(f"patch_embed: weight is {weight.dtype}, expected floating point")
    channels, frames, gh, gw = check_images(
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
        if not x.is_floating_point():
            raise TypeError(f"patch_embed: {name} is {x.dtype}, expected floating point")
        fits = x.shape == (e,)
        if rows is not None:
            fits = x.dim() in (2, 3) and x.shape[-1] == e and x.shape[-2] in rows
            fits = fits and (x.dim() == 2 or x.shape[0] in (1, b))
        if not fits:
            expected = f"({e},)" if rows is None else f"({rows[-1]}, {e}) or (1 or {b}, ...)"
            raise ValueError(f"patch_embed: {name} has shape {tuple(x.shape)}, expected {expected}")
    if newline is not None and merge > 1:
        raise ValueError(f"patch_embed: newline came with merge = {merge}")


def _no_autocast(device: str) -> AbstractContextManager[object]:
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


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
    check_choices(op, layout, k_order, pad_space)
    size = pair("patch_size", patch_size, op)
    step = size if stride is None else pair("stride", stride, op)
    shifts, scales = channels_of("mean", mean, op), channels_of("std", std, op)
    nhwc = layout == "nhwc"
    _check_pack(images, newline, merge, weight.shape[0])
    grids = [
        check_images(op, x[None], (*size, *step), nhwc, shifts, scales, rescale, merge, temporal)
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
        rows = cut(image[None], size, step, nhwc, merge, temporal)[0].permute(*range(6), *order)
        parts.append(rows.reshape(-1, *rows.shape[6:]))  # (L, T, C, Py, Px) or (L, T, Py, Px, C)
    patches = torch.cat(parts) if len(parts) > 1 else parts[0]
    return patches if first.dim() == 4 else patches[:, 0], "nhwc" if interleaved else "nchw"


def _cu_seqlens(ends: list[int], device: torch.device) -> Tensor:
    """On the device without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(ends, dtype=torch.int32, device=device)
    return torch.tensor(ends, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
