"""Inputs, cases, keyword variants, costs and eager peers of `attention` and `attention_varlen`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..tolerances import SEEDS, assert_close, relative_error
from ._attention_yardsticks import flash, intervals, low, per_segment, terms

OPS = ("attention", "attention_varlen")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Keywords = dict[str, Any]


# --- inputs ---


class Inputs(NamedTuple):
    """What has a gradient. A bool mask is a keyword."""

    query: Tensor  # (B, H, Nq, D), packed (Tq, H, D)
    key: Tensor  # (B, Hkv, Nk, D), packed (Tk, Hkv, D)
    value: Tensor  # (B, Hkv, Nk, Dv), packed (Tk, Hkv, Dv)
    attn_mask: Tensor | None = None
    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            fn(self.query),
            fn(self.key),
            fn(self.value),
            *(t if t is None else fn(t) for t in self[3:]),
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """All in one dtype; in fp64 they are exactly what a kernel sees."""
        return self.map(lambda t: t.detach().to(dtype))

    def named(self) -> dict[str, Tensor]:
        return {name: t for name, t in zip(self._fields, self, strict=True) if t is not None}


LAYOUTS = ("bhnd", "bnhd", "packed", "gaps")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, H, N, D) in another memory layout.

    "bnhd": the transposed view of (B, N, H, D) data; "packed": that, cut from the rows of a wider
    projection, as of query, key and value in one; "gaps": cut from a tensor full of NaN with a gap
    after each dimension.
    """
    if layout == "bhnd":
        return x.contiguous()
    b, h, n, d = x.shape
    if layout == "gaps":
        whole = x.new_full((b + 1, n + 3, h + 1, d + 5), math.nan)
        whole = whole[:b, 2 : 2 + n, :h, 3 : 3 + d]
    else:
        side = 0 if layout == "bnhd" else h * d
        whole = x.new_full((b, n, h * d + 2 * side), math.nan)[:, :, side : side + h * d]
        whole = whole.unflatten(2, (h, d))
    whole.copy_(x.transpose(1, 2))
    return whole.transpose(1, 2)


def make_inputs(
    b: int,
    h: int,
    nq: int,
    nk: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    *,
    kv_heads: int | None = None,
    dv: int | None = None,
    layout: str = "bnhd",
) -> Inputs:
    """Query, key and value of unit variance, as after a normalised projection."""
    generator = torch.Generator(device).manual_seed(seed)
    kv_heads = h if kv_heads is None else kv_heads
    shapes = ((b, h, nq, d), (b, kv_heads, nk, d), (b, kv_heads, nk, d if dv is None else dv))
    query, key, value = (
        laid_out(torch.randn(shape, generator=generator, device=device).to(dtype), layout)
        for shape in shapes
    )
    return Inputs(query, key, value)


# --- which keys a query sees ---


