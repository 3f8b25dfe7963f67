"""Gradients of attention's Triton backend in the interpreter, against fp64: a covering subset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels._triton import _attention_bwd as backend
from vlm_kernels._triton import _attention_bwd_kernels as kernels
from vlm_kernels._triton._compat import INTERPRET
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant, VarlenCase
from vlm_kernels.testing.tolerances import assert_close, relative_error

TRITON = partial(vlm_kernels.attention, backend="triton")
VARLEN = partial(vlm_kernels.attention_varlen, backend="triton")
EVERYTHING = Variant("causal_window", "additive", "1hqk", 0.2, 4.0, "half", "layer", True, "gaps")


def function(case: Case | VarlenCase) -> Callable[..., Any]:
    return TRITON if isinstance(case, Case) else VARLEN


def evaluate(case: Case | VarlenCase) -> dict[str, Tensor]:
    inputs, keywords = case.inputs(), case.keywords()
    return spec.evaluate(function(case), inputs, keywords, case.variant.lse)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_this_is_the_interpreter() -> None:
    assert INTERPRET.value


# --- accuracy ---


def shape_cases() -> Iterator[Case]:
    """Each head dim, and lengths around those of a tile; the dtypes take turns."""
    lengths = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65)
    for i, d in enumerate(spec.DIMS):
        n = lengths[i % len(lengths)]
        layout = spec.LAYOUTS[i % len(spec.LAYOUTS)]
        yield Case(1, 1, n, n, d, spec.DTYPES[i % 3], Variant(layout=layout, lse=i % 2 == 0))
    yield Case(1, 1, 1, 257, 72, torch.bfloat16)
    yield Case(1, 1, 130, 3, 80, torch.float16)
    for i, dtype in enumerate(spec.DTYPES):
        yield Case(1, 6, 17, 33, 24, dtype, kv_heads=2, dv=(8, 56, 80)[i])
        yield Case(1, 2, 33, 65, (32, 80, 7)[i], dtype, kv_heads=1, dv=(100, 5, 64)[i])


@pytest.mark.parametrize("case", list(shape_cases()), ids=str)
def test_each_shape(case: Case) -> None:
    spec.check(case, TRITON)


KEYS = ("causal", "window", "range_heads", "range_each", "prefix_lm", "padding")
BATCH = ("range_each", "padding", "interleaved_batch")


def variant_cases() -> Iterator[Case]:
    """Intervals of each shape, and what the backward has a branch for."""
    variants = [Variant(name) for name in KEYS]
    variants += [Variant(softcap=0.8), Variant(softcap=30.0), Variant(scale=-0.2, lse=True)]
    variants += [Variant(rope=name) for name in ("half", "partial", "interleaved_batch")]
    variants += [Variant(norm=name) for name in spec.NORMS if name not in ("none", "q_only")]
    variants += [Variant("window", mask, lse=True) for mask in spec.MASKS[1:]]
    variants += [EVERYTHING, Variant("range_each", "bool", "b1qk", softcap=5.0, norm="q_only")]
    for i, variant in enumerate(variants):
        b = 2 if {variant.keys, variant.rope} & {*BATCH} else 1
        kv_heads = 1 if i % 3 == 0 else None
        yield Case(b, 2, 37, 70, 24, spec.DTYPES[i % 3], variant, kv_heads=kv_heads)


@pytest.mark.parametrize("case", list(variant_cases()), ids=str)
def test_each_variant(case: Case) -> None:
    spec.check(case, TRITON)


SEGMENTS = ((5, 9), (0, 4), (7, 0), (3, 3), (33, 41))
ROTATED = ((3, 9), (0, 4), (33, 41), (0, 0), (1, 1))
VARLEN_CASES = (
    VarlenCase(SEGMENTS, 2, 24, torch.bfloat16, Variant("causal"), kv_heads=1, outside=3),
    VarlenCase(SEGMENTS, 2, 24, torch.float16, Variant("window", lse=True, layout="gaps")),
    VarlenCase(ROTATED, 2, 24, torch.float32, Variant("all", rope="half", norm="rms"), outside=2),
    VarlenCase(ROTATED, 2, 24, torch.bfloat16, Variant("causal", rope="interleaved"), kv_heads=1),
    VarlenCase(((0, 0),), 2, 24, torch.float32, Variant(norm="layer"), outside=1),
)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=str)
def test_varlen(case: VarlenCase) -> None:
    spec.check(case, VARLEN)


@pytest.mark.parametrize("nk", [1, 63, 64, 65, 130])
def test_bounds_of_queries(nk: int) -> None:
    """Of each tile of keys the first and the last tile of queries that may see it."""
    generator = torch.Generator().manual_seed(nk)
    rows = torch.randint(nk + 1, (2, 3, 41, 2), generator=generator, dtype=torch.int32).sort(-1)[0]
    rows[rows[..., 0] == rows[..., 1]] = 0
    bounds = torch.empty((2, 3, -(-nk // 64), 2), dtype=torch.int32)
    kernels.bounds_kernel[(bounds.numel() // 2,)](rows, bounds, 41, nk, BM=4, BN=64, BLOCK=16)
    j = torch.arange(nk)
    seen = (rows[..., :1] <= j) & (j < rows[..., 1:])  # (2, 3, 41, nk)
    for tile, part in enumerate(seen.split(64, -1)):
        for head, of_queries in enumerate(part.any(-1).flatten(0, 1)):
            i = of_queries.nonzero()
            wanted = [int(i.min()) // 4, int(i.max()) // 4 + 1] if len(i) else [0, 0]
            assert bounds.flatten(0, 1)[head, tile].tolist() == wanted


# --- masks ---


@pytest.mark.parametrize(
    "shape",
    [name for name in spec.MASK_SHAPES if len(name) < 3 or name[-1] == "k" or name == "bhq1"],
)
def test_mask_of_every_broadcast_shape(shape: str) -> None:
    spec.check(Case(2, 2, 5, 9, 8, variant=Variant("range_each", "additive", shape)), TRITON)


@pytest.mark.parametrize(
    ("shape", "programs"), [("11qk", 0), ("11qk", 64), ("k", 64), ("b11k", 64)]
)
def test_mask_of_many_tiles(shape: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few programs own the mask others take parts of the sum."""
    monkeypatch.setattr(backend, "_PROGRAMS", programs)
    spec.check(Case(2, 2, 70, 40, 16, variant=Variant("causal", "additive_fp32", shape)), TRITON)


