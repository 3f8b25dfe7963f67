"""The backward of attention for rows of any length, emulated, against the rule of accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels._load import _C
from vlm_kernels.ops import attention as op
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, VarlenCase, Variant

BF16, FP16 = spec.DTYPES[1:]


class Mixed:
    """In place of `_C`: the forward of the CPU, the emulated backward."""

    def __init__(self, extension: Any) -> None:
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
                out, lse = _C.attention_fwd(*args)
                ctx.args, ctx.results = args, (out, lse)
                return out, lse

            @staticmethod
            def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
                needs = sum(1 << i for i in range(3) if ctx.needs_input_grad[i])
                grads = extension.attention_bwd(grad, grad_lse, *ctx.args, *ctx.results, needs)
                return (*grads[:3], *(None for _ in ctx.args[3:]))

        self.attention_fwd = Attention.apply


@pytest.fixture(autouse=True)
def _long(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(op, "_C", Mixed(extension))
    extension.set_attention_kernels("long")
    yield
    extension.set_attention_kernels("auto")


def function(name: str) -> Any:
    return partial(getattr(vlm_kernels, name), backend="cpu")


def check(case: Case | VarlenCase) -> dict[str, Tensor]:
    inputs, keywords = case.inputs(), case.keywords()
    ours = spec.evaluate(function(case.op), inputs, keywords, case.variant.lse)
    for name in ("query.grad", "key.grad", "value.grad"):
        spec.check_result(case, name, ours[name])
    return ours


SHAPES = [
    Case(1, 1, 64, 64, 64, BF16),
    Case(1, 2, 70, 130, 64, FP16, Variant(lse=True)),
    Case(2, 1, 17, 65, 72, BF16),
    Case(1, 1, 129, 40, 32, BF16, dv=16),
    Case(1, 4, 33, 70, 96, FP16, kv_heads=2),
    Case(1, 2, 65, 66, 112, BF16, dv=104),
    Case(1, 2, 65, 65, 128, FP16),
    Case(1, 1, 5, 1030, 24, BF16),
    Case(1, 1, 1, 1, 8, BF16),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    check(case)


def variants() -> list[Case]:
    """Each way to say which keys are seen with each mask; shapes and dtypes take turns."""
    shapes = ((2, 2, 70, 70, 40), (1, 2, 33, 131, 16), (2, 2, 129, 67, 24))
    return [
        Case(*shapes[i % 3], (BF16, FP16)[i % 2], variant, kv_heads=1 if i % 4 == 0 else None)
        for i, variant in enumerate(spec.all_variants())
        if variant.rope == "none"
    ]


@pytest.mark.parametrize("case", variants(), ids=str)
def test_which_keys_are_seen(case: Case) -> None:
    check(case)
