"""The Triton backend of clip_loss and siglip_loss in the interpreter, against fp64.

A covering subset: `TRITON_INTERPRET=1 pytest tests/ops/test_contrastive.py -k triton` runs all that
the other backends pass, in minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels
from vlm_kernels import _backends, _load, reference
from vlm_kernels._triton import contrastive as backend
from vlm_kernels._triton._compat import INTERPRET
from vlm_kernels.ops import contrastive as front
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant
from vlm_kernels.testing.tolerances import assert_close

ops = pytest.mark.parametrize("op", spec.OPS)
ALL = spec.Inputs._fields
SCALES = {"clip_loss": (100.0, None), "siglip_loss": (117.0, -16.5)}


def function(op: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, op), backend="triton", **keywords)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 x 2 tiles and statistics of one row of tiles at a time."""
    monkeypatch.setattr(backend, "_BLOCK", 128)
    monkeypatch.setattr(front, "_workspace_mb", lambda image: 0)


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == backend.NAMESPACE:
            detached = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(detached)))
        return func(*args, **(kwargs or {}))


def record(case: Case, wanted: tuple[str, ...] = ALL, **keywords: Any) -> list[tuple[Any, tuple]]:
    leaves = case.inputs()
    for name, leaf in zip(ALL, leaves, strict=True):
        if leaf is not None:
            leaf.requires_grad_(name in wanted)
    with Recorder() as recorder:
        loss = function(case.op, **keywords)(*leaves, **case.keywords())
        loss = loss[0] if keywords.get("return_metrics") else loss
        total = sum(o.sum() for o in loss) if isinstance(loss, tuple) else loss.sum()
        if wanted:
            total.backward()
    return recorder.calls


def test_this_is_the_interpreter() -> None:
    assert INTERPRET.value


# --- accuracy ---


def small_cases() -> Iterator[Case]:
    """Each shape that the interpreter has in a second, in one dtype; the dtypes take turns."""
    for op in spec.OPS:
        for i, case in enumerate(spec.cases(op)):
            if i % 3 == i // 3 % 3 and case.n * case.m * max(case.d, 64) <= 5e6:
                yield case


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_each_shape(case: Case) -> None:
    spec.check(case, function(case.op))


def variant_cases() -> Iterator[Case]:
    for op in spec.OPS:
        for i, variant in enumerate(spec.covering_variants(op)):
            yield Case(70, 66, 40, spec.DTYPES[i % 3], variant, *SCALES[op])


@pytest.mark.parametrize("case", variant_cases(), ids=str)
def test_each_variant(case: Case) -> None:
    spec.check(case, function(case.op))


@pytest.mark.parametrize("data", spec.DATA)
@pytest.mark.parametrize("scale", [100.0, -100.0])
@ops
def test_hard_data(data: str, scale: float, op: str) -> None:
    """No row underflows at scale 100."""
    dtype = spec.DTYPES[spec.DATA.index(data) % 3]
    spec.check(Case(70, 66, 64, dtype, Variant(op), scale, data=data), function(op))


@ops
def test_scale_of_zero(op: str) -> None:
    spec.check(Case(66, 70, 16, variant=Variant(op, "ignore_same_ids"), scale=0.0), function(op))


@pytest.mark.parametrize("grad", [2.0**-24, 2.0**16])
@ops
def test_gradients_of_fp16_neither_flush_nor_overflow(grad: float, op: str) -> None:
    """The largest gradient of the loss that fits, and one that has to be seen by fp32 only."""
    case = Case(65, 65, 33, torch.float16, Variant(op, weights="both"), 1.0, 0.5)
    spec.check(case, function(op), grad=grad)


@ops
def test_negatives_of_fp16_keep_their_gradient(op: str) -> None:
    """What a saturated negative adds is 4e-9 of the loss's gradient: nothing in fp16 itself."""
    case = Case(64, 64, 64, torch.float16, Variant(op, "no_positive"), 1.0, -12.0)
    spec.check(case, function(op))


# --- blocks ---


def block_cases() -> Iterator[Case]:
    for op in spec.OPS:
        yield Case(257, 130, 40, torch.bfloat16, Variant(op), *SCALES[op])
        yield Case(130, 257, 33, torch.float32, Variant(op, "ids", "both", reduction="none"))
        yield Case(129, 193, 64, torch.float16, Variant(op, "labels_dropped"), 20.0, -2.0)
    yield Case(193, 130, 40, torch.float16, Variant("clip_loss", "ignore_same_ids", "both", 0.1))
    for direction in spec.DIRECTIONS[1:]:
        yield Case(193, 130, 40, torch.bfloat16, Variant("clip_loss", directions=direction))