# --- few queries ---


@pytest.mark.parametrize("keys", ["all", "range"])
@pytest.mark.parametrize("programs", [0, 264])
def test_keys_split_over_programs(
    keys: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_PROGRAMS", programs)
    spec.check(Case(1, 1, 3, 300, 16, torch.bfloat16, Variant(keys)), TRITON)


# --- which gradients ---


@pytest.mark.parametrize(
    "wanted",
    [*((name,) for name in spec.Inputs._fields), ("query", "value"), ("key", "k_norm_bias")],
    ids="+".join,
)
def test_locked_inputs(wanted: tuple[str, ...], whole: dict[str, Tensor]) -> None:
    """They have no gradient, and change no bit of those of the others."""
    case = LOCKED
    inputs = case.inputs()
    for name, leaf in inputs.named().items():
        leaf.requires_grad_(name in wanted)
    out, lse = spec.call(TRITON, inputs, {**case.keywords(), "return_lse": True})
    torch.autograd.backward([out, lse], list(spec.gradients(out, lse, True)))
    for name, leaf in inputs.named().items():
        if name in wanted:
            assert torch.equal(leaf.grad, whole[f"{name}.grad"]), name
        else:
            assert leaf.grad is None, name


LOCKED = Case(1, 2, 9, 20, 24, variant=EVERYTHING)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return spec.check(LOCKED, TRITON)


def test_gradient_of_lse_alone() -> None:
    case = Case(1, 2, 33, 40, 24, variant=Variant("range_heads"))

    def of_query(fn: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (t.to(dtype).requires_grad_() for t in case.inputs()[:3])
        _, lse = fn(q, k, v, **case.keywords(), return_lse=True)
        total = torch.where(lse == -math.inf, 0, lse).sum()
        return torch.autograd.grad(total, (q, k, v), allow_unused=True)

    exact, eager = (
        of_query(reference.attention, dtype) for dtype in (torch.float64, torch.float32)
    )
    ours = of_query(TRITON, torch.float32)
    for name, x, e, y in zip(("query", "key"), ours, eager, exact):
        assert_close(name, x, relative_error(e, y), y, "bwd")
    assert not ours[2].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int]) -> None:
    b, h, nq, nk = shape
    variant = Variant(mask="additive", norm="layer")
    found = evaluate(Case(b, h, nq, nk, 8, variant=variant))
    for name, value in found.items():
        assert not name.endswith(".grad") or not value.any(), name


