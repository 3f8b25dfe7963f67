"""What a benchmark row may run: our op, and the formulas people use without it.

Each provider is a loss of (image_features (N, D), text_features (M, D), logit_scale[, logit_bias]).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.specs import contrastive as spec

Loss = Callable[..., Tensor]
OPS = spec.OPS
OURS = "vlm_kernels"
FALLBACKS = ("reference", "torch")
"""Backends that are plain PyTorch: what they run is not our kernel, so it never counts as ours."""
_MATRICES = {  # (eager, compiled), peak RSS at N = 4096 and D = 512 under torch 2.13
    ("clip_loss", "open_clip"): (4.1, 2.4),
    ("clip_loss", "one_product"): (4.0, 2.0),
    ("siglip_loss", "open_clip"): (5.0, 1.3),
}


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        build: makes the loss; what it raises becomes the reason of the row. `dynamic` is handed to
            torch.compile: static shapes are the kinder choice for a timed peer.
        matrices: N x M matrices of the features' dtype that forward and backward hold at their
            peak, to see whether a shape fits before trying it; 0 for ours.
        note: what exactly ran, such as the version of another library.
        workspace_mb, backend: ours only; a backend where it is not that of the whole run.
    """

    name: str
    build: Callable[[bool], Loss]
    matrices: float = 0.0
    note: str = ""
    workspace_mb: int | None = None
    backend: str | None = None

    @property
    def ours(self) -> bool:
        return self.name == OURS

    @property
    def key(self) -> str:
        """Distinct within a row of the table."""
        where = "" if self.backend is None else f" on {self.backend}"
        size = "" if self.workspace_mb is None else f" ({self.workspace_mb} MB)"
        return self.name + where + size


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


def choose(op: str, names: str) -> list[Provider]:
    """Peers of an op by name: "all", "none", or names with commas between them.

    ValueError for a name that no op has; a name that only another op has is left out.
    """
    if names == "none":
        return []
    if names == "all":
        return peers(op)
    wanted = set(names.split(","))
    known = {peer.name for other in OPS for peer in peers(other)}
    if not wanted <= known:
        raise ValueError(
            f"unknown peer {', '.join(sorted(wanted - known))}; known: all, none, "
            + ", ".join(sorted(known))
        )
    return [peer for peer in peers(op) if peer.name in wanted]


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public function."""

    def build(dynamic: bool) -> Loss:
        loss = getattr(vlm_kernels, op)
        return functools.partial(loss, workspace_mb=workspace_mb, backend=backend)

    return Provider(OURS, build, workspace_mb=workspace_mb)


def named(op: str, name: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Ours or a peer, by its name."""
    return ours(op, workspace_mb, backend) if name == OURS else choose(op, name)[0]
