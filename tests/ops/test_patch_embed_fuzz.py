"""Random sizes, strides, dtypes and keywords of patch_embed against fp64.

FUZZ_EXAMPLES sets the number of calls, for a longer search or a slow sanitizer.
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
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vlm_kernels
from vlm_kernels.testing.specs import patch_embed as spec
from vlm_kernels.testing.specs.patch_embed import Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "80"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

patches = st.integers(1, 17) | st.sampled_from([8, 14, 16, 28, 30, 32])
widths = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129])


@st.composite
def variants(draw: st.DrawFn, channels: int) -> Variant:
    def choose(names: Any) -> Any:
        return draw(st.sampled_from(list(names)))

    k_order = choose(["cyx", "yxc", "ctyx"])
    prefix, pos = draw(st.integers(0, 3)), choose(spec.POSITIONS)
    temporal = choose([1, 1, 2, 3])
    merge = choose([1, 1, 2, 3])
    return Variant(
        layout=choose(spec.LAYOUTS),
        pixels=choose(spec.PIXELS),
        norm=choose(spec.NORMS if channels <= 3 else ["none", "scaled"]),
        k_order=k_order,
        native=k_order != "yxc" and draw(st.booleans()),
        step=(draw(st.integers(-9, 4)), draw(st.integers(-9, 4))),
        bias=draw(st.booleans()),
        pos=pos,
        pos_prefixed=pos != "none" and prefix > 0 and draw(st.booleans()),
        prefix=prefix,
        prefix_batch=choose(["", "one", "batch"]),
        newline=merge == 1 and draw(st.booleans()),
        merge=merge,
        temporal=temporal,
        frames=temporal * draw(st.integers(0, 2)),
        pad=choose(["raw", "normalised"]),
        low=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    channels = draw(st.sampled_from([1, 2, 3, 3, 3, 4]))
    patch = (draw(patches), draw(patches))
    h, w = (size + draw(st.integers(0, 3 * size + 3)) for size in patch)
    case = Case(
        b=draw(st.integers(1, 3)),
        h=h,
        w=w,
        patch=patch,
        e=draw(widths),
        dtype=draw(st.sampled_from(spec.DTYPES)),
        variant=draw(variants(channels)),
        c=channels,
        data=draw(st.sampled_from(spec.DATA)),
    )
    # the sliver of an image that another stride would have cut off is a patch of its own
    case = spec.even(case)
    columns = case.variant.temporal * channels * patch[0] * patch[1]
    assume(case.h >= patch[0] and case.w >= patch[1])
    assume(case.b * case.patches * columns <= 100_000)  # what the reference multiplies
    return case


@needs_cpu
def test_fuzz() -> None:
    fn = partial(vlm_kernels.patch_embed, backend="cpu")

    @bounded
    @given(case=cases())
    def call(case: Case) -> None:
        spec.check(case, fn)

    call()


@needs_cpu
def test_fuzz_of_values_that_are_not_finite() -> None:
    """Nothing crashes, and just the tokens whose patch has the pixel are spoiled."""
    fn = partial(vlm_kernels.patch_embed, backend="cpu")

    @settings(bounded, max_examples=max(EXAMPLES // 4, 1))
    @given(case=cases(), value=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
    def call(case: Case, value: float, data: st.DataObject) -> None:
        layout = case.variant.layout if case.variant.layout != "expanded" else "gaps"
        case = replace(case, variant=replace(case.variant, pixels="fp32", layout=layout))
        inputs = case.inputs()
        size = inputs.images.shape
        at = tuple(data.draw(st.integers(0, length - 1)) for length in size)
        inputs.images[at] = value
        got = spec.evaluate(fn, inputs, case.keywords())["out"]
        wanted = spec.call(spec.linear, inputs, case.keywords())
        assert torch.equal(got.isfinite().all(-1), wanted.isfinite().all(-1))

    call()


@needs_cpu
def test_fuzz_of_wrong_input() -> None:
    """Whatever comes, the answer is a result or a Python error."""
    shapes = st.lists(st.integers(0, 4), max_size=5)
    kinds = [torch.uint8, torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool]
    tensors = st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, st.sampled_from(kinds)
    )
    numbers = st.none() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "nhwc", "yxc"])
    anything = tensors | numbers | st.lists(numbers, max_size=4).map(tuple)
    names = ["bias", "stride", "layout", "k_order", "mean", "std", "rescale", "pos", "prefix"]
    names += ["newline", "merge", "temporal", "pad_space"]
    good = st.sampled_from([torch.ones(2, 3, 4, 4), torch.ones(1, 2, 3, 4, 2, dtype=torch.uint8)])
    weights = st.sampled_from([torch.ones(2, 12), torch.ones(2, 3, 2, 2)])

    @settings(bounded, max_examples=max(EXAMPLES, 1))
    @given(
        images=tensors | good,
        weight=tensors | weights,
        patch_size=st.integers(1, 2) | anything,
        keywords=st.dictionaries(st.sampled_from(names), anything, max_size=3),
        backend=st.sampled_from(["cpu", "reference"]),
    )
    def call(images: Any, weight: Any, patch_size: Any, keywords: Any, backend: str) -> None:
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            vlm_kernels.patch_embed(
                images, weight, patch_size=patch_size, backend=backend, **keywords
            )

    call()
