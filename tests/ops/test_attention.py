"""attention: backends against fp64, values and layouts that are hard, autograd, determinism."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs._attention_yardsticks import flash
from vlm_kernels.testing.specs.attention import Case, Variant
from vlm_kernels.testing.tolerances import assert_close, relative_error

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CPU = partial(vlm_kernels.attention, backend="cpu")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def evaluate(case: Case, fn: Callable[..., Any] = CPU) -> dict[str, Tensor]:
    return spec.evaluate(fn, case.inputs(), case.keywords(), case.variant.lse)


def assert_close_to_reference(
    name: str, out: Tensor, args: Sequence[Tensor], **keywords: Any
) -> None:
    """The rule of accuracy for calls that no Case makes."""
    keywords["return_lse"] = True
    exact, _ = reference.attention(*(t.double() for t in args), **keywords)
    eager = [fn(*args, **keywords)[0] for fn in (reference.attention, flash(0))]
    assert_close(name, out, max(relative_error(e, exact) for e in eager), exact)


# --- accuracy ---


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """A function that goes through the instruction sets that this CPU has."""
    extension = importlib.import_module("vlm_kernels._C")
    before = extension.cpu_isa()

    def each() -> Iterator[str]:
        for name in extension.cpu_isas():
            extension.set_cpu_isa(name)
            assert extension.cpu_isa() == name
            yield name

    yield each
    extension.set_cpu_isa(before)


def is_long(case: Case) -> bool:
    return case.b * case.h * case.nq * case.nk * case.d > 4e6


@needs_cpu
@pytest.mark.parametrize("case", [c for c in spec.cases() if not is_long(c)], ids=str)
def test_accuracy(case: Case, isas: Callable[[], Iterator[str]]) -> None:
    """With each instruction set."""
    for _ in isas():
        spec.check(case, CPU)


@needs_cpu
@pytest.mark.parametrize("case", [c for c in spec.cases() if is_long(c)], ids=str)
def test_accuracy_of_long_ones(case: Case) -> None:
    spec.check(case, CPU)


SMALL = [case for case in spec.cases() if case.b * case.h * case.nq * case.nk < 2e4][::3]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_accuracy_of_the_reference(case: Case) -> None:
    spec.check(case, partial(vlm_kernels.attention, backend="reference"))


@needs_cpu
@pytest.mark.parametrize("variant", spec.all_variants(), ids=str)
def test_every_combination_of_keywords(variant: Variant) -> None:
    i = spec.all_variants().index(variant)
    grouped = {"kv_heads": (1, 2)[i % 2]} if i % 3 == 0 else {}
    case = Case(2, 4, 18, (18, 23)[i // 2 % 2], 20, spec.DTYPES[i % 3], variant, **grouped)
    spec.check(case, CPU)


@backends
@pytest.mark.parametrize("logit", [8.0, 100.0, 1000.0])
@dtypes
def test_huge_logits(logit: float, dtype: torch.dtype, backend: str) -> None:
    """Most probabilities underflow, and with 1000 nearly every row is one key."""
    for variant in (Variant(lse=True), Variant("causal", scale=-1.0), Variant(softcap=50.0)):
        case = Case(1, 2, 66, 90, 32, dtype, variant, logit=logit)
        spec.check(case, partial(vlm_kernels.attention, backend=backend))


@backends
@pytest.mark.parametrize("shape", spec.MASK_SHAPES)
@pytest.mark.parametrize("mask", ["bool", "additive_inf"])
def test_masks_of_every_broadcast_shape(mask: str, shape: str, backend: str) -> None:
    dtype = spec.DTYPES[len(shape) % 3]
    for nq, nk in ((5, 7), (70, 33)):
        case = Case(2, 3, nq, nk, 16, dtype, Variant(mask=mask, mask_shape=shape, lse=True))
        spec.check(case, partial(vlm_kernels.attention, backend=backend))


@backends
@dtypes
def test_lowest_number_as_mask(dtype: torch.dtype, backend: str) -> None:
    """Added to every score of a row it drowns them, so that all are the same; beside a 0 it hides
    its keys, as -inf does, which leaves nothing where it is all there is."""
    q, k, v, *_ = Case(1, 2, 5, 40, 16, dtype).inputs()
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(5, 40)
    mask[1], mask[2, 7:], mask[3] = lowest, lowest, -math.inf
    out = vlm_kernels.attention(q, k, v, mask, backend=backend)
    assert_close_to_reference("out", out, (q, k, v, mask))
    mean = v.double().mean(2)
    assert_close("uniform", out[:, :, 1], relative_error(mean.to(dtype), mean), mean)
    assert not out[:, :, 3].any()


@backends
def test_lowest_number_of_fp16_as_mask(backend: str) -> None:
    """-65504, the lowest of fp16: far below the scores, yet near enough to keep their digits."""
    case = Case(1, 2, 5, 40, 16, torch.float16)
    inputs = case.inputs()._replace(attn_mask=torch.full((5, 40), -65504.0, dtype=torch.float16))
    out = vlm_kernels.attention(*inputs[:4], backend=backend)
    assert_close_to_reference("out", out, inputs[:4])


# --- layouts ---


@backends
@pytest.mark.parametrize("layouts", [("bhnd", "gaps", "packed"), ("gaps", "bnhd", "bhnd")])
@dtypes
def test_each_tensor_has_strides_of_its_own(
    layouts: tuple[str, ...], dtype: torch.dtype, backend: str
) -> None:
    case = Case(2, 3, 37, 66, 24, dtype, dv=40)

    def fn(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        views = [spec.laid_out(t, name) for t, name in zip((query, key, value), layouts)]
        return vlm_kernels.attention(*views, **keywords, backend=backend)

    spec.check(case, fn)


@needs_cpu
@dtypes
def test_what_is_near_is_not_read(dtype: torch.dtype) -> None:
    """NaN before, after and between the rows, for tails of every length."""
    for i, d in enumerate(range(1, 40)):
        case = Case(1, 2, 1 + i % 5, 18 - i % 7, d, dtype, Variant(layout="gaps"), dv=40 - d)
        for name, value in evaluate(case).items():
            assert value.isfinite().all(), f"{case}: {name}"
            spec.check_result(case, name, value)


@needs_cpu
@pytest.mark.parametrize("case", spec.cases()[::7], ids=str)
def test_uninitialised_memory_is_not_read(case: Case) -> None:
    """torch fills what it allocates with NaN in this mode, also when C++ asks for it."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        ours = evaluate(case)
    finally:
        torch.use_deterministic_algorithms(before)
    same(ours, evaluate(case))


@backends
def test_rows_of_stride_0(backend: str) -> None:
    """One row shared by all queries, keys or values: no product may take it in place."""
    query, value = torch.randn(2, 3, 40, 64), torch.randn(2, 3, 50, 64)
    row, other = (torch.randn(2, 3, 1, 64) for _ in range(2))
    for args in (
        (query, row.expand(2, 3, 50, 64), value),
        (query, value, row.expand(2, 3, 50, 64)),
        (row.expand(2, 3, 40, 64), other.expand(2, 3, 50, 64), value),
    ):
        out = vlm_kernels.attention(*args, backend=backend)
        assert_close_to_reference("out", out, args)


@backends
def test_shared_keys_and_batches_of_stride_0(backend: str) -> None:
    """One memory of keys and values for every batch, each with its part in the gradient."""
    fn = partial(vlm_kernels.attention, backend=backend)
    q, k, v, *_ = Case(3, 2, 9, 20, 16).inputs()
    results = []
    for which, dtype in ((fn, torch.float32), (reference.attention, torch.float32)):
        k1, v1 = (t[:1].to(dtype).clone().requires_grad_() for t in (k, v))
        out = which(q.to(dtype), k1.expand_as(k), v1.expand_as(v))
        results.append([out, *torch.autograd.grad(out.square().sum(), (k1, v1))])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


@backends
@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_layout_of_the_result(layout: str, backend: str) -> None:
    """That of (B, N, H, D) data where the query is cut from such, so that heads merge without a
    copy."""
    q, k, v, *_ = spec.make_inputs(2, 3, 10, 12, 8, layout=layout)
    out = vlm_kernels.attention(q, k, v, backend=backend)
    assert (out if layout == "bhnd" else out.transpose(1, 2)).is_contiguous()


