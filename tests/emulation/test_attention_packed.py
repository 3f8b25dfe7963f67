"""The tiles that attention_varlen cuts packed rows into, as its kernel finds them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

TILE = 64
Tiles = list[list[int]]  # first, count, begin, end, shift
Offsets = tuple[list[int], list[int]]  # of queries, of keys


def found(emulator: Any, offsets: Offsets, rows: tuple[int, int]) -> list[Tiles]:
    """The tiles of the queries and of the keys, unused ones too."""
    segments = len(offsets[0]) - 1
    counts = [-(-n // TILE) + segments + 1 for n in rows]
    tiles = [torch.empty(n, 5, dtype=torch.int32) for n in counts]
    given = [torch.tensor(side, dtype=torch.int32) for side in offsets]
    assert emulator("find_packed_tiles", *given, segments, *rows, *tiles, 1, unwritten=tiles) == ""
    return [t.tolist() for t in tiles]


def wanted(offsets: Offsets, rows: tuple[int, int]) -> list[Tiles]:
    """By the definition, one row after the other."""
    sides = []
    for given, n in zip(offsets, rows, strict=True):
        clamped = [min(max(x, 0), n) for x in given]
        sides.append([max(clamped[: i + 1]) for i in range(len(clamped))])
    result: list[Tiles] = [[], []]
    for side, tiles in enumerate(result):
        own, other = sides[side], sides[1 - side]
        outside = (0, 0, 0)
        pieces = [(0, own[0], *outside)]
        for i, ((a, b), (c, d)) in enumerate(zip(pairwise(own), pairwise(other), strict=True)):
            pieces.append((a, b, c, d, sides[1][i + 1] - sides[0][i + 1]))
        pieces.append((own[-1], rows[side], *outside))
        for a, b, begin, end, shift in pieces:
            shift = shift if begin < end else 0
            tiles += [[x, min(TILE, b - x), begin, end, shift] for x in range(a, b, TILE)]
    return result


def without_shifts(tiles: Tiles) -> Tiles:
    """Of tiles that meet nothing, neither interval nor shift means anything."""
    return [[*t[:2], *(t[2:] if t[2] < t[3] else (0, 0, 0))] for t in tiles]


def check(emulator: Any, offsets: Offsets, rows: tuple[int, int]) -> None:
    for tiles, exact, n in zip(found(emulator, offsets, rows), wanted(offsets, rows), rows):
        used = [t for t in tiles if t[1] > 0]
        assert tiles == used + [[0] * 5] * (len(tiles) - len(used))
        assert sorted(without_shifts(used)) == sorted(without_shifts(exact))
        covered = torch.zeros(n, dtype=torch.int64)
        for first, count, *_ in used:
            covered[first : first + count] += 1
        assert torch.equal(covered, torch.ones_like(covered))


def ends(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([5], [5]),
        ([64, 65, 63, 1], [64, 65, 63, 1]),
        ([129, 0, 3, 200], [1, 70, 0, 640]),
        ([0, 0], [0, 3]),
        ([], []),
    ],
    ids=str,
)
@pytest.mark.parametrize("outside", [0, 1, 130])
def test_segments(emulator: Any, queries: list[int], keys: list[int], outside: int) -> None:
    rows = (sum(queries) + outside, sum(keys) + outside)
    check(emulator, (ends(queries), ends(keys)), rows)


def test_more_segments_than_threads(emulator: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 5, (2, 600), generator=generator)
    lengths[:, 300] = 700
    offsets = (ends(lengths[0].tolist()), ends(lengths[1].tolist()))
    check(emulator, offsets, (offsets[0][-1] + 3, offsets[1][-1]))


@pytest.mark.parametrize("rows", [(300, 200), (1, 1), (64, 577)], ids=str)
def test_garbage_is_clamped(emulator: Any, rows: tuple[int, int]) -> None:
    """Every row is in one tile, and no tile leaves its tensors, whatever the offsets hold."""
    lowest, highest = -(2**31), 2**31 - 1
    check(emulator, ([lowest, 90, 40, highest, 10], [7, highest, 3, lowest, 50]), rows)
    generator = torch.Generator().manual_seed(1)
    for scale in (400, 2**31 - 1):
        offsets = torch.randint(-scale, scale, (2, 9), generator=generator)
        check(emulator, (offsets[0].tolist(), offsets[1].tolist()), rows)


def test_tiles_of_the_queries_alone(emulator: Any) -> None:
    offsets = torch.tensor([0, 3, 70], dtype=torch.int32)
    tiles = [torch.full((5, 5), -1, dtype=torch.int32) for _ in range(2)]
    assert emulator("find_packed_tiles", offsets, offsets, 2, 70, 70, *tiles, 0) == ""
    unused = [[0] * 5] * 2
    assert tiles[0].tolist() == [[0, 3, 0, 3, 0], [3, 64, 3, 70, 0], [67, 3, 3, 70, 0], *unused]
    assert (tiles[1] == -1).all()
