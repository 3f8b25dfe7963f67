"""Measures one row: time beside the peers, error against fp64, memory in a process of its own."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing import timing
from vlm_kernels.testing.tolerances import relative_error

from . import gpu, peers
from .case import FALLBACKS, Case, Provider
from .record import OtherLoad, Row

_SLOW = 1.5
"""A peer this much slower than the best one after the first round is not timed again."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: rounds at least; min_time: seconds of rounds a case at least.
        error_rows: the error is measured at this N at most: fp64 holds the N x M matrix many times.
        device: "cpu" or "cuda". On a GPU calls are replayed as CUDA graphs, from a cold L2.
    """

    threads: int = 2
    backend: str = "auto"
    repeats: int = 5
    min_time: float = 2.0
    error_rows: int = 2048
    device: str = "cpu"
    memory_timeout: float = 600.0

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def time_case(case: Case, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    """A row for each provider, timed in turns; what cannot run becomes a row with the reason."""
    gc.collect()
    torch.compiler.reset()  # each shape is a graph of its own, and Dynamo keeps only a few
    inputs = case.inputs(settings.device)
    if settings.on_gpu:
        torch.cuda.empty_cache()
    rows = {provider.key: _row("time", case, provider, settings) for provider in providers}
    runs = {}
    for provider in providers:
        row = rows[provider.key]
        if row.status != "ok":
            continue
        try:
            with provider.around():
                runs[provider.key] = _prepared(case, provider, inputs, row, settings)
        except Wrong as wrong:
            row.status, row.reason = "error", str(wrong)
        except Exception as error:  # whatever a peer or a kernel raises belongs in its row
            row.status, row.reason = "error", reason_of(error)
    ours = {provider.key for provider in providers if provider.ours}
    load = OtherLoad()
    times = _times(runs, ours, settings, {provider.key for provider in providers if provider.keep})
    share = load.share()
    for key, seconds in times.items():
        rows[key].other_load = share
        spread = timing.Timing(seconds)
        rows[key].ms, rows[key].samples = spread.median * 1e3, len(seconds)
        rows[key].ms_p20, rows[key].ms_p80 = spread.p20 * 1e3, spread.p80 * 1e3
    return list(rows.values())


class Wrong(Exception):
    """The results are not those of the op."""


def _prepared(
    case: Case, provider: Provider, inputs: Any, row: Row, settings: Settings
) -> Callable[[], object]:
    """What is timed: called once, found to be right, and on a GPU a graph."""
    fn = case.call(provider.build(False), inputs)
    start = time.perf_counter()
    fn()
    if settings.on_gpu:
        torch.cuda.synchronize()
    row.first_s = time.perf_counter() - start
    row.err, row.err_n = _error(case, provider, settings)
    _check(case, row.err)
    if not settings.on_gpu:
        return fn
    row.eager_ms = gpu.eager_seconds(fn) * 1e3
    return gpu.graphed(fn)


def _times(
    runs: dict[str, Callable[[], object]],
    ours: set[str],
    settings: Settings,
    keep: Set[str] = frozenset(),
) -> dict[str, list[float]]:
    evict = gpu.evictor(settings.device) if settings.on_gpu else None
    where: dict[str, Any] = {"device": settings.device, "before": evict}
    first = timing.interleaved(runs, rounds=1, warmup=0, **where)
    seconds = {key: list(value.seconds) for key, value in first.items()}
    best = min((s[0] for key, s in seconds.items() if key not in ours), default=0.0)
    kept = {k: fn for k, fn in runs.items() if k in ours | keep or seconds[k][0] <= _SLOW * best}
    if kept and settings.repeats > 1:
        rest = timing.interleaved(
            kept, min_rounds=settings.repeats - 1, budget_s=settings.min_time, warmup=0, **where
        )
        for key, value in rest.items():
            seconds[key] += value.seconds
    return seconds


def _row(kind: str, case: Case, provider: Provider, settings: Settings) -> Row:
    row = Row(
        kind=kind,
        provider=provider.name,
        ours=provider.ours,
        op=case.op,
        mode=case.mode,
        note=provider.note,
        dtype=case.dtype,
        shape=case.shape,
        workspace_mb=provider.workspace_mb,
        threads=settings.threads,
        device=settings.device,
        flops=case.flops,
        bytes=case.bytes,
        **case.fields,
    )
    if provider.ours:
        try:
            row.backend = case.backend(provider.backend or settings.backend, settings.device)
        except (RuntimeError, ValueError) as error:
            row.status, row.reason = "error", reason_of(error)
        row.counts = row.backend is not None and row.backend not in FALLBACKS
    else:
        row.backend = "torch"
        refused = case.refuses(provider)
        if refused:
            row.status, row.reason = "skipped", refused
            return row
        needed = provider.matrices * case.matrix * case.torch_dtype.itemsize
        available = torch.cuda.mem_get_info()[0] if settings.on_gpu else _available()
        if needed > 0.85 * available:
            row.status = "skipped"
            row.reason = f"needs about {needed / 2**30:.1f} GiB"
    return row


def _available() -> int:
    """Bytes of memory that can still be had, or all there could be where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            kib = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62
    return int(kib) * 1024


