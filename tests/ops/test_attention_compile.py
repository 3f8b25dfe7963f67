"""attention and attention_varlen under torch's tracers, modes and transforms."""

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
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


def dense(dtype: torch.dtype = torch.float32, **variant: Any) -> Case:
    return Case(2, 4, 9, 13, 16, dtype, Variant(**variant), kv_heads=2, dv=24)


def packed(dtype: torch.dtype = torch.float32, **variant: Any) -> VarlenCase:
    segments = ((3, 9), (0, 4), (5, 7), (1, 1))
    return VarlenCase(segments, 4, 16, dtype, Variant(**variant), kv_heads=2, outside=1)


CASES: list[AnyCase] = [
    dense(),
    dense(layout="packed", lse=True, scale=0.3),
    dense(layout="bhnd", keys="causal_window_range", softcap=2.0),
    dense(mask="bool", mask_shape="1hqk"),
    dense(mask="additive", mask_shape="h1k", lse=True),
    dense(mask="additive_fp32", mask_shape="bhq1", dtype=torch.bfloat16),
    dense(rope="interleaved_batch", norm="rms_bias_heads", layout="gaps"),
    dense(rope="half", norm="rms_low", keys="padding", dtype=torch.float16),
    dense(norm="k_only"),
    packed(lse=True),
    packed(keys="causal_window", rope="partial", norm="layer", dtype=torch.bfloat16),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
each_op = pytest.mark.parametrize("case", [dense(), packed()], ids=spec.OPS)


def function(case: AnyCase, backend: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, case.op), backend=backend, **keywords)


def evaluate(case: AnyCase, fn: Callable[..., Any], seed: int = 0) -> dict[str, Tensor]:
    return spec.evaluate(fn, case.inputs(seed), case.keywords(seed), case.variant.lse)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda m, name=name: f"{name}: {m}")


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


@needs_cpu
@cases
def test_opcheck(case: AnyCase) -> None:
    with Recorder() as recorder:
        evaluate(case, function(case, "cpu"))
    assert [func._schema.name.split("_")[-1] for func, _ in recorder.calls] == ["fwd", "bwd"]
    for func, args in recorder.calls:
        torch.library.opcheck(func, args)


@needs_cpu
def test_opcheck_with_gradients() -> None:
    """The node at the Autograd key, seen by AOTAutograd."""
    case = dense(mask="additive", mask_shape="h1k", norm="layer")
    with Recorder() as recorder:
        evaluate(case, function(case, "cpu"))
    func, args = recorder.calls[0]
    wanted = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]
    torch.library.opcheck(func, tuple(wanted))


@needs_cpu
def test_gradients_nobody_needs_are_not_formed() -> None:
    case = dense(mask="additive", mask_shape="qk", norm="rms")
    for name in case.inputs().named():
        inputs = case.inputs()
        inputs.named()[name].requires_grad_()
        with Recorder() as recorder:
            spec.call(function(case, "cpu"), inputs, case.keywords()).sum().backward()
        fields = [f for f in inputs._fields if f != name]
        grads = torch.ops.vlm_kernels.attention_bwd(*recorder.calls[1][1])
        found = dict(zip(inputs._fields, grads, strict=True))
        assert torch.equal(found[name], inputs.named()[name].grad)
        assert all(found[field].shape == (0,) for field in fields)


@needs_cpu
@each_op
def test_profiler_sees_the_ops(case: AnyCase) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(case, function(case, "cpu"))
    names = {event.key for event in profile.key_averages()}
    assert {"vlm_kernels::attention_fwd", "vlm_kernels::attention_bwd"} <= names
    assert any("AttentionFn" in name for name in names)


