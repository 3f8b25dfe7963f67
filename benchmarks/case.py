"""What the harness needs to know of an op: its cases, and who can compute them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .roofline import DTYPES

OURS = "vlm_kernels"
FALLBACKS = ("reference", "torch")
"""Backends that are plain PyTorch: what they run is not our kernel, so it never counts as ours."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        build: makes what the op's `Case` can call; what it raises becomes the reason of the row.
            The flag is handed to torch.compile as `dynamic`: static shapes are the kinder choice
            for a timed peer.
        matrices: score matrices of the inputs' dtype that forward and backward hold at their peak,
            to see whether a shape fits before trying it; 0 for ours.
        note: what exactly ran, such as the version of another library.
        keep: timed to the end however slow, because a target names it.
        floor: does a part of the op only; in the ratios of a row, but never its best peer.
        patterns: the cases it is for, by what the op's `Case.takes` goes by; cuda_patterns: more of
            them, on a GPU.
        around: entered while it is called, so that a choice made for it is no part of its time.
        workspace_mb, backend: ours only; a backend where it is not that of the whole run.
    """

    name: str
    build: Callable[[bool], Callable[..., Any]]
    matrices: float = 0.0
    note: str = ""
    keep: bool = False
    floor: bool = False
    patterns: tuple[str, ...] = ()
    cuda_patterns: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[object]] = nullcontext
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


@dataclass(frozen=True)
class Case:
    """One op, mode, dtype and shape. Each op has its own, in `benchmarks/peers/<op>.py`.

    `fn` below is what a `Provider` of the op built, `inputs` what `inputs()` returned.
    """

    op: str
    mode: str  # "fwd", "bwd" or "full"
    dtype: str  # a key of DTYPES

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.dtype} {self.shape}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        """One word, distinct among the cases of an op and a group."""
        raise NotImplementedError

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes that a row has: n, m, d, and what else the op gives."""
        raise NotImplementedError

    @property
    def option(self) -> str:
        """What `run --shapes` calls this case."""
        raise NotImplementedError

    @property
    def wrong(self) -> float:
        """An error against fp64 that only another function than the op has."""
        raise NotImplementedError

    @property
    def flops(self) -> float:
        raise NotImplementedError

    @property
    def bytes(self) -> float:
        raise NotImplementedError

    @property
    def matrix(self) -> int:
        """Elements of one score matrix."""
        raise NotImplementedError

    @property
    def returned_bytes(self) -> int:
        """Bytes of what a call returns; they are no part of the memory it needs."""
        raise NotImplementedError

    def takes(self, provider: Provider, device: str = "cpu") -> bool:
        """Whether a provider of the op is for cases of this kind on this device at all."""
        return True

    def refuses(self, peer: Provider) -> str:
        """Why a peer cannot compute this case, or an empty string."""
        return ""

    def inputs(self, device: str = "cpu") -> Any:
        raise NotImplementedError

    def tensors(self, inputs: Any) -> list[Tensor]:
        """Those of the inputs that have a gradient, in the order of our function's arguments."""
        raise NotImplementedError

    def call(self, fn: Callable[..., Any], inputs: Any) -> Callable[[], object]:
        """One call to time: the op under no_grad, the gradients of all inputs, or both."""
        raise NotImplementedError

    def results(self, fn: Callable[..., Any], inputs: Any) -> dict[str, Tensor]:
        """What the op returns, and but for "fwd" the gradients, each under its name."""
        raise NotImplementedError

    def exact(self, device: str = "cpu") -> dict[str, Tensor]:
        """The same in fp64."""
        raise NotImplementedError

    def for_error(self, most: int) -> Case:
        """This case, or one of at most `most` rows where fp64 would take too long."""
        return self

    def small(self) -> tuple[Case, ...]:
        """Cases to call before memory is measured, so that it is that of the call alone."""
        raise NotImplementedError

    def backend(self, requested: str, device: str = "cpu") -> str:
        """What runs our op on this case. What `vlm_kernels` raises comes through."""
        raise NotImplementedError
