"""`attention` and `attention_varlen`: what is timed. How people compute it without us stands in
`_attention_peers.py`.

A provider builds a function of `Inputs` that prepares what a model prepares once (a mask) and
returns the function of `Case.tensors` (query, key, value, and weights of norms) that is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends, _load, reference
from vlm_kernels.ops.attention import rope_1d
from vlm_kernels.testing.specs import attention as spec

from .. import case, targets
from ..case import OURS, Provider

Run = Callable[..., Tensor]
Prepare = Callable[["Inputs"], Run]
OPS = ("attention",)
MODES = ("fwd", "bwd", "full")
SHAPES = (
    "BxHxNxD, BxHxNxMxD (N queries, M keys), windows:HxTxD, images:HxD, decode:BxHxKxMxD (K key "
    "heads), or prefix_lm:, image_blocks:, per_image: or rope_norm: before BxHxNxD"
)
AXES = "B x H x N (x M) x D"
GROUPS = (*targets.ATTENTION, *targets.ATTENTION_GPU)
WINDOW = 64
"""Tokens of a window of Qwen2.5-VL's vision tower: 8 x 8 patches."""
IMAGES = (64, 1024, 100, 576, 144, 324, 64, 729, 256, 196, 400, 64, 484, 144, 100, 196)
"""Tokens of the packed images: squares of 8 to 32 patches, mixed, as they come."""
MASKS = ("prefix_lm", "image_blocks", "per_image")
PACKED = ("windows", "images")
EPS = 1e-6
"""Of the RMS norms of queries and keys."""
_SIZES = {"windows": 3, "images": 2, "decode": 5, "rope_norm": 4, **dict.fromkeys(MASKS, 4)}


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
    norms: tuple[Tensor, ...] = ()  # weights (D,) of queries and keys, where rope is too
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, (N, D/2)

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


