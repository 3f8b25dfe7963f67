"""What a compiler says of a kernel, and the limits that its source sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        registers: a thread; shared: bytes a block, static ones under nvcc.
        spills: bytes stored and loaded (nvcc), or instructions that do it (Triton).
        mma: tensor-core instructions, HMMA and HGMMA; None where nobody looked.
    """

    kernel: str
    variant: str
    arch: str
    registers: int
    shared: int
    spills: int
    mma: int | None


# `// limits: registers 128, spills 0` (or `#`), then the kernel, behind at most three lines of
# template, attributes and decorators.
_LIMITS = re.compile(
    r"(?://|#) limits: ([^\n]*)\n(?:[^\n]*\n){0,3}?"
    r"[^\n]*(?:\bdef|\bvoid)\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
)
_KNOWN = {"registers", "shared", "spills"}
_DEFAULT = {"registers": 255, "spills": 0}


def limits_in(source: Path) -> dict[str, dict[str, int]]:
    """kernel -> {"registers": 128, "spills": 0, ...} of each kernel with a line of limits."""
    found = {}
    text = source.read_text()
    matches = _LIMITS.findall(text)
    if len(matches) != len(re.findall(r"(?://|#) limits:", text)):
        raise ValueError(f"{source.name}: a line of limits that no kernel follows")
    for line, kernel in matches:
        pairs = (item.split() for item in line.split(","))
        limits = {name: int(value) for name, value in pairs}
        if not limits.keys() <= _KNOWN:
            raise ValueError(f"{source.name}: unknown limits of {kernel}: {line}")
        found[kernel] = limits
    return found


def excesses(compiled: Compiled, limits: dict[str, int]) -> list[str]:
    """What of a kernel is above its limits, in words; without limits a kernel must not spill."""
    return [
        f"{compiled.kernel} [{compiled.variant}] {compiled.arch}: {name} "
        f"{getattr(compiled, name)}, limit {limit}"
        for name, limit in {**_DEFAULT, **limits}.items()
        if getattr(compiled, name) > limit
    ]


def table(rows: Sequence[Compiled]) -> str:
    """One line a kernel."""
    header = ("kernel", "variant", "arch", "registers", "shared", "spills", "HMMA/HGMMA")
    lines = [header]
    for row in rows:
        mma = "-" if row.mma is None else str(row.mma)
        numbers = (str(row.registers), str(row.shared), str(row.spills), mma)
        lines.append((row.kernel, row.variant, row.arch, *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
