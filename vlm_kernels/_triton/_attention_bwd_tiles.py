"""Tile shapes of attention's backward by architecture, dtype and head dim."""

from __future__ import annotations

from typing import NamedTuple

from ._attention_tiles import Tile
from ._tiles import INTERPRETER


class Tiles(NamedTuple):
    """Of each kernel."""

    dkdv: Tile
    dq: Tile
    dmask: Tile


BUCKETS = (64, 80, 128, 256)
"""Of the larger head dim, padded."""
_INTERPRETED = Tiles(Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))
# Chosen by what the compiler says of them (make kernels): the largest that hardly spill, in the
# 99 KiB of shared memory that every GPU from sm_80 on has. No GPU has timed them yet.
_TABLE = {
    (80, 2, 64): Tiles(Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    (80, 2, 80): Tiles(Tile(32, 128, 8, 1), Tile(128, 32, 8, 2), Tile(64, 32, 4, 1)),
    (80, 2, 128): Tiles(Tile(16, 64, 4, 2), Tile(128, 32, 8, 2), Tile(32, 32, 4, 1)),
    (80, 2, 256): Tiles(Tile(16, 32, 4, 1), Tile(64, 16, 8, 2), Tile(32, 32, 8, 1)),
    (90, 2, 64): Tiles(Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
    (90, 2, 80): Tiles(Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
    (90, 2, 128): Tiles(Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    (90, 2, 256): Tiles(Tile(16, 64, 8, 2), Tile(64, 16, 8, 2), Tile(32, 32, 8, 1)),
}
# With a mask tensor, whose tiles take registers and shared memory as well.
_MASKED = {
    (80, 2, 64): _TABLE[80, 2, 64]._replace(dkdv=Tile(32, 128, 8, 1)),
    (80, 2, 128): _TABLE[80, 2, 128]._replace(dkdv=Tile(16, 64, 4, 1)),
    (90, 2, 64): _TABLE[90, 2, 64]._replace(dkdv=Tile(32, 128, 8, 2)),
    (90, 2, 80): _TABLE[90, 2, 80]._replace(dkdv=Tile(32, 64, 8, 2)),
    (90, 2, 128): _TABLE[90, 2, 128]._replace(dkdv=Tile(32, 64, 8, 2)),
}
_FP32 = {
    64: Tiles(Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
    80: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def choose(arch: int, itemsize: int, dim: int, masked: bool) -> Tiles:
    """Those of heads of `dim` padded features, with or without a mask tensor."""
    if arch == INTERPRETER:
        return _INTERPRETED
    bucket = next(bucket for bucket in BUCKETS if dim <= bucket)
    if itemsize == 4:
        return _FP32[bucket]
    tiles = _TABLE[arch, itemsize, bucket]
    return _MASKED.get((arch, itemsize, bucket), tiles) if masked else tiles
