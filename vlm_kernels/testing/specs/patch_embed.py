"""Inputs, cases, keyword variants, costs and eager peers of `patch_embed`."""

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

OPS = ("patch_embed",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Keywords = dict[str, Any]


# --- inputs ---


class Inputs(NamedTuple):
    """What has a gradient, but for images of uint8."""

    images: Tensor  # (B, C, H, W), (B, H, W, C), or with F frames after B
    weight: Tensor  # (E, K), (E, C, Py, Px) or (E, C, T, Py, Px)
    bias: Tensor | None = None  # (E,)
    pos: Tensor | None = None  # (L, E) or (1 or B, L, E); L + n with the prefix
    prefix: Tensor | None = None  # (n, E) or (1 or B, n, E)
    newline: Tensor | None = None  # (E,)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            fn(self.images), fn(self.weight), *(t if t is None else fn(t) for t in self[2:])
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """All but pixels of uint8 in one dtype; in fp64 they are exactly what a kernel sees."""
        return self.map(lambda t: t.detach().to(dtype) if t.is_floating_point() else t)

    def leaves(self) -> Inputs:
        """The same values with gradients to come."""
        return self.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))

    def named(self) -> dict[str, Tensor]:
        return {name: t for name, t in zip(self._fields, self, strict=True) if t is not None}


LAYOUTS = ("nchw", "nhwc", "channels_last", "planes", "gaps", "crop", "rgba", "expanded")
"""Shape and memory of images: "nchw" and "nhwc" are contiguous. "channels_last" has the shape of
the first and the memory of the second, "planes" the other way round. Views of a larger tensor are
"gaps" (NCHW, something after each dimension), "crop" (a window of NHWC images) and "rgba" (three of
four channels). "expanded" is one NCHW image for the whole batch."""


def is_nhwc(layout: str) -> bool:
    """What `layout=` says of it."""
    return layout in ("nhwc", "planes", "crop", "rgba")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, ..., C, H, W) as `LAYOUTS` says; what lies between them is NaN or 255."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x)
    if layout == "planes":
        return x.contiguous().movedim(-3, -1)
    nhwc = x.movedim(-3, -1)  # (B, ..., H, W, C)
    if layout in ("nhwc", "channels_last"):
        nhwc = nhwc.contiguous()
        return nhwc if layout == "nhwc" else nhwc.movedim(-1, -3)
    poison = math.nan if x.is_floating_point() else 255
    if layout == "gaps":
        whole = x.new_full([size + 2 for size in x.shape], poison)
        inside = whole[tuple(slice(1, 1 + size) for size in x.shape)]
        return inside.copy_(x)
    *batch, h, w, c = nhwc.shape
    if layout == "crop":
        whole = x.new_full((*batch, h + 3, w + 5, c), poison)[..., 1 : 1 + h, 2 : 2 + w, :]
    else:
        whole = x.new_full((*batch, h, w, c + 1), poison)[..., :c]
    return whole.copy_(nhwc)


# --- keywords ---

NORMS: dict[str, Keywords] = {
    "none": {},
    "clip": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "half": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "mean": {"mean": (0.2, 0.5, 0.9)},
    "std": {"std": (0.25, 0.5, 2.0), "rescale": 1 / 127.5},
    "scaled": {"rescale": 0.01},
}
PIXELS = {"u8": torch.uint8, "fp32": DTYPES[0], "bf16": DTYPES[1], "fp16": DTYPES[2]}
POSITIONS = ("none", "patches", "one_batch", "batch")
DATA = ("noise", "white", "black", "grey")


@dataclass(frozen=True)
class Variant:
    """One choice for each keyword; a case draws the tensors among them."""

    layout: str = "nchw"  # one of LAYOUTS
    pixels: str = "u8"  # a key of PIXELS
    norm: str = "clip"  # a key of NORMS
    k_order: str = "cyx"
    native: bool = False  # the weight has the shape of a convolution's
    step: tuple[int, int] = (0, 0)  # strides less the patch size
    bias: bool = True
    pos: str = "patches"  # one of POSITIONS
    pos_prefixed: bool = False  # pos has rows for the prefix too
    prefix: int = 1
    prefix_batch: str = ""  # "", "one" or "batch"
    newline: bool = False
    merge: int = 1
    temporal: int = 1
    frames: int = 0  # of a video; 0: still images
    pad: str = "raw"
    low: bool = True  # what is added has the dtype of the weight, else fp32

    def __str__(self) -> str:
        default = Variant()
        fields = [self.layout, self.pixels]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name not in ("layout", "pixels") and value != getattr(default, name):
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
                fields.append(f"{name}_{text}")
        return "-".join(fields)


