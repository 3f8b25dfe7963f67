"""What `--check` holds a run to. A ratio is the best peer's time over ours."""

from __future__ import annotations

import fnmatch
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
ATTENTION_GPU: dict[str, tuple[str, tuple[str, ...]]] = {
    "odd_dims": (
        "fwd",
        (
            "32x16x257x80",  # ViT-H/14
            "16x16x729x72",  # SigLIP so400m at 384 pixels
            "32x16x256x72",
            "32x16x257x88",  # EVA ViT-g
            "16x16x1024x80",  # Qwen2-VL
            "32x16x257x104",  # ViT-bigG
            "32x16x257x112",  # ViT-e
            "8x16x1601x88",  # Llama 3.2 Vision's tokens
        ),
    ),
    "d64_short": ("fwd", ("64x12x197x64", "64x16x257x64")),
    "bwd_short": ("bwd", ("64x16x257x64", "32x16x257x80", "64x12x197x64", "32x16x256x72")),
    "bwd_long": ("bwd", ("16x16x729x72", "16x16x1024x80", "16x16x577x80", "8x16x1024x88")),
    "rope_norm": (
        "fwd",
        ("rope_norm:32x16x256x72", "rope_norm:16x16x576x64", "rope_norm:16x16x576x80"),
    ),
    "windows": ("fwd", ("windows:16x16384x80", "windows:16x4096x80")),
    "images": ("fwd", ("images:16x72", "images:16x80", "images:12x64")),
    "masks_gpu": (
        "fwd",
        (
            "prefix_lm:8x16x1024x64",
            "per_image:8x8x1024x128",
            "image_blocks:8x16x1024x64",
            "prefix_lm:8x8x1024x128",
            "per_image:8x16x1024x64",
            "image_blocks:8x8x1024x128",
        ),
    ),
    "few_queries": ("fwd", ("64x12x32x257x64", "64x8x64x577x96")),
    "long": ("fwd", ("32x16x577x64", "8x25x1025x128", "8x16x1025x64", "2x16x4096x128")),
    "latency": ("fwd", ("1x16x257x80", "1x16x577x64", "1x12x197x64", "1x16x729x72")),
    # queries of Llama 3 and of Qwen2.5-7B; B, H, key heads, keys, D
    "decode": (
        "fwd",
        ("decode:16x32x8x8192x128", "decode:64x28x4x2048x128", "decode:1x32x8x32768x128"),
    ),
}
"""Group -> what is timed, and shapes: a line of the H200's targets each, the most telling first."""
QUICK_GPU = 2
"""Shapes of each of them that `--quick` takes."""
ATTENTION_MEMORY = ("2x16x1024x64", "images:16x72", "prefix_lm:2x16x1024x64")
"""What `--memory` measures; there is no target."""
_STEMS = ("16x224x224x16x768", "8x336x336x14x1024", "16x224x224x14x1152", "1x1080x1920x30x4096")
"""ViT-B/16, CLIP ViT-L/14 at 336 pixels, SigLIP so400m, and a full screen of Fuyu."""
PATCH_EMBED = {
    "uint8": ("fwd", _STEMS),
    "float": ("full", tuple(f"float:{shape}" for shape in _STEMS)),
}
"""Group -> what is timed, and shapes, as `--shapes` takes them."""
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
    """Ratios to the best peer; on a CPU with two threads.

    Attributes:
        geomean, floor: over the shapes, and of the worst; 0 is none.
        share: of the measured limit; only reported, unless `strict`.
        against: the best of these peers alone: patterns as of file names.
        of: "ms", or "eager_ms": an eager call and the wait for it.
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
    device: str = "cpu"
    of: str = "ms"
    strict: bool = False


@dataclass(frozen=True)
class Time:
    """Milliseconds on a GPU."""

    op: str
    shape: str
    limit: float
    dtype: str = "bf16"
    mode: str = "full"


@dataclass(frozen=True)
class Memory:
    """On a CPU: MiB above inputs and gradients at `MEMORY_SHAPE` with workspace_mb=`MEMORY_MB`."""

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
    ("dense", "fwd", "bf16", 3.0, 0.0, None, "sdpa*"),
    ("dense", "full", "fp32", 1.6, 1.4, 0.85, ""),
    ("dense", "full", "bf16", 1.75, 1.25, 0.83, ""),
    ("dense", "full", "bf16", 3.0, 0.0, None, "sdpa*"),
    *(
        (group, mode, dtype, geomean, floor, None, against)
        for group, fp32, bf16, against in (
            # set against SDPA only; the rows show matmul, softmax, matmul as well
            ("packed", (1.5, 1.2), (2.5, 1.8), "sdpa*"),
            ("masks", (1.8, 1.3), (3.0, 2.0), ""),
        )
        for mode in ("fwd", "full")
        for dtype, (geomean, floor) in (("fp32", fp32), ("bf16", bf16))
    ),
)
_PATCH_EMBED: tuple[tuple[str, str, float, float, str], ...] = (
    # group, dtype, geomean, floor, peers
    ("uint8", "fp32", 1.45, 1.35, "stem_*"),
    ("uint8", "bf16", 1.55, 1.4, "stem_*"),
    # at most 1.05 and 1.1 times as long as the products of ready patches alone
    ("uint8", "fp32", 1 / 1.05, 0.0, "bare_linear"),
    ("uint8", "bf16", 1 / 1.1, 0.0, "bare_linear"),
    ("float", "fp32", 1.2, 1.05, "stem_conv*"),
    ("float", "bf16", 1.4, 1.1, "stem_conv*"),
)
_GPU: tuple[tuple[str, float, float, str], ...] = (
    # group, geomean, floor, peers
    ("odd_dims", 1.4, 1.15, "sdpa*"),
    ("d64_short", 1.5, 1.2, "sdpa*"),
    ("long", 1.1, 0.95, "sdpa*"),
    ("bwd_short", 1.7, 1.3, "sdpa*"),
    ("bwd_long", 1.2, 1.0, "sdpa*"),
    ("images", 1.7, 0.0, "varlen_attn"),
    ("images", 4.0, 0.0, "sdpa_per_image"),
    ("windows", 3.5, 0.0, "varlen_attn"),
    ("few_queries", 1.6, 0.0, "sdpa*"),
    ("masks_gpu", 3.0, 0.0, "sdpa*"),
    ("masks_gpu", 1.5, 0.0, "flex"),
    ("rope_norm", 2.0, 0.0, "ops_sdpa*"),
    ("latency", 2.5, 0.0, "sdpa*"),
)
_GPU_LOSSES = tuple(f"{n}x768" for n in (4096, 8192, 16384, 32768))
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
    *(
        Speed(
            *("patch_embed", dtype, geomean, floor),
            shapes=PATCH_EMBED[group][1],
            mode=PATCH_EMBED[group][0],
            group=group,
            against=peer,
        )
        for group, dtype, geomean, floor, peer in _PATCH_EMBED
    ),
    *(
        Speed(
            "attention",
            "bf16",
            geomean,
            floor,
            shapes=ATTENTION_GPU[group][1],
            mode=ATTENTION_GPU[group][0],
            group=group,
            against=peers,
            device="cuda",
            of="eager_ms" if group == "latency" else "ms",
        )
        for group, geomean, floor, peers in _GPU
    ),
    Speed(
        "attention",
        "bf16",
        0.0,
        0.0,
        0.75,
        shapes=ATTENTION_GPU["decode"][1],
        mode="fwd",
        group="decode",
        device="cuda",
        strict=True,
    ),
    *(
        Speed(op, "bf16", ratio, ratio, shapes=_GPU_LOSSES, against=peers, device="cuda")
        for op in ("clip_loss", "siglip_loss")
        for ratio, peers in ((2.0, "open_clip"), (1.3, "*_compile"))
    ),
    *(
        Speed(op, "bf16", ratio, ratio, shapes=("65536x768",), against=peer, device="cuda")
        for op, ratio, peer in (("clip_loss", 3.0, "inf_cl"), ("siglip_loss", 1.5, "siglip_kernel"))
    ),
)
TIME = (Time("clip_loss", "65536x768", 42), Time("siglip_loss", "65536x768", 32))
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
    """Every target of the devices of a run against its rows, and whether the machine was quiet
    enough to tell.

    A row of ours that failed, that had no peer to compare with, or that a fallback ran is a miss of
    its target; `got` says how many shapes were not run.
    """
    rows = [row for row in rows if row["ours"]]
    timed = [row for row in rows if row["kind"] == "time"]
    devices = {row["device"] for row in timed} or {"cpu"}
    verdicts = [_speed(target, timed) for target in SPEED if target.device in devices]
    if "cuda" in devices:
        verdicts += [_time(target, timed) for target in TIME]
    verdicts.append(_quiet(timed))
    if "cpu" in devices:
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
    if target.device != "cpu":
        what += f" on {target.device}"
    want = _wanted(target)
    found: dict[tuple[str, str], Row] = {}  # the last row of a shape and a backend
    for row in rows:
        point = (row["op"], row["mode"], row["dtype"], row["workspace_mb"], row["device"])
        wanted = (target.op, target.mode, target.dtype, target.workspace_mb, target.device)
        if point == wanted and row["shape"] in target.shapes:
            found[row["shape"], row["backend"] or ""] = row
    if not found:
        return Verdict(what, want, "", None)
    bad = [_reason(row) for row in found.values() if _reason(row)]
    if bad:
        return Verdict(what, want, f"{len(bad)} of {len(found)} rows do not count: {bad[0]}", False)
    ratios = {key: _ratio(row, target) for key, row in found.items()}
    if not all(ratios.values()):
        return Verdict(what, want, "", None)
    best: dict[str, tuple[str, str]] = {}  # the backend that is fastest at a shape
    for key in ratios:
        if key[0] not in best or ratios[key] > ratios[best[key[0]]]:
            best[key[0]] = key
    geomean = math.exp(sum(math.log(ratios[key]) for key in best.values()) / len(best))
    worst = min(best.values(), key=lambda key: ratios[key])
    got = f"{geomean:.2f}x, worst {ratios[worst]:.2f}x at {worst[0]}"
    if target.device != "cpu":
        got += f" ({', '.join(sorted({backend for _, backend in best.values()}))})"
    shares = [found[key]["roofline_pct"] for key in best.values()]
    shares = [share for share in shares if share is not None]
    if shares and target.share is not None:
        got += f"; share {min(shares):.0f}-{max(shares):.0f} % (target {target.share:.0%})"
    if len(best) < len(target.shapes):
        got += f"; only {len(best)} of {len(target.shapes)} shapes run"
    ok = geomean >= target.geomean and ratios[worst] >= target.floor
    if target.strict and target.share is not None:
        ok = ok and len(shares) == len(best) and min(shares) >= 100 * target.share
    return Verdict(what, want, got, ok)


def _wanted(target: Speed) -> str:
    parts = [f"geomean {target.geomean:.3g}x"] if target.geomean else []
    parts += [f"floor {target.floor:g}x"] if target.floor else []
    parts += [f"share {target.share:.0%}"] if target.strict and target.share else []
    return ", ".join(parts)


def _ratio(row: Row, target: Speed) -> float:
    """To the best of the target's peers; 0 where none of them ran."""
    if not target.against:
        return float(row["speedup"])
    named = row["ratios" if target.of == "ms" else "eager_ratios"] or {}
    chosen = (ratio for name, ratio in named.items() if fnmatch.fnmatch(name, target.against))
    return min(chosen, default=0.0)


def _time(target: Time, rows: list[Row]) -> Verdict:
    what = f"{target.op} {target.mode} {target.dtype} {target.shape} on cuda"
    want = f"<= {target.limit:g} ms"
    key = (target.op, target.mode, target.dtype, target.shape, "cuda", None)
    names = ("op", "mode", "dtype", "shape", "device", "workspace_mb")
    found = [row for row in rows if tuple(row[name] for name in names) == key]
    if not found:
        return Verdict(what, want, "", None)
    counted = [row for row in found if not _reason(row)]
    if not counted:
        return Verdict(what, want, _reason(found[0]), False)
    row = min(counted, key=lambda row: row["ms"])
    return Verdict(what, want, f"{row['ms']:.1f} ms ({row['backend']})", row["ms"] <= target.limit)


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
    key = (target.op, target.dtype, *MEMORY_SHAPE, MEMORY_MB, "cpu")
    names = ("op", "dtype", "n", "d", "workspace_mb", "device")
    found = [row for row in rows if tuple(row[name] for name in names) == key]
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
