"""clip_loss and siglip_loss: the reference against the definition, backends against fp64."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant
from vlm_kernels.testing.tolerances import assert_close

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
if os.environ.get("TRITON_INTERPRET") == "1":  # minutes: tests/triton has a covering subset
    BACKENDS.append("triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
ops = pytest.mark.parametrize("op", spec.OPS)
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def function(op: str, backend: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, op), backend=backend, **keywords)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# --- the reference against the definition, in scalars and loops ---


def pairs_by_definition(n: int, m: int, keywords: dict[str, Any]) -> tuple[list, list]:
    labels, image_ids, text_ids = (keywords.get(k) for k in ("labels", "image_ids", "text_ids"))
    positive = [[i == j for j in range(m)] for i in range(n)]
    kept = [[True] * m for _ in range(n)]
    for i in range(n):
        for j in range(m):
            if labels is not None:
                positive[i][j] = int(labels[i]) == j
            elif image_ids is not None and text_ids is not None:
                same_id = int(image_ids[i]) == int(text_ids[j])
                if keywords.get("ignore_same_ids"):
                    kept[i][j] = i == j or not same_id
                else:
                    positive[i][j] = same_id
    return positive, kept


def transposed(table: list[list[Any]], m: int) -> list[list[Any]]:
    return [[row[j] for row in table] for j in range(m)]


def log_sum_exp(values: list[float]) -> float:
    return max(values) + math.log(math.fsum(math.exp(v - max(values)) for v in values))


def clip_by_definition(z: list, m: int, keywords: dict[str, Any]) -> Any:
    """-sum of target * log softmax, the target (1 - e) on positives and e on what is kept."""
    n, e = len(z), keywords["label_smoothing"]
    positive, kept = pairs_by_definition(n, m, keywords)
    weights = keywords.get("weights") or (None, None)
    losses, sums, means = [], [], []
    sides = [("image_to_text", z, positive, kept, weights[0])]
    sides += [("text_to_image", *(transposed(t, m) for t in (z, positive, kept)), weights[1])]
    for direction, table, is_positive, is_kept, weight in sides:
        if keywords["directions"] not in ("both", direction):
            losses.append([0.0] * len(table))
            continue
        rows, total = [], 0.0
        for i, row in enumerate(table):
            if not any(is_positive[i]):
                rows.append(0.0)
                continue
            lse = log_sum_exp([v for v, k in zip(row, is_kept[i]) if k])
            target = [
                (1 - e) * p / sum(is_positive[i]) + e * k / sum(is_kept[i])
                for p, k in zip(is_positive[i], is_kept[i])
            ]
            w = 1.0 if weight is None else float(weight[i])
            rows.append(w * math.fsum(t * (lse - v) for t, v in zip(target, row)))
            total += w
        losses.append(rows)
        sums.append(math.fsum(rows))
        means.append(sums[-1] / total if total else 0.0)
    if keywords["reduction"] == "none":
        return tuple(losses)
    values = means if keywords["reduction"] == "mean" else sums
    return sum(values) / len(values)


def siglip_by_definition(z: list, m: int, keywords: dict[str, Any]) -> Any:
    positive, kept = pairs_by_definition(len(z), m, keywords)
    row_weight, column_weight = keywords.get("weights") or (None, None)
    rows, total = [], 0.0
    for i, row in enumerate(z):
        w = 1.0 if row_weight is None else float(row_weight[i])
        total += w
        terms = [
            (1.0 if column_weight is None else float(column_weight[j]))
            * -math.log(1 / (1 + math.exp(-v if positive[i][j] else v)))
            for j, v in enumerate(row)
            if kept[i][j]
        ]
        rows.append(w * math.fsum(terms))
    if keywords["reduction"] == "none":
        return rows
    value = math.fsum(rows)
    return value if keywords["reduction"] == "sum" else value / total if total else 0.0


BY_DEFINITION = {"clip_loss": clip_by_definition, "siglip_loss": siglip_by_definition}


@pytest.mark.parametrize("shape", [(6, 6), (7, 4), (3, 5), (1, 1)])
@ops
def test_reference_is_the_definition(op: str, shape: tuple[int, int]) -> None:
    for variant in spec.all_variants(op):
        case = Case(*shape, 5, torch.float64, variant, scale=8.0, bias=-0.5)
        inputs, keywords = case.inputs(), case.keywords()
        z = inputs.image_features @ inputs.text_features.T * inputs.logit_scale - 0.5
        wanted = BY_DEFINITION[op](z.tolist(), shape[1], keywords)
        got = getattr(reference, op)(*inputs, **keywords)
        if not isinstance(got, tuple):
            got, wanted = (got,), (wanted,)
        for value, expected in zip(got, wanted, strict=True):
            assert_close(str(case), value, 0.0, torch.tensor(expected, dtype=torch.float64))


def test_reference_is_cross_entropy_on_the_diagonal() -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 6, torch.float64)
    z, target = scale * x @ y.T, torch.arange(9)
    for smoothing in (0.0, 0.2):
        row, column = (F.cross_entropy(t, target, label_smoothing=smoothing) for t in (z, z.T))
        got = reference.clip_loss(x, y, scale, label_smoothing=smoothing)
        torch.testing.assert_close(got, (row + column) / 2)


@ops
def test_reference_is_the_formula_of_open_clip(op: str) -> None:
    x, y, scale, bias = spec.make_inputs(9, 9, 6, torch.float64, scale=10.0, bias=-10.0)
    peer = spec.PEERS[op]["open_clip"]
    torch.testing.assert_close(getattr(reference, op)(x, y, scale, bias), peer(x, y, scale, bias))


@ops
def test_reference_gradients_are_those_of_the_loss(op: str) -> None:
    variants = [v for v in spec.all_variants(op) if v.reduction == "none" and v.weights == "both"]
    for variant in variants:
        case = Case(5, 4, 3, torch.float64, variant, scale=2.0, bias=-0.5)
        leaves = case.inputs().map(lambda t: t.double().requires_grad_())

        def loss(*args: Any, keywords: dict[str, Any] = case.keywords()) -> Any:  # noqa: B008
            values = getattr(reference, op)(*args, **keywords)
            # One direction alone leaves zeros that depend on nothing.
            return torch.cat(values) if isinstance(values, tuple) else values

        assert torch.autograd.gradcheck(loss, tuple(leaves)), str(case)


# --- accuracy ---


@needs_cpu
@pytest.mark.parametrize("case", [c for op in spec.OPS for c in spec.cases(op, full=True)], ids=str)
def test_accuracy(case: Case) -> None:
    spec.check(case, function(case.op, "cpu"))


@backends
@ops
@pytest.mark.parametrize("d", [1024, 2048])
def test_long_sums_of_one_sign(d: int, op: str, backend: str) -> None:
    """Similar features: an error of each sum that grows with its terms reaches the gradients."""
    for data in ("opposed_row", "opposed_column"):
        spec.check(Case(40, 40, d, variant=Variant(op), data=data), function(op, backend))


# The full grid is for the kernels; the others meet each length, each D and each keyword once.
@pytest.mark.parametrize(
    ("backend", "workspace_mb"), [("reference", None), pytest.param("cpu", 1, marks=needs_cpu)]
)
@pytest.mark.parametrize("case", [c for op in spec.OPS for c in spec.cases(op)], ids=str)
def test_accuracy_covering(case: Case, backend: str, workspace_mb: int | None) -> None:
    spec.check(case, function(case.op, backend, workspace_mb=workspace_mb))


@needs_cpu
@pytest.mark.parametrize("variant", [v for op in spec.OPS for v in spec.all_variants(op)], ids=str)
def test_every_combination_of_keywords(variant: Variant) -> None:
    case = Case(37, 41, 24, torch.float32, variant, 30.0, -1.0)
    # Without room to keep the similarity it is computed twice, or one direction in one pass.
    for workspace_mb in (None, 1):
        spec.check(case, function(case.op, "cpu", workspace_mb=workspace_mb))


@backends
@pytest.mark.parametrize("data", spec.DATA)
@pytest.mark.parametrize("scale", [100.0, -100.0])
@ops
@dtypes
def test_hard_data(data: str, scale: float, op: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(150, 150, 64, dtype, Variant(op, reduction="none"), scale, data=data)
    for name, value in spec.check(case, function(op, backend)).items():
        assert value.isfinite().all(), name


@backends
@pytest.mark.parametrize("bias", [-4.0, -8.0, -14.0, -16.0, -17.0, -20.0, -40.0, 40.0])
@dtypes
def test_sigmoid_loss_of_easy_pairs(bias: float, dtype: torch.dtype, backend: str) -> None:
    """log(1 + e) is 6 % off at -16 and 0 below -17; and what a GradScaler sends back must find
    gradients that have not been flushed to 0 on the way."""
    variant = Variant("siglip_loss", "no_positive" if bias < 0 else "one_id")
    case = Case(33, 40, 16, dtype, variant, 2.0, bias)
    spec.check(case, function("siglip_loss", backend), grad=2.0**16)


@backends
@ops
def test_scale_of_zero(op: str, backend: str) -> None:
    spec.check(Case(33, 40, 16, variant=Variant(op), scale=0.0, bias=0.5), function(op, backend))


@backends
@pytest.mark.parametrize("grad", [-3.0, 2.0**-24, 2.0**16])
@pytest.mark.parametrize("pairs", ["diagonal", "no_positive"])
@ops
@dtypes
def test_gradient_of_the_loss(
    grad: float, pairs: str, op: str, dtype: torch.dtype, backend: str
) -> None:
    # 2^16 is the first scale of a GradScaler; without it fp16 gradients of 2^-24 would be 0.
    if dtype == torch.float16 and grad == 2.0**-24:
        grad = 2.0**8
    case = Case(129, 129, 65, dtype, Variant(op, pairs), 10.0, -10.0)
    spec.check(case, function(op, backend), grad=grad)


# --- layouts ---


def padded_rows(x: Tensor) -> Tensor:
    n, d = x.shape
    whole = x.new_full((n + 3, d + 5), math.nan)
    whole[2 : 2 + n, 3 : 3 + d] = x
    return whole[2 : 2 + n, 3 : 3 + d]


def transposed_view(x: Tensor) -> Tensor:
    n, d = x.shape
    whole = x.new_full((d + 2, n + 3), math.nan)
    whole[1 : 1 + d, 2 : 2 + n] = x.T
    return whole[1 : 1 + d, 2 : 2 + n].T


def every_second(x: Tensor) -> Tensor:
    n, d = x.shape
    whole = x.new_full((2 * n + 1, 2 * d + 1), math.nan)
    whole[1::2, 1::2] = x
    return whole[1::2, 1::2]


VIEWS = [padded_rows, transposed_view, every_second]


@backends
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 17, 16), (65, 130, 63), (130, 65, 64)], ids=str)
@ops
@dtypes
def test_views(
    view: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    op: str,
    dtype: torch.dtype,
    backend: str,
) -> None:
    fn = function(op, backend)
    case = Case(*shape, dtype, Variant(op))
    for views in ((view, view), (view, Tensor.clone), (Tensor.clone, view)):
        x_view, y_view = views
        spec.check(case, lambda x, y, *a, v=views, **k: fn(v[0](x), v[1](y), *a, **k))
        x, y, *_ = case.inputs()
        assert torch.equal(x_view(x), x)
        assert torch.equal(y_view(y), y)


@backends
@ops
def test_expanded_rows(op: str, backend: str) -> None:
    """Rows of stride 0, each with its own part in the gradient."""
    x, y, scale, _ = spec.make_inputs(20, 1, 24)
    results = []
    for fn, dtype in (
        (function(op, backend), torch.float32),
        (getattr(reference, op), torch.float32),
        (getattr(reference, op), torch.float64),
    ):
        leaf = y.to(dtype).requires_grad_()
        loss = fn(x.to(dtype), leaf.expand(20, 24), scale)
        results.append(torch.autograd.grad(loss, leaf)[0])
    ours, eager, exact = results
    assert_close("text_features.grad", ours, eager, exact, "bwd", terms=scale.item())


@backends
@ops
def test_gradient_that_is_a_view(op: str, backend: str) -> None:
    """Unreduced losses may be given an expanded or a strided gradient."""
    inputs = Case(19, 19, 8, variant=Variant(op)).inputs()
    results = []
    for make in (Tensor.contiguous, lambda g: g):
        leaf = inputs.image_features.clone().requires_grad_()
        loss = function(op, backend, reduction="none")(leaf, *inputs[1:3])
        row = loss[0] if isinstance(loss, tuple) else loss
        row.backward(make(torch.linspace(0, 1, 38)[::2]))
        row2 = function(op, backend, reduction="none")(leaf, *inputs[1:3])
        (row2[0] if isinstance(row2, tuple) else row2).backward(make(torch.ones(()).expand(19)))
        results.append({"grad": leaf.grad})
    same(*results)


# --- parameters ---


@backends
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("parameter", [torch.float16, torch.bfloat16, torch.float64])
@ops
@dtypes
def test_parameter_dtype_and_shape(
    shape: tuple[int, ...],
    parameter: torch.dtype,
    op: str,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Values that every dtype holds: then only the rounding of the gradients differs."""
    x, y, _, _ = spec.make_inputs(33, 33, 24, dtype)
    fn = function(op, backend)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (16.0, -2.0))
    loss = fn(x, y, scale, bias)
    loss.backward()
    other = [torch.full(shape, v, dtype=parameter, requires_grad=True) for v in (16.0, -2.0)]
    other_loss = fn(x, y, *other)
    other_loss.backward()
    assert torch.equal(loss, other_loss)
    for wanted, got in zip((scale, bias), other, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert got.grad.shape == shape
        assert got.grad.dtype == parameter
        # fp64 gradients may have digits that fp32 has not.
        common = torch.float32 if parameter == torch.float64 else parameter
        assert torch.equal(got.grad.reshape(()).to(common), wanted.grad.to(common))
    assert torch.equal(fn(x, y, 16.0, -2.0), loss)
    assert torch.equal(fn(x, y, 16, -2), loss)


@backends
@ops
@dtypes
def test_loss_and_gradient_dtypes(op: str, dtype: torch.dtype, backend: str) -> None:
    inputs = Case(9, 9, 8, dtype, Variant(op), bias=-1.0).inputs()
    results = spec.evaluate(function(op, backend), inputs, {})
    assert results["loss"].dtype == torch.float32
    assert results["loss"].shape == ()
    for name, leaf in zip(inputs._fields, inputs, strict=True):
        grad = results[f"{name}.grad"]
        assert leaf is not None
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
        assert grad.is_contiguous()


@ops
def test_fp64_runs_on_the_reference(op: str) -> None:
    inputs = Case(9, 9, 8, torch.float64, Variant(op)).inputs()
    loss = getattr(vlm_kernels, op)(*inputs)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, getattr(reference, op)(*inputs))


