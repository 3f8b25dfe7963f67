"""`python -m benchmarks cost`: import time, per-call overhead, build time, size of the wheel."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels
from vlm_kernels import _load
from vlm_kernels.testing import timing

from . import peers, record, report
from .record import ROOT, Row

_IMPORT = """
import time, torch
start = time.perf_counter()
import vlm_kernels
print(time.perf_counter() - start)
"""
_CALLS, _ROUNDS = 2000, 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cost`."""
    add = parser.add_argument
    add("--build", action="store_true", help="also build a wheel from a clean copy of the tree")
    add("--check", action="store_true", help="hold it to the targets; exit status 1 if missed")
    add("--json", metavar="FILE", help="write a JSON line a row, over what the file holds")
    add("--append", action="store_true", help="append to --json instead")
    add("--markdown", action="store_true", help="print tables in Markdown")


def _row(name: str, value: float | None, unit: str, note: str, **fields: Any) -> Row:
    fields = {"counts": value is not None, "repro": "python -m benchmarks cost", **fields}
    return Row("cost", peers.OURS, True, name=name, value=value, unit=unit, note=note, **fields)


def import_seconds(runs: int = 9) -> float:
    """Median time of `import vlm_kernels` after `import torch`, in fresh processes."""
    seconds = []
    for _ in range(runs + 1):
        command = [sys.executable, "-c", _IMPORT]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))
    return statistics.median(seconds[1:])  # the first may read the files from the disk


class _Record(TorchDispatchMode):
    """Keeps the calls of our ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlm_kernels":
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


def _bare(fn: Callable[[], object]) -> Callable[[], object] | None:
    """The calls of `_C` that `fn` makes, without what is around them; None if it makes none."""
    with _Record() as recorded:
        fn()
    bound = [(getattr(_load._C, name), args) for name, args in recorded.calls]

    def bare() -> None:
        with torch.no_grad():
            for kernel, args in bound:
                kernel(*args)

    return bare if bound else None


def _micros(fns: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The best of some rounds of many calls each: a call is near the clock's resolution, and what a
    busy machine adds is no cost of the call."""

    def many(fn: Callable[[], object]) -> Callable[[], object]:
        def loop() -> None:
            for _ in range(_CALLS):
                fn()

        return loop

    times = timing.interleaved({name: many(fn) for name, fn in fns.items()}, rounds=_ROUNDS)
    return {name: min(value.seconds) / _CALLS * 1e6 for name, value in times.items()}


def overhead(op: str) -> list[Row]:
    """Microseconds of one call of `op` above its calls of `_C`, on one thread, tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _overhead(op)
    finally:
        torch.set_num_threads(threads)


def _overhead(op: str) -> list[Row]:
    inputs, keywords = peers.module(op).overhead(op)
    function = functools.partial(getattr(vlm_kernels, op), **keywords)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    grad = torch.ones_like(out)
    calls: dict[str, Callable[[], object]] = {
        "call, no gradients": lambda: function(*inputs),
        "call, gradients": lambda: function(*leaves),
    }
    rows = []
    for name, fn in calls.items():
        bare = _bare(fn)
        if bare is None:
            why = "the extension's kernels do not run here"
            rows.append(_row(name, None, "us", "", op=op, status="skipped", reason=why))
            continue
        micros = _micros({"ours": fn, "bare": bare})
        note = f"{micros['ours']:.1f} us, of which the bare kernel {micros['bare']:.1f}"
        rows.append(_row(name, micros["ours"] - micros["bare"], "us", note, op=op, threads=1))

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    fns: dict[str, Callable[[], object]] = {"ours": both}
    bare = _bare(both)
    if bare is not None:
        fns["bare"] = bare
    micros = _micros(fns)
    note = "in all: autograd's engine, what is around the kernels, and these"
    if bare is not None:
        note += f", {micros['bare']:.1f} us bare"
    return [*rows, _row("call and backward", micros["ours"], "us", note, op=op, threads=1)]


def build_wheel() -> list[Row]:
    """Builds a wheel from a clean copy of the tree: its time, and its size in MB (10^6 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        source, wheels = Path(folder, "source"), Path(folder, "wheels")
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, source, ignore=ignored)
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
        # a compiler cache would make this build anything but cold
        env = {**os.environ, "CCACHE_DISABLE": "1"}
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--wheel-dir", str(wheels), str(source)],
            capture_output=True,
            text=True,
            env=env,
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines() or [""]
            failed = {"status": "error", "reason": lines[-1][:300]}
            return [_row("build", None, "s", "", **failed), _row("wheel", None, "MB", "", **failed)]
        wheel = next(wheels.glob("*.whl"))
        size = wheel.stat().st_size / 1e6
        return [
            _row("build", seconds, "s", f"cold wheel build, {os.cpu_count()} cores"),
            _row("wheel", size, "MB", wheel.name),
        ]


def measure_all(build: bool = False) -> list[Row]:
    """A row for each cost."""
    load = record.OtherLoad()
    rows = [_row("import", import_seconds(), "s", "above torch's own")]
    for op in peers.OPS:
        rows += overhead(op)
    rows += build_wheel() if build else []
    share = load.share()
    for row in rows:
        row.other_load = share
    return rows


def main(args: argparse.Namespace) -> int:
    """Measures, prints, writes; 1 if `--check` finds a miss."""
    rows = measure_all(args.build)
    if args.json:
        record.write(rows, args.json, args.append)
    return report.show([asdict(row) for row in rows], args.markdown, None, args.check)