# --- layout and repeats ---


@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_layout_of_gradients(layout: str) -> None:
    """Rows of one position lie together where those of the input do, and in packed calls."""
    q, k, v = (
        t.requires_grad_() for t in Case(1, 2, 5, 6, 8, variant=Variant(layout=layout)).inputs()[:3]
    )
    for grad in torch.autograd.grad(TRITON(q, k, v).sum(), (q, k, v)):
        rows = grad if layout == "bhnd" else grad.transpose(1, 2)
        assert rows.is_contiguous()


def test_gradient_that_is_a_view() -> None:
    """Of stride 0, as that of a sum is, and transposed."""
    q, k, v = (t.requires_grad_() for t in Case(1, 2, 17, 20, 8, dv=6).inputs()[:3])
    out = TRITON(q, k, v)
    for grad in (torch.tensor(0.5).expand(out.shape), torch.randn(1, 6, 17, 2).permute(0, 3, 2, 1)):
        strided, plain = (
            torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
            for g in (grad, grad.contiguous())
        )
        assert all(map(torch.equal, strided, plain))


TELLING = (
    Case(1, 2, 37, 70, 24, torch.bfloat16, EVERYTHING),
    Case(1, 4, 3, 300, 72, torch.float16, Variant("range_heads"), kv_heads=2),
    VARLEN_CASES[2],
)


@pytest.mark.parametrize("case", TELLING, ids=str)
def test_bitwise_repeat_whatever_memory_holds(case: Case | VarlenCase) -> None:
    """torch fills what it allocates with NaN in this mode."""
    plain = evaluate(case)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        same(plain, evaluate(case))
    finally:
        torch.use_deterministic_algorithms(before)


def test_backward_twice_is_the_same() -> None:
    leaves = Case(1, 2, 40, 40, 33, torch.float16).inputs().map(lambda t: t.requires_grad_())
    out = TRITON(*leaves[:3])
    first = torch.autograd.grad(out.sum(), leaves[:3], retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves[:3])
    assert all(map(torch.equal, first, second))


# --- hard numbers ---


@pytest.mark.parametrize("logit", [8.0, 100.0])
def test_huge_logits(logit: float) -> None:
    spec.check(Case(1, 2, 40, 40, 64, logit=logit), TRITON)


def test_lowest_number_as_mask() -> None:
    """A row of nothing else has an lse as low: no gradient overflows."""
    mask = torch.full((5, 40), torch.finfo(torch.float32).min)
    mask[0] = 0
    leaves = [t.requires_grad_() for t in (*Case(1, 2, 5, 40, 16).inputs()[:3], mask)]
    for grad in torch.autograd.grad(TRITON(*leaves).sum(), leaves):
        assert grad.isfinite().all()


def test_what_is_not_seen_has_no_gradient_and_no_effect() -> None:
    q, k, v, *_ = Case(1, 1, 40, 70, 16, torch.bfloat16).inputs()
    kv_range = torch.tensor([5, 50], dtype=torch.int32).expand(1, 1, 40, 2)
    found = []
    for value in (0.0, 1e4):
        k[:, :, 50:], v[:, :, :5] = value, value
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = TRITON(*leaves, kv_range=kv_range)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(map(torch.equal, *found))
    for grad in found[0][1:]:
        assert not grad[:, :, :5].any()
        assert not grad[:, :, 50:].any()
