"""One JSON line a measurement: the row, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlm_kernels.collect_env import collect_env

ROOT = Path(__file__).resolve().parents[1]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@cache
def this_machine() -> dict[str, Any]:
    """CPU, ISA of our kernels, versions: what makes two rows comparable."""
    env = collect_env()

    def get(section: str, key: str) -> Any:
        value = env.get(section)
        return value.get(key) if isinstance(value, dict) else None

    variables = env["environment"] if isinstance(env["environment"], dict) else {}
    return {
        "cpu": get("cpu", "model"),
        "cores": get("cpu", "usable_cores"),
        "cpu_flags": get("cpu", "flags"),
        "gpus": env["gpus"],
        "cpu_isa": get("vlm_kernels", "cpu_isa"),
        "vlm_kernels": get("vlm_kernels", "version"),
        "torch": torch.__version__,
        "torch_capability": get("torch", "cpu_capability"),
        "python": platform.python_version(),
        "os": platform.platform(),
        # what changes a speed; paths do not, and would only give this machine away
        "environment": {name: value for name, value in variables.items() if "/" not in value},
    }


@cache
def this_commit() -> tuple[str | None, bool | None]:
    """The commit, and whether the tree differs from it.

    A tree that travels without .git has them in a file COMMIT: the hash, and "dirty" where it is.
    """
    file = ROOT / "COMMIT"
    if file.is_file():
        text = file.read_text().split()
        return (text[0] if text else None), "dirty" in text[1:]
    head = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return head, None if status is None else bool(status)


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass
class Row:
    """A point of a run; what its `kind` does not have stays None.

    Attributes:
        kind: "time", "memory" or "cost".
        group: which of an op's sets of shapes this one is in; shape: its name there.
        b, h, n, m, d: batch, heads, queries or rows, keys or columns, features.
        mode: "fwd" (under no_grad), "bwd" (gradients of every input) or "full" (both).
        provider: "vlm_kernels" or a peer; `ours` says which, `backend` what ran ours.
        counts: ours, and run by a kernel of ours rather than by plain PyTorch.
        status: "ok", "error" or "skipped", with the `reason`.
        ms: median of `samples` calls; first_s: the first call, compilation included.
        eager_ms: on a GPU, where `ms` is a CUDA graph's: an eager call and the wait for it.
        tflops: `flops` over the time; only useful ones, whatever is recomputed.
        gbps: `bytes` over the time: each input read and each gradient written once.
        roofline_pct: the least time possible at the limits measured in this run, over the time.
        suspicious: faster than that limit; look for the mistake.
        err: relative L2 error of the result and of each gradient against fp64, at `err_n` rows.
        peak_mib: peak resident memory above inputs and gradients, in a fresh process.
        best_peer, speedup: the fastest peer of the row, and its time over this row's.
        ratios: the same for each peer; eager_ratios: that of `eager_ms`.
        name, value, unit: of a cost.
        other_load: share of the machine that other processes took meanwhile.
    """

    kind: str
    provider: str
    ours: bool
    op: str | None = None
    mode: str | None = None
    backend: str | None = None
    counts: bool = False
    note: str = ""
    dtype: str | None = None
    group: str = ""
    shape: str = ""
    b: int | None = None
    h: int | None = None
    n: int | None = None
    m: int | None = None
    d: int | None = None
    workspace_mb: int | None = None
    threads: int | None = None
    device: str = "cpu"
    status: str = "ok"
    reason: str = ""
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    first_s: float | None = None
    eager_ms: float | None = None
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_pct: float | None = None
    peak_tflops: float | None = None
    peak_gbps: float | None = None
    suspicious: bool = False
    err: dict[str, float] | None = None
    err_n: int | None = None
    peak_mib: float | None = None
    best_peer: str | None = None
    speedup: float | None = None
    ratios: dict[str, float] | None = None
    eager_ratios: dict[str, float] | None = None
    name: str | None = None
    value: float | None = None
    unit: str | None = None
    other_load: float | None = None
    machine: dict[str, Any] = field(default_factory=this_machine)
    commit: str | None = field(default_factory=lambda: this_commit()[0])
    dirty: bool | None = field(default_factory=lambda: this_commit()[1])
    time: str = field(default_factory=_now)
    repro: str = ""


def _square_shape(row: Mapping[str, Any]) -> str:
    """The shape of a row of a loss, in files that do not say it."""
    sizes = [row.get("n"), row.get("m"), row.get("d")]
    if None in sizes:
        return ""
    return "x".join(str(size) for size in (sizes[1:] if sizes[0] == sizes[1] else sizes))


FIELDS = tuple(f.name for f in fields(Row))
_LATER: dict[str, Any] = {
    "device": "cpu",
    "eager_ms": None,
    "group": "",
    "b": None,
    "h": None,
    "ratios": None,
    "eager_ratios": None,
}
"""Fields that files written before them lack, and what they mean there."""


class OtherLoad:
    """Share of the machine's CPU time that others took (processes, a hypervisor) since it was made.

    None where /proc/stat cannot be read. Children count as ours once they have been waited for.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self._start, now, strict=True))
        return max(busy - own, 0.0) / max(wall * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            line = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in line)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return busy, sum(u.ru_utime + u.ru_stime for u in usages), time.perf_counter()


class File:
    """JSON lines that are written again and again as rows come in.

    What the file held is kept if `append`, else gone at the first write.
    """

    def __init__(self, path: str, append: bool = False) -> None:
        self._path = Path(path)
        self._kept = self._path.read_text() if append and self._path.exists() else ""

    def write(self, rows: Iterable[Row]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all: whoever stops a run stops it anywhere
        partial = self._path.with_suffix(".partial")
        partial.write_text(self._kept + "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        partial.replace(self._path)


def write(rows: Iterable[Row], path: str, append: bool = False) -> None:
    """Writes rows as JSON lines, over what the file held unless `append`."""
    File(path, append).write(rows)


def read(path: str) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines. ValueError names a line that is not a row."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        row = {**_LATER, **row}
        row.setdefault("shape", _square_shape(row))
        missing = set(FIELDS) - set(row)
        if missing:
            raise ValueError(f"{path}, line {number}: missing {', '.join(sorted(missing))}")
        rows.append(row)
    return rows
