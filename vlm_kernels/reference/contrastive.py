"""InfoNCE and sigmoid losses in plain, dense PyTorch: the ground truth of the op `contrastive`.

Everything is written from the definition, holds the (N, M) matrix and leaves the gradients to
autograd. Features of 16 bits and fp32 are multiplied and reduced in fp32, fp64 features in fp64.
Arguments are taken as valid: the public functions in `vlm_kernels.ops.contrastive` check them.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor | None, Tensor | None]
Metrics = dict[str, Tensor]


class Pairs(NamedTuple):
    """Which pairs are positives, and which take part at all (all positives do); (N, M) bool."""

    positive: Tensor
    kept: Tensor


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    labels: Tensor | None = None,
    weights: Weights | None = None,
    label_smoothing: float = 0.0,
    ignore_same_ids: bool = False,
    directions: str = "both",
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Any:
    """InfoNCE of logit_scale * image_features @ text_features.T + logit_bias (CLIP, 2103.00020).

    Args:
        image_features: (N, D), fp64, fp32, bf16 or fp16.
        text_features: (M, D), the same dtype.
        logit_scale: float or tensor of shape () or (1,), not the logarithm; logit_bias alike.
        image_ids: (N,) integers; with text_ids (M,), pairs of equal ids are the positives.
        ignore_same_ids: the diagonal is the only positive, and other pairs of equal ids leave the
            denominators.
        labels: (N,) integers, the column of each row's positive; -1 is a row without one.
        weights: (row (N,) or None, column (M,) or None), factors of the row and column losses;
            constants, no gradient flows into them.
        label_smoothing: this much of a row's target is spread evenly over the pairs kept in its
            denominator.
        directions: "both" (half the sum of the two), "image_to_text" (rows) or "text_to_image"
            (columns).
        reduction: "mean" (over the rows that have a positive, by weight), "sum" or "none".

    Returns:
        A 0-d tensor, fp32 (fp64 for fp64 features), or for "none" a tuple (row (N,), column (M,)),
        0 where there is no positive. A mean whose weights sum to 0 is 0. With `return_metrics`, a
        tuple (loss, metrics).
    """
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    pairs = _pairs(logits, image_ids, text_ids, labels, ignore_same_ids)
    row_weight, column_weight = _weights(weights, logits)

    losses, means = [], []
    for direction, z, positive, kept, weight in (
        ("image_to_text", logits, pairs.positive, pairs.kept, row_weight),
        ("text_to_image", logits.T, pairs.positive.T, pairs.kept.T, column_weight),
    ):
        if directions not in ("both", direction):
            losses.append(logits.new_zeros(z.shape[0]))
            continue
        weight = weight * positive.any(1)
        loss = _cross_entropy(z, positive, kept, label_smoothing)
        losses.append(torch.where(weight != 0, loss, 0) * weight)
        means.append(_mean(losses[-1].sum(), weight.sum()))

    result: Tensor | tuple[Tensor, Tensor]
    if reduction == "none":
        result = (losses[0], losses[1])
    elif reduction == "sum":
        result = (losses[0].sum() + losses[1].sum()) / len(means)
    else:
        result = torch.stack(means).mean()
    return (result, _metrics(logits.detach(), pairs)) if return_metrics else result


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    labels: Tensor | None = None,
    weights: Weights | None = None,
    ignore_same_ids: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Any:
    """-log sigmoid(+-logit) over all pairs, + for positives (SigLIP, 2303.15343).

    Args: as `clip_loss`, with two differences. `weights` multiply each pair by row_i * column_j. A
    label of -1 leaves the row without a positive: there is no denominator to drop it from, so all
    its pairs are negatives.

    Returns:
        A 0-d tensor, fp32 (fp64 for fp64 features): the sum over all kept pairs, for "mean" over N
        or the sum of the row weights (0 where that is 0); for "none" the row sums (N,). With
        `return_metrics`, (loss, metrics).
    """
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    pairs = _pairs(logits, image_ids, text_ids, labels, ignore_same_ids)
    row_weight, column_weight = _weights(weights, logits)

    signed = torch.where(pairs.kept, torch.where(pairs.positive, logits, -logits), 0)
    rows = torch.where(pairs.kept, -F.logsigmoid(signed), 0).mul(column_weight).sum(1) * row_weight
    if reduction == "none":
        result = rows
    elif reduction == "sum":
        result = rows.sum()
    else:
        result = _mean(rows.sum(), row_weight.sum())
    return (result, _metrics(logits.detach(), pairs)) if return_metrics else result


def _logits(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None
) -> Tensor:
    device = image.device.type
    compute = torch.float64 if image.dtype == torch.float64 else torch.float32
    # Autocast would turn the product back into 16 bits.
    autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        logits = (image.to(compute) @ text.to(compute).T) * _scalar(scale, compute)
        return logits if bias is None else logits + _scalar(bias, compute)


def _scalar(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def _pairs(
    logits: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    ignore_same_ids: bool,
) -> Pairs:
    n, m = logits.shape
    columns = torch.arange(m, device=logits.device)
    if labels is not None:
        image_ids, text_ids = labels, columns
    diagonal = torch.arange(n, device=logits.device)[:, None] == columns
    same = diagonal if image_ids is None or text_ids is None else image_ids[:, None] == text_ids
    if ignore_same_ids:
        return Pairs(diagonal, diagonal | ~same)
    return Pairs(same, torch.ones_like(same))


def _weights(weights: Weights | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    row, column = (None, None) if weights is None else weights
    n, m = logits.shape
    return (
        logits.new_ones(n) if row is None else row.detach().to(logits.dtype),
        logits.new_ones(m) if column is None else column.detach().to(logits.dtype),
    )


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    # The inner `where` keeps the gradient of the branch not taken finite.
    return torch.where(weight != 0, total / torch.where(weight != 0, weight, 1), 0)


def _log_sum_exp(logits: Tensor, kept: Tensor) -> Tensor:
    # A row that keeps nothing gets logits of 0, whose gradient is finite, and -inf only afterwards.
    any_kept = kept.any(1)
    masked = torch.where(kept, logits, -torch.inf)
    lse = torch.logsumexp(torch.where(any_kept[:, None], masked, 0), 1)
    return torch.where(any_kept, lse, -torch.inf)


def _mean_of(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logits, 0).sum(1) / mask.sum(1).clamp(min=1)


def _cross_entropy(
    logits: Tensor, positive: Tensor, kept: Tensor, label_smoothing: float
) -> Tensor:
    hard, soft = _mean_of(logits, positive), _mean_of(logits, kept)
    target = (1 - label_smoothing) * hard + label_smoothing * soft
    return _log_sum_exp(logits, kept) - target


@torch.no_grad()
def _metrics(logits: Tensor, pairs: Pairs) -> Metrics:
    """Detached fp32 scalars; a mean over nothing is 0.

    A row is a top-1 hit when its best positive is strictly above every kept pair that is no
    positive.
    """
    metrics = {
        "positive_logit": _average(logits, pairs.positive),
        "negative_logit": _average(logits, pairs.kept & ~pairs.positive),
    }
    for direction, z, positive, kept in (
        ("image_to_text", logits, pairs.positive, pairs.kept),
        ("text_to_image", logits.T, pairs.positive.T, pairs.kept.T),
    ):
        hit = _largest(z, positive) > _largest(z, kept & ~positive)
        log_p = torch.where(kept, z - _log_sum_exp(z, kept)[:, None], 0)
        entropy = -torch.where(kept, log_p.exp() * log_p, 0).sum(1)
        metrics[f"{direction}_top1"] = _average(hit.to(z.dtype), positive.any(1))
        metrics[f"{direction}_entropy"] = entropy.sum() / max(len(entropy), 1)
        metrics[f"{direction}_perplexity"] = metrics[f"{direction}_entropy"].exp()
    return {name: value.float() for name, value in metrics.items()}


def _largest(logits: Tensor, mask: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf)
    return torch.where(mask, logits, -torch.inf).amax(1)


def _average(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
