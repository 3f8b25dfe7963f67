"""Random shapes, strides, dtypes and keywords of attention and attention_varlen against fp64.

FUZZ_EXAMPLES sets the number of calls for each op, for a longer search or a slow sanitizer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant, VarlenCase

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Around the edges of tiles as often as anywhere.
lengths = st.integers(0, 40) | st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 100, 129])
widths = st.integers(1, 40) | st.sampled_from([47, 48, 49, 64, 65, 72, 80, 127, 128, 129, 256])
# A softcap or scale of almost nothing has scores that are flushed.
scales = st.none() | st.sampled_from([0.0, -0.3, 1.0]) | st.floats(0.015625, 2, width=32)
softcaps = st.just(0.0) | st.sampled_from([1.0, 30.0]) | st.floats(0.5, 60, width=32)


@st.composite
def variants(draw: st.DrawFn, packed: bool, d: int, rotates: bool) -> Variant:
    def choose(names: Any) -> Any:
        return draw(st.sampled_from(list(names)))

    # A row of a few features is normalised to next to nothing but signs, and so is its gradient to
    # what roundings leave.
    norms = spec.NORMS if d >= 6 else ["none"]
    ropes = [r for r in spec.ROPES if not (packed and r.endswith("batch"))]
    return Variant(
        choose(spec.VARLEN_KEYS if packed else spec.KEYS),
        "none" if packed else choose(spec.MASKS),
        choose(spec.MASK_SHAPES),
        draw(scales),
        draw(softcaps),
        choose(ropes if rotates and d >= 2 else ["none"]),
        choose(norms) if draw(st.booleans()) else "none",
        draw(st.booleans()),
        choose(spec.LAYOUTS),
    )


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    groups, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    grouped = groups > 1 or draw(st.booleans())
    return {"h": groups * kv_heads, "kv_heads": kv_heads if grouped else None}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nq, nk, d = draw(lengths), draw(lengths), draw(widths)
    nk = nq if draw(st.booleans()) else nk
    return Case(
        b=draw(st.integers(0, 3)),
        nq=nq,
        nk=nk,
        d=d,
        dtype=draw(st.sampled_from(spec.DTYPES)),
        variant=draw(variants(False, d, nq <= nk)),
        dv=draw(st.none() | widths),
        logit=draw(st.sampled_from([1.0, 1.0, 0.1, 8.0, 100.0])),
        **draw(heads()),
    )


@st.composite
def varlen_cases(draw: st.DrawFn) -> VarlenCase:
    d = draw(widths)
    segments = draw(st.lists(st.tuples(lengths, lengths), max_size=5))
    alike, rotates = draw(st.booleans()), draw(st.booleans())
    if alike:
        segments = [(nk, nk) for _, nk in segments]
    if rotates:
        segments = [(min(each), max(each)) for each in segments]
    return VarlenCase(
        tuple(segments),
        d=d,
        dtype=draw(st.sampled_from(spec.DTYPES)),
        variant=draw(variants(True, d, rotates or alike)),
        dv=draw(st.none() | widths),
        outside=draw(st.integers(0, 3)),
        index=draw(st.sampled_from([torch.int32, torch.int64])),
        **draw(heads()),
    )


@needs_cpu
def test_fuzz() -> None:
    fn = partial(vlm_kernels.attention, backend="cpu")

    @bounded
    @given(case=cases())
    def call(case: Case) -> None:
        spec.check(case, fn)

    call()


@needs_cpu
def test_fuzz_of_packed_segments() -> None:
    fn = partial(vlm_kernels.attention_varlen, backend="cpu")

    @settings(bounded, max_examples=max(EXAMPLES // 2, 1))
    @given(case=varlen_cases())
    def call(case: VarlenCase) -> None:
        spec.check(case, fn)

    call()


@needs_cpu
def test_fuzz_of_values_that_are_not_finite() -> None:
    """Nothing may crash or hang, and NaN of a query comes out just where the definition has it."""
    fn = partial(vlm_kernels.attention, backend="cpu")
    values = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40])

    @settings(bounded, max_examples=max(EXAMPLES // 2, 1))
    @given(case=cases().filter(lambda c: c.b and c.nq and c.nk), value=values, data=st.data())
    def call(case: Case, value: float, data: st.DataObject) -> None:
        inputs, keywords = case.inputs(), case.keywords()
        side = data.draw(st.integers(0, 2))
        at = tuple(data.draw(st.integers(0, size - 1)) for size in inputs[side].shape)
        inputs[side][at] = value
        got = spec.evaluate(fn, inputs, keywords, case.variant.lse)
        if math.isnan(value) and side == 0 and case.variant.rope == "none":
            seen = spec.truth(case).exact["lse"][at[:3]] != -math.inf
            # A norm spreads it over its row, whose scores it is in anyway.
            assert got["out"][at[:3]].isnan().all() == seen
            got["out"][at[:3]] = 0
            assert got["out"].isfinite().all()

    call()


@needs_cpu
@pytest.mark.parametrize("op", spec.OPS)
def test_fuzz_of_wrong_input(op: str) -> None:
    """Whatever comes, the answer is a result or a Python error."""
    tensors = st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool]),
    )
    simple = st.none() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "rms", "half"])
    tuples = st.lists(tensors | simple, max_size=4).map(tuple)
    anything = tensors | simple | tuples
    names = ["scale", "is_causal", "window", "softcap", "rope", "q_norm", "k_norm", "return_lse"]
    positional = 2
    if op == "attention":
        names += ["dropout_p", "enable_gqa", "kv_range"]
        positional = 1

    @settings(bounded, max_examples=max(EXAMPLES, 1))
    @given(
        inputs=st.tuples(tensors, tensors, tensors) | tensors.map(lambda t: (t, t, t)),
        args=st.lists(anything, min_size=positional, max_size=positional),
        keywords=st.dictionaries(st.sampled_from(names), anything, max_size=3),
        backend=st.sampled_from(["cpu", "reference"]),
    )
    def call(inputs: Any, args: Any, keywords: dict[str, Any], backend: str) -> None:
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            getattr(vlm_kernels, op)(*inputs, *args, backend=backend, **keywords)

    call()