LEAVES = spec.Inputs._fields


@backends
@pytest.mark.parametrize("wanted", [(a,) for a in LEAVES] + [LEAVES[:2], LEAVES[1:], LEAVES[::2]])
@pytest.mark.parametrize(
    "variant",
    [Variant("clip_loss", directions=d) for d in spec.DIRECTIONS] + [Variant("siglip_loss")],
    ids=str,
)
@dtypes
def test_only_some_gradients(
    wanted: tuple[str, ...], variant: Variant, dtype: torch.dtype, backend: str
) -> None:
    """Locked towers, constant scales."""
    case = Case(70, 66, 40, dtype, variant, 20.0, -2.0)
    inputs = case.inputs()
    for name, leaf in zip(LEAVES, inputs, strict=True):
        assert leaf is not None
        leaf.requires_grad_(name in wanted)
    function(case.op, backend)(*inputs, **case.keywords()).backward()
    for name, leaf in zip(LEAVES, inputs, strict=True):
        assert leaf is not None
        if name in wanted:
            assert leaf.grad is not None
            spec.check_result(case, f"{name}.grad", leaf.grad)
        else:
            assert leaf.grad is None


@backends
@ops
def test_no_gradient_wanted(op: str, backend: str) -> None:
    inputs = Case(30, 31, 12, variant=Variant(op), bias=-1.0).inputs()
    fn = function(op, backend)
    plain = fn(*inputs)
    assert not plain.requires_grad
    for leaf in inputs:
        assert leaf is not None
        leaf.requires_grad_()
    with_grad = fn(*inputs)
    assert with_grad.requires_grad
    with torch.no_grad():
        without = fn(*inputs)
    with torch.inference_mode():
        inference = fn(*inputs)
    assert not without.requires_grad
    assert inference.is_inference()
    for value in (without, inference, with_grad):
        torch.testing.assert_close(value.detach().clone(), plain)


