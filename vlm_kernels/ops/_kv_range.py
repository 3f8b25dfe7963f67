"""Builders of `kv_range`: masks that are one interval of keys for each query.

A kv_range is int32 (B or 1, H or 1, Nq, 2): query i sees the keys begin <= j < end, clamped to the
keys there are; begin >= end sees none. Causal, windowed, prefix-LM, image-block, per-image and
padding masks are all of this kind, so that none of them needs the (Nq, Nk) matrix. What these
functions return has H = 1. They read no value of a tensor on a device, so nothing waits, and they
run under torch.compile. Values of CPU tensors are checked.

Two rules align queries with keys where Nq != Nk: top-left (query i stands at key i, as in
`F.scaled_dot_product_attention`) and bottom-right (at key i + Nk - Nq, so that the last query meets
the last key, as in flash-attention and with a KV cache). Each builder says which it follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


def causal(
    num_queries: int, num_keys: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Query i sees keys 0 to i. Top-left aligned, as `is_causal=True` of `attention` and SDPA.

    Args:
        num_queries: Nq. num_keys: Nk, the same unless given.
        device: where the result lies.

    Returns:
        (1, 1, Nq, 2) int32.

    Raises:
        ValueError: a negative size.

    >>> causal(3)[0, 0].tolist()
    [[0, 1], [0, 2], [0, 3]]
    """
    num_keys = num_queries if num_keys is None else num_keys
    return _window("causal", num_queries, num_keys, -1, 0, 0, device)


def causal_lower_right(
    num_queries: int, num_keys: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Query i sees keys 0 to i + Nk - Nq: the last query sees all. Bottom-right aligned.

    The causal rule of flash-attention, `attention_varlen` and
    `torch.nn.attention.bias.causal_lower_right`: Nq new tokens behind a KV cache. With Nq > Nk the
    first Nq - Nk queries see nothing.

    Args:
        num_queries: Nq. num_keys: Nk, cached ones included.
        device: where the result lies.

    Returns:
        (1, 1, Nq, 2) int32.

    Raises:
        ValueError: a negative size.

    >>> causal_lower_right(2, 5)[0, 0].tolist()
    [[0, 4], [0, 5]]
    """
    shift = num_keys - num_queries
    return _window("causal_lower_right", num_queries, num_keys, -1, 0, shift, device)


def sliding_window(
    num_queries: int,
    num_keys: int,
    left: int,
    right: int,
    *,
    lower_right: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Query i sees keys i - left to i + right, both included (Longformer, Mistral).

    Top-left aligned, as `window=` of `attention`, unless `lower_right`: then i stands at key
    i + Nk - Nq, as `window=` of `attention_varlen`. What transformers calls `sliding_window=w` is
    left = w - 1 and right = 0.

    Args:
        num_queries: Nq. num_keys: Nk.
        left, right: keys on either side, -1 for no limit.
        lower_right: align the last query with the last key.
        device: where the result lies.

    Returns:
        (1, 1, Nq, 2) int32.

    Raises:
        ValueError: a negative size, or a side below -1.

    >>> sliding_window(4, 4, 1, 0)[0, 0].tolist()
    [[0, 1], [0, 2], [1, 3], [2, 4]]
    """
    if left < -1 or right < -1:
        raise ValueError(
            f"sliding_window: left, right are {left}, {right}, expected numbers of keys, or -1 for "
            "no limit"
        )
    shift = num_keys - num_queries if lower_right else 0
    return _window("sliding_window", num_queries, num_keys, left, right, shift, device)


def prefix_lm(
    prefix_lengths: Tensor | Sequence[int] | int,
    num_tokens: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The first tokens see each other both ways, the others are causal (T5's prefix-LM, PaliGemma).

    Token i sees the prefix and tokens 0 to i (T5, arXiv:1910.10683; PaliGemma, arXiv:2407.07726,
    whose prefix is the image and the prompt). Self-attention: Nq = Nk, so that both alignments are
    the same. Tokens decoded behind a KV cache take `causal_lower_right`.

    Args:
        prefix_lengths: P of each sequence, (B,) integers, or one for all.
        num_tokens: N.
        device: where the result lies, if prefix_lengths is no tensor.

    Returns:
        (B or 1, 1, N, 2) int32.

    Raises:
        ValueError: a prefix outside [0, N], or a shape that does not fit.
        TypeError: lengths that are no integers.

    >>> prefix_lm([2], 4)[0, 0].tolist()
    [[0, 2], [0, 2], [0, 3], [0, 4]]
    """
    _check_sizes("prefix_lm", num_tokens=num_tokens)
    prefix = _lengths("prefix_lm", "prefix_lengths", prefix_lengths, num_tokens, device)
    end = torch.maximum(prefix[:, None], _positions(num_tokens, prefix.device) + 1)
    return _ranges(torch.zeros_like(end), end.clamp(max=num_tokens))


def image_blocks(image_ids: Tensor) -> Tensor:
    """Causal text with images that see themselves both ways (Gemma 3, arXiv:2503.19786).

    Token i sees tokens 0 to i, and the whole of the image that it belongs to. An image is a run of
    neighbouring tokens with one id. Self-attention: Nq = Nk, so that both alignments are the same.
    Gemma 3's local layers add `window=(w - 1, -1)` to the call, which bounds what an image sees on
    its left, too, as it does there; padding joins by `intersect`.

    Args:
        image_ids: (B, N) or (N,) integers, the number of a token's image, negative for text; or
            bool, True for image tokens, where images that touch count as one.

    Returns:
        (B or 1, 1, N, 2) int32.

    Raises:
        ValueError: a tensor of another number of dimensions.
        TypeError: no tensor, or one of floats.

    >>> image_blocks(torch.tensor([-1, 0, 0, -1]))[0, 0].tolist()
    [[0, 1], [0, 3], [0, 3], [0, 4]]
    """
    ids = _tokens("image_blocks", "image_ids", image_ids)
    if ids.dtype == torch.bool:
        ids = ids.to(torch.int64) - 1
    batch, n = ids.shape
    place = _positions(n, ids.device)
    if n == 0:
        return torch.zeros(batch, 1, 0, 2, dtype=torch.int32, device=ids.device)
    goes_on = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    last = torch.cat([~goes_on, goes_on.new_ones(batch, 1)], dim=1)
    # The end of a run, handed back to its tokens: the nearest end at or after each.
    end = torch.where(last, place + 1, n).flip(1).cummin(1).values.flip(1)
    return _ranges(torch.zeros_like(end), end)


def per_image_cross_attention(
    image_index: Tensor, tokens_per_image: int | Tensor, *, all_preceding: bool = False
) -> Tensor:
    """Text tokens see the tokens of the image before them (Flamingo, arXiv:2204.14198).

    The keys are the tokens of all images in a row. A text token sees those of the last image placed
    at or before it, none if there is no image before it (its output is then 0). Queries are placed
    by image_index alone: no alignment of positions is involved.

    Args:
        image_index: (B, Nq) or (Nq,) integers, the image that a token sees, negative for none; or
            bool, True where an image is placed (Flamingo's <image> token): seen from there on.
        tokens_per_image: keys of each image: one number, or (images,) or (B, images) integers.
        all_preceding: see the images before that one, too (the variant that Flamingo ablates).

    Returns:
        (B or 1, 1, Nq, 2) int32.

    Raises:
        ValueError: a tensor of another number of dimensions, or a negative number of tokens.
        TypeError: no tensor, or one of floats.

    >>> placed = torch.tensor([False, True, False, True])
    >>> per_image_cross_attention(placed, 64)[0, 0].tolist()
    [[0, 0], [0, 64], [0, 64], [64, 128]]
    """
    name = "per_image_cross_attention"
    index = _tokens(name, "image_index", image_index)
    if index.dtype == torch.bool:
        index = index.to(torch.int64).cumsum(1) - 1
    index = index.to(torch.int64)
    if isinstance(tokens_per_image, Tensor):
        counts = _tokens(name, "tokens_per_image", tokens_per_image)
        if counts.dtype == torch.bool:
            raise TypeError(f"{name}: tokens_per_image is bool, expected integers")
        _check_values(name, "tokens_per_image", counts, 0, _INT32_MAX)
        bounds = torch.nn.functional.pad(counts.to(index).cumsum(1), (1, 0))  # (B | 1, images + 1)
        images = counts.shape[1]
        batch = max(index.shape[0], counts.shape[0])
        if {index.shape[0], counts.shape[0]} - {1, batch}:
            raise ValueError(
                f"{name}: image_index has {index.shape[0]} rows and tokens_per_image "
                f"{counts.shape[0]}, expected as many, or one for all"
            )
        index, bounds = index.expand(batch, -1), bounds.expand(batch, -1)
        begin = bounds.gather(1, index.clamp(0, images))
        end = bounds.gather(1, (index + 1).clamp(0, images))
    else:
        if tokens_per_image < 0:
            raise ValueError(f"{name}: tokens_per_image is {tokens_per_image}, expected 0 or more")
        begin = index.clamp(min=0) * tokens_per_image
        end = begin + tokens_per_image
    if all_preceding:
        begin = torch.zeros_like(begin)
    return _ranges(begin, torch.where(index < 0, begin, end))


def padding(
    lengths: Tensor | Sequence[int] | int,
    num_keys: int,
    num_queries: int | None = None,
    *,
    side: str = "right",
    device: torch.device | str | None = None,
) -> Tensor:
    """Every query sees the keys of its sequence that are no padding, whatever its own place.

    Queries that are padding see them as well: what comes out for them is to be ignored.

    Args:
        lengths: keys of each sequence without padding, (B,) integers, or one for all.
        num_keys: Nk. num_queries: Nq, the same unless given.
        side: "right" (keys 0 to length are kept) or "left" (the last ones, as in batched decoding).
        device: where the result lies, if lengths is no tensor.

    Returns:
        (B or 1, 1, Nq, 2) int32.

    Raises:
        ValueError: a length outside [0, Nk], another side, or a shape that does not fit.
        TypeError: lengths that are no integers.

    >>> padding([3, 1], 3)[:, 0, 0].tolist()
    [[0, 3], [0, 1]]
    >>> padding([3, 1], 3, side="left")[:, 0, 0].tolist()
    [[0, 3], [2, 3]]
    """
    if side not in ("right", "left"):
        raise ValueError(f"padding: side is {side!r}, expected 'right' or 'left'")
    num_queries = num_keys if num_queries is None else num_queries
    _check_sizes("padding", num_keys=num_keys, num_queries=num_queries)
    count = _lengths("padding", "lengths", lengths, num_keys, device)[:, None]
    begin = torch.zeros_like(count) if side == "right" else num_keys - count
    shape = (count.shape[0], num_queries)
    return _ranges(begin.expand(shape), (begin + count).expand(shape))


def from_cu_seqlens(
    cu_seqlens_q: Tensor,
    num_queries: int,
    cu_seqlens_k: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Packed segments see themselves only: NaViT's packed images, Qwen2.5-VL's windows.

    For packed rows in `attention` with a batch of 1; `attention_varlen` takes cu_seqlens as they
    are (arXiv:2307.06304, arXiv:2502.13923). `is_causal` is bottom-right aligned within a segment,
    as in flash-attention's varlen functions. Queries of no segment see nothing.

    Args:
        cu_seqlens_q: (S + 1,) integers, non-decreasing from 0: segment s has the queries
            cu_seqlens_q[s] to cu_seqlens_q[s + 1].
        num_queries: Nq, packed rows in all, known on the host.
        cu_seqlens_k: (S + 1,) likewise for the keys, the same unless given.
        is_causal: also hide the keys behind each query.

    Returns:
        (1, 1, Nq, 2) int32.

    Raises:
        ValueError: tensors that are not of one dimension and one length, or that decrease.
        TypeError: no tensor, or one that does not hold integers.

    >>> from_cu_seqlens(torch.tensor([0, 2, 3]), 4)[0, 0].tolist()
    [[0, 2], [0, 2], [2, 3], [0, 0]]
    """
    name = "from_cu_seqlens"
    _check_sizes(name, num_queries=num_queries)
    bounds_q = _bounds(name, "cu_seqlens_q", cu_seqlens_q)
    bounds_k = bounds_q if cu_seqlens_k is None else _bounds(name, "cu_seqlens_k", cu_seqlens_k)
    if bounds_q.shape != bounds_k.shape:
        raise ValueError(
            f"{name}: cu_seqlens_q and cu_seqlens_k have shapes {tuple(bounds_q.shape)} and "
            f"{tuple(bounds_k.shape)}, expected one entry more than segments in both"
        )
    place = _positions(num_queries, bounds_q.device)
    following = torch.searchsorted(bounds_q, place, right=True)  # skips empty segments
    last = bounds_q.shape[0] - 1
    segment = (following - 1).clamp(0, max(last - 1, 0))
    after = (segment + 1).clamp(max=last)
    begin, end = bounds_k[segment], bounds_k[after]
    if is_causal:
        end = torch.minimum(end, (place - bounds_q[after]) + end + 1)
    inside = (following > 0) & (following <= last)
    return _ranges(torch.where(inside, begin, 0)[None], torch.where(inside, end, 0)[None])


def intersect(*ranges: Tensor) -> Tensor:
    """The keys that all of the ranges allow, such as `intersect(image_blocks(ids), padding(...))`.

    Args:
        ranges: int32 (B or 1, H or 1, Nq, 2) each, of the same Nq.

    Returns:
        int32 of the broadcast shape.

    Raises:
        ValueError: no range, or shapes that do not broadcast.
        TypeError: a tensor that is not int32.

    >>> intersect(causal(3), padding(2, 3))[0, 0].tolist()
    [[0, 1], [0, 2], [0, 2]]
    """
    if not ranges:
        raise ValueError("intersect: no range came, expected at least one")
    for kv_range in ranges:
        _check_range("intersect", kv_range)
        _broadcast("intersect", ranges[0], kv_range)
    begin, end = ranges[0].unbind(-1)
    for kv_range in ranges[1:]:
        begin = torch.maximum(begin, kv_range[..., 0])
        end = torch.minimum(end, kv_range[..., 1])
    return torch.stack([begin, end], dim=-1)


def to_mask(kv_range: Tensor, num_keys: int) -> Tensor:
    """The dense boolean mask of a range, as SDPA takes it: to look at, and for other backends.

    Args:
        kv_range: int32 (B or 1, H or 1, Nq, 2).
        num_keys: Nk.

    Returns:
        (B or 1, H or 1, Nq, Nk) bool, True where a query may see a key.

    Raises:
        ValueError: another shape, or a negative size. TypeError: a tensor that is not int32.

    >>> to_mask(causal(2), 3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0]]
    """
    _check_range("to_mask", kv_range)
    _check_sizes("to_mask", num_keys=num_keys)
    key = torch.arange(num_keys, dtype=torch.int32, device=kv_range.device)
    return (key >= kv_range[..., :1]) & (key < kv_range[..., 1:])


def _window(
    name: str,
    num_queries: int,
    num_keys: int,
    left: int,
    right: int,
    shift: int,
    device: torch.device | str | None,
) -> Tensor:
    """Query i at key i + shift sees `left` keys before it and `right` after, -1 being all."""
    _check_sizes(name, num_queries=num_queries, num_keys=num_keys)
    place = _positions(num_queries, device) + shift
    begin = torch.zeros_like(place) if left < 0 else (place - left).clamp(0, num_keys)
    end = torch.full_like(place, num_keys) if right < 0 else (place + right + 1).clamp(0, num_keys)
    return _ranges(begin[None], end[None])


def _positions(count: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=device)


def _ranges(begin: Tensor, end: Tensor) -> Tensor:
    """(B, Nq) each -> (B, 1, Nq, 2) int32."""
    both = torch.stack([begin, end], dim=-1).clamp(0, _INT32_MAX)
    return both.to(torch.int32)[:, None]


def _check_sizes(name: str, **sizes: int) -> None:
    for what, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}: {what} is {size}, expected 0 or more")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _check_values(name: str, what: str, values: Tensor, low: int, high: int) -> None:
    """Values of CPU tensors are checked, those on a device clamped later: reading them waits."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = values[(values < low) | (values > high)]
    if wrong.numel():
        raise ValueError(f"{name}: {what} holds {int(wrong[0])}, expected {low} to {high}")


def _lengths(
    name: str,
    what: str,
    lengths: Tensor | Sequence[int] | int,
    high: int,
    device: torch.device | str | None,
) -> Tensor:
    """(B,) int64 in [0, high]; one for all is (1,)."""
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device=device)
    if not _is_integer(lengths) or lengths.dtype == torch.bool:
        raise TypeError(f"{name}: {what} holds {lengths.dtype}, expected integers")
    if lengths.dim() > 1:
        raise ValueError(f"{name}: {what} has shape {tuple(lengths.shape)}, expected (B,)")
    _check_values(name, what, lengths, 0, high)
    return lengths.reshape(-1).to(torch.int64).clamp(0, high)


def _tokens(name: str, what: str, tokens: Any) -> Tensor:
    """(B, N) or (N,) integers or bool, as (B, N)."""
    if not isinstance(tokens, Tensor) or not _is_integer(tokens):
        came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: {what} is {came}, expected a tensor of integers")
    if tokens.dim() not in (1, 2):
        raise ValueError(f"{name}: {what} has shape {tuple(tokens.shape)}, expected (B, N) or (N,)")
    return tokens if tokens.dim() == 2 else tokens[None]


def _bounds(name: str, what: str, bounds: Any) -> Tensor:
    """Checked cu_seqlens, int64."""
    bounds = _tokens(name, what, bounds)
    if bounds.dtype == torch.bool:
        raise TypeError(f"{name}: {what} is torch.bool, expected a tensor of integers")
    if bounds.shape[0] != 1 or bounds.shape[1] < 1:
        raise ValueError(
            f"{name}: {what} has shape {tuple(bounds.shape)}, expected (segments + 1,)"
        )
    bounds = bounds[0].to(torch.int64)
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(bounds[0]) != 0:
            raise ValueError(f"{name}: {what} begins with {int(bounds[0])}, expected 0")
        if bool((bounds[1:] < bounds[:-1]).any()):
            raise ValueError(f"{name}: {what} decreases, expected running sums of lengths")
    return bounds


def _check_range(name: str, kv_range: Any) -> None:
    if not isinstance(kv_range, Tensor) or kv_range.dtype != torch.int32:
        came = kv_range.dtype if isinstance(kv_range, Tensor) else type(kv_range).__name__
        raise TypeError(f"{name}: a range is {came}, expected an int32 tensor")
    if kv_range.dim() != 4 or kv_range.shape[3] != 2:
        raise ValueError(
            f"{name}: a range has shape {tuple(kv_range.shape)}, expected (B or 1, H or 1, Nq, 2)"
        )


def _broadcast(name: str, a: Tensor, b: Tensor) -> None:
    fits = a.shape[2] == b.shape[2]
    for i in (0, 1):
        fits = fits and (a.shape[i] == b.shape[i] or 1 in (a.shape[i], b.shape[i]))
    if not fits:
        raise ValueError(
            f"{name}: ranges have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected as many "
            "queries in each, and batches and heads that are equal or 1"
        )
