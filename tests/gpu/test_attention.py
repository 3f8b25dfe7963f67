"""The CUDA kernels of attention: short and long ones, chosen by hand and by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.helpers import function, no_waiting, same
from tests.gpu.test_attention_backends import CALLS, check, make
from vlm_kernels import _load
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["auto", "short", "long"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """A choice of kernels. One that cannot run a call leaves it to the other, so each may meet all
    shapes."""
    function("attention", "cuda")  # skips where there is none
    _load._C.set_attention_kernels(request.param)
    yield request.param
    _load._C.set_attention_kernels("auto")


def cases() -> list[AnyCase]:
    """Around the tiles of both kernels, and where one takes over from the other."""
    found: list[AnyCase] = [
        Case(2, 2, n, n, (64, 72, 80, 88, 128)[i % 5], (BF16, FP16)[i % 2], Variant(lse=i % 2 == 0))
        for i, n in enumerate((1, 16, 63, 64, 65, 196, 197, 256, 257, 300, 319, 320, 321, 400))
    ]
    for i, keys in enumerate(("causal", "window", "range_each", "prefix_lm", "per_image")):
        found.append(Case(1, 4, 130, 197, 72, BF16, Variant(keys, softcap=(0.0, 5.0)[i % 2])))
    found += [
        Case(1, 4, 197, 197, 80, BF16, Variant(rope="half", norm="rms", lse=True), kv_heads=2),
        Case(2, 2, 257, 257, 104, FP16, Variant(mask="additive", mask_shape="1hqk")),
        Case(1, 2, 65, 130, 112, BF16, Variant(mask="bool", layout="gaps")),
        Case(1, 2, 400, 32, 64, BF16),
        Case(1, 2, 197, 197, 64, BF16, logit=8.0),
    ]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_dense(case: Case, kernels: str) -> None:
    check(case, function(case.op, "cuda"))


@pytest.mark.parametrize("keys", ["all", "causal", "window"])
@pytest.mark.parametrize("segments", spec.PACKED, ids=len)
def test_packed(segments: tuple[tuple[int, int], ...], keys: str, kernels: str) -> None:
    check(
        VarlenCase(segments, 2, 72, BF16, Variant(keys), outside=2),
        function("attention_varlen", "cuda"),
    )


@pytest.mark.parametrize("kind", CALLS)
def test_repeats_without_waiting(kind: str, kernels: str) -> None:
    call = make(kind, "cuda")
    first = call()
    with no_waiting():
        again = call()
    assert same(again, first)


def test_the_choice_makes_a_difference() -> None:
    """Sums of another order: else one kernel was tested twice."""
    fn = function("attention", "cuda")
    q, k, v = Case(4, 4, 257, 257, 80, FP16).inputs(0, "cuda")[:3]
    outs = []
    for choice in ("short", "long"):
        _load._C.set_attention_kernels(choice)
        try:
            outs.append(fn(q, k, v))
        finally:
            _load._C.set_attention_kernels("auto")
    assert not torch.equal(*outs)
    assert any(torch.equal(fn(q, k, v), out) for out in outs)  # and "auto" is one of them


def test_an_unknown_choice_is_refused() -> None:
    function("attention", "cuda")
    with pytest.raises(ValueError, match="short"):
        _load._C.set_attention_kernels("medium")