# --- autograd ---


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@ops
@dtypes
def test_backward_twice_is_the_same(
    reduction: str, op: str, dtype: torch.dtype, backend: str
) -> None:
    leaves = Case(50, 50, 33, dtype, Variant(op), bias=-1.0).inputs()
    leaves = leaves.map(lambda t: t.requires_grad_())
    loss = function(op, backend, reduction=reduction)(*leaves)
    total = sum(o.sum() for o in loss) if isinstance(loss, tuple) else loss.sum()
    first = torch.autograd.grad(total, list(leaves), retain_graph=True)
    second = torch.autograd.grad(total, list(leaves))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@backends
@ops
def test_backward_twice_without_retain_graph(op: str, backend: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    loss = function(op, backend)(x.requires_grad_(), y, scale)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


LOSSES = [Variant("clip_loss"), Variant("clip_loss", directions="image_to_text")]
LOSSES += [Variant("siglip_loss")]
losses = pytest.mark.parametrize("variant", LOSSES, ids=str)


def loss_of(variant: Variant, backend: str) -> Callable[..., Any]:
    """Without room for the similarity, so that one direction forms its gradients in the forward."""
    keywords = {"directions": variant.directions} if variant.op == "clip_loss" else {}
    return function(variant.op, backend, workspace_mb=1, **keywords)


@losses
@needs_cpu
def test_second_derivatives_are_an_error(variant: Variant) -> None:
    fn = loss_of(variant, "cpu")
    x, y, scale, _ = spec.make_inputs(300, 300, 8)
    for power in (1, 2):
        loss = fn(x.requires_grad_(), y, scale) ** power
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{variant.op} .*once_differentiable"):
            grad.sum().backward()


@losses
@backends
def test_a_bias_that_learns_beside_a_scale_that_is_a_number(variant: Variant, backend: str) -> None:
    fn = loss_of(variant, backend)
    inputs = spec.make_inputs(300, 280, 8, bias=-2.0)
    wanted = spec.evaluate(fn, inputs, {})
    x, _, scale, bias = inputs.map(lambda t: t.clone().requires_grad_())
    loss = fn(x, inputs.text_features, scale.item(), bias)
    grads = torch.autograd.grad(loss, (bias, x))
    for name, grad in zip(("logit_bias", "image_features"), grads, strict=True):
        torch.testing.assert_close(grad, wanted[f"{name}.grad"])


@losses
@needs_cpu
def test_one_gradient_of_several(variant: Variant) -> None:
    """autograd.grad asks for some of what the forward prepared."""
    fn = loss_of(variant, "cpu")
    inputs = spec.make_inputs(300, 280, 8, bias=-2.0)
    wanted = spec.evaluate(fn, inputs, {})
    for name in LEAVES:
        leaves = inputs.map(lambda t: t.clone().requires_grad_())
        [grad] = torch.autograd.grad(fn(*leaves), [getattr(leaves, name)])
        torch.testing.assert_close(grad, wanted[f"{name}.grad"])  # other blocks fit


@losses
@needs_cpu
def test_saved_tensor_hooks(variant: Variant) -> None:
    fn = loss_of(variant, "cpu")
    inputs = spec.make_inputs(300, 280, 8, bias=-2.0)
    wanted = spec.evaluate(fn, inputs, {})
    leaves = inputs.map(lambda t: t.clone().requires_grad_())
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (packed.append(t), t.clone())[1], torch.clone
    ):
        loss = fn(*leaves)
    before = [t.clone() for t in packed]
    loss.backward()
    assert packed
    assert all(torch.equal(a, b) for a, b in zip(packed, before, strict=True))
    for name, leaf in zip(LEAVES, leaves, strict=True):
        assert torch.equal(leaf.grad, wanted[f"{name}.grad"])