def _random_range(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Tensor:
    """Intervals of any length; a few are empty, a few reach beyond the keys."""
    ends = torch.randint(-2, nk + 3, (b, h, nq, 2), generator=generator)
    ends = torch.where(torch.rand(b, h, nq, 1, generator=generator) < 0.9, ends.sort(-1)[0], ends)
    return ends.to(torch.int32)


def _range(*rows: Tensor) -> Tensor:
    """begin and end of every query, as kv_range (1 or B, 1, Nq, 2)."""
    ends = torch.stack(torch.broadcast_tensors(*rows), -1).to(torch.int32)
    return ends[None, None] if ends.ndim == 2 else ends[:, None]


def _prefix_lm(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Keywords:
    """The first tokens see each other, the rest what is before them."""
    lengths = torch.randint(nk + 1, (b, 1), generator=generator)
    i = torch.arange(nq)
    return {"kv_range": _range(torch.zeros_like(i), torch.maximum(i + 1, lengths).clamp(max=nk))}


def _image_blocks(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Keywords:
    """Gemma 3: causal text; an image's tokens see all of it as well."""
    size, i = max(nq // 5, 1), torch.arange(nq)
    block = i // size
    end = torch.where(block % 2 == 1, (block + 1) * size, i + 1)
    return {"kv_range": _range(torch.zeros_like(i), end)}


def _per_image(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Keywords:
    """Flamingo: text sees the image before it; text before the first sees nothing."""
    images = 3
    image = torch.arange(nq) * (images + 1) // max(nq, 1) - 1
    size = max(nk // images, 1)
    begin = image.clamp(min=0) * size
    return {"kv_range": _range(begin, torch.where(image < 0, begin, begin + size))}


def _padding(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Keywords:
    lengths = torch.randint(nk + 1, (b, 1), generator=generator)
    return {"kv_range": _range(torch.zeros(b, nq), lengths.expand(b, nq))}


def _ranges(batch: bool, heads: bool) -> Callable[..., Keywords]:
    def draw(b: int, h: int, nq: int, nk: int, generator: torch.Generator) -> Keywords:
        shape = (b if batch else 1, h if heads else 1)
        return {"kv_range": _random_range(*shape, nq, nk, generator)}

    return draw


KEYS: dict[str, Callable[[int, int, int, int, torch.Generator], Keywords]] = {
    "all": lambda b, h, nq, nk, g: {},
    "causal": lambda b, h, nq, nk, g: {"is_causal": True},
    "window": lambda b, h, nq, nk, g: {"window": (nk // 5, nk // 9)},
    "window_left": lambda b, h, nq, nk, g: {"window": (2, -1)},
    "window_of_one": lambda b, h, nq, nk, g: {"window": (0, 0)},
    "causal_window": lambda b, h, nq, nk, g: {"is_causal": True, "window": (nk // 6, 3)},
    "range": _ranges(False, False),
    "range_batch": _ranges(True, False),
    "range_heads": _ranges(False, True),
    "range_each": _ranges(True, True),
    "prefix_lm": _prefix_lm,
    "image_blocks": _image_blocks,
    "per_image": _per_image,
    "padding": _padding,
    "causal_window_range": lambda b, h, nq, nk, g: {
        "is_causal": True,
        "window": (nk // 2, -1),
        **_ranges(True, True)(b, h, nq, nk, g),
    },
}
VARLEN_KEYS = ("all", "causal", "window", "window_left", "window_of_one", "causal_window")


# --- masks, rotation, normalisation ---

MASKS = ("none", "bool", "additive", "additive_fp32", "additive_inf")
# A letter is a whole dimension, 1 a broadcast one, a shorter name a mask of fewer dimensions.
MASK_SHAPES = tuple("".join(choice) for choice in product("b1", "h1", "q1", "k1"))
MASK_SHAPES += ("hqk", "1qk", "qk", "q1", "1k", "k", "1", "")


def _mask(kind: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    seen = torch.rand(shape, generator=generator) < 0.7
    if len(shape) > 1 and shape[-2] > 1:
        seen[..., 1, :] = False  # a query that sees nothing
    if kind == "bool":
        return seen
    bias = torch.randn(shape, generator=generator)
    if kind == "additive_inf":
        bias = torch.where(seen, bias, -torch.inf)
    return bias if kind == "additive_fp32" else bias.to(dtype)


ROPES = ("none", "half", "interleaved", "partial", "interleaved_batch", "one_batch")


def _rope(kind: str, b: int, n: int, d: int) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, str]:
    """Tables of rotation by position, of at least a pair of features."""
    r = max(d // 4 * 2 if kind == "partial" else d // 2 * 2, 2)
    position = torch.arange(n, dtype=torch.float64)
    if kind == "interleaved_batch":
        position = position + 10 * torch.arange(b, dtype=torch.float64)[:, None]
    elif kind == "one_batch":
        position = position[None]
    frequency = 10000 ** (-torch.arange(r // 2, dtype=torch.float64) * 2 / r)
    angle = position[..., None] * frequency
    tables = (angle.cos().float(), angle.sin().float())
    return (*tables, "interleaved") if kind.startswith("interleaved") else tables


class _Norm(NamedTuple):
    kind: str
    bias: bool = False
    heads: bool = False  # (H, D) weights
    low: bool = False  # weights in the dtype of the inputs
    sides: str = "qk"


NORMS: dict[str, _Norm | None] = {
    "none": None,
    "rms": _Norm("rms"),
    "rms_bias_heads": _Norm("rms", bias=True, heads=True),
    "rms_low": _Norm("rms", low=True),
    "layer": _Norm("layer", bias=True),
    "layer_heads": _Norm("layer", heads=True),
    "q_only": _Norm("rms", sides="q"),
    "k_only": _Norm("layer", bias=True, sides="k"),
}
EPS = 1e-6


# --- keywords ---


@dataclass(frozen=True)
class Variant:
    """One choice for each keyword; a case draws the tensors among them."""

    keys: str = "all"  # a key of KEYS
    mask: str = "none"  # one of MASKS
    mask_shape: str = "bhqk"  # one of MASK_SHAPES
    scale: float | None = None
    softcap: float = 0.0
    rope: str = "none"  # one of ROPES
    norm: str = "none"  # a key of NORMS
    lse: bool = False  # lse has a gradient
    layout: str = "bnhd"  # one of LAYOUTS

    def __str__(self) -> str:
        fields = [self.keys, self.layout]
        fields += [f"{self.mask}_{self.mask_shape}"] * (self.mask != "none")
        fields += [f"scale_{self.scale:g}" if self.scale is not None else ""]
        fields += [f"softcap_{self.softcap:g}"] * (self.softcap != 0)
        fields += [f"rope_{self.rope}"] * (self.rope != "none")
        fields += [f"norm_{self.norm}"] * (self.norm != "none") + ["lse"] * self.lse
        return "-".join(filter(None, fields))


def covering_variants(op: str = "attention") -> list[Variant]:
    """Each choice of each keyword once, the others at their defaults, and a few all at once."""
    default = Variant()
    keys = VARLEN_KEYS if op == "attention_varlen" else tuple(KEYS)
    variants = [default, *(replace(default, layout=layout) for layout in LAYOUTS)]
    variants += [replace(default, keys=name) for name in keys[1:]]
    variants += [replace(default, scale=scale) for scale in (-0.2, 0.0, 0.7)]
    variants += [replace(default, softcap=softcap) for softcap in (0.8, 30.0)]
    variants += [replace(default, lse=True), replace(default, lse=True, softcap=5.0)]
    ropes = ROPES[:4] if op == "attention_varlen" else ROPES
    variants += [replace(default, rope=rope) for rope in ropes[1:]]
    variants += [replace(default, norm=norm) for norm in NORMS if norm != "none"]
    everything = Variant("causal_window", "none", "bhqk", 0.2, 4.0, "half", "rms", True, "gaps")
    variants += [everything, replace(everything, norm="layer", rope="interleaved", keys="all")]
    if op == "attention":
        variants += [replace(default, mask=mask, lse=True) for mask in MASKS[1:]]
        variants += [replace(everything, keys="range_each", mask="additive", mask_shape="1hqk")]
        variants += [replace(everything, keys="padding", mask="bool", mask_shape="b1qk")]
    return variants


def all_variants() -> list[Variant]:
    """Every way to say which keys are seen with every mask."""
    others: tuple[Keywords, ...] = (
        {"scale": 0.4},
        {"softcap": 3.0, "lse": True},
        {"rope": "half", "norm": "rms"},
        {"rope": "interleaved", "norm": "layer_heads", "softcap": 6.0, "lse": True},
    )
    # In turn, such that each meets each key of KEYS and each mask.
    return [
        Variant(
            keys,
            mask,
            MASK_SHAPES[(5 * i) % len(MASK_SHAPES)],
            layout=LAYOUTS[(i + j) % len(LAYOUTS)],
            **others[(i + j // 2) % len(others)],
        )
        for i, keys in enumerate(KEYS)
        for j, mask in enumerate(MASKS)
    ]


# --- cases ---


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """A call of `attention`."""

    b: int
    h: int
    nq: int
    nk: int
    d: int
    dtype: torch.dtype = torch.float32
    variant: Variant = field(default_factory=Variant)
    kv_heads: int | None = None
    dv: int | None = None
    logit: float = 1.0  # factor of the queries, and so of the size of the logits

    op = "attention"

    def __str__(self) -> str:
        heads = f"{self.h}" if self.kv_heads is None else f"{self.h}over{self.kv_heads}"
        dims = f"{self.d}" if self.dv is None else f"{self.d}to{self.dv}"
        logit = "" if self.logit == 1 else f"-logit_{self.logit:g}"
        shape = f"{self.b}x{heads}x{self.nq}x{self.nk}x{dims}"
        return f"{self.variant}-{shape}-{_name(self.dtype)}{logit}"

    def inputs(self, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
        kv_heads = self.h if self.kv_heads is None else self.kv_heads
        q, k, v, *_ = make_inputs(
            self.b,
            self.h,
            self.nq,
            self.nk,
            self.d,
            self.dtype,
            seed,
            kv_heads=kv_heads,
            dv=self.dv,
            layout=self.variant.layout,
        )
        q.mul_(self.logit)
        generator = torch.Generator().manual_seed(seed + 1)
        mask = self._mask(generator) if self.variant.mask.startswith("additive") else None
        inputs = Inputs(q, k, v, mask, *_norm_parameters(self, kv_heads, generator))
        # Not `to` for all: a copy has another layout.
        return inputs if str(device) == "cpu" else inputs.map(lambda t: t.to(device))

    def keywords(self, seed: int = 0, device: str | torch.device = "cpu") -> Keywords:
        generator = torch.Generator().manual_seed(seed + 2)
        shape = (self.b, self.h, self.nq, self.nk)
        keywords = KEYS[self.variant.keys](*shape, generator)
        if self.variant.mask == "bool":
            keywords["attn_mask"] = self._mask(generator)
        if self.kv_heads is not None:
            keywords["enable_gqa"] = True
        keywords |= _other_keywords(self.variant)
        if self.variant.rope != "none":
            keywords["rope"] = _rope(self.variant.rope, self.b, self.nk, self.d)
        return _on(device, keywords)

    def _mask(self, generator: torch.Generator) -> Tensor:
        sizes = {"b": self.b, "h": self.h, "q": self.nq, "k": self.nk, "1": 1}
        shape = [sizes[letter] for letter in self.variant.mask_shape]
        return _mask(self.variant.mask, shape, self.dtype, generator)


@dataclass(frozen=True)
class VarlenCase:
    """A call of `attention_varlen`."""

    segments: tuple[tuple[int, int], ...]  # queries and keys of each
    h: int
    d: int
    dtype: torch.dtype = torch.float32
    variant: Variant = field(default_factory=Variant)
    kv_heads: int | None = None
    dv: int | None = None
    outside: int = 0  # rows after the last segment
    index: torch.dtype = torch.int32

    op = "attention_varlen"
    b = 1
    logit = 1.0

    def __str__(self) -> str:
        heads = f"{self.h}" if self.kv_heads is None else f"{self.h}over{self.kv_heads}"
        dims = f"{self.d}" if self.dv is None else f"{self.d}to{self.dv}"
        lengths = "+".join(f"{q}x{k}" if q != k else f"{q}" for q, k in self.segments)
        return f"{self.variant}-{heads}x({lengths})x{dims}-{_name(self.dtype)}"

    @property
    def nq(self) -> int:
        return sum(q for q, _ in self.segments) + self.outside

    @property
    def nk(self) -> int:
        return sum(k for _, k in self.segments) + self.outside

    def inputs(self, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
        packed = Case(1, self.h, self.nq, self.nk, self.d, self.dtype, self.variant)
        packed = replace(packed, kv_heads=self.kv_heads, dv=self.dv)
        q, k, v, _, *parameters = packed.inputs(seed, device)
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return Inputs(q, k, v, None, *parameters)

    def keywords(self, seed: int = 0, device: str | torch.device = "cpu") -> Keywords:
        generator = torch.Generator().manual_seed(seed + 2)
        longest = max((k for _, k in self.segments), default=0)
        keywords = KEYS[self.variant.keys](1, self.h, self.nq, longest, generator)
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            lengths = torch.tensor([0, *(segment[side] for segment in self.segments)])
            keywords[name] = lengths.cumsum(0).to(self.index)
        keywords |= _other_keywords(self.variant)
        if self.variant.rope != "none":
            keywords["rope"] = _rope(self.variant.rope, 1, self.nk, self.d)
        return _on(device, keywords)


AnyCase = Case | VarlenCase


def _norm_parameters(
    case: Case, kv_heads: int, generator: torch.Generator
) -> Iterator[Tensor | None]:
    norm = NORMS[case.variant.norm]
    for side, heads in (("q", case.h), ("k", kv_heads)):
        for mean, wanted in ((1.0, norm is not None), (0.0, norm is not None and norm.bias)):
            if norm is None or not wanted or side not in norm.sides:
                yield None
                continue
            shape = (heads, case.d) if norm.heads else (case.d,)
            parameter = mean + 0.2 * torch.randn(shape, generator=generator)
            yield parameter.to(case.dtype) if norm.low else parameter


def _other_keywords(variant: Variant) -> Keywords:
    keywords: Keywords = {}
    if variant.scale is not None:
        keywords["scale"] = variant.scale
    if variant.softcap:
        keywords["softcap"] = variant.softcap
    if (norm := NORMS[variant.norm]) is not None:
        # Weight and bias are inputs.
        keywords |= {f"{side}_norm": (EPS, norm.kind) for side in norm.sides}
    return keywords


def _on(device: str | torch.device, keywords: Keywords) -> Keywords:
    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in keywords.items()}


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 196, 197, 256, 257, 576, 577, 729, 1024, 1025)
DIMS = (*range(8, 129, 8), 1, 3, 7, 20, 100, 136, 192, 256)
RECTANGLES = ((1, 257), (257, 1), (32, 257), (64, 577), (17, 65), (130, 63), (3, 1025), (5, 2))


def shapes(dtype: torch.dtype = torch.float32) -> list[tuple[int, int, int, int, int]]:
    """(B, H, Nq, Nk, D): each length and each head_dim at least once, and oblongs.

    Which meets which depends on the dtype.
    """
    turn = 5 * DTYPES.index(dtype)
    chosen = []
    for i, n in enumerate(LENGTHS * 2):
        # Twice around the short ones meets each head_dim; the long ones once, with few heads.
        if i < len(LENGTHS) or n < 300:
            heads = (1, 1) if n > 300 else (2, 3) if n < 100 else (1, 2)
            chosen.append((*heads, n, n, DIMS[(i + turn) % len(DIMS)]))
    chosen += [
        (2, 2, nq, nk, DIMS[(7 * i + turn) % len(DIMS)]) for i, (nq, nk) in enumerate(RECTANGLES)
    ]
    return chosen


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    """Each shape, in the layouts in turn; then each variant at a few shapes."""
    found = [
        Case(*shape, dtype, Variant(layout=LAYOUTS[i % len(LAYOUTS)], lse=i % 3 == 0))
        for dtype in dtypes
        for i, shape in enumerate(shapes(dtype))
    ]
    sizes = ((2, 4, 70, 70, 40), (1, 2, 33, 131, 64), (2, 2, 129, 129, 72))
    for i, (variant, dtype) in enumerate(product(covering_variants(), dtypes)):
        grouped = {"kv_heads": (1, 2)[i % 2]} if i % 4 == 0 else {}
        found.append(Case(*sizes[(i + i // len(dtypes)) % len(sizes)], dtype, variant, **grouped))
    for i, dtype in enumerate(dtypes):
        found.append(Case(2, 6, 40, 50, 24, dtype, kv_heads=2, dv=(8, 56, 80)[i]))
        found.append(Case(1, 4, 65, 65, (32, 80, 7)[i], dtype, kv_heads=1, dv=(100, 5, 64)[i]))
        found.append(Case(1, 8, 20, 260, 16, dtype, Variant("causal", lse=True), kv_heads=4))
    return found


# Segments of a packed batch: queries and keys of each.
PACKED = (
    ((64, 64), (0, 0), (1, 1), (129, 129), (17, 17)),
    ((5, 9), (0, 4), (7, 0), (3, 3), (33, 65), (1, 70)),
    ((1, 1),),
    ((0, 0),),
    ((577, 577), (2, 2), (2, 2)),
)


def varlen_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[VarlenCase]:
    found = []
    for i, (variant, dtype) in enumerate(product(covering_variants("attention_varlen"), dtypes)):
        # The query of a rotated segment is at the place of one of its keys.
        oblong = variant.rope == "none"
        segments = PACKED[i % 2] if oblong else PACKED[0]
        if not oblong and i % 2:
            segments = ((3, 9), (0, 4), (33, 65), (0, 0), (1, 70))
        grouped = {"kv_heads": (1, 2)[i % 2]} if i % 3 == 0 else {}
        index = (torch.int32, torch.int64)[i % 2]
        found.append(
            VarlenCase(segments, 4, 40, dtype, variant, outside=i % 4, index=index, **grouped)
        )
    for i, (segments, dtype) in enumerate(product(PACKED[2:], dtypes)):
        found.append(VarlenCase(segments, 2, (64, 80, 13)[i % 3], dtype, outside=i % 3))
    return found


# --- results ---


def call(fn: Callable[..., Any], inputs: Inputs, keywords: Keywords) -> Any:
    """fn of the inputs, with masks and norms where its signature has them."""
    keywords = dict(keywords)
    if inputs.attn_mask is not None:
        keywords["attn_mask"] = inputs.attn_mask
    for side in "qk":
        if f"{side}_norm" in keywords:
            weight, bias = (getattr(inputs, f"{side}_norm_{part}") for part in ("weight", "bias"))
            keywords[f"{side}_norm"] = (weight, bias, *keywords[f"{side}_norm"])
    return fn(inputs.query, inputs.key, inputs.value, **keywords)


class Gradients(NamedTuple):
    """Of the outputs; that of an lse of -inf has no effect."""

    out: Tensor
    lse: Tensor | None


def gradients(out: Tensor, lse: Tensor, with_lse: bool) -> Gradients:
    """The same for any fn and dtype."""
    generator = torch.Generator().manual_seed(7)
    of_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    of_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype) if with_lse else None
    return Gradients(of_out.to(out.device), None if of_lse is None else of_lse.to(lse.device))


def evaluate(
    fn: Callable[..., Any],
    inputs: Inputs,
    keywords: Keywords,
    with_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """out, lse and the gradients ("<input>.grad") of one call.

    Gradients of out are random, the same for any fn; of lse too, `with_lse`. `dtype` is that which
    the gradient of out is rounded to first, for inputs in fp64.
    """
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    out, lse = call(fn, leaves, {**keywords, "return_lse": True})
    grad = gradients(out.to(dtype) if dtype else out, lse, with_lse)
    total = [(out, grad.out.to(out.dtype))]
    total += [(lse, grad.lse)] if grad.lse is not None else []
    wanted = {f"{name}.grad": t for name, t in leaves.named().items()}
    found = torch.autograd.grad(
        [t for t, _ in total], list(wanted.values()), [g for _, g in total], allow_unused=True
    )
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted.values(), found)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, grads, strict=True))}


def _finite(name: str, value: Tensor) -> Tensor:
    return torch.where(value == -torch.inf, 0, value) if name == "lse" else value


class Truth(NamedTuple):
    exact: dict[str, Tensor]  # fp64; lse may have -inf
    sizes: dict[str, float]  # of terms, see `relative_error`


@lru_cache(maxsize=32)
def truth(case: AnyCase, seed: int = 0) -> Truth:
    """What each result of `evaluate` should be."""
    inputs, keywords = case.inputs(seed).to(torch.float64), case.keywords(seed)
    arguments = (inputs, keywords, case.variant.lse, case.dtype)
    sized = terms() if case.op == "attention" else per_segment(terms())
    with _one_thread():
        exact = evaluate(getattr(reference, case.op), *arguments)
        sizes = evaluate(sized, *arguments)
    return Truth(
        exact,
        {
            name: torch.linalg.vector_norm(_finite(name, value)).item()
            for name, value in sizes.items()
            if name != "out"
        },
    )


@lru_cache(maxsize=64)
def _eager_errors(case: AnyCase, seed: int, way: str) -> dict[str, float]:
    """Of the formula in eager PyTorch.

    As "reference"; with the products of hardware, "flash", whose sums do not depend on shape and
    CPU as those of eager do (see `contrastive._eager_losses`), and whose probabilities have 16 bits
    where the inputs have; or "low", with logits of 16 bits as well, as torch.matmul rounds them.
    """
    fn = getattr(reference, case.op)
    if way != "reference":
        fn = (flash if way == "flash" else low)(seed)
        fn = fn if case.op == "attention" else per_segment(fn)
    exact, sizes = truth(case, seed)
    with _one_thread():
        eager = evaluate(fn, case.inputs(seed), case.keywords(seed), case.variant.lse)
    return {
        name: relative_error(_finite(name, eager[name]), _finite(name, value), sizes.get(name, 0.0))
        for name, value in exact.items()
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that the limit is the same on every machine, and found fast on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_result(case: AnyCase, name: str, ours: Tensor) -> None:
    """Holds one result of `evaluate`, for the inputs of seed 0, to the rule of accuracy."""
    exact, sizes = truth(case, 0)
    # At 16 bits the reference rounds its results only. Outputs and gradients need fp32 logits all
    # the same; of lse, which no product depends on, no more is asked than eager has.
    ways: tuple[str, ...] = ("reference", "flash")
    if case.dtype.itemsize == 2:
        ways = ("flash", "low") if name == "lse" else ("flash",)
    eager = (_eager_errors(case, *each)[name] for each in product(range(SEEDS), ways))
    value = exact[name]
    if name == "lse":
        assert torch.equal(ours == -torch.inf, value == -torch.inf), f"{case}: queries without keys"
        ours, value = _finite(name, ours), _finite(name, value)
    kind = "bwd" if name.endswith(".grad") else "fwd"
    assert_close(f"{case}: {name}", ours, eager, value, kind, terms=sizes.get(name, 0.0))


def check(
    case: AnyCase, fn: Callable[..., Any], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Holds `fn`, called with the inputs and keywords of the case, to the rule of accuracy.

    Queries that see no key must have an output and a gradient of exactly 0.

    Returns:
        The results of `evaluate`.
    """
    inputs = case.inputs(0, device)
    ours = evaluate(fn, inputs, case.keywords(0, device), case.variant.lse)
    for name, value in ours.items():
        like = inputs.named().get(name.removesuffix(".grad"), inputs.query)
        dtype = torch.float32 if name == "lse" else like.dtype
        assert value.dtype == dtype, f"{case}: {name} is {value.dtype}, expected {dtype}"
        check_result(case, name, value.cpu())
    empty = truth(case, 0).exact["lse"] == -torch.inf
    if case.op == "attention_varlen":
        empty = empty.mT
    for name in ("out", "query.grad"):
        assert not ours[name].cpu()[empty].any(), f"{case}: {name} of queries that see no key"
    return ours


# --- costs ---


def visible_pairs(case: AnyCase) -> int:
    """Pairs of a query of a head and a key that it sees by causal rule, window, range or segment;
    masks are not looked at."""
    keywords = case.keywords()
    segments = ((case.nq, case.nk),) if isinstance(case, Case) else case.segments
    pairs = 0
    for nq, nk in segments:
        shift = 0 if isinstance(case, Case) else nk - nq
        begin, end = (t.clamp(0, nk) for t in intervals(keywords, nq, nk, shift))
        pairs += int((end - begin).sum()) * case.b * case.h // (begin.shape[0] * begin.shape[1])
    return pairs


def flops(case: AnyCase, mode: str = "full") -> int:
    """Useful floating-point operations of "fwd", "bwd" or "full" (both), a multiply and an add as
    two, over the pairs that are seen; computing the scores again is not useful."""
    d, dv = case.d, case.d if case.dv is None else case.dv
    each = {"fwd": 2 * (d + dv), "bwd": 2 * (3 * d + 2 * dv), "full": 2 * (4 * d + 3 * dv)}
    return each[mode] * visible_pairs(case)


def bytes_moved(case: AnyCase, mode: str = "full") -> int:
    """What must be moved: query, key and value read and out written once; for "bwd" those, out and
    its gradient read and three gradients written; "full" is one pass over all of them."""
    kv_heads = case.h if case.kv_heads is None else case.kv_heads
    d, dv = case.d, case.d if case.dv is None else case.dv
    inputs = case.b * (case.h * case.nq * d + kv_heads * case.nk * (d + dv))
    out = case.b * case.h * case.nq * dv
    count = {"fwd": inputs + out, "bwd": 2 * inputs + 2 * out, "full": 2 * inputs + 2 * out}[mode]
    return count * case.dtype.itemsize


# --- peers ---


def dense_mask(
    keywords: Keywords, nq: int, nk: int, device: str | torch.device = "cpu"
) -> Tensor | None:
    """What a call without intervals needs in their place: (B or 1, H or 1, Nq, Nk) bool."""
    if not any(keywords.get(name) is not None for name in ("window", "kv_range")):
        return None
    begin, end = (t[..., None] for t in intervals(keywords, nq, nk))
    j = torch.arange(nk)
    return ((begin <= j) & (j < end)).to(device)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Matrix multiply, softmax, matrix multiply, each in the dtype of the inputs."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    s = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        rows, columns = s.shape[-2:]
        causal = torch.ones(rows, columns, dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~causal, -torch.inf)
    if attn_mask is not None:
        s = (
            s.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else s + attn_mask
        )
    return s.softmax(-1) @ value


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def sdpa_per_segment(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """PyTorch's fused attention, called for one packed image after the other."""
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    outs, (q0, k0) = [], next(starts)
    for q1, k1 in starts:
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        q0, k0 = q1, k1
    return torch.cat(outs)


PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "attention": {"eager": eager, "sdpa": sdpa},
    "attention_varlen": {"sdpa_per_segment": sdpa_per_segment},
}
