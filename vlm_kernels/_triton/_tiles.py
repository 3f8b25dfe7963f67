"""Tile shapes by architecture and shape: a table instead of autotuning at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._compat import INTERPRET


class Tile(NamedTuple):
    """A program's share of the similarity, and how Triton builds the kernel."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


INTERPRETER = 0
# By architecture, bytes of an element, and whether large tiles are enough for every multiprocessor.
# Chosen by what the compiler says of them (make kernels); no GPU has timed them yet.
_TABLE = {
    (INTERPRETER, 2, True): Tile(64, 64, 64, 4, 1),
    (80, 2, True): Tile(128, 128, 32, 8, 3),
    (80, 2, False): Tile(64, 64, 64, 4, 3),
    (80, 4, True): Tile(64, 64, 32, 4, 2),
    (90, 2, True): Tile(128, 128, 64, 8, 3),
    (90, 2, False): Tile(64, 64, 64, 4, 3),
    (90, 4, True): Tile(64, 64, 32, 4, 2),
}
_MANY = 2 * 132 * 128 * 128
"""Entries of the matrix from which large tiles fill the device."""


def architecture(device: torch.device) -> int:
    """A key of the table: newer ones take the newest known, without a GPU the interpreter's."""
    if INTERPRET.value or device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch, _, _ in _TABLE if arch <= 10 * major + minor and arch != INTERPRETER]
    return max(known, default=80)


def choose(arch: int, itemsize: int, entries: int) -> Tile:
    """The tile for features of `itemsize` bytes and a matrix of `entries` entries."""
    if arch == INTERPRETER:
        return _TABLE[INTERPRETER, 2, True]
    return _TABLE[arch, itemsize, itemsize == 4 or entries >= _MANY]


def shipped(arch: int, itemsize: int) -> list[Tile]:
    """Every tile that `choose` may give."""
    return list(dict.fromkeys(choose(arch, itemsize, entries) for entries in (1, _MANY)))