@losses
@needs_cpu
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(variant: Variant) -> None:
    """is_grads_batched runs the backward once under vmap: nothing may be overwritten."""
    fn = loss_of(variant, "cpu")
    x, y, scale, _ = spec.make_inputs(300, 280, 8)
    loss = fn(x.requires_grad_(), y, scale)
    factors = torch.tensor([1.0, -2.0, 0.5])
    [grads] = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    loss = fn(x, y, scale)
    for factor, grad in zip(factors, grads, strict=True):
        [wanted] = torch.autograd.grad(loss, x, factor, retain_graph=True)
        torch.testing.assert_close(grad, wanted)


@backends
@ops
def test_two_graphs_alive(op: str, backend: str) -> None:
    """What a forward keeps for its backward must outlive another forward."""
    fn = function(op, backend)
    case = Case(130, 130, 40, variant=Variant(op), bias=-1.0)
    inputs = [case.inputs(seed) for seed in range(2)]
    wanted = [spec.evaluate(fn, each, {}) for each in inputs]
    leaves = [each.map(lambda t: t.clone().requires_grad_()) for each in inputs]
    losses = [fn(*each) for each in leaves]
    for k in (1, 0):
        losses[k].backward()
    for k in range(2):
        for name, leaf in zip(LEAVES, leaves[k], strict=True):
            assert leaf is not None
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, wanted[k][f"{name}.grad"]), name


@backends
@ops
def test_gradients_accumulate(op: str, backend: str) -> None:
    fn = function(op, backend)
    inputs = Case(20, 20, 16, variant=Variant(op)).inputs()
    once = spec.evaluate(fn, inputs, {})
    leaves = inputs.map(lambda t: t.clone().requires_grad_())
    for _ in range(2):
        fn(*leaves).backward()
    for name, leaf in zip(LEAVES, leaves, strict=False):
        if leaf is not None:
            assert torch.equal(leaf.grad, 2 * once[f"{name}.grad"])


