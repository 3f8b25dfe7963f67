"""Inputs, cases, keyword variants, costs and eager peers of `clip_loss` and `siglip_loss`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..tolerances import SEEDS, ULP, assert_close, relative_error

OPS = ("clip_loss", "siglip_loss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- inputs ---


class Inputs(NamedTuple):
    image_features: Tensor  # (N, D)
    text_features: Tensor  # (M, D)
    logit_scale: Tensor  # () fp32
    logit_bias: Tensor | None = None  # () fp32

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        image, text, scale, bias = self
        return Inputs(fn(image), fn(text), fn(scale), None if bias is None else fn(bias))

    def to(self, dtype: torch.dtype) -> Inputs:
        """All in one dtype; in fp64 they are exactly what a kernel sees."""
        return self.map(lambda t: t.detach().to(dtype))


def make_inputs(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    *,
    scale: float = 100.0,
    bias: float | None = None,
    positive_cos: float = 0.3,
    negative_cos: float = 0.1,
) -> Inputs:
    """Unit vectors like those of a trained model.

    All share one direction and pair i shares a second, so that for large D the diagonal has a
    cosine of about `positive_cos` and all other pairs one of `negative_cos` +- 1/sqrt(D).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=generator, device=device), dim=-1)

    common, pair = unit(1), unit(max(n, m))
    shares = (negative_cos, positive_cos - negative_cos, 1 - positive_cos)
    a, b, c = (math.sqrt(share) for share in shares)
    image, text = (
        F.normalize(a * common + b * pair[:rows] + c * unit(rows), dim=-1).to(dtype)
        for rows in (n, m)
    )
    return Inputs(
        image,
        text,
        torch.tensor(scale, device=device),
        None if bias is None else torch.tensor(bias, device=device),
    )


# --- keywords ---


