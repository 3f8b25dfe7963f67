"""What the tests on a GPU share: is there a kernel, does a call wait, graphs, streams, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends

BACKENDS = ("cuda", "triton")
Step = Callable[[], Sequence[Tensor]]


def function(op: str, backend: str, **keywords: Any) -> Callable[..., Any]:
    """The public function with one backend; skips where that backend has no kernel for the op."""
    if backend not in _backends.ops()[op]:
        pytest.skip(f"{op} has no {backend} kernel")
    reason = _backends.unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    return partial(getattr(vlm_kernels, op), backend=backend, **keywords)


def moved(x: Any, device: str) -> Any:
    """Tensors to `device`, in tuples too."""
    if isinstance(x, tuple):
        return tuple(moved(each, device) for each in x)
    return x.to(device) if isinstance(x, Tensor) else x


def same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """`step` as a CUDA graph, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def check_replay(step: Step, change: Callable[[], object]) -> None:
    """A replay gives what a call gives: at first, and after `change` wrote into the inputs."""
    graph, results = captured(step)
    graph.replay()
    before = [x.detach().clone() for x in results]
    assert same(before, step())
    change()
    graph.replay()
    assert same(results, step())
    assert not same(results, before)


def on_a_thread_and_stream(step: Step) -> Sequence[Tensor]:
    """What `step` gives on a stream and a thread of its own."""

    def work() -> Sequence[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = step()
        stream.synchronize()
        return found

    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def peak_bytes(step: Step) -> int:
    """Device memory that a call holds at its peak above what there was, its results included."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak
