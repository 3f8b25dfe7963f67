"""`attention` and `attention_varlen`: what is timed, and how people compute it without us.

A provider builds a function of `Inputs` that prepares what a model prepares once (a mask) and
returns the function of (query, key, value) that is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends, reference
from vlm_kernels.testing.specs import attention as spec

from .. import case, targets
from ..case import OURS, Provider

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Prepare = Callable[["Inputs"], Run]
OPS = ("attention",)
SHAPES = (
    "BxHxNxD, BxHxNxMxD (N queries, M keys), windows:HxTxD, images:HxD, or prefix_lm:, "
    "image_blocks: or per_image: before BxHxNxD"
)
AXES = "B x H x N (x M) x D"
GROUPS = tuple(targets.ATTENTION)
COST = {"pattern": "", "b": 1, "h": 1, "n": 1, "m": 1, "d": 8}
"""Sizes of the case that the overhead of a call is measured on."""
WINDOW = 64
"""Tokens of a window of Qwen2.5-VL's vision tower: 8 x 8 patches."""
IMAGES = (64, 1024, 100, 576, 144, 324, 64, 729, 256, 196, 400, 64, 484, 144, 100, 196)
"""Tokens of the packed images: squares of 8 to 32 patches, mixed, as they come."""
_SIZES = {"windows": 3, "images": 2, "prefix_lm": 4, "image_blocks": 4, "per_image": 4}


@dataclass(frozen=True)
class Inputs:
    """Of one call: (B, H, N, D) and (B, H, M, D), or packed (T, H, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor  # of the output
    pattern: str
    lengths: tuple[int, ...]  # of packed sequences
    allowed: Tensor | None  # (B or 1, 1, N, M): the keys a query sees; None: all of its sequence

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:  # (S + 1,)
        ends = itertools.accumulate(self.lengths, initial=0)
        return torch.tensor(list(ends), dtype=torch.int32, device=self.query.device)

    @functools.cached_property
    def kv_range(self) -> Tensor | None:  # (B or 1, 1, N, 2)
        return None if self.allowed is None else _ranges(self.allowed)

    @functools.cached_property
    def dense_mask(self) -> Tensor:
        """What SDPA is given: `allowed`, or the blocks of the packed sequences, (1, 1, T, T)."""
        if self.allowed is not None:
            return self.allowed
        blocks = [torch.ones(n, n, dtype=torch.bool) for n in self.lengths]
        return torch.block_diag(*blocks)[None, None].to(self.query.device, torch.bool)


def _ranges(allowed: Tensor) -> Tensor:
    """The keys that each query sees, which must follow one another, as a half-open range."""
    keys = allowed.shape[-1]
    begin = allowed.int().argmax(-1)
    end = keys - allowed.flip(-1).int().argmax(-1)
    assert torch.equal(end - begin, allowed.sum(-1))
    return torch.stack([begin, end], -1).to(torch.int32)


def _prefix(n: int, batch: int) -> int:
    """Tokens of the image and the question, which all see one another: a quarter and some."""
    return n // 4 + n // 16 * (batch + 1)


def _image_of_token(n: int) -> Tensor:
    """Two images of a quarter of the tokens each between text, which is -1. (N,)"""
    image = torch.full((n,), -1)
    image[n // 16 : n // 16 + n // 4] = 0
    image[n // 2 : n // 2 + n // 4] = 1
    return image


_IMAGES_SEEN = 4
"""Images of per-image cross-attention: each quarter of the text sees the image before it."""


def _rule(
    pattern: str, b: int, n: int, m: int, device: str | torch.device = "cpu"
) -> Callable[[Any, Any, Any, Any], Any]:
    """Whether query `q` of entry `b` sees key `k`, in the form of FlexAttention's mask_mod."""
    if pattern == "prefix_lm":  # PaliGemma
        prefix = torch.tensor([_prefix(n, entry) for entry in range(b)], device=device)
        return lambda b, h, q, k: (k <= q) | (k < prefix[b])
    if pattern == "image_blocks":  # Gemma 3
        image = _image_of_token(n).to(device)
        return lambda b, h, q, k: (k <= q) | ((image[q] == image[k]) & (image[q] >= 0))
    # Flamingo
    return lambda b, h, q, k: q * _IMAGES_SEEN // n == k * _IMAGES_SEEN // m


