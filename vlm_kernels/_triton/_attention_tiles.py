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


BUCKETS = (64, 128, 256)  # the largest padded head dim
_FEWEST = 16  # rows of a product
_NARROW = 64  # rows of a tile from which on a smaller one does not load the keys faster
_INTERPRETED = Tile(64, 64, 4, 1)
_INTERPRETED_MULTIPROCESSORS = 4  # so that few heads share their keys
# By architecture, bytes of an element and bucket. Chosen by what the compiler says of them (make
# kernels): the largest that do not spill. No GPU has timed them yet.
_TABLE = {
    (80, 2, 64): Tile(128, 64, 4, 3),
    (80, 2, 128): Tile(128, 64, 8, 2),
    (80, 2, 256): Tile(64, 32, 8, 2),
    (80, 4, 64): Tile(32, 32, 4, 2),
    (80, 4, 128): Tile(32, 32, 8, 1),
    (80, 4, 256): Tile(16, 16, 8, 1),
    (90, 2, 64): Tile(128, 64, 8, 3),
    (90, 2, 128): Tile(128, 64, 8, 2),
    (90, 2, 256): Tile(64, 32, 8, 2),
    (90, 4, 64): Tile(32, 32, 4, 2),
    (90, 4, 128): Tile(32, 32, 8, 1),
    (90, 4, 256): Tile(16, 16, 8, 1),
}
# The same with an attn_mask, whose addresses take registers; by bytes of an element and bucket.
_MASKED = {
    (2, 64): Tile(64, 64, 4, 2),
    (2, 128): Tile(64, 32, 8, 2),
    (2, 256): Tile(64, 32, 8, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(16, 32, 4, 1),
    (4, 256): Tile(16, 16, 8, 1),
}


def choose(
    arch: int, itemsize: int, dim: int, masked: bool, queries: int, heads: int, programs: int
) -> Tile:
    """The tile of the forward.

    Args:
        dim: the larger of D and Dv, padded.
        queries: of a head, or of a typical segment; heads: of all entries and segments.
        programs: that run side by side; with fewer tiles than these, half of them is better.
    """
    tile = largest(arch, itemsize, dim, masked)
    rows = tile.queries
    while rows > _FEWEST:
        half = rows // 2
        saves = _padded(queries, half) * 6 <= _padded(queries, rows) * 5  # else it does not pay
        alone = rows > _NARROW and heads * -(-queries // rows) < programs
        if not (saves or alone):
            break
        rows = half
    return shaped(tile, rows)


def largest(arch: int, itemsize: int, dim: int, masked: bool) -> Tile:
    """The tile for many queries."""
    if arch == INTERPRETER:
        return _INTERPRETED
    bucket = next(bucket for bucket in BUCKETS if dim <= bucket)
    return _MASKED[itemsize, bucket] if masked else _TABLE[arch, itemsize, bucket]


def shaped(tile: Tile, rows: int) -> Tile:
    """The tile with fewer rows."""
    return tile._replace(queries=rows, warps=max(4, tile.warps * rows // tile.queries))


def shipped(arch: int, itemsize: int, dim: int, masked: bool) -> list[Tile]:
    """Every tile that `choose` may give for a head dim, the largest first."""
    tile = largest(arch, itemsize, dim, masked)
    return [shaped(tile, rows) for rows in (128, 64, 32, 16) if rows <= tile.queries]


def _padded(count: int, tile: int) -> int:
    return -(-count // tile) * tile


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device: as many programs run side by side at least."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
