"""clip_loss and siglip_loss: contrastive losses that never hold the N x M similarity matrix."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _backends, config
from .._load import _C, warn_once
from ..reference import contrastive as _reference
from ._autocast import cast

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIRECTIONS = {"image_to_text": 1, "text_to_image": 2, "both": 3}
_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
_METRICS = (
    "image_to_text_top1",
    "text_to_image_top1",
    "positive_logit",
    "negative_logit",
    "image_to_text_entropy",
    "text_to_image_entropy",
    "image_to_text_perplexity",
    "text_to_image_perplexity",
)
_WORKSPACE_MB = {"cpu": 256, "cuda": 64}
_NEED_IMAGE, _NEED_TEXT, _NEED_SCALE, _NEED_BIAS = 1, 2, 4, 8
_LARGE_FALLBACK_BYTES = 2**30

Scalar = Tensor | float
Weights = tuple[Tensor | None, Tensor | None]


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
    workspace_mb: int | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Any:
    """Symmetric InfoNCE over all pairs of two batches (CLIP, Radford et al., arXiv:2103.00020).

    The logits are logit_scale * image_features @ text_features.T + logit_bias. Features are taken
    as they are: normalise them first.

    Args:
        image_features: (N, D), fp32, bf16 or fp16 (fp64 runs on the reference), any row stride.
        text_features: (M, D), same dtype and device.
        logit_scale: the exponentiated scale, as in open_clip: a tensor of shape () or (1,), whose
            gradient keeps its shape and dtype, or a float.
        logit_bias: added to every logit; it moves the metrics only, its gradient is exactly 0.
        image_ids, text_ids: (N,) and (M,) integers; pairs of equal ids are the positives. Without
            ids and labels the diagonal is.
        labels: (N,) integers, the row of text_features that belongs to each image; -1 leaves an
            image without a loss of its own, while it stays a negative for the texts. On CUDA
            other values count as -1, unless VLM_CHECK=1 has them checked, which waits for the
            device.
        weights: (row (N,) or None, column (M,) or None), factors of the losses of images and texts.
            They are constants.
        label_smoothing: in [0, 1), spread evenly over the entries of the denominator.
        ignore_same_ids: keep the diagonal as the only positive and take other pairs of equal ids
            out of the denominators.
        directions: "both" (half the sum of the two), "image_to_text" or "text_to_image".
        reduction: "mean" over the rows that have a positive, "sum" or "none".
        workspace_mb: MiB of scratch, similarity kept for the backward included (default 256, on
            CUDA 64). More of it saves recomputation, less of it memory; the loss does not change.
        return_metrics: also return a dict of detached fp32 scalars: image_to_text_top1,
            text_to_image_top1, positive_logit, negative_logit, and for each direction's softmax
            _entropy (nats) and _perplexity.
        backend: "auto", "cuda", "cpu", "triton" or "reference"; see `vlm_kernels.explain`.

    Returns:
        The loss, fp32 of shape (); for "none" a tuple (row (N,), column (M,)), 0 where there is
        no positive.        With `return_metrics`, a tuple (loss, metrics).

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work; the message names what
            came, what was expected and the fix.
        RuntimeError: the backend asked for cannot run this call.
    """
    if directions not in _DIRECTIONS:
        raise ValueError(_unknown("clip_loss", "directions", directions, _DIRECTIONS))
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        image_features, text_features = cast(image_features), cast(text_features)
    chosen = _choose("clip_loss", image_features, text_features, reduction, backend)
    if chosen in ("reference", "triton"):
        _check_reference(
            "clip_loss",
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids,
            text_ids,
            labels,
            weights,
            ignore_same_ids,
            workspace_mb,
        )
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"clip_loss: label_smoothing is {label_smoothing}, expected a number in [0, 1)"
            )
    if chosen == "reference":
        return _reference.clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            labels=labels,
            weights=weights,
            label_smoothing=label_smoothing,
            ignore_same_ids=ignore_same_ids,
            directions=directions,
            reduction=reduction,
            return_metrics=return_metrics,
        )
    if isinstance(labels, Tensor) and not labels.is_cpu:
        _check_labels("clip_loss", labels, text_features)
    scale, scale_value = _scalar("clip_loss", "logit_scale", logit_scale, image_features)
    row_weight, column_weight = _weights("clip_loss", weights)
    workspace_mb = _workspace_mb(image_features) if workspace_mb is None else workspace_mb
    tensors = (image_ids, text_ids, labels, row_weight, column_weight)
    options = (
        label_smoothing,
        ignore_same_ids,
        _DIRECTIONS[directions],
        _REDUCTIONS[reduction],
        workspace_mb,
    )
    bias = logit_bias if isinstance(logit_bias, Tensor) else None
    if bias is not None and (bias.numel() != 1 or bias.dim() > 1):
        raise ValueError(
            f"clip_loss: logit_bias has shape {tuple(bias.shape)}, expected () or (1,)"
        )
    metrics: Any = None
    if forward_ad._current_level >= 0:
        _refuse_tangents("clip_loss", image_features, text_features, scale)
    if torch.is_grad_enabled() and (
        image_features.requires_grad
        or text_features.requires_grad
        or (scale is not None and scale.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        panels = 0
        if chosen == "cpu":
            panels = _kept_panels(image_features, text_features, workspace_mb)
        one_pass = (
            directions != "both"
            and reduction != "none"
            and not return_metrics
            and _one_pass(image_features, text_features, panels, workspace_mb)
        )
        if chosen == "triton" or torch.compiler.is_compiling():
            loss = (_ClipOneWayFn if one_pass else _ClipLossFn).apply(
                image_features,
                text_features,
                scale,
                bias,
                (chosen, tensors, scale_value, panels, return_metrics, options),
            )
            if return_metrics:
                loss, metrics = loss
        elif one_pass:
            loss = _C.clip_loss_one_way(
                image_features, text_features, scale, scale_value, bias, *tensors, *options
            )
        else:
            loss, metrics = _C.clip_loss(
                image_features,
                text_features,
                scale,
                scale_value,
                bias,
                *tensors,
                *options,
                panels,
                return_metrics,
            )
    else:
        loss, _, _, metrics = _ops(chosen).clip_loss_fwd(
            image_features, text_features, scale, scale_value, *tensors, *options, 0, return_metrics
        )
    if reduction == "none":
        loss = loss.split((image_features.shape[0], text_features.shape[0]))
    return (loss, _metrics(metrics, logit_bias)) if return_metrics else loss


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
    workspace_mb: int | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Any:
    """Sigmoid loss over all pairs of two batches (SigLIP, Zhai et al., arXiv:2303.15343).

    The sum over pairs of -log sigmoid(z * logit), z = 1 for positives and -1 otherwise, with logits
    logit_scale * image_features @ text_features.T + logit_bias.

    Args: as `clip_loss`, with three differences. `logit_bias` takes part and has a gradient.
        `weights` multiply each pair by row_i * column_j. A label of -1 leaves an image without a
        positive: all its pairs are negatives. Same-id pairs off the diagonal add nothing under
        `ignore_same_ids`.

    Returns:
        The loss, fp32 of shape (): for "mean" the sum over N, or over the sum of the row weights;
        for "none" the row sums (N,). With `return_metrics`, a tuple (loss, metrics).

    Raises:
        As `clip_loss`.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        image_features, text_features = cast(image_features), cast(text_features)
    chosen = _choose("siglip_loss", image_features, text_features, reduction, backend)
    if chosen in ("reference", "triton"):
        _check_reference(
            "siglip_loss",
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids,
            text_ids,
            labels,
            weights,
            ignore_same_ids,
            workspace_mb,
        )
    if chosen == "reference":
        return _reference.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            labels=labels,
            weights=weights,
            ignore_same_ids=ignore_same_ids,
            reduction=reduction,
            return_metrics=return_metrics,
        )
    if isinstance(labels, Tensor) and not labels.is_cpu:
        _check_labels("siglip_loss", labels, text_features)
    scale, scale_value = _scalar("siglip_loss", "logit_scale", logit_scale, image_features)
    bias, bias_value = (
        (None, 0.0)
        if logit_bias is None
        else _scalar("siglip_loss", "logit_bias", logit_bias, image_features)
    )
    row_weight, column_weight = _weights("siglip_loss", weights)
    tensors = (image_ids, text_ids, labels, row_weight, column_weight)
    options = (
        ignore_same_ids,
        _REDUCTIONS[reduction],
        _workspace_mb(image_features) if workspace_mb is None else workspace_mb,
    )
    metrics: Any = None
    if forward_ad._current_level >= 0:
        _refuse_tangents("siglip_loss", image_features, text_features, scale, bias)
    if torch.is_grad_enabled() and (
        image_features.requires_grad
        or text_features.requires_grad
        or (scale is not None and scale.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        if chosen == "triton" or torch.compiler.is_compiling():
            values = (scale_value, bias_value, return_metrics)
            loss = _SiglipLossFn.apply(
                image_features, text_features, scale, bias, (chosen, tensors, values, options)
            )
            if return_metrics:
                loss, metrics = loss
        else:
            loss, metrics = _C.siglip_loss(
                image_features,
                text_features,
                scale,
                scale_value,
                bias,
                bias_value,
                *tensors,
                *options,
                return_metrics,
            )
    else:
        loss, _, _, _, metrics = _ops(chosen).siglip_loss_fwd(
            image_features,
            text_features,
            scale,
            scale_value,
            bias,
            bias_value,
            *tensors,
            *options,
            0,
            return_metrics,
        )
    return (loss, _metrics(metrics, logit_bias)) if return_metrics else loss


# For torch.compile and Triton. Eager calls of the extension have their nodes in C++, which cost
# less: csrc/ops/contrastive_autograd.cpp.


class _ClipLossFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        call: Any,  # one tuple: every further argument of `apply` costs time
    ) -> Any:
        backend, tensors, value, panels, metrics, options = call
        loss, stats, kept, measured = _ops(backend).clip_loss_fwd(
            image, text, scale, value, *tensors, *options, panels, metrics
        )
        ctx.save_for_backward(image, text, scale, bias, stats, kept)
        ctx.call = call
        if not metrics:
            return loss
        ctx.mark_non_differentiable(measured)
        return loss, measured

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        image, text, scale, bias, stats, kept = ctx.saved_tensors
        backend, tensors, value, _panels, _metrics, options = ctx.call
        need_image, need_text, need_scale, need_bias = ctx.needs_input_grad[:4]
        needs = _NEED_IMAGE * need_image + _NEED_TEXT * need_text + _NEED_SCALE * need_scale
        grads: Any = (None, None, None)
        if needs:
            grads = _ops(backend).clip_loss_bwd(
                grad, image, text, scale, value, *tensors, *options, stats, kept, needs
            )
        return (
            grads[0] if need_image else None,
            grads[1] if need_text else None,
            grads[2] if need_scale else None,
            torch.zeros_like(bias) if need_bias else None,  # no softmax depends on it
            None,
        )


class _ClipOneWayFn(torch.autograd.Function):
    """One direction, its gradients formed in the forward: 6 N M D instead of 8."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        call: Any,
    ) -> Any:
        backend, tensors, value, _panels, _metrics, options = call
        needs = _needs(ctx) & ~_NEED_BIAS
        loss, *formed = _ops(backend).clip_loss_one_way_fwd(
            image, text, scale, value, *tensors, *options, needs
        )
        ctx.save_for_backward(scale, bias, *formed)
        ctx.backend, ctx.value, ctx.needs, ctx.dtype = backend, value, needs, image.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, bias, *formed = ctx.saved_tensors
        grads = _ops(ctx.backend).clip_loss_one_way_bwd(grad, scale, ctx.value, *formed, ctx.needs)
        return (
            grads[0].to(ctx.dtype) if ctx.needs & _NEED_IMAGE else None,
            grads[1].to(ctx.dtype) if ctx.needs & _NEED_TEXT else None,
            grads[2] if ctx.needs & _NEED_SCALE else None,
            torch.zeros_like(bias) if ctx.needs_input_grad[3] else None,
            None,
        )


class _SiglipLossFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        call: Any,
    ) -> Any:
        backend, tensors, values, options = call
        scale_value, bias_value, metrics = values
        needs = _needs(ctx)
        loss, *formed, measured = _ops(backend).siglip_loss_fwd(
            image, text, scale, scale_value, bias, bias_value, *tensors, *options, needs, metrics
        )
        ctx.save_for_backward(image, text, scale, bias, *formed)
        ctx.call = call
        if not metrics:
            return loss
        ctx.mark_non_differentiable(measured)
        return loss, measured

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        image, text, scale, bias, *formed = ctx.saved_tensors
        backend, tensors, (scale_value, bias_value, _metrics), options = ctx.call
        needs = _needs(ctx)
        grads = _ops(backend).siglip_loss_bwd(
            grad,
            image,
            text,
            scale,
            scale_value,
            bias,
            bias_value,
            *tensors,
            *options,
            *formed,
            needs,
        )
        bits = (_NEED_IMAGE, _NEED_TEXT, _NEED_SCALE, _NEED_BIAS)
        needed = (g if needs & bit else None for g, bit in zip(grads, bits, strict=True))
        return (*needed, None)


def _needs(ctx: Any) -> int:
    bits = (_NEED_IMAGE, _NEED_TEXT, _NEED_SCALE, _NEED_BIAS)
    return sum(bit * need for bit, need in zip(bits, ctx.needs_input_grad, strict=False))


def _ops(backend: str) -> Any:
    """The extension's functions, or under torch.compile the ops that it can see."""
    if backend == "triton":
        from .._triton import contrastive as kernels  # Triton is imported on first use

        return getattr(torch.ops, kernels.NAMESPACE)
    return torch.ops.vlm_kernels if torch.compiler.is_compiling() else _C


def _refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """The ops would drop a tangent silently."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (jvp, jacfwd); use reverse mode, backward() "
                "or torch.autograd.grad, or backend='reference'"
            )


def _workspace_mb(image: Tensor) -> int:
    return _WORKSPACE_MB.get(image.device.type, 64)


def _kept_panels(image: Tensor, text: Tensor, workspace_mb: int) -> Any:
    """How many panels of 64 columns of similarity the workspace holds for the backward."""
    if image.dim() != 2 or text.dim() != 2 or not image.is_cpu:
        return 0  # an error that the op itself names, or kernels that recompute
    reserve = 12288 * image.shape[1] + (4 << 20)  # bytes of a block's operands
    free = max(0, (workspace_mb << 20) - reserve)
    fit = free // (image.shape[0] * 256 + 1) // 4 * 4  # whole tiles of panels, or everything
    panels = (text.shape[0] + 63) // 64
    return min(fit, panels) if isinstance(panels, int) else torch.sym_min(fit, panels)


def _one_pass(image: Tensor, text: Tensor, panels: int, workspace_mb: int) -> bool:
    """Whether one direction forms its gradients in the forward: not where the similarity is kept
    anyway, nor where the scratch does not hold enough columns of it."""
    if torch.compiler.is_compiling() or panels * 64 >= text.shape[0]:
        return False
    longest = max(image.shape[0], text.shape[0])
    if not image.is_cpu:  # rows of S and G as long as the softmax, enough of them for the products
        bytes_ = 1024 * longest * (4 if image.dtype == torch.float32 else 6)
        return bytes_ <= workspace_mb << 20
    return 2 * longest * 1024 <= workspace_mb << 20


def _unknown(op: str, name: str, value: object, known: dict[str, int]) -> str:
    return f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, known))}"


def _choose(op: str, image: Tensor, text: Tensor, reduction: str, backend: str) -> str:
    if reduction not in _REDUCTIONS:
        raise ValueError(_unknown(op, "reduction", reduction, _REDUCTIONS))
    if not isinstance(image, Tensor) or not isinstance(text, Tensor):
        raise TypeError(
            f"{op}: image_features is {type(image).__name__} and text_features "
            f"{type(text).__name__}, expected two tensors"
        )
    if (
        _C is not None
        and (backend == "cpu" or (backend == "auto" and "VLM_BACKEND" not in os.environ))
        and image.dtype in _DTYPES
        and image.device.type == "cpu"
        and text.device.type == "cpu"
    ):
        return "cpu"
    chosen = _backends.select(op, backend, image, text)
    if chosen == "reference" and backend == "auto" and image.dim() == 2 and text.dim() == 2:
        _warn_large(op, image, text)
    return chosen


def _warn_large(op: str, image: Tensor, text: Tensor) -> None:
    size = image.shape[0] * text.shape[0] * max(4, image.element_size())
    if not torch.compiler.is_compiling() and size > _LARGE_FALLBACK_BYTES:
        warn_once(
            f"{op} reference",
            f"{op} runs on its plain PyTorch reference for {image.dtype} on {image.device} and "
            f"holds the {image.shape[0]} x {text.shape[0]} matrix several times over, "
            f"{size / 2**30:.1f} GiB each; vlm_kernels.explain({op!r}, ...) says why",
        )


def _check_labels(op: str, labels: Tensor, text: Tensor) -> None:
    """Waits for the device, and only where VLM_CHECK=1 asks for it."""
    if torch.compiler.is_compiling() or config.get("VLM_CHECK") != "1":
        return
    wrong = (labels < -1) | (labels >= text.shape[0])
    if bool(wrong.any()):
        raise ValueError(
            f"{op}: labels holds {int(labels[wrong][0])}, expected a row of text_features in "
            f"[0, {text.shape[0]}) or -1 for none"
        )


def _scalar(
    op: str, name: str, value: Scalar, features: Tensor | None = None
) -> tuple[Tensor | None, float]:
    if isinstance(value, Tensor):
        # equal devices are the rule, and told apart fastest where both are CPUs
        both_cpu = features is None or (value.is_cpu and features.is_cpu)
        if not both_cpu and features is not None and value.device != features.device:
            raise ValueError(
                f"{op}: {name} is on {value.device} but the features are on {features.device}; "
                "move it there with .to()"
            )
        return value, 0.0
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a float or a tensor")
    return None, float(value)


def _weights(op: str, weights: Any) -> Weights:
    if weights is None:
        return None, None
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        length = len(weights) if hasattr(weights, "__len__") else "none"
        raise ValueError(
            f"{op}: weights has type {type(weights).__name__} and length {length}, expected a "
            "pair (row (N,) or None, column (M,) or None)"
        )
    return weights[0], weights[1]


def _metrics(values: Tensor, bias: Scalar | None) -> dict[str, Tensor]:
    *metrics, any_positive, any_negative = values.unbind()
    named = dict(zip(_METRICS, metrics, strict=True))
    if bias is not None:
        offset = bias.detach().float().reshape(()) if isinstance(bias, Tensor) else bias
        named["positive_logit"] = named["positive_logit"] + offset * any_positive
        named["negative_logit"] = named["negative_logit"] + offset * any_negative
    return named


def _check_reference(
    op: str,
    image: Tensor,
    text: Tensor,
    scale: Scalar,
    bias: Scalar | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    labels: Tensor | None,
    weights: Weights | None,
    ignore_same_ids: bool,
    workspace_mb: int | None,
) -> None:
    """What csrc/ops/contrastive.cpp checks, for the backend that does not pass through it."""
    for name, x, layout in (("image_features", image, "(N, D)"), ("text_features", text, "(M, D)")):
        if x.dim() != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}, expected 2 dimensions {layout}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} is {x.dtype}, expected a floating-point dtype")
    if image.shape[1] != text.shape[1] or image.shape[1] == 0:
        raise ValueError(
            f"{op}: image_features has shape {tuple(image.shape)} and text_features "
            f"{tuple(text.shape)}; expected the same embedding size D > 0 in both"
        )
    if image.dtype != text.dtype:
        raise TypeError(
            f"{op}: image_features is {image.dtype} and text_features {text.dtype}; expected one "
            "dtype, convert one with .to(dtype)"
        )
    for name, value in (("logit_scale", scale), ("logit_bias", bias)):
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.dim() > 1:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(value.shape)}, expected () or (1,)"
                )
            if not value.is_floating_point():
                raise TypeError(f"{op}: {name} is {value.dtype}, expected a floating-point tensor")
        elif value is not None:
            _scalar(op, name, value, image)
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"{op}: pass image_ids and text_ids together; only one came")
    if labels is not None and image_ids is not None:
        raise ValueError(f"{op}: labels came with image_ids and text_ids; pass one")
    if ignore_same_ids and image_ids is None:
        raise ValueError(f"{op}: ignore_same_ids=True needs image_ids and text_ids")
    n, m = image.shape[0], text.shape[0]
    row, column = _weights(op, weights)
    for name, vector, length, integral in (
        ("image_ids", image_ids, n, True),
        ("text_ids", text_ids, m, True),
        ("labels", labels, n, True),
        ("weights[0]", row, n, False),
        ("weights[1]", column, m, False),
    ):
        if vector is None:
            continue
        if vector.shape != (length,):
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}, expected ({length},)")
        floating = vector.is_floating_point()
        if floating == integral or vector.dtype == torch.bool or vector.is_complex():
            kind = "integer" if integral else "floating-point"
            raise TypeError(f"{op}: {name} is {vector.dtype}, expected a {kind} tensor")
    for name, other in (
        ("text_features", text),
        ("logit_scale", scale),
        ("logit_bias", bias),
        ("image_ids", image_ids),
        ("text_ids", text_ids),
        ("labels", labels),
        ("weights[0]", row),
        ("weights[1]", column),
    ):
        if isinstance(other, Tensor) and other.device != image.device:
            raise ValueError(
                f"{op}: {name} is on {other.device} but the features are on {image.device}; "
                "move it there with .to()"
            )
    if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels < -1) | (labels >= m)
        if bool(wrong.any()):
            raise ValueError(
                f"{op}: labels holds {int(labels[wrong][0])}, expected a row of text_features in "
                f"[0, {m}) or -1 for none"
            )
    if workspace_mb is not None and workspace_mb <= 0:
        raise ValueError(f"{op}: workspace_mb is {workspace_mb}, expected a positive number of MiB")


def _why_not_cpu(image_features: Tensor, text_features: Tensor, *_: Any, **__: Any) -> str | None:
    for name, x in (("image_features", image_features), ("text_features", text_features)):
        if x.device.type != "cpu":
            return f"{name} is on {x.device}"
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"
    return None


def _why_not_cuda(image_features: Tensor, text_features: Tensor, *_: Any, **__: Any) -> str | None:
    for name, x in (("image_features", image_features), ("text_features", text_features)):
        if x.device.type != "cuda":
            return f"{name} is on {x.device}"
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"
    return None


def _why_not_triton(
    image_features: Tensor, text_features: Tensor, *_: Any, **__: Any
) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    device = "cpu" if interpreted else "cuda"
    for name, x in (("image_features", image_features), ("text_features", text_features)):
        if x.device.type != device:
            when = " in the interpreter" if interpreted else ""
            return f"{name} is on {x.device}; Triton runs on {device}{when}"
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"
    return None


for _op in ("clip_loss", "siglip_loss"):
    _backends.register(_op, "cuda", _why_not_cuda)
    _backends.register(_op, "cpu", _why_not_cpu)
    _backends.register(_op, "triton", _why_not_triton)
    _backends.register(_op, "reference", lambda *_, **__: None)


def _empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def register_fakes(namespace: str) -> None:
    """Shapes of the ops' results, for meta tensors and torch.compile."""

    @torch.library.register_fake(f"{namespace}::clip_loss_fwd")
    def _(image: Tensor, text: Tensor, *args: Any) -> Any:
        n, m, (reduction, _, panels, metrics) = image.shape[0], text.shape[0], args[-4:]
        f32 = torch.float32
        stats = 7 if metrics else 4 if args[7] > 0 else 3
        loss = _empty(image, *((n + m,) if reduction == 2 else ()), dtype=f32)
        return (
            loss,
            _empty(image, stats, n + m, dtype=f32),
            _empty(image, panels * n * 64, dtype=f32),
            _empty(image, len(_METRICS) + 2 if metrics else 0, dtype=f32),
        )

    @torch.library.register_fake(f"{namespace}::clip_loss_bwd")
    def _(grad: Tensor, image: Tensor, text: Tensor, scale: Tensor | None, *args: Any) -> Any:
        needs = args[-1]
        return (
            _grad_of(image, needs & _NEED_IMAGE),
            _grad_of(text, needs & _NEED_TEXT),
            _scalar_grad_of(scale, needs & _NEED_SCALE, image),
        )

    @torch.library.register_fake(f"{namespace}::clip_loss_one_way_fwd")
    def _(image: Tensor, text: Tensor, *args: Any) -> Any:
        return (
            _empty(image, dtype=torch.float32),
            _formed(image, args[-1] & _NEED_IMAGE),
            _formed(text, args[-1] & _NEED_TEXT),
            _empty(image, 2, dtype=torch.float64),
        )

    @torch.library.register_fake(f"{namespace}::clip_loss_one_way_bwd")
    def _(
        grad: Tensor,
        scale: Tensor | None,
        _value: float,
        formed_image: Tensor,
        formed_text: Tensor,
        sums: Tensor,
        needs: int,
    ) -> Any:
        return (
            _grad_of(formed_image, needs & _NEED_IMAGE),
            _grad_of(formed_text, needs & _NEED_TEXT),
            _scalar_grad_of(scale, needs & _NEED_SCALE, formed_image),
        )

    @torch.library.register_fake(f"{namespace}::siglip_loss_fwd")
    def _(image: Tensor, text: Tensor, *args: Any) -> Any:
        reduction, _, needs, metrics = args[-4:]
        now = 0 if reduction == 2 else needs
        return (
            _empty(image, *(image.shape[:1] if reduction == 2 else ()), dtype=torch.float32),
            _formed(image, now & _NEED_IMAGE),
            _formed(text, now & _NEED_TEXT),
            _empty(image, 2 if now else 0, dtype=torch.float64),
            _empty(image, len(_METRICS) + 2 if metrics else 0, dtype=torch.float32),
        )

    @torch.library.register_fake(f"{namespace}::siglip_loss_bwd")
    def _(
        grad: Tensor,
        image: Tensor,
        text: Tensor,
        scale: Tensor | None,
        _value: float,
        bias: Tensor | None,
        *args: Any,
    ) -> Any:
        needs = args[-1]
        return (
            _grad_of(image, needs & _NEED_IMAGE),
            _grad_of(text, needs & _NEED_TEXT),
            _scalar_grad_of(scale, needs & _NEED_SCALE, image),
            _scalar_grad_of(bias, needs & _NEED_BIAS, image),
        )


def _grad_of(x: Tensor, needed: int) -> Tensor:
    return _empty(x, *(x.shape if needed else (0,)))


def _formed(x: Tensor, needed: int) -> Tensor:
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return _empty(x, *(x.shape if needed else (0,)), dtype=dtype)


def _scalar_grad_of(x: Tensor | None, needed: int, features: Tensor) -> Tensor:
    if not needed or x is None:
        return _empty(features, 0, dtype=torch.float32)
    return torch.empty_like(x)


if _C is not None:
    register_fakes("vlm_kernels")
