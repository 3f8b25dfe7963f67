"""attention and attention_varlen on a GPU, each backend that takes CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from tests.gpu.helpers import (
    BACKENDS,
    check_replay,
    function,
    no_waiting,
    on_a_thread_and_stream,
    peak_bytes,
    same,
)
from vlm_kernels import _backends
from vlm_kernels.ops.attention import prefix_lm, rope_1d
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import AnyCase, Case, Variant, VarlenCase

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
backends = pytest.mark.parametrize("backend", BACKENDS)


# --- accuracy ---


def taken(case: AnyCase, backend: str) -> bool:
    """What the CUDA kernels are for; Triton's take everything."""
    dims = (case.d, case.d if case.dv is None else case.dv)
    short = case.dtype.itemsize == 2 and all(d % 8 == 0 and d <= 128 for d in dims)
    return backend == "triton" or short


def lengths(backend: str) -> Iterator[Case]:
    """Each length and each oblong, in layouts and head dims in turn."""
    dims = (64, 72, 80, 88, 128)
    # each new head dim is a kernel to compile
    for i, n in enumerate(spec.LENGTHS):
        layout = spec.LAYOUTS[i % 4]
        heads = 1 if n > 500 else 2
        yield Case(1, heads, n, n, dims[i % 5 if backend == "cuda" else i % 2], BF16,
                   Variant(layout=layout, lse=i % 3 == 0))  # fmt: skip
    for i, (nq, nk) in enumerate(spec.RECTANGLES):
        yield Case(2, 2, nq, nk, dims[i % 2], (BF16, FP16)[i % 2], Variant(lse=i % 3 == 0))


def head_dims(backend: str) -> Iterator[Case]:
    if backend == "cuda":
        for i, d in enumerate(range(8, 129, 8)):
            yield Case(1, 2, 70, 101, d, (BF16, FP16)[i % 2], Variant(layout=spec.LAYOUTS[i % 4]))
        yield Case(2, 6, 40, 50, 24, BF16, kv_heads=2, dv=56)
        yield Case(1, 4, 65, 65, 80, FP16, kv_heads=1, dv=128)
        return
    for i, d in enumerate((1, 8, 20, 64, 80, 88, 104, 128, 136, 256)):
        dtype = (FP32, BF16, FP16)[i % 3]
        yield Case(1, 2, 70, 101, d, dtype, Variant(layout=spec.LAYOUTS[i % 4]))
    yield Case(1, 4, 65, 65, 32, FP32, kv_heads=2, dv=100)


def variants(backend: str) -> Iterator[AnyCase]:
    """Each choice of each keyword; what is compiled anew for each choice, at one head dim."""
    dtypes = (BF16, FP16) if backend == "cuda" else (BF16, FP32)
    sizes = ((2, 4, 70, 70, 40), (1, 2, 33, 131, 64), (2, 2, 129, 129, 72))
    for i, variant in enumerate(spec.covering_variants()):
        size = sizes[i % 3] if backend == "cuda" else (*sizes[i % 3][:4], 40)
        grouped = {"kv_heads": (1, 2)[i % 2]} if i % 4 == 0 else {}
        yield Case(*size, dtypes[i % 5 == 4], variant, **grouped)
    for i, case in enumerate(spec.varlen_cases((BF16,))):
        yield replace(case, dtype=dtypes[i % 5 == 4])


GRIDS = {"lengths": lengths, "head_dims": head_dims, "variants": variants}
ACCURACY = [
    pytest.param(case, backend, id=f"{backend}-{case}")
    for backend in BACKENDS
    for grid in GRIDS.values()
    for case in grid(backend)
    if taken(case, backend)
]


def test_each_grid_is_there() -> None:
    """The filter leaves both backends each length, each choice of a keyword and packed batches."""
    for backend in BACKENDS:
        assert all(taken(case, backend) for grid in (lengths, head_dims) for case in grid(backend))
        kept = [case for case in variants(backend) if taken(case, backend)]
        assert {case.variant.keys for case in kept} == set(spec.KEYS)
        assert any(isinstance(case, VarlenCase) for case in kept)


def check(case: AnyCase, fn: Callable[..., Any], device: str = "cuda") -> None:
    spec.check(case, in_layout(fn, case), device)