@backends
def test_gradient_that_is_a_view(backend: str) -> None:
    q, k, v, *_ = Case(2, 3, 19, 19, 8).inputs()
    q.requires_grad_()
    wide = torch.randn(2, 19, 6, 16)
    for given in (wide[:, :, ::2, ::2].transpose(1, 2), wide[:1, :1, :1, :1].expand(2, 3, 19, 8)):
        assert given.shape == q.shape
        out = vlm_kernels.attention(q, k, v, backend=backend)
        [ours] = torch.autograd.grad(out, q, given)
        out = vlm_kernels.attention(q, k, v, backend=backend)
        [wanted] = torch.autograd.grad(out, q, given.contiguous())
        assert torch.equal(ours, wanted)


@backends
@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_mask_that_is_a_view(mask: str, backend: str) -> None:
    fn = partial(vlm_kernels.attention, backend=backend)
    case = Case(2, 3, 12, 9, 8, variant=Variant(mask=mask))
    q, k, v, added, *_ = case.inputs()
    given = added if mask == "additive" else case.keywords()["attn_mask"]
    wanted = fn(q, k, v, given)
    wide = given.new_ones(2, 3, 20, 30)
    wide[:, :, 2:14, 5:14] = given
    for view in (wide[:, :, 2:14, 5:14], given.mT.contiguous().mT):
        assert torch.equal(view, given)
        assert torch.equal(fn(q, k, v, view), wanted)
    row = given[:, :1, :1]
    assert torch.equal(fn(q, k, v, row.expand_as(given)), fn(q, k, v, row))


@backends
def test_range_that_is_a_view(backend: str) -> None:
    fn = partial(vlm_kernels.attention, backend=backend)
    case = Case(2, 3, 12, 9, 8, variant=Variant("range_each"))
    q, k, v, *_ = case.inputs()
    kv_range = case.keywords()["kv_range"]
    wanted = fn(q, k, v, kv_range=kv_range)
    wide = torch.zeros(2, 3, 24, 4, dtype=torch.int32)
    wide[:, :, ::2, ::2] = kv_range
    assert torch.equal(fn(q, k, v, kv_range=wide[:, :, ::2, ::2]), wanted)
    one = kv_range[:1, :, :1]
    expanded = one.expand(2, 3, 12, 2)
    assert torch.equal(fn(q, k, v, kv_range=expanded), fn(q, k, v, kv_range=expanded.contiguous()))


# --- which keys are seen ---


@needs_cpu
@dtypes
def test_ranges_of_the_extremes(dtype: torch.dtype) -> None:
    """Cut to the keys there are, also where begin + 1 or end - begin would overflow."""
    low, high = -(2**31), 2**31 - 1
    ends = [(low, high), (high, low), (high, high), (low, low), (0, 0), (-1, 1), (69, high)]
    kv_range = torch.tensor(ends, dtype=torch.int32)[None, None]
    q, k, v, *_ = Case(1, 2, len(ends), 70, 24, dtype).inputs()
    for keywords in ({}, {"is_causal": True}, {"window": (70, 70)}):
        given = {**keywords, "kv_range": kv_range, "return_lse": True}
        out, lse = CPU(q, k, v, **given)
        _, exact_lse = reference.attention(*(t.double() for t in (q, k, v)), **given)
        assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
        assert_close_to_reference("out", out, (q, k, v), **given)


@needs_cpu
def test_equal_ways_to_say_the_same() -> None:
    """Bitwise: a causal rule, a window, a range."""
    q, k, v, *_ = Case(2, 2, 70, 90, 32).inputs()
    i = torch.arange(70, dtype=torch.int32)
    ends = torch.stack([torch.zeros_like(i), i + 1], -1)[None, None]
    wanted = CPU(q, k, v, is_causal=True)
    for keywords in ({"window": (-1, 0)}, {"kv_range": ends}, {"is_causal": True, "window": None}):
        assert torch.equal(CPU(q, k, v, **keywords), wanted), keywords
    assert torch.equal(CPU(q, k, v, window=(-1, -1)), CPU(q, k, v))
    assert torch.equal(CPU(q, k, v, is_causal=True, kv_range=ends, window=(100, 5)), wanted)