def reason_of(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # a failed child ends with its error, any other message begins with it
    line = lines[-1] if "the child exited" in lines[0] else lines[0]
    return f"{type(error).__name__}: {line.strip()}"[:300]


def _check(case: Case, errors: dict[str, float]) -> None:
    """What is wrong is not worth timing."""
    bad = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= case.wrong]
    if bad:
        raise Wrong(f"wrong: errors above {case.wrong:g} against fp64: {', '.join(bad)}")


def _error(case: Case, provider: Provider, settings: Settings) -> tuple[dict[str, float], int]:
    small = case.for_error(settings.error_rows)
    return _small_error(small, provider, settings.device), small.fields["n"]


@functools.cache
def _small_error(case: Case, provider: Provider, device: str) -> dict[str, float]:
    exact = _exact(case, device)
    got = case.results(provider.build(False), case.inputs(device))
    return {name: relative_error(got[name], exact[name]) for name in exact}


@functools.lru_cache(maxsize=1)
def _exact(case: Case, device: str) -> dict[str, Tensor]:
    return case.exact(device)


def memory_case(case: Case, provider: Provider, settings: Settings) -> Row:
    """A row with the peak memory of one call above inputs and gradients."""
    row = _row("memory", case, provider, settings)
    if row.status != "ok":
        return row
    if settings.on_gpu:
        try:
            with provider.around():
                step = memory_step(case, provider.name, provider.workspace_mb, settings)
                peak = gpu.peak_bytes(step)
            row.peak_mib = (peak - case.returned_bytes) / 2**20
        except Exception as error:  # out of memory, whatever the call raised
            row.status, row.reason = "error", reason_of(error)
        return row
    call = f"memory_step({case!r}, {provider.name!r}, {provider.workspace_mb!r}, {settings!r})"
    setup = "from benchmarks.measure import Settings, memory_step\n"
    setup += f"from {type(case).__module__} import Case\nstep = {call}"
    load = OtherLoad()
    try:
        peak = timing.peak_rss_delta(setup, "kept = step()", timeout_s=settings.memory_timeout)
        row.peak_mib = (peak - case.returned_bytes) / 2**20
    except Exception as error:  # out of memory, a timeout, whatever the call raised
        row.status, row.reason = "error", reason_of(error)
    row.other_load = load.share()
    return row


def memory_step(
    case: Case, name: str, workspace_mb: int | None, settings: Settings
) -> Callable[[], object]:
    """The call to measure, after small ones that load what it needs."""
    torch.set_num_threads(settings.threads)
    provider = peers.named(case.op, name, workspace_mb, settings.backend)
    fn = provider.build(True)
    for small in case.small():
        small.call(fn, small.inputs(settings.device))()
    vlm_kernels.empty_cache()
    return case.call(fn, case.inputs(settings.device))
