"""The forward of attention for short rows, emulated: keys and values stay in shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant
from vlm_kernels.testing.tolerances import relative_error

LOW = spec.DTYPES[1:]


@pytest.fixture(autouse=True)
def _short(emulated_attention: Any) -> None:
    emulated_attention.set_attention_kernels("short")


def attention(*args: Any, **keywords: Any) -> Any:
    return vlm_kernels.attention(*args, backend="cpu", **keywords)


def check(case: Case) -> dict[str, Tensor]:
    """Output and log-sum-exp against the rule of accuracy; the gradients are not this kernel's."""
    with torch.no_grad():
        out, lse = spec.call(attention, case.inputs(), {**case.keywords(), "return_lse": True})
    spec.check_result(case, "out", out)
    spec.check_result(case, "lse", lse)
    assert not out[lse == -torch.inf].any()
    return {"out": out, "lse": lse}


# Each number of tiles that an instance begins or ends with, and head dims with every tail.
SHAPES = (
    (2, 1, 64, 64, 64),
    (1, 2, 65, 65, 72),
    (1, 1, 128, 128, 8),
    (1, 1, 129, 129, 16),
    (1, 1, 197, 197, 80),
    (1, 1, 208, 208, 24),
    (1, 1, 33, 209, 112),
    (1, 1, 257, 257, 64),
    (1, 1, 1, 272, 104),
    (1, 2, 140, 272, 88),  # a CTA of eight warps
    (1, 1, 17, 273, 40),
    (1, 1, 5, 320, 48),
    (1, 3, 16, 1, 128),
    (4, 6, 130, 20, 16),  # warps with several blocks of queries
)


@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_shapes(i: int) -> None:
    check(Case(*SHAPES[i], LOW[i % 2], Variant(layout=spec.LAYOUTS[i % 4])))


def variants() -> list[Case]:
    """Each choice of each keyword once; dtypes, shapes and groups of heads take turns."""
    sizes = ((2, 4, 70, 70, 40), (1, 2, 33, 131, 64), (2, 2, 129, 129, 72))
    found = []
    for i, variant in enumerate(spec.covering_variants()):
        grouped = {"kv_heads": (1, 2)[i // 3 % 2]} if i % 3 == 0 else {}
        found.append(Case(*sizes[i % 3], LOW[i % 2], variant, **grouped))
    return found


@pytest.mark.parametrize("case", variants(), ids=str)
def test_variants(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dims", [(8, 120), (128, 24), (72, 48), (64, 56)], ids=str)
def test_head_dims_that_differ(dims: tuple[int, int]) -> None:
    """Values of 8, 16, 24 and 32 features beyond the last 32."""
    check(Case(2, 6, 40, 50, dims[0], torch.bfloat16, Variant("causal"), kv_heads=2, dv=dims[1]))


@pytest.mark.parametrize("logit", [0.01, 30.0, 300.0])
def test_logits_of_any_size(logit: float) -> None:
    check(Case(1, 2, 40, 100, 64, LOW[logit > 1], Variant(scale=-0.5), logit=logit))


def test_gradients_from_this_forward() -> None:
    spec.check(Case(1, 2, 65, 65, 72, torch.bfloat16, Variant("causal", lse=True)), attention)


def test_results_do_not_depend_on_who_else_is_there() -> None:
    """Nor on how many CTAs share a head, or on which of them a block of queries falls."""
    inputs = Case(5, 4, 150, 90, 64, torch.bfloat16, kv_heads=4).inputs()
    both = attention(*inputs[:3], return_lse=True)
    again = attention(*inputs[:3], return_lse=True)
    few = attention(*(t[3:4, 1:2, :70] for t in inputs[:1]), *(t[3:4, 1:2] for t in inputs[1:3]))
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert torch.equal(both[0][3:4, 1:2, :70], few)


def test_nan_stays_where_it_may_be_seen() -> None:
    query, key, value, *_ = Case(1, 2, 40, 80, 64, torch.float16).inputs()
    exact = attention(query, key, value, is_causal=True, return_lse=True)
    query[:, :, 7] = key[:, :, 20] = torch.nan
    key[:, :, 40:] = torch.nan
    value[:, :, 48:] = torch.inf  # in tiles that no query sees
    found = attention(query, key, value, is_causal=True, return_lse=True)
    spoilt = torch.arange(40) >= 20
    spoilt[7] = True
    for a, b in zip(found, exact, strict=True):
        assert a[:, :, spoilt].isnan().all()
        assert torch.equal(a[:, :, ~spoilt], b[:, :, ~spoilt])


@pytest.mark.parametrize("keyword", ["attn_mask", "kv_range"])
def test_nan_behind_a_mask(keyword: str) -> None:
    query, key, value, *_ = Case(1, 2, 40, 80, 64, torch.bfloat16).inputs()
    seen = (torch.arange(80) < 50).expand(40, 80)
    ends = torch.tensor([0, 50], dtype=torch.int32).expand(1, 1, 40, 2)
    keywords = {keyword: seen if keyword == "attn_mask" else ends}
    exact = attention(query, key, value, **keywords)
    key[:, :, 50:] = torch.nan
    assert torch.equal(attention(query, key, value, **keywords), exact)


def test_ranges_that_hold_anything() -> None:
    query, key, value, *_ = Case(1, 2, 6, 40, 16, torch.bfloat16).inputs()
    low, high = -(2**31), 2**31 - 1
    given = [(low, high), (-5, 7), (39, 1000), (30, 20), (high, low), (40, high)]
    clamped = [(0, 40), (0, 7), (39, 40), (0, 0), (0, 0), (0, 0)]
    found, exact = (
        attention(query, key, value, kv_range=torch.tensor([[rows]], dtype=torch.int32))
        for rows in (given, clamped)
    )
    assert torch.equal(found, exact)


def test_the_lowest_number_is_no_hidden_key() -> None:
    """A row of it is the plain mean of the values."""
    query, key, value, *_ = Case(1, 1, 16, 60, 32, torch.float16).inputs()
    mask = torch.full((16, 60), torch.finfo(torch.float32).min)
    found, lse = attention(query, key, value, mask, return_lse=True)
    mean = value.double().mean(2, keepdim=True).expand(1, 1, 16, 32)
    assert relative_error(found, mean) < 2 * torch.finfo(torch.float16).eps
    assert lse.isfinite().all()


def test_what_does_not_fit_goes_elsewhere() -> None:
    check(Case(1, 1, 20, 321, 16, torch.bfloat16))
    check(Case(1, 1, 20, 320, 128, torch.bfloat16))  # 180 KiB