@needs_cpu
@cases
def test_fake_tensors(case: AnyCase) -> None:
    """Shapes, dtypes and strides without any computing."""
    fn = function(case, "cpu")
    real = evaluate(case, fn)
    with FakeTensorMode() as mode:
        convert = lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t  # noqa: E731
        keywords = {
            name: tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)
            for name, value in case.keywords().items()
        }
        leaves = case.inputs().map(lambda t: convert(t).requires_grad_())
        out, lse = spec.call(fn, leaves, {**keywords, "return_lse": True})
        grads = torch.autograd.grad(out.sum() + lse.sum(), list(leaves.named().values()))
    for fake, (name, value) in zip([out, lse, *grads], real.items(), strict=True):
        assert (fake.shape, fake.dtype) == (value.shape, value.dtype), name
        assert fake.stride() == value.stride(), name


@needs_cpu
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "packed"])
def test_results_lie_as_the_inputs_do(layout: str) -> None:
    """No copy before the output projection, none in its backward."""
    case = dense(layout=layout)
    results = evaluate(case, function(case, "cpu"))
    for name in ("out", "query.grad", "key.grad", "value.grad"):
        value = results[name]
        rows = value if layout == "bhnd" else value.transpose(1, 2)
        assert rows.is_contiguous(), name


# --- torch.compile ---


@needs_cpu
@cases
def test_compile(case: AnyCase) -> None:
    fn = function(case, "cpu")
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    same(evaluate(case, compiled), evaluate(case, fn))


def test_compile_the_reference() -> None:
    case = dense(keys="causal")
    fn = function(case, "reference")
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    close(evaluate(case, compiled), evaluate(case, fn))


@needs_cpu
def test_compile_with_inductor() -> None:
    """Between other ops that Inductor fuses, (B, N, H, D) data as a model has it."""

    def block(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = vlm_kernels.attention(q, k, v, is_causal=True, rope=(cos, sin), backend="cpu")
        return (y.transpose(1, 2).flatten(2) * x).relu()

    angle = torch.rand(20, 4)
    results = []
    for fn in (block, torch.compile(block, fullgraph=True, dynamic=True)):
        torch.manual_seed(0)
        x, weight = torch.randn(2, 20, 16), torch.randn(16, 48)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = fn(*leaves, angle.cos(), angle.sin())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


SIZES: list[list[AnyCase]] = [
    [Case(b, 4, nq, nk, 8) for b, nq, nk in ((2, 9, 13), (3, 40, 40), (5, 130, 7), (2, 33, 257))],
    [
        Case(b, 4, n, n, 8, variant=Variant("padding", rope="half", norm="rms", layout="packed"))
        for b, n in ((3, 9), (5, 17), (7, 130))
    ],
    [
        VarlenCase(segments, 2, 8, variant=Variant("causal"), outside=2)
        for segments in (((3, 4), (5, 5)), ((7, 7), (2, 2), (64, 65)), ((9, 9),) * 5)
    ],
]


@needs_cpu
@pytest.mark.parametrize("sizes", SIZES, ids=["dense", "rotated", "packed"])
def test_no_recompilation(sizes: list[AnyCase]) -> None:
    fn = function(sizes[0], "cpu")
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, case in enumerate(sizes):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            same(evaluate(case, compiled), evaluate(case, fn))


# --- torch.export ---


class Step(nn.Module):
    def __init__(self, case: AnyCase, backend: str) -> None:
        super().__init__()
        self.fn = function(case, backend, is_causal=True)
        self.weight = nn.Parameter(torch.ones(case.d))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fn(query, key, value, q_norm=(self.weight, None, 1e-6, "rms"))


class PackedStep(Step):
    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
    ) -> Tensor:
        return self.fn(query, key, value, cu_seqlens_q, cu_seqlens_k)


@pytest.mark.parametrize(
    ("backend", "grad"),
    [("reference", True), *(pytest.param("cpu", grad, marks=needs_cpu) for grad in (False, True))],
)
def test_export(backend: str, grad: bool) -> None:
    b, nq, nk = (torch.export.Dim(name, min=2) for name in ("b", "nq", "nk"))
    step = Step(case := Case(3, 2, 9, 13, 8), backend)
    shapes = ({0: b, 2: nq}, {0: b, 2: nk}, {0: b, 2: nk})
    with torch.set_grad_enabled(grad):
        program = torch.export.export(step, tuple(case.inputs()[:3]), dynamic_shapes=shapes)
    inputs = Case(4, 2, 65, 20, 8).inputs()[:3]
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(*inputs), step(*inputs))


