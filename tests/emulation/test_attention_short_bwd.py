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
    check(Case(1, 2, 33, 50, d, dtype, Variant(lse=True, layout=spec.LAYOUTS[d // 8 % 4])))


@pytest.mark.parametrize(("d", "dv"), [(16, 80), (80, 16), (64, 128), (120, 56), (72, 80)])
def test_head_dims_that_differ(d: int, dv: int) -> None:
    check(Case(1, 1, 20, 35, d, (BF16, FP16)[dv % 3 % 2], Variant("causal", lse=True), dv=dv))


LENGTHS = ((1, 1), (1, 70), (70, 1), (15, 17), (16, 32), (31, 33), (97, 49), (64, 129), (257, 257))


@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_lengths(nq: int, nk: int) -> None:
    """Fewer rows than warps take, and more."""
    for dtype in (BF16, FP16)[: 1 if nq == 257 else 2]:
        check(Case(1, 1, nq, nk, 80 if nq == 257 else 64, dtype, Variant(lse=True)))


def test_the_most_rows() -> None:
    check(Case(1, 1, 320, 40, 24, FP16))
    check(Case(1, 1, 40, 320, 24, BF16, Variant("causal")))


def variants() -> list[Case]:
    """What the kernel itself knows, at two head dims in turn."""
    known = [v for v in spec.covering_variants() if v.rope == "none" and v.norm == "none"]
    known += [Variant("window", "additive_inf", "1h1k", 0.3, 2.0, lse=True)]
    known += [Variant("range_each", "bool", "b1qk", softcap=5.0)]
    return [
        Case(2, 2, *((37, 50), (50, 37))[i % 2], (40, 64, 80)[i % 3], (BF16, FP16)[i % 2], variant)
        for i, variant in enumerate(known)
    ]


@pytest.mark.parametrize("case", variants(), ids=str)
def test_variants(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("keys", ["all", "causal_window_range"])
def test_gradients_that_are_not_needed(keys: str) -> None:
    """Each alone is what it is beside the others, which are the same on a repeat."""
    case = Case(1, 2, 40, 33, 64, BF16, Variant(keys, lse=True))
    inputs, keywords = case.inputs(), case.keywords()
    first, again = (spec.evaluate(attention, inputs, keywords, True) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in GRADS)
    for i, name in enumerate(GRADS):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs[:3])]
        out, lse = attention(*leaves, **keywords, return_lse=True)
        grads = spec.gradients(out, lse, True)
        [got] = torch.autograd.grad([out, lse], [leaves[i]], [grads.out, grads.lse])
        assert torch.equal(got, first[name]), name


def test_nan_where_nothing_looks() -> None:
    """Keys that no query sees and queries that see no key reach nothing."""
    q, k, v, *_ = Case(1, 2, 40, 60, 64, BF16).inputs()
    ends = torch.tensor([[5, 41]] * 33 + [[7, 7]] * 7, dtype=torch.int32)
    given = {"kv_range": ends[None, None]}
    wanted = spec.evaluate(attention, spec.Inputs(q, k, v), given)
    for t, hidden in ((k, [*range(5), *range(41, 60)]), (v, [4, 41]), (q, range(33, 40))):
        t[:, :, list(hidden)] = math.nan
    got = spec.evaluate(attention, spec.Inputs(q, k, v), given)
    for name in GRADS:
        assert wanted[name].isfinite().all()
        assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_reaches_what_sees_it(masked: bool) -> None:
    """Of a query: its gradient and those of its keys. Of a key: its gradient, and its queries'.

    Not tiles that all look away, by causality; a mask is read entry by entry, and 0 * NaN of
    query and key is NaN in their gradients, as in eager.
    """
    n, at = 70, 33
    rule: dict[str, Any] = {"is_causal": True}
    if masked:
        rule = {"attn_mask": torch.ones(n, n, dtype=torch.bool).tril()}
    for side in range(2):
        inputs = Case(1, 2, n, n, 24, BF16).inputs()
        (inputs.query, inputs.key)[side][0, 1, at, 5] = math.nan
        got = spec.evaluate(attention, inputs, rule)
        assert all(got[name][:, 0].isfinite().all() for name in GRADS)
        own, others = got[GRADS[side]][0, 1], got[GRADS[1 - side]][0, 1]
        assert own[at].isnan().all()
        if side == 0:
            assert others[: at + 1].isnan().all()
            assert masked or others[48:].isfinite().all()
            assert got["value.grad"][0, 1, : at + 1].isnan().all()
            assert got["value.grad"][0, 1, at + 1 :].isfinite().all()
        else:
            assert others[at:].isnan().all()
            assert masked or others[:32].isfinite().all()


def test_lowest_number_as_mask() -> None:
    """It hides keys as -inf does; where it is all there is, P is finite."""
    leaves = [t.detach().requires_grad_() for t in Case(1, 2, 20, 40, 16, FP16).inputs()[:3]]

    def grads(hidden: float, rows: int) -> tuple[Tensor, ...]:
        mask = torch.full((20, 40), hidden)
        mask[:10, :7] = 0.0
        out = attention(*leaves, mask)
        grad = spec.gradients(out, out, False).out
        grad[:, :, rows:] = 0.0
        return torch.autograd.grad(out, leaves, grad)

    lowest = torch.finfo(torch.float32).min
    for got, wanted in zip(grads(lowest, 10), grads(-math.inf, 10), strict=True):
        assert torch.equal(got, wanted)
    assert all(grad.isfinite().all() for grad in grads(lowest, 20))
