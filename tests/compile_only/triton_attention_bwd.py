"""Variants of the Triton kernels of attention's backward: those of VLMs, with every tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_kernels._triton import _attention_bwd as backend
from vlm_kernels._triton import _attention_bwd_kernels as kernels
from vlm_kernels._triton._attention_call import pieces
from vlm_kernels._triton._attention_kernels import HALVES, INTERLEAVED, LAYER, NO_NORM, RMS
from vlm_kernels._triton._attention_math import ADDITIVE_MASK, BOOL_MASK, NO_MASK

from .triton_kernels import Variant

KERNELS = kernels
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
    constants = {**constants, **flags, "ALIGN": backend.ALIGNED if dim % 8 == 0 else 1}
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
    kernel: Any, arch: int, dtype: str, dim: int, tile: backend.Tile, flags: dict[str, Any]
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
