"""Timing and memory measurement shared by tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, in the order they were made."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item()

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    min_rounds: int = 7,
    max_rounds: int = 200,
    budget_s: float = 10.0,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times functions side by side, so that a machine's drift meets all of them.

    Each round calls every function once, starting one further each time. Wall-clock time on the
    CPU, CUDA events on a GPU.

    Args:
        fns: name -> function without arguments.
        rounds: a fixed number of rounds; without it, rounds go on until `budget_s` seconds have
            passed, but at least `min_rounds` and at most `max_rounds`.
        warmup: rounds that are not counted.
        before: called before each timed call, untimed (to flush a cache or drop gradients).
    """
    names = list(fns)
    on_cuda = torch.device(device).type == "cuda"
    once = _cuda_once if on_cuda else _wall_once
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start, done = time.perf_counter(), -warmup
    while done < (rounds if rounds is not None else max_rounds):
        if done == 0:
            start = time.perf_counter()
        if rounds is None and done >= min_rounds and time.perf_counter() - start > budget_s:
            break
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before()
            elapsed = once(fns[name])
            if done >= 0:
                seconds[name].append(elapsed)
        done += 1
    return {name: Timing(values) for name, values in seconds.items()}


def _wall_once(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _cuda_once(fn: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


_CHILD = """
import ctypes, gc, json, sys, threading, time

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

class Sampler(threading.Thread):
    # For where VmHWM cannot be reset. It sees only a peak that lasts, from a statement that
    # lets go of the GIL.
    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()
    def run(self):
        while not self.stopped.is_set():
            self.peak = max(self.peak, status("VmRSS"))
            time.sleep(0.0005)

setup, statement = json.loads(sys.argv[1])
scope = {}
exec(setup, scope)
gc.collect()
try:
    # Without this, memory freed by the setup would be used again and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
except AttributeError:
    pass
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    sampler = None
except OSError:
    sampler = Sampler()
    sampler.start()
before = status("VmRSS")
exec(statement, scope)
if sampler is None:
    peak = status("VmHWM")
else:
    sampler.stopped.set()
    sampler.join()
    peak = max(sampler.peak, status("VmRSS"))
print(json.dumps(peak - before))
"""


def peak_rss_delta(
    setup: str, statement: str, *, env: Mapping[str, str] | None = None, timeout_s: float = 300
) -> int:
    """Bytes by which `statement` raises the peak resident memory of a fresh Python process (Linux).

    Args:
        setup: Python source run first: imports, inputs, and a small warm-up call, so that thread
            pools, JIT-compiled kernels and lazily loaded libraries are not counted.
        statement: Python source run in the same namespace; what it leaves behind (gradients) is
            counted.
        env: added to the environment.

    Raises:
        RuntimeError: the child failed; the message has its stderr.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([setup, statement])],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"peak_rss_delta: the child exited with {child.returncode}:\n{child.stderr}"
        )
    return int(json.loads(child.stdout.splitlines()[-1]))
