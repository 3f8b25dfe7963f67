"""clip_loss and siglip_loss on a CUDA device: the rule of accuracy, graphs, threads, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from tests.gpu.helpers import captured, moved, no_waiting, on_a_thread_and_stream, peak_bytes, same
from vlm_kernels import _backends, _load
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Inputs, Variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        _backends.unavailable("cuda") is not None, reason=str(_backends.unavailable("cuda"))
    ),
]
ops = pytest.mark.parametrize("name", spec.OPS)
tiles = pytest.mark.parametrize("tiles", ["gemm", "fused"])
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _gemm_tiles() -> Iterator[None]:
    yield
    _load._C.set_contrastive_tiles("gemm")


def function(name: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, name), backend="cuda", **keywords)


def on_device(inputs: Inputs, device: str = "cuda") -> Inputs:
    return inputs.map(lambda x: x.to(device))


def evaluate(case: Case, device: str = "cuda", **keywords: Any) -> dict[str, Tensor]:
    """On the inputs that the truth was computed from: a CPU's random numbers."""
    drawn = {name: moved(value, device) for name, value in case.keywords().items()}
    inputs = on_device(case.inputs(), device)
    return spec.evaluate(function(case.op, **keywords), inputs, drawn)


def check(case: Case, device: str = "cuda", **keywords: Any) -> None:
    for key, value in evaluate(case, device, **keywords).items():
        spec.check_result(case, key, value.cpu())


@tiles
@pytest.mark.parametrize("case", [c for name in spec.OPS for c in spec.cases(name)], ids=str)
def test_cases(case: Case, tiles: str) -> None:
    if tiles == "fused" and case.dtype == torch.float32:
        pytest.skip("the fused tiles have no fp32")
    _load._C.set_contrastive_tiles(tiles)
    check(case)


@ops
@dtypes
@tiles
@pytest.mark.parametrize("data", spec.DATA)
def test_scale_100(name: str, dtype: torch.dtype, tiles: str, data: str) -> None:
    _load._C.set_contrastive_tiles(tiles)
    check(Case(300, 400, 64, dtype, Variant(name), 100.0, None, data))


@ops
@dtypes
def test_blocks_repeat_bitwise(name: str, dtype: torch.dtype) -> None:
    case = Case(900, 700, 64, dtype, Variant(name))
    first, again = (evaluate(case, workspace_mb=1) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    check(case, workspace_mb=1)


@ops
def test_auto_picks_cuda(name: str) -> None:
    inputs = on_device(Case(8, 8, 16).inputs())
    assert _backends.select(name, "auto", *inputs[:2]) == "cuda"
    assert "auto runs cuda" in vlm_kernels.explain(name, *inputs[:3])
    with pytest.raises(ValueError, match="logit_scale is on cpu"):
        function(name)(*inputs[:2], torch.tensor(10.0))


@ops
@pytest.mark.parametrize("directions", spec.DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_graph(name: str, directions: str, reduction: str) -> None:
    """Captured with its backward, replayed on other features and another scale."""
    if name == "siglip_loss" and directions != "both":
        pytest.skip("siglip_loss has no directions")
    keywords = {"reduction": reduction}
    if name == "clip_loss":
        keywords["directions"] = directions
    first = on_device(Case(200, 200, 64, torch.bfloat16, scale=10.0).inputs())
    leaves = [x.clone().requires_grad_() for x in first[:3]]

    def run() -> tuple[Tensor, ...]:
        loss = function(name, **keywords)(*leaves)
        total = sum(x.sum() for x in loss) if isinstance(loss, tuple) else loss.sum()
        return (total.detach(), *torch.autograd.grad(total, leaves))

    graph, results = captured(run)
    other = on_device(Case(200, 200, 64, torch.bfloat16, scale=17.0).inputs(seed=1))
    with torch.no_grad():
        for leaf, value in zip(leaves, other[:3]):
            leaf.copy_(value)
    graph.replay()
    assert same(results, run())


@ops
def test_no_synchronisation(name: str) -> None:
    inputs = on_device(Case(300, 300, 64, torch.bfloat16).inputs())
    keywords = {"labels": torch.arange(300, device="cuda"), "return_metrics": True}
    leaves = [x.requires_grad_() for x in inputs[:3]]
    function(name)(*leaves, **keywords)[0].backward()  # cuBLAS sets itself up
    with no_waiting():
        loss, _ = function(name)(*leaves, **keywords)
        loss.backward()


@ops
def test_side_stream_and_other_thread(name: str) -> None:
    """The kernels run on the caller's stream; backward runs on the autograd thread."""
    case = Case(300, 300, 64, torch.bfloat16, Variant(name))
    expected = evaluate(case)
    results = on_a_thread_and_stream(lambda: tuple(evaluate(case).values()))
    assert same(results, tuple(expected.values()))


@ops
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_second_device(name: str) -> None:
    check(Case(100, 130, 64, torch.bfloat16, Variant(name)), "cuda:1")
    assert torch.cuda.current_device() == 0


@ops
@dtypes
def test_compile(name: str, dtype: torch.dtype) -> None:
    inputs = on_device(Case(64, 64, 32, dtype).inputs())
    compiled = torch.compile(function(name), fullgraph=True)
    expected = spec.evaluate(function(name), inputs, {})
    got = spec.evaluate(compiled, inputs, {})
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@ops
def test_autocast(name: str) -> None:
    inputs = on_device(Case(64, 64, 32).inputs())
    with torch.autocast("cuda", torch.bfloat16):
        loss = function(name)(*inputs[:3])
    image, text, scale, _ = inputs
    assert torch.equal(loss, function(name)(image.bfloat16(), text.bfloat16(), scale))


@ops
def test_labels_are_checked_on_demand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, scale, _ = on_device(Case(16, 16, 8).inputs())
    labels = torch.arange(16, device="cuda") + 1
    function(name)(image, text, scale, labels=labels)
    monkeypatch.setenv("VLM_CHECK", "1")
    with pytest.raises(ValueError, match="labels holds 16"):
        function(name)(image, text, scale, labels=labels)


@ops
@dtypes
def test_memory(name: str, dtype: torch.dtype) -> None:
    """Above inputs and gradients: the workspace, one fp32 accumulator, and vectors."""
    n, m, d, workspace = 8192, 6144, 256, 16
    inputs = on_device(Case(n, m, d, dtype, scale=10.0).inputs())
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(name, workspace_mb=workspace)(*leaves), leaves)

    above = peak_bytes(run)
    grads = (n + m) * d * dtype.itemsize
    # The sigmoid forms its gradients in the forward and scales them into new tensors.
    formed = (n + m) * d * (4 if dtype == torch.float16 else dtype.itemsize)
    allowed = grads + (formed if name == "siglip_loss" else 0) + (workspace << 20)
    if dtype != torch.float32:
        allowed += 4 * m * d
    assert above <= allowed + 100 * (n + m) + (1 << 20)
