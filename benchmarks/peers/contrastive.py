"""`clip_loss` and `siglip_loss`: what is timed, and the formulas people use without us.

A provider builds a loss of (image (N, D), text (M, D), logit_scale[, logit_bias]).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels import _backends
from vlm_kernels.reference import contrastive as reference
from vlm_kernels.testing.specs import contrastive as spec

from .. import case, targets
from ..case import OURS, Provider

Loss = Callable[..., Tensor]
OPS = spec.OPS
MODES = ("fwd", "full")
SHAPES = "NxD or NxMxD"
AXES = "N x D"
GROUPS = ("",)
# A trained CLIP and a trained SigLIP.
_SCALES: dict[str, tuple[float, float | None]] = {
    "clip_loss": (100.0, None),
    "siglip_loss": (117.0, -16.5),
}
_WARM_UP = (256, 384)
"""Rows of the calls before memory is measured: two sizes, so that torch.compile turns dynamic."""
_MATRICES = {  # (eager, compiled), peak RSS at N = 4096 and D = 512 under torch 2.13
    ("clip_loss", "open_clip"): (4.1, 2.4),
    ("clip_loss", "one_product"): (4.0, 2.0),
    ("siglip_loss", "open_clip"): (5.0, 1.3),
}


@dataclass(frozen=True)
class Case(case.Case):
    n: int
    m: int
    d: int

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.d}" if self.n == self.m else f"{self.n}x{self.m}x{self.d}"

    @property
    def fields(self) -> dict[str, Any]:
        return {"n": self.n, "m": self.m, "d": self.d}

    @property
    def option(self) -> str:
        return f"{self.n}x{self.m}x{self.d}"

    @property
    def wrong(self) -> float:
        return 1e-2 if self.dtype == "fp32" else 0.5

    @property
    def flops(self) -> float:
        return spec.flops(self.op, self.n, self.m, self.d, self.mode)

    @property
    def bytes(self) -> float:
        return spec.bytes_moved(self.op, self.n, self.m, self.d, self.torch_dtype, self.mode)

    @property
    def matrix(self) -> int:
        return self.n * self.m

    @property
    def returned_bytes(self) -> int:
        size = (self.n + self.m) * self.d * self.torch_dtype.itemsize
        return size if self.mode == "full" else 0

    def refuses(self, peer: Provider) -> str:
        return "" if self.n == self.m else "pairs rows with columns one to one"

    def inputs(self, device: str = "cpu") -> spec.Inputs:
        scale, bias = _SCALES[self.op]
        return spec.make_inputs(
            self.n, self.m, self.d, self.torch_dtype, device=device, scale=scale, bias=bias
        )

    def tensors(self, inputs: spec.Inputs) -> list[Tensor]:
        return _present(inputs)

    def call(self, fn: Loss, inputs: spec.Inputs) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_(self.mode == "full") for x in _present(inputs)]

        def forward() -> Tensor:
            with torch.no_grad():
                return fn(*leaves)

        def full() -> tuple[Tensor, ...]:
            return torch.autograd.grad(fn(*leaves), leaves)

        return {"fwd": forward, "full": full}[self.mode]

    def results(self, fn: Loss, inputs: spec.Inputs) -> dict[str, Tensor]:
        if self.mode == "full":
            found = spec.evaluate(lambda *x: fn(*_present(x)), inputs, {})
            return {name.removesuffix(".grad"): value for name, value in found.items()}
        with torch.no_grad():
            return {"loss": fn(*_present(inputs))}

    def exact(self, device: str = "cpu") -> dict[str, Tensor]:
        inputs = self.inputs(device).to(torch.float64)
        return self.results(getattr(reference, self.op), inputs)

    def for_error(self, most: int) -> Case:
        return replace(self, n=min(self.n, most), m=min(self.m, most))

    def small(self) -> tuple[Case, ...]:
        return tuple(replace(self, n=rows, m=rows) for rows in _WARM_UP)

    def backend(self, requested: str, device: str = "cpu") -> str:
        small = replace(self, n=min(self.n, 8), m=min(self.m, 8))
        return _backends.select(self.op, requested, *_present(small.inputs(device)))


def _present(inputs: Iterable[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None]


# --- what is run ---


def overhead(op: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of the call that the overhead is measured on."""
    return _present(Case(op, "full", "fp32", 4, 4, 16).inputs()), {}


def cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, list[int | None]]]:
    """What to time, and with which workspaces of ours (None: its default)."""
    shapes = _shapes(args.shapes)
    if shapes is None:
        shapes = [(n, n, d) for n, d in (targets.SHAPES[:1] if args.quick else targets.SHAPES)]
    found = []
    for op in ops:
        for mode in args.mode or ["full"]:
            for dtype in args.dtype:
                for n, m, d in shapes:
                    workspaces: list[int | None] = [args.workspace_mb]
                    tight = op == "clip_loss" and (n, d) in targets.TIGHT and n == m
                    if tight and mode == "full" and args.workspace_mb is None:
                        workspaces.append(targets.TIGHT_MB)
                    found.append((Case(op, mode, dtype, n, m, d), workspaces))
    return found


