"""attention and attention_varlen on their CUDA kernels, emulated: forward, backward and what the
plan of a call puts around them. What is a kernel's own has a file of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase

pytestmark = pytest.mark.usefixtures("emulated_attention")
BF16, F16 = LOW = spec.DTYPES[1:]
kernels = pytest.mark.parametrize("kernels", ["short", "long"])


def check(case: AnyCase) -> dict[str, Tensor]:
    return spec.check(case, partial(getattr(vlm_kernels, case.op), backend="cpu"))


def variants() -> list[AnyCase]:
    """Each choice of each keyword once; dtypes and shapes take turns."""
    sizes = ((2, 4, 33, 50, 40), (1, 2, 66, 70, 72), (1, 4, 20, 81, 64))
    cases: list[AnyCase] = []
    for i, variant in enumerate(spec.covering_variants()):
        grouped = {"kv_heads": 2} if i % 3 == 0 else {}
        cases.append(Case(*sizes[i % 3], LOW[i % 2], variant, **grouped))
    for i, variant in enumerate(spec.covering_variants("attention_varlen")):
        segments = ((33, 40), (0, 5), (1, 66), (17, 17))
        grouped = {"kv_heads": 1} if i % 3 == 0 else {}
        index = (torch.int32, torch.int64)[i % 2]
        cases.append(
            VarlenCase(segments, 2, 24, LOW[i % 2], variant, outside=i % 3, index=index, **grouped)
        )
    return cases


@pytest.mark.parametrize("case", variants(), ids=str)
def test_variants(case: AnyCase) -> None:
    check(case)


@kernels
def test_bitwise_repeat(emulated_attention: Any, kernels: str) -> None:
    emulated_attention.set_attention_kernels(kernels)
    variant = Variant("range_each", "additive", "1hqk", rope="half", norm="rms", lse=True)
    case = Case(2, 2, 40, 70, 64, BF16, variant)
    first, again = check(case), check(case)
    assert all(torch.equal(first[key], again[key]) for key in first)


@kernels
def test_gradients_that_nobody_needs(emulated_attention: Any, kernels: str) -> None:
    """Each gradient alone is what it is among all of them."""
    emulated_attention.set_attention_kernels(kernels)
    variant = Variant(mask="additive", norm="layer", rope="half", lse=True)
    case = Case(1, 2, 30, 70, 32, F16, variant)
    inputs, keywords = case.inputs(), case.keywords()
    fn = partial(vlm_kernels.attention, backend="cpu")
    every = spec.evaluate(fn, inputs, keywords, with_lse=True)
    for name in inputs.named():
        leaves = {key: x.detach() for key, x in inputs.named().items()}
        leaves[name].requires_grad_()
        out, lse = spec.call(fn, spec.Inputs(**leaves), {**keywords, "return_lse": True})
        grads = spec.gradients(out, lse, True)
        [grad] = torch.autograd.grad([out, lse], [leaves[name]], [grads.out, grads.lse])
        assert torch.equal(grad, every[f"{name}.grad"]), name


@kernels
def test_backward_twice(emulated_attention: Any, kernels: str) -> None:
    emulated_attention.set_attention_kernels(kernels)
    query, key, value, *_ = spec.make_inputs(1, 2, 20, 20, 16, BF16)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = vlm_kernels.attention(*leaves, backend="cpu")
    first = torch.autograd.grad(out.float().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.float().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_kernels_agree_where_both_can_run(emulated_attention: Any) -> None:
    case = Case(1, 2, 65, 70, 80, BF16, Variant("causal_window"))
    results = []
    for kernels in ("short", "long"):
        emulated_attention.set_attention_kernels(kernels)
        results.append(check(case))
    assert any(not torch.equal(a, b) for a, b in zip(*(r.values() for r in results)))
    with pytest.raises(ValueError, match="'auto', 'short' or 'long'"):
        emulated_attention.set_attention_kernels("other")


@pytest.mark.parametrize("dims", [(0, 2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)], ids=str)
def test_empty(dims: tuple[int, int, int, int]) -> None:
    check(Case(*dims, 16, BF16, Variant(lse=True)))


def test_rows_that_the_copies_cannot_take() -> None:
    """Rows that do not begin at multiples of 16 bytes are copied first."""
    case = Case(1, 2, 20, 30, 24, BF16)
    inputs = case.inputs()

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x], -1)[..., 1:]

    views = inputs.map(shifted)
    assert views.query.data_ptr() % 16
    fn = partial(vlm_kernels.attention, backend="cpu")
    for name, value in spec.evaluate(fn, views, {}).items():
        spec.check_result(case, name, value)


def test_ranges_at_an_odd_offset() -> None:
    query, key, value, *_ = spec.make_inputs(1, 1, 9, 12, 16, BF16)
    ranges = spec.KEYS["range"](1, 1, 9, 12, torch.Generator().manual_seed(0))["kv_range"]
    odd = torch.cat([torch.zeros(1, dtype=torch.int32), ranges.flatten()])[1:].view(ranges.shape)
    assert odd.data_ptr() % 8
    results = [
        vlm_kernels.attention(query, key, value, kv_range=r, backend="cpu") for r in (ranges, odd)
    ]
    assert torch.equal(*results)


def test_offsets_that_hold_anything() -> None:
    """They are clamped, never read on the host: no row is out of bounds, all are written."""
    case = VarlenCase(((9, 9), (20, 20)), 1, 16, BF16)
    query, key, value, *_ = case.inputs()
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    for offsets in ([7, 100, -3], [-(2**31), 2**31 - 1, 5], [0, 0, 0], [29, 0, 29]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        out, lse = vlm_kernels.attention_varlen(
            *leaves, cu, cu, is_causal=True, return_lse=True, backend="cpu"
        )
        assert out.isfinite().all()
        assert not lse.isnan().any()
        grads = torch.autograd.grad(out.float().sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)


def test_masks_of_few_dimensions() -> None:
    for i, shape in enumerate(("hqk", "qk", "1k", "q1", "k", "")):
        variant = replace(Variant(lse=True), mask="additive_fp32", mask_shape=shape)
        check(Case(2, 2, 20, 37, 16, LOW[i % 2], variant))


def test_what_the_kernels_do_not_take_is_an_error() -> None:
    query, key, value, *_ = spec.make_inputs(1, 1, 4, 4, 16)
    with pytest.raises(TypeError, match=r"bfloat16 and float16.*triton"):
        vlm_kernels.attention(query, key, value, backend="cpu")
    for d in (12, 136):
        query, key, value, *_ = spec.make_inputs(1, 1, 4, 4, d, BF16)
        with pytest.raises(ValueError, match="multiples of 8 up to 128"):
            vlm_kernels.attention(query, key, value, backend="cpu")
