"""Tables and a picture of a run, from its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import peers, targets

Row = Mapping[str, Any]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if math.isnan(value):
        return "nan"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    # significant digits, but integers whole: 1414, 52.3, 0.48
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:.{decimals}f}"


def _case(row: Row) -> str:
    return " ".join(filter(None, (*_panel(row), row["shape"])))


def _provider(row: Row) -> str:
    tight = row["workspace_mb"] is not None
    return row["provider"] + (f" ({row['workspace_mb']} MB)" if tight else "")


def _errors(row: Row) -> str:
    """Error of the result / the largest one of the gradients, and the N of it if not the row's."""
    if not row["err"]:
        return "-"
    result, *grads = row["err"].values()
    text = f"{result:.0e}"
    if grads:
        worst = math.nan if any(map(math.isnan, grads)) else max(grads)
        text += f" / {worst:.0e}"
    return text if row["err_n"] == row["n"] else f"{text} at N={row['err_n']}"


def _marks(row: Row) -> str:
    marks = []
    if row["ours"] and not row["counts"] and row["status"] == "ok":
        marks.append("not our kernel")
    if row["ours"] and row["speedup"] is not None and row["speedup"] < 1:
        marks.append("LOSES")
    if row["suspicious"]:
        marks.append("SUSPICIOUS: above the measured limit")
    if row["status"] != "ok":
        marks.append(f"{row['status']}: {row['reason']}")
    return "; ".join(marks)


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("case", _case),
    ("provider", _provider),
    ("backend", lambda r: r["backend"] or "-"),
    ("ms", lambda r: _number(r["ms"])),
    ("p20-p80", lambda r: f"{_number(r['ms_p20'])}-{_number(r['ms_p80'])}" if r["ms"] else "-"),
    ("n", lambda r: str(r["samples"] or "-")),
    ("eager ms", lambda r: _number(r["eager_ms"])),
    ("GFLOP/s", lambda r: "-" if r["tflops"] is None else _number(r["tflops"] * 1e3)),
    ("GB/s", lambda r: _number(r["gbps"])),
    ("roofline", lambda r: "-" if r["roofline_pct"] is None else f"{r['roofline_pct']:.0f} %"),
    ("err / of grads", _errors),
    ("vs best peer", lambda r: "-" if r["speedup"] is None else f"{r['speedup']:.2f}x"),
    ("", _marks),
)
_MEMORY_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("case", _case),
    ("provider", _provider),
    ("backend", lambda r: r["backend"] or "-"),
    ("MiB above inputs and gradients", lambda r: _number(r["peak_mib"])),
    ("", _marks),
)
_COST_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cost", lambda r: r["name"]),
    ("op", lambda r: r["op"] or "-"),
    ("value", lambda r: f"{_number(r['value'])} {r['unit']}"),
    ("what", lambda r: r["note"]),
    ("", _marks),
)


def _grid(lines: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        text = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    return "\n".join([padded[0], "-" * min(sum(widths) + 2 * len(widths), 150), *padded[1:]])


def _section(
    rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]], markdown: bool
) -> str:
    lines: list[list[str]] = [[title for title, _ in columns]]
    previous = None
    for row in rows:
        line = [show(row) for _, show in columns]
        # a case is named once
        if not markdown and line[0] == previous:
            line[0] = ""
        else:
            previous = line[0]
        lines.append(line)
    empty = {i for i, cells in enumerate(zip(*lines[1:], strict=True)) if set(cells) <= {"", "-"}}
    # the marks, and what only a GPU has
    dropped = {i for i in empty if lines[0][i] in ("", "eager ms")}
    lines = [[cell for i, cell in enumerate(line) if i not in dropped] for line in lines]
    return _grid(lines, markdown)


def headlines(rows: Iterable[Row]) -> list[str]:
    """Per panel, workspace and backend of a GPU: the ratio to the best peer, how many rows lose."""
    groups: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        if row["kind"] == "time" and row["counts"] and row["speedup"] is not None:
            what = " ".join(filter(None, _panel(row)))
            if row["device"] != "cpu":
                what += f" by {row['backend']}"  # a GPU has several, timed in one run
            key = what, row["workspace_mb"]
            groups.setdefault(key, []).append(row["speedup"])
    lines = []
    for (what, workspace), ratios in groups.items():
        geomean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        tight = "" if workspace is None else f" workspace_mb={workspace}"
        lines.append(
            f"{what}{tight}: {geomean:.2f}x the best peer (geomean), worst "
            f"{min(ratios):.2f}x, {sum(r < 1 for r in ratios)} of {len(ratios)} rows lose"
        )
    return lines or ["no row of ours counts"]


def _about(rows: Sequence[Row]) -> list[str]:
    row = rows[0]
    machine = row["machine"]
    commit = (row["commit"] or "unknown")[:12] + (" + local changes" if row["dirty"] else "")
    gpus = machine.get("gpus") or []
    if row["device"] == "cuda" and gpus:
        machine = {**machine, "cpu": f"{gpus[0]} beside {machine['cpu']}"}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, kernels on {machine['cpu_isa']}, torch "
        f"{machine['torch']} ({machine['torch_capability']}), Python {machine['python']}; "
        f"commit {commit}; {row['time']}"
    ]
    peaks = {r["dtype"]: r["peak_tflops"] for r in rows if r["peak_tflops"] is not None}
    copy = next((r["peak_gbps"] for r in rows if r["peak_gbps"] is not None), None)
    if peaks:
        limits = ", ".join(f"{dtype} {peak * 1e3:.0f} GFLOP/s" for dtype, peak in peaks.items())
        lines.append(f"measured limits: {limits}, copy {copy:.1f} GB/s")
    loads = [r["other_load"] for r in rows if r["other_load"] is not None]
    if loads and max(loads) > 0.05:
        lines.append(
            f"WARNING: other processes took up to {max(loads):.0%} of this machine meanwhile"
        )
    return lines


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """All rows as text: times, memory, costs, the machine, and the headline ratios."""
    if not rows:
        return "no rows"
    parts = []
    for kind, columns in (("time", _COLUMNS), ("memory", _MEMORY_COLUMNS), ("cost", _COST_COLUMNS)):
        found = [row for row in rows if row["kind"] == kind]
        if found:
            parts.append(_section(found, columns, markdown))
    notes = _about(rows) + (headlines(rows) if any(r["kind"] == "time" for r in rows) else [])
    parts.append("\n".join(f"- {note}" for note in notes) if markdown else "\n".join(notes))
    return "\n\n".join(parts)


