"""`patch_embed`: what is timed, and how people compute it without us.

A provider builds a function of `Inputs` that prepares what a model or a data loader prepares once
and returns the function of `Case.tensors` (weight, bias, positions, class token) that is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends, reference
from vlm_kernels.testing.specs import patch_embed as spec

from .. import case, targets
from ..case import OURS, Provider

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Prepare = Callable[["Inputs"], Run]
OPS = ("patch_embed",)
MODES = ("fwd", "full")
SHAPES = "BxHxWxPxE of uint8 pixels, or float:BxHxWxPxE of normalised ones"
AXES = "B x H x W x P x E"
GROUPS = tuple(targets.PATCH_EMBED)
NORM = spec.NORMS["clip"]


@dataclass(frozen=True)
class Inputs:
    """Of one call: pixels as a decoder gives them, (B, H, W, C) of uint8, or normalised, in the
    dtype of the weight, as a data loader does, (B, C, H, W)."""

    images: Tensor
    weight: Tensor  # (E, C, P, P)
    bias: Tensor  # (E,)
    pos: Tensor  # (1 + L, E)
    prefix: Tensor  # (1, E)
    grad: Tensor  # of the tokens, (B, 1 + L, E)

    @property
    def patch(self) -> int:
        return self.weight.shape[-1]

    @property
    def keywords(self) -> dict[str, Any]:
        if self.images.dtype != torch.uint8:
            return {"patch_size": self.patch}
        return {"patch_size": self.patch, "layout": "nhwc", **NORM}


@dataclass(frozen=True)
class Case(case.Case):
    """Pattern "" is uint8, "float" normalised pixels that have no gradient."""

    pattern: str
    b: int
    h: int
    w: int
    patch: int
    e: int

    @property
    def shape(self) -> str:
        name = f"{self.pattern}:" if self.pattern else ""
        return name + "x".join(map(str, (self.b, self.h, self.w, self.patch, self.e)))

    @property
    def group(self) -> str:
        return self.pattern or "uint8"

    @property
    def spec(self) -> spec.Case:
        variant = spec.Variant("nhwc", "u8", native=True, pos_prefixed=True)
        if self.pattern:
            variant = replace(variant, layout="nchw", norm="none")
        return spec.Case(
            *(self.b, self.h, self.w, (self.patch, self.patch), self.e, self.torch_dtype, variant)
        )

    @property
    def rows(self) -> int:
        return self.b * self.spec.patches

    @property
    def columns(self) -> int:
        return 3 * self.patch**2

    @property
    def fields(self) -> dict[str, Any]:
        sizes = {"b": self.b, "h": None, "n": self.rows, "m": self.columns, "d": self.e}
        return {"group": self.group, **sizes}

    @property
    def option(self) -> str:
        return self.shape

    @property
    def wrong(self) -> float:
        return {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}[self.dtype]

    @property
    def flops(self) -> float:
        # images have no gradient
        return 2.0 * self.rows * self.columns * self.e * (1 if self.mode == "fwd" else 2)

    @property
    def bytes(self) -> float:
        size = self.torch_dtype.itemsize
        pixels = self.b * self.h * self.w * 3 * (size if self.pattern else 1)
        parameters = (self.columns + self.spec.patches + 3) * self.e * size
        tokens = self.b * self.spec.tokens * self.e * size
        return (pixels + parameters + tokens) * (1 if self.mode == "fwd" else 2)

    @property
    def matrix(self) -> int:
        return self.rows * self.columns

    @property
    def returned_bytes(self) -> int:
        size = self.torch_dtype.itemsize
        tokens = self.b * self.spec.tokens * self.e
        parameters = (self.columns + self.spec.tokens + 2) * self.e
        return size * (tokens if self.mode == "fwd" else parameters)

    def inputs(self, device: str = "cpu") -> Inputs:
        images, weight, bias, pos, prefix, _ = self.spec.inputs()
        assert bias is not None
        assert pos is not None
        assert prefix is not None
        if self.pattern:
            pixels = images.float()
            images = ((pixels - pixels.mean()) / pixels.std()).to(self.torch_dtype)
        shape = (self.b, self.spec.tokens, self.e)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(shape, generator=generator).to(self.torch_dtype)
        return Inputs(*(x.to(device) for x in (images, weight, bias, pos, prefix, grad)))

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        return [inputs.weight, inputs.bias, inputs.pos, inputs.prefix]

    def call(self, fn: Prepare, inputs: Inputs) -> Callable[[], object]:
        run = fn(inputs)
        leaves = [x.detach().requires_grad_(self.mode == "full") for x in self.tensors(inputs)]

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*leaves)

        def full() -> tuple[Tensor, ...]:
            out = run(*leaves)
            grad = inputs.grad[:, : out.shape[1]]  # of the floor, which has no class token
            return torch.autograd.grad(out, leaves, grad, allow_unused=True)

        return {"fwd": forward, "full": full}[self.mode]

    def results(self, fn: Prepare, inputs: Inputs) -> dict[str, Tensor]:
        run = fn(inputs)
        leaves = [x.detach().requires_grad_() for x in self.tensors(inputs)]
        _, _, pos, prefix = leaves
        out = run(*leaves)
        if out.shape[1] < self.spec.tokens:  # what the floor leaves out is added here
            first = (prefix + pos[:1]).expand(self.b, 1, -1)
            out = torch.cat([first, out + pos[1:]], 1)
        if self.mode == "fwd":
            return {"out": out.detach()}
        grads = torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))
        return {"out": out.detach(), **dict(zip(("weight", "bias", "pos", "prefix"), grads))}

    def exact(self, device: str = "cpu") -> dict[str, Tensor]:
        given = self.inputs(device)
        names = ("weight", "bias", "pos", "prefix", "grad")
        wide: dict[str, Tensor] = {name: getattr(given, name).double() for name in names}
        if given.images.dtype != torch.uint8:
            wide["images"] = given.images.double()
        return self.results(_ours_as(reference.patch_embed), replace(given, **wide))

    def for_error(self, most: int) -> Case:
        """Fewer images, and of one a few rows of patches."""
        each = self.spec.patches
        if each <= most:
            return replace(self, b=min(self.b, max(most // each, 1)))
        rows = max(most // (each // (self.h // self.patch)), 1)
        return replace(self, b=1, h=rows * self.patch)

    def small(self) -> tuple[Case, ...]:
        return (replace(self, b=1, h=self.patch, w=self.patch),)

    def backend(self, requested: str, device: str = "cpu") -> str:
        inputs = self.small()[0].inputs(device)
        return _backends.select("patch_embed", requested, inputs.images, inputs.weight)


# --- what is run ---


def overhead(op: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of the call that the overhead is measured on."""
    inputs = Case(op, "full", "fp32", "float", 1, 4, 4, 4, 8).inputs()
    return [inputs.images, inputs.weight, inputs.bias], inputs.keywords


def cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, list[int | None]]]:
    """What to time; a workspace is nothing that patch_embed takes."""
    if args.shapes is not None:
        choices = [(mode, shape) for mode in args.mode or ["fwd"] for shape in args.shapes]
    else:
        groups = GROUPS if args.group is None else [g for g in GROUPS if g in args.group]
        if args.group is not None and args.op in OPS and not set(args.group) <= set(GROUPS):
            raise ValueError(f"{args.group[0]!r} is no group of patch_embed: {', '.join(GROUPS)}")
        choices = [
            (mode, shape)
            for group in groups
            for mode in args.mode or [targets.PATCH_EMBED[group][0]]
            for shape in targets.PATCH_EMBED[group][1][: 1 if args.quick else None]
        ]
    return [(parse(shape, mode, d), [None]) for d in args.dtype for mode, shape in choices]


def memory_cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, None]]:
    """What to measure the memory of, if that is asked for: no target speaks of it."""
    if not (args.memory or args.memory_shape):
        return []
    shapes = args.memory_shape or targets.PATCH_EMBED["uint8"][1][:2]
    modes = args.mode or ["fwd"]
    return [(parse(s, mode, dtype), None) for mode in modes for dtype in args.dtype for s in shapes]


def parse(shape: str, mode: str, dtype: str) -> Case:
    """The case that `Case.shape` names. ValueError for what names none."""
    pattern, _, text = shape.rpartition(":")
    sizes = [int(size) for size in text.split("x")]
    if pattern not in ("", "float") or len(sizes) != 5:
        raise ValueError(f"{shape!r} is not {SHAPES}, as patch_embed needs it")
    b, h, w, patch, e = sizes
    if h % patch or w % patch:
        raise ValueError(f"{shape!r}: {h} x {w} pixels are no whole patches of {patch}")
    return Case("patch_embed", mode, dtype, pattern, b, h, w, patch, e)