def _allowed(pattern: str, b: int, n: int, m: int) -> Tensor:
    """The rule as a dense mask, (B or 1, 1, N, M)."""
    entry, query, key = torch.arange(b), torch.arange(n), torch.arange(m)
    seen = _rule(pattern, b, n, m)(entry[:, None, None], 0, query[:, None], key)
    return seen.expand(-1, n, m)[:, None] if seen.ndim == 3 else seen[None, None]


@dataclass(frozen=True)
class Case(case.Case):
    """Dense (pattern ""), packed ("windows", "images") or with a mask (the others)."""

    pattern: str
    b: int
    h: int
    n: int
    m: int
    d: int

    @property
    def shape(self) -> str:
        sizes: tuple[int, ...] = (self.b, self.h, self.n, self.m, self.d)
        if self.pattern == "windows":
            sizes = (self.h, self.n, self.d)
        elif self.pattern == "images":
            sizes = (self.h, self.d)
        elif self.n == self.m:
            sizes = (self.b, self.h, self.n, self.d)
        name = f"{self.pattern}:" if self.pattern else ""
        return name + "x".join(map(str, sizes))

    @property
    def group(self) -> str:
        if self.pattern:
            return "packed" if self.lengths else "masks"
        return "dense" if self.n == self.m else "packed"

    @property
    def fields(self) -> dict[str, Any]:
        sizes = {"b": self.b, "h": self.h, "n": self.n, "m": self.m, "d": self.d}
        return {"group": self.group, **sizes}

    @property
    def option(self) -> str:
        return self.shape

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.pattern == "windows":
            return (WINDOW,) * (self.n // WINDOW)
        return IMAGES if self.pattern == "images" else ()

    @property
    def wrong(self) -> float:
        return {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}[self.dtype]

    @property
    def _pairs(self) -> int:
        """Queries and keys that see each other, over the batch."""
        if self.lengths:
            return sum(n * n for n in self.lengths)
        if self.pattern:
            allowed = _allowed(self.pattern, self.b, self.n, self.m)
            return int(allowed.sum()) * self.b // len(allowed)
        return self.b * self.n * self.m

    @property
    def flops(self) -> float:
        # two products forward; five backward, the scores among them: nobody keeps those
        return {"fwd": 4, "full": 14}[self.mode] * self._pairs * self.h * self.d

    @property
    def bytes(self) -> float:
        queries, keys = self.b * self.n, self.b * self.m
        moved = 2 * queries + 2 * keys  # query, out; key, value
        if self.mode == "full":
            moved += 2 * queries + 2 * keys  # the gradients of all four
        return moved * self.h * self.d * self.torch_dtype.itemsize

    @property
    def matrix(self) -> int:
        return self.b * self.h * self.n * self.m

    @property
    def returned_bytes(self) -> int:
        rows = self.b * (self.n + 2 * self.m if self.mode == "full" else self.n)
        return rows * self.h * self.d * self.torch_dtype.itemsize

    def refuses(self, peer: Provider) -> str:
        if peer.name == "flex" and self.mode == "full" and not torch.cuda.is_available():
            return "FlexAttention has no backward on a CPU"
        return ""

    def takes(self, provider: Provider) -> bool:
        return provider.ours or self.pattern in provider.patterns

    def inputs(self, device: str = "cpu") -> Inputs:
        sizes = (self.b, self.h, self.n, self.m, self.d, self.torch_dtype)
        layout = "bnhd" if self.lengths else "bhnd"
        query, key, value, *_ = spec.make_inputs(*sizes, device=device, layout=layout)
        generator = torch.Generator(device).manual_seed(1)
        grad = torch.randn(query.shape, generator=generator, device=device).to(self.torch_dtype)
        if self.lengths:
            query, key, value, grad = (x[0].transpose(0, 1) for x in (query, key, value, grad))
            return Inputs(query, key, value, grad.contiguous(), self.pattern, self.lengths, None)
        seen = _allowed(self.pattern, self.b, self.n, self.m).to(device) if self.pattern else None
        return Inputs(query, key, value, grad, self.pattern, (), seen)

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        return [inputs.query, inputs.key, inputs.value]

    def call(self, fn: Prepare, inputs: Inputs) -> Callable[[], object]:
        run = fn(inputs)
        leaves = [x.detach().requires_grad_(self.mode == "full") for x in self.tensors(inputs)]

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*leaves)

        def full() -> tuple[Tensor, ...]:
            return torch.autograd.grad(run(*leaves), leaves, inputs.grad)

        return {"fwd": forward, "full": full}[self.mode]

    def results(self, fn: Prepare, inputs: Inputs) -> dict[str, Tensor]:
        run = fn(inputs)
        if self.mode == "fwd":
            with torch.no_grad():
                return {"out": run(*self.tensors(inputs))}
        leaves = [x.detach().requires_grad_() for x in self.tensors(inputs)]
        out = run(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))
        return {"out": out.detach(), **dict(zip(("query", "key", "value"), grads, strict=True))}

    def exact(self, device: str = "cpu") -> dict[str, Tensor]:
        inputs = self.inputs(device)
        query, key, value, grad = (
            x.double() for x in (inputs.query, inputs.key, inputs.value, inputs.grad)
        )
        inputs = replace(inputs, query=query, key=key, value=value, grad=grad)
        return self.results(_definition, inputs)

    def small(self) -> tuple[Case, ...]:
        return (replace(self, b=min(self.b, 2), h=2),)

    def backend(self, requested: str, device: str = "cpu") -> str:
        inputs = self.small()[0].inputs(device)
        op = "attention_varlen" if self.lengths else "attention"
        return _backends.select(op, requested, *self.tensors(inputs))