def _ids(n: int, m: int, generator: torch.Generator) -> dict[str, Tensor]:
    # As many groups as leave rows with several positives, with one and with none.
    groups = max(2 * max(n, m) // 3, 1)
    image, text = (torch.randint(groups, (size,), generator=generator) for size in (n, m))
    # Far apart and of both signs, as hashes are.
    return {"image_ids": (image - groups // 2) * 2**40, "text_ids": (text - groups // 2) * 2**40}


def _labels(n: int, m: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"labels": torch.randint(m, (n,), generator=generator) if m else torch.full((n,), -1)}


def _labels_dropped(n: int, m: int, generator: torch.Generator) -> dict[str, Tensor]:
    labels = _labels(n, m, generator)["labels"]
    labels[::3] = -1
    return {"labels": labels}


PAIRS: dict[str, Callable[[int, int, torch.Generator], dict[str, Any]]] = {
    "diagonal": lambda n, m, generator: {},
    "ids": _ids,
    "ignore_same_ids": lambda n, m, g: {**_ids(n, m, g), "ignore_same_ids": True},
    "labels": _labels,
    "labels_dropped": _labels_dropped,
    "one_id": lambda n, m, generator: {
        "image_ids": torch.zeros(n, dtype=torch.int64),
        "text_ids": torch.zeros(m, dtype=torch.int64),
    },
    "no_positive": lambda n, m, generator: {
        "image_ids": torch.arange(n),
        "text_ids": n + torch.arange(m),
    },
}


def _weight(size: int, generator: torch.Generator) -> Tensor:
    weight = torch.rand(size, generator=generator) + 0.25
    weight[3::5] = 0
    return weight


@dataclass(frozen=True)
class Variant:
    """One choice for each keyword; `keywords` draws the tensors among them."""

    op: str
    pairs: str = "diagonal"  # a key of PAIRS
    weights: str = "none"  # "none" | "row" | "column" | "both"
    label_smoothing: float = 0.0
    directions: str = "both"
    reduction: str = "mean"

    def __str__(self) -> str:
        fields = (self.pairs, self.directions, self.reduction)
        extra = [f"weights_{self.weights}"] * (self.weights != "none")
        extra += [f"smoothing_{self.label_smoothing}"] * (self.label_smoothing != 0)
        return "-".join((self.op, *fields, *extra))

    def keywords(
        self, n: int, m: int, seed: int = 0, device: str | torch.device = "cpu"
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + 1)
        keywords = PAIRS[self.pairs](n, m, generator)
        keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        if self.weights != "none":
            keywords["weights"] = tuple(
                _weight(size, generator).to(device) if self.weights in (side, "both") else None
                for side, size in (("row", n), ("column", m))
            )
        if self.op == "clip_loss":
            keywords["label_smoothing"] = self.label_smoothing
            keywords["directions"] = self.directions
        keywords["reduction"] = self.reduction
        return keywords


REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("both", "image_to_text", "text_to_image")
WEIGHTS = ("none", "row", "column", "both")


def all_variants(op: str) -> list[Variant]:
    """Every combination of the keywords."""
    if op == "siglip_loss":
        choices = product(PAIRS, WEIGHTS, REDUCTIONS)
        return [Variant(op, pairs, weights, reduction=r) for pairs, weights, r in choices]
    combinations = product(PAIRS, WEIGHTS, (0.0, 0.1), DIRECTIONS, REDUCTIONS)
    return [Variant(op, *combination) for combination in combinations]


def covering_variants(op: str) -> list[Variant]:
    """Each choice of each keyword once, the others at their defaults, and a few all at once."""
    default = Variant(op)
    variants = [default]
    variants += [replace(default, pairs=pairs) for pairs in PAIRS if pairs != "diagonal"]
    variants += [replace(default, weights=weights) for weights in WEIGHTS[1:]]
    variants += [replace(default, reduction=reduction) for reduction in REDUCTIONS[1:]]
    together = replace(default, pairs="ids", weights="both", reduction="none")
    variants += [together, replace(together, pairs="ignore_same_ids", reduction="mean")]
    if op == "clip_loss":
        variants += [replace(default, directions=directions) for directions in DIRECTIONS[1:]]
        variants += [
            replace(v, label_smoothing=0.1)
            for v in (default, together, replace(together, pairs="ignore_same_ids"))
        ]
    return variants


# --- cases ---


@dataclass(frozen=True)
class Case:
    n: int
    m: int
    d: int
    dtype: torch.dtype = torch.float32
    variant: Variant = field(default_factory=lambda: Variant("clip_loss"))
    scale: float = 100.0
    bias: float | None = None
    data: str = "trained"  # one of DATA

    @property
    def op(self) -> str:
        return self.variant.op

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        bias = "" if self.bias is None else f"-bias_{self.bias:g}"
        data = "" if self.data == "trained" else f"-{self.data}"
        shape = f"{self.n}x{self.m}x{self.d}"
        return f"{self.variant}-{shape}-{dtype}-scale_{self.scale:g}{bias}{data}"

    def inputs(self, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
        opposed = self.data.startswith("opposed")
        cosines = (0.97, 0.95) if opposed else (0.5 if self.data == "saturated" else 0.3, 0.1)
        inputs = make_inputs(
            self.n,
            self.m,
            self.d,
            self.dtype,
            seed,
            device,
            scale=self.scale,
            bias=self.bias,
            positive_cos=cosines[0],
            negative_cos=cosines[1],
        )
        image, text = inputs.image_features, inputs.text_features
        if opposed:
            (image[self.n // 2] if self.data == "opposed_row" else text[self.m // 3]).neg_()
        if self.data == "duplicates":
            image[self.n // 2 :] = image[: self.n - self.n // 2].clone()
            text[self.m // 2 :] = text[: self.m - self.m // 2].clone()
        return inputs

    def keywords(self, seed: int = 0, device: str | torch.device = "cpu") -> dict[str, Any]:
        return self.variant.keywords(self.n, self.m, seed, device)


ROWS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)
DIMS = (1, 2, 3, 16, 63, 64, 65, 512, 513)
RECTANGLES = (
    (1, 257, 64),
    (257, 1, 65),
    (2, 3, 1),
    (16, 1025, 63),
    (1025, 17, 3),
    (64, 129, 512),
    (128, 65, 513),
    (97, 101, 31),
    (509, 251, 67),
    (7, 997, 13),
)
# (scale, bias): CLIP and SigLIP untrained and trained, and some unusual ones. Seven, so that they
# meet all dtypes, dims and variants as those are taken in turn.
SCALES = (
    (14.3, None),
    (100.0, None),
    (10.0, -10.0),
    (117.0, -16.5),
    (1.0, 0.5),
    (100.0, 3.0),
    (-20.0, None),
)
# Data of a case: those of `make_inputs`; pairs so near that the loss all but vanishes; one row, or
# one column, whose best cosine is about -0.9 where the others have 0.9; everything twice.
DATA = ("trained", "saturated", "opposed_row", "opposed_column", "duplicates")


def shapes(full: bool = False) -> list[tuple[int, int, int]]:
    """(N, M, D): each length and each D at least once, or with `full` every length at three D."""
    squares = [
        (n, n, d)
        for i, n in enumerate(ROWS)
        # Steps of 4 give the longest ones small D.
        for d in (DIMS[i % 3 :: 3] if full and n < 1000 else (DIMS[4 * i % len(DIMS)],))
    ]
    return [*squares, *RECTANGLES]


def cases(op: str, dtypes: tuple[torch.dtype, ...] = DTYPES, full: bool = False) -> list[Case]:
    """Each shape in each dtype, with the covering variants and the scales taken in turn."""
    variants = covering_variants(op)
    return [
        Case(*shape, dtype, variants[i % len(variants)], *SCALES[i // len(dtypes) % len(SCALES)])
        for i, (shape, dtype) in enumerate(product(shapes(full), dtypes))
        # With D = 1 normalised features are +-1 and the gradient of S takes two values a row: its
        # rounding to bf16 errs the same way everywhere, and the norm of the error tells luck.
        if not (full and dtype == torch.bfloat16 and shape[2] == 1)
    ]


# --- results ---


def evaluate(
    fn: Callable[..., Any], inputs: Inputs, keywords: dict[str, Any], grad: float = 1.0
) -> dict[str, Tensor]:
    """The loss ("loss", or "row" and "column") and the gradients ("<input>.grad") of one call.

    `grad` is the gradient of a scalar loss; unreduced losses get random ones, the same for any fn.
    """
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    loss = fn(*leaves, **keywords)
    outputs = loss if isinstance(loss, tuple) else (loss,)
    names = ("row", "column") if isinstance(loss, tuple) else ("loss",)
    generator = torch.Generator().manual_seed(len(outputs[0].shape) + 7)
    total = sum(
        (o * torch.randn(o.shape, generator=generator).to(o)).sum() if o.ndim else o * grad
        for o in outputs
    )
    wanted = {f"{k}.grad": t for k, t in zip(Inputs._fields, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {
        **{name: o.detach() for name, o in zip(names, outputs, strict=True)},
        **dict(zip(wanted, grads, strict=True)),
    }


# Terms that a matrix multiply adds up in a register before that sum is added to others: MKL has
# 130 to 190.
DEPTH = 128


def product_in_order(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the order of a matrix multiply: blocks of DEPTH terms, each summed one by one."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for start in range(0, a.shape[-1], DEPTH):
        block = torch.zeros_like(total)
        for k in range(start, min(start + DEPTH, a.shape[-1])):
            block.addcmul_(a[..., k : k + 1], b[..., k : k + 1, :])
        total += block
    return total


class _Similarity(torch.autograd.Function):
    """image @ text.T in fp32, as its three products are on hardware: 16-bit operands stay in 16
    bits, the gradient too, all sums in fp32. The gradient is scaled so that it fits into fp16, by
    a number that decides which of its values are lucky enough to be rounded by little."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, largest: float) -> Tensor:
        ctx.save_for_backward(image, text)
        ctx.largest = largest
        return product_in_order(image.float(), text.float().T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        image, text = ctx.saved_tensors
        unit: Tensor | float = 1.0
        if image.dtype.itemsize == 2 and grad.numel():
            unit = grad.abs().max().clamp(min=1e-30) / ctx.largest
        rounded = (grad / unit).to(image.dtype).float()
        return (
            (product_in_order(rounded, text.float()) * unit).to(image.dtype),
            (product_in_order(rounded.T, image.float()) * unit).to(text.dtype),
            None,
        )


def _eager_losses(op: str, seed: int) -> list[Callable[..., Any]]:
    """The formula of the op in eager PyTorch: as it stands, and with the products of hardware.

    The order in which eager sums a product depends on the shape and the CPU: for less than 16 rows
    some libraries use dot products, with a third of the error that they have for all others. The
    formula does not ask for that, and a kernel with one order for all shapes does not have it.
    """
    function = getattr(reference, op)

    # A gradient of a few values, as that of a softmax is at a scale of almost 0, is the same for
    # all seeds, and so would its luck be.
    largest = 2.0 ** -((seed + 0.5) / SEEDS)

    def on_hardware(image: Tensor, text: Tensor, *args: Any, **keywords: Any) -> Any:
        # Times the identity, which is exact, because the reference takes features only.
        similarity = _Similarity.apply(image, text, largest)
        return function(similarity, torch.eye(len(text)), *args, **keywords)

    return [function, on_hardware]


def _terms(case: Case, exact: dict[str, Tensor], grad: float = 1.0) -> dict[str, float]:
    """For each result of `evaluate`, about the norm of the terms that cancel into it.

    A logit is a sum of D products as large as the scale. InfoNCE is the difference of a log-sum-exp
    and a logit, its gradients those of a softmax and a target: they keep an error of an ulp of
    these even where they vanish. The sigmoid loss passes on the errors of the logits, which average
    out over the rows; what a pair adds to the gradients of its scale and bias is less than its
    loss, and may be flushed where it is no normal number of fp32.
    """
    rows, scale = max(case.n, case.m, 1), abs(case.scale)
    logit = scale + abs(case.bias or 0.0)
    # L1 and L2 norms of the gradient of the losses of single rows.
    one, two = 1.0, 1 / math.sqrt(max(min(case.n, case.m), 1))
    if case.variant.reduction != "mean":
        one, two = float(rows), math.sqrt(rows)
    terms = {
        "loss": one * logit,
        "row": math.sqrt(rows) * logit,
        "column": math.sqrt(rows) * logit,
        "image_features.grad": abs(grad) * two * scale,
        "text_features.grad": abs(grad) * two * scale,
        "logit_scale.grad": abs(grad) * one,
        "logit_bias.grad": abs(grad) * one,
    }
    if case.op == "clip_loss":
        return terms
    flushed = rows * torch.finfo(torch.float32).tiny / ULP
    for name, value in exact.items():
        passed_on = torch.linalg.vector_norm(value).item() * logit / math.sqrt(rows)
        terms[name] = terms[name] * flushed + passed_on
    for name in ("logit_scale.grad", "logit_bias.grad"):
        terms[name] += abs(grad) * exact["loss"].abs().sum().item()
    return terms


class Truth(NamedTuple):
    exact: Tensor  # fp64
    eager: float  # error of eager PyTorch
    terms: float  # see `relative_error`


@lru_cache(maxsize=64)
def truth(case: Case, seed: int = 0, grad: float = 1.0) -> dict[str, Truth]:
    """What each result of `evaluate` should be."""
    function = getattr(reference, case.op)
    inputs, keywords = case.inputs(seed), case.keywords(seed)
    threads = torch.get_num_threads()
    # So that the limit is the same on every machine, and found fast on a busy one.
    torch.set_num_threads(1)
    try:
        exact = evaluate(function, inputs.to(torch.float64), keywords, grad)
        results = [evaluate(fn, inputs, keywords, grad) for fn in _eager_losses(case.op, seed)]
    finally:
        torch.set_num_threads(threads)
    terms = _terms(case, exact, grad)
    # The largest error: where all cancels, one may be lucky.
    return {
        name: Truth(
            value,
            max(relative_error(eager[name], value, terms[name]) for eager in results),
            terms[name],
        )
        for name, value in exact.items()
    }


def check_result(case: Case, name: str, ours: Tensor, grad: float = 1.0) -> None:
    """Holds one result of `evaluate`, for the inputs of seed 0, to the rule of accuracy."""
    exact, _, terms = truth(case, 0, grad)[name]
    eager = (truth(case, seed, grad)[name].eager for seed in range(SEEDS))
    kind = "bwd" if name.endswith(".grad") else "fwd"
    assert_close(f"{case}: {name}", ours, eager, exact, kind, terms=terms)


def check(
    case: Case, fn: Callable[..., Any], device: str | torch.device = "cpu", grad: float = 1.0
) -> dict[str, Tensor]:
    """Holds `fn`, called with the inputs and keywords of the case, to the rule of accuracy.

    Returns:
        The results of `evaluate`.
    """
    ours = evaluate(fn, case.inputs(0, device), case.keywords(0, device), grad)
    names = truth(case, 0, grad).keys()
    assert ours.keys() == names, f"{case}: {sorted(ours)}, expected {sorted(names)}"
    for name, value in ours.items():
        check_result(case, name, value, grad)
    return ours


# --- costs ---


def flops(op: str, n: int, m: int, d: int, mode: str = "full") -> int:
    """Useful floating-point operations of "fwd" or "full" (forward and backward), a multiply and an
    add as two; recomputing the logits is not useful."""
    return {"fwd": 2, "full": 6}[mode] * n * m * d


def bytes_moved(
    op: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32, mode: str = "full"
) -> int:
    """What must be moved: the features read once and, for "full", their gradients written once."""
    return {"fwd": 1, "full": 2}[mode] * (n + m) * d * dtype.itemsize


# --- peers ---


def open_clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """open_clip's ClipLoss on one device: two logit matrices in the dtype of the features."""
    logits = (scale * image @ text.T, scale * text @ image.T)
    if bias is not None:
        logits = (logits[0] + bias, logits[1] + bias)
    target = torch.arange(image.shape[0], device=image.device)
    return (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2


def open_clip_siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """open_clip's SigLipLoss on one device, in the dtype of the features."""
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    n = image.shape[0]
    signs = 2 * torch.eye(n, dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / n


PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "clip_loss": {"open_clip": open_clip_loss},
    "siglip_loss": {"open_clip": open_clip_siglip_loss},
}
