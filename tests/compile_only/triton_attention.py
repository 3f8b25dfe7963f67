"""Variants of the forward kernels of attention in Triton: those of VLMs, with every tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_kernels._triton import _attention_intervals as intervals
from vlm_kernels._triton import _attention_kernels as kernels
from vlm_kernels._triton import _attention_tiles
from vlm_kernels._triton import attention as backend
from vlm_kernels._triton._attention_call import pieces
from vlm_kernels._triton._attention_math import ADDITIVE_MASK, BOOL_MASK, NO_MASK

from .triton_kernels import Variant

_DTYPES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_DIMS = (64, 72, 80, 88, 96, 104, 112, 128, 256)
_ALIGNED = 8
_PLAIN = {"MASK": NO_MASK, "ROWS": False, "SOFTCAP": False, "NEGATE": False, "TOGETHER": False}
_ROWS = _PLAIN | {"ROWS": True}
_DECODE = _ROWS | {"TOGETHER": True}
_CAPPED = _PLAIN | {"ROWS": True, "SOFTCAP": True}
_BOOL = _PLAIN | {"ROWS": True, "MASK": BOOL_MASK}
_ADDITIVE = _PLAIN | {"MASK": ADDITIVE_MASK, "NEGATE": True}


def _forward(
    arch: int, dtype: str, tile: _attention_tiles.Tile, dim: int, flags: dict[str, Any]
) -> Variant:
    """attention_kernel for contiguous (B, N, H, D) data."""
    kernel = kernels.attention_kernel
    names = ("D", "D0", "D1", "D2", "DV", "V0", "V1", "V2")
    constants = {
        **dict(zip(names, (dim, *pieces(dim)) * 2, strict=True)),
        **flags,
        "ALIGN": _ALIGNED if dim % _ALIGNED == 0 else 1,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "BM": tile.queries,
        "BN": tile.keys,
    }
    data = f"*{dtype.replace('tf32', 'fp32')}"
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k", "v", "out"), data) | {"rows": "*i32", "lse": "*fp32"}
    types |= {"mask": "*i1" if flags["MASK"] == BOOL_MASK else data}
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    aligned = {"q", "k", "v", "out", "rows", "lse"}
    aligned |= {"mask", "mask_row", "mask_head", "mask_batch"} if flags["MASK"] else set()
    if dim % 16 == 0:
        strides = (f"{x}_{d}" for x in "qkv" for d in ("batch", "head", "row"))
        aligned |= {*strides, "out_batch", "out_head", "out_row"}
    # what torch's sizes of 1 become
    ones = {"mask_column", *(("nq", "tiles") if flags["TOGETHER"] else ("splits", "group"))}
    constants |= dict.fromkeys(ones, 1)
    types |= dict.fromkeys(ones, "constexpr")
    constants = {name: value for name, value in constants.items() if types[name] == "constexpr"}
    shown = ",".join(f"{k.lower()}={int(v)}" for k, v in flags.items() if v) or "plain"
    name = f"{shown},{dtype},{tile.queries}x{tile.keys},d={dim}"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant(kernel, name, arch, types, constants, aligned, options, dtype != "fp32")


def _small(kernel: Any, arch: int, dtype: str, name: str, constants: dict[str, Any]) -> Variant:
    data = f"*{dtype}"
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("x", "weight", "bias", "out"), data) | {"eps": "fp32"}
    types |= dict.fromkeys(("cos", "sin", "parts", "part_lses", "lse"), "*fp32")
    types |= {"places": "*i32", "kv_range": "*i32"}
    types |= {"rows": "*i32"} if kernel is kernels.intervals_kernel else {}
    types |= dict.fromkeys(("cu_q", "cu_k"), "*i64") | dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    aligned = {name for name, type_ in types.items() if type_.startswith("*")}
    return Variant(
        kernel, f"{name},{dtype}", arch, types, constants, aligned, {"num_warps": 4}, False
    )


def _combine(arch: int, dtype: str, dim: int) -> Variant:
    width = backend.triton.next_power_of_2(dim)
    constants = {"DV": dim, "BV": width, "BR": backend.COMBINED // width}
    return _small(kernels.combine_kernel, arch, dtype, f"d={dim}", constants)


def _prepare(arch: int, dtype: str, dim: int, norm: int, rope: int) -> Variant:
    width = backend.triton.next_power_of_2(dim)
    constants = {
        "NORM": norm,
        "BIAS": norm == kernels.LAYER,
        "ROPE": rope,
        "PLACES": rope == kernels.HALVES,
        "HALF": dim // 2 if rope else 0,
        "D": dim,
        "BD": width,
        "BR": backend.PREPARED // width,
    }
    name = f"norm={norm},rope={rope},d={dim}"
    return _small(kernels.prepare_kernel, arch, dtype, name, constants)


def _intervals(arch: int, *flags: str) -> Variant:
    names = ("CAUSAL", "LEFT", "RIGHT", "RANGE", "PACKED")
    constants = {**{name: name in flags for name in names}, "BLOCK": intervals.BLOCK}
    name = ",".join(flags).lower()
    return _small(kernels.intervals_kernel, arch, "i32", name, constants)


def _tile(arch: int, dtype: str, dim: int, masked: bool, rows: int = 128) -> _attention_tiles.Tile:
    """The largest that ships of at most `rows` rows."""
    shipped = _attention_tiles.shipped(arch, _DTYPES[dtype], sum(pieces(dim)), masked)
    return next(tile for tile in shipped if tile.queries <= rows)


def variants(arch: int) -> Iterator[Variant]:
    """Each head dim of VLMs, in bf16 with every tile; masks and other dtypes at some of them."""
    for dim in _DIMS:
        for rows in (128, 64, 32, 16):
            for flags in (_CAPPED, _DECODE if rows <= backend.TOGETHER else _PLAIN):
                yield _forward(arch, "bf16", _tile(arch, "bf16", dim, False, rows), dim, flags)
    for dtype in _DTYPES:
        for dim in (64, 80, 128, 256):
            for flags in (_PLAIN, _CAPPED) if dtype != "bf16" else ():
                yield _forward(arch, dtype, _tile(arch, dtype, dim, False), dim, flags)
            for flags in (_BOOL, _ADDITIVE):
                yield _forward(arch, dtype, _tile(arch, dtype, dim, True), dim, flags)
    for dtype, dim in (("bf16", 72), ("fp16", 128), ("fp32", 256)):
        yield _combine(arch, dtype, dim)
        for norm, rope in ((kernels.RMS, kernels.HALVES), (kernels.LAYER, kernels.INTERLEAVED)):
            yield _prepare(arch, dtype, dim, norm, rope)
            yield _prepare(arch, dtype, dim, norm, kernels.NO_ROPE)
        yield _prepare(arch, dtype, dim, kernels.NO_NORM, kernels.HALVES)
    for flags in (("CAUSAL",), ("PACKED",), ("CAUSAL", "LEFT", "RIGHT", "RANGE")):
        yield _intervals(arch, *flags)


def quick(arch: int) -> Iterator[Variant]:
    """What the tests compile: each kernel, and of the forward the ones with most registers."""
    yield _forward(arch, "bf16", _tile(arch, "bf16", 80, False), 80, _CAPPED)
    if arch == 90:
        yield _forward(arch, "bf16", _tile(arch, "bf16", 128, False), 128, _PLAIN)
        yield _forward(arch, "fp16", _tile(arch, "fp16", 72, True), 72, _ADDITIVE)
        yield _forward(arch, "bf16", _tile(arch, "bf16", 88, False, 16), 88, _DECODE)
        yield _forward(arch, "fp32", _tile(arch, "fp32", 64, False), 64, _PLAIN)
        yield _forward(arch, "tf32", _tile(arch, "tf32", 64, False), 64, _PLAIN)
        yield _combine(arch, "bf16", 80)
        yield _prepare(arch, "bf16", 80, kernels.LAYER, kernels.HALVES)
        yield _intervals(arch, "CAUSAL", "LEFT", "PACKED")