# --- what is run ---


def cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, list[int | None]]]:
    """What to time; a workspace is nothing that attention takes."""
    groups = args.group or GROUPS
    shapes = [shape for group in groups for shape in targets.ATTENTION[group]]
    if args.quick:
        shapes = [targets.ATTENTION[group][0] for group in groups]
    if args.shapes is not None:
        shapes = args.shapes
    return [
        (parse(shape, mode, dtype), [None])
        for mode in args.mode
        for dtype in args.dtype
        for shape in shapes
    ]


def memory_cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, None]]:
    """What to measure the memory of, if that is asked for: no target speaks of it."""
    if not (args.memory or args.memory_shape):
        return []
    shapes = args.memory_shape or targets.ATTENTION_MEMORY
    return [
        (parse(s, mode, dtype), None) for mode in args.mode for dtype in args.dtype for s in shapes
    ]


def parse(shape: str, mode: str, dtype: str) -> Case:
    """The case that `Case.shape` names. ValueError for what names none."""
    pattern, _, text = shape.rpartition(":")
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) not in ((_SIZES[pattern],) if pattern in _SIZES else () if pattern else (4, 5)):
        raise ValueError(f"{shape!r} is not {SHAPES}, as attention needs it")
    if pattern == "windows":
        h, n, d = sizes
        if n % WINDOW:
            raise ValueError(f"{shape!r}: {n} tokens are not windows of {WINDOW}")
        return Case("attention", mode, dtype, pattern, 1, h, n, n, d)
    if pattern == "images":
        h, d = sizes
        return Case("attention", mode, dtype, pattern, 1, h, sum(IMAGES), sum(IMAGES), d)
    b, h, n, *m, d = sizes
    return Case("attention", mode, dtype, pattern, b, h, n, m[0] if m else n, d)


# --- who computes it ---