@needs_cpu
def test_export_packed() -> None:
    step = PackedStep(case := packed(), "cpu")
    tq, tk, s = (torch.export.Dim(name, min=2) for name in ("tq", "tk", "s"))
    shapes = ({0: tq}, {0: tk}, {0: tk}, {0: s}, {0: s})
    program = torch.export.export(
        step, (*case.inputs()[:3], *case.keywords().values()), dynamic_shapes=shapes
    )
    other = VarlenCase(((30, 30), (2, 9)), 4, 16, kv_heads=2)
    args = (*other.inputs()[:3], *(t.to(torch.int32) for t in other.keywords().values()))
    torch.testing.assert_close(program.module()(*args), step(*args))


# --- checkpointing, modes, autocast ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@cases
@needs_cpu
def test_checkpoint(use_reentrant: bool, case: AnyCase) -> None:
    fn = function(case, "cpu", return_lse=True)
    results = []

    def checkpointed(*args: Any, **keywords: Any) -> Any:
        return checkpoint(partial(fn, **keywords), *args, use_reentrant=use_reentrant)

    for run in (fn, checkpointed):
        leaves = case.inputs().map(lambda t: t.detach().requires_grad_())
        out, lse = spec.call(run, leaves, case.keywords())
        # The reentrant kind knows backward() only, not autograd.grad().
        (out.float().square().sum() + lse[lse.isfinite()].sum()).backward()
        grads = {name: leaf.grad for name, leaf in leaves.named().items()}
        results.append({"out": out.detach(), "lse": lse.detach(), **grads})
    same(*results)


@needs_cpu
@each_op
def test_modes_without_gradients(case: AnyCase) -> None:
    fn, inputs, keywords = function(case, "cpu"), case.inputs(), case.keywords()
    wanted = spec.call(fn, inputs, keywords)
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    with torch.inference_mode():
        assert torch.equal(spec.call(fn, leaves, keywords), wanted)
        fresh = inputs.map(torch.clone)
        assert torch.equal(spec.call(fn, fresh, keywords), wanted)
    with torch.no_grad():
        assert not spec.call(fn, leaves, keywords).requires_grad
    assert spec.call(fn, leaves, keywords).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cases
@backends
def test_autocast_is_a_cast_of_the_inputs(dtype: torch.dtype, case: AnyCase, backend: str) -> None:
    fn, inputs, keywords = function(case, backend), case.inputs(), case.keywords()

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return fn(*args, **kwargs)

    got = spec.call(under_autocast, inputs, keywords)
    mask = inputs.attn_mask
    if mask is not None and mask.dtype != torch.float32:
        mask = mask.to(dtype)
    cast = (t.to(dtype) for t in inputs[:3])
    wanted = spec.call(fn, spec.Inputs(*cast, mask, *inputs[4:]), keywords)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


@backends
def test_autocast_mends_mixed_dtypes(backend: str) -> None:
    """Keys of a cache in 16 bits under fp32 queries, as torch's attention under autocast."""
    fn, (q, k, v, *_) = function(dense(), backend, enable_gqa=True), dense().inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = fn(q, k.bfloat16(), v)
    assert torch.equal(got, fn(q.bfloat16(), k.bfloat16(), v.bfloat16()))


# --- torch.func, derivatives there are none of ---


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "grad": lambda fn, x: torch.func.grad(lambda x: fn(x).sum())(x),
    "jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "vjp": lambda fn, x: torch.func.vjp(fn, x),
    "vmap of grad": lambda fn, x: torch.func.vmap(torch.func.grad(lambda x: fn(x).sum()))(x[None]),
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x,)),
    "jacfwd": lambda fn, x: torch.func.jacfwd(fn)(x),
}