def in_layout(fn: Callable[..., Any], case: AnyCase) -> Callable[..., Any]:
    """fn of the inputs in the layout of the case: a copy to another device closes gaps."""
    layout = case.variant.layout

    def lay(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return spec.laid_out(x, layout)
        return spec.laid_out(x.transpose(0, 1)[None], layout)[0].transpose(0, 1)

    def run(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        return fn(lay(query), lay(key), lay(value), **keywords)

    return run


@pytest.mark.parametrize(("case", "backend"), ACCURACY)
def test_accuracy(case: AnyCase, backend: str) -> None:
    check(case, function(case.op, backend))


@backends
def test_sanitized(backend: str) -> None:
    """Small and ragged: what compute-sanitizer runs."""
    everything = Variant("causal_window_range", "none", "bhqk", 0.2, 4.0, "half", "rms", True)
    cases: list[AnyCase] = [
        Case(1, 2, 33, 70, 72, BF16, everything, kv_heads=1),
        Case(2, 2, 17, 17, 80, BF16, Variant("range_each", "additive", "1hqk", layout="gaps")),
        Case(1, 1, 2, 700, 64, FP16),
        Case(1, 2, 200, 330, 88, BF16, Variant("prefix_lm")),
        VarlenCase(((33, 33), (0, 4), (1, 1), (70, 70)), 2, 72, BF16, Variant("causal"), outside=3),
    ]
    if backend == "triton":
        cases = [*cases[1:3], replace(cases[0], dtype=FP32), cases[4]]
    for case in cases:
        check(case, function(case.op, backend))
    out_of_bounds(backend)


def out_of_bounds(backend: str) -> None:
    """Offsets and ranges that name rows which are not there read and write nothing else."""
    x = torch.randn(70, 2, 64, device="cuda", dtype=BF16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 90, 30, -5, 10**6], device="cuda", dtype=torch.int32)
    out = function("attention_varlen", backend)(x, x, x, cu_seqlens, cu_seqlens)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad.isfinite().all()
    heads = x.detach().transpose(0, 1)[None]
    kv_range = torch.tensor([-(10**9), 10**9], dtype=torch.int32, device="cuda").expand(1, 1, 70, 2)
    attend = function("attention", backend)
    assert torch.equal(attend(heads, heads, heads, kv_range=kv_range), attend(heads, heads, heads))


# --- what a call does to the device ---


@dataclass
class Call:
    """A call with gradients: leaves whose values may change, and the tensors that steer it."""

    fn: Callable[..., Any]
    leaves: list[Tensor]
    steering: list[Tensor]
    other: list[Tensor]  # other values of `steering`
    grad: Tensor

    def __call__(self) -> tuple[Tensor, ...]:
        out = self.fn(*self.leaves)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)

    def forward(self) -> tuple[Tensor]:
        with torch.no_grad():
            return (self.fn(*self.leaves),)

    def steer(self) -> None:
        for target, values in zip(self.steering, self.other, strict=True):
            target.copy_(values)

    def new_values(self) -> None:
        for leaf in self.leaves:
            leaf.detach().copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5)))


CALLS = ("dense", "long", "few_queries", "bias", "rope_norm", "range", "varlen")


def make(kind: str, backend: str, device: str = "cuda", scale: int = 1) -> Call:
    """One call of each kind; `scale` multiplies its rows."""
    nq, nk = (
        n * scale for n in {"few_queries": (2, 900), "long": (700, 700)}.get(kind, (200, 200))
    )
    packed = kind == "varlen"
    case = Case(1, 4, nq, nk, 72, BF16, Variant(layout="bhnd"), kv_heads=2)
    leaves = [x.requires_grad_() for x in case.inputs(0, device)[:3]]
    steering: list[Tensor] = []
    other: list[Tensor] = []
    keywords: dict[str, Any] = {} if packed else {"enable_gqa": True}
    if packed:
        leaves = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in leaves]
        for ends in ([0, 64, 64, 193, 200], [0, 10, 150, 151, 180]):
            cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device) * scale
            (other if steering else steering).append(cu_seqlens)
        keywords |= {"cu_seqlens_q": steering[0], "cu_seqlens_k": steering[0], "is_causal": True}
    elif kind == "range":
        steering, other = [prefix_lm(50, nk, device=device)], [prefix_lm(120, nk, device=device)]
        keywords["kv_range"] = steering[0]
    elif kind == "bias":
        bias = torch.randn(1, 4, 1, nk, device=device, dtype=BF16, requires_grad=True)
        leaves.append(bias)
    elif kind == "rope_norm":
        keywords["rope"] = rope_1d(nk, 72, device=device)
        leaves += [torch.ones(72, device=device, requires_grad=True) for _ in range(2)]
    fn = function("attention_varlen" if packed else "attention", backend, **keywords)
    if kind == "rope_norm":
        fn = partial(_normalised, fn)
    grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(3))
    return Call(fn, leaves, steering, other, grad.to(device, BF16))


def _normalised(
    fn: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor
) -> Any:
    return fn(q, k, v, q_norm=(of_q, None, 1e-6, "rms"), k_norm=(of_k, None, 1e-6, "rms"))


calls = pytest.mark.parametrize("kind", CALLS)


@calls
@backends
def test_repeats_bitwise(kind: str, backend: str) -> None:
    call = make(kind, backend)
    first = call()
    assert all(same(call(), first) for _ in range(5))


