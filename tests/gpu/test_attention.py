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
LONGEST_SHORT = 257
"""Keys that the short kernels take at every head dim up to 128."""


@pytest.fixture(params=["auto", "short", "long"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
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
    if kernels == "short" and case.nk > LONGEST_SHORT:
        pytest.skip(f"the short kernels take no {case.nk} keys at every head dim")
    check(case, function(case.op, "cuda"))


@pytest.mark.parametrize("keys", ["all", "causal", "window"])
@pytest.mark.parametrize("segments", spec.PACKED, ids=len)
def test_packed(segments: tuple[tuple[int, int], ...], keys: str, kernels: str) -> None:
    """Lengths stay on the device, so that only the long kernels are for packed batches."""
    if kernels == "short":
        pytest.skip("the short kernels know the keys of a head beforehand")
    check(
        VarlenCase(segments, 2, 72, BF16, Variant(keys), outside=2),
        function("attention_varlen", "cuda"),
    )


@pytest.mark.parametrize("kind", CALLS)
def test_repeats_without_waiting(kind: str, kernels: str) -> None:
    call = make(kind, "cuda")
    if kernels == "short" and (kind in ("long", "few_queries", "varlen")):
        pytest.skip(f"the short kernels are not for a call that is {kind}")
    first = call()
    with no_waiting():
        again = call()
    assert same(again, first)


def test_offsets_are_checked_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = function("attention_varlen", "cuda")
    x = torch.randn(20, 2, 64, device="cuda", dtype=BF16)
    falling = torch.tensor([0, 15, 10], device="cuda", dtype=torch.int32)
    fn(x, x, x, falling, falling)
    monkeypatch.setenv("VLM_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens_q falls from 15 to 10"):
        fn(x, x, x, falling, falling)


def test_an_unknown_choice_is_refused() -> None:
    function("attention", "cuda")
    with pytest.raises(ValueError, match="short"):
        _load._C.set_attention_kernels("medium")
