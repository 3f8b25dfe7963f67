"""clip_loss and siglip_loss on a GPU, each backend that takes CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.helpers import BACKENDS, captured, function, moved, no_waiting, peak_bytes, same
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant

ops = pytest.mark.parametrize("op", spec.OPS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def leaves_of(case: Case, device: str = "cuda") -> list[Tensor]:
    inputs = case.inputs(0, device)
    return [x.requires_grad_() for x in inputs if x is not None]


def check(case: Case, fn: Callable[..., Any], device: str = "cuda") -> None:
    """Draws on the CPU: the truth is computed from the same numbers there."""

    def on_gpu(*inputs: Tensor | None, **keywords: Any) -> Any:
        move = partial(moved, device=device)
        loss = fn(*map(move, inputs), **{k: move(v) for k, v in keywords.items()})
        return tuple(x.cpu() for x in loss) if isinstance(loss, tuple) else loss.cpu()

    spec.check(case, on_gpu)


@pytest.mark.parametrize("case", [c for op in spec.OPS for c in spec.cases(op)], ids=str)
@backends
def test_accuracy(case: Case, backend: str) -> None:
    check(case, function(case.op, backend))


@pytest.mark.parametrize(
    "variant", [v for op in spec.OPS for v in spec.covering_variants(op)], ids=str
)
@backends
def test_each_variant_in_several_blocks(variant: Variant, backend: str) -> None:
    case = Case(1500, 1300, 128, torch.bfloat16, variant, 50.0, -5.0)
    check(case, function(case.op, backend, workspace_mb=1))


@ops
@backends
def test_sanitized(op: str, backend: str) -> None:
    """Small and ragged: what compute-sanitizer runs."""
    for dtype in (torch.bfloat16, torch.float32):
        for variant in (Variant(op, "ids", "both"), Variant(op)):
            case = Case(130, 67, 72, dtype, variant, 20.0, -2.0)
            check(case, function(op, backend))


@ops
@backends
def test_other_stream_and_autograd_thread(op: str, backend: str) -> None:
    """The backward runs on autograd's thread, on the stream of the forward."""
    case = Case(700, 700, 64, torch.bfloat16, Variant(op), 20.0, -2.0)
    fn = function(op, backend)
    leaves = leaves_of(case)
    wanted = torch.autograd.grad(fn(*leaves), leaves)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = fn(*leaves)
        loss.backward()
    torch.cuda.synchronize()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad)


@ops
@backends
def test_cuda_graph_without_synchronisation(op: str, backend: str) -> None:
    case = Case(600, 500, 64, torch.bfloat16, Variant(op), 20.0, -2.0)
    fn = function(op, backend)
    leaves = leaves_of(case)

    def step() -> tuple[Tensor, ...]:
        loss = fn(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    wanted = [x.detach().clone() for x in step()]
    with no_waiting():
        step()
    graph, got = captured(step)
    graph.replay()
    assert same(got, wanted)


@ops
@backends
def test_memory_is_bounded(op: str, backend: str) -> None:
    """workspace_mb, one fp32 accumulator and O(N + M), where the matrix would be 2 GiB in fp32."""
    n, d, workspace_mb = 23170, 256, 64
    case = Case(n, n, d, torch.bfloat16, Variant(op), 20.0, -2.0)
    leaves = leaves_of(case)
    fn = function(op, backend, workspace_mb=workspace_mb)
    small = leaves_of(Case(256, 256, d, torch.bfloat16, Variant(op), 20.0, -2.0))
    torch.autograd.grad(fn(*small), small)
    held = peak_bytes(lambda: torch.autograd.grad(fn(*leaves), leaves))
    outputs = sum(leaf.nbytes for leaf in leaves)
    formed = outputs if op == "siglip_loss" else 0  # the forward's, while the backward's are made
    assert held <= outputs + formed + (workspace_mb << 20) + 4 * n * d + (32 << 20)


@ops
@backends
def test_second_device(op: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    check(
        Case(130, 120, 64, torch.bfloat16, Variant(op), 20.0, -2.0), function(op, backend), "cuda:1"
    )