@pytest.mark.parametrize("case", block_cases(), ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_many_blocks(case: Case) -> None:
    spec.check(case, function(case.op))


def test_blocks_do_not_hold_more_than_they_may() -> None:
    """The sizes of the blocks for every budget, down to the smallest one: a tile."""
    for budget in (0, 1 << 16, 1 << 20, 1 << 26):
        for n, m in ((1, 1), (65, 1000), (5000, 300)):
            image, text = torch.zeros(n, 24), torch.zeros(m, 24)
            pairs = backend._Pairs(image, text, None, None, None, False)
            call = backend._Call(image, text, None, 1.0, pairs, 0)
            call.budget = budget
            rows, cols = backend._block(call)
            tile = call.tile
            assert rows % tile.rows == 0
            assert cols % tile.cols == 0
            assert rows * (4 * cols + 4 * 24) <= budget or (rows, cols) == (tile.rows, tile.cols)


@pytest.mark.parametrize("direction", spec.DIRECTIONS[1:])
@pytest.mark.parametrize("pairs", ["diagonal", "ids", "ignore_same_ids", "labels_dropped"])
def test_one_direction_in_one_pass(pairs: str, direction: str) -> None:
    """Where whole rows of similarity fit the workspace, gradients are formed in the forward."""
    for dtype, smoothing, reduction in (
        (torch.bfloat16, 0.1, "sum"),
        (torch.float16, 0.0, "mean"),
    ):
        variant = Variant("clip_loss", pairs, "both", smoothing, direction, reduction)
        case = Case(70, 66, 24, dtype, variant)
        names = {func._schema.name for func, _ in record(case)}
        assert names == {
            f"{backend.NAMESPACE}::clip_loss_one_way_{part}" for part in ("fwd", "bwd")
        }
        spec.check(case, function(case.op))


# --- gradients, repeats, memory that nobody wrote ---


@pytest.mark.parametrize("wanted", [(name,) for name in ALL])
@pytest.mark.parametrize(
    "variant", [Variant("clip_loss"), Variant("siglip_loss", reduction="none")], ids=str
)
def test_only_some_gradients(wanted: tuple[str, ...], variant: Variant) -> None:
    case = Case(70, 66, 40, torch.bfloat16, variant, 20.0, -2.0)
    inputs = case.inputs()
    for name, leaf in zip(ALL, inputs, strict=True):
        assert leaf is not None
        leaf.requires_grad_(name in wanted)
    loss = function(case.op)(*inputs, **case.keywords())
    generator = torch.Generator().manual_seed(loss.dim() + 7)
    (loss * torch.randn(loss.shape, generator=generator) if loss.dim() else loss).sum().backward()
    for name, leaf in zip(ALL, inputs, strict=True):
        assert leaf is not None
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            spec.check_result(case, f"{name}.grad", leaf.grad)


@ops
def test_repeats_and_two_backwards_are_bitwise_the_same(op: str) -> None:
    case = Case(130, 129, 33, torch.bfloat16, Variant(op, "ids", "both"), 50.0, -5.0)
    fn = function(op)
    first = spec.evaluate(fn, case.inputs(), case.keywords())
    same(first, spec.evaluate(fn, case.inputs(), case.keywords()))
    leaves = case.inputs().map(lambda t: t.requires_grad_())
    loss = fn(*leaves, **case.keywords())
    for retain in (True, False):
        grads = torch.autograd.grad(loss, list(leaves), retain_graph=retain)
        same({name: first[f"{name}.grad"] for name in ALL}, dict(zip(ALL, grads, strict=True)))


@pytest.mark.parametrize("case", list(block_cases())[::2], ids=str)
def test_uninitialised_memory_is_not_read(case: Case) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        spec.check(case, function(case.op))
    finally:
        torch.use_deterministic_algorithms(False)


@ops
def test_nan_is_not_hidden(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(70, 70, 20)
    x[3, 2] = torch.nan
    loss = function(op, reduction="none")(x, y, scale)
    row = loss[0] if isinstance(loss, tuple) else loss
    assert row.isnan().nonzero().flatten().tolist() == [3]
    for value in spec.evaluate(function(op), spec.Inputs(x, y, scale), {}).values():
        assert value.isnan().any()


@pytest.mark.parametrize("shape", [(0, 0, 8), (0, 5, 8), (5, 0, 8)], ids=str)
@ops
def test_empty_batches(shape: tuple[int, int, int], op: str) -> None:
    for variant in spec.covering_variants(op):
        case = Case(*shape, torch.bfloat16, variant, bias=-1.0)
        for name, value in spec.check(case, function(op)).items():
            assert not value.any(), name


@ops
def test_views_are_read_in_place(op: str) -> None:
    """Rows of any stride, also one that is no multiple of 16 bytes; transposed features."""
    case = Case(66, 70, 24, torch.bfloat16, Variant(op, "ids", "both"), 20.0, -2.0)
    inputs, keywords = case.inputs(), case.keywords()
    wanted = spec.evaluate(function(op), inputs, keywords)
    wide = torch.full((66, 61), torch.nan, dtype=torch.bfloat16)
    wide[:, 5:29] = inputs.image_features
    text = inputs.text_features.T.contiguous().T
    views = inputs._replace(image_features=wide[:, 5:29], text_features=text)
    ids = {k: torch.stack([v, v], 1)[:, 0] if "ids" in k else v for k, v in keywords.items()}
    same(wanted, spec.evaluate(function(op), views, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@ops
def test_parameters_keep_their_dtype_and_shape(dtype: torch.dtype, op: str) -> None:
    x, y, _, _ = spec.make_inputs(20, 18, 16)
    scale = torch.tensor([20.0], dtype=dtype, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    function(op)(x, y, scale, bias).backward()
    truth = [p.detach().double().requires_grad_() for p in (scale, bias)]
    getattr(reference, op)(x.double(), y.double(), *truth).backward()
    for ours, exact in zip((scale, bias), truth, strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        assert (ours.grad.dtype, ours.grad.shape) == (dtype, ours.shape)
        torch.testing.assert_close(
            ours.grad.double(), exact.grad.reshape(ours.shape), rtol=2e-3, atol=1e-6
        )


# --- metrics ---


@pytest.mark.parametrize("pairs", spec.PAIRS)
@ops
def test_metrics(pairs: str, op: str) -> None:
    for shape in ((70, 66), (23, 130), (1, 1)):
        case = Case(*shape, 24, variant=Variant(op, pairs), scale=30.0, bias=-3.0)
        inputs, keywords = case.inputs(), case.keywords()
        plain = getattr(reference, op)
        eager = plain(*inputs, **keywords, return_metrics=True)[1]
        exact = plain(*inputs.to(torch.float64), **keywords, return_metrics=True)[1]
        loss, metrics = function(op, return_metrics=True)(*inputs, **keywords)
        assert torch.equal(loss, function(op)(*inputs, **keywords))
        assert metrics.keys() == exact.keys()
        for name, value in metrics.items():
            assert_close(f"{case}: {name}", value, eager[name], exact[name], terms=33.0)


# --- the ops ---

OP_CASES = [
    Case(21, 19, 12, torch.float32, Variant("clip_loss", "ids", "both", 0.1, "both", "none")),
    Case(21, 19, 12, torch.bfloat16, Variant("clip_loss", "labels", directions="image_to_text")),
    Case(21, 19, 12, torch.float16, Variant("siglip_loss", "ids", "both"), 10.0, -1.0),
    Case(21, 19, 12, torch.float32, Variant("siglip_loss", reduction="none"), 10.0, -1.0),
]


def test_opcheck() -> None:
    seen = set()
    for case in OP_CASES:
        for func, args in [*record(case), *record(case, (), return_metrics=True)]:
            seen.add(func._schema.name.split("::")[1])
            torch.library.opcheck(func, args)
    assert seen == set(backend.SCHEMAS)


@pytest.mark.skipif(_load._C is None, reason="vlm_kernels._C is not built")
@pytest.mark.parametrize("name", backend.SCHEMAS)
def test_schema_is_that_of_the_extension(name: str) -> None:
    ours, other = (
        getattr(getattr(torch.ops, space), name) for space in (backend.NAMESPACE, "vlm_kernels")
    )
    text = str(other.default._schema).removeprefix("vlm_kernels::")
    assert str(ours.default._schema) == f"{backend.NAMESPACE}::{text}"


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_compiles_without_graph_breaks(case: Case) -> None:
    compiled = torch.compile(function(case.op), fullgraph=True, backend="aot_eager")
    spec.check(case, compiled)
    torch._dynamo.reset()


# --- the choice ---


@ops
def test_can_run_says_why_not(op: str) -> None:
    x, y, _, _ = spec.make_inputs(4, 4, 8)
    assert _backends.can_run(op, "triton", x, y)
    with pytest.raises(RuntimeError, match=r"image_features is torch\.float64"):
        function(op)(x.double(), y.double(), 1.0)
    with pytest.raises(RuntimeError, match=r"text_features is on meta; Triton runs on cpu in the"):
        function(op)(x, y.to("meta"), 1.0)


def test_elsewhere_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _, _ = spec.make_inputs(4, 4, 8)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton runs on cuda" in _backends.explain("clip_loss", x, y)


@ops
def test_wrong_input(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(6, 5, 8)
    for error, args, keywords in (
        (ValueError, (x, y[:, :4], scale), {}),
        (TypeError, (x, y.bfloat16(), scale), {}),
        (ValueError, (x, y, scale), {"labels": torch.full((6,), 5)}),
        (ValueError, (x, y, scale), {"workspace_mb": 0}),
        (ValueError, (x, y, scale.expand(2)), {}),
    ):
        with pytest.raises(error, match=op):
            function(op)(*args, **keywords)