def _definition(inputs: Inputs) -> Run:
    """The definition. It is given the dense mask and single images, never a kv_range or
    cu_seqlens, so that those are checked too."""
    function = functools.partial(getattr(reference, OPS[0]), attn_mask=inputs.allowed)
    return _per_image(function)(inputs) if inputs.lengths else function


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Product, softmax, product in the dtype of the inputs, as models had it before SDPA. Queries
    are scaled, not scores, as in CLIP: that is one pass over the scores less."""
    scale = 1 / math.sqrt(query.shape[-1])
    return (query * scale @ key.transpose(-2, -1)).softmax(-1) @ value


def _per_image(one: Run) -> Prepare:
    """A call an image, as transformers' Qwen2.5-VL has it without flash-attention."""

    def prepare(inputs: Inputs) -> Run:
        def run(*tensors: Tensor) -> Tensor:
            parts = (x.transpose(0, 1)[None].split(inputs.lengths, 2) for x in tensors)
            outs = [one(q, k, v) for q, k, v in zip(*parts, strict=True)]
            return torch.cat(outs, 2)[0].transpose(0, 1)

        return run

    return prepare


def _batched(one: Run) -> Prepare:
    """Sequences of one length as a batch: a view."""

    def prepare(inputs: Inputs) -> Run:
        size = (len(inputs.lengths), inputs.lengths[0])

        def run(*tensors: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in tensors)
            return one(q, k, v).transpose(1, 2).flatten(0, 1)

        return run

    return prepare


def _masked(additive: bool) -> Prepare:
    """SDPA with a dense mask, made beforehand, in the form that the models it is for hand over."""

    def prepare(inputs: Inputs) -> Run:
        mask = inputs.dense_mask
        if additive:
            mask = torch.where(mask, 0.0, -math.inf).to(inputs.query.dtype)
        if not inputs.lengths:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)

        def packed(*tensors: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in tensors)
            return F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)

        return packed

    return prepare


def _flex(dynamic: bool) -> Prepare:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=dynamic)

    def prepare(inputs: Inputs) -> Run:
        (b, _, n, _), m = inputs.query.shape, inputs.key.shape[2]
        device = inputs.query.device
        rule = _rule(inputs.pattern, b, n, m, device)
        mask = create_block_mask(rule, b, None, n, m, device=device)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    return prepare


_PACKED = ("windows", "images")
_MASKS = ("prefix_lm", "image_blocks", "per_image")
_SDPA = "F.scaled_dot_product_attention"
_EAGER = "matmul, softmax, matmul"


def peers(op: str) -> list[Provider]:
    """Every peer; each says which patterns it is for."""
    sdpa = F.scaled_dot_product_attention
    found = [
        Provider("sdpa", lambda _: lambda inputs: sdpa, note=_SDPA, patterns=("",), keep=True),
        Provider("eager", lambda _: lambda inputs: eager, 4.0, _EAGER, patterns=("",)),
    ]
    for name, one, note in (("sdpa", sdpa, _SDPA), ("eager", eager, _EAGER)):
        found += [
            _prepared(f"{name}_per_image", _per_image(one), f"{note}, a call an image", _PACKED),
            _prepared(f"{name}_batched", _batched(one), f"{note}, as a batch", ("windows",)),
        ]
    return [
        *found,
        _prepared("sdpa_mask", _masked(False), f"{_SDPA}, dense bool mask", _PACKED + _MASKS),
        _prepared("sdpa_additive_mask", _masked(True), f"{_SDPA}, dense additive mask", _MASKS),
        Provider("flex", _flex, note="FlexAttention, torch.compile", patterns=_MASKS),
    ]


def _prepared(name: str, prepare: Prepare, note: str, patterns: tuple[str, ...]) -> Provider:
    keep = name in ("sdpa_per_image", "sdpa_batched")
    return Provider(name, lambda _: prepare, note=note, patterns=patterns, keep=keep)


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public functions."""

    def prepare(inputs: Inputs) -> Run:
        keywords: dict[str, Any] = {"backend": backend}
        if inputs.lengths:
            name, cu = "attention_varlen", inputs.cu_seqlens
            keywords |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        else:
            name = "attention"
            keywords["kv_range"] = inputs.kv_range
        return functools.partial(getattr(vlm_kernels, name), **keywords)

    return Provider(OURS, lambda _: prepare)