def rule(
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
    seen = rule(pattern, b, n, m)(entry[:, None, None], 0, query[:, None], key)
    return seen.expand(-1, n, m)[:, None] if seen.ndim == 3 else seen[None, None]


@dataclass(frozen=True)
class Case(case.Case):
    """Dense (pattern ""), packed ("windows", "images"), one query behind a cache ("decode"), with
    norms and rotation ("rope_norm"), or with a mask (the others)."""

    pattern: str
    b: int
    h: int
    n: int
    m: int
    d: int
    kv_heads: int = 0  # 0: h
    named: str = ""  # the set of shapes that it was taken from, where its kind does not say

    @property
    def shape(self) -> str:
        sizes: tuple[int, ...] = (self.b, self.h, self.n, self.m, self.d)
        if self.pattern == "windows":
            sizes = (self.h, self.n, self.d)
        elif self.pattern == "images":
            sizes = (self.h, self.d)
        elif self.pattern == "decode":
            sizes = (self.b, self.h, self.kv_heads, self.m, self.d)
        elif self.n == self.m:
            sizes = (self.b, self.h, self.n, self.d)
        name = f"{self.pattern}:" if self.pattern else ""
        return name + "x".join(map(str, sizes))

    @property
    def group(self) -> str:
        if self.named:
            return self.named
        if self.pattern in ("decode", "rope_norm"):
            return self.pattern
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
        if self.pattern in MASKS:
            allowed = _allowed(self.pattern, self.b, self.n, self.m)
            return int(allowed.sum()) * self.b // len(allowed)
        return self.b * self.n * self.m

    @property
    def flops(self) -> float:
        # two products forward; five backward, the scores among them: nobody keeps those
        return {"fwd": 4, "bwd": 10, "full": 14}[self.mode] * self._pairs * self.h * self.d

    @property
    def bytes(self) -> float:
        rows = 2 * self.b * (self.n * self.h + self.m * (self.kv_heads or self.h))
        # query, out; key, value; and the gradients of all four
        count = rows if self.mode == "fwd" else 2 * rows
        return count * self.d * self.torch_dtype.itemsize

    @property
    def matrix(self) -> int:
        return self.b * self.h * self.n * self.m

    @property
    def returned_bytes(self) -> int:
        rows = self.b * self.n * self.h
        if self.mode != "fwd":
            rows += 2 * self.b * self.m * (self.kv_heads or self.h)
        return rows * self.d * self.torch_dtype.itemsize

    def refuses(self, peer: Provider) -> str:
        if peer.name == "flex" and self.mode != "fwd" and not torch.cuda.is_available():
            return "FlexAttention has no backward on a CPU"
        return ""

    def takes(self, provider: Provider, device: str = "cpu") -> bool:
        more = provider.cuda_patterns if device == "cuda" else ()
        return provider.ours or self.pattern in (*provider.patterns, *more)

    def inputs(self, device: str = "cpu") -> Inputs:
        sizes = (self.b, self.h, self.n, self.m, self.d, self.torch_dtype)
        layout = "bnhd" if self.lengths else "bhnd"
        query, key, value, *_ = spec.make_inputs(
            *sizes, device=device, layout=layout, kv_heads=self.kv_heads or None
        )
        generator = torch.Generator(device).manual_seed(1)
        grad = torch.randn(query.shape, generator=generator, device=device).to(self.torch_dtype)
        if self.lengths:
            query, key, value, grad = (x[0].transpose(0, 1) for x in (query, key, value, grad))
            return Inputs(query, key, value, grad.contiguous(), self.pattern, self.lengths, None)
        if self.pattern == "rope_norm":
            drawn = torch.randn(2, self.d, generator=generator, device=device)
            norms = tuple((1 + 0.2 * drawn).to(self.torch_dtype).unbind())
            tables = rope_1d(self.n, self.d, device=device)
            return Inputs(query, key, value, grad, self.pattern, (), None, norms, tables)
        masked = self.pattern in MASKS
        seen = _allowed(self.pattern, self.b, self.n, self.m).to(device) if masked else None
        return Inputs(query, key, value, grad, self.pattern, (), seen)

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        return [inputs.query, inputs.key, inputs.value, *inputs.norms]

    def call(self, fn: Prepare, inputs: Inputs) -> Callable[[], object]:
        run = fn(inputs)
        leaves = [x.detach().requires_grad_(self.mode != "fwd") for x in self.tensors(inputs)]

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*leaves)

        def full() -> tuple[Tensor, ...]:
            return torch.autograd.grad(run(*leaves), leaves, inputs.grad)

        outs: dict[object, Tensor] = {}

        def backward() -> tuple[Tensor, ...]:
            # a graph is captured on one stream, and a backward runs on that of its forward
            stream = torch.cuda.current_stream() if inputs.query.is_cuda else None
            if stream not in outs:
                outs[stream] = run(*leaves)
            return torch.autograd.grad(outs[stream], leaves, inputs.grad, retain_graph=True)

        return {"fwd": forward, "bwd": backward, "full": full}[self.mode]

    def results(self, fn: Prepare, inputs: Inputs) -> dict[str, Tensor]:
        run = fn(inputs)
        if self.mode == "fwd":
            with torch.no_grad():
                return {"out": run(*self.tensors(inputs))}
        leaves = [x.detach().requires_grad_() for x in self.tensors(inputs)]
        out = run(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))
        names = ("query", "key", "value", "q_weight", "k_weight")
        return {"out": out.detach(), **dict(zip(names, grads))}

    def exact(self, device: str = "cpu") -> dict[str, Tensor]:
        inputs = self.inputs(device)
        query, key, value, grad = (
            x.double() for x in (inputs.query, inputs.key, inputs.value, inputs.grad)
        )
        norms = tuple(x.double() for x in inputs.norms)
        inputs = replace(inputs, query=query, key=key, value=value, grad=grad, norms=norms)
        return self.results(_definition, inputs)

    def small(self) -> tuple[Case, ...]:
        return (replace(self, b=min(self.b, 2), h=2, kv_heads=min(self.kv_heads, 1)),)

    def backend(self, requested: str, device: str = "cpu") -> str:
        inputs = self.small()[0].inputs(device)
        op = "attention_varlen" if self.lengths else "attention"
        name, _, kernels = requested.partition(":")
        chosen = _backends.select(op, name, *self.tensors(inputs)[:3])
        return requested if kernels else chosen


# --- what is run ---


