"""patch_embed under torch's tracers, modes and transforms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlm_kernels
from vlm_kernels.testing.specs import patch_embed as spec
from vlm_kernels.testing.specs.patch_embed import EVERYTHING, PLAIN, QWEN, Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


def small(dtype: torch.dtype = torch.float32, b: int = 2, **variant: Any) -> Case:
    return spec.even(Case(b, 19, 26, (6, 5), 20, dtype, replace(Variant(), **variant)))


CASES = [
    small(),
    small(torch.bfloat16, pixels="fp32", layout="nhwc"),
    small(torch.float16, pixels="bf16", layout="channels_last", low=False),
    replace(small(), variant=replace(EVERYTHING, pixels="fp32")),
    replace(small(), variant=PLAIN),
    spec.even(Case(2, 24, 20, (6, 5), 20, variant=QWEN)),
    spec.even(Case(2, 24, 20, (6, 5), 20, variant=replace(QWEN, frames=4, native=True))),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def function(backend: str = "cpu", **keywords: Any) -> Callable[..., Tensor]:
    return partial(vlm_kernels.patch_embed, backend=backend, **keywords)


def evaluate(case: Case, fn: Callable[..., Tensor], seed: int = 0) -> dict[str, Tensor]:
    return spec.evaluate(fn, case.inputs(seed), case.keywords())


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
    """Keeps the calls of our ops, to use them as samples, and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "vlm_kernels":
            assert not kwargs
            detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(detached), out))
        return out


@needs_cpu
@cases
def test_opcheck(case: Case) -> None:
    with Recorder() as recorder:
        evaluate(case, function())
    names = [func._schema.name for func, *_ in recorder.calls]
    assert names == ["vlm_kernels::patch_embed_fwd", "vlm_kernels::patch_embed_bwd"]
    for func, args, _ in recorder.calls:
        torch.library.opcheck(func, args)


