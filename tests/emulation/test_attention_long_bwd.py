"""The backward of attention for long rows, emulated: tiles, splits of the keys, groups of heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase
from vlm_kernels.testing.tolerances import assert_close

BF16, F16 = LOW = spec.DTYPES[1:]
GRADS = ("query.grad", "key.grad", "value.grad")


@pytest.fixture(autouse=True)
def _long(emulated_attention: Any) -> None:
    emulated_attention.set_attention_kernels("long")


def evaluate(case: AnyCase, inputs: spec.Inputs | None = None) -> dict[str, Tensor]:
    """Results and gradients, but for that of a mask, which other kernels form."""
    fn = partial(getattr(vlm_kernels, case.op), backend="cpu")
    inputs = case.inputs() if inputs is None else inputs
    keywords = case.keywords()
    if inputs.attn_mask is not None:
        keywords["attn_mask"] = inputs.attn_mask
        inputs = inputs._replace(attn_mask=None)
    return spec.evaluate(fn, inputs, keywords, case.variant.lse)


def check(case: AnyCase) -> dict[str, Tensor]:
    ours = evaluate(case)
    for name, value in ours.items():
        if name.endswith(".grad"):
            spec.check_result(case, name, value)
    empty = ours["lse"] == -torch.inf
    assert not ours["query.grad"][empty if case.op == "attention" else empty.mT].any()
    return ours


# --- shapes ---


@pytest.mark.parametrize("d", range(8, 129, 8))
def test_head_dims(d: int) -> None:
    """Each in a bucket that holds it, with values of another size."""
    dtype = LOW[d // 8 % 2]
    check(Case(1, 1, 20, 70, d, dtype, Variant(lse=d % 16 == 0)))
    check(Case(1, 1, 70, 20, d, dtype, Variant("causal"), dv=136 - d))


@pytest.mark.parametrize(
    ("nq", "nk"), [(1, 1), (63, 64), (64, 65), (65, 63), (130, 129), (257, 5)], ids=str
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
    check(Case(2, 2, 70, 140, 16, LOW[len(keys) % 2], Variant(keys, lse=True)))
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
    for keys, dtype in (("all", F16), ("causal", BF16)):
        check(Case(1, 2, 20, 70, 40, dtype, Variant(keys, scale=scale, softcap=softcap, lse=True)))


@pytest.mark.parametrize("logit", [30.0, 1e-3])
def test_sizes_of_logits(logit: float) -> None:
    """Also those at which what is no key would have a probability of infinity."""
    check(Case(1, 1, 33, 130, 16, BF16, logit=logit))
    check(Case(1, 1, 70, 70, 16, BF16, Variant("window", scale=-3.0), logit=logit))


@dataclass(frozen=True)
class Opposed(Case):
    """Every key is about the opposite of every query."""

    def inputs(self, seed: int = 0, device: str | torch.device = "cpu") -> spec.Inputs:
        found = super().inputs(seed, device)
        found.query.mul_(0.1).add_(4)
        found.key.mul_(0.1).sub_(4)
        return found


@pytest.mark.parametrize(("nq", "nk"), [(33, 70), (70, 33)], ids=str)
def test_logits_far_below_those_of_padding(nq: int, nk: int) -> None:
    """Beside them the logit 0 of rows that are none would have a probability of infinity."""
    ours = check(Opposed(1, 1, nq, nk, 16, BF16, Variant(scale=1.0)))
    assert (ours["lse"] < -200).all()


def test_the_lowest_number_as_mask() -> None:
    """Where it is all that a query sees, its probabilities are equal, here as in the forward."""
    q, k, v, *_ = spec.make_inputs(1, 1, 5, 70, 16, BF16)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(5, 70)
    mask[1], mask[2, 7:], mask[3] = lowest, lowest, -torch.inf

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        bias = mask.to(torch.promote_types(dtype, mask.dtype))
        out = vlm_kernels.attention(*leaves, bias, backend=backend)
        return torch.autograd.grad(out, leaves, spec.gradients(out, mask, False).out)

    exact, eager = gradients(torch.float64, "reference"), gradients(BF16, "reference")
    for name, ours, peer, wanted in zip(GRADS, gradients(BF16, "cpu"), eager, exact, strict=True):
        assert_close(name, ours, peer, wanted, "bwd")
    assert not gradients(BF16, "cpu")[0][:, :, 3].any()


# --- keys that are split over CTAs: the emulated device has 4 multiprocessors ---


@pytest.mark.parametrize("keys", ["all", "causal", "window", "range_each", "per_image"])
def test_split_keys(keys: str) -> None:
    """Also where some of the splits have nothing to do."""
    check(Case(1, 1, 9, 577, 24, LOW[len(keys) % 2], Variant(keys)))


def test_split_keys_of_masks_groups_and_segments() -> None:
    check(Case(1, 1, 65, 520, 16, BF16, Variant(mask="additive_inf", mask_shape="qk")))
    check(Case(1, 2, 3, 520, 128, F16, Variant(mask="bool", softcap=4.0), kv_heads=1, dv=8))
    check(VarlenCase(((1, 300), (1, 0), (2, 300)), 1, 16, F16, Variant("causal")))


# --- heads that share keys ---


@pytest.mark.parametrize("heads", [(8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("keys", ["all", "causal", "range_each"])
def test_groups_of_heads(heads: tuple[int, int], keys: str) -> None:
    h, kv_heads = heads
    check(Case(2, h, 70, 70, 16, LOW[h % 3 % 2], Variant(keys), kv_heads=kv_heads))


# --- packed segments ---


@pytest.mark.parametrize("keys", spec.VARLEN_KEYS)
@pytest.mark.parametrize("segments", spec.PACKED[:4], ids=str)
def test_segments(keys: str, segments: Any) -> None:
    variant = Variant(keys, lse=True)
    check(VarlenCase(segments, 2, 16, LOW[len(keys) % 2], variant, outside=len(keys) % 3))


def test_segments_with_groups_of_heads() -> None:
    check(VarlenCase(((5, 5), (65, 70)), 4, 40, BF16, Variant("causal"), kv_heads=2))


def test_garbage_as_offsets_and_ranges(emulated_attention: Any) -> None:
    """Nothing is read out of bounds, every row of the gradients is written."""
    case = Case(1, 1, 70, 70, 16, BF16)
    q, k, v, *_ = case.inputs()
    options: tuple[Any, ...] = (False, -1, -1, None, 0.0, None, None, False)
    options += (None, None, 0.0, False) * 2  # norms

    def gradients(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, ...]:
        args = (q, k, v, *given, *options)
        out, lse = emulated_attention.attention_fwd(*args)
        grads = emulated_attention.attention_bwd(torch.ones_like(out), None, *args, out, lse, 7)
        return grads[:3]

    for offsets in ([-5, 90, 3], [7, 2**31 - 1, -(2**31)], [30, 20, 10]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        packed = (t[0].transpose(0, 1) for t in (q, k, v))
        for grad in gradients(*packed, None, None, cu, cu):
            assert grad.isfinite().all()
    ends = torch.randint(-(2**31), 2**31, (1, 1, 70, 2), dtype=torch.int32)
    for grad in gradients(q, k, v, None, ends, None, None):
        assert grad.isfinite().all()


# --- what is computed before and after: rotation and norms ---


def test_rotated_and_normalised_rows() -> None:
    everything = Variant("causal_window", scale=0.2, softcap=4.0, rope="half", norm="rms", lse=True)
    check(Case(1, 2, 40, 70, 40, BF16, everything, kv_heads=1))
    check(VarlenCase(((20, 20), (3, 9)), 2, 24, F16, everything))


# --- which gradients, and what must not spread ---


@pytest.mark.parametrize(
    "case", [Case(1, 2, 70, 70, 24, BF16), Case(1, 1, 5, 577, 16, F16)], ids=str
)
def test_each_gradient_alone(case: Case) -> None:
    wanted = evaluate(case)
    for i, name in enumerate(GRADS):
        inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate(case.inputs()[:3])]
        out, lse = vlm_kernels.attention(*inputs, return_lse=True, backend="cpu")
        [grad] = torch.autograd.grad(out, [inputs[i]], spec.gradients(out, lse, False).out)
        assert torch.equal(grad, wanted[name])


def test_nan_in_keys_that_no_query_of_a_tile_sees() -> None:
    q, k, v, *_ = spec.make_inputs(1, 1, 128, 210, 16, BF16)
    begin = torch.tensor([0, 140]).repeat_interleave(64)
    kv_range = torch.stack([begin, begin + 70], -1).to(torch.int32)[None, None]
    call = partial(vlm_kernels.attention, kv_range=kv_range, backend="cpu")

    def gradients() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    clean = gradients()
    k[:, :, 70:140], v[:, :, 70:140] = torch.nan, torch.nan
    spoiled = gradients()
    assert torch.equal(spoiled[0], clean[0])
    for grad, without in zip(spoiled[1:], clean[1:], strict=True):
        assert torch.equal(grad, without)
        assert not grad[:, :, 70:140].any()


def test_nan_stays_in_its_segment() -> None:
    case = VarlenCase(((20, 20), (30, 30), (10, 10)), 2, 16, BF16)
    for name in ("query", "key", "value"):
        inputs = case.inputs()
        getattr(inputs, name)[25, 1, 3] = torch.nan
        results = evaluate(case, inputs)
        for result in GRADS:
            assert results[result][:20].isfinite().all(), result
            assert results[result][50:].isfinite().all(), result
        assert results["query.grad"][20:50].isnan().any()


def test_nan_of_a_query_that_sees_nothing() -> None:
    """Nor does one of a query reach the keys of a tile that it sees nothing of."""
    case = Case(1, 1, 70, 130, 16, BF16, Variant("padding"))
    kv_range = torch.tensor([[0, 130]], dtype=torch.int32).repeat(70, 1)
    kv_range[5], kv_range[6] = torch.tensor([7, 7]), torch.tensor([0, 64])
    q, k, v, *_ = case.inputs()
    q[0, 0, 6] = torch.nan
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = vlm_kernels.attention(*leaves, kv_range=kv_range[None, None], backend="cpu")
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert grads[0][:, :, torch.arange(70) != 6].isfinite().all()
    assert grads[2][:, :, :64].isnan().all()
    assert grads[2][:, :, 64:].isfinite().all()


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
    first, again = evaluate(case), evaluate(case)
    for name in GRADS:
        assert torch.equal(first[name], again[name])
