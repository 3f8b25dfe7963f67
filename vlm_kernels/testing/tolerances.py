"""One rule of accuracy for all ops, so that no test or benchmark has a tolerance of its own.

Against fp64, an error may be a small factor of the error that the same formula has in eager PyTorch
at the same dtype, plus a floor of a few ulp of fp32. Tensors are judged by their relative L2 norm.

A scalar's error is a matter of luck, so it may be judged by the largest error that eager has over
several seeds. So may a tensor's, for no shape tells how many roundings its norm averages: those of
one row of logits can be all the error of a large gradient. Where a norm does average, each seed has
about the same error, and the largest is no looser than the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    factor: float
    """Largest ratio of our error to eager's."""
    ulps: float
    """Floor, in ulp of fp32, the dtype of all sums."""


TABLE = {"fwd": Tolerance(factor=2, ulps=4), "bwd": Tolerance(factor=3, ulps=4)}
MODELS = {"fwd": 1e-5, "bwd": 1e-4}
"""Largest relative error of a whole model in fp32, against the peer's in fp64."""

SEEDS = 8
"""Draws of the inputs over which eager's error is taken, the tested one first."""

FEW = 16
"""Tensors of fewer elements may also be off by an ulp of their own dtype: an exact value that the
dtype happens to hold is no sign that eager does better."""

ULP = torch.finfo(torch.float32).eps


def relative_error(ours: Tensor, exact: Tensor, terms: float = 0.0) -> float:
    """L2 norm of `ours - exact` over that of `exact`, in fp64.

    `terms` is the norm of the terms that cancel into `exact`, where they do (a loss is the
    difference of a log-sum-exp and a logit, its gradient that of two rows); the error is measured
    in it when it is the larger. Where both are 0 the error is absolute. NaN when `ours` is not
    finite.
    """
    if ours.shape != exact.shape:
        raise ValueError(f"relative_error: shape {tuple(ours.shape)}, not {tuple(exact.shape)}")
    difference = _double(ours) - _double(exact)
    if not _double(ours).isfinite().all():
        return math.nan
    return torch.linalg.vector_norm(difference).item() / _size(exact, terms)


def assert_close(
    name: str,
    ours: Tensor,
    eager: Tensor | float | Iterable[float],
    exact: Tensor,
    kind: str = "fwd",
    *,
    terms: float = 0.0,
) -> None:
    """Holds `ours` to the rule.

    Args:
        eager: the same formula's result at the dtype of `ours`, or the error it has, or its errors
            over SEEDS seeds, of which the largest counts. They are drawn until `ours` is held to
            be right.
        exact: fp64, from the same (already rounded) inputs, of the same shape.
        kind: "fwd" or "bwd", the row of TABLE.
        terms: see `relative_error`.

    Raises:
        AssertionError: names both errors, the limit and the first bad index.
        ValueError: `exact` or `eager` is not finite, or a kind that is not in TABLE.
    """
    if kind not in TABLE:
        raise ValueError(f"assert_close: kind is {kind!r}, expected one of {sorted(TABLE)}")
    if not exact.isfinite().all():
        raise ValueError(f"assert_close: the exact value of {name} is not finite")
    if ours.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    tolerance = TABLE[kind]
    error = relative_error(ours, exact, terms)
    floor = tolerance.ulps * ULP
    if ours.numel() < FEW:
        floor += torch.finfo(ours.dtype).eps * _size(exact) / _size(exact, terms)
    if isinstance(eager, Tensor):
        eager = relative_error(eager, exact, terms)
    reference, limit = 0.0, floor
    for each in (eager,) if isinstance(eager, float) else eager:
        if not math.isfinite(each):
            raise ValueError(f"assert_close: the eager value of {name} is not finite")
        reference = max(reference, each)
        limit = tolerance.factor * reference + floor
        # Not `error > limit`, which NaN would pass.
        if error <= limit:
            return
    # The first element with more than its share of the error allowed; there must be one.
    share = limit * _size(exact, terms) / math.sqrt(exact.numel())
    index = tuple((~((_double(ours) - _double(exact)).abs() <= share)).nonzero()[0].tolist())
    raise AssertionError(
        f"{name} ({kind}): error {error:.3e}, eager {reference:.3e}, limit {limit:.3e} "
        f"({tolerance.factor:g} x eager + {tolerance.ulps:g} ulp); first bad index {index}: "
        f"{ours[index].item():.9g}, exact {exact[index].item():.9g}"
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _size(exact: Tensor, terms: float = 0.0) -> float:
    return max(torch.linalg.vector_norm(_double(exact)).item(), terms) or 1.0