def readme(rows: Sequence[Row]) -> str:
    """What the README shows of a run: a line for each row of ours that counts, and the means."""
    lines: list[Sequence[str]] = [
        ("op", "mode", "dtype", "shape", "ours, ms", "best peer, ms", "ratio", "of the limit")
    ]
    for row in rows:
        if row["kind"] != "time" or not row["counts"] or row["speedup"] is None:
            continue
        tight = "" if row["workspace_mb"] is None else f", `workspace_mb={row['workspace_mb']}`"
        lines.append(
            (
                " ".join(filter(None, (row["op"], row["group"]))) + tight,
                {"fwd": "forward", "full": "forward + backward"}[row["mode"]],
                row["dtype"],
                row["shape"],
                _number(row["ms"]),
                f"{_number(row['ms'] * row['speedup'])} ({row['best_peer']})",
                f"{row['speedup']:.2f}x",
                f"{row['roofline_pct']:.0f} %",
            )
        )
    notes = "\n".join(f"- {note}" for note in (*_about(rows), *headlines(rows)))
    return f"{_grid(lines, True)}\n\n{notes}"


def plot(rows: Sequence[Row], path: str) -> None:
    """A picture: a panel an op, group, mode and dtype, with the providers' useful GFLOP/s.

    Bars start at 0, so their heights compare as speeds. Each carries its milliseconds, ours
    also the ratio to the best peer; a line shows the limit measured in the run.
    """
    # imported here: tables need no matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = [row for row in rows if row["kind"] == "time" and row["ms"] is not None]
    if not timed:
        raise ValueError("plot: no row was timed")
    panels = list(dict.fromkeys(map(_panel, timed)))
    kinds = list(dict.fromkeys(panel[:2] for panel in panels))
    panels.sort(key=lambda panel: kinds.index(panel[:2]))  # a group's modes and dtypes together
    names = list(dict.fromkeys(map(_provider, timed)))
    bars = max(sum(_panel(row) == panel for row in timed) for panel in panels)
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    width = max(5.0, 1.2 + 0.25 * bars)
    figure = Figure(figsize=(width * across, 3.6 * down + 1.2), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, [row for row in timed if _panel(row) == panel], names)
        axes.set_title(" ".join(filter(None, panel)))
    handles = [Patch(color=f"C{i % 10}") for i in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    note = "on each bar ms, on ours the ratio to the best peer (* not run by our kernel)"
    figure.suptitle(f"{_about(rows)[0].split(';')[0]}\n{note}", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    cases = list(dict.fromkeys(map(_case, rows)))
    most = max(Counter(map(_case, rows)).values())
    size = 0.88 / most
    for row in rows:
        name = _provider(row)
        beside = [_provider(r) for r in rows if _case(r) == _case(row)]
        x = cases.index(_case(row)) + (beside.index(name) - (len(beside) - 1) / 2) * size
        axes.bar(x, row["tflops"] * 1e3, size * 0.92, color=f"C{names.index(name) % 10}")
        text = f" {_number(row['ms'])}"
        if row["ours"] and row["speedup"] is not None:
            text += f", {row['speedup']:.2f}x" + ("" if row["counts"] else "*")
        style = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 7}
        style["bbox"] = {"color": "white", "pad": 0.3}
        axes.text(x, row["tflops"] * 1e3, text, weight="bold" if row["ours"] else None, **style)
    axes.axhline(rows[0]["peak_tflops"] * 1e3, color="0.4", linestyle="--", linewidth=1)
    # room for the text on the highest bar, and for the limit
    highest = max(row["tflops"] for row in rows)
    axes.set_ylim(0, 1e3 * max(1.5 * highest, 1.05 * rows[0]["peak_tflops"]))
    axes.set_xlim(-0.5, len(cases) - 0.5)
    labels = [case.split()[-1].replace(":", "\n") for case in cases]
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, labels)) > 10 else {}
    axes.set_xticks(range(len(cases)), labels, fontsize=8, **slanted)
    axes.set_xlabel(peers.module(rows[0]["op"]).AXES)
    axes.set_ylabel("useful GFLOP/s")


def _panel(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["group"], row["mode"], row["dtype"]


def show(rows: Sequence[Row], markdown: bool, picture: str | None, check: bool) -> int:
    """Prints the table, and under `check` every target; the exit status."""
    print(table(rows, markdown))
    if picture:
        plot(rows, picture)
    if not check:
        return 0
    verdicts = targets.check(rows)
    print("\n" + "\n".join(map(str, verdicts)))
    missed = [verdict for verdict in verdicts if verdict.ok is False]
    # a quiet machine alone is no target held
    held = [v for v in verdicts if v.ok and not v.what.startswith("a quiet machine")]
    print(f"\n{len(held)} targets hold, {len(missed)} missed, {len(verdicts)} in all")
    return 1 if missed or not held else 0
