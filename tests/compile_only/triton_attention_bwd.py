"""Every variant of the Triton kernels of attention's backward that ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_kernels._triton import _attention_bwd as backend
from vlm_kernels._triton import _attention_bwd_kernels as kernels
from vlm_kernels._triton._attention_call import pieces

from .triton_kernels import Variant

_ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_FEATURES = {"query", "key", "value", "grad", "out", "x", "grad_x"}
_INTEGERS = {"rows", "bounds", "places"}
_FLOATS = {"lse", "grad_lse", "delta", "weight", "cos", "sin", "weight_parts", "bias_parts"}
_FLOATS |= {"grad_mask"}
_NUMBERS = {"scale", "softcap", "eps"}


def _types(kernel: Any, dtype: str, constants: dict[str, Any], own: dict[str, str]) -> Any:
    feature = f"*{dtype.replace('tf32', 'fp32')}"
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys((_FEATURES | {"mask"}) & types.keys(), feature)
    types |= dict.fromkeys({"grad_query", "grad_key", "grad_value"} & types.keys(), feature)
    types |= dict.fromkeys(_INTEGERS & types.keys(), "*i32")
    types |= dict.fromkeys(_FLOATS & types.keys(), "*fp32")
    types |= dict.fromkeys(_NUMBERS & types.keys(), "fp32")
    return types | own | dict.fromkeys(constants, "constexpr")


def _variant(
    kernel: Any,
    arch: int,
    dtype: str,
    dim: int,
    constants: dict[str, Any],
    options: dict[str, int],
    mma: bool,
    **own: str,
) -> Variant:
    types = _types(kernel, dtype, constants, own)
    # as of (B, N, H, D) data: sizes are no multiples of 16, and where D is none, heads neither
    aligned = {name for name, type_ in types.items() if type_.startswith("*")}
    aligned |= {name for name in types if name.endswith(("_b", "_n"))} - {"mask_b", "mask_n"}
    if dim % 16 == 0:
        aligned |= {name for name in types if name.endswith("_h")} - {"mask_h", "rows_h"}
    flags = (f"{k.lower()}={int(v)}" for k, v in constants.items() if k in _FLAGS)
    tile = f"{constants['BM']}x{constants['BN']}" if "BN" in constants else f"{constants['BM']}"
    name = ",".join([*flags, dtype, tile, f"d={dim}"])
    return Variant(kernel, name, arch, types, constants, aligned, options, mma)


_FLAGS = {"HAS_ROWS", "MASK", "SOFTCAP", "NEED_KEY", "NEED_VALUE", "BY_ROW", "NORM", "ROPE"}
_FLAGS |= {"HAS_LSE"}
# (HAS_ROWS, MASK, SOFTCAP)
_PLAIN = (False, kernels.NO_MASK, False)
_ALL = (True, kernels.ADDITIVE, True)
_MASKS = (_PLAIN, (True, kernels.NO_MASK, False), (False, kernels.BOOL, False), _ALL)


def _tiled(
    kernel: Any,
    arch: int,
    dtype: str,
    dim: int,
    masks: tuple[bool, int, bool],
    tile: backend.Tile,
    **flags: bool,
) -> Variant:
    has_rows, mask, softcap = masks
    parts = pieces(dim)
    constants = {
        **flags,
        "HAS_ROWS": has_rows,
        "MASK": mask,
        "SOFTCAP": softcap,
        "D": dim,
        **dict(zip(("D0", "D1", "D2"), parts)),
        "DV": dim,
        **dict(zip(("V0", "V1", "V2"), parts)),
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "BM": tile.queries,
        "BN": tile.keys,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    own = {"mask": "*u8"} if mask == kernels.BOOL else {}
    return _variant(kernel, arch, dtype, dim, constants, options, dtype != "fp32", **own)


def _of(
    arch: int, dtype: str, dim: int, masks: tuple[tuple[bool, int, bool], ...]
) -> Iterator[Variant]:
    tiles = backend.tiles(arch, _ITEMSIZE[dtype], dim)
    for each in masks:
        yield _tiled(
            kernels.dkdv_kernel, arch, dtype, dim, each, tiles.dkdv, NEED_KEY=True, NEED_VALUE=True
        )
        yield _tiled(kernels.dq_kernel, arch, dtype, dim, each, tiles.dq)
        if each[1] == kernels.ADDITIVE:
            for by_row in (True, False):
                yield _tiled(
                    kernels.dmask_kernel, arch, dtype, dim, each, tiles.dmask, BY_ROW=by_row
                )