@calls
@backends
def test_nothing_waits_for_the_device(kind: str, backend: str) -> None:
    call = make(kind, backend)
    call()  # compiles, and asks once what the device is
    with no_waiting():
        call()


@calls
@backends
def test_cuda_graph(kind: str, backend: str) -> None:
    """Captured with its backward; the replay sees other features, and other offsets or ranges."""
    call = make(kind, backend)
    check_replay(call, call.new_values)
    if call.steering:
        call = make(kind, backend)
        check_replay(call, call.steer)


@calls
@backends
def test_other_stream_and_thread(kind: str, backend: str) -> None:
    call = make(kind, backend)
    wanted = call()
    assert same(on_a_thread_and_stream(call), wanted)
    # backward() without a stream around it: autograd's thread takes that of the forward
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = call.fn(*call.leaves)
    out.backward(call.grad)
    torch.cuda.synchronize()
    grads = [leaf.grad for leaf in call.leaves]
    assert same([g for g in grads if g is not None], wanted[1:])


@pytest.mark.parametrize("kind", ["dense", "range", "varlen"])
@backends
def test_memory_is_linear(kind: str, backend: str) -> None:
    """At 8192 tokens a byte for each pair of one head would be 64 MiB."""
    call = make(kind, backend, scale=41)  # 8200 tokens, 4 heads
    elements = call.grad.numel()
    results = sum(x.nbytes for x in call())
    # lse, delta and tables of tiles: vectors; for each feature one fp32 number at most
    assert peak_bytes(call.forward) <= call.grad.nbytes + 8 * elements + (1 << 20)
    held = peak_bytes(call)
    assert held <= results + 16 * elements + (1 << 20)
    assert held <= 60 << 20


@pytest.mark.parametrize("kind", ["dense", "rope_norm", "range", "varlen"])
@backends
def test_compile(kind: str, backend: str) -> None:
    call = make(kind, backend)
    wanted = call()
    torch.compiler.reset()
    compiled = replace(call, fn=torch.compile(call.fn, fullgraph=True))
    assert same(compiled(), wanted)


@backends
def test_gradients_nobody_needs(backend: str) -> None:
    call = make("bias", backend)
    wanted = call()
    for i in range(len(call.leaves)):
        for leaf in call.leaves:
            leaf.requires_grad_(False)
        call.leaves[i].requires_grad_()
        out = call.fn(*call.leaves)
        (grad,) = torch.autograd.grad(out, call.leaves[i], call.grad)
        assert torch.equal(grad, wanted[1 + i])


@backends
def test_backward_twice(backend: str) -> None:
    call = make("dense", backend)
    out = call.fn(*call.leaves)
    first = torch.autograd.grad(out, call.leaves, call.grad, retain_graph=True)
    assert same(torch.autograd.grad(out, call.leaves, call.grad), first)


@backends
def test_autocast(backend: str) -> None:
    fn = function("attention", backend)
    q, k, v = Case(1, 2, 40, 40, 64).inputs(0, "cuda")[:3]
    with torch.autocast("cuda", BF16):
        out = fn(q, k, v)
    assert torch.equal(out, fn(q.to(BF16), k.to(BF16), v.to(BF16)))


@backends
@pytest.mark.parametrize("kind", ["dense", "varlen"])
def test_second_device(kind: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    wanted = [x.cpu() for x in make(kind, backend)()]
    got = make(kind, backend, "cuda:1")()
    assert {x.device for x in got} == {torch.device("cuda:1")}
    assert same([x.cpu() for x in got], wanted)
    assert torch.cuda.current_device() == 0


def test_auto_takes_the_first_that_can() -> None:
    """Each backend says what it cannot run, and "auto" follows."""
    registered = [name for name in _backends.ops()["attention"] if name in BACKENDS]
    if any(_backends.unavailable(name) for name in registered) or len(registered) < 2:
        pytest.skip("attention has not both a cuda and a triton kernel here")
    for dtype, d, wanted in ((BF16, 72, "cuda"), (FP16, 128, "cuda"), (FP32, 64, "triton"),
                             (BF16, 136, "triton"), (BF16, 20, "triton")):  # fmt: skip
        inputs = Case(1, 1, 4, 4, d, dtype).inputs(0, "cuda")[:3]
        assert _backends.select("attention", "auto", *inputs) == wanted
        assert f"auto runs {wanted}" in vlm_kernels.explain("attention", *inputs)


@backends
def test_offsets_are_checked_on_demand(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = VarlenCase(((30, 30), (20, 20)), 2, 64, torch.bfloat16)
    fn, keywords = function("attention_varlen", backend), case.keywords(0, "cuda")
    query, key, value, *_ = case.inputs(0, "cuda")
    keywords["cu_seqlens_k"] = keywords["cu_seqlens_k"] + 5
    fn(query, key, value, **keywords)  # clamped
    monkeypatch.setenv("VLM_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        fn(query, key, value, **keywords)
