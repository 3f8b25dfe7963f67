"""The reference of attention and attention_varlen against the definition, in scalars and loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_kernels import reference
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant, VarlenCase
from vlm_kernels.testing.tolerances import assert_close

Row = list[float]


def normalised(x: Row, norm: tuple | None, head: int) -> Row:
    if norm is None:
        return x
    weight, bias, eps, kind = norm
    weight, bias = (
        t if t is None else (t if t.ndim == 1 else t[head]).tolist() for t in (weight, bias)
    )
    mean = math.fsum(x) / len(x) if kind == "layer" else 0.0
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x) + eps)
    return [
        (v - mean) / spread * weight[i] + (bias[i] if bias is not None else 0.0)
        for i, v in enumerate(x)
    ]


def rotated(x: Row, rope: tuple | None, batch: int, position: int) -> Row:
    """Each pair of features as a complex number, times e^(i angle)."""
    if rope is None:
        return x
    tables = [t[batch % len(t)] if t.ndim == 3 else t for t in rope[:2]]
    cos, sin = (t[position].tolist() for t in tables)
    x = list(x)
    for p in range(len(cos)):
        interleaved = len(rope) == 3 and rope[2] == "interleaved"
        a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + len(cos))
        z = complex(x[a], x[b]) * complex(cos[p], sin[p])
        x[a], x[b] = z.real, z.imag
    return x


def entry(t: Tensor, *index: int) -> Any:
    """With broadcasting from the left, as of a mask of few dimensions."""
    index = index[len(index) - t.ndim :]
    return t[tuple(0 if size == 1 else i for i, size in zip(index, t.shape))].item()


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any], shift: int = 0, first: int = 0
) -> tuple[Tensor, Tensor]:
    """One entry after the other. Query i is at the place of key i + shift; keys begin at row
    `first` of the tables of rotation."""
    (b, h, nq, d), (_, kv_heads, nk, dv) = q.shape, v.shape
    out, lse = torch.zeros(b, h, nq, dv).double(), torch.zeros(b, h, nq).double()
    scale = keywords.get("scale")
    scale = 1 / math.sqrt(d) if scale is None else scale
    softcap, mask = keywords.get("softcap", 0.0), keywords.get("attn_mask")
    rope, kv_range = keywords.get("rope"), keywords.get("kv_range")
    left, right = keywords.get("window") or (-1, -1)
    for n, head, i in ((n, head, i) for n in range(b) for head in range(h) for i in range(nq)):
        group = head // (h // kv_heads)
        row = normalised(q[n, head, i].tolist(), keywords.get("q_norm"), head)
        row = rotated(row, rope, n, first + i + nk - nq)
        scores = {}
        for j in range(nk):
            seen = not keywords.get("is_causal") or j <= i + shift
            seen = seen and (left < 0 or j >= i + shift - left)
            seen = seen and (right < 0 or j <= i + shift + right)
            if kv_range is not None:
                begin, end = (entry(kv_range[..., e], n, head, i) for e in range(2))
                seen = seen and begin <= j < end
            if mask is not None and mask.dtype == torch.bool:
                seen = seen and entry(mask, n, head, i, j)
            if not seen:
                continue
            column = normalised(k[n, group, j].tolist(), keywords.get("k_norm"), group)
            column = rotated(column, rope, n, first + j)
            s = scale * math.fsum(x * y for x, y in zip(row, column))
            s = softcap * math.tanh(s / softcap) if softcap else s
            if mask is not None and mask.dtype != torch.bool:
                s += entry(mask, n, head, i, j)
            if s != -math.inf:
                scores[j] = s
        if not scores:
            lse[n, head, i] = -math.inf
            continue
        largest = max(scores.values())
        total = math.fsum(math.exp(s - largest) for s in scores.values())
        lse[n, head, i] = largest + math.log(total)
        for j, s in scores.items():
            out[n, head, i] += math.exp(s - largest) / total * v[n, group, j].double()
    return out, lse


def assert_is_definition(name: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]):
    assert torch.equal(got[1] == -math.inf, wanted[1] == -math.inf), name
    for value, expected in zip(got, wanted, strict=True):
        value, expected = (torch.where(t == -math.inf, 0, t) for t in (value, expected))
        assert_close(name, value, 0.0, expected)


def with_norms(inputs: spec.Inputs, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the call."""
    return spec.call(lambda q, k, v, **found: found, inputs, keywords)


@pytest.mark.parametrize("variant", spec.all_variants(), ids=str)
def test_attention_is_the_definition(variant: Variant) -> None:
    grouped = {"kv_heads": 1} if variant.layout == "bhnd" else {}
    case = Case(2, 2, 3, 5, 4, torch.float64, variant, dv=2, **grouped)
    inputs, keywords = case.inputs(), case.keywords()
    got = spec.call(reference.attention, inputs, {**keywords, "return_lse": True})
    wanted = by_definition(*inputs[:3], with_norms(inputs, keywords))
    assert_is_definition(str(case), got, wanted)