@backends
@dtypes
def test_what_is_not_seen_has_no_effect(dtype: torch.dtype, backend: str) -> None:
    """Other keys and values there change no bit; nor do NaN keys that no query sees."""
    fn = partial(vlm_kernels.attention, backend=backend)
    case = Case(2, 3, 40, 60, 24, dtype, Variant("padding"))
    q, k, v, *_ = case.inputs()
    lengths = torch.tensor([50, 33])
    kv_range = torch.tensor([[0, 50], [0, 33]], dtype=torch.int32)[:, None, None]
    given = {"kv_range": kv_range.expand(2, 1, 40, 2), "return_lse": True}
    wanted = fn(q, k, v, **given)
    hidden = torch.arange(60) >= lengths[:, None, None]  # (B, 1, Nk)
    for key, value in ((7.0, -5.0), (math.nan, 0.0), (1e4, 6e4)):
        k2, v2 = (t.masked_fill(hidden[..., None], x) for t, x in ((k, key), (v, value)))
        for got, one in zip(fn(q, k2, v2, **given), wanted, strict=True):
            assert torch.equal(got, one)


@backends
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1, 2, 0, 0)], ids=str)
@dtypes
def test_empty(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """No batch, no query, no key."""
    case = Case(*shape, 8, dtype, Variant(lse=True), dv=5)
    ours = spec.check(case, partial(vlm_kernels.attention, backend=backend))
    b, h, nq, nk = shape
    assert ours["out"].shape == (b, h, nq, 5)
    assert ours["key.grad"].shape == (b, h, nk, 8)


# --- values that are not finite ---


@backends
@pytest.mark.parametrize("value", [math.nan, math.inf])
@dtypes
def test_a_bad_query_spoils_its_row_only(value: float, dtype: torch.dtype, backend: str) -> None:
    q, k, v, *_ = Case(2, 3, 70, 90, 24, dtype).inputs()
    q[1, 2, 33, 5] = value
    out, lse = vlm_kernels.attention(q, k, v, return_lse=True, backend=backend)
    bad = torch.zeros(2, 3, 70, dtype=torch.bool)
    bad[1, 2, 33] = True
    assert torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(lse.isfinite(), ~bad)


@backends
@dtypes
def test_a_nan_reaches_all_that_see_it(dtype: torch.dtype, backend: str) -> None:
    """Of a key: the rows from it on, in full; of a value: its feature there."""
    for side in (1, 2):
        inputs = list(Case(2, 3, 70, 70, 24, dtype, Variant("causal")).inputs()[:3])
        inputs[side][1, 2, 33, 5] = math.nan
        out = vlm_kernels.attention(*inputs, is_causal=True, backend=backend)
        assert out[1, 2, 33:, 5].isnan().all()
        assert out[0].isfinite().all()
        assert out[1, :2].isfinite().all()
        if side == 1:
            assert out[1, 2, 33:].isnan().all()
            assert out[1, 2, :33].isfinite().all()


@needs_cpu
@dtypes
def test_nan_everywhere_does_not_crash(dtype: torch.dtype) -> None:
    for value in (math.nan, math.inf, -math.inf):
        for variant in (Variant(), Variant("range_each", "additive", lse=True, softcap=3.0)):
            case = Case(2, 2, 19, 35, 16, dtype, variant)
            inputs = case.inputs().map(lambda t, x=value: torch.full_like(t, x))
            results = spec.evaluate(CPU, inputs, case.keywords(), variant.lse)
            if math.isnan(value):
                seen = results["lse"] != -math.inf
                assert results["out"][seen].isnan().all()
                assert results["query.grad"][seen].isnan().all()


# --- SDPA ---


def sdpa_calls() -> Iterator[tuple[str, tuple, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    bool_mask = torch.rand(2, 1, 9, 9, generator=generator) < 0.8
    bias = torch.randn(1, 4, 9, 9, generator=generator)
    bool_mask[..., 0] = True
    yield "plain", (), {}
    yield "positional", (None, 0.0, True), {}
    yield "causal", (), {"is_causal": True}
    yield "bool mask", (bool_mask,), {}
    yield "additive mask", (), {"attn_mask": bias}
    yield "positional mask", (bias, 0.0, False), {}
    yield "mask of rows and columns", (bool_mask[0, 0],), {}
    yield "no dropout", (), {"dropout_p": 0.0}
    yield "scale", (), {"scale": 0.3}
    yield "scale and mask", (bias,), {"scale": 1.0}
    yield "flag without groups", (), {"enable_gqa": True}


SDPA = list(sdpa_calls())


@backends
@pytest.mark.parametrize("args", SDPA, ids=lambda given: given[0])
def test_calls_of_sdpa(args: tuple[str, tuple, dict[str, Any]], backend: str) -> None:
    """Any call that F.scaled_dot_product_attention documents, the same results and gradients."""
    _, positional, keywords = args
    inputs = Case(2, 4, 9, 9, 16).inputs()[:3]

    def run(fn: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        def to(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        leaves = [to(t).clone().requires_grad_() for t in inputs]
        out = fn(*leaves, *map(to, positional), **{k: to(x) for k, x in keywords.items()})
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    ours = run(partial(vlm_kernels.attention, backend=backend), torch.float32)
    exact = run(F.scaled_dot_product_attention, torch.float64)
    peers = [run(fn, torch.float32) for fn in (F.scaled_dot_product_attention, reference.attention)]
    names = ("out", "query.grad", "key.grad", "value.grad")
    for name, value, right, *others in zip(names, ours, exact, *peers, strict=True):
        errors = [relative_error(other, right) for other in others]
        assert_close(name, value, max(errors), right, kind="fwd" if name == "out" else "bwd")


@backends
def test_grouped_calls_of_sdpa(backend: str) -> None:
    q, k, v, *_ = Case(2, 6, 5, 9, 16, kv_heads=2, dv=8).inputs()
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    ours = vlm_kernels.attention(q, k, v, enable_gqa=True, backend=backend)
    torch.testing.assert_close(ours, wanted)
    # More queries than keys under the causal rule, which is aligned at the first of both.
    for nq, nk in ((9, 4), (4, 9)):
        q, k, v, *_ = Case(1, 2, nq, nk, 8).inputs()
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        ours = vlm_kernels.attention(q, k, v, is_causal=True, backend=backend)
        torch.testing.assert_close(ours, wanted)


def test_a_mask_and_the_causal_rule_together() -> None:
    """SDPA refuses this: here both must allow a key."""
    q, k, v, *_ = Case(2, 2, 9, 9, 8).inputs()
    mask = torch.rand(9, 9) < 0.6
    both = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    for backend in ("reference", "cpu"):
        ours = vlm_kernels.attention(q, k, v, mask, is_causal=True, backend=backend)
        wanted = F.scaled_dot_product_attention(q, k, v, both).nan_to_num(0)
        torch.testing.assert_close(ours, wanted)


# --- autograd ---


EVERYTHING = Variant("range_each", "additive", "1hqk", 0.2, 4.0, "half", "layer", True, "bnhd")
LEAVES = spec.Inputs._fields


@backends
@pytest.mark.parametrize(
    "wanted",
    [(name,) for name in LEAVES] + [LEAVES[:2], LEAVES[1:3], LEAVES[::2], LEAVES[3:]],
    ids="+".join,
)
def test_only_some_gradients(wanted: tuple[str, ...], backend: str) -> None:
    case = Case(2, 2, 37, 50, 24, variant=EVERYTHING)
    inputs = case.inputs()
    for name, leaf in inputs.named().items():
        leaf.requires_grad_(name in wanted)
    fn = partial(vlm_kernels.attention, backend=backend)
    out, lse = spec.call(fn, inputs, {**case.keywords(), "return_lse": True})
    grad = spec.gradients(out, lse, True)
    pairs = [(out, grad.out), (lse, grad.lse)]
    torch.autograd.backward(*zip(*((t, g) for t, g in pairs if t.requires_grad), strict=True))
    for name, leaf in inputs.named().items():
        if name in wanted:
            assert leaf.grad is not None
            spec.check_result(case, f"{name}.grad", leaf.grad)
        else:
            assert leaf.grad is None


@backends
@dtypes
def test_lse_is_an_output_like_out(dtype: torch.dtype, backend: str) -> None:
    """Asking for it changes no bit; its gradient alone is one too."""
    fn = partial(vlm_kernels.attention, backend=backend)
    case = Case(2, 2, 33, 40, 24, dtype, Variant("range_heads"))
    keywords = case.keywords()
    leaves = case.inputs().map(lambda t: t.requires_grad_())
    out, lse = fn(*leaves[:3], **keywords, return_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 2, 33)
    plain = fn(*leaves[:3], **keywords)
    assert torch.equal(plain, out)
    for way in ((out, out), (plain, out)):
        a, b = (torch.autograd.grad(o.sum(), leaves[:3], retain_graph=True) for o in way)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    total = torch.where(lse == -math.inf, 0, lse).sum()
    [grad] = torch.autograd.grad(total, leaves.query)

    def of_query(way: Callable[..., Any], to: torch.dtype) -> Tensor:
        q, k, v = (t.detach().to(to).requires_grad_() for t in leaves[:3])
        _, lse = way(q, k, v, **keywords, return_lse=True)
        return torch.autograd.grad(torch.where(lse == -math.inf, 0, lse).sum(), q)[0]

    exact = of_query(reference.attention, torch.float64)
    errors = (
        relative_error(of_query(way, dtype), exact) for way in (reference.attention, flash(0))
    )
    assert_close("query.grad", grad, max(errors), exact, "bwd")


@backends
def test_no_gradient_wanted(backend: str) -> None:
    fn = partial(vlm_kernels.attention, backend=backend)
    inputs = Case(2, 2, 20, 20, 16).inputs()[:3]
    plain = fn(*inputs)
    assert not plain.requires_grad
    for leaf in inputs:
        leaf.requires_grad_()
    assert fn(*inputs).requires_grad
    with torch.no_grad():
        without = fn(*inputs)
    with torch.inference_mode():
        inference = fn(*inputs)
    assert not without.requires_grad
    assert inference.is_inference()
    for value in (without, inference):
        assert torch.equal(value.clone(), plain)


@backends
@dtypes
def test_backward_twice_is_the_same(dtype: torch.dtype, backend: str) -> None:
    leaves = Case(2, 2, 50, 50, 33, dtype).inputs().map(lambda t: t.requires_grad_())
    out = vlm_kernels.attention(*leaves[:3], backend=backend)
    first = torch.autograd.grad(out.sum(), leaves[:3], retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@backends
def test_two_graphs_alive(backend: str) -> None:
    """What a forward keeps for its backward must outlive another forward."""
    fn = partial(vlm_kernels.attention, backend=backend)
    case = Case(2, 2, 130, 130, 40)
    inputs = [case.inputs(seed) for seed in range(2)]
    wanted = [spec.evaluate(fn, each, {}) for each in inputs]
    leaves = [each.map(lambda t: t.clone().requires_grad_()) for each in inputs]
    outs = [fn(*each[:3]) for each in leaves]
    for i in (1, 0):
        outs[i].backward(spec.gradients(outs[i], outs[i], False).out)
    for i in range(2):
        for name, leaf in leaves[i].named().items():
            assert torch.equal(leaf.grad, wanted[i][f"{name}.grad"]), name


@backends
def test_one_tensor_for_all_three(backend: str) -> None:
    """The gradients of its parts meet in one leaf, also those of slices of a packed projection."""
    fn = partial(vlm_kernels.attention, backend=backend)
    packed = torch.randn(2, 17, 3, 4, 16, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    [grad] = torch.autograd.grad(fn(q, k, v).cos().sum(), packed)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    parts = torch.autograd.grad(fn(*leaves).cos().sum(), leaves)
    assert torch.equal(grad, torch.stack([t.transpose(1, 2) for t in parts], 2))
    x = q.detach().requires_grad_()
    [grad] = torch.autograd.grad(fn(x, x, x).cos().sum(), x)
    parts = [t.detach().requires_grad_() for t in (x, x, x)]
    parts = torch.autograd.grad(fn(*parts).cos().sum(), parts)
    torch.testing.assert_close(grad, sum(parts))


@needs_cpu
def test_input_changed_between_forward_and_backward() -> None:
    q, k, v, *_ = Case(1, 2, 9, 9, 8).inputs()
    out = CPU(q.requires_grad_(), k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@needs_cpu
def test_fp64_runs_on_the_reference() -> None:
    q, k, v, *_ = Case(1, 2, 9, 9, 8, torch.float64).inputs()
    out = vlm_kernels.attention(q, k, v)
    assert out.dtype == torch.float64
    assert torch.equal(out, reference.attention(q, k, v))
    with pytest.raises(RuntimeError, match="cpu"):
        CPU(q, k, v)


# --- determinism, threads, instruction sets ---

# Few heads and many keys, many heads, few queries, groups, every keyword: each way to split work.
TELLING = [
    Case(1, 1, 300, 300, 40),
    Case(1, 1, 300, 300, 40, torch.bfloat16),
    Case(3, 4, 70, 70, 64, torch.bfloat16, Variant("causal", lse=True)),
    Case(1, 2, 5, 1500, 32, torch.float16),
    Case(1, 6, 129, 130, 72, variant=Variant(norm="rms", rope="half"), kv_heads=2),
    Case(2, 3, 66, 140, 24, torch.bfloat16, EVERYTHING),
    Case(2, 3, 66, 140, 24, variant=replace(EVERYTHING, mask_shape="11qk", norm="rms_bias_heads")),
]
telling = pytest.mark.parametrize("case", TELLING, ids=str)


@needs_cpu
@telling
def test_bitwise_repeat_on_any_number_of_threads(case: Case) -> None:
    results = []
    for count in (1, 1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(evaluate(case))
    for other in results[1:]:
        same(results[0], other)


@needs_cpu
@pytest.mark.parametrize("case", [case for case in TELLING if case.b > 1], ids=str)
def test_a_batch_entry_does_not_know_the_others(case: Case) -> None:
    """But for the last bits: where entries are few, the work is split in another way."""
    inputs, keywords = case.inputs(), case.keywords()
    fn = partial(spec.call, CPU)
    whole = fn(inputs, keywords)
    for i in range(case.b):
        one = inputs._replace(**{n: getattr(inputs, n)[i : i + 1] for n in LEAVES[:3]})
        given = dict(keywords)
        if "kv_range" in given:
            given["kv_range"] = given["kv_range"][i : i + 1]
        part = fn(one, given)
        torch.testing.assert_close(part, whole[i : i + 1])


@needs_cpu
@telling
def test_each_way_to_split_the_work(case: Case, isas: Callable[[], Iterator[str]]) -> None:
    for _ in isas():
        spec.check(case, CPU)


@needs_cpu
@telling
def test_calls_from_several_threads(case: Case) -> None:
    """They must not share scratch."""
    inputs, keywords = [case.inputs(seed) for seed in range(3)], case.keywords()

    def run(each: spec.Inputs) -> dict[str, Tensor]:
        return spec.evaluate(CPU, each, keywords, case.variant.lse)

    wanted = [run(each) for each in inputs]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(run, inputs * 3))
    for i, results in enumerate(got):
        same(results, wanted[i % 3])


# --- wrong input ---

Q = torch.randn(2, 4, 6, 8)
RANGE = torch.zeros(1, 1, 6, 2, dtype=torch.int32)
TABLE = torch.ones(6, 4)
WEIGHT = torch.ones(8)
WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"query": [1.0]}, ("query", "list")),
    ({"query": Q[0]}, ("query", r"\(B, H, Nq?, D\)")),
    ({"key": Q[0]}, ("key", r"\(B, H(kv)?, Nk?, D\)")),
    ({"query": Q.bfloat16()}, ("(?i)bfloat16", "Float|float32")),
    ({"value": Q.half()}, ("Half|float16", "Float|float32")),
    ({"query": Q.int(), "key": Q.int(), "value": Q.int()}, ("Int|int32",)),
    ({"key": Q[..., :4]}, ("8", "4")),
    ({"value": Q[:, :, :5]}, ("value", "5")),
    ({"query": Q[:1]}, ("1", "2")),
    ({"key": Q[:, :2], "value": Q[:, :2]}, ("enable_gqa",)),
    ({"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True}, ("heads", "4", "3")),
    ({"dropout_p": 0.1}, ("dropout_p", "0.1", "no dropout")),
    ({"attn_mask": torch.ones(6, 7)}, ("attn_mask", "7")),
    ({"attn_mask": torch.ones(6, 6, dtype=torch.int64)}, ("attn_mask", "Long|int64")),
    ({"attn_mask": torch.ones(6, 6, dtype=torch.float16)}, ("attn_mask", "Half|float16")),
    ({"attn_mask": torch.ones(3, 2, 4, 6, 6)}, ("attn_mask",)),
    ({"kv_range": RANGE.long()}, ("kv_range", "Long|int64", "int32|Int")),
    ({"kv_range": RANGE[0]}, ("kv_range",)),
    ({"kv_range": RANGE[..., :1]}, ("kv_range",)),
    ({"kv_range": RANGE.expand(3, 1, 6, 2)}, ("kv_range", "3")),
    ({"kv_range": RANGE[:, :, :5]}, ("kv_range", "5")),
    ({"window": 3}, ("window", "3", "left, right")),
    ({"window": (1, -3)}, ("window", "-3")),
    ({"softcap": -1.0}, ("softcap", "-1")),
    ({"softcap": math.nan}, ("softcap", "nan")),
    ({"scale": math.inf}, ("scale", "inf")),
    ({"scale": "1"}, ("scale", "str")),
    ({"rope": TABLE}, ("rope", "Tensor", "cos, sin")),
    ({"rope": (TABLE, TABLE, "neox")}, ("neox", "half", "interleaved")),
    ({"rope": (TABLE.double(), TABLE)}, ("rope", "Double|float64", "fp32|float32|Float")),
    ({"rope": (TABLE, TABLE[:, :2])}, ("rope", "2")),
    ({"rope": (TABLE[:5], TABLE[:5])}, ("rope", "5")),
    ({"rope": (TABLE.repeat(1, 2), TABLE.repeat(1, 2))}, ("rope", "8")),
    ({"query": Q.repeat(1, 1, 2, 1), "rope": (TABLE, TABLE)}, ("rope", "12", "6")),
    ({"q_norm": (WEIGHT, None, 1e-6)}, ("q_norm", "eps")),
    ({"q_norm": (WEIGHT, None, 1e-6, "batch")}, ("q_norm", "batch", "rms", "layer")),
    ({"q_norm": (None, None, 1e-6, "rms")}, ("q_norm", "weight")),
    ({"k_norm": (WEIGHT[:4], None, 1e-6, "rms")}, ("k_norm", "4", "8")),
    ({"k_norm": (WEIGHT, WEIGHT.expand(4, 8), 1e-6, "rms")}, ("k_norm", "bias")),
    ({"k_norm": (WEIGHT, None, -1.0, "rms")}, ("k_norm", "eps", "-1")),
    ({"backend": "tpu"}, ("backend", "tpu", "reference")),
]


@backends
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: "-".join((*w[0], *w[1])))
def test_wrong_input(wrong: tuple[dict[str, Any], tuple[str, ...]], backend: str) -> None:
    given, words = wrong
    arguments = {"query": Q, "key": Q, "value": Q, "backend": backend}
    # RuntimeError: a backend that was asked for and says why it cannot.
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        vlm_kernels.attention(**{**arguments, **given})
    message = str(caught.value)
    for word in ("attention", *words):
        assert re.search(word, message), f"no {word!r} in: {message}"


@needs_cpu
def test_heads_of_more_features_run_on_the_reference() -> None:
    q = torch.randn(1, 1, 3, 257)
    with pytest.raises(ValueError, match=r"257.*256"):
        CPU(q, q, q)
    out = vlm_kernels.attention(q, q, q, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
