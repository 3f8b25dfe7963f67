"""The backward of attention for rows that stay in shared memory, emulated.

Its forward is that of the CPU kernels, so that only the gradients are on trial.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels._load import _C
from vlm_kernels.ops import attention as op
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant

BF16, FP16 = spec.DTYPES[1:]
GRADS = ("query.grad", "key.grad", "value.grad")
pytestmark = pytest.mark.skipif(_C is None, reason="needs the built extension")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, extension: Any, rest: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert _C is not None
        out, lse = _C.attention_fwd(query, key, value, *rest)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.extension, ctx.rest = extension, rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        needs = sum(1 << i for i, each in enumerate(wanted) if each)
        found = ctx.extension.attention_bwd(grad, grad_lse, *inputs, *ctx.rest, out, lse, needs)
        return (None, None, *(g if each else None for g, each in zip(found, wanted)))


@pytest.fixture(autouse=True)
def _emulated(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    class Split:
        @staticmethod
        def attention_fwd(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
            rest = tuple(x.detach() if isinstance(x, Tensor) else x for x in rest)
            return _Attention.apply(extension, rest, query, key, value)

    monkeypatch.setattr(op, "_C", Split)
    extension.set_attention_kernels("short")
    yield
    extension.set_attention_kernels("auto")


def attention(*args: Any, **keywords: Any) -> Any:
    return vlm_kernels.attention(*args, backend="cpu", **keywords)


def check(case: Case) -> dict[str, Tensor]:
    """Of query, key and value: the gradient of a mask is another kernel's."""
    ours = spec.evaluate(attention, case.inputs(), case.keywords(), case.variant.lse)
    for name in GRADS:
        spec.check_result(case, name, ours[name])
    empty = spec.truth(case, 0).exact["lse"] == -torch.inf
    assert not ours["query.grad"][empty].any()
    return {name: ours[name] for name in GRADS}


@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 80, 88, 96, 104, 128])
def test_head_dims(d: int) -> None:
    dtype = (BF16, FP16)[d // 8 % 2]
    check(Case(1, 1, 33, 50, d, dtype, Variant(lse=True, layout=spec.LAYOUTS[d // 8 % 4])))


@pytest.mark.parametrize("d, dv", [(16, 80), (80, 16), (64, 128), (120, 56), (72, 80)])
def test_head_dims_that_differ(d: int, dv: int) -> None:
    check(Case(1, 1, 20, 35, d, (BF16, FP16)[dv % 3 % 2], Variant("causal", lse=True), dv=dv))
