"""Tile shapes of attention by architecture, dtype and head dim: a table instead of autotuning."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ._tiles import INTERPRETER


class Tile(NamedTuple):
    """Queries and keys of a program's step, and how Triton builds the kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


# By architecture, bytes of an element and the largest padded head dim that it is for. Chosen by
# what the compiler says of them (make kernels); no GPU has timed them yet.
_TABLE = {
    (INTERPRETER, 2, 256): Tile(64, 64, 4, 1),
    (80, 2, 64): Tile(128, 64, 4, 3),
    (80, 2, 128): Tile(128, 64, 8, 2),
    (80, 2, 256): Tile(64, 32, 4, 2),
    (80, 4, 64): Tile(64, 32, 4, 2),
    (80, 4, 128): Tile(32, 32, 4, 2),
    (80, 4, 256): Tile(16, 32, 4, 1),
    (90, 2, 64): Tile(128, 64, 4, 3),
    (90, 2, 128): Tile(128, 64, 8, 2),
    (90, 2, 256): Tile(64, 64, 4, 2),
    (90, 4, 64): Tile(64, 32, 4, 2),
    (90, 4, 128): Tile(32, 32, 4, 2),
    (90, 4, 256): Tile(16, 32, 4, 1),
}
BUCKETS = (64, 128, 256)
_FEWEST = 16  # rows of a product
_INTERPRETED_MULTIPROCESSORS = 4  # so that few heads split their keys


def choose(arch: int, itemsize: int, dim: int, queries: int) -> Tile:
    """The tile of the forward.

    Args:
        dim: the larger of D and Dv, padded.
        queries: of a head, or of a typical segment: more than these are not worth their rows.
    """
    if arch == INTERPRETER:
        tile = _TABLE[INTERPRETER, 2, 256]
    else:
        tile = _TABLE[arch, itemsize, next(bucket for bucket in BUCKETS if dim <= bucket)]
    rows = tile.queries
    while rows > _FEWEST and -(-queries // (rows // 2)) * (rows // 2) <= _worth(queries, rows):
        rows //= 2
    return shaped(tile, rows)


def _worth(queries: int, rows: int) -> int:
    """Rows that are computed at most in tiles of half as many: a sixth less, or it does not pay."""
    return -(-queries // rows) * rows * 5 // 6


def shaped(tile: Tile, rows: int) -> Tile:
    """The tile with fewer rows, and a warp for each 16 of them at most."""
    return tile._replace(queries=rows, warps=max(1, min(tile.warps, rows // 16)))


def shipped(arch: int, itemsize: int, dim: int) -> list[Tile]:
    """Every tile that `choose` may give for a head dim."""
    counts = (1 << 20, *range(1, 129))
    return list(dict.fromkeys(choose(arch, itemsize, dim, queries) for queries in counts))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