def of_query(case: AnyCase, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    inputs, keywords = case.inputs(), case.keywords()
    fn = function(case, backend)
    return lambda q: spec.call(fn, inputs._replace(query=q), keywords), inputs.query


@needs_cpu
@each_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_one_clear_error(case: AnyCase, transform: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{case.op}.*reference"):
        TRANSFORMS[transform](*of_query(case, "cpu"))


@backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_gradients_is_a_loop(backend: str) -> None:
    fn, x = of_query(dense(keys="causal"), backend)
    got = torch.func.vmap(fn)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(got, torch.stack([fn(x), fn(2 * x)]))


def test_torch_func_works_on_the_reference() -> None:
    fn, x = of_query(dense(), "reference")
    wanted = torch.autograd.grad(fn(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda q: fn(q).sum())(x.detach()), wanted)


@needs_cpu
@each_op
def test_second_derivative_is_an_error(case: AnyCase) -> None:
    fn, x = of_query(case, "cpu")
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(fn(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{case.op} has no second derivative"):
        torch.autograd.grad(grad.sum(), x)


# --- bad input ---


def args(case: AnyCase) -> dict[str, Any]:
    inputs = case.inputs()
    return {**dict(zip(("query", "key", "value"), inputs[:3], strict=True)), **case.keywords()}


SELF = Case(2, 4, 9, 9, 16)
D, P = SELF, packed()
WEIGHT = torch.ones(16)
TABLE = torch.ones(9, 8)

BAD: dict[str, tuple[AnyCase, dict[str, Any], type[Exception], str]] = {
    "not a tensor": (D, {"key": [1.0]}, TypeError, "Tensor, list, Tensor"),
    "three dims": (D, {"query": torch.ones(4, 9, 16)}, ValueError, r"4, 9, 16"),
    "integers": (
        D,
        {name: torch.ones(2, 4, 9, 16, dtype=torch.int64) for name in ("query", "key", "value")},
        (TypeError, RuntimeError),  # type: ignore[dict-item]
        r"int64|Long",
    ),
    "two dtypes": (D, {"key": torch.ones(2, 4, 9, 16).half()}, TypeError, "one dtype"),
    "head dims": (D, {"key": torch.ones(2, 4, 9, 15)}, ValueError, r"9, 15.*head dim"),
    "batches": (D, {name: torch.ones(3, 4, 9, 16) for name in ("key", "value")}, ValueError, "3"),
    "keys and values": (D, {"value": torch.ones(2, 4, 8, 16)}, ValueError, "differ in the last"),
    "heads": (
        D,
        {"key": torch.ones(2, 2, 9, 16), "value": torch.ones(2, 2, 9, 16)},
        ValueError,
        "4 heads and key 2.*enable_gqa=True",
    ),
    "gqa": (
        D,
        {
            "key": torch.ones(2, 3, 9, 16),
            "value": torch.ones(2, 3, 9, 16),
            "enable_gqa": True,
        },
        ValueError,
        "multiple",
    ),
    "dropout": (D, {"dropout_p": 0.1}, ValueError, "dropout_p is 0.1"),
    "mask shape": (D, {"attn_mask": torch.ones(8, 9)}, ValueError, r"8, 9.*broadcasts"),
    "mask dtype": (D, {"attn_mask": torch.ones(9, 9, dtype=torch.int64)}, TypeError, "bool"),
    "mask type": (D, {"attn_mask": True}, TypeError, "attn_mask is bool, expected a tensor"),
    "range dtype": (D, {"kv_range": torch.zeros(1, 1, 9, 2)}, TypeError, "int32"),
    "range shape": (
        D,
        {"kv_range": torch.zeros(1, 3, 9, 2, dtype=torch.int32)},
        ValueError,
        r"1, 3, 9, 2",
    ),
    "window": (D, {"window": 3}, ValueError, "window is 3"),
    "window of -2": (D, {"window": (-2, 0)}, ValueError, r"-2, 0"),
    "window of floats": (D, {"window": (1.5, 0)}, TypeError, r"window\[0\] is float"),
    "softcap": (D, {"softcap": -1.0}, ValueError, "softcap is -1"),
    "scale": (D, {"scale": float("nan")}, ValueError, "scale is nan"),
    "scale type": (D, {"scale": "1"}, TypeError, "scale is str, expected a number"),
    "rope": (D, {"rope": TABLE}, ValueError, "rope has type Tensor"),
    "rope style": (D, {"rope": (TABLE, TABLE, "neox")}, ValueError, "'neox'.*'half'"),
    "rope rows": (D, {"rope": (TABLE[1:], TABLE[1:])}, ValueError, "8, 8"),
    "rope columns": (D, {"rope": (torch.ones(9, 9),) * 2}, ValueError, "9, 9"),
    "rope dtype": (D, {"rope": (TABLE.half(), TABLE.half())}, TypeError, "float32"),
    "rope queries": (
        D,
        {
            "key": torch.ones(2, 4, 8, 16),
            "value": torch.ones(2, 4, 8, 16),
            "rope": (torch.ones(8, 8),) * 2,
        },
        ValueError,
        "9 queries and 8",
    ),
    "norm": (D, {"q_norm": (WEIGHT, 1e-6)}, ValueError, "q_norm has type tuple"),
    "norm kind": (D, {"k_norm": (WEIGHT, None, 1e-6, "l2")}, ValueError, "'l2'.*'rms'"),
    "norm weight": (
        D,
        {"k_norm": (WEIGHT[1:], None, 1e-6, "rms")},
        ValueError,
        r"k_norm.*\(16,?\)",
    ),
    "norm bias": (D, {"q_norm": (WEIGHT, WEIGHT[1:], 1e-6, "rms")}, ValueError, "q_norm.*bias"),
    "norm eps": (D, {"q_norm": (WEIGHT, None, -1.0, "rms")}, ValueError, "eps -1"),
    "norm eps type": (D, {"q_norm": (WEIGHT, None, None, "rms")}, TypeError, r"q_norm\[2\]"),
    "backend": (D, {"backend": "cudnn"}, ValueError, "no backend 'cudnn'"),
    "no offsets": (P, {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k is NoneType"),
    "offsets of floats": (P, {"cu_seqlens_q": torch.zeros(5)}, TypeError, "int32 or int64"),
    "segments": (P, {"cu_seqlens_q": torch.tensor([0, 9])}, ValueError, "cu_seqlens"),
    "offsets begin": (
        P,
        {"cu_seqlens_q": torch.tensor([1, 2, 3, 4, 5])},
        ValueError,
        "cu_seqlens_q",
    ),
    "offsets fall": (P, {"cu_seqlens_k": torch.tensor([0, 5, 4, 9, 9])}, ValueError, "decreasing"),
    "offsets end": (P, {"cu_seqlens_k": torch.tensor([0, 5, 9, 9, 99])}, ValueError, "99"),
    "packed dims": (P, {"query": torch.ones(1, 4, 10, 16)}, ValueError, "1, 4, 10, 16"),
    "packed rope": (
        P,
        {"rope": (torch.ones(22, 8),) * 2, "cu_seqlens_k": torch.tensor([0, 2, 2, 9, 9])},
        ValueError,
        "queries",
    ),
}


@pytest.mark.parametrize("name", BAD)
@backends
def test_bad_input_is_one_clear_error(name: str, backend: str) -> None:
    case, wrong, error, words = BAD[name]
    keywords = {"backend": backend, **args(case), **wrong}
    with pytest.raises(error, match=words) as caught:
        getattr(vlm_kernels, case.op)(**keywords)
    assert str(caught.value).startswith((case.op, "unknown"))


@needs_cpu
def test_head_dims_beyond_the_kernels() -> None:
    x = torch.ones(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"257.*reference"):
        vlm_kernels.attention(x, x, x, backend="cpu")


@needs_cpu
def test_fp64_runs_on_the_reference_and_explain_says_why() -> None:
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64)
    assert vlm_kernels.attention(x, x, x).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"torch\.float64; the kernels take"):
        vlm_kernels.attention(x, x, x, backend="cpu")
    text = vlm_kernels.explain("attention", x, x, x)
    assert "auto runs reference" in text
    assert "auto runs cpu" in vlm_kernels.explain("attention", *[x.float()] * 3, is_causal=True)
