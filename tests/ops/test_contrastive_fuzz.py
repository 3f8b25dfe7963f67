"""Random shapes, strides, dtypes, values and keywords of clip_loss and siglip_loss against fp64.

FUZZ_EXAMPLES sets the number of calls for each op, for a longer search or a slow sanitizer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "700"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Around tile edges as often as anywhere.
lengths = st.integers(0, 70) | st.sampled_from([63, 64, 65, 127, 128, 129, 191, 193, 256, 257])
widths = st.integers(1, 40) | st.sampled_from([63, 64, 65, 96, 127, 128, 129])
# No scale between 0 and the smallest normal number: such logits are all flushed.
scales = st.sampled_from([0.0, 1.0, 14.3, 100.0, 117.0, -30.0]) | st.floats(
    0.0078125, 120, width=32
)
biases = st.none() | st.sampled_from([0.0, -16.5]) | st.floats(-40, 40, width=32)


@st.composite
def variants(draw: st.DrawFn, op: str) -> Variant:
    clip = op == "clip_loss"
    return Variant(
        op,
        draw(st.sampled_from(list(spec.PAIRS))),
        draw(st.sampled_from(spec.WEIGHTS)),
        draw(st.sampled_from([0.0, 0.1, 0.9])) if clip else 0.0,
        draw(st.sampled_from(spec.DIRECTIONS)) if clip else "both",
        draw(st.sampled_from(spec.REDUCTIONS)),
    )


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    n, m = draw(lengths), draw(lengths)
    dtype, d = draw(st.sampled_from(spec.DTYPES)), draw(widths)
    return Case(
        n,
        n if draw(st.booleans()) else m,
        # Normalised rows of a few columns take a few values only, and so does the gradient of S:
        # its rounding to 16 bits then errs the same way everywhere, and L2 norms tell luck. With
        # one column they are +-1, and so do fp32 sums of hundreds of equal terms.
        d + 8 if dtype.itemsize == 2 else max(d, 2),
        dtype,
        draw(variants(op)),
        draw(scales),
        draw(biases),
        draw(st.sampled_from(spec.DATA)) if n and m else "trained",
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, cut from a larger tensor full of NaN."""
    n, d = x.shape
    if layout == "plain":
        return x
    if layout == "transposed":
        return laid_out(x.T, "rows").T
    step = 2 if layout == "every second" else 1
    whole = x.new_full((step * n + 3, step * d + 5), math.nan)
    view = whole[2 : 2 + step * n : step, 3 : 3 + step * d : step]
    view.copy_(x)
    return view


LAYOUTS = ["plain", "rows", "transposed", "every second"]


@needs_cpu
@pytest.mark.parametrize("op", spec.OPS)
def test_fuzz(op: str) -> None:
    fn = partial(getattr(vlm_kernels, op), backend="cpu")

    @bounded
    @given(
        case=cases(op),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
        workspace_mb=st.sampled_from([None, 1, 8]),
    )
    def call(case: Case, layouts: tuple[str, str], workspace_mb: int | None) -> None:
        def loss(image: Tensor, text: Tensor, *args: Any, **keywords: Any) -> Any:
            image, text = laid_out(image, layouts[0]), laid_out(text, layouts[1])
            return fn(image, text, *args, workspace_mb=workspace_mb, **keywords)

        spec.check(case, loss)

    call()


@needs_cpu
@pytest.mark.parametrize("op", spec.OPS)
def test_fuzz_of_values_that_are_not_finite(op: str) -> None:
    """Nothing may crash or hang, and NaN comes out just where the definition has it."""
    fn = partial(getattr(vlm_kernels, op), backend="cpu")
    values = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-40])

    @settings(bounded, max_examples=max(EXAMPLES // 10, 1))
    @given(case=cases(op).filter(lambda c: c.n and c.m), value=values, data=st.data())
    def call(case: Case, value: float, data: st.DataObject) -> None:
        # The definition does not say what 0 x NaN is.
        case = replace(case, variant=replace(case.variant, weights="none"))
        inputs, keywords = case.inputs(), case.keywords()
        features = inputs[data.draw(st.integers(0, 1))]
        assert features is not None
        row = data.draw(st.integers(0, features.shape[0] - 1))
        features[row, data.draw(st.integers(0, case.d - 1))] = value
        got = spec.evaluate(fn, inputs, keywords)
        if math.isnan(value):
            wanted = spec.evaluate(getattr(reference, op), inputs, keywords)
            for name in {"loss", "row", "column"} & got.keys():
                assert torch.equal(got[name].isnan(), wanted[name].isnan()), name

    call()


@needs_cpu
@pytest.mark.parametrize("op", spec.OPS)
def test_fuzz_of_wrong_input(op: str) -> None:
    """Whatever comes, the answer is a result or a Python error."""
    tensors = st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    )
    anything = (
        tensors | st.none() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "mean", "x"])
    )
    names = ["image_ids", "text_ids", "labels", "weights", "ignore_same_ids", "reduction"]
    names += ["workspace_mb", "return_metrics"]
    names += ["label_smoothing", "directions"] if op == "clip_loss" else []

    @settings(bounded, max_examples=max(EXAMPLES // 3, 1))
    @given(
        features=st.tuples(tensors, tensors),
        args=st.tuples(anything, anything),
        keywords=st.dictionaries(st.sampled_from(names), anything, max_size=3),
        backend=st.sampled_from(["cpu", "reference"]),
    )
    def call(features: Any, args: Any, keywords: dict[str, Any], backend: str) -> None:
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            getattr(vlm_kernels, op)(*features, *args, backend=backend, **keywords)

    call()
