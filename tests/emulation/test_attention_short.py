"""The forward of attention for short rows, emulated: keys and values stay in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant

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
    (1, 1, 33, 209, 88),
    (1, 1, 257, 257, 64),
    (1, 1, 1, 272, 104),
    (1, 1, 17, 273, 40),
    (1, 1, 5, 320, 48),
    (1, 3, 16, 1, 128),
    (3, 3, 100, 15, 32),
)


@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_shapes(i: int) -> None:
    check(Case(*SHAPES[i], LOW[i % 2], Variant(layout=spec.LAYOUTS[i % 4])))
