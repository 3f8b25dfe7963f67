"""The forward of attention for long rows, emulated: tiles, splits of the keys, groups of heads."""

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

BF16, F16 = LOW = spec.DTYPES[1:]


@pytest.fixture(autouse=True)
def _long(emulated_attention: Any) -> None:
    emulated_attention.set_attention_kernels("long")


def forward(case: AnyCase, inputs: spec.Inputs | None = None) -> tuple[Tensor, Tensor]:
    fn = partial(getattr(vlm_kernels, case.op), backend="cpu")
    inputs = case.inputs() if inputs is None else inputs
    with torch.no_grad():
        out, lse = spec.call(fn, inputs, {**case.keywords(), "return_lse": True})
    return out, lse


def check(case: AnyCase) -> tuple[Tensor, Tensor]:
    out, lse = forward(case)
    spec.check_result(case, "out", out)
    spec.check_result(case, "lse", lse)
    empty = lse == -torch.inf
    assert not out[empty if case.op == "attention" else empty.mT].any()
    return out, lse


# --- shapes ---


@pytest.mark.parametrize("d", range(8, 129, 8))
def test_head_dims(d: int) -> None:
    """Each in a bucket that holds it, with values of another size."""
    dtype = LOW[d // 8 % 2]
    check(Case(1, 1, 17, 70, d, dtype))
    check(Case(1, 1, 17, 70, d, dtype, dv=136 - d))


@pytest.mark.parametrize(
    ("nq", "nk"),
    [(1, 1), (63, 64), (64, 65), (65, 63), (130, 129), (5, 257), (16, 80), (16, 81)],
    ids=str,
)
def test_lengths(nq: int, nk: int) -> None:
    """Around the tiles, of a batch and several heads."""
    check(Case(2, 2, nq, nk, 32, BF16))


@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case(2, 2, 33, 40, 72, F16, Variant(layout=layout)))


# --- which keys, and what their logits are ---


@pytest.mark.parametrize("keys", list(spec.KEYS))
def test_keys(keys: str) -> None:
    check(Case(2, 2, 70, 140, 16, LOW[len(keys) % 2], Variant(keys)))
    check(Case(1, 1, 140, 70, 16, LOW[len(keys) % 2], Variant(keys)))


@pytest.mark.parametrize("mask", spec.MASKS[1:])
@pytest.mark.parametrize("shape", ["bhqk", "1hqk", "b11k", "q1", ""])
def test_masks(mask: str, shape: str) -> None:
    dtype = LOW[len(shape) % 2]
    check(Case(2, 2, 20, 70, 16, dtype, Variant(mask=mask, mask_shape=shape)))


def test_a_mask_and_a_range_at_once() -> None:
    for mask in spec.MASKS[1:]:
        check(Case(2, 2, 70, 70, 24, BF16, Variant("range_each", mask, softcap=2.0, scale=0.3)))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.7])
@pytest.mark.parametrize("softcap", [0.0, 0.8, 30.0])
def test_scales_and_caps(scale: float, softcap: float) -> None:
    """A negative scale turns the order of the products round."""
    variant = Variant(scale=scale, softcap=softcap)
    check(Case(1, 2, 20, 140, 40, F16, variant))
    check(Case(1, 2, 20, 140, 40, BF16, replace(variant, keys="causal")))


@pytest.mark.parametrize("logit", [30.0, 1e-3])
def test_sizes_of_logits(logit: float) -> None:
    """Maxima that grow from tile to tile, and none that matters."""
    check(Case(1, 1, 33, 300, 16, BF16, logit=logit))


def test_the_lowest_number_as_mask() -> None:
    q, k, v, *_ = spec.make_inputs(1, 1, 5, 70, 16, BF16)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(5, 70)
    mask[1], mask[2, 7:], mask[3] = lowest, lowest, -torch.inf
    attention = partial(vlm_kernels.attention, q, k, v)
    with torch.no_grad():
        out = attention(mask, backend="cpu")
        exact = vlm_kernels.reference.attention(*(t.double() for t in (q, k, v)), mask.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-9)
    assert not out[:, :, 3].any()


# --- keys that are split over CTAs: the emulated device has 4 multiprocessors ---


@pytest.mark.parametrize("keys", ["all", "causal", "window", "range_each", "padding", "per_image"])
def test_split_keys(keys: str) -> None:
    """Also where some of the splits have nothing to do."""
    check(Case(1, 2, 9, 577, 24, LOW[len(keys) % 2], Variant(keys)))


def test_split_keys_with_a_mask() -> None:
    check(Case(1, 1, 65, 520, 16, BF16, Variant(mask="additive_inf", mask_shape="qk")))
    check(Case(1, 1, 3, 1025, 128, F16, Variant(mask="bool", softcap=4.0), dv=8))


def test_split_keys_of_packed_segments() -> None:
    check(VarlenCase(((2, 900),), 1, 80, BF16, outside=3))
    check(VarlenCase(((1, 900), (1, 0), (2, 900)), 1, 16, F16, Variant("causal")))


# --- heads that share keys ---


