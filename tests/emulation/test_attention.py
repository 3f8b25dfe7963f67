"""attention and attention_varlen on their CUDA kernels, emulated: what holds of whichever runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec

pytestmark = pytest.mark.usefixtures("emulated_attention")
LOW = spec.DTYPES[1:]


def attention(*args: Any, **keywords: Any) -> Any:
    return vlm_kernels.attention(*args, backend="cpu", **keywords)


def test_what_the_kernels_do_not_take_is_an_error() -> None:
    query, key, value, *_ = spec.make_inputs(1, 1, 4, 4, 16)
    with pytest.raises(TypeError, match=r"bfloat16 and float16.*triton"):
        attention(query, key, value)
    for d in (12, 136):
        query, key, value, *_ = spec.make_inputs(1, 1, 4, 4, d, torch.bfloat16)
        with pytest.raises(ValueError, match="multiples of 8 up to 128"):
            attention(query, key, value)