PLAIN = Variant(norm="none", bias=False, pos="none", prefix=0)
EVERYTHING = Variant(
    layout="crop",
    norm="clip",
    k_order="yxc",
    step=(-3, 2),
    pos="batch",
    pos_prefixed=True,
    prefix=5,
    prefix_batch="batch",
    newline=True,
    pad="normalised",
)
QWEN = Variant(k_order="ctyx", temporal=2, merge=2, prefix=0, pos="none", layout="nhwc")


def covering_variants() -> list[Variant]:
    """Each choice of each keyword once, the others at their defaults, and a few all at once."""
    default = Variant()
    variants = [default, PLAIN, replace(PLAIN, pixels="fp32")]
    variants += [replace(default, layout=layout) for layout in LAYOUTS[1:]]
    variants += [replace(default, pixels="fp32", layout=layout) for layout in LAYOUTS]
    variants += [replace(default, pixels=pixels) for pixels in ("bf16", "fp16")]
    variants += [replace(default, norm=norm) for norm in NORMS if norm != "clip"]
    variants += [replace(default, norm=norm, pixels="fp32") for norm in ("none", "mean", "std")]
    variants += [replace(default, k_order="yxc"), replace(default, native=True)]
    for step in ((-4, -4), (-1, 0), (3, 5), (0, -7)):
        for layout, pixels in (("nhwc", "u8"), ("nchw", "fp32"), ("crop", "bf16")):
            variants.append(replace(default, step=step, layout=layout, pixels=pixels))
    variants += [replace(default, pos=pos) for pos in POSITIONS if pos != "patches"]
    variants += [
        replace(default, pos=pos, pos_prefixed=True, prefix=prefix, prefix_batch=batch)
        for pos, prefix, batch in (("patches", 1, ""), ("one_batch", 5, "one"), ("batch", 4, ""))
    ]
    variants += [replace(default, prefix=2, prefix_batch="batch"), replace(default, prefix=0)]
    variants += [replace(default, newline=True), replace(default, newline=True, prefix=0)]
    variants += [replace(default, merge=2), replace(default, merge=2, pixels="fp32")]
    for layout, pixels, pad in product(("nchw", "nhwc"), ("u8", "fp32"), ("raw", "normalised")):
        variants.append(replace(default, layout=layout, pixels=pixels, pad=pad))
    variants += [replace(default, low=False), EVERYTHING, replace(EVERYTHING, pixels="fp32")]
    for frames, layout in product((0, 2, 6), ("nhwc", "nchw", "channels_last")):
        variants.append(replace(QWEN, frames=frames, layout=layout))
        variants.append(replace(QWEN, frames=frames, layout=layout, pixels="fp32"))
    variants += [replace(QWEN, temporal=1, frames=3), replace(QWEN, temporal=3, frames=3)]
    variants += [replace(QWEN, native=True, frames=frames) for frames in (0, 4)]
    variants += [replace(QWEN, k_order="yxc", frames=frames, merge=1) for frames in (0, 4)]
    variants += [replace(EVERYTHING, temporal=2, frames=4, layout=layout) for layout in LAYOUTS[4:]]
    return variants


# --- cases ---


