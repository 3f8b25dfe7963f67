"""Measures one row: time beside the peers, error against fp64, memory in a process of its own."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends
from vlm_kernels.reference import contrastive as reference
from vlm_kernels.testing import timing
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.tolerances import relative_error

from . import gpu, peers
from .record import OtherLoad, Row
from .roofline import DTYPES

# A trained CLIP and a trained SigLIP.
_SCALES: dict[str, tuple[float, float | None]] = {
    "clip_loss": (100.0, None),
    "siglip_loss": (117.0, -16.5),
}
_SLOW = 1.5
"""A peer this much slower than the best one after the first round is not timed again."""
_WARM_UP = (256, 384)
"""Rows of the calls before memory is measured: two sizes, so that torch.compile turns dynamic."""


@dataclass(frozen=True)
class Case:
    op: str
    mode: str  # "fwd" or "full"
    dtype: str  # a key of DTYPES
    n: int
    m: int
    d: int

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.dtype} {self.shape}"

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.d}" if self.n == self.m else f"{self.n}x{self.m}x{self.d}"

    def inputs(self, device: str = "cpu") -> spec.Inputs:
        scale, bias = _SCALES[self.op]
        dtype = DTYPES[self.dtype]
        return spec.make_inputs(
            self.n, self.m, self.d, dtype, device=device, scale=scale, bias=bias
        )

    @property
    def gradient_bytes(self) -> int:
        size = (self.n + self.m) * self.d * DTYPES[self.dtype].itemsize
        return size if self.mode == "full" else 0


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


def call(loss: peers.Loss, inputs: spec.Inputs, mode: str) -> Callable[[], object]:
    """One call to time: the loss under no_grad, or the loss and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_(mode == "full") for x in _present(inputs)]

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*leaves)

    def full() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*leaves), leaves)

    return {"fwd": forward, "full": full}[mode]


def time_case(case: Case, providers: Sequence[peers.Provider], settings: Settings) -> list[Row]:
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
            fn = call(provider.build(False), inputs, case.mode)
            start = time.perf_counter()
            fn()
            if settings.on_gpu:
                torch.cuda.synchronize()
            row.first_s = time.perf_counter() - start
            row.err, row.err_n = _error(case, provider, settings)
            if settings.on_gpu:
                row.eager_ms = gpu.eager_seconds(fn) * 1e3
                fn = gpu.graphed(fn)
            runs[provider.key] = fn
        except Exception as error:  # whatever a peer or a kernel raises belongs in its row
            row.status, row.reason = "error", reason_of(error)
    ours = {provider.key for provider in providers if provider.ours}
    load = OtherLoad()
    times = _times(runs, ours, settings)
    share = load.share()
    for key, seconds in times.items():
        rows[key].other_load = share
        spread = timing.Timing(seconds)
        rows[key].ms, rows[key].samples = spread.median * 1e3, len(seconds)
        rows[key].ms_p20, rows[key].ms_p80 = spread.p20 * 1e3, spread.p80 * 1e3
    return list(rows.values())


def _times(
    runs: dict[str, Callable[[], object]], ours: set[str], settings: Settings
) -> dict[str, list[float]]:
    evict = gpu.evictor(settings.device) if settings.on_gpu else None
    where: dict[str, Any] = {"device": settings.device, "before": evict}
    first = timing.interleaved(runs, rounds=1, warmup=0, **where)
    seconds = {key: list(value.seconds) for key, value in first.items()}
    best = min((s[0] for key, s in seconds.items() if key not in ours), default=0.0)
    kept = {k: fn for k, fn in runs.items() if k in ours or seconds[k][0] <= _SLOW * best}
    if kept and settings.repeats > 1:
        rest = timing.interleaved(
            kept, min_rounds=settings.repeats - 1, budget_s=settings.min_time, warmup=0, **where
        )
        for key, value in rest.items():
            seconds[key] += value.seconds
    return seconds


