"""attention_varlen: packed segments against fp64 and against calls of their own."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Variant, VarlenCase

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CPU = partial(vlm_kernels.attention_varlen, backend="cpu")


def packed(x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """A segment as a batch of one, (1, H, n, D)."""
    return x[int(begin) : int(end)].transpose(0, 1)[None]


# --- accuracy ---


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """A function that goes through the instruction sets that this CPU has."""
    extension = importlib.import_module("vlm_kernels._C")
    before = extension.cpu_isa()

    def each() -> Iterator[str]:
        for name in extension.cpu_isas():
            extension.set_cpu_isa(name)
            yield name

    yield each
    extension.set_cpu_isa(before)


@needs_cpu
@pytest.mark.parametrize("case", spec.varlen_cases(), ids=str)
def test_accuracy(case: VarlenCase, isas: Callable[[], Iterator[str]]) -> None:
    """With each instruction set."""
    for _ in isas():
        spec.check(case, CPU)


@pytest.mark.parametrize("case", spec.varlen_cases()[::6], ids=str)
def test_accuracy_of_the_reference(case: VarlenCase) -> None:
    spec.check(case, partial(vlm_kernels.attention_varlen, backend="reference"))


# What a NaViT batch may hold: images of 64 to 1024 tokens.
IMAGES = (64, 1024, 100, 256, 729, 81, 196, 577, 70, 400, 169, 225, 65, 324, 144, 576)


@needs_cpu
@dtypes
def test_sixteen_images(dtype: torch.dtype) -> None:
    assert len(IMAGES) == 16
    spec.check(VarlenCase(tuple((n, n) for n in IMAGES), 1, 72, dtype), CPU)


@needs_cpu
@dtypes
def test_segments_of_very_different_length(dtype: torch.dtype) -> None:
    segments = ((1, 1),) * 40 + ((3, 900),) + ((2, 2),) * 30 + ((300, 1),) + ((1, 1),)
    spec.check(VarlenCase(segments, 2, 40, dtype, Variant(lse=True), outside=5), CPU)


# --- against the same without packing ---


@needs_cpu
@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant("causal", lse=True),
        Variant("causal_window", softcap=4.0, norm="layer", rope="interleaved"),
        Variant("window", rope="partial", norm="rms_bias_heads", scale=0.3),
    ],
    ids=str,
)
@dtypes
def test_a_segment_is_a_call_of_its_own(variant: Variant, dtype: torch.dtype) -> None:
    """As exact as `attention` of each segment, and the very same rows where none is split."""
    segments = ((17, 17), (0, 0), (3, 80), (64, 64), (1, 1))
    case = VarlenCase(segments, 4, 32, dtype, variant, kv_heads=2, outside=2)
    spec.check(case, CPU)
    dense = spec.per_segment(partial(vlm_kernels.attention, backend="cpu"))
    results = [
        spec.evaluate(fn, case.inputs(), case.keywords(), variant.lse) for fn in (CPU, dense)
    ]
    for name, value in results[1].items():
        spec.check_result(case, name, value)
        torch.testing.assert_close(results[0][name], value)


@needs_cpu
@dtypes
def test_equal_segments_are_a_batch(dtype: torch.dtype) -> None:
    q, k, v, *_ = spec.make_inputs(4, 3, 64, 64, 80, dtype, layout="bnhd")
    cu_seqlens = torch.arange(0, 5 * 64, 64, dtype=torch.int32)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    out, lse = CPU(*rows, cu_seqlens, cu_seqlens, return_lse=True)
    wanted, wanted_lse = vlm_kernels.attention(q, k, v, return_lse=True, backend="cpu")
    torch.testing.assert_close(out, wanted.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(lse, wanted_lse.transpose(0, 1).flatten(1))


@backends
def test_causal_rule_and_window_are_aligned_at_the_end(backend: str) -> None:
    """As in flash-attention: the last query of a segment sees its last key."""
    case = VarlenCase(((2, 5), (4, 2), (3, 3)), 1, 8)
    q, k, v, *_ = case.inputs()
    keywords = case.keywords()
    fn = partial(vlm_kernels.attention_varlen, q, k, v, **keywords, backend=backend)
    for given, left, right in (
        ({"is_causal": True}, None, 0),
        ({"window": (1, -1)}, 1, None),
        ({"window": (1, 0)}, 1, 0),
        ({"window": (0, 2), "is_causal": True}, 0, 0),
    ):
        out = fn(**given)
        bounds = zip(*(c.tolist() for c in keywords.values()), strict=True)
        (q0, k0), *rest = bounds
        for q1, k1 in rest:
            place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            j = torch.arange(k1 - k0)
            seen = torch.ones_like(place == j)
            seen &= (j >= place - left) if left is not None else seen
            seen &= (j <= place + right) if right is not None else seen
            part = (packed(q, q0, q1), packed(k, k0, k1), packed(v, k0, k1))
            wanted = F.scaled_dot_product_attention(*part, seen).nan_to_num(0)
            torch.testing.assert_close(packed(out, q0, q1), wanted)
            q0, k0 = q1, k1


@backends
def test_positions_begin_again_in_each_segment(backend: str) -> None:
    """Tables by key row: those of a segment give what positions from 0 give."""
    lengths, r = (5, 9, 1), 8
    angle = torch.cat([torch.arange(n)[:, None] * torch.linspace(1, 0.01, r // 2) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = torch.randn(3, 15, 2, 16)
    rope = (angle.cos(), angle.sin())
    fn = partial(vlm_kernels.attention_varlen, backend=backend)
    out = fn(q, k, v, cu_seqlens, cu_seqlens, rope=rope)
    for begin, end in pairwise(cu_seqlens):
        part = [packed(t, begin, end) for t in (q, k, v)]
        n = int(end - begin)
        tables = tuple(t[5 : 5 + n] for t in rope)  # of the longest
        wanted = vlm_kernels.attention(*part, rope=tables, backend=backend)
        torch.testing.assert_close(packed(out, begin, end), wanted)


# --- what is in no segment ---


@backends
@dtypes
def test_rows_outside(dtype: torch.dtype, backend: str) -> None:
    """They have 0 and -inf whatever is in them, and gradients of 0."""
    q, k, v = (torch.randn(n, h, 8).to(dtype) for n, h in ((9, 4), (12, 2), (12, 2)))
    cu_q, cu_k = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 10])
    for t, end in ((q, 6), (k, 10), (v, 10)):
        t[end:] = math.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    fn = partial(vlm_kernels.attention_varlen, backend=backend)
    out, lse = fn(*leaves, cu_q, cu_k, return_lse=True)
    assert not out[6:].any()
    assert (lse[:, 6:] == -math.inf).all()
    assert out.isfinite().all()
    assert lse[:, :6].isfinite().all()
    for grad, end in zip(torch.autograd.grad(out.sum(), leaves), (6, 10, 10), strict=True):
        assert not grad[end:].any()
        assert grad.isfinite().all()


@backends
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_segment_with_rows(lengths: tuple[int, ...], backend: str) -> None:
    segments = tuple((n, n) for n in lengths)
    for outside in (0, 3):
        case = VarlenCase(segments, 2, 8, outside=outside, variant=Variant(lse=True))
        results = spec.check(case, partial(vlm_kernels.attention_varlen, backend=backend))
        assert results["out"].shape == (outside, 2, 8)
        assert results["lse"].shape == (2, outside)


@backends
def test_a_nan_stays_in_its_segment(backend: str) -> None:
    case = VarlenCase(((20, 20), (30, 30), (10, 10)), 2, 16)
    for name in ("query", "key", "value"):
        inputs = case.inputs()
        getattr(inputs, name)[25, 1, 3] = math.nan
        fn = partial(vlm_kernels.attention_varlen, backend=backend)
        results = spec.evaluate(fn, inputs, case.keywords())
        for result, value in results.items():
            rows = value.transpose(0, 1) if result == "lse" else value
            assert rows[:20].isfinite().all(), result
            assert rows[50:].isfinite().all(), result
        assert results["out"][20:50].isnan().any()


# --- results ---


@backends
@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_shape_and_layout_of_the_results(layout: str, backend: str) -> None:
    case = VarlenCase(((5, 7), (3, 2)), 4, 8, variant=Variant(layout=layout), kv_heads=2, dv=6)
    fn = partial(vlm_kernels.attention_varlen, backend=backend, return_lse=True)
    out, lse = spec.call(fn, case.inputs(), case.keywords())
    assert out.shape == (8, 4, 6)
    assert out.is_contiguous()
    assert (lse.shape, lse.dtype) == ((4, 8), torch.float32)
    fn = partial(vlm_kernels.attention_varlen, backend=backend)
    assert torch.equal(spec.call(fn, case.inputs(), case.keywords()), out)


@needs_cpu
@dtypes
def test_bitwise_repeat_on_any_number_of_threads(dtype: torch.dtype) -> None:
    segments = ((64, 64), (1, 300), (130, 130), (7, 0), (33, 33))
    variant = Variant("causal_window", softcap=4.0, norm="layer_heads", rope="half", lse=True)
    for each in (Variant(), variant):
        chosen = segments if each.rope == "none" else tuple((min(s), max(s)) for s in segments)
        case = VarlenCase(chosen, 4, 40, dtype, each, kv_heads=2)
        results = []
        for count in (1, 1, 2, 4):
            torch.set_num_threads(count)
            results.append(spec.evaluate(CPU, case.inputs(), case.keywords(), each.lse))
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), name


@needs_cpu
def test_order_of_segments_does_not_matter() -> None:
    """Bitwise: images of a batch do not know each other."""
    case = VarlenCase(((64, 64), (30, 30), (129, 129)), 2, 40)
    q, k, v, *_ = case.inputs()
    cu_seqlens = case.keywords()["cu_seqlens_q"]
    out = CPU(q, k, v, cu_seqlens, cu_seqlens)
    parts = list(pairwise(cu_seqlens.tolist()))
    order = (2, 0, 1)
    rows = torch.cat([torch.arange(*parts[i]) for i in order])
    lengths = torch.tensor([0, *(parts[i][1] - parts[i][0] for i in order)]).cumsum(0)
    assert torch.equal(CPU(q[rows], k[rows], v[rows], lengths, lengths), out[rows])


# --- wrong input ---

X = torch.randn(10, 4, 8)
GOOD = torch.tensor([0, 4, 10])
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q is list"),
    ({"cu_seqlens_k": GOOD.float()}, "cu_seqlens_k"),
    ({"cu_seqlens_k": GOOD[:2]}, "cu_seqlens"),
    ({"cu_seqlens_q": GOOD[None]}, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([0, 7, 4])}, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([1, 7, 10])}, "cu_seqlens_q"),
    ({"cu_seqlens_k": torch.tensor([0, 7, 11])}, "cu_seqlens_k"),
    ({"cu_seqlens_k": torch.tensor([0, -7, 10])}, "cu_seqlens_k"),
    ({"query": X[None]}, "query"),
    ({"key": X[:, :3], "value": X[:, :3]}, "head"),
    ({"key": X[..., :4]}, "key"),
    ({"value": X[:9]}, "value"),
    ({"window": (1, 2, 3)}, "window"),
    ({"window": (-2, 0)}, "window"),
    ({"rope": (torch.ones(9, 4), torch.ones(9, 4))}, "rope"),
    ({"rope": (torch.ones(10, 5), torch.ones(10, 5))}, "rope"),
    (
        {
            "cu_seqlens_k": torch.tensor([0, 3, 10]),
            "rope": (torch.ones(10, 4), torch.ones(10, 4)),
        },
        "rope",
    ),
]


@backends
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: "-".join((*w[0], w[1])))
def test_wrong_input(wrong: tuple[dict[str, Any], str], backend: str) -> None:
    given, word = wrong
    arguments = {"query": X, "key": X, "value": X, "cu_seqlens_q": GOOD, "cu_seqlens_k": GOOD}
    with pytest.raises((ValueError, TypeError), match=f"attention_varlen.*{word}"):
        vlm_kernels.attention_varlen(**{**arguments, **given}, backend=backend)


@needs_cpu
def test_both_dtypes_of_offsets() -> None:
    case = VarlenCase(((5, 7), (3, 2)), 4, 8)
    results = []
    for index in (torch.int32, torch.int64):
        other = replace(case, index=index)
        assert other.keywords()["cu_seqlens_q"].dtype == index
        results.append(spec.call(CPU, other.inputs(), other.keywords()))
    assert torch.equal(*results)
