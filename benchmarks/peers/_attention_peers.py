"""How people compute attention without us: each peer is a function of `attention.Inputs`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..case import Provider
from .attention import EPS, MASKS, PACKED, Inputs, Prepare, Run, per_image, rule

_SDPA = "F.scaled_dot_product_attention"
_EAGER = "matmul, softmax, matmul"
_DENSE = ("", "decode")
_FORCED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Product, softmax, product in the dtype of the inputs, as models had it before SDPA. Queries
    are scaled, not scores, as in CLIP: that is one pass over the scores less."""
    scale = 1 / math.sqrt(query.shape[-1])
    return (query * scale @ key.transpose(-2, -1)).softmax(-1) @ value


sdpa: Run = F.scaled_dot_product_attention


def explained(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor, **keywords: Any) -> Tensor:
    """`sdpa` with one backend chosen around it; where that refuses, torch says why in warnings, and
    here the error does."""
    try:
        return sdpa(query, key, value, *mask, **keywords)
    except RuntimeError as error:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with contextlib.suppress(RuntimeError):
                sdpa(query, key, value, *mask, **keywords)
        why = [str(warning.message).split(" (Triggered")[0].strip() for warning in said]
        # torch introduces each reason by a sentence of its own
        why = [text for text in why if not text.endswith("because:")]
        raise RuntimeError("; ".join([*why[:2], str(error).splitlines()[0]])) from error


# --- forms ---


def _dense(one: Run) -> Prepare:
    """As it is; where queries have more heads than keys, these share them."""

    def prepare(inputs: Inputs) -> Run:
        return functools.partial(one, enable_gqa=True) if inputs.pattern == "decode" else one

    return prepare


def _batched(one: Run) -> Prepare:
    """Sequences of one length as a batch: a view."""

    def prepare(inputs: Inputs) -> Run:
        size = (len(inputs.lengths), inputs.lengths[0])

        def run(*tensors: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in tensors)
            return one(q, k, v).transpose(1, 2).flatten(0, 1)

        return run

    return prepare


def _masked(one: Run, additive: bool = False) -> Prepare:
    """SDPA with a dense mask, made beforehand, in the form that the models it is for hand over."""

    def prepare(inputs: Inputs) -> Run:
        mask = inputs.dense_mask
        if additive:
            mask = torch.where(mask, 0.0, -math.inf).to(inputs.query.dtype)
        if not inputs.lengths:
            return lambda q, k, v: one(q, k, v, mask)

        def packed(*tensors: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in tensors)
            return one(q, k, v, mask)[0].transpose(0, 1)

        return packed

    return prepare


def _after_ops(one: Run, compiled: bool | None = None) -> Prepare:
    """Norm and rotation as operations of their own before attention, as in timm and transformers.
    `compiled` is torch.compile's dynamic; None: eager."""

    def prepare(inputs: Inputs) -> Run:
        assert inputs.rope is not None
        cos, sin = (torch.cat([x, x], -1).to(inputs.query.dtype) for x in inputs.rope)  # (N, D)

        def rotated(x: Tensor, weight: Tensor) -> Tensor:
            x = F.rms_norm(x, (x.shape[-1],), weight, EPS)
            left, right = x.chunk(2, -1)
            return x * cos + torch.cat([-right, left], -1) * sin

        def run(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
            return one(rotated(q, q_weight), rotated(k, k_weight), v)

        return run if compiled is None else _compiled(run, compiled)

    return prepare


def _compiled(function: Callable[..., Any], dynamic: bool) -> Run:
    """torch.compile, such that a backward that is timed alone can run again and again."""
    from torch._functorch import config

    compiled = torch.compile(function, dynamic=dynamic)

    def run(*tensors: Tensor, **keywords: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return compiled(*tensors, **keywords)
        with config.patch(donated_buffer=False):
            return compiled(*tensors, **keywords)

    return run


def _flex(dynamic: bool) -> Prepare:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = _compiled(flex_attention, dynamic)

    def prepare(inputs: Inputs) -> Run:
        device = inputs.query.device
        if inputs.lengths:
            lengths = torch.tensor(inputs.lengths, device=device)
            image = torch.repeat_interleave(lengths)  # (T,), of each token
            size = len(image)
            mask = create_block_mask(
                lambda b, h, q, k: image[q] == image[k], None, None, size, size, device=device
            )

            def packed(*tensors: Tensor) -> Tensor:
                q, k, v = (x.transpose(0, 1)[None] for x in tensors)
                return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

            return packed
        if inputs.pattern not in MASKS:
            return functools.partial(compiled, enable_gqa=inputs.pattern == "decode")
        (b, _, n, _), m = inputs.query.shape, inputs.key.shape[2]
        seen = rule(inputs.pattern, b, n, m, device)
        mask = create_block_mask(seen, b, None, n, m, device=device)
        return functools.partial(compiled, block_mask=mask)

    return prepare


def _varlen_attn(_: bool) -> Prepare:
    """torch's own packed attention, on FlashAttention-2; the longest is known beforehand."""
    attend: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def prepare(inputs: Inputs) -> Run:
        cu_seqlens, longest = inputs.cu_seqlens, max(inputs.lengths)
        return lambda q, k, v: attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    return prepare


def _flash_attn(_: bool) -> Prepare:
    flash_attn = importlib.import_module("flash_attn")

    def prepare(inputs: Inputs) -> Run:
        if inputs.lengths:
            cu_seqlens, longest = inputs.cu_seqlens, max(inputs.lengths)
            ends = (cu_seqlens, cu_seqlens, longest, longest)
            return lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *ends)

        def run(*tensors: Tensor) -> Tensor:
            out = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in tensors))
            return out.transpose(1, 2)

        return run

    return prepare


# --- who takes part ---


def _peer(
    name: str, prepare: Prepare, note: str, *patterns: str, matrices: float = 0.0
) -> Provider:
    keep = name in ("sdpa", "sdpa_per_image", "sdpa_batched")
    return Provider(name, lambda _: prepare, matrices, note, keep=keep, patterns=patterns)


def _forced(name: str, form: Callable[[Run], Prepare], note: str, *patterns: str) -> list[Provider]:
    """SDPA with each of its backends on a GPU; one that cannot is a row that says why."""
    return [
        Provider(
            f"{name}_{backend}",
            lambda _: form(explained),
            4.0 if backend == "math" else 0.0,
            f"{note}, {choice.name}",
            cuda_patterns=patterns,
            around=functools.partial(sdpa_kernel, choice),
        )
        for backend, choice in _FORCED.items()
    ]


def _after_norms() -> list[Provider]:
    def build(dynamic: bool) -> Prepare:
        return _after_ops(sdpa, compiled=dynamic)

    what = f"rms_norm, rotation, {_SDPA}"
    return [
        _peer("ops_sdpa", _after_ops(sdpa), what, "rope_norm"),
        *_forced("ops_sdpa", _after_ops, what, "rope_norm"),
        Provider(
            "compiled_ops_sdpa", build, note=f"{what}, torch.compile", cuda_patterns=("rope_norm",)
        ),
    ]


def _installed() -> list[Provider]:
    """flash-attn, where it is importable and there is a GPU to run it."""
    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        return []
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:  # on PYTHONPATH as a bare folder
        version = "of an unknown version"
    patterns = (*_DENSE, *PACKED)
    note = f"flash-attn {version}"
    return [Provider("flash_attn", _flash_attn, note=note, cuda_patterns=patterns)]


def peers() -> list[Provider]:
    """Every peer."""
    found = [
        _peer("sdpa", _dense(sdpa), _SDPA, *_DENSE),
        *_forced("sdpa", _dense, _SDPA, *_DENSE),
        _peer("eager", _dense(eager), _EAGER, "", matrices=4.0),
    ]
    for name, one, note in (("sdpa", sdpa, _SDPA), ("eager", eager, _EAGER)):
        found += [
            _peer(f"{name}_per_image", per_image(one), f"{note}, a call an image", *PACKED),
            _peer(f"{name}_batched", _batched(one), f"{note}, as a batch", "windows"),
        ]
    mask, additive = f"{_SDPA}, dense bool mask", f"{_SDPA}, dense additive mask"
    return [
        *found,
        *_forced("sdpa_batched", _batched, f"{_SDPA}, as a batch", "windows"),
        _peer("sdpa_mask", _masked(sdpa), mask, *PACKED, *MASKS),
        _peer("sdpa_additive_mask", _masked(sdpa, True), additive, *MASKS),
        *_forced("sdpa_mask", _masked, mask, *MASKS),
        *_after_norms(),
        Provider(
            "flex",
            _flex,
            note="FlexAttention, torch.compile",
            patterns=MASKS,
            cuda_patterns=(*_DENSE, *PACKED),
        ),
        Provider(
            "varlen_attn",
            _varlen_attn,
            note="torch.nn.attention.varlen",
            cuda_patterns=PACKED,
        ),
        *_installed(),
    ]