def overhead(op: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of the call that the overhead is measured on."""
    inputs = Case(op, "full", "fp32", "", 1, 1, 1, 1, 8).inputs()
    return [inputs.query, inputs.key, inputs.value], {}


def cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, list[int | None]]]:
    """What to time; a workspace is nothing that attention takes."""
    if args.shapes is not None:
        choices = [("", mode, shape) for mode in args.mode or ["full"] for shape in args.shapes]
    else:
        choices = _of_targets(args)
    return [
        (replace(parse(shape, mode, dtype), named=named), [None])
        for dtype in args.dtype
        for named, mode, shape in choices
    ]


def _of_targets(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Named set, mode, shape; on a GPU each set has its own mode. ValueError for another device's
    group."""
    on_gpu = args.device == "cuda"
    known: Iterable[str] = targets.ATTENTION_GPU if on_gpu else targets.ATTENTION
    groups = args.group or list(known)
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no group on {args.device}: {', '.join(known)}")
    if on_gpu:
        sets = ((group, *targets.ATTENTION_GPU[group]) for group in groups)
        most = targets.QUICK_GPU if args.quick else None
        return [
            (group, mode, shape)
            for group, own, shapes in sets
            for mode in args.mode or [own]
            for shape in shapes[:most]
        ]
    shapes = [x for group in groups for x in targets.ATTENTION[group][: 1 if args.quick else None]]
    return [("", mode, shape) for mode in args.mode or ["full"] for shape in shapes]


def memory_cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, None]]:
    """What to measure the memory of, if that is asked for: no target speaks of it."""
    if not (args.memory or args.memory_shape):
        return []
    shapes = args.memory_shape or targets.ATTENTION_MEMORY
    modes = args.mode or ["full"]
    return [(parse(s, mode, dtype), None) for mode in modes for dtype in args.dtype for s in shapes]


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
    if pattern == "decode":
        b, h, kv_heads, m, d = sizes
        if h % kv_heads:
            raise ValueError(f"{shape!r}: {h} heads are no multiple of {kv_heads} key heads")
        return Case("attention", mode, dtype, pattern, b, h, 1, m, d, kv_heads)
    b, h, n, *keys, d = sizes
    return Case("attention", mode, dtype, pattern, b, h, n, keys[0] if keys else n, d)


# --- who computes it ---


def _definition(inputs: Inputs) -> Run:
    """The definition. It is given the dense mask and single images, never a kv_range or
    cu_seqlens, so that those are checked too."""
    function = functools.partial(
        reference.attention, attn_mask=inputs.allowed, enable_gqa=inputs.pattern == "decode"
    )
    if inputs.lengths:
        return per_image(function)(inputs)
    return _with_norms(function, inputs) if inputs.norms else function


def per_image(one: Run) -> Prepare:
    """A call an image, as transformers' Qwen2.5-VL has it without flash-attention."""

    def prepare(inputs: Inputs) -> Run:
        def run(*tensors: Tensor) -> Tensor:
            parts = (x.transpose(0, 1)[None].split(inputs.lengths, 2) for x in tensors)
            outs = [one(q, k, v) for q, k, v in zip(*parts, strict=True)]
            return torch.cat(outs, 2)[0].transpose(0, 1)

        return run

    return prepare


def _with_norms(function: Run, inputs: Inputs) -> Run:
    """Norms and rotation as keywords, of tensors that come as arguments."""

    def run(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        q_norm, k_norm = ((weight, None, EPS, "rms") for weight in weights)
        return function(q, k, v, rope=inputs.rope, q_norm=q_norm, k_norm=k_norm)

    return run


def peers(op: str) -> list[Provider]:
    """Every peer; each says which patterns it is for."""
    from . import _attention_peers  # which needs what stands here

    return _attention_peers.peers()


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public functions. The backend "cuda:short" or "cuda:long" is "cuda" with that kernel."""
    name, _, kernels = backend.partition(":")

    def prepare(inputs: Inputs) -> Run:
        keywords: dict[str, Any] = {"backend": name}
        if inputs.lengths:
            cu_seqlens = inputs.cu_seqlens
            keywords |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            return functools.partial(vlm_kernels.attention_varlen, **keywords)
        if inputs.pattern == "decode":
            keywords["enable_gqa"] = True
        elif inputs.pattern in MASKS:
            keywords["kv_range"] = inputs.kv_range
        function = functools.partial(vlm_kernels.attention, **keywords)
        return _with_norms(function, inputs) if inputs.norms else function

    if not kernels:
        return Provider(OURS, lambda _: prepare)
    return Provider(OURS, lambda _: prepare, around=lambda: _kernels(kernels))


@contextlib.contextmanager
def _kernels(name: str) -> Iterator[None]:
    _load._C.set_attention_kernels(name)
    try:
        yield
    finally:
        _load._C.set_attention_kernels("auto")