@dataclass(frozen=True)
class Case:
    """A call of `patch_embed`."""

    b: int
    h: int
    w: int
    patch: tuple[int, int]
    e: int
    dtype: torch.dtype = torch.float32
    variant: Variant = field(default_factory=Variant)
    c: int = 3
    data: str = "noise"  # one of DATA

    op = "patch_embed"

    def __str__(self) -> str:
        sizes = "x".join(map(str, (self.b, self.c, self.h, self.w)))
        dtype = str(self.dtype).removeprefix("torch.")
        fields = [str(self.variant), sizes, "p" + "x".join(map(str, self.patch)), f"e{self.e}"]
        return "-".join([*fields, dtype, *([self.data] * (self.data != "noise"))])

    @property
    def stride(self) -> tuple[int, int]:
        (py, px), (dy, dx) = self.patch, self.variant.step
        return max(py + dy, 1), max(px + dx, 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of an image."""
        v, (py, px), (sy, sx) = self.variant, self.patch, self.stride
        frames = v.frames // v.temporal if v.frames else 1
        return frames, -(-(self.h - py) // sy) + 1, -(-(self.w - px) // sx) + 1

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return self.variant.prefix + frames * rows * (columns + self.variant.newline)

    def inputs(self, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
        v, generator = self.variant, torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            return x.to(self.dtype if v.low else torch.float32)

        k = v.temporal * self.c * math.prod(self.patch)
        weight = (torch.randn(self.e, k, generator=generator) / math.sqrt(k)).to(self.dtype)
        if v.native and v.temporal > 1:
            weight = weight.view(self.e, self.c, v.temporal, *self.patch)
        elif v.native:
            weight = weight.view(self.e, self.c, *self.patch)
        rows = self.patches + v.prefix * v.pos_prefixed
        batch = {"one_batch": (1,), "one": (1,), "batch": (self.b,)}
        inputs = Inputs(
            laid_out(self._pixels(generator), v.layout),
            weight,
            randn(self.e) if v.bias else None,
            None if v.pos == "none" else randn(*batch.get(v.pos, ()), rows, self.e),
            randn(*batch.get(v.prefix_batch, ()), v.prefix, self.e) if v.prefix else None,
            randn(self.e) if v.newline else None,
        )
        # Not `to` for all: a copy has another layout.
        return inputs if str(device) == "cpu" else inputs.map(lambda t: t.to(device))

    def _pixels(self, generator: torch.Generator) -> Tensor:
        frames = (self.variant.frames,) if self.variant.frames else ()
        shape = (self.b, *frames, self.c, self.h, self.w)
        low, high = {"noise": (0, 256), "white": (250, 256), "black": (0, 3), "grey": (110, 125)}[
            self.data
        ]
        pixels = torch.randint(low, high, shape, generator=generator)
        dtype = PIXELS[self.variant.pixels]
        if dtype == torch.uint8:
            return pixels.to(dtype)
        # no multiples of 1 / 255, some of which 16 bits hold
        return ((pixels + torch.rand(shape, generator=generator)) / 256).to(dtype)

    def keywords(self) -> Keywords:
        v = self.variant
        keywords: Keywords = {"patch_size": self.patch, "stride": self.stride}
        keywords |= {"layout": "nhwc" if is_nhwc(v.layout) else "nchw", "k_order": v.k_order}
        for name, value in NORMS[v.norm].items():
            keywords[name] = value[: self.c] if isinstance(value, tuple) else value
        return {**keywords, "merge": v.merge, "temporal": v.temporal, "pad_space": v.pad}


# Blocks of the kernels have 64 and 512 tokens, and 64 and 128 features.
SHAPES: tuple[tuple[int, int, int, tuple[int, int], int], ...] = (
    (1, 16, 16, (16, 16), 1),  # a patch is an image
    (2, 17, 33, (16, 16), 63),
    (1, 72, 56, (8, 8), 64),  # 63 tokens
    (1, 64, 64, (8, 8), 65),
    (1, 104, 40, (8, 8), 16),
    (7, 72, 72, (8, 8), 129),  # 567
    (2, 56, 42, (14, 14), 100),
    (3, 43, 30, (14, 14), 15),
    (2, 56, 28, (28, 28), 65),
    (1, 61, 95, (30, 30), 127),
    (1, 64, 96, (32, 32), 96),
    (2, 45, 40, (15, 4), 33),
    (2, 30, 77, (7, 11), 260),
    (1, 33, 9, (3, 1), 7),
    (2, 9, 33, (1, 3), 17),
)
SMALL = ((2, 30, 44, (8, 8), 40), (1, 57, 43, (14, 14), 72), (2, 34, 40, (9, 16), 19))


def even(case: Case) -> Case:
    """With whole blocks of merged patches."""
    _, rows, columns = case.grid
    v, (sy, sx) = case.variant, case.stride
    h, w = case.h - rows % v.merge * sy, case.w - columns % v.merge * sx
    return replace(case, h=h, w=w)


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    """Each shape, in the layouts in turn; then each variant at a small shape; then odd channels and
    pixels that normalisation brings near to one another."""
    found = []
    for i, (shape, dtype) in enumerate(product(SHAPES, dtypes)):
        layout, pixels = LAYOUTS[i % 4], ("u8", "fp32")[i // 2 % 2]
        found.append(Case(*shape, dtype, Variant(layout, pixels, pos_prefixed=i % 3 == 0)))
    for i, variant in enumerate(covering_variants()):
        for dtype in dtypes if i < 3 else (dtypes[i % len(dtypes)],):
            found.append(even(Case(*SMALL[i // 2 % len(SMALL)], dtype, variant)))
    for i, (data, pixels) in enumerate(product(DATA[1:], ("u8", "fp32"))):
        for dtype in dtypes:
            variant = Variant(LAYOUTS[i % 3], pixels, pad=("raw", "normalised")[i // 2 % 2])
            found.append(Case(*SMALL[i % 2], dtype, variant, data=data))
    for c, dtype in zip((1, 2, 4), dtypes):
        for layout in ("nchw", "nhwc", "crop"):
            variant = replace(PLAIN, layout=layout, norm="clip" if c < 3 else "none")
            found.append(Case(2, 34, 40, (9, 8), 20, dtype, variant, c))
    return found


# --- results ---


def call(fn: Callable[..., Tensor], inputs: Inputs, keywords: Keywords) -> Tensor:
    """fn of the inputs, where its signature has them."""
    images, weight, bias, *added = inputs
    given = {name: t for name, t in zip(Inputs._fields[3:], added) if t is not None}
    return fn(images, weight, bias, **given, **keywords)


def gradient(out: Tensor) -> Tensor:
    """Of the tokens: the same for any fn and dtype."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device)


def evaluate(
    fn: Callable[..., Tensor],
    inputs: Inputs,
    keywords: Keywords,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """out and the gradients ("<input>.grad") of one call; that of out is random.

    `dtype` is that which the gradient of out is rounded to first, for inputs in fp64.
    """
    leaves = inputs.leaves()
    out = call(fn, leaves, keywords)
    wanted = {f"{name}.grad": t for name, t in leaves.named().items() if t.requires_grad}
    grad = gradient(out.detach().to(dtype) if dtype else out.detach()).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


@lru_cache(maxsize=64)
def truth(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """What each result of `evaluate` should be."""
    inputs = case.inputs(seed).to(torch.float64)
    with _one_thread():
        return evaluate(reference.patch_embed, inputs, case.keywords(), case.dtype)


@lru_cache(maxsize=64)
def _eager_errors(case: Case, seed: int) -> dict[str, float]:
    exact = truth(case, seed)
    with _one_thread():
        found = evaluate(linear, case.inputs(seed), case.keywords())
    return {name: relative_error(found[name], value) for name, value in exact.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that the limit is the same on every machine, and found fast on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_result(case: Case, name: str, ours: Tensor) -> None:
    """Holds one result of `evaluate`, for the inputs of seed 0, to the rule of accuracy."""
    eager = (_eager_errors(case, seed)[name] for seed in range(SEEDS))
    kind = "bwd" if name.endswith(".grad") else "fwd"
    assert_close(f"{case}: {name}", ours, eager, truth(case)[name], kind)


def check(
    case: Case, fn: Callable[..., Tensor], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Holds `fn`, called with the inputs and keywords of the case, to the rule of accuracy.

    Returns:
        The results of `evaluate`.
    """
    inputs = case.inputs(0, device)
    ours = evaluate(fn, inputs, case.keywords())
    for name, value in ours.items():
        like = inputs.weight if name == "out" else inputs.named()[name.removesuffix(".grad")]
        assert value.dtype == like.dtype, f"{case}: {name} is {value.dtype}, not {like.dtype}"
        check_result(case, name, value.cpu())
    return ours


# --- costs ---


def flops(case: Case, mode: str = "full") -> int:
    """Floating-point operations of the products, a multiply and an add as two. Those of a still
    image are with the sum of the weight over time; pixels of uint8 have no gradient."""
    depth = case.variant.temporal if case.variant.frames else 1
    one = 2 * case.b * case.patches * depth * case.c * math.prod(case.patch) * case.e
    backward = 1 if case.variant.pixels == "u8" else 2
    return one * {"fwd": 1, "bwd": backward, "full": 1 + backward}[mode]


def bytes_moved(case: Case, mode: str = "full") -> int:
    """What must be moved: pixels, weight and positions read and tokens written once; for "bwd"
    pixels, weight and the tokens' gradient read and gradients written; "full" is both."""
    frames = max(case.variant.frames, 1)
    pixels = case.b * frames * case.c * case.h * case.w * PIXELS[case.variant.pixels].itemsize
    size, v = case.dtype.itemsize, case.variant
    k = v.temporal * case.c * math.prod(case.patch)
    rows = 0 if v.pos == "none" else case.patches * (case.b if v.pos == "batch" else 1)
    weight, tokens = case.e * k * size, case.b * case.tokens * case.e * size
    added = rows * case.e * size
    forward = pixels + weight + added + tokens
    backward = pixels * (1 if v.pixels == "u8" else 2) + 2 * weight + added + tokens
    return {"fwd": forward, "bwd": backward, "full": forward + backward}[mode]


# --- peers ---


def normalised(
    images: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    layout: str = "nchw",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    rescale: float = 1 / 255,
    pad_space: str = "raw",
) -> Tensor:
    """As an image processor has it, in fp32: (B, ..., C, H, W), padded to whole patches."""
    x = images if layout == "nchw" else images.movedim(-1, -3)
    x = x.float() * rescale if images.dtype == torch.uint8 else x.float()
    h, w = x.shape[-2:]
    pads = [-(size - p) % s for size, p, s in zip((w, h), patch_size[::-1], stride[::-1])]
    if pad_space == "raw":
        x = F.pad(x, (0, pads[0], 0, pads[1]))
    if mean is not None:
        x = x - torch.tensor(mean, device=x.device).view(-1, 1, 1)
    if std is not None:
        x = x / torch.tensor(std, device=x.device).view(-1, 1, 1)
    return F.pad(x, (0, pads[0], 0, pads[1])) if pad_space == "normalised" else x


def _convolution(weight: Tensor, x: Tensor, k_order: str, patch: tuple[int, int]) -> Tensor:
    """(E, C, T, Py, Px) from the columns of a weight."""
    e, c = weight.shape[0], x.shape[-3]
    if k_order == "yxc":
        return weight.reshape(e, -1, *patch, c).permute(0, 4, 1, 2, 3)
    return weight.reshape(e, c, -1, *patch)


def _embed(
    project: Callable[[Tensor, Tensor, Tensor | None, tuple[int, int]], Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    layout: str = "nchw",
    k_order: str = "cyx",
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    newline: Tensor | None = None,
    merge: int = 1,
    temporal: int = 1,
    **rest: Any,
) -> Tensor:
    """Normalise, project, and what models do with the tokens, each in the dtype of the weight."""
    dtype = weight.dtype
    x = normalised(images, patch_size, stride, layout, **rest).to(dtype)
    w = _convolution(weight, x, k_order, patch_size)
    if images.dim() == 4:
        x = x[:, None].expand(-1, temporal, -1, -1, -1)
    b = x.shape[0]
    x = x.unflatten(1, (-1, temporal)).flatten(0, 1).transpose(1, 2)  # (B frames, C, T, H, W)
    grid = project(x, w, None if bias is None else bias.to(dtype), stride)  # (B frames, E, gh, gw)
    e, gh, gw = grid.shape[1:]
    tokens = grid.flatten(2).mT  # (B frames, gh gw, E)
    if merge > 1:
        order = torch.arange(gh * gw).view(gh // merge, merge, gw // merge, merge)
        tokens = tokens[:, order.transpose(1, 2).flatten()]
    tokens = tokens.reshape(b, -1, e)
    count = tokens.shape[1]
    first = prefix if prefix is None else prefix.to(dtype).expand(b, -1, -1)
    if pos is not None:
        pos = pos.to(dtype).expand(b, -1, -1)
        if first is not None and pos.shape[1] > count:
            first = first + pos[:, :-count]
        tokens = tokens + pos[:, -count:]
    if newline is not None:
        rows = tokens.view(b, -1, gw, e)
        ends = newline.to(dtype).expand(b, rows.shape[1], 1, e)
        tokens = torch.cat([rows, ends], 2).flatten(1, 2)
    return tokens if first is None else torch.cat([first, tokens], 1)


def _by_convolution(x: Tensor, w: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    if w.shape[2] == 1:
        return F.conv2d(x[:, :, 0], w[:, :, 0], bias, stride)
    return F.conv3d(x, w, bias, (w.shape[2], *stride))[:, :, 0]


def _by_columns(x: Tensor, w: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """The products of hardware: of operands in their dtype, summed in fp32 and rounded once."""
    columns = F.unfold(x.float().flatten(1, 2), tuple(w.shape[-2:]), stride=stride)
    added = None if bias is None else bias.float()
    tokens = F.linear(columns.mT, w.float().flatten(1), added).to(x.dtype)
    gw = (x.shape[-1] - w.shape[-1]) // stride[1] + 1
    return tokens.mT.unflatten(2, (-1, gw))


def conv(images: Tensor, weight: Tensor, bias: Tensor | None = None, **keywords: Any) -> Tensor:
    """Normalise in fp32, round, then Conv2d or Conv3d, as models have it."""
    return _embed(_by_convolution, images, weight, bias, **keywords)


def linear(images: Tensor, weight: Tensor, bias: Tensor | None = None, **keywords: Any) -> Tensor:
    """Normalise in fp32, round, cut into columns, then a linear layer: the yardstick."""
    return _embed(_by_columns, images, weight, bias, **keywords)


PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "patch_embed": {"conv": conv, "linear": linear}
}