@backends
@ops
def test_one_tensor_for_both_sides(op: str, backend: str) -> None:
    """SimCLR-like use: the gradients of both roles meet in one leaf."""
    x, _, scale, _ = spec.make_inputs(24, 24, 16, scale=5.0)
    got = x.clone().requires_grad_()
    function(op, backend)(got, got, scale).backward()
    sides = [x.clone().requires_grad_() for _ in range(2)]
    function(op, backend)(*sides, scale).backward()
    assert got.grad is not None
    torch.testing.assert_close(got.grad, sides[0].grad + sides[1].grad)


@backends
def test_input_changed_between_forward_and_backward(backend: str) -> None:
    """Only of clip_loss: siglip_loss may form its gradients in the forward."""
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    x.requires_grad_()
    y.requires_grad_()
    loss = function("clip_loss", backend)(x, y, scale)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- determinism, threads, instruction sets, workspace ---

TELLING = [
    Case(1, 1, 1),
    Case(17, 65, 33, torch.float32, Variant("clip_loss", "ids"), 30.0),
    Case(257, 129, 65, torch.float32),
    Case(257, 1025, 64, torch.bfloat16, Variant("clip_loss", "ignore_same_ids", "both", 0.1)),
    Case(1025, 257, 100, torch.float16, Variant("clip_loss", directions="image_to_text")),
    Case(300, 300, 512, torch.bfloat16),
    Case(257, 129, 65, torch.float32, Variant("siglip_loss", "ids", "both"), 117.0, -16.5),
    Case(1025, 257, 64, torch.bfloat16, Variant("siglip_loss"), 117.0, -16.5),
    Case(257, 1025, 100, torch.float16, Variant("siglip_loss", reduction="none"), 10.0, -10.0),
]
telling = pytest.mark.parametrize("case", TELLING, ids=str)


@backends
@telling
def test_repeat_is_bitwise_the_same(case: Case, backend: str) -> None:
    fn = function(case.op, backend)
    first = spec.evaluate(fn, case.inputs(), case.keywords())
    for _ in range(3):
        same(first, spec.evaluate(fn, case.inputs(), case.keywords()))


@needs_cpu
@pytest.mark.parametrize("shape", [(1025, 257), (300, 300), (700, 1100), (17, 1030)], ids=str)
@ops
@dtypes
def test_thread_count_does_not_matter(
    shape: tuple[int, int],
    op: str,
    dtype: torch.dtype,
    isas: Callable[[], Iterator[str]],
) -> None:
    case = Case(*shape, 64, dtype, Variant(op), 50.0, -5.0)
    for isa in isas():
        for workspace_mb in (None, 1):
            fn = function(op, "cpu", workspace_mb=workspace_mb)
            results = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(spec.evaluate(fn, case.inputs(), {}))
            for count, other in zip((2, 3, 4), results[1:]):
                for name, value in results[0].items():
                    where = f"{name}, {isa}, workspace_mb={workspace_mb}, {count} threads"
                    assert torch.equal(value, other[name]), where


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """A function that goes through the instruction sets that this CPU has."""
    extension = importlib.import_module("vlm_kernels._C")
    before = extension.cpu_isa()

    def each() -> Iterator[str]:
        for name in extension.cpu_isas():
            extension.set_cpu_isa(name)
            assert extension.cpu_isa() == name
            yield name

    yield each
    extension.set_cpu_isa(before)


@needs_cpu
@pytest.mark.parametrize(
    "case", [*TELLING, *(c for op in spec.OPS for c in spec.cases(op))], ids=str
)
def test_each_instruction_set(case: Case, isas: Callable[[], Iterator[str]]) -> None:
    for _ in isas():
        spec.check(case, function(case.op, "cpu"))


@needs_cpu
def test_every_cpu_has_the_default_instruction_set() -> None:
    extension = importlib.import_module("vlm_kernels._C")
    assert "default" in extension.cpu_isas()
    before = extension.cpu_isa()
    with pytest.raises(ValueError, match="mmx"):
        extension.set_cpu_isa("mmx")
    assert extension.cpu_isa() == before


@needs_cpu
@telling
def test_calls_from_several_threads(case: Case) -> None:
    """They must not share scratch."""
    fn, inputs = function(case.op, "cpu"), [case.inputs(seed) for seed in range(4)]
    wanted = [spec.evaluate(fn, each, case.keywords()) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda each: spec.evaluate(fn, each, case.keywords()), inputs * 4))
    for k, results in enumerate(got):
        same(results, wanted[k % 4])


@backends
@telling
@pytest.mark.parametrize("workspace_mb", [1, 3, 1024])
def test_workspace_does_not_change_the_accuracy(
    case: Case, workspace_mb: int, backend: str
) -> None:
    spec.check(case, function(case.op, backend, workspace_mb=workspace_mb))


@ops
@needs_cpu
def test_workspace_grows_shrinks_and_is_given_back(op: str) -> None:
    case = Case(700, 600, 32, variant=Variant(op))
    for workspace_mb in (64, 1, 256, 1):
        spec.check(case, function(op, "cpu", workspace_mb=workspace_mb))
        vlm_kernels.empty_cache()
    vlm_kernels.empty_cache()


@ops
@needs_cpu
def test_cache_emptied_between_forward_and_backward(op: str) -> None:
    case = Case(300, 200, 32, variant=Variant(op))
    wanted = spec.evaluate(function(op, "cpu"), case.inputs(), {})
    leaves = case.inputs().map(lambda t: t.requires_grad_())
    loss = function(op, "cpu")(*leaves)
    vlm_kernels.empty_cache()
    loss.backward()
    assert leaves.text_features.grad is not None
    assert torch.equal(leaves.text_features.grad, wanted["text_features.grad"])


