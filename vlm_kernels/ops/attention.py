"""attention and attention_varlen: softmax attention that never holds the queries x keys matrix.

With them the builders of their arguments: `kv_range` (causal, causal_lower_right, sliding_window,
prefix_lm, image_blocks, per_image_cross_attention, padding, from_cu_seqlens, and intersect of
several), and the tables of `rope` (rope_1d, rope_2d, mrope).
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .. import _backends, config, reference
from .._load import _C, warn_once
from ._autocast import cast
from ._kv_range import (
    causal,
    causal_lower_right,
    from_cu_seqlens,
    image_blocks,
    intersect,
    padding,
    per_image_cross_attention,
    prefix_lm,
    sliding_window,
    to_mask,
)
from ._rope import grid_positions, mrope, rope_1d, rope_2d

__all__ = [
    "attention",
    "attention_varlen",
    "causal",
    "causal_lower_right",
    "from_cu_seqlens",
    "grid_positions",
    "image_blocks",
    "intersect",
    "mrope",
    "padding",
    "per_image_cross_attention",
    "prefix_lm",
    "rope_1d",
    "rope_2d",
    "sliding_window",
    "to_mask",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STYLES = ("half", "interleaved")
_NORMS = ("rms", "layer")
_LARGE_FALLBACK_BYTES = 2**30
_MAX_HEAD_DIM = 256  # of the Triton kernels
_NO_NORM = (None, None, 0.0, False)

Rope = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, str]
HeadNorm = tuple[Tensor, Tensor | None, float, str]
Window = tuple[int, int]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    kv_range: Tensor | None = None,
    softcap: float = 0.0,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention with the call of `torch.nn.functional.scaled_dot_product_attention`.

    softmax(scale * query @ key.mT + mask) @ value for each head, over the keys that a query may
    see, without the matrix of their products (FlashAttention, Dao et al., arXiv:2205.14135).
    is_causal, window, kv_range and attn_mask may come together: a query sees the keys that all of
    them allow. One that sees none has an output of 0, a log-sum-exp of -inf and no gradient.

    Args:
        query: (B, H, Nq, D), fp32, bf16 or fp16 (fp64 runs on the reference), D at most 256. Any
            strides with a contiguous last dimension are read in place: (B, N, H, D) data comes as
            `.transpose(1, 2)`.
        key: (B, Hkv, Nk, D), same dtype and device.
        value: (B, Hkv, Nk, Dv), same dtype and device; Dv may differ from D.
        attn_mask: broadcastable to (B, H, Nq, Nk). Bool: True where a query may see a key. Of
            fp32 or the dtype of query: added to the scaled product, with a gradient.
        dropout_p: 0; there is no dropout.
        is_causal: query i sees the keys j <= i, aligned at the first query and the first key as in
            torch; `kv_range=causal_lower_right(Nq, Nk)` aligns at the last.
        scale: default 1 / sqrt(D).
        enable_gqa: H may be a multiple of Hkv; each key head serves H / Hkv query heads (Ainslie et
            al., arXiv:2305.13245).
        window: (left, right): query i sees the keys i - left to i + right, both included; -1 is no
            limit.
        kv_range: (1 or B, 1 or H, Nq, 2) int32: query i sees the keys begin <= j < end, clamped to
            the keys there are. Constant. Its builders stand in `vlm_kernels.ops.attention`.
        softcap: above 0, s -> softcap * tanh(s / softcap) of the scaled product, before the mask
            (Gemma 2, arXiv:2408.00118).
        rope: (cos, sin) or (cos, sin, "half" | "interleaved"), fp32 (Nk, R/2) or (1 or B, Nk, R/2),
            constant: rotates the first R <= D features of queries and keys (RoFormer, Su et al.,
            arXiv:2104.09864), in pairs (i, i + R/2) or (2i, 2i + 1). Key j takes row j, query i
            row i + Nk - Nq: the queries are the last of the keys, as with a cache.
        q_norm: (weight, bias or None, eps, "rms" | "layer"), weight and bias (D,) or (H, D), of any
            floating dtype, with gradients: normalises each query of each head in fp32, before the
            rotation (Henry et al., arXiv:2010.04245).
        k_norm: the same for the keys, (D,) or (Hkv, D).
        return_lse: also return the log-sum-exp; it has a gradient.
        backend: "auto", "cpu", "triton" or "reference"; see `vlm_kernels.explain`.

    Returns:
        (B, H, Nq, Dv) in the dtype of the inputs. Its rows of one position lie together, as
        (B, N, H, D) data, where those of query do. With `return_lse` a tuple with the natural
        logarithm of sum(exp(scores)), (B, H, Nq) fp32.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work; the message names what
            came, what was expected and the fix.
        RuntimeError: the backend asked for cannot run this call.
    """
    if dropout_p != 0.0:
        raise ValueError(
            f"attention: dropout_p is {dropout_p}; there is no dropout of attention weights, pass "
            "0.0 (a model's own: `dropout_p if model.training else 0.0`)"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    chosen = _choose("attention", query, key, value, backend)
    if not enable_gqa and query.dim() == 4 == key.dim() and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"attention: query has {query.shape[1]} heads and key {key.shape[1]}; pass "
            "enable_gqa=True if each key head serves several query heads"
        )
    options = _options("attention", is_causal, window, scale, softcap, rope, q_norm, k_norm)
    args = (query, key, value, attn_mask, kv_range, None, None, *options)
    if chosen in ("reference", "triton"):
        _check_reference("attention", *args)
    if chosen == "reference":
        return reference.attention(
            query,
            key,
            value,
            attn_mask,
            0.0,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            kv_range=kv_range,
            softcap=softcap,
            rope=rope,
            q_norm=q_norm,
            k_norm=k_norm,
            return_lse=return_lse,
        )
    out, lse = _forward("attention", chosen, args)
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention within each of S packed segments: images, windows or sequences of any length.

    As flash-attention's `flash_attn_varlen_func`, without its max_seqlen.

    Args: as `attention`, except
        query: (Tq, H, D); key: (Tk, Hkv, D); value: (Tk, Hkv, Dv). H may be a multiple of Hkv.
        cu_seqlens_q: (S + 1,) int32 or int64, non-decreasing, from 0 to at most Tq: the queries of
            segment s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]. Segments may be empty. On
            CUDA the values stay on the device and are clamped; VLM_CHECK=1 has them checked, which
            waits for the device.
        cu_seqlens_k: the same for the keys, S + 1 entries too.
        is_causal: aligned at the last query and the last key of each segment: query i of nq sees
            the keys j <= i + nk - nq of nk.
        window: (left, right), around key i + nk - nq.
        rope: tables (Tk, R/2); row r belongs to key row r, whichever segment it is in. The queries
            of a segment take its last rows.

    Returns:
        (Tq, H, Dv), contiguous; with `return_lse` a tuple with (H, Tq) fp32. Rows that are in no
        segment have 0 and -inf.

    Raises:
        As `attention`; also ValueError for offsets that fall or end beyond the rows.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        query, key, value, _ = _autocast(query, key, value, None)
    chosen = _choose("attention_varlen", query, key, value, backend)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(
                f"attention_varlen: {name} is {type(cu_seqlens).__name__}, expected an int32 "
                "tensor of shape (segments + 1,)"
            )
    options = _options("attention_varlen", is_causal, window, scale, softcap, rope, q_norm, k_norm)
    args = (query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, *options)
    if chosen in ("reference", "triton"):
        _check_reference("attention_varlen", *args)
    elif chosen == "cuda" and _may_read(cu_seqlens_q):
        rows = (query.shape[0], key.shape[0])
        _check_seqlens("attention_varlen", cu_seqlens_q, cu_seqlens_k, *rows, rope is not None)
    if chosen == "reference":
        return reference.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            is_causal=is_causal,
            scale=scale,
            window=window,
            softcap=softcap,
            rope=rope,
            q_norm=q_norm,
            k_norm=k_norm,
            return_lse=return_lse,
        )
    out, lse = _forward("attention_varlen", chosen, args)
    return (out, lse) if return_lse else out