@needs_cpu
def test_opcheck_with_gradients() -> None:
    """The node at the Autograd key, seen by AOTAutograd."""
    with Recorder() as recorder:
        evaluate(CASES[3], function())
    func, args, _ = recorder.calls[0]
    wanted = [
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    torch.library.opcheck(func, tuple(wanted))


@needs_cpu
@pytest.mark.parametrize("wanted", spec.Inputs._fields)
def test_gradients_nobody_needs_are_not_formed(wanted: str) -> None:
    case = CASES[3]
    inputs = case.inputs()
    inputs.named()[wanted].requires_grad_()
    with Recorder() as recorder:
        spec.call(function(), inputs, case.keywords()).sum().backward()
    _, _, gradients = recorder.calls[1]
    for name, gradient in zip(spec.Inputs._fields, gradients, strict=True):
        assert gradient.shape == (inputs.named()[name].shape if name == wanted else (0,)), name


@needs_cpu
def test_pixels_of_uint8_have_no_gradient_to_form() -> None:
    with Recorder() as recorder:
        evaluate(CASES[0], function())
    assert recorder.calls[1][2][0].shape == (0,)


@needs_cpu
def test_profiler_sees_the_ops() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(CASES[0], function())
    names = {event.key for event in profile.key_averages()}
    assert {"vlm_kernels::patch_embed_fwd", "vlm_kernels::patch_embed_bwd"} <= names
    assert any("PatchEmbedFn" in name for name in names)


@needs_cpu
@cases
def test_fake_tensors(case: Case) -> None:
    """Shapes, dtypes and strides without any computing."""
    real = evaluate(case, function())
    with FakeTensorMode() as mode:
        inputs = case.inputs().map(mode.from_tensor)
        fakes = evaluate_leaves(case, inputs.leaves())
    for name, value in real.items():
        fake = fakes[name]
        assert (fake.shape, fake.dtype) == (value.shape, value.dtype), name
        assert fake.stride() == value.stride(), name


def evaluate_leaves(case: Case, leaves: spec.Inputs) -> dict[str, Tensor]:
    out = spec.call(function(), leaves, case.keywords())
    wanted = {f"{name}.grad": t for name, t in leaves.named().items() if t.requires_grad}
    grads = torch.autograd.grad(out.sum(), list(wanted.values()))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


@needs_cpu
@cases
def test_meta_tensors(case: Case) -> None:
    inputs = case.inputs().map(lambda t: t.to("meta"))
    out = spec.call(partial(vlm_kernels.patch_embed), inputs, case.keywords())
    assert out.device.type == "meta"
    assert (out.shape, out.dtype) == ((case.b, case.tokens, case.e), case.dtype)


# --- torch.compile ---


@needs_cpu
@cases
def test_compile(case: Case) -> None:
    compiled = torch.compile(function(), fullgraph=True, dynamic=True, backend="aot_eager")
    same(evaluate(case, compiled), evaluate(case, function()))


def test_compile_the_reference() -> None:
    case = CASES[0]
    compiled = torch.compile(function("reference"), fullgraph=True, backend="aot_eager")
    found = evaluate(case, compiled)
    for name, value in evaluate(case, function("reference")).items():
        torch.testing.assert_close(found[name], value)


@needs_cpu
def test_compile_with_inductor() -> None:
    """Between other ops that Inductor fuses, as the stem of a model."""

    def stem(images: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        x = vlm_kernels.patch_embed(
            images, weight * scale, bias, patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        return torch.nn.functional.layer_norm(x, x.shape[-1:]).relu()

    results = []
    for fn in (stem, torch.compile(stem, fullgraph=True, dynamic=True)):
        torch.manual_seed(0)
        images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8)
        leaves = [torch.randn(*size).requires_grad_() for size in ((8, 3, 4, 4), (8,), (1,))]
        y = fn(images, *leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


@needs_cpu
@pytest.mark.parametrize("pixels", ["u8", "fp32"])
def test_no_recompilation(pixels: str) -> None:
    """Over batch sizes, and then over sizes of images."""
    compiled = torch.compile(function(), fullgraph=True, dynamic=True, backend="aot_eager")
    variant = replace(Variant(), layout="nhwc", pixels=pixels)
    sizes = ((2, 19, 26), (3, 19, 26), (7, 19, 26), (2, 30, 43), (5, 61, 24))
    for number, (b, h, w) in enumerate(sizes):
        case = Case(b, h, w, (6, 5), 20, variant=variant)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            same(evaluate(case, compiled), evaluate(case, function()))


# --- torch.export ---


class Stem(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.fn = function(backend, patch_size=(6, 5), layout="nhwc", **spec.NORMS["clip"])
        self.weight = nn.Parameter(torch.randn(8, 3, 6, 5))
        self.bias = nn.Parameter(torch.randn(8))
        self.prefix = nn.Parameter(torch.randn(1, 8))

    def forward(self, images: Tensor) -> Tensor:
        return self.fn(images, self.weight, self.bias, prefix=self.prefix)


@pytest.mark.parametrize(
    ("backend", "grad"),
    [("reference", True), *(pytest.param("cpu", grad, marks=needs_cpu) for grad in (False, True))],
)
def test_export(backend: str, grad: bool) -> None:
    stem, b = Stem(backend), torch.export.Dim("b", min=2)
    images = torch.randint(0, 256, (3, 19, 26, 3), dtype=torch.uint8)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(stem, (images,), dynamic_shapes=({0: b},))
    other = torch.randint(0, 256, (5, 19, 26, 3), dtype=torch.uint8)
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(other), stem(other))


@needs_cpu
def test_export_for_any_size_of_image() -> None:
    stem = Stem("cpu")
    dims = {i: torch.export.Dim(name, min=12) for i, name in ((1, "h"), (2, "w"))}
    images = torch.randint(0, 256, (3, 19, 26, 3), dtype=torch.uint8)
    program = torch.export.export(stem, (images,), dynamic_shapes=(dims,))
    other = torch.randint(0, 256, (3, 45, 33, 3), dtype=torch.uint8)
    torch.testing.assert_close(program.module()(other), stem(other))


# --- checkpointing, modes, autocast ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
@needs_cpu
def test_checkpoint(use_reentrant: bool, case: Case) -> None:
    results = []

    def checkpointed(*args: Any, **keywords: Any) -> Any:
        return checkpoint(partial(function(), **keywords), *args, use_reentrant=use_reentrant)

    for run in (function(), checkpointed):
        leaves = case.inputs().leaves()
        # The reentrant kind knows backward() only, and gradients of positional arguments.
        given = leaves._replace(pos=None, prefix=None, newline=None)
        spec.call(run, given, case.keywords()).float().square().sum().backward()
        results.append({name: leaf.grad for name, leaf in given.named().items()})
    same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
@backends
def test_autocast_is_a_cast_of_images_and_weight(
    dtype: torch.dtype, case: Case, backend: str
) -> None:
    """As of a linear layer: tokens come in the dtype of autocast, pixels of uint8 stay."""
    fn, inputs, keywords = function(backend), case.inputs(), case.keywords()
    with torch.autocast("cpu", dtype):
        got = spec.call(fn, inputs, keywords)
    images = inputs.images if inputs.images.dtype == torch.uint8 else inputs.images.to(dtype)
    cast = inputs._replace(images=images, weight=inputs.weight.to(dtype))
    assert got.dtype == dtype
    assert torch.equal(got, spec.call(fn, cast, keywords))
    leaves = inputs.leaves()
    with torch.autocast("cpu", dtype):
        out = spec.call(fn, leaves, keywords)
    out.float().sum().backward()
    for name, leaf in leaves.named().items():
        if leaf.requires_grad:
            assert (leaf.grad.dtype, leaf.grad.shape) == (torch.float32, leaf.shape), name


def test_autocast_leaves_fp64_alone() -> None:
    case = replace(CASES[0], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = spec.call(function("reference"), case.inputs(), case.keywords())
    assert out.dtype == torch.float64


# --- torch.func, derivatives there are none of ---

TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "grad": lambda fn, x: torch.func.grad(lambda x: fn(x).sum())(x),
    "jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "vjp": lambda fn, x: torch.func.vjp(fn, x),
    "vmap of grad": lambda fn, x: torch.func.vmap(torch.func.grad(lambda x: fn(x).sum()))(x[None]),
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x,)),
    "jacfwd": lambda fn, x: torch.func.jacfwd(fn)(x),
}


def of_weight(backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    inputs, keywords = CASES[0].inputs(), CASES[0].keywords()
    return lambda w: spec.call(
        function(backend), inputs._replace(weight=w), keywords
    ), inputs.weight


@needs_cpu
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_one_clear_error(transform: str) -> None:
    with pytest.raises(NotImplementedError, match=r"^patch_embed.*reference"):
        TRANSFORMS[transform](*of_weight("cpu"))


@backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_gradients_is_a_loop(backend: str) -> None:
    fn, weight = of_weight(backend)
    got = torch.func.vmap(fn)(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(got, torch.stack([fn(weight), fn(2 * weight)]))


def test_torch_func_works_on_the_reference() -> None:
    fn, weight = of_weight("reference")
    wanted = torch.autograd.grad(fn(weight.requires_grad_()).sum(), weight)[0]
    got = torch.func.grad(lambda w: fn(w).sum())(weight.detach())
    torch.testing.assert_close(got, wanted)


@needs_cpu
def test_second_derivative_is_an_error() -> None:
    fn, weight = of_weight("cpu")
    weight = weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(fn(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="patch_embed has no second derivative"):
        torch.autograd.grad(grad.sum(), weight)
