"""The gradient of an additive mask by its CUDA kernel, emulated, against the rule of accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels._load import _C
from vlm_kernels.ops import attention as op
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant
from vlm_kernels.testing.tolerances import assert_close

LOW = spec.DTYPES[1:]
MASK = 8  # in the `needs` of the op
_of_out = partial(spec.gradients, with_lse=False)
Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
MaskGrad = Callable[..., Tensor]
Check = Callable[[Case], Tensor]


class _Forward:
    """The CPU kernels; keeps what a backward takes."""

    args: tuple[Any, ...]

    def attention_fwd(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.args = args
        return _C.attention_fwd(*args)


@pytest.fixture
def mask_grad(extension: Any, monkeypatch: pytest.MonkeyPatch) -> MaskGrad:
    """The gradient of the mask, given inputs and keywords of a call, and as gradients(out, lse)
    those of its results."""
    forward = _Forward()
    monkeypatch.setattr(op, "_C", forward)

    def run(inputs: spec.Inputs, keywords: spec.Keywords, gradients: Gradients = _of_out) -> Tensor:
        keywords = {**keywords, "return_lse": True, "backend": "cpu"}
        out, lse = spec.call(vlm_kernels.attention, inputs, keywords)
        of_out, of_lse = gradients(out, lse)
        return extension.attention_bwd(of_out, of_lse, *forward.args, out, lse, MASK)[3]

    return run


@pytest.fixture
def check(mask_grad: MaskGrad) -> Check:
    def run(case: Case) -> Tensor:
        inputs = case.inputs()
        assert inputs.attn_mask is not None
        found = mask_grad(
            inputs, case.keywords(), partial(spec.gradients, with_lse=case.variant.lse)
        )
        assert found.dtype == inputs.attn_mask.dtype
        spec.check_result(case, "attn_mask.grad", found)
        return found

    return run


@pytest.mark.parametrize("shape", spec.MASK_SHAPES, ids=lambda s: s or "scalar")
def test_broadcast(shape: str, check: Check) -> None:
    """Every way to broadcast, over several tiles of queries and keys; dtypes take turns."""
    dtype = LOW[spec.MASK_SHAPES.index(shape) % 2]
    check(Case(2, 2, 70, 67, 16, dtype, Variant(mask="additive_fp32", mask_shape=shape, lse=True)))


def _variants() -> list[Case]:
    masks = ("additive", "additive_inf", "additive_fp32")
    others: tuple[dict[str, Any], ...] = (
        {"keys": "causal"},  # some tiles meet nothing
        {"keys": "window"},
        {"keys": "window_of_one", "lse": True},
        {"keys": "range_each"},
        {"keys": "causal_window_range"},
        {"keys": "padding", "layout": "gaps"},
        {"scale": -0.2, "layout": "packed"},
        {"softcap": 0.8, "lse": True},
        {"rope": "half", "norm": "rms", "softcap": 5.0},
        {"rope": "interleaved_batch", "norm": "layer_heads", "layout": "bhnd"},
    )
    shapes = ("bhqk", "1hqk", "b1qk", "bh1k", "11qk", "111k")
    sizes = ((2, 2, 130, 130, 8), (2, 4, 33, 70, 72), (1, 2, 65, 129, 128))
    return [
        Case(
            *sizes[i % 3],
            LOW[i % 2],
            Variant(mask=masks[i % 3], mask_shape=shapes[i % 6], **other),
            kv_heads=2 if i % 3 == 1 else None,
            dv=(None, 88, 40)[i % 3],
        )
        for i, other in enumerate(others)
    ]


@pytest.mark.parametrize("case", _variants(), ids=str)
def test_variants(case: Case, check: Check) -> None:
    check(case)


@pytest.mark.parametrize("dim", range(8, 129, 8))
def test_head_dims(dim: int, check: Check) -> None:
    variant = Variant(mask="additive", mask_shape="b1qk")
    check(Case(1, 2, 17, 15, dim, LOW[dim // 8 % 2], variant, dv=136 - dim))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 130), (2, 1, 70, 1)], ids=str)
def test_few_rows(shape: tuple[int, int, int, int], check: Check) -> None:
    check(Case(*shape, 64, torch.bfloat16, Variant(mask="additive_fp32", lse=True)))


@pytest.mark.parametrize("shape", ["1hqk", "b11k"])
def test_many_terms(shape: str, check: Check) -> None:
    """As of a bias of windows: they are split over CTAs, in an order that does not change."""
    case = Case(30, 3, 9, 12, 16, torch.float16, Variant(mask="additive_fp32", mask_shape=shape))
    assert torch.equal(check(case), check(case))


@pytest.mark.parametrize("window", [(1, 0), (0, 1), (64, 0), (0, 65)], ids=str)
def test_window_and_range_are_the_same(window: tuple[int, int], mask_grad: MaskGrad) -> None:
    """Tiles that a window leaves out are not computed, those that ranges do are."""
    inputs = spec.make_inputs(1, 1, 130, 130, 8, torch.bfloat16)
    inputs = inputs._replace(attn_mask=torch.zeros(1, 1, 130, 130))
    i = torch.arange(130)
    ranges = torch.stack((i - window[0], i + window[1] + 1), -1)[None, None].to(torch.int32)
    grads = [mask_grad(inputs, keywords) for keywords in ({"window": window}, {"kv_range": ranges})]
    assert grads[0].any()
    assert torch.equal(*grads)


def test_mask_that_is_a_view(mask_grad: MaskGrad) -> None:
    """A mask expanded over the batch has the gradient of a whole one."""
    inputs = spec.make_inputs(2, 2, 20, 30, 16, torch.bfloat16)
    view = torch.randn(1, 2, 20, 30).expand(2, 2, 20, 30)
    grads = [mask_grad(inputs._replace(attn_mask=m), {}) for m in (view, view.contiguous())]
    assert torch.equal(*grads)


@pytest.mark.parametrize("mask_shape", [(2, 1, 40, 70), (1, 1, 1, 70)], ids=str)
def test_nan_reaches_what_sees_it(mask_shape: tuple[int, ...], mask_grad: MaskGrad) -> None:
    ranges = torch.tensor([10, 60], dtype=torch.int32).repeat(2, 1, 40, 1)
    ranges[1, :, 7] = 0  # sees nothing
    inputs = spec.make_inputs(2, 1, 40, 70, 24, torch.bfloat16)
    inputs = inputs._replace(attn_mask=torch.zeros(mask_shape))

    def grad(query: Tensor, key: Tensor) -> Tensor:
        return mask_grad(inputs._replace(query=query, key=key), {"kv_range": ranges})

    query, key = inputs.query.clone(), inputs.key.clone()
    clean = grad(query, key)
    assert not clean[..., :10].any()
    assert not clean[..., 60:].any()
    query[1, :, 7] = key[..., :10, :] = key[..., 60:, :] = torch.nan
    assert torch.equal(grad(query, key), clean)
    query[1, :, 5] = torch.nan
    found = grad(query, key)
    seen = found[-1, 0, 5 if mask_shape[2] > 1 else 0, 10:60]
    assert seen.isnan().all()
    seen.zero_()
    assert not found.isnan().any()


@pytest.mark.parametrize("lowest", [torch.finfo(d).min for d in LOW], ids=str)
def test_lowest_number_hides_its_keys(lowest: float, mask_grad: MaskGrad) -> None:
    """As -inf does beside a 0; where it is all there is the gradient is finite."""
    inputs = spec.make_inputs(1, 2, 20, 40, 16, torch.bfloat16)
    mask = torch.zeros(20, 40)
    mask[:, 30:] = lowest
    hidden = torch.where(mask < 0, -torch.inf, mask)
    grads = [mask_grad(inputs._replace(attn_mask=m), {}) for m in (mask, hidden)]
    assert torch.equal(*grads)
    mask[5] = lowest
    assert mask_grad(inputs._replace(attn_mask=mask), {}).isfinite().all()


def test_gradient_of_lse_alone(mask_grad: MaskGrad) -> None:
    """That of a row's lse is the softmax, which adds up to 1."""
    inputs = spec.make_inputs(1, 2, 20, 90, 32, torch.float16)
    inputs = inputs._replace(attn_mask=torch.randn(1, 2, 20, 90))
    found = mask_grad(inputs, {}, lambda out, lse: (torch.zeros_like(out), torch.ones_like(lse)))
    assert_close("sums", found.sum(-1), 0.0, torch.ones(1, 2, 20, dtype=torch.float64), "bwd")
