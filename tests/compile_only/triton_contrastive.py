"""Every variant of the contrastive losses' Triton kernels that ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_kernels._triton import _contrastive_kernels as kernels
from vlm_kernels._triton import _tiles

from .triton_kernels import Variant

_DTYPES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_BOTH = kernels.ROWS | kernels.COLUMNS
# (directions, metrics, keep) of the statistics and (directions, keep) of the gradients: keeping the
# similarity of whole rows is for one direction in one pass.
_STATS = ((_BOTH, False, False), (kernels.ROWS, False, False), (kernels.COLUMNS, False, False))
_STATS += ((_BOTH, True, False), (kernels.ROWS, False, True))
_GRADS = ((_BOTH, False), (kernels.ROWS, False), (kernels.COLUMNS, False), (kernels.ROWS, True))
_FLOATS = {"scale", "bias", "row_parts", "col_parts", "kept_similarity", "row_coefs", "col_coefs"}
_FLOATS |= {"sums", "losses", "row_weight", "col_weight", "parts", "stats"}


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    feature = f"*{dtype.replace('tf32', 'fp32')}"
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(_FLOATS & types.keys(), "*fp32")
    types |= dict.fromkeys({"image", "text", "grads"} & types.keys(), feature)
    types |= dict.fromkeys({"image_ids", "text_ids"} & types.keys(), "*i32")
    return types | dict.fromkeys(constants, "constexpr")


def _variant(
    kernel: Any, arch: int, dtype: str, tile: _tiles.Tile, dim: int, flags: dict[str, Any]
) -> Variant:
    constants = {
        "D": dim,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "BM": tile.rows,
        "BN": tile.cols,
        "BK": tile.depth,
        **flags,
    }
    types = _types(kernel, dtype, constants)
    # as for tensors of torch whose sizes are no multiples of 16, but whose D is
    aligned = {name for name, type_ in types.items() if type_ != "constexpr"} - {
        "n", "m", "tiles", "kind", "smoothing", "fields", "weighted", "sums_stride",
    }  # fmt: skip
    shown = ",".join(f"{k.lower()}={int(v)}" for k, v in flags.items())
    name = f"{shown},{dtype},{tile.rows}x{tile.cols}x{tile.depth},d={dim}"
    mma = dtype != "fp32"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant(kernel, name, arch, types, constants, aligned, options, mma)


def _of(arch: int, dtype: str, tile: _tiles.Tile, dim: int) -> Iterator[Variant]:
    for directions, metrics, keep in _STATS:
        flags = {"DIRECTIONS": directions, "METRICS": metrics, "KEEP": keep}
        yield _variant(kernels.stats_kernel, arch, dtype, tile, dim, flags)
    for directions, keep in _GRADS:
        flags = {"DIRECTIONS": directions, "KEEP": keep}
        variant = _variant(kernels.clip_grads_kernel, arch, dtype, tile, dim, flags)
        yield variant._replace(mma=variant.mma and not keep)
    for grads in (True, False):
        yield _variant(kernels.sigmoid_kernel, arch, dtype, tile, dim, {"GRADS": grads})


def _merges(arch: int) -> Iterator[Variant]:
    for metrics in (False, True):
        constants = {"METRICS": metrics, "B": 128}
        types = _types(kernels.merge_kernel, "fp32", constants)
        name = f"metrics={int(metrics)}"
        aligned = {"parts", "scale"}
        yield Variant(
            kernels.merge_kernel, name, arch, types, constants, aligned, {"num_warps": 4}, False
        )


def variants(arch: int) -> Iterator[Variant]:
    """All of them, for the D of CLIP and SigLIP models; in bf16 also for one that fills no tile."""
    for dtype, size in _DTYPES.items():
        for tile in _tiles.shipped(arch, size):
            for dim in (768, 80) if dtype == "bf16" else (768,):
                yield from _of(arch, dtype, tile, dim)
    yield from _merges(arch)


def quick(arch: int) -> Iterator[Variant]:
    """What the tests compile: each kernel in bf16 with large tiles, and few others."""
    large, small = _tiles.shipped(arch, 2)[::-1]
    fp32 = _tiles.shipped(arch, 4)[0]
    if arch == 90:
        yield from _of(arch, "bf16", large, 768)
        yield from list(_of(arch, "fp16", small, 768))[0:6:5]
        yield from list(_of(arch, "fp32", fp32, 768))[0:6:5]
        yield from list(_of(arch, "tf32", fp32, 768))[0:1]
    else:
        yield from list(_of(arch, "bf16", large, 768))[0::5]
    yield from _merges(arch)