def memory_cases(args: argparse.Namespace, ops: Iterable[str]) -> list[tuple[Case, int | None]]:
    """What to measure the memory of, and the workspace of ours."""
    n, d = targets.MEMORY_SHAPE
    (n, m, d), *_ = _shapes(args.memory_shape) or [(n, n, d)]
    workspace = args.workspace_mb or targets.MEMORY_MB
    choices = [(op, dtype) for op in ops for dtype in args.dtype]
    return [(Case(op, "full", dtype, n, m, d), workspace) for op, dtype in choices]


def _shapes(shapes: list[str] | None) -> list[tuple[int, int, int]] | None:
    """(N, M, D) of each. ValueError for one that is neither (N, D) nor (N, M, D)."""
    if shapes is None:
        return None
    found = []
    for shape in shapes:
        sizes = [int(size) for size in shape.split("x")] if ":" not in shape else []
        if len(sizes) not in (2, 3):
            raise ValueError(f"{shape!r} is not {SHAPES}, as {'/'.join(OPS)} need it")
        found.append((sizes[0], sizes[-2] if len(sizes) == 3 else sizes[0], sizes[-1]))
    return found


# --- who computes it ---


def one_product(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE as transformers has it, and open_clip where it gathers features: the second
    direction's logits are a transpose of the first's, which saves open_clip's second product."""
    labels = torch.arange(image.shape[0], device=image.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@functools.cache
def _formulas(op: str) -> dict[str, tuple[Loss, Loss, str]]:
    """name -> (what runs eagerly, what is compiled, what the eager one is)."""
    formula = spec.PEERS[op]["open_clip"]
    installed = _installed_open_clip({"clip_loss": "ClipLoss", "siglip_loss": "SigLipLoss"}[op])
    eager, note = installed if installed is not None else (formula, "open_clip's formula")
    found = {"open_clip": (eager, formula, note)}
    if op == "clip_loss":
        found["one_product"] = (one_product, one_product, "transformers' formula")
    return found


def _inf_cl() -> Loss:
    """Inf-CL's loss of both directions. The one without a ring: that one's gradient of the scale
    needs torch.distributed."""
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = cal_flash_loss(image, text, scale=scale)
        return (rows.mean() + cal_flash_loss(text, image, scale=scale).mean()) / 2

    return loss


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fused_siglip_loss(image, text, scale.log(), bias)

    return loss


_GPU_ONLY: dict[str, tuple[str, str, Callable[[], Loss]]] = {  # op -> name, distribution, loss
    "clip_loss": ("inf_cl", "inf-cl", _inf_cl),
    "siglip_loss": ("siglip_kernel", "siglip-kernel", _siglip_kernel),
}


def _gpu_peers(op: str) -> list[Provider]:
    """The fused losses of others, where they are importable and there is a GPU to run them."""
    name, distribution, build = _GPU_ONLY[op]
    if not torch.cuda.is_available() or importlib.util.find_spec(name) is None:
        return []
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:  # on PYTHONPATH as a bare folder
        version = "of an unknown version"
    return [Provider(name, lambda dynamic: build(), note=f"{distribution} {version}")]


def _installed_open_clip(name: str) -> tuple[Loss, str] | None:
    """A loss of open_clip and its version, where that is installed.

    loss.py is loaded by its path: importing the package needs torchvision and timm as well.
    """
    try:
        distribution = metadata.distribution("open_clip_torch")
        file = str(distribution.locate_file("open_clip/loss.py"))
        module_spec = importlib.util.spec_from_file_location("open_clip_loss", file)
        assert module_spec is not None
        assert module_spec.loader is not None
        module: Any = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    except (ImportError, OSError):  # PackageNotFoundError is an ImportError
        return None
    return getattr(module, name)(), f"open_clip_torch {distribution.version}"


def peers(op: str) -> list[Provider]:
    """Every peer of an op: each formula eager and under torch.compile, others' fused losses."""
    return [peer for name in _formulas(op) for peer in _pair(op, name)] + _gpu_peers(op)


def _pair(op: str, name: str) -> tuple[Provider, Provider]:
    eager, formula, note = _formulas(op)[name]
    held, held_compiled = _MATRICES[op, name]
    return (
        Provider(name, lambda dynamic: eager, held, note),
        Provider(
            f"{name}_compile",
            lambda dynamic: torch.compile(formula, dynamic=dynamic),
            held_compiled,
            f"{name}'s formula, torch.compile",
        ),
    )


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public function."""

    def build(dynamic: bool) -> Loss:
        loss = getattr(vlm_kernels, op)
        return functools.partial(loss, workspace_mb=workspace_mb, backend=backend)

    return Provider(OURS, build, workspace_mb=workspace_mb)