def _options(
    op: str,
    is_causal: bool,
    window: Window | None,
    scale: float | None,
    softcap: float,
    rope: Rope | None,
    q_norm: HeadNorm | None,
    k_norm: HeadNorm | None,
) -> tuple[Any, ...]:
    """The end of the schema's arguments, which both functions share."""
    left, right = (-1, -1) if window is None else _window(op, window)
    cos, sin, style = (None, None, "half") if rope is None else _rope(op, rope)
    q_norm_args = _NO_NORM if q_norm is None else _norm(op, "q_norm", q_norm)
    k_norm_args = _NO_NORM if k_norm is None else _norm(op, "k_norm", k_norm)
    numbers = (is_causal, left, right, scale, softcap)
    return (*numbers, cos, sin, style != "half", *q_norm_args, *k_norm_args)


def _forward(op: str, backend: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The registered op, gradients included: that of the extension has its autograd node in C++."""
    if backend == "triton":
        from .._triton import attention as kernels  # Triton is imported on first use

        return getattr(torch.ops, kernels.NAMESPACE).attention_fwd(*args)
    if torch.compiler.is_compiling():
        return torch.ops.vlm_kernels.attention_fwd(*args)
    try:
        return _C.attention_fwd(*args)
    except TypeError:
        _check_types(op, args)  # pybind11 lists signatures instead of naming the argument
        raise


_NAMES = (
    "query",
    "key",
    "value",
    "attn_mask",
    "kv_range",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "is_causal",
    "window[0]",
    "window[1]",
    "scale",
    "softcap",
    "rope[0]",
    "rope[1]",
    "rope[2]",
    "q_norm[0]",
    "q_norm[1]",
    "q_norm[2]",
    "q_norm[3]",
    "k_norm[0]",
    "k_norm[1]",
    "k_norm[2]",
    "k_norm[3]",
)
_OPTIONAL = (
    *("attn_mask", "kv_range", "cu_seqlens_q", "cu_seqlens_k", "scale", "rope[0]", "rope[1]"),
    *("q_norm[0]", "q_norm[1]", "k_norm[0]", "k_norm[1]"),
)
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("window[0]", "window[1]"), ((int, torch.SymInt), "an integer")),
    **dict.fromkeys(
        ("scale", "softcap", "q_norm[2]", "k_norm[2]"),
        ((int, float, torch.SymInt, torch.SymFloat), "a number"),
    ),
    **dict.fromkeys(
        ("is_causal", "rope[2]", "q_norm[3]", "k_norm[3]"), ((bool, torch.SymBool), "True or False")
    ),
}


def _check_types(op: str, args: tuple[Any, ...]) -> None:
    for name, value in zip(_NAMES, args, strict=True):
        expected, words = _TYPES.get(name, ((Tensor,), "a tensor"))
        if not isinstance(value, expected) and not (value is None and name in _OPTIONAL):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected {words}")


def _window(op: str, window: Any) -> Window:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(
            f"{op}: window is {window!r}, expected (left, right): numbers of keys, -1 for no limit"
        )
    return window[0], window[1]


def _rope(op: str, rope: Any) -> tuple[Tensor, Tensor, str]:
    if not isinstance(rope, (tuple, list)) or len(rope) not in (2, 3):
        raise ValueError(
            f"{op}: rope has type {type(rope).__name__}, expected (cos, sin) or (cos, sin, style)"
        )
    style = rope[2] if len(rope) == 3 else "half"
    if style not in _STYLES:
        raise ValueError(f"{op}: rope's style is {style!r}, expected one of {_listed(_STYLES)}")
    return rope[0], rope[1], style


def _norm(op: str, name: str, norm: Any) -> tuple[Tensor, Tensor | None, float, bool]:
    if not isinstance(norm, (tuple, list)) or len(norm) != 4:
        raise ValueError(
            f"{op}: {name} has type {type(norm).__name__}, expected (weight, bias or None, eps, "
            f"one of {_listed(_NORMS)})"
        )
    weight, bias, eps, kind = norm
    if kind not in _NORMS:
        raise ValueError(f"{op}: {name} is of the kind {kind!r}, expected one of {_listed(_NORMS)}")
    if weight is None:
        raise ValueError(f"{op}: {name} has no weight; pass ones for a plain normalisation")
    return weight, bias, eps, kind == "layer"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


def _autocast(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    """As torch's own of attention: an fp32 mask stays so."""
    wide = isinstance(mask, Tensor) and mask.dtype == torch.float32
    return cast(query), cast(key), cast(value), mask if wide else cast(mask)


def _choose(op: str, query: Any, key: Any, value: Any, backend: str) -> str:
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        came = ", ".join(type(x).__name__ for x in (query, key, value))
        raise TypeError(f"{op}: query, key and value are {came}; expected three tensors")
    if (
        _C is not None
        and (backend == "cpu" or (backend == "auto" and "VLM_BACKEND" not in os.environ))
        and query.dtype in _DTYPES
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
    ):
        return "cpu"
    chosen = _backends.select(op, backend, query, key, value)
    if chosen == "reference" and backend == "auto":
        _warn_large(op, query, key)
    return chosen


def _warn_large(op: str, query: Tensor, key: Tensor) -> None:
    if torch.compiler.is_compiling() or op != "attention" or query.dim() != 4 or key.dim() != 4:
        return
    size = query.shape[:3].numel() * key.shape[2] * max(4, query.element_size())
    if size > _LARGE_FALLBACK_BYTES:
        warn_once(
            f"{op} reference",
            f"{op} runs on its plain PyTorch reference for {query.dtype} on {query.device} and "
            f"holds the {tuple(query.shape[:3])} x {key.shape[2]} scores several times over, "
            f"{size / 2**30:.1f} GiB each; vlm_kernels.explain({op!r}, ...) says why",
            stacklevel=5,
        )


def _check_reference(op: str, *args: Any) -> None:
    """What csrc/ops/attention.cpp checks, for the backends that do not pass through it."""
    _check_types(op, args)
    query, key, value, mask, kv_range, cu_q, cu_k, _, left, right, scale, softcap, *rest = args
    cos, sin, _, q_weight, q_bias, q_eps, _, k_weight, k_bias, k_eps, _ = rest
    packed, shapes = cu_q is not None, [tuple(x.shape) for x in (query, key, value)]
    if [len(shape) for shape in shapes] != [3 if packed else 4] * 3:
        layout = "(T, H, D)" if packed else "(B, H, N, D)"
        raise ValueError(f"{op}: query, key and value are {shapes}, expected {layout}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise TypeError(
            f"{op}: query is {query.dtype}, key {key.dtype} and value {value.dtype}; expected one "
            "dtype, a floating-point one"
        )
    for name, x in zip(_NAMES, args, strict=True):
        if isinstance(x, Tensor) and x.device != query.device:
            raise ValueError(
                f"{op}: {name} is on {x.device} but query is on {query.device}; move it there "
                "with .to()"
            )
    rows = 0 if packed else 2
    heads, kv_heads, nq, nk = query.shape[1], key.shape[1], query.shape[rows], key.shape[rows]
    if (
        key.shape[:-1] != value.shape[:-1]
        or key.shape[-1] != query.shape[-1]
        or not (packed or key.shape[0] == query.shape[0])
        or 0 in (query.shape[-1], value.shape[-1], kv_heads)
        or heads % kv_heads != 0
    ):
        raise ValueError(
            f"{op}: query, key and value are {shapes}; expected one head dim D in query and key, "
            "heads of query that are a multiple of those of key, and key and value that differ in "
            "the last dimension only"
        )
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window is {(left, right)}, expected two numbers from -1 on")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected 0 for none or a positive number")
    if scale is not None and not abs(scale) < math.inf:
        raise ValueError(f"{op}: scale is {scale}, expected a finite number or None")
    if mask is not None:
        full = (query.shape[0], heads, nq, nk)
        pairs = zip(reversed(mask.shape), reversed(full))
        if mask.dim() > 4 or not all(n in (1, size) for n, size in pairs):
            raise ValueError(
                f"{op}: attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to "
                f"(B, H, Nq, Nk) = {full}"
            )
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"{op}: attn_mask is {mask.dtype}, expected bool, float32 or {query.dtype}"
            )
    if kv_range is not None:
        if kv_range.dtype != torch.int32:
            raise TypeError(f"{op}: kv_range is {kv_range.dtype}, expected int32")
        allowed = ((1, query.shape[0]), (1, heads), (nq,), (2,))
        if kv_range.dim() != 4 or not all(n in a for n, a in zip(kv_range.shape, allowed)):
            raise ValueError(
                f"{op}: kv_range has shape {tuple(kv_range.shape)}, expected one of {allowed}"
            )
    d = query.shape[-1]
    if cos is not None:
        if (
            cos.shape != sin.shape
            or cos.dim() not in ((2,) if packed else (2, 3))
            or cos.shape[-2] != nk
            or (cos.dim() == 3 and cos.shape[0] not in (1, query.shape[0]))
            or not 0 < 2 * cos.shape[-1] <= d
        ):
            raise ValueError(
                f"{op}: rope has tables {tuple(cos.shape)} and {tuple(sin.shape)}, expected a row "
                f"for each of the {nk} keys and at most {d // 2} columns"
            )
        if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, query.dtype):
            raise TypeError(f"{op}: rope has {cos.dtype} and {sin.dtype}, expected float32")
        if not packed and nq > nk:
            raise ValueError(f"{op}: rope came with {nq} queries and {nk} keys, which are fewer")
    for name, weight, bias, eps, count in (
        ("q_norm", q_weight, q_bias, q_eps, heads),
        ("k_norm", k_weight, k_bias, k_eps, kv_heads),
    ):
        if weight is None:
            continue
        if weight.shape not in ((d,), (count, d)) or not (
            bias is None or bias.shape == weight.shape
        ):
            raise ValueError(
                f"{op}: {name} has a weight of shape {tuple(weight.shape)}, expected ({d},) or "
                f"({count}, {d}), and a bias of the same shape or None"
            )
        if not 0 <= eps < math.inf:
            raise ValueError(f"{op}: {name} has eps {eps}, expected a number of at least 0")
    if packed:
        _check_seqlens(op, cu_q, cu_k, nq, nk, cos is not None)


