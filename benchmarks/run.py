"""`python -m benchmarks run`: our ops and their peers, side by side in one process."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from types import ModuleType

import torch

from . import cost, measure, peers, record, report, roofline
from .case import Case, Provider
from .measure import Settings
from .record import Row

_OPS: dict[str, tuple[str, ...]] = {
    "all": peers.OPS,
    **{name: module.OPS for name, module in peers.MODULES.items()},
    **{op: (op,) for op in peers.OPS},
}
_GROUPS = tuple(group for module in peers.MODULES.values() for group in module.GROUPS if group)
_MODES = ("fwd", "bwd", "full")


def _list(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        items = text.split(",")
        unknown = [item for item in items if item not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
        return items

    return parse


def _shapes(text: str) -> list[str]:
    """Sizes above 0, at least two, and perhaps a name before them; what they mean says the op."""
    for item in text.split(","):
        if not re.fullmatch(r"([a-z_]+:)?[1-9][0-9]*(x[1-9][0-9]*)+", item):
            known = "; ".join(f"{name}: {m.SHAPES}" for name, m in peers.MODULES.items())
            raise argparse.ArgumentTypeError(f"{item!r} is no shape; {known}")
    return text.split(",")


def _peer_names(text: str) -> str:
    try:
        peers.choose(peers.OPS[0], text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add = parser.add_argument
    add("--op", choices=sorted(_OPS), default="contrastive", help="contrastive: both losses")
    add(
        "--group",
        type=_list(_GROUPS),
        help="of attention or patch_embed: sets of shapes (default: all)",
    )
    add("--mode", type=_list(_MODES), help="fwd,bwd,full (default: full; of a GPU's set its own)")
    dtypes = "fp32,bf16,fp16 (default: fp32,bf16; of attention on a GPU bf16)"
    add("--dtype", type=_list(roofline.DTYPES), help=dtypes)
    add("--peers", type=_peer_names, default="all", help="all, none, names with commas, or -names")
    add("--shapes", type=_shapes, help="with commas (default: those of the targets)")
    add("--workspace-mb", type=_positive, help="of ours (default: its own, and a tight one)")
    add("--backend", default="auto", help="of ours, or several with commas; see `explain`")
    add("--threads", type=_positive, default=2)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: graphs, from a cold L2")
    add("--repeats", type=_positive, help="rounds at least (default: 5, quick 3)")
    add("--min-time", type=float, help="seconds of rounds a case at least (default: 2, quick 0.5)")
    quick = "the first shape of each group only (two of a GPU's), few repeats"
    add("--quick", action="store_true", help=quick)
    add("--time-limit", type=float, help="seconds after which no other shape is begun")
    add("--memory", action="store_true", help="peak memory of ours and of the peers that fit")
    add("--memory-shape", type=_shapes, help="of the memory pass (default: that of the targets)")
    add("--check", action="store_true", help="hold the run to the targets; exit status 1 if missed")
    add("--json", metavar="FILE", help="write a JSON line a row, over what the file holds")
    add("--append", action="store_true", help="append to --json instead")
    plot = "write a picture of the speeds (default: dist/benchmarks.png)"
    add("--plot", metavar="FILE", nargs="?", const="dist/benchmarks.png", help=plot)
    add("--markdown", action="store_true", help="print tables in Markdown")


def _modules(args: argparse.Namespace) -> list[tuple[ModuleType, list[str]]]:
    """The modules of the ops that are asked for, and which of their ops."""
    wanted = {id(peers.module(op)): peers.module(op) for op in _OPS[args.op]}
    return [(m, [op for op in m.OPS if op in _OPS[args.op]]) for m in wanted.values()]


def cases(args: argparse.Namespace) -> list[tuple[Case, list[int | None]]]:
    """What to time, and with which workspaces of ours (None: its default)."""
    args = _with_dtypes(args)
    for module, ops in _modules(args):
        unknown = set(args.mode or ()) - set(module.MODES)
        if unknown:
            raise ValueError(f"{ops[0]} has no mode {unknown.pop()}, only {','.join(module.MODES)}")
    return [case for module, ops in _modules(args) for case in module.cases(args, ops)]


def _memory_cases(args: argparse.Namespace) -> list[tuple[Case, int | None]]:
    args = _with_dtypes(args)
    return [case for module, ops in _modules(args) for case in module.memory_cases(args, ops)]


def _with_dtypes(args: argparse.Namespace) -> argparse.Namespace:
    if args.dtype is not None:
        return args
    chosen = ["bf16"] if args.device == "cuda" and args.op == "attention" else ["fp32", "bf16"]
    return argparse.Namespace(**{**vars(args), "dtype": chosen})


def _providers(
    op: str, workspaces: Sequence[int | None], args: argparse.Namespace
) -> list[Provider]:
    backends = args.backend.split(",")
    mine = [peers.ours(op, workspace, b) for b in backends for workspace in workspaces]
    if len(backends) > 1:
        pairs = [b for b in backends for _ in workspaces]
        mine = [replace(ours, backend=b) for ours, b in zip(mine, pairs, strict=True)]
    return mine + peers.choose(op, args.peers)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _repro(row: Row, case: Case, args: argparse.Namespace) -> str:
    parts = [f"python -m benchmarks run --op {row.op} --mode {row.mode} --dtype {row.dtype}"]
    parts.append(f"--peers={args.peers} --threads {args.threads}")
    if args.device != "cpu":
        parts.append(f"--device {args.device}")
    if args.backend != "auto":
        parts.append(f"--backend {args.backend}")
    if row.workspace_mb is not None:
        parts.append(f"--workspace-mb {row.workspace_mb}")
    if row.kind == "memory":
        small = case.small()[0].option
        return " ".join([*parts, f"--shapes {small} --memory --memory-shape {case.option}"])
    return " ".join([*parts, f"--shapes {case.option}"])


def _repeatable(rows: list[Row], case: Case, args: argparse.Namespace) -> list[Row]:
    for row in rows:
        row.repro = _repro(row, case, args)
    return rows


def finish(rows: Sequence[Row], limits: roofline.Roofline) -> None:
    """Fills in what needs all rows of a case, and the limits of the whole run."""
    for row in rows:
        if row.kind != "time" or row.ms is None:
            continue
        assert row.flops is not None
        assert row.bytes is not None
        assert row.op is not None
        assert row.dtype is not None
        seconds = row.ms / 1e3
        row.tflops, row.gbps = row.flops / seconds / 1e12, row.bytes / seconds / 1e9
        row.peak_tflops, row.peak_gbps = limits.flops[row.dtype] / 1e12, limits.bytes / 1e9
        row.roofline_pct = 100 * limits.seconds(row.dtype, row.flops, row.bytes) / seconds
        row.suspicious = row.roofline_pct > 100
        rivals = [r for r in rows if not r.ours and r.ms is not None and _same_case(r, row)]
        if rivals:
            row.ratios = {r.provider: r.ms / row.ms for r in rivals if r.ms is not None}
            whole = row.ratios.keys() - peers.floors(row.op)
            if whole:
                row.best_peer = min(whole, key=row.ratios.__getitem__)
                row.speedup = row.ratios[row.best_peer]
        if row.eager_ms is not None:
            eager = {r.provider: r.eager_ms for r in rivals}
            row.eager_ratios = {k: v / row.eager_ms for k, v in eager.items() if v is not None}


def _same_case(a: Row, b: Row) -> bool:
    keys = ("kind", "op", "mode", "dtype", "group", "shape", "n", "m", "d")
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def measure_all(
    args: argparse.Namespace, save: Callable[[Sequence[Row]], None] = lambda rows: None
) -> list[Row]:
    """All rows of a run, finished. `save` is given what there is after each case: a run that is
    stopped leaves the rows it has."""
    begun = time.monotonic()
    args = _with_dtypes(args)
    torch.set_num_threads(args.threads)
    settings = Settings(
        threads=args.threads,
        device=args.device,
        backend=args.backend,
        repeats=args.repeats or (3 if args.quick else 5),
        min_time=args.min_time if args.min_time is not None else (0.5 if args.quick else 2.0),
    )
    budget = 1.0 if args.quick else 4.0
    _say("measuring the roofline")
    limits = roofline.measure(args.dtype, budget, args.device)
    rows: list[Row] = []
    # Provider objects are made once: errors against fp64 are remembered by them.
    known: dict[tuple[str, tuple[int | None, ...]], list[Provider]] = {}
    chosen = cases(args)
    for done, (case, workspaces) in enumerate(chosen):
        if args.time_limit is not None and time.monotonic() - begun > args.time_limit:
            left = ", ".join(str(case) for case, _ in chosen[done:])
            _say(f"no time left for {left}")
            break
        _say(f"timing {case}")
        key = case.op, tuple(workspaces)
        if key not in known:
            known[key] = _providers(case.op, workspaces, args)
        providers = [provider for provider in known[key] if case.takes(provider, args.device)]
        found = _repeatable(measure.time_case(case, providers, settings), case, args)
        finish(found, limits)
        rows += found
        save(rows)
    # Again, since the machine may have been busy the first time.
    limits = limits.best(roofline.measure(args.dtype, budget, args.device))
    finish(rows, limits)
    if args.memory or (args.check and not args.quick):
        for case, workspace in _memory_cases(args):
            mine = [(b, peers.ours(case.op, workspace, b)) for b in args.backend.split(",")]
            rivals = peers.choose(case.op, args.peers if args.memory else "none")
            for backend, provider in [*mine, *((args.backend, peer) for peer in rivals)]:
                if case.takes(provider, args.device):
                    _say(f"memory of {case}: {provider.key}")
                    own = replace(settings, backend=backend)
                    row = measure.memory_case(case, provider, own)
                    rows += _repeatable([row], case, args)
    if args.check and not args.quick:
        _say("the cost of having it")
        rows += cost.measure_all()
    return rows


def main(args: argparse.Namespace) -> int:
    """Runs, prints, writes; under --check, 1 if a target was missed or no target was run."""
    try:
        cases(args)
        _memory_cases(args)
    except ValueError as error:
        named = "--shapes, --memory-shape, --group or --mode"
        print(f"run: argument {named}: {error}", file=sys.stderr)
        return 2
    if not args.json:
        rows = measure_all(args)
    else:
        file = record.File(args.json, args.append)
        rows = measure_all(args, file.write)
        file.write(rows)
    return report.show([asdict(row) for row in rows], args.markdown, args.plot, args.check)
