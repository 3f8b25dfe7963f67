"""QK-norm and rotation on their CUDA kernels, emulated, against the rule of accuracy."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

import vlm_kernels
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Inputs, Variant, VarlenCase

pytestmark = pytest.mark.usefixtures("emulated_attention")
LOW = spec.DTYPES[1:]
NORMS = [name for name in spec.NORMS if name != "none"]
attention = partial(vlm_kernels.attention, backend="cpu")
attention_varlen = partial(vlm_kernels.attention_varlen, backend="cpu")
both_kernels = pytest.mark.parametrize("kernels", ["short", "long"])


def _variants() -> list[Variant]:
    """Each norm with each kind of rotation that takes another path, layouts in turn."""
    ropes = ("none", "half", "partial", "interleaved_batch")
    pairs = [(norm, ropes[i % 4]) for i, norm in enumerate(NORMS)]
    pairs += [("none", rope) for rope in spec.ROPES if rope != "none"]
    return [
        Variant(norm=norm, rope=rope, layout=spec.LAYOUTS[i % 4])
        for i, (norm, rope) in enumerate(pairs)
    ]


@both_kernels
@pytest.mark.parametrize("variant", _variants(), ids=str)
def test_variants(variant: Variant, kernels: str, emulated_attention: Any) -> None:
    emulated_attention.set_attention_kernels(kernels)
    i = _variants().index(variant)
    shape = ((2, 2, 9, 20, 72), (2, 1, 17, 17, 8), (1, 3, 5, 66, 40))[i % 3]
    grouped = 1 if kernels == "long" and i % 3 == 2 else None
    case = Case(*shape, LOW[i % 2], variant, kv_heads=grouped)
    first = spec.check(case, attention)
    again = spec.evaluate(attention, case.inputs(), case.keywords())
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("dim", range(8, 129, 8))
def test_head_dims(dim: int) -> None:
    """Of which lanes have two pairs of features, one or none."""
    rope = spec.ROPES[1 + dim // 8 % 3]
    norm = ("layer", "rms_bias_heads")[dim // 16 % 2]
    check = Case(1, 2, 3, 5, dim, LOW[dim // 8 % 2], Variant(rope=rope, norm=norm))
    spec.check(check, attention)


def test_many_rows() -> None:
    """Several tiles of a head."""
    case = Case(3, 2, 70, 70, 16, torch.bfloat16, Variant(rope="half", norm="layer"))
    spec.check(case, attention)


def test_many_tiles() -> None:
    """More than there are CTAs to sum the gradients of the norm: empty segments have a tile too."""
    segments = ((1, 1), (0, 0), (2, 2), *[(0, 0)] * 18)
    case = VarlenCase(segments, 64, 8, torch.float16, Variant(norm="rms_bias_heads"))
    spec.check(case, attention_varlen)


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial"])
def test_packed(rope: str) -> None:
    """Each segment's queries take the rows of its last keys."""
    segments = ((3, 9), (0, 4), (66, 70), (0, 0), (1, 5))
    variant = Variant("causal", rope=rope, norm="rms" if rope == "half" else "none")
    check = VarlenCase(segments, 2, 24, LOW[len(rope) % 2], variant, kv_heads=1, outside=2)
    spec.check(check, attention_varlen)


def test_queries_beyond_the_tables_take_their_ends() -> None:
    """Offsets on a device are not looked at; a segment of more queries than keys is one no table
    has rows for. It must give numbers, and read nothing outside."""
    x = torch.randn(10, 2, 16, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    angles = torch.randn(10, 8)
    offsets = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 9, 10], [0, 1, 10])]
    out = attention_varlen(*leaves, *offsets, rope=(angles.cos(), angles.sin()))
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(t.isfinite().all() for t in (out, *grads))
    one = attention_varlen(*leaves, *offsets, rope=(torch.ones(10, 8), torch.zeros(10, 8)))
    assert torch.equal(out[:9], one[:9])  # they see a single key


@pytest.mark.parametrize("rope", ["none", "half"])
def test_gradients_of_the_norm_alone(rope: str) -> None:
    case = Case(2, 2, 17, 20, 24, torch.bfloat16, Variant(norm="layer", rope=rope))
    every = spec.evaluate(attention, case.inputs(), case.keywords())
    inputs = case.inputs()
    for name in ("q_norm_weight", "k_norm_bias"):
        leaf = getattr(inputs, name).clone().requires_grad_()
        keywords = {**case.keywords(), "return_lse": True}
        out, lse = spec.call(attention, inputs._replace(**{name: leaf}), keywords)
        [grad] = torch.autograd.grad(out, [leaf], spec.gradients(out, lse, False).out)
        assert torch.equal(grad, every[f"{name}.grad"])


@pytest.mark.parametrize(("norm", "rope"), list(product(["rms", "layer"], ["none", "half"])))
def test_large_and_small_rows(norm: str, rope: str) -> None:
    """Rows whose squares or means would not fit 16 bits; eps decides for a row of zeros."""
    case = Case(1, 1, 6, 6, 32, torch.float16, Variant(norm=norm, rope=rope))

    def changed(inputs: Inputs) -> Inputs:
        query, key = inputs.query.clone(), inputs.key.clone()
        query[:, :, 0] *= 8000
        query[:, :, 1] = 0
        key[:, :, 2] += 300
        key[:, :, 3] = 2.0**-14
        return inputs._replace(query=query, key=key)

    exact = spec.evaluate(
        vlm_kernels.reference.attention,
        changed(case.inputs()).to(torch.float64),
        case.keywords(),
        dtype=case.dtype,
    )
    ours = spec.evaluate(attention, changed(case.inputs()), case.keywords())
    eager = spec.evaluate(vlm_kernels.reference.attention, changed(case.inputs()), case.keywords())
    for name in ("out", "value.grad", "q_norm_weight.grad"):
        spec.assert_close(
            name, ours[name], eager[name], exact[name], "bwd" if "grad" in name else "fwd"
        )
    assert all(t.isfinite().all() for t in ours.values())


def test_nan_stays_in_its_row() -> None:
    case = Case(1, 2, 9, 9, 24, torch.bfloat16, Variant("causal", norm="rms", rope="half"))
    clean = spec.evaluate(attention, case.inputs(), case.keywords())
    inputs = case.inputs()
    inputs.query[0, 1, 4, 3] = torch.nan
    found = spec.evaluate(attention, inputs, case.keywords())
    for name in ("out", "query.grad"):
        assert found[name][0, 1, 4].isnan().all()
        found[name][0, 1, 4] = clean[name][0, 1, 4]
        assert torch.equal(found[name], clean[name])
    assert torch.equal(found["key.grad"][0, 0], clean["key.grad"][0, 0])
