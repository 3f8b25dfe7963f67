"""Variants of the forward kernels of attention in Triton: those of VLMs, with every tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_kernels._triton import _attention_kernels as kernels
from vlm_kernels._triton import _attention_tiles
from vlm_kernels._triton._attention_call import pieces
from vlm_kernels._triton._attention_math import ADDITIVE_MASK, BOOL_MASK, NO_MASK

from .triton_kernels import Variant

KERNELS = kernels
_DTYPES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_DIMS = (64, 72, 80, 88, 96, 104, 112, 128, 256)
_ALIGNED = 8
_PLAIN = {"MASK": NO_MASK, "ROWS": False, "SOFTCAP": False, "NEGATE": False}
_FLAGS: tuple[dict[str, Any], ...] = (
    _PLAIN,
    _PLAIN | {"ROWS": True},
    _PLAIN | {"ROWS": True, "SOFTCAP": True},
    _PLAIN | {"MASK": BOOL_MASK},
    _PLAIN | {"MASK": ADDITIVE_MASK},
)


def forward(
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
    constants |= {"splits": 1, "group": 1, "mask_column": 1, "out_split": 0, "lse_split": 0}
    types |= dict.fromkeys(("splits", "group", "mask_column"), "constexpr")
    constants = {name: value for name, value in constants.items() if types[name] == "constexpr"}
    shown = ",".join(f"{k.lower()}={int(v)}" for k, v in flags.items() if v) or "plain"
    name = f"{shown},{dtype},{tile.queries}x{tile.keys},d={dim}"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant(kernel, name, arch, types, constants, aligned, options, dtype != "fp32")