def _check_seqlens(op: str, cu_q: Tensor, cu_k: Tensor, nq: int, nk: int, rope: bool) -> None:
    for name, cu, rows in (("cu_seqlens_q", cu_q, nq), ("cu_seqlens_k", cu_k, nk)):
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} is {cu.dtype}, expected int32 or int64")
        if cu.dim() != 1 or cu.shape[0] < 1 or cu_q.shape != cu_k.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(cu.shape)}, expected (segments + 1,), the same for "
                "queries and keys"
            )
        if not _may_read(cu):
            continue
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] > rows or ends != sorted(ends):
            raise ValueError(
                f"{op}: {name} is {ends}, expected non-decreasing offsets from 0 to at most {rows}"
            )
    if rope and _may_read(cu_q) and bool((cu_q.diff() > cu_k.diff()).any()):
        raise ValueError(f"{op}: rope came, and a segment has more queries than keys")


def _may_read(x: Tensor) -> bool:
    """Whether to check values: not those of a device, which would wait, unless VLM_CHECK=1."""
    return not torch.compiler.is_compiling() and (x.is_cpu or config.get("VLM_CHECK") == "1")


def _why_not_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> str | None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device.type != "cpu":
            return f"{name} is on {x.device}"
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"
    return None


def _why_not_cuda(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> str | None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device.type != "cuda":
            return f"{name} is on {x.device}"
        if x.dtype not in _DTYPES[1:]:
            return f"{name} is {x.dtype}; the kernels take bfloat16 and float16"
        if x.dim() and (x.shape[-1] % 8 != 0 or x.shape[-1] > 128):
            return (
                f"{name} has a head dim of {x.shape[-1]}; the kernels take multiples of 8 up to 128"
            )
    return None


def _why_not_triton(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    device = "cpu" if interpreted else "cuda"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device.type != device:
            when = " in the interpreter" if interpreted else ""
            return f"{name} is on {x.device}; Triton runs on {device}{when}"
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernels take float32, bfloat16 and float16"
        if x.dim() and x.shape[-1] > _MAX_HEAD_DIM:
            return f"{name} has a head dim of {x.shape[-1]}; the kernels take up to {_MAX_HEAD_DIM}"
    return None


for _op in ("attention", "attention_varlen"):
    _backends.register(_op, "cuda", _why_not_cuda)
    _backends.register(_op, "cpu", _why_not_cpu)
    _backends.register(_op, "triton", _why_not_triton)
    _backends.register(_op, "reference", lambda *_, **__: None)


def _heads_like(x: Tensor, features: Any) -> Tensor:
    """As csrc/ops: (B, N, H, D) data for such, else contiguous."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # heavy to import

    if x.dim() == 4 and guard_or_false(x.stride(1) < x.stride(2)):
        b, h, n, _ = x.shape
        return x.new_empty((b, n, h, features)).transpose(1, 2)
    return x.new_empty((*x.shape[:-1], features))


def register_fakes(namespace: str) -> None:
    """Shapes of the ops' results, for meta tensors and torch.compile."""

    @torch.library.register_fake(f"{namespace}::attention_fwd")
    def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
        packed = args[2] is not None
        rows = (query.shape[1], query.shape[0]) if packed else query.shape[:3]
        return (
            _heads_like(query, value.shape[-1]),
            query.new_empty(rows, dtype=torch.float32),
        )

    @torch.library.register_fake(f"{namespace}::attention_bwd")
    def _(grad: Tensor, grad_lse: Tensor | None, *args: Any) -> Any:
        query, key, value, mask = args[:4]
        norms = (args[15], args[16], args[19], args[20])
        needs = args[-1]

        def same(x: Tensor | None, bit: int) -> Tensor:
            if x is None or not needs >> bit & 1 or x.dtype == torch.bool:
                return query.new_empty(0)
            return x.new_empty(x.shape)

        return (
            *(
                _heads_like(x, x.shape[-1]) if needs >> bit & 1 else x.new_empty(0)
                for bit, x in enumerate((query, key, value))
            ),
            *(same(x, bit) for bit, x in enumerate((mask, *norms), 3)),
        )


if _C is not None:
    register_fakes("vlm_kernels")