@pytest.mark.parametrize("variant", spec.covering_variants("attention_varlen"), ids=str)
def test_attention_varlen_is_the_definition(variant: Variant) -> None:
    segments = ((2, 5), (0, 3), (4, 4), (1, 2))
    if variant.rope == "none":
        segments += ((3, 0), (5, 3))
    case = VarlenCase(segments, 4, 4, torch.float64, variant, kv_heads=2, dv=3, outside=2)
    inputs, keywords = case.inputs(), case.keywords()
    got = spec.call(reference.attention_varlen, inputs, {**keywords, "return_lse": True})
    given = with_norms(inputs, keywords)
    out = torch.zeros(case.nq, 4, 3).double()
    lse = torch.full((4, case.nq), -math.inf).double()
    first_q = first_k = 0
    for nq, nk in segments:
        q = inputs.query[first_q : first_q + nq].transpose(0, 1)[None]
        k, v = (t[first_k : first_k + nk].transpose(0, 1)[None] for t in inputs[1:3])
        o, statistics = by_definition(q, k, v, given, nk - nq, first_k)
        out[first_q : first_q + nq] = o[0].transpose(0, 1)
        lse[:, first_q : first_q + nq] = statistics[0]
        first_q, first_k = first_q + nq, first_k + nk
    assert_is_definition(str(case), got, (out, lse))


@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_attention_is_that_of_torch(kv_heads: int | None) -> None:
    case = Case(2, 4, 7, 9, 6, torch.float64, kv_heads=kv_heads)
    q, k, v, *_ = case.inputs()
    gqa = {"enable_gqa": kv_heads is not None}
    mask = torch.randn(2, 1, 7, 9).double()
    for keywords in ({}, {"is_causal": True}, {"attn_mask": mask > 0}, {"attn_mask": mask}):
        wanted = F.scaled_dot_product_attention(q, k, v, **keywords, **gqa)
        torch.testing.assert_close(reference.attention(q, k, v, **keywords, **gqa), wanted)


@pytest.mark.parametrize("op", spec.OPS)
def test_gradients_are_those_of_the_results(op: str) -> None:
    for variant in spec.covering_variants(op):
        if variant == Variant(variant.keys, layout=variant.layout) and variant.keys != "range_each":
            continue  # which keys are seen, and where they lie, is no part of a gradient's formula
        case: spec.AnyCase = Case(1, 2, 3, 4, 4, torch.float64, variant, kv_heads=1)
        if op == "attention_varlen":
            case = VarlenCase(((2, 3), (1, 1)), 2, 4, torch.float64, variant, outside=1)
        keywords = case.keywords()
        leaves = case.inputs().map(lambda t: t.double().requires_grad_())

        def results(*given: Tensor, leaves: Any = leaves, keywords: Any = keywords) -> Any:
            filled = iter(given)
            inputs = spec.Inputs(*(t if t is None else next(filled) for t in leaves))
            fn = getattr(reference, op)
            out, lse = spec.call(fn, inputs, {**keywords, "return_lse": True})
            total = (out * torch.arange(out.numel()).view_as(out).cos()).sum()
            return total + torch.where(lse == -math.inf, 0, lse.square()).sum()

        given = tuple(leaves.named().values())
        assert torch.autograd.gradcheck(results, given, fast_mode=True), str(case)


def test_the_layout_of_the_result_is_that_of_the_query() -> None:
    for layout in ("bhnd", "bnhd"):
        q, k, v = spec.make_inputs(2, 3, 5, 5, 4, layout=layout)[:3]
        out = reference.attention(q, k, v)
        assert (out.transpose(1, 2) if layout == "bnhd" else out).is_contiguous()


def test_costs() -> None:
    plain, causal = Case(2, 3, 8, 8, 4), Case(2, 3, 8, 8, 4, variant=Variant("causal"))
    assert spec.flops(plain, "fwd") == 4 * 2 * 3 * 8 * 8 * 4
    assert spec.flops(plain, "bwd") == 10 * 2 * 3 * 8 * 8 * 4
    assert spec.flops(plain, "full") == 14 * 2 * 3 * 8 * 8 * 4
    assert spec.flops(causal, "fwd") == 4 * 2 * 3 * (8 * 9 // 2) * 4
    assert spec.flops(Case(1, 1, 2, 3, 4, dv=5), "bwd") == 2 * 2 * 3 * (3 * 4 + 2 * 5)
    packed = VarlenCase(((3, 3), (2, 5)), 2, 4, variant=Variant("causal"))
    assert spec.visible_pairs(packed) == 2 * (6 + 4 + 5)
    each = Case(2, 3, 9, 11, 4, variant=Variant("causal_window_range"))
    seen = spec.dense_mask(each.keywords(), 9, 11)
    assert seen is not None
    assert spec.visible_pairs(each) == int(seen.expand(2, 3, 9, 11).sum())
    assert spec.bytes_moved(plain, "fwd") == 4 * 4 * plain.inputs().query.numel()
