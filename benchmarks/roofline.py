"""What the machine reaches, measured in the run whose rows it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vlm_kernels import _load
from vlm_kernels.testing import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Squares, and the two products of a loss at D = 512: (N, D) x (D, M) and (N, M) x (M, D).
_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 2048, 512), (2048, 512, 2048))
_GPU_SHAPES = ((8192, 8192, 8192), (16384, 16384, 1024), (8192, 1024, 16384))
_COPY_BYTES = 256 * 2**20  # far beyond any cache
_GPU_COPY_BYTES = 2**31


@dataclass
class Roofline:
    """The best of what was tried; a median here would flatter the rows.

    Attributes:
        flops: dtype name -> FLOP/s of a matrix product.
        source: dtype name -> which product that was.
        bytes: bytes/s of a copy, reads and writes counted.
    """

    flops: dict[str, float]
    source: dict[str, str]
    bytes: float

    def best(self, other: Roofline) -> Roofline:
        """The larger of the two, entry by entry: the machine may have been busy during one."""
        flops, source = dict(self.flops), dict(self.source)
        for name, value in other.flops.items():
            if value > flops.get(name, 0.0):
                flops[name], source[name] = value, other.source[name]
        return Roofline(flops, source, max(self.bytes, other.bytes))

    def seconds(self, dtype: str, flops: float, moved: float) -> float:
        """The least time that `flops` in `dtype` and `moved` bytes could take."""
        return max(flops / self.flops[dtype], moved / self.bytes)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _fastest(fn: Callable[[], object], budget_s: float, device: str) -> float:
    if device == "cuda":
        times = timing.interleaved({"": fn}, budget_s=budget_s, max_rounds=10**6, device=device)
        return min(times[""].seconds)
    fn()
    best, start = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) - start < budget_s:
        fn()
        best = min(best, time.perf_counter() - now)
    return best


def _products(
    dtype: torch.dtype, m: int, n: int, k: int, device: str
) -> dict[str, Callable[[], object]]:
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    products: dict[str, Callable[[], object]] = {"mm": lambda: torch.mm(a, b.T, out=out)}
    packed = _packed(b, m) if device == "cpu" else None
    if packed is not None:
        # what Inductor calls for a frozen linear layer: the weight is packed once, beforehand
        linear = torch.ops.mkldnn._linear_pointwise
        products["packed mm"] = lambda: linear(a, packed, None, "none", [], "")
    return products


def _packed(weight: Tensor, rows: int) -> Tensor | None:
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def measure(dtypes: list[str], budget_s: float = 4.0, device: str = "cpu") -> Roofline:
    """Tries matrix products of several shapes for `budget_s` seconds a dtype, and a copy.

    torch's own products stay below what the hardware gives, bf16 most of all, so where the
    extension has a `gemm_probe(dtype, seconds)`, the FLOP/s of its bare inner kernel, that counts.
    """
    flops: dict[str, float] = {}
    source: dict[str, str] = {}
    probe = getattr(_load._C, "gemm_probe", None) if device == "cpu" else None
    shapes = _GPU_SHAPES if device == "cuda" else _SHAPES
    for name in dtypes:
        found = []
        for m, n, k in shapes:
            for kind, fn in _products(DTYPES[name], m, n, k, device).items():
                seconds = _fastest(fn, budget_s / len(shapes) / 2, device)
                found.append((2.0 * m * n * k / seconds, f"{kind} {m}x{n}x{k}"))
        if probe is not None and name != "fp16":
            found.append((float(probe(name, budget_s / 4)), "gemm_probe"))
        flops[name], source[name] = max(found)
    return Roofline(flops, source, _copy_rate(budget_s / 4, device))


def _copy_rate(budget_s: float, device: str) -> float:
    size = _GPU_COPY_BYTES if device == "cuda" else _COPY_BYTES
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), budget_s, device)
