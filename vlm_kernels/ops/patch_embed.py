"""patch_embed: from raw pixels to tokens in one op.

With it its helpers: patchify (the patches alone, as image processors make them),
fold_normalization and interpolate_pos_embed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _backends, reference
from .._load import _C

__all__ = ["patch_embed"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIXELS = (torch.uint8, *_DTYPES)
_LAYOUTS = ("nchw", "nhwc")
_ORDERS = ("cyx", "yxc", "ctyx")
_PAD_SPACES = ("raw", "normalised")

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
    for name, value, choices in (
        ("layout", layout, _LAYOUTS),
        ("k_order", k_order, _ORDERS),
        ("pad_space", pad_space, _PAD_SPACES),
    ):
        if value not in choices:
            raise ValueError(
                f"patch_embed: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
            )
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


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"patch_embed: {name} is {value!r}, expected a number or (height, width)")


def _channels(name: str, values: Any) -> list[float]:
    if values is None:
        return []
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"patch_embed: {name} is {type(values).__name__}, expected a sequence of Python "
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


def _check_reference(args: tuple[Any, ...]) -> None:
    """What csrc/ops/patch_embed.cpp checks for the kernels, for the arguments of its schema."""
    _check_types(args)
    images, weight, bias, pos, prefix, newline, *size, nhwc, yxc, mean, std, rescale = args[:15]
    merge, temporal = args[15], args[16]
    py, px, sy, sx = size
    if images.dim() not in (4, 5):
        raise ValueError(f"patch_embed: images have shape {tuple(images.shape)}, expected 4 or 5 D")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"patch_embed: images are {images.dtype}, expected uint8 or floating point")
    if not weight.is_floating_point():
        raise TypeError(f"patch_embed: weight is {weight.dtype}, expected floating point")
    if min(py, px, sy, sx, merge, temporal) < 1 or rescale == 0 or not math.isfinite(rescale):
        raise ValueError(
            f"patch_embed: patch_size is {(py, px)}, stride {(sy, sx)}, merge {merge}, temporal "
            f"{temporal} and rescale {rescale}; expected positive numbers"
        )
    shape = images.shape
    channels = shape[-1] if nhwc else shape[-3]
    height, width = (shape[-3], shape[-2]) if nhwc else (shape[-2], shape[-1])
    if height < py or width < px:
        raise ValueError(
            f"patch_embed: images are {height} x {width} pixels, smaller than a patch of "
            f"{py} x {px} (images have shape {tuple(shape)}; layout is the other?)"
        )
    frames = shape[1] if images.dim() == 5 else 1
    gh, gw = -(-(height - py) // sy) + 1, -(-(width - px) // sx) + 1
    if images.dim() == 5 and frames % temporal:
        raise ValueError(
            f"patch_embed: videos have {frames} frames, expected a multiple of temporal = "
            f"{temporal}"
        )
    if gh % merge or gw % merge:
        raise ValueError(
            f"patch_embed: images are {gh} x {gw} patches, which blocks of merge = {merge} do not "
            "cover"
        )
    k, native = temporal * channels * py * px, tuple(weight.shape[1:])
    allowed: list[tuple[int, ...]] = [(k,)]
    if not yxc:
        allowed += [(channels, temporal, py, px)] + [(channels, py, px)] * (temporal == 1)
    if native not in allowed:
        raise ValueError(
            f"patch_embed: weight has shape {tuple(weight.shape)}, expected E and one of {allowed} "
            f"for images of shape {tuple(shape)}"
        )
    for name, values in (("mean", mean), ("std", std)):
        fits = not values or len(values) == channels
        if not (fits and all(map(math.isfinite, values)) and (name == "mean" or 0.0 not in values)):
            raise ValueError(
                f"patch_embed: {name} is {values}, expected a finite number for each of the "
                f"{channels} channels{' other than 0' * (name == 'std')}"
            )
    e, b = weight.shape[0], shape[0]
    count = (frames // temporal if images.dim() == 5 else 1) * gh * gw
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


def _autocast(x: Any) -> Any:
    """As torch's own autocast of linear, which leaves fp64 and pixels of 8 bits alone."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        return x
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


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
