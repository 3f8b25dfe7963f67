"""Timing on a GPU: CUDA graphs, a cold L2, the latency of an eager call, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_L2_TIMES = 4
_WARM_UP = 3
_EAGER_CALLS = 20


def graphed(fn: Callable[[], object]) -> Callable[[], object]:
    """Replays `fn` as one CUDA graph: what is timed is the device, not Python. What capturing
    raises (a synchronisation, say) comes through. It is captured on the stream it was warmed up on:
    a backward runs where its forward did."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        # the graph owns its outputs, and a name here would keep them past the replay
        fn()
    return graph.replay


def evictor(device: str) -> Callable[[], object]:
    """A call that leaves nothing of a benchmark's data in L2."""
    size = _L2_TIMES * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer.zero_


def eager_seconds(fn: Callable[[], object]) -> float:
    """Median time of one eager call and the wait for it: launches and Python included."""
    seconds = []
    for _ in range(_EAGER_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_bytes(fn: Callable[[], object]) -> int:
    """Device memory that one call holds at its peak above what there was, its results included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = fn()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak
