"""Hugging Face transformers: `attn_implementation="vlm_kernels"`.

Two of transformers' own registries are written to, AttentionInterface and AttentionMaskInterface
(transformers >= 4.57); nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._load import warn_once
from ..ops.attention import attention, attention_varlen
from . import _masks

_SELECTIONS = ("indices", "block_indices")  # the keys that sparse-attention models select


def register_attention(
    name: str = "vlm_kernels", *, contiguous: bool = False, backend: str = "auto"
) -> None:
    """Makes `attn_implementation=name` a choice in Hugging Face transformers.

    Masks that are one interval of keys a query (causal, sliding window, chunked, packed sequences,
    image blocks, prefixes, padding on either side) become a `kv_range`; the dense (B, 1, N, N) mask
    is built for what is left, and under torch.compile for padding and blocks. Calling it again, or
    under another name, is harmless.

    Args:
        name: what `from_pretrained(..., attn_implementation=name)` and
            `model.set_attn_implementation(name)` take.
        contiguous: a promise that the ones of each row of a 2-D attention mask, and the tokens of
            each image block or packed sequence, stand in one run. On CPU tensors that is looked up
            in any case. Tensors on a device are not read, for that would wait for the device:
            without the promise their padding, packing and blocks take the dense mask.
        backend: as in `vlm_kernels.attention`.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: in the model's forward: attention dropout in training, a paged cache, or keys
            selected by index, which the kernels do not have.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers >= 4.57: pip install -U transformers"
        ) from error
    AttentionInterface.register(name, partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, partial(attention_mask, contiguous=contiguous))


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool = False,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' sense.

    Args:
        module: the attention module; `is_causal` is read from it where the argument is None.
        query: (B, H, Nq, D); key (B, Hkv, Nk, D); value (B, Hkv, Nk, Dv).
        attention_mask: what `attention_mask()` returned, int32 (B|1, 1, Nq, 2) being a kv_range; or
            a dense mask, bool or additive.
        position_bias: (B|1, H, Nq, Nk), added to the scaled product.
        s_aux: (H,), attention sinks: a logit more in each row, without a value (gpt-oss).
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed images or sequences, as for flash-attn.

    Returns:
        ((B, Nq, H, Dv), None): the attention weights are never formed.
    """
    if dropout:
        raise ValueError(
            f"vlm_kernels: attention dropout is {dropout}, the kernels have none; set it to 0 in "
            "the model's config, or take attn_implementation='sdpa' for training"
        )
    if cache is not None:
        raise ValueError(
            f"vlm_kernels: {type(cache).__name__} came as cache=, continuous batching has no "
            "kernel here; take attn_implementation='sdpa' for it"
        )
    for name in _SELECTIONS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"vlm_kernels: {type(module).__name__} selects keys by {name}, which has no kernel "
                "here; take attn_implementation='eager'"
            )
    if output_attentions:
        warn_once(
            "output_attentions",
            "output_attentions=True: vlm_kernels never forms the attention weights and returns "
            "None; take attn_implementation='eager' for them",
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "return_lse": s_aux is not None,
        "backend": backend,
    }
    if cu_seq_lens_q is not None and attention_mask is None and position_bias is None:
        batch, _, length, _ = query.shape
        window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        packed = attention_varlen(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k,
            is_causal=is_causal,
            window=window,
            **options,
        )
        return _with_sinks(packed, s_aux).unflatten(0, (batch, length)), None

    kv_range, attn_mask = None, attention_mask
    if attn_mask is not None and attn_mask.dtype == torch.int32 and attn_mask.shape[-1] == 2:
        kv_range, attn_mask = attn_mask, None
    if attn_mask is not None:
        attn_mask = attn_mask[..., : key.shape[2]]  # older models' masks span a whole static cache
    if position_bias is not None:
        attn_mask = _biased(position_bias[..., : key.shape[2]], attn_mask)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
        attn_mask = attn_mask.to(query.dtype)
    if query.shape[0] != key.shape[0]:  # queries or keys that a batch shares
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    heads = attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=attention_mask is None and query.shape[2] > 1 and is_causal,
        enable_gqa=True,
        kv_range=kv_range,
        **options,
    )
    return _with_sinks(heads, s_aux).transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    contiguous: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function in transformers' sense.

    Returns:
        None where `attention_forward`'s is_causal, or no mask at all, says the same; a kv_range,
        int32 (B|1, 1, Nq, 2), where the keys of each query are one interval; else, and for single
        queries, whose dense mask is no larger than the padding mask, transformers' own dense bool
        mask (B, 1, Nq, Nk).
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    arguments = {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        **kwargs,
    }
    if cache_position is not None:  # before transformers 5
        arguments["cache_position"] = cache_position
        length = cache_position.shape[0]
    else:
        arguments.update(q_length=q_length, q_offset=q_offset)
        length = q_length or 0
    if length == 1 or torch.compiler.is_compiling():
        return masking_utils.sdpa_mask(**arguments)

    padding = None if attention_mask is None else attention_mask.bool()
    if padding is not None and padding.is_cpu and padding.shape[1] >= kv_length + kv_offset:
        padding = None if bool(padding.all()) else padding
    if padding is None:
        # is_causal is aligned to the first key, where these queries begin
        from_start = length == kv_length if q_length is None else _is_zero(q_offset)
        causal = mask_function is masking_utils.causal_mask_function
        if causal and allow_is_causal_skip and from_start and _is_zero(kv_offset):
            return None
        everything = getattr(masking_utils, "bidirectional_mask_function", None)
        if mask_function is everything and allow_is_bidirectional_skip:
            return None
    if cache_position is None:
        device = kwargs.get("device", "cpu") if padding is None else padding.device
        queries = torch.arange(length, device=device) + q_offset
    else:
        queries = cache_position.long()
    interval = _masks.Reader(queries, padding, contiguous).read_padded(mask_function)
    if interval is None:
        return masking_utils.sdpa_mask(**arguments)
    return _masks.kv_range(interval, queries, kv_length, kv_offset)


def _is_zero(offset: int | Tensor) -> bool:
    return isinstance(offset, int) and offset == 0  # a static cache's offset is a tensor


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def _with_sinks(result: Any, sinks: Tensor | None) -> Tensor:
    """A logit more in each row takes exp(sink) / (exp(lse) + exp(sink)) of the weight."""
    if sinks is None:
        return result
    out, lse = result  # (..., H, N, D) and (..., H, N); packed (N, H, D) and (H, N)
    kept = torch.sigmoid(lse - sinks.float()[:, None])
    kept = kept.t() if out.dim() == 3 else kept
    return (out * kept[..., None]).to(out.dtype)