# --- who computes it ---


@dataclass(frozen=True)
class Pixels:
    """Images, and what turns bytes of them into normalised ones."""

    images: Tensor
    lowered: Tensor  # (C,), by this
    scaled: Tensor  # (C,), and then times this

    @classmethod
    def of(cls, inputs: Inputs) -> Pixels:
        images = inputs.images
        mean, std = (torch.tensor(NORM[name], device=images.device) for name in ("mean", "std"))
        return cls(images, 255 * mean, 1 / (255 * std))


def normalised(pixels: Pixels, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) in `dtype`, without a copy more than the arithmetic: the memory of (B, H, W, C)
    stays as it is, which Conv2d knows as channels_last."""
    if pixels.images.dtype != torch.uint8:
        return pixels.images
    wide = (pixels.images.float() - pixels.lowered) * pixels.scaled
    return wide.to(dtype).permute(0, 3, 1, 2)


def _with_added(tokens: Tensor, pos: Tensor, prefix: Tensor) -> Tensor:
    """The class token in front, then positions, as ViT and CLIP have it."""
    return torch.cat([prefix.expand(len(tokens), -1, -1), tokens], 1) + pos


def convolution(pixels: Pixels, w: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> Tensor:
    """Normalise, Conv2d, flatten, class token, positions."""
    grid = F.conv2d(normalised(pixels, w.dtype), w, bias, w.shape[-1])
    return _with_added(grid.flatten(2).mT, pos, prefix)


def linear(pixels: Pixels, w: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> Tensor:
    """Normalise, cut into patches by a view and a copy, then a linear layer."""
    patches = _patches(normalised(pixels, w.dtype), w.shape[-1])
    return _with_added(F.linear(patches, w.flatten(1), bias), pos, prefix)


def _patches(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C P P)"""
    b, c, h, w = x.shape
    cut = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, h // p * (w // p), c * p * p)


def _stem(function: Callable[..., Tensor], compiled: bool | None = None) -> Prepare:
    """`compiled` is torch.compile's dynamic; None: eager."""

    def prepare(inputs: Inputs) -> Run:
        made = function if compiled is None else torch.compile(function, dynamic=compiled)
        return functools.partial(made, Pixels.of(inputs))

    return prepare


def _bare(inputs: Inputs) -> Run:
    """F.linear on patches that are ready: what no call that starts from pixels can beat by much."""
    pixels = normalised(Pixels.of(inputs), inputs.weight.dtype)
    patches = _patches(pixels, inputs.patch).contiguous()
    return lambda weight, bias, pos, prefix: F.linear(patches, weight.flatten(1), bias)


def peers(op: str) -> list[Provider]:
    """Every peer. The stems do all of what ours does; bare_linear is the floor."""
    return [
        Provider("stem_conv", lambda _: _stem(convolution), keep=True),
        Provider("stem_conv_compile", lambda d: _stem(convolution, d), keep=True),
        Provider("stem_linear", lambda _: _stem(linear), keep=True),
        Provider("stem_linear_compile", lambda d: _stem(linear, d), keep=True),
        Provider("bare_linear", lambda _: _bare, note="ready patches; products only", floor=True),
    ]


def _ours_as(function: Callable[..., Tensor], **more: Any) -> Prepare:
    def prepare(inputs: Inputs) -> Run:
        def run(weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> Tensor:
            added = {"pos": pos, "prefix": prefix}
            return function(inputs.images, weight, bias, **added, **inputs.keywords, **more)

        return run

    return prepare


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public function."""
    return Provider(OURS, lambda _: _ours_as(vlm_kernels.patch_embed, backend=backend))
