"""What `--check` holds a run to. A ratio is the best peer's time over ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

ATTENTION = {
    "dense": (
        "8x12x197x64",
        "4x16x257x80",
        "4x16x257x88",
        "4x12x577x64",
        "4x16x729x72",
        "2x16x1024x64",
        "2x16x1024x80",
    ),
    # the queries of a Q-Former and of a Perceiver, Qwen2.5-VL's windows, packed images
    "packed": (
        "8x12x32x257x64",
        "8x8x64x577x96",
        "windows:16x4096x80",
        "images:12x64",
        "images:16x72",
        "images:16x80",
    ),
    "masks": tuple(
        f"{mask}:{sizes}"
        for mask in ("prefix_lm", "image_blocks", "per_image")
        for sizes in ("2x16x1024x64", "2x8x1024x128")
    ),
}
"""Group -> shapes, as `--shapes` takes them."""
ATTENTION_MEMORY = ("2x16x1024x64", "images:16x72", "prefix_lm:2x16x1024x64")
"""What `--memory` measures; there is no target."""
SHAPES = tuple((n, d) for n in (2048, 4096, 8192) for d in (512, 768))
TIGHT = ((8192, 512),)
"""Shapes that are also run with a workspace too small to keep the similarity."""
TIGHT_MB = 16
MEMORY_SHAPE = (32768, 512)
MEMORY_MB = 32
OTHER_LOAD = 0.25
"""More of the machine than this taken by others, and ratios of two-thread loops mean little."""


@dataclass(frozen=True)
class Speed:
    """Two threads; `share` of the measured limit is only reported.

    The ratio is to the best peer, or to the best of those whose name begins with `against`; a floor
    of 0 is none.
    """

    op: str
    dtype: str
    geomean: float
    floor: float
    share: float | None = None
    workspace_mb: int | None = None
    shapes: tuple[str, ...] = tuple(f"{n}x{d}" for n, d in SHAPES)
    mode: str = "full"
    group: str = ""
    against: str = ""


@dataclass(frozen=True)
class Memory:
    """MiB above inputs and gradients at `MEMORY_SHAPE` with workspace_mb=`MEMORY_MB`."""

    op: str
    dtype: str
    limit: float


@dataclass(frozen=True)
class Cost:
    name: str
    limit: float
    unit: str
    why: str = ""


_ATTENTION: tuple[tuple[str, str, str, float, float, float | None, str], ...] = (
    ("dense", "fwd", "fp32", 1.6, 1.35, 0.85, ""),
    ("dense", "fwd", "bf16", 2.2, 1.6, 0.82, ""),
    ("dense", "fwd", "bf16", 3.0, 0.0, None, "sdpa"),
    ("dense", "full", "fp32", 1.6, 1.4, 0.85, ""),
    ("dense", "full", "bf16", 1.75, 1.25, 0.83, ""),
    ("dense", "full", "bf16", 3.0, 0.0, None, "sdpa"),
    *(
        (group, mode, dtype, geomean, floor, None, against)
        for group, fp32, bf16, against in (
            # set against SDPA only; the rows show matmul, softmax, matmul as well
            ("packed", (1.5, 1.2), (2.5, 1.8), "sdpa"),
            ("masks", (1.8, 1.3), (3.0, 2.0), ""),
        )
        for mode in ("fwd", "full")
        for dtype, (geomean, floor) in (("fp32", fp32), ("bf16", bf16))
    ),
)
SPEED = (
    Speed("clip_loss", "fp32", 1.4, 1.25, 0.90),
    Speed("clip_loss", "bf16", 1.35, 1.2, 0.88),
    Speed("clip_loss", "fp32", 1.05, 1.05, None, TIGHT_MB, ("8192x512",)),
    Speed("clip_loss", "bf16", 1.05, 1.05, None, TIGHT_MB, ("8192x512",)),
    Speed("siglip_loss", "fp32", 1.5, 1.3, 0.92),
    Speed("siglip_loss", "bf16", 1.5, 1.3, 0.90),
    *(
        Speed("attention", dtype, geomean, floor, share, None, ATTENTION[group], mode, group, peer)
        for group, mode, dtype, geomean, floor, share, peer in _ATTENTION
    ),
)
MEMORY = tuple(
    Memory(op, dtype, limit)
    for op in ("clip_loss", "siglip_loss")
    for dtype, limit in (("fp32", 40), ("bf16", 105))
)
COST = (
    Cost("import", 0.1, "s", "above torch's own"),
    Cost("call, no gradients", 4, "us", "above the bare kernel, 1 thread"),
    Cost("call, gradients", 9, "us", "above the bare kernel, 1 thread"),
    Cost("build", 180, "s", "cold, with CUDA, 2 cores"),
    Cost("wheel", 20, "MB"),
)


@dataclass(frozen=True)
class Verdict:
    """One target against a run; `ok` is None where the run has nothing to say about it."""

    what: str
    want: str
    got: str
    ok: bool | None

    def __str__(self) -> str:
        state = {True: "ok", False: "MISS", None: "not run"}[self.ok]
        got = "" if self.ok is None else f"got {self.got}"
        return f"{state:8} {self.what:62} want {self.want:27} {got}".rstrip()


def check(rows: Iterable[Row]) -> list[Verdict]:
    """Every target against the rows of a run, and whether the machine was quiet enough to tell.

    A row of ours that failed, that had no peer to compare with, or that a fallback ran is a miss of
    its target; `got` says how many shapes were not run.
    """
    rows = [row for row in rows if row["ours"]]
    verdicts = [_speed(t, [r for r in rows if r["kind"] == "time"]) for t in SPEED]
    verdicts.append(_quiet([r for r in rows if r["kind"] == "time"]))
    verdicts += [_memory(t, [r for r in rows if r["kind"] == "memory"]) for t in MEMORY]
    return verdicts + [_cost(t, [r for r in rows if r["kind"] == "cost"]) for t in COST]


def _quiet(rows: list[Row]) -> Verdict:
    what, want = "a quiet machine (median of the timed rows)", f"others take <= {OTHER_LOAD:.0%}"
    loads = [row["other_load"] for row in rows if row["other_load"] is not None]
    if not loads:
        return Verdict(what, want, "", None)
    load = statistics.median(loads)
    return Verdict(what, want, f"{load:.0%}", load <= OTHER_LOAD)


def _speed(target: Speed, rows: list[Row]) -> Verdict:
    what = " ".join(filter(None, (target.op, target.group, target.mode, target.dtype)))
    if target.workspace_mb is not None:
        what += f" workspace_mb={target.workspace_mb}"
    if target.against:
        what += f" against {target.against}"
    want = f"geomean {target.geomean:g}x" + (f", floor {target.floor:g}x" if target.floor else "")
    found: dict[str, Row] = {}
    for row in rows:
        key = (row["op"], row["mode"], row["dtype"], row["workspace_mb"])
        wanted = (target.op, target.mode, target.dtype, target.workspace_mb)
        if key == wanted and row["shape"] in target.shapes:
            found[row["shape"]] = row
    if not found:
        return Verdict(what, want, "", None)
    bad = [_reason(row) for row in found.values() if _reason(row)]
    if bad:
        return Verdict(what, want, f"{len(bad)} of {len(found)} rows do not count: {bad[0]}", False)
    ratios = {shape: _ratio(row, target.against) for shape, row in found.items()}
    if not all(ratios.values()):
        return Verdict(what, want, "", None)
    geomean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    worst = min(ratios, key=lambda shape: ratios[shape])
    got = f"{geomean:.2f}x, worst {ratios[worst]:.2f}x at {worst}"
    shares = [row["roofline_pct"] for row in found.values() if row["roofline_pct"] is not None]
    if shares and target.share is not None:
        got += f"; share {min(shares):.0f}-{max(shares):.0f} % (target {target.share:.0%})"
    if len(found) < len(target.shapes):
        got += f"; only {len(found)} of {len(target.shapes)} shapes run"
    return Verdict(what, want, got, geomean >= target.geomean and ratios[worst] >= target.floor)


def _ratio(row: Row, against: str) -> float:
    """To the best peer whose name begins so; 0 where none of them ran."""
    if not against:
        return float(row["speedup"])
    named = (row["ratios"] or {}).items()
    return min((ratio for name, ratio in named if name.startswith(against)), default=0.0)


def _reason(row: Row) -> str:
    """Why a row of ours proves nothing, or an empty string."""
    if row["status"] != "ok":
        return row["reason"] or row["status"]
    if not row["counts"]:
        return f"backend {row['backend']} ran it"
    if row["kind"] == "time" and row["speedup"] is None:
        return "no peer ran"
    return ""


def _memory(target: Memory, rows: list[Row]) -> Verdict:
    what = f"{target.op} full {target.dtype} memory, N={MEMORY_SHAPE[0]}"
    want = f"<= {target.limit:g} MiB"
    key = (target.op, target.dtype, *MEMORY_SHAPE, MEMORY_MB)
    found = [r for r in rows if (r["op"], r["dtype"], r["n"], r["d"], r["workspace_mb"]) == key]
    if not found:
        return Verdict(what, want, "", None)
    row = found[-1]
    if _reason(row):
        return Verdict(what, want, _reason(row), False)
    return Verdict(what, want, f"{row['peak_mib']:.1f} MiB", row["peak_mib"] <= target.limit)


def _cost(target: Cost, rows: list[Row]) -> Verdict:
    what = f"{target.name} ({target.why})" if target.why else target.name
    want = f"<= {target.limit:g} {target.unit}"
    found = [row for row in rows if row["name"] == target.name]
    if not found:
        return Verdict(what, want, "", None)
    # One cost may be measured for several ops: the worst counts.
    failed = [row for row in found if _reason(row)]
    if failed:
        return Verdict(what, want, _reason(failed[0]), False)
    row = max(found, key=lambda r: r["value"])
    got = f"{row['value']:.3g} {target.unit}" + (f" ({row['op']})" if row["op"] else "")
    return Verdict(what, want, got, row["value"] <= target.limit)
