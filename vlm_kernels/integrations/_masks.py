"""transformers' mask functions read as intervals: the keys a query sees are one range [lo, hi).

transformers describes a mask by a function of (batch, head, query, key) indices, composed of
closures in `transformers.masking_utils`, and evaluates it at all queries x keys. Nearly all of them
are one interval a query. A closure is told by the code object that its factory makes in the
installed version, never by its name, so that an unknown one is an unknown one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FACTORIES: dict[str, tuple[Any, ...]] = {  # arguments to make a specimen of each closure
    "and_masks": (),
    "or_masks": (),
    "sliding_window_overlay": (1,),
    "sliding_window_bidirectional_overlay": (1,),
    "chunked_overlay": (1, None),
    "blockwise_overlay": (None,),
    "padding_mask_function": (None,),
    "packed_sequence_mask_function": (None,),
    "remap_positions_for_packed_sequence": (None, None),
}
_PLAIN = ("causal_mask_function", "bidirectional_mask_function")
# What the positions of a packed sequence may replace the indices in: only distances matter there.
_SHIFT_INVARIANT = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
)


@dataclass(frozen=True)
class Interval:
    """Keys [lo, hi) of each query in absolute positions, int64 (B|1, Nq); None is unbounded.

    `touches`: lo <= query <= hi in every row, so that the union with another such is an interval.
    """

    lo: Tensor | None = None
    hi: Tensor | None = None
    touches: bool = False

    def __and__(self, other: Interval) -> Interval:
        lo = _both(torch.maximum, self.lo, other.lo)
        hi = _both(torch.minimum, self.hi, other.hi)
        return Interval(lo, hi, self.touches and other.touches)

    def __or__(self, other: Interval) -> Interval | None:
        if not (self.touches and other.touches):
            return None
        lo = None if self.lo is None or other.lo is None else torch.minimum(self.lo, other.lo)
        hi = None if self.hi is None or other.hi is None else torch.maximum(self.hi, other.hi)
        return Interval(lo, hi, True)


@dataclass(frozen=True)
class Reader:
    """Reads mask functions at the queries' absolute positions.

    Args:
        queries: (Nq,) int64.
        padding: (B, L) bool, the positions that may be seen at all, or None.
        trusted: whether padding masks and ids of tensors on a device are taken to be runs without
            reading them; those of CPU tensors are always read.
    """

    queries: Tensor
    padding: Tensor | None
    trusted: bool

    def read(self, function: Any) -> Interval | None:
        """The interval of `function`, or None where it is unknown or no interval."""
        name, cells = _name(function)
        q = self.queries[None]
        if name == "causal_mask_function":
            return Interval(None, q + 1, True)
        if name == "bidirectional_mask_function":
            return Interval(None, None, True)
        if name == "sliding_window_overlay":
            window = cells["sliding_window"]
            return Interval(q - window + 1, None, window >= 1)
        if name == "sliding_window_bidirectional_overlay":
            window = cells["sliding_window"]
            return Interval(q - window, q + window + 1, window >= 0)
        if name == "chunked_overlay":
            size, padding = cells["chunk_size"], cells["left_padding"][:, None]
            lo = padding + torch.div(q - padding, size, rounding_mode="floor") * size
            return Interval(lo, lo + size, True)
        if name == "blockwise_overlay":
            return self._blocks(cells["block_sequence_ids"])
        if name == "packed_sequence_mask_function":
            return self._runs(cells["packed_sequence_mask"], None)
        if name == "padding_mask_function":
            return self.padding_interval(cells["padding_mask"])
        if name == "and_masks":
            return self._intersection(cells["mask_functions"])
        if name == "or_masks":
            return self._union(cells["mask_functions"])
        return None

    def read_padded(self, function: Any) -> Interval | None:
        """The interval of `function` among the positions that padding leaves."""
        interval = self.read(function)
        if interval is None or self.padding is None:
            return interval
        visible = self.padding_interval(self.padding)
        return None if visible is None else interval & visible

    def padding_interval(self, mask: Tensor) -> Interval | None:
        """[first, last + 1) of each row's ones; a row without any sees nothing."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        lo = torch.where(mask, positions, mask.shape[1]).amin(1, keepdim=True)
        hi = torch.where(mask, positions + 1, 0).amax(1, keepdim=True)
        if mask.is_cpu:
            if bool(((hi - lo).clamp_min(0) != mask.sum(1, keepdim=True)).any()):
                return None
        elif not self.trusted:
            return None
        return Interval(lo, hi)

    def _intersection(self, functions: tuple[Any, ...]) -> Interval | None:
        packed = None
        result = Interval(None, None, True)
        for function in functions:
            name, cells = _name(function)
            if name == "remap_positions_for_packed_sequence":
                interval = self._remapped(cells, packed)
            else:
                interval = self.read(function)
            if name == "packed_sequence_mask_function":
                packed = cells["packed_sequence_mask"]
            if interval is None:
                return None
            result = result & interval
        return result

    def _union(self, functions: tuple[Any, ...]) -> Interval | None:
        result: Interval | None = None
        for index, function in enumerate(functions):
            interval = self.read(function)
            if interval is None:
                return None
            result = interval if index == 0 else (result | interval if result else None)
        return result

    def _remapped(self, cells: dict[str, Any], packed: Tensor | None) -> Interval | None:
        """Positions count up by one in a packed sequence: distances are those of the indices."""
        function, positions = cells["mask_function"], cells["position_ids"]
        if packed is None or not _shift_invariant(function):
            return None
        if positions.is_cpu and packed.is_cpu:
            same = packed[:, 1:] == packed[:, :-1]
            if bool((same & (positions[:, 1:] - positions[:, :-1] != 1)).any()):
                return None
        elif not self.trusted:
            return None
        return self.read(function)

    def _blocks(self, ids: Tensor) -> Interval | None:
        """The run of the query's own id; negative ids belong to no block, nor does padding."""
        member = ids >= 0
        if self.padding is not None:
            length = min(ids.shape[1], self.padding.shape[1])
            member = member & torch.nn.functional.pad(
                self.padding[:, :length], (0, ids.shape[1] - length)
            )
        return self._runs(ids, member)

    def _runs(self, ids: Tensor, member: Tensor | None) -> Interval | None:
        length = ids.shape[1]
        differs = ids[:, 1:] != ids[:, :-1]
        if member is not None:
            differs = differs | (member[:, 1:] != member[:, :-1])
        edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
        first = torch.cat((edge, differs), 1)
        last = torch.cat((differs, edge), 1)
        if ids.is_cpu:
            if _repeats(ids, first if member is None else first & member):
                return None
        elif not self.trusted:
            return None
        positions = torch.arange(length, device=ids.device)
        start = torch.where(first, positions, 0).cummax(1).values
        end = torch.where(last, positions + 1, length).flip(1).cummin(1).values.flip(1)
        if member is not None:  # an empty interval at the query
            start = torch.where(member, start, positions)
            end = torch.where(member, end, positions)
        return Interval(start[:, self.queries], end[:, self.queries], True)