@backends
@pytest.mark.parametrize("case", [c for op in spec.OPS for c in spec.cases(op)[::5]], ids=str)
def test_uninitialised_memory_is_not_read(case: Case, backend: str) -> None:
    """torch fills what it allocates with NaN in this mode, also when C++ asks for it."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        spec.check(case, function(case.op, backend))
    finally:
        torch.use_deterministic_algorithms(before)


# --- values that are not finite, and empty batches ---


@backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pairs", ["diagonal", "ids", "ignore_same_ids"])
@ops
@dtypes
def test_features_that_are_not_finite(
    value: float, pairs: str, op: str, dtype: torch.dtype, backend: str
) -> None:
    case = Case(70, 70, 20, dtype, Variant(op, pairs))
    for side in range(2):
        inputs = case.inputs()
        inputs[side][3, 2] = value
        results = spec.evaluate(function(op, backend), inputs, case.keywords())
        assert not results["loss"].isfinite()
        if math.isnan(value):
            assert results["loss"].isnan()
            for name, result in results.items():
                assert result.isnan().any(), name


@backends
@ops
def test_a_bad_row_spoils_only_what_depends_on_it(op: str, backend: str) -> None:
    x, y, scale, _ = spec.make_inputs(70, 70, 20)
    x[3, 2] = math.nan
    loss = function(op, backend, reduction="none")(x, y, scale)
    row = loss[0] if isinstance(loss, tuple) else loss
    assert row.isnan().nonzero().flatten().tolist() == [3]
    if isinstance(loss, tuple):
        assert loss[1].isnan().all()


@backends
@ops
def test_parameters_that_are_not_finite(op: str, backend: str) -> None:
    x, y, _, _ = spec.make_inputs(20, 20, 8)
    assert function(op, backend)(x, y, math.nan).isnan()
    if op == "siglip_loss":  # a bias does not reach a softmax
        assert function(op, backend)(x, y, 10.0, math.nan).isnan()
    assert not function(op, backend)(x, y, math.inf).isfinite()


@backends
@pytest.mark.parametrize("shape", [(0, 0, 8), (0, 5, 8), (5, 0, 8)], ids=str)
@ops
@dtypes
def test_empty_batches(
    shape: tuple[int, int, int], op: str, dtype: torch.dtype, backend: str
) -> None:
    for variant in spec.covering_variants(op):
        case = Case(*shape, dtype, variant, bias=-1.0)
        for name, value in spec.check(case, function(op, backend)).items():
            assert not value.any(), name


# --- metrics ---


def metrics_by_definition(z: list, m: int, keywords: dict[str, Any]) -> dict[str, float]:
    positive, kept = pairs_by_definition(len(z), m, keywords)
    metrics: dict[str, float] = {}
    on, off = [], []
    for row, p_row, k_row in zip(z, positive, kept):
        on += [v for v, p in zip(row, p_row) if p]
        off += [v for v, p, k in zip(row, p_row, k_row) if k and not p]
    metrics["positive_logit"] = math.fsum(on) / len(on) if on else 0.0
    metrics["negative_logit"] = math.fsum(off) / len(off) if off else 0.0
    sides = [("image_to_text", z, positive, kept)]
    sides += [("text_to_image", *(transposed(t, m) for t in (z, positive, kept)))]
    for direction, table, is_positive, is_kept in sides:
        hits, entropies = [], []
        for row, p_row, k_row in zip(table, is_positive, is_kept):
            best = max((v for v, p in zip(row, p_row) if p), default=None)
            others = [v for v, p, k in zip(row, p_row, k_row) if k and not p]
            if best is not None:
                hits.append(all(best > v for v in others))
            values = [v for v, k in zip(row, k_row) if k]
            lse = log_sum_exp(values) if values else 0.0
            entropies.append(math.fsum(math.exp(v - lse) * (lse - v) for v in values))
        metrics[f"{direction}_top1"] = sum(hits) / len(hits) if hits else 0.0
        entropy = math.fsum(entropies) / len(entropies) if entropies else 0.0
        metrics[f"{direction}_entropy"] = entropy
        metrics[f"{direction}_perplexity"] = math.exp(entropy)
    return metrics


@backends
@pytest.mark.parametrize("pairs", spec.PAIRS)
@pytest.mark.parametrize("shape", [(40, 40), (40, 23), (23, 40), (1, 1), (9, 1)], ids=str)
@ops
def test_metrics(pairs: str, shape: tuple[int, int], op: str, backend: str) -> None:
    case = Case(*shape, 16, torch.float32, Variant(op, pairs), 12.0, -0.5)
    errors: dict[str, float] = {}
    for seed in range(8):
        inputs, keywords = case.inputs(seed), case.keywords(seed)
        exact = inputs.to(torch.float64)
        z = (exact[0] @ exact[1].T * 12.0 - 0.5).tolist()
        wanted = metrics_by_definition(z, shape[1], keywords)
        _, eager = getattr(reference, op)(*inputs, **keywords, return_metrics=True)
        for name, value in eager.items():
            error = abs(value.item() - wanted[name]) / max(abs(wanted[name]), 1.0)
            errors[name] = max(errors.get(name, 0.0), error)
    inputs, keywords = case.inputs(), case.keywords()
    exact = inputs.to(torch.float64)
    wanted = metrics_by_definition(
        (exact[0] @ exact[1].T * 12.0 - 0.5).tolist(), shape[1], keywords
    )
    loss, got = function(op, backend)(*inputs, **keywords, return_metrics=True)
    torch.testing.assert_close(loss, function(op, backend)(*inputs, **keywords))
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float32, (), False)
        expected = torch.tensor(wanted[name], dtype=torch.float64)
        assert_close(f"{case}: {name}", value, errors[name], expected, terms=1.0)


@backends
@ops
def test_metrics_leave_the_gradients_alone(op: str, backend: str) -> None:
    case = Case(65, 65, 16, variant=Variant(op), bias=-1.0)
    fn = function(op, backend)
    with_metrics = lambda *a, **k: fn(*a, **k, return_metrics=True)[0]  # noqa: E731
    a, b = (spec.evaluate(f, case.inputs(), {}) for f in (fn, with_metrics))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value)


@backends
@ops
def test_metrics_of_unreduced_losses(op: str, backend: str) -> None:
    inputs = Case(9, 9, 8, variant=Variant(op)).inputs()
    loss, metrics = function(op, backend, reduction="none", return_metrics=True)(*inputs)
    plain = function(op, backend, reduction="none")(*inputs)
    torch.testing.assert_close(loss, plain)
    assert set(metrics) >= {"image_to_text_top1", "positive_logit"}


@backends
@ops
def test_a_tie_is_a_miss(op: str, backend: str) -> None:
    x = torch.eye(4)[[0, 1, 2, 2]]
    _, metrics = function(op, backend)(x, x, 5.0, return_metrics=True)
    assert metrics["image_to_text_top1"] == 0.5
    assert metrics["text_to_image_top1"] == 0.5
    # Two positives of one row that tie are both its own.
    ids = torch.tensor([0, 1, 2, 2])
    _, metrics = function(op, backend)(x, x, 5.0, image_ids=ids, text_ids=ids, return_metrics=True)
    assert metrics["image_to_text_top1"] == 1


@backends
@ops
def test_metrics_of_an_empty_batch(op: str, backend: str) -> None:
    for n, m in ((0, 0), (0, 3), (3, 0)):
        inputs = spec.make_inputs(n, m, 4)
        _, metrics = function(op, backend)(*inputs[:3], return_metrics=True)
        for name, value in metrics.items():
            assert value == (1 if name.endswith("perplexity") else 0), name


# --- keywords that mean the same ---


@backends
@ops
def test_ways_to_name_the_same_pairs(op: str, backend: str) -> None:
    inputs = Case(30, 30, 16, variant=Variant(op)).inputs()
    arange, fn = torch.arange(30), function(op, backend)
    plain = spec.evaluate(fn, inputs, {})
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0)) - 10
    for keywords in (
        {"labels": arange},
        {"labels": arange.int()},
        {"image_ids": arange, "text_ids": arange},
        {"image_ids": shuffled, "text_ids": shuffled},
        {"image_ids": arange.int(), "text_ids": arange.int()},
        {"image_ids": arange, "text_ids": arange, "ignore_same_ids": True},
        {"weights": (torch.ones(30), None)},
        {"weights": (None, None)},
    ):
        results = spec.evaluate(fn, inputs, keywords)
        for name, value in plain.items():
            torch.testing.assert_close(results[name], value)


@backends
@ops
def test_weights_of_any_float_dtype(op: str, backend: str) -> None:
    inputs = Case(12, 12, 8, variant=Variant(op)).inputs()
    weights = (torch.arange(12) % 4, torch.arange(12) % 3 / 2)
    fn = function(op, backend)
    wanted = fn(*inputs, weights=tuple(w.float() for w in weights))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(fn(*inputs, weights=tuple(w.to(dtype) for w in weights)), wanted)


@backends
@ops
def test_weights_that_sum_to_zero(op: str, backend: str) -> None:
    case = Case(6, 6, 4, variant=Variant(op))
    keywords = {"weights": (torch.zeros(6), torch.zeros(6))}
    for name, value in spec.evaluate(function(op, backend), case.inputs(), keywords).items():
        assert not value.any(), name


@backends
@ops
def test_non_contiguous_ids_and_weights(op: str, backend: str) -> None:
    case = Case(20, 20, 8, variant=Variant(op, "ids", "both"))
    keywords = case.keywords()
    strided = {k: v for k, v in keywords.items() if not k.endswith("ids")}
    strided |= {k: torch.stack([v, -v], 1)[:, 0] for k, v in keywords.items() if k.endswith("ids")}
    strided["weights"] = tuple(torch.stack([w, -w], 1)[:, 0] for w in keywords["weights"])
    fn = function(op, backend)
    spec.check(case, lambda *args, **_: fn(*args, **strided))


@backends
def test_default_temperature_is_not_a_logarithm(backend: str) -> None:
    x = torch.eye(2)
    loss = function("clip_loss", backend)(x, x, 3.0)
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-3.0)))


# --- wrong input: one clear error ---


def sizes(*shape: int) -> str:
    """As a tuple or as C++ prints it."""
    return r"[\[(]" + ", ".join(map(str, shape)) + r",?[\])]"


X, Y = torch.ones(5, 4), torch.ones(6, 4)
IDS = {"image_ids": torch.arange(5), "text_ids": torch.arange(6)}
BOTH = ("clip_loss", "siglip_loss")
CLIP = ("clip_loss",)
# (ops, arguments, keywords, what the message must name: the argument, what came, what was expected)
WRONG: list[tuple[tuple[str, ...], tuple, dict[str, Any], tuple[str, ...]]] = [
    (BOTH, (X[0], Y, 1.0), {}, ("image_features", sizes(4), "2")),
    (BOTH, (X, Y[None], 1.0), {}, ("text_features", sizes(1, 6, 4), "2")),
    (BOTH, (X, Y[:, :3], 1.0), {}, ("text_features", "3", "4")),
    (
        BOTH,
        (X[:, :0], Y[:, :0], 1.0),
        {},
        ("image_features|features", rf"D = 0|{sizes(5, 0)}", "D > 0|one"),
    ),
    (BOTH, (X, Y.half(), 1.0), {}, ("text_features", "(?i)half|float16", "(?i)float")),
    (BOTH, (X.int(), Y.int(), 1.0), {}, ("image_features", "(?i)int", "float")),
    (BOTH, (X.to(torch.complex64),) * 2 + (1.0,), {}, ("image_features", "(?i)complex", "float")),
    (BOTH, (X, Y.to("meta"), 1.0), {}, ("text_features", "meta", "cpu")),
    (BOTH, (X, [[1.0]], 1.0), {}, ("text_features", "list", "(?i)tensor")),
    (BOTH, (X, Y, torch.ones(2)), {}, ("logit_scale", sizes(2), r"\(1,\)")),
    (BOTH, (X, Y, torch.ones(1, 1)), {}, ("logit_scale", sizes(1, 1), r"\(1,\)")),
    (BOTH, (X, Y, torch.tensor(1)), {}, ("logit_scale", "(?i)int|long", "(?i)float")),
    (BOTH, (X, Y, torch.ones((), device="meta")), {}, ("logit_scale", "meta", "cpu")),
    (BOTH, (X, Y, "1"), {}, ("logit_scale", "str", "(?i)float")),
    (BOTH, (X, Y, 1.0, torch.ones(3)), {}, ("logit_bias", sizes(3), r"\(1,\)")),
    (BOTH, (X, Y, 1.0), {"image_ids": IDS["image_ids"]}, ("image_ids", "text_ids")),
    (BOTH, (X, Y, 1.0), {"text_ids": IDS["text_ids"]}, ("image_ids", "text_ids")),
    (BOTH, (X, Y, 1.0), {**IDS, "image_ids": torch.arange(6)}, ("image_ids", "6", "5")),
    (BOTH, (X, Y, 1.0), {**IDS, "text_ids": torch.arange(5)}, ("text_ids", "5", "6")),
    (
        BOTH,
        (X, Y, 1.0),
        {**IDS, "text_ids": IDS["text_ids"][:, None]},
        ("text_ids", sizes(6, 1), "6"),
    ),
    (BOTH, (X, Y, 1.0), {**IDS, "image_ids": torch.ones(5)}, ("image_ids", "(?i)float", "int")),
    (BOTH, (X, Y, 1.0), {"ignore_same_ids": True}, ("ignore_same_ids", "image_ids", "text_ids")),
    (BOTH, (X, Y, 1.0), {"labels": torch.arange(4)}, ("labels", "4", "5")),
    (BOTH, (X, Y, 1.0), {"labels": torch.ones(5)}, ("labels", "(?i)float", "int")),
    (BOTH, (X, Y, 1.0), {"labels": torch.arange(5) + 2}, ("labels", "6", "-1")),
    (BOTH, (X, Y, 1.0), {"labels": torch.arange(5) - 2}, ("labels", "-2", "-1")),
    (BOTH, (X, Y, 1.0), {"labels": torch.arange(5), **IDS}, ("labels", "image_ids")),
    (
        BOTH,
        (X, Y, 1.0),
        {"labels": torch.arange(5), "ignore_same_ids": True},
        ("ignore_same_ids", "image_ids"),
    ),
    (BOTH, (X, Y, 1.0), {"weights": (torch.ones(6), None)}, ("weights", "6", "5")),
    (BOTH, (X, Y, 1.0), {"weights": (None, torch.ones(5))}, ("weights", "5", "6")),
    (BOTH, (X, Y, 1.0), {"weights": torch.ones(5)}, ("weights", "(?i)tensor", "tuple|pair")),
    (BOTH, (X, Y, 1.0), {"weights": (None,)}, ("weights", "1", "2|pair|tuple")),
    (CLIP, (X, Y, 1.0), {"label_smoothing": 1.0}, ("label_smoothing", r"1(\.0)?\b", "0")),
    (CLIP, (X, Y, 1.0), {"label_smoothing": -0.1}, ("label_smoothing", r"-0\.1", "0")),
    (CLIP, (X, Y, 1.0), {"label_smoothing": math.nan}, ("label_smoothing", "nan", "0")),
    (CLIP, (X, Y, 1.0), {"directions": "rows"}, ("directions", "rows", "image_to_text")),
    (BOTH, (X, Y, 1.0), {"reduction": "avg"}, ("reduction", "avg", "mean")),
    (BOTH, (X, Y, 1.0), {"backend": "tpu"}, ("backend", "tpu", "reference")),
    (BOTH, (X, Y, 1.0), {"workspace_mb": 0}, ("workspace_mb", "0")),
    (BOTH, (X, Y, 1.0), {"workspace_mb": -5}, ("workspace_mb", "-5")),
]


@backends
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: f"{','.join(w[2]) or 'args'}-{w[3]}")
def test_wrong_input(wrong: tuple, backend: str) -> None:
    names, args, keywords, words = wrong
    for op in names:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            getattr(vlm_kernels, op)(*args, **{"backend": backend, **keywords})
        message = str(caught.value)
        for word in (op, *words):
            assert re.search(word, message), f"no {word!r} in: {message}"


@ops
def test_backend_that_cannot_run_says_why(op: str) -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cpu"):
        getattr(vlm_kernels, op)(x, x, 1.0, backend="cpu")
