"""clip_loss and siglip_loss under torch's tracers, modes and transforms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlm_kernels
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
ops = pytest.mark.parametrize("op", spec.OPS)

VARIANTS = [
    Variant("clip_loss"),
    Variant("clip_loss", "ids", "both", 0.1, "both", "none"),
    Variant("clip_loss", "ignore_same_ids", "row", 0.1, "image_to_text"),
    Variant("clip_loss", "labels", directions="text_to_image", reduction="sum"),
    Variant("siglip_loss"),
    Variant("siglip_loss", "ids", "both", reduction="none"),
    Variant("siglip_loss", "ignore_same_ids", "row"),
    Variant("siglip_loss", "labels_dropped", "column", reduction="sum"),
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def function(op: str, backend: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, op), backend=backend, **keywords)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(autouse=True)
def _no_compiled_code_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- the registered ops ---


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops, to use them as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vlm_kernels":
            assert not kwargs
            detached = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(detached)))
        return func(*args, **(kwargs or {}))


def calls(
    variant: Variant, wanted: tuple[str, ...], dtype: torch.dtype, **keywords: Any
) -> list[tuple[Any, tuple]]:
    case = Case(21, 19, 12, dtype, variant, bias=-1.0)
    leaves = case.inputs()
    for name, leaf in zip(leaves._fields, leaves):
        assert leaf is not None
        leaf.requires_grad_(name in wanted)
    with Recorder() as recorder:
        result = function(case.op, "cpu", **keywords)(*leaves, **case.keywords())
        loss = result[0] if keywords.get("return_metrics") else result
        total = sum(o.sum() for o in loss) if isinstance(loss, tuple) else loss.sum()
        if wanted:
            total.backward(retain_graph=True)
    return recorder.calls


@needs_cpu
@variants
@pytest.mark.parametrize(
    "wanted", [spec.Inputs._fields, ("text_features",), ()], ids=lambda w: f"{len(w)}_gradients"
)
def test_opcheck(variant: Variant, wanted: tuple[str, ...]) -> None:
    recorded = calls(variant, wanted, torch.float32)
    # Without room to keep anything, other ops may run.
    recorded += calls(variant, wanted, torch.float32, workspace_mb=1)
    names = {func._schema.name for func, _ in recorded}
    assert any(name.endswith("_fwd") for name in names)
    assert any(name.endswith("_bwd") for name in names) == bool(wanted)
    for func, args in recorded:
        torch.library.opcheck(func, args)


@needs_cpu
def test_opcheck_sees_each_op() -> None:
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(tuple(f"vlm_kernels::{op}" for op in spec.OPS))
    }
    recorded = {
        func._schema.name
        for variant in VARIANTS
        for workspace_mb in (None, 1)
        for func, _ in calls(variant, spec.Inputs._fields, torch.float32, workspace_mb=workspace_mb)
    }
    assert recorded == registered


@needs_cpu
@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_16_bit_with_metrics(op: str, dtype: torch.dtype) -> None:
    for func, args in calls(Variant(op), spec.Inputs._fields, dtype, return_metrics=True):
        torch.library.opcheck(func, args)


@needs_cpu
@ops
def test_profiler_sees_the_ops(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(op, "cpu")(x.requires_grad_(), y, scale).backward()
    names = {event.key for event in profile.key_averages()}
    assert f"vlm_kernels::{op}_fwd" in names
    assert any("LossFn" in name for name in names)


@needs_cpu
@variants
def test_fake_tensors(variant: Variant) -> None:
    """Shapes, dtypes and strides without any computing."""
    case = Case(21, 19, 12, torch.bfloat16, variant, bias=-1.0)
    fn = function(case.op, "cpu")
    real = spec.evaluate(fn, case.inputs(), case.keywords())
    with FakeTensorMode() as mode:
        convert = lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t  # noqa: E731
        keywords = case.keywords()
        if "weights" in keywords:
            keywords["weights"] = tuple(map(convert, keywords["weights"]))
        keywords = {name: convert(value) for name, value in keywords.items()}
        leaves = case.inputs().map(lambda t: convert(t).requires_grad_())
        loss = fn(*leaves, **keywords)
        total = sum(o.sum() for o in loss) if isinstance(loss, tuple) else loss.sum()
        grads = torch.autograd.grad(total, list(leaves))
    losses = list(loss) if isinstance(loss, tuple) else [loss]
    for fake, value in zip([*losses, *grads], real.values(), strict=True):
        assert (fake.shape, fake.dtype) == (value.shape, value.dtype)
        assert fake.stride() == value.stride()


# --- torch.compile ---


@variants
@backends
def test_compile(variant: Variant, backend: str) -> None:
    case = Case(40, 33, 24, torch.float32, variant, 20.0, -1.0)
    fn = function(case.op, backend)
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    # Off the kernels, aot_eager may sum in another order.
    results = spec.check(case, compiled)
    if backend == "cpu":
        same(results, spec.evaluate(fn, case.inputs(), case.keywords()))


@needs_cpu
def test_compile_with_inductor() -> None:
    """Our ops between others that Inductor fuses."""

    def step(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        x, y = (nn.functional.normalize(t, dim=-1) for t in (x, y))
        losses = [function(op, "cpu")(x, y, log_scale.exp(), bias) for op in spec.OPS]
        return losses[0] + 0.5 * losses[1]

    x, y, *_ = spec.make_inputs(40, 33, 24)
    leaves = spec.Inputs(3 * x, 2 * y, torch.tensor(3.0), torch.tensor(-2.0))
    eager = spec.evaluate(step, leaves, {})
    compiled = spec.evaluate(torch.compile(step, fullgraph=True, dynamic=True), leaves, {})
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize(
    "sizes",
    [
        [(32, 32), (48, 48), (129, 129), (1100, 1100), (31, 31)],
        [(30, 40), (50, 20), (130, 129), (20, 1100)],
    ],
    ids=["square", "rectangular"],
)
@ops
@backends
def test_no_recompilation(sizes: list[tuple[int, int]], op: str, backend: str) -> None:
    fn = function(op, backend)
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (n, m) in enumerate(sizes):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            case = Case(n, m, 16, variant=Variant(op, reduction="sum"), scale=10.0, bias=-1.0)
            spec.check(case, compiled)


@ops
@backends
def test_no_recompilation_over_scales(op: str, backend: str) -> None:
    """A learnt temperature is another number each step."""
    compiled = torch.compile(
        function(op, backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    x, y, *_ = spec.make_inputs(20, 20, 8)
    for number, scale in enumerate((1.0, 14.3, 100.0)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(x, y, torch.tensor(scale))
            torch.testing.assert_close(got, function(op, backend)(x, y, torch.tensor(scale)))


@ops
@backends
def test_compile_with_metrics(op: str, backend: str) -> None:
    fn = function(op, backend, return_metrics=True)
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = Case(40, 33, 24, variant=Variant(op), bias=-1.0).inputs()
    for leaves in (inputs, inputs.map(lambda t: t.clone().requires_grad_())):
        loss, metrics = compiled(*leaves)
        wanted_loss, wanted = fn(*leaves)
        torch.testing.assert_close(loss, wanted_loss)
        torch.testing.assert_close(metrics, wanted)


# --- torch.export ---


class Step(nn.Module):
    def __init__(self, op: str, backend: str) -> None:
        super().__init__()
        self.fn = function(op, backend)
        self.logit_scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.fn(image, text, self.logit_scale)


@pytest.mark.parametrize("grad", [False, True])
@ops
@backends
def test_export(grad: bool, op: str, backend: str) -> None:
    step = Step(op, backend)
    x, y, *_ = spec.make_inputs(20, 24, 8)
    n, m = torch.export.Dim("n", min=2), torch.export.Dim("m", min=2)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(step, (x, y), dynamic_shapes=({0: n}, {0: m}))
    x, y, *_ = spec.make_inputs(150, 70, 8)
    torch.testing.assert_close(program.module()(x, y), step(x, y))


# --- checkpointing, autocast ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@variants
@backends
def test_checkpoint(use_reentrant: bool, variant: Variant, backend: str) -> None:
    case = Case(40, 33, 24, torch.float32, variant, 20.0, -1.0)
    fn = partial(function(case.op, backend), **case.keywords())
    results = []
    for run in (fn, lambda *args: checkpoint(fn, *args, use_reentrant=use_reentrant)):
        leaves = case.inputs().map(lambda t: t.requires_grad_())
        loss = run(*leaves)
        # The reentrant kind knows backward() only, not autograd.grad().
        (sum(o.sum() for o in loss) if isinstance(loss, tuple) else loss.sum()).backward()
        grads = {k: leaf.grad for k, leaf in zip(leaves._fields, leaves) if leaf is not None}
        losses = torch.cat(loss) if isinstance(loss, tuple) else loss
        results.append({"loss": losses.detach(), **grads})
    same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@variants
@backends
def test_autocast_is_a_cast_of_the_features(
    dtype: torch.dtype, variant: Variant, backend: str
) -> None:
    case = Case(40, 33, 24, torch.float32, variant, 20.0, -1.0)
    fn, inputs, keywords = function(case.op, backend), case.inputs(), case.keywords()

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return fn(*args, **kwargs)

    got = spec.evaluate(under_autocast, inputs, keywords)
    image, text, scale, bias = inputs
    cast = spec.Inputs(image.to(dtype), text.to(dtype), scale, bias)
    wanted = spec.evaluate(fn, cast, keywords)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name].float()), name


@ops
@backends
def test_autocast_mends_mixed_dtypes(op: str, backend: str) -> None:
    """As matmul under autocast does: towers that end in different dtypes."""
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = function(op, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = fn(x, y.bfloat16(), scale)
    assert torch.equal(got, fn(x.bfloat16(), y.bfloat16(), scale))


# --- torch.func ---


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "grad": lambda fn, x: torch.func.grad(fn)(x),
    "jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "vjp": lambda fn, x: torch.func.vjp(fn, x),
    "vmap of grad": lambda fn, x: torch.func.vmap(torch.func.grad(fn))(x[None]),
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x,)),
    "jacfwd": lambda fn, x: torch.func.jacfwd(fn)(x),
}


@needs_cpu
@ops
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_one_clear_error(op: str, transform: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = lambda image: function(op, "cpu")(image, y, scale)  # noqa: E731
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        TRANSFORMS[transform](fn, x)
    message = str(caught.value)
    words = ("functorch", "torch.func", "forward AD", "forward-mode")
    assert any(word in message for word in words), message


@ops
@backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_gradients_is_a_loop(op: str, backend: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = lambda image: function(op, backend)(image, y, scale)  # noqa: E731
    got = torch.func.vmap(fn)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(got, torch.stack([fn(x), fn(2 * x)]))


@ops
def test_torch_func_works_on_the_reference(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = lambda image: function(op, "reference")(image, y, scale)  # noqa: E731
    wanted = torch.autograd.grad(fn(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(fn)(x.detach()), wanted)


def forward_mode(fn: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        loss = fn(torch.autograd.forward_ad.make_dual(x, tangent))
        return torch.autograd.forward_ad.unpack_dual(loss).tangent


@needs_cpu
@ops
def test_forward_mode_is_an_error(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = lambda image: function(op, "cpu")(image, y, scale)  # noqa: E731
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward.(AD|mode)|jvp"):
        forward_mode(fn, x, torch.ones_like(x))


@ops
def test_forward_mode_works_on_the_reference(op: str) -> None:
    x, y, scale, _ = spec.make_inputs(9, 9, 8)
    fn = lambda image: function(op, "reference")(image, y, scale)  # noqa: E731
    got = forward_mode(fn, x, torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(fn(leaf), leaf)[0].sum())
