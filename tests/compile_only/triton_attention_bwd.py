"""Variants of the Triton kernels of attention's backward: those of VLMs, with every tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

from vlm_kernels._triton import _attention_bwd as backend
from vlm_kernels._triton import _attention_bwd_kernels as kernels
from vlm_kernels._triton import _attention_bwd_tiles as tiles
from vlm_kernels._triton._attention_call import pieces
from vlm_kernels._triton._attention_kernels import (
    HALVES,
    INTERLEAVED,
    LAYER,
    NO_NORM,
    NO_ROPE,
    RMS,
)
from vlm_kernels._triton._attention_math import ADDITIVE_MASK, BOOL_MASK, NO_MASK
from vlm_kernels._triton._attention_tiles import Tile

from .triton_kernels import Variant

_ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_DIMS = (64, 72, 80, 88, 96, 104, 112, 128, 256)
_FEATURES = {"query", "key", "value", "grad", "out", "x", "mask"}
_FEATURES |= {"grad_query", "grad_key", "grad_value", "grad_x"}
_INTEGERS = {"rows", "bounds", "places"}
_FLOATS = {"lse", "grad_lse", "delta", "weight", "cos", "sin", "weight_parts", "bias_parts"}
_FLOATS |= {"grad_mask"}
_NUMBERS = {"scale", "softcap", "eps"}
_STRIDES = tuple(f"{x}_{d}" for x in ("query", "key", "value", "grad", "out", "x") for d in "bhn")
_STRIDES += tuple(f"{x}_{d}" for x in ("dq", "dk", "dv", "dx") for d in "bhn") + ("dq_s",)
_PLAIN = {"HAS_ROWS": False, "MASK": NO_MASK, "SOFTCAP": False}
_ALL = {"HAS_ROWS": True, "MASK": ADDITIVE_MASK, "SOFTCAP": True}
_MASKS: tuple[dict[str, Any], ...] = (
    _PLAIN,
    _PLAIN | {"HAS_ROWS": True},
    _PLAIN | {"MASK": BOOL_MASK},
    _PLAIN | {"MASK": ADDITIVE_MASK},
    _ALL,
)


def _variant(
    kernel: Any,
    arch: int,
    dtype: str,
    dim: int,
    flags: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, int],
    mma: bool = False,
    **types: str,
) -> Variant:
    """A kernel for contiguous (B, N, H, D) data."""
    constants = {**constants, **flags, "ALIGN": 8}
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    feature = f"*{dtype.replace('tf32', 'fp32')}"
    every = dict.fromkeys(kernel.arg_names, "i32")
    every |= dict.fromkeys(_FEATURES & every.keys(), feature)
    every |= dict.fromkeys(_INTEGERS & every.keys(), "*i32")
    every |= dict.fromkeys(_FLOATS & every.keys(), "*fp32")
    every |= dict.fromkeys(_NUMBERS & every.keys(), "fp32")
    every |= types | dict.fromkeys(constants, "constexpr")
    aligned = {name for name, type_ in every.items() if type_.startswith("*")}
    if dim % 16 == 0:
        aligned |= set(_STRIDES) & every.keys()
    shown = ",".join(f"{k.lower()}={int(v)}" for k, v in flags.items() if v) or "plain"
    tile = "x".join(str(constants[name]) for name in ("BM", "BN") if name in constants)
    name = f"{shown},{dtype},{tile},d={dim}"
    return Variant(kernel, name, arch, every, constants, aligned, options, mma)


def tiled(
    kernel: Any, arch: int, dtype: str, dim: int, tile: Tile, flags: dict[str, Any]
) -> Variant:
    """dkdv_kernel, dq_kernel or dmask_kernel."""
    names = ("D", "D0", "D1", "D2", "DV", "V0", "V1", "V2")
    constants = {
        **dict(zip(names, (dim, *pieces(dim)) * 2, strict=True)),
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "BM": tile.queries,
        "BN": tile.keys,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    types = {"mask": "*u8"} if flags["MASK"] == BOOL_MASK else {}
    mma = dtype != "fp32"
    return _variant(kernel, arch, dtype, dim, flags, constants, options, mma, **types)


def _tile_kernels(arch: int, dtype: str, dim: int, flags: dict[str, Any]) -> Iterator[Variant]:
    """All that a call with all gradients launches for its tiles."""
    chosen = tiles.choose(arch, _ITEMSIZE[dtype], sum(pieces(dim)), flags["MASK"] != NO_MASK)
    both = {"NEED_KEY": True, "NEED_VALUE": True}
    yield tiled(kernels.dkdv_kernel, arch, dtype, dim, chosen.dkdv, flags | both)
    yield tiled(kernels.dq_kernel, arch, dtype, dim, chosen.dq, flags)
    if flags["MASK"] == ADDITIVE_MASK:
        for by_row in (True, False):
            kernel = kernels.dmask_kernel
            yield tiled(kernel, arch, dtype, dim, chosen.dmask, flags | {"BY_ROW": by_row})


def _locked(arch: int, dtype: str, dim: int) -> Iterator[Variant]:
    """Of one of key and value only."""
    tile = tiles.choose(arch, _ITEMSIZE[dtype], sum(pieces(dim)), False).dkdv
    for key in (True, False):
        flags = _PLAIN | {"NEED_KEY": key, "NEED_VALUE": not key}
        yield tiled(kernels.dkdv_kernel, arch, dtype, dim, tile, flags)


def _row_kernels(arch: int, dtype: str, dim: int) -> Iterator[Variant]:
    """What is not a product."""
    width = triton.next_power_of_2(dim)
    options = {"num_warps": 4}
    constants: dict[str, Any] = {"D": dim, "WIDTH": width, "BM": backend.DELTA_ROWS}
    for has_lse in (True, False):
        flags = {"HAS_LSE": has_lse}
        yield _variant(kernels.delta_kernel, arch, dtype, dim, flags, constants, options)
    constants |= {"BM": backend.PREPARED // width, "TILES": backend.PREPARED_TILES, "NEED_X": True}
    for norm, rope, bias in (
        (RMS, NO_ROPE, False),
        (RMS, HALVES, False),
        (LAYER, INTERLEAVED, True),
        (NO_NORM, HALVES, False),
    ):
        flags = {"NORM": norm, "ROPE": rope, "PLACES": False}
        flags |= {"NEED_WEIGHT": norm != NO_NORM, "NEED_BIAS": bias}
        yield _variant(kernels.prepare_bwd_kernel, arch, dtype, dim, flags, constants, options)


def _bounds(arch: int) -> Variant:
    constants = {"BM": 32, "BN": 128, "BLOCK": backend.BOUNDS_BLOCK}
    return _variant(kernels.bounds_kernel, arch, "fp32", 128, {}, constants, {"num_warps": 4})


def variants(arch: int) -> Iterator[Variant]:
    """All of them: head dims of VLMs, each kind of mask."""
    for dtype in _ITEMSIZE:
        for dim in _DIMS if dtype == "bf16" else (64, 80, 128, 256):
            for flags in _MASKS if dtype == "bf16" else (_PLAIN, _ALL):
                yield from _tile_kernels(arch, dtype, dim, flags)
    for dim in (64, 72, 128):
        yield from _locked(arch, "bf16", dim)
    for dtype, dim in (("bf16", 64), ("bf16", 72), ("fp32", 128), ("bf16", 256)):
        yield from _row_kernels(arch, dtype, dim)
    yield _bounds(arch)


def quick(arch: int) -> Iterator[Variant]:
    """What the tests compile: each kernel, and a few head dims, dtypes and masks."""
    if arch == 80:
        yield from _tile_kernels(arch, "bf16", 72, _PLAIN)
        return
    yield from _tile_kernels(arch, "bf16", 64, _PLAIN | {"HAS_ROWS": True})
    yield from list(_tile_kernels(arch, "fp16", 112, _ALL))[:3]
    yield from list(_tile_kernels(arch, "fp32", 64, _PLAIN))[:1]
    yield from list(_tile_kernels(arch, "tf32", 128, _PLAIN))[1:2]
    yield from list(_row_kernels(arch, "bf16", 72))[::4]
    yield _bounds(arch)