@pytest.mark.parametrize(
    ("heads", "queries"), [((8, 1), 1), ((8, 2), 16), ((4, 2), 33), ((6, 2), 5)], ids=str
)
@pytest.mark.parametrize("keys", ["all", "causal", "range_each"])
def test_groups_of_heads(heads: tuple[int, int], queries: int, keys: str) -> None:
    """In one tile where they fit, each in its own where not."""
    h, kv_heads = heads
    check(Case(2, h, queries, 70, 16, LOW[queries % 2], Variant(keys), kv_heads=kv_heads))


def test_a_decoding_step() -> None:
    """Groups and splits, a mask of each head's own."""
    check(Case(1, 8, 1, 700, 64, BF16, kv_heads=2))
    mask = Variant("range_each", mask="additive_fp32", mask_shape="1h1k")
    check(Case(1, 4, 2, 700, 32, F16, mask, kv_heads=2, dv=40))


# --- packed segments ---


@pytest.mark.parametrize("keys", spec.VARLEN_KEYS)
@pytest.mark.parametrize("segments", spec.PACKED[:4], ids=str)
def test_segments(keys: str, segments: Any) -> None:
    check(VarlenCase(segments, 2, 16, LOW[len(keys) % 2], Variant(keys), outside=len(keys) % 3))


def test_segments_with_groups_of_heads() -> None:
    check(VarlenCase(((5, 5), (65, 70)), 4, 40, BF16, Variant("causal"), kv_heads=2))


def test_garbage_as_offsets(emulated_attention: Any) -> None:
    """Nothing is read out of bounds, every row of the results is written."""
    case = VarlenCase(((40, 40), (30, 30)), 1, 16, BF16)
    q, k, v, *_ = case.inputs()
    for offsets in ([-5, 90, 3], [7, 2**31 - 1, -(2**31)], [30, 20, 10]):
        given = torch.tensor(offsets, dtype=torch.int32)
        options: tuple[Any, ...] = (False, -1, -1, None, 0.0, None, None, False)
        options += (None, None, 0.0, False) * 2  # norms
        out, lse = emulated_attention.attention_fwd(q, k, v, None, None, given, given, *options)
        ends = given.clamp(0, 70).cummax(0).values
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            assert lse[:, begin:end].isfinite().all()
        for outside in (slice(0, ends[0]), slice(ends[-1], None)):
            assert not out[outside].any()
            assert (lse[:, outside] == -torch.inf).all()


# --- what must not spread ---


def test_nan_of_a_query_spoils_its_row() -> None:
    inputs = Case(1, 1, 70, 130, 16, BF16).inputs()
    clean, _ = forward(Case(1, 1, 70, 130, 16, BF16), inputs)
    inputs.query[0, 0, 5, 3] = torch.nan
    out, lse = forward(Case(1, 1, 70, 130, 16, BF16), inputs)
    assert out[0, 0, 5].isnan().all()
    assert lse[0, 0, 5].isnan()
    others = torch.arange(70) != 5
    assert torch.equal(out[:, :, others], clean[:, :, others])


@pytest.mark.parametrize("nk", [130, 900])
def test_nan_of_a_key_spoils_who_sees_it(nk: int) -> None:
    case = Case(1, 1, 20, nk, 16, BF16, Variant("causal"))
    inputs = case.inputs()
    clean, _ = forward(case, inputs)
    inputs.key[0, 0, 7] = torch.nan
    out, _ = forward(case, inputs)
    assert torch.equal(out[:, :, :7], clean[:, :, :7])
    assert out[:, :, 7:].isnan().all()
    masked = torch.ones(20, nk, dtype=torch.bool)
    masked[:, 7] = False
    with torch.no_grad():
        out = vlm_kernels.attention(*inputs[:3], masked, is_causal=True, backend="cpu")
    assert out.isfinite().all()


def test_keys_of_other_images_are_not_visited() -> None:
    """A tile of queries that sees one image loads that image only, not even its neighbours."""
    q, k, v, *_ = spec.make_inputs(1, 1, 128, 210, 16, BF16)
    begin = torch.tensor([0, 140]).repeat_interleave(64)
    kv_range = torch.stack([begin, begin + 70], -1).to(torch.int32)[None, None]
    call = partial(vlm_kernels.attention, kv_range=kv_range, backend="cpu")
    with torch.no_grad():
        clean = call(q, k, v)
        alone = vlm_kernels.attention(q[:, :, 64:], k[:, :, 140:], v[:, :, 140:], backend="cpu")
        assert torch.equal(alone, clean[:, :, 64:])
        k[:, :, 70:140], v[:, :, 70:140] = torch.nan, torch.nan
        assert torch.equal(call(q, k, v), clean)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 70, 130, 72, BF16, Variant("range_each")),
        Case(1, 1, 5, 577, 16, F16),
        Case(1, 4, 3, 577, 16, BF16, kv_heads=2),
        VarlenCase(spec.PACKED[1], 2, 16, F16),
    ],
    ids=str,
)
def test_bitwise_the_same_again(case: AnyCase) -> None:
    for first, again in zip(forward(case), forward(case), strict=True):
        assert torch.equal(first, again)