def kv_range(interval: Interval, queries: Tensor, kv_length: int, kv_offset: Any) -> Tensor:
    """(B|1, 1, Nq, 2) int32 of an interval, relative to the first key at position kv_offset."""
    lo = queries.new_zeros(1) if interval.lo is None else interval.lo - kv_offset
    hi = queries.new_full((1,), kv_length) if interval.hi is None else interval.hi - kv_offset
    lo, hi = torch.broadcast_tensors(lo, hi, queries[None])[:2]
    return torch.stack((lo, hi), -1).clamp(0, kv_length).to(torch.int32)[:, None]


def _both(function: Callable[..., Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return function(a, b)


def _repeats(ids: Tensor, first: Tensor) -> bool:
    """Whether an id begins more than one run of a row."""
    filler = ids.amin() - 1 if ids.numel() else 0
    ordered = torch.where(first, ids, filler).sort(1).values
    return bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != filler)).any())


def _shift_invariant(function: Any) -> bool:
    name, cells = _name(function)
    if name in ("and_masks", "or_masks"):
        return all(_shift_invariant(part) for part in cells["mask_functions"])
    return name in _SHIFT_INVARIANT


def _name(function: Any) -> tuple[str | None, dict[str, Any]]:
    """The factory of a closure of transformers.masking_utils and its variables, or (None, {})."""
    code: Any = getattr(function, "__code__", None)
    name = _known().get(code)
    if name is None:
        return None, {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return name, dict(zip(code.co_freevars, cells))


_CODES: dict[Any, str] = {}


def _known() -> dict[Any, str]:
    if not _CODES:
        from transformers import masking_utils

        for name in _PLAIN:
            if hasattr(masking_utils, name):
                _CODES[getattr(masking_utils, name).__code__] = name
        for name, arguments in _FACTORIES.items():
            if hasattr(masking_utils, name):
                _CODES[getattr(masking_utils, name)(*arguments).__code__] = name
    return _CODES