def _row(kind: str, case: Case, provider: peers.Provider, settings: Settings) -> Row:
    row = Row(
        kind=kind,
        provider=provider.name,
        ours=provider.ours,
        op=case.op,
        mode=case.mode,
        note=provider.note,
        dtype=case.dtype,
        n=case.n,
        m=case.m,
        d=case.d,
        workspace_mb=provider.workspace_mb,
        threads=settings.threads,
        device=settings.device,
    )
    row.flops = spec.flops(case.op, case.n, case.m, case.d, case.mode)
    dtype = DTYPES[case.dtype]
    row.bytes = spec.bytes_moved(case.op, case.n, case.m, case.d, dtype, case.mode)
    if provider.ours:
        try:
            row.backend = _backend(case, settings, provider.backend)
        except (RuntimeError, ValueError) as error:
            row.status, row.reason = "error", reason_of(error)
        row.counts = row.backend is not None and row.backend not in peers.FALLBACKS
    else:
        row.backend = "torch"
        if case.n != case.m:
            row.status, row.reason = "skipped", "pairs rows with columns one to one"
            return row
        needed = provider.matrices * case.n * case.m * dtype.itemsize
        available = torch.cuda.mem_get_info()[0] if settings.on_gpu else _available()
        if needed > 0.85 * available:
            row.status = "skipped"
            row.reason = f"needs about {needed / 2**30:.1f} GiB"
    return row


def _backend(case: Case, settings: Settings, backend: str | None) -> str:
    """What runs our op on this case."""
    small = replace(case, n=min(case.n, 8), m=min(case.m, 8))
    leaves = _present(small.inputs(settings.device))
    return _backends.select(case.op, backend or settings.backend, *leaves)


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


def _error(
    case: Case, provider: peers.Provider, settings: Settings
) -> tuple[dict[str, float], int]:
    most = settings.error_rows
    small = replace(case, n=min(case.n, most), m=min(case.m, most))
    return _small_error(small, provider, settings.device), small.n


@functools.cache
def _small_error(case: Case, provider: peers.Provider, device: str) -> dict[str, float]:
    exact = _exact(case, device)
    got = _results(provider.build(False), case.inputs(device), case.mode)
    return {name.removesuffix(".grad"): relative_error(got[name], exact[name]) for name in exact}


@functools.lru_cache(maxsize=1)
def _exact(case: Case, device: str) -> dict[str, Tensor]:
    inputs = case.inputs(device).to(torch.float64)
    return _results(getattr(reference, case.op), inputs, case.mode)


def _results(loss: peers.Loss, inputs: spec.Inputs, mode: str) -> dict[str, Tensor]:
    if mode == "full":
        return spec.evaluate(lambda *x: loss(*_present(x)), inputs, {})
    with torch.no_grad():
        return {"loss": loss(*_present(inputs))}


def _present(inputs: Iterable[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None]


def memory_case(case: Case, provider: peers.Provider, settings: Settings) -> Row:
    """A row with the peak memory of one call above inputs and gradients."""
    row = _row("memory", case, provider, settings)
    if row.status != "ok":
        return row
    if settings.on_gpu:
        try:
            peak = gpu.peak_bytes(memory_step(case, provider.name, provider.workspace_mb, settings))
            row.peak_mib = (peak - case.gradient_bytes) / 2**20
        except Exception as error:  # out of memory, whatever the call raised
            row.status, row.reason = "error", reason_of(error)
        return row
    step = f"memory_step({case!r}, {provider.name!r}, {provider.workspace_mb!r}, {settings!r})"
    setup = f"from benchmarks.measure import Case, Settings, memory_step\nstep = {step}"
    load = OtherLoad()
    try:
        peak = timing.peak_rss_delta(setup, "kept = step()", timeout_s=settings.memory_timeout)
        row.peak_mib = (peak - case.gradient_bytes) / 2**20
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
    loss = provider.build(True)
    for rows in _WARM_UP:
        call(loss, replace(case, n=rows, m=rows).inputs(settings.device), case.mode)()
    vlm_kernels.empty_cache()
    return call(loss, case.inputs(settings.device), case.mode)
