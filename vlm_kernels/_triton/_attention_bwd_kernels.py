"""Kernels of the backward of attention; see _attention_bwd.py for how they are put together.

Names, for a query i and a key j: s is the score, P = exp(s - lse), dP = dO v^T, and
dS = P (dP - delta), the gradient of the score after softcap and mask. Tensors are (B, H, N, D) with
strides b, h and n, all multiples of ALIGN; features lie together, in pieces of D0, D1 and D2 of
them (0: there is none).
A grid's first axis counts tiles fastest, then the heads of each entry of the batch.

tests/compile_only holds each kernel to the line of limits above it: 99 KiB of shared memory are
what every GPU from sm_80 on has. Spills are instructions: dkdv_kernel has them with masks, most in
128 features on sm_80, dq_kernel in fp32 products of 256 features only.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._attention_kernels import HALVES, LAYER
from ._attention_math import ADDITIVE_MASK, BOOL_MASK, LOG2E, load_rows, store_rows, tanh, wide
from ._compat import cast, dot, span

_BOOL_MASK, _ADDITIVE_MASK = tl.constexpr(BOOL_MASK), tl.constexpr(ADDITIVE_MASK)
_LAYER, _HALVES = tl.constexpr(LAYER), tl.constexpr(HALVES)
_MANY = tl.constexpr(2**31 - 1)


@triton.jit
def _rows_of(base, b, h, i, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Where rows i of head h of entry b begin."""
    base += b * wide(stride_b, ALIGN) + h * wide(stride_h, ALIGN)
    return base + i.to(tl.int64) * wide(stride_n, ALIGN)


@triton.jit
def _load(rows, inside, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of a head, piece by piece; 0 where not `inside`."""
    x0 = load_rows(rows, inside, 0, D0, D, True)
    x1 = 0.0
    x2 = 0.0
    if D1 > 0:
        x1 = load_rows(rows, inside, D0, D1, D, True)
    if D2 > 0:
        x2 = load_rows(rows, inside, D0 + D1, D2, D, True)
    return x0, x1, x2


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), tl.float32)
    x1 = 0.0
    x2 = 0.0
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), tl.float32)
    if D2 > 0:
        x2 = tl.zeros((ROWS, D2), tl.float32)
    return x0, x1, x2


@triton.jit
def _product(
    a, b, ROWS: tl.constexpr, COLS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of two tiles of rows, in fp32."""
    x = dot(a[0], tl.trans(b[0]), tl.zeros((ROWS, COLS), tl.float32), PRECISION)
    if D1 > 0:
        x = dot(a[1], tl.trans(b[1]), x, PRECISION)
    if D2 > 0:
        x = dot(a[2], tl.trans(b[2]), x, PRECISION)
    return x


@triton.jit
def _add_product(
    acc, a, b, DTYPE: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + a b, where `a` is fp32 and rounded to DTYPE, and `b` a tile of rows."""
    a = cast(a, DTYPE)
    x0 = dot(a, b[0], acc[0], PRECISION)
    x1 = acc[1]
    x2 = acc[2]
    if D1 > 0:
        x1 = dot(a, b[1], acc[1], PRECISION)
    if D2 > 0:
        x2 = dot(a, b[2], acc[2], PRECISION)
    return x0, x1, x2


@triton.jit
def _store(
    rows, inside, x, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """factor * x, in the dtype of where it goes."""
    store_rows(rows, x[0] * factor, inside, 0, D0, D)
    if D1 > 0:
        store_rows(rows, x[1] * factor, inside, D0, D1, D)
    if D2 > 0:
        store_rows(rows, x[2] * factor, inside, D0 + D1, D2, D)


@triton.jit
def _of_query(lse, delta, rows, i, nq, HAS_ROWS: tl.constexpr):
    """lse, delta and the interval of keys of each query.

    Where there is no key lse becomes inf, and every probability 0.
    """
    inside = i < nq
    total = tl.load(lse + i, mask=inside, other=float("inf"))
    total = tl.where(total == -float("inf"), float("inf"), total)
    d = tl.load(delta + i, mask=inside, other=0.0)
    begin = tl.zeros_like(i)
    end = begin
    if HAS_ROWS:
        begin = tl.load(rows + 2 * i.to(tl.int64), mask=inside, other=0)
        end = tl.load(rows + 2 * i.to(tl.int64) + 1, mask=inside, other=0)
    return total, d, begin, end


@triton.jit
def _probability(
    s, lse, begin, end, i, j, nq, nk, mask, mask_n, mask_k, scale, softcap,
    HAS_ROWS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """P of a tile of products s, and the derivative of the softcap.

    What belongs to queries and what belongs to keys is broadcast along the other; so either may be
    the rows of the tile.
    """
    slope = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        slope = 1.0 - t * t
        s = softcap * t
    elif MASK == _ADDITIVE_MASK:
        s = s * scale
    seen = j < nk
    if HAS_ROWS:
        seen = (j >= begin) & (j < end)
    if MASK:
        at = mask + i.to(tl.int64) * mask_n + j.to(tl.int64) * mask_k
        inside = (i < nq) & (j < nk)
    if MASK == _BOOL_MASK:
        seen = seen & (tl.load(at, mask=inside, other=0) != 0)
    if MASK == _ADDITIVE_MASK:
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP or MASK == _ADDITIVE_MASK:
        # the difference first: the lowest finite number times log2(e) would be -inf
        p = tl.exp2((s - lse) * LOG2E)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse * LOG2E)
    return tl.where(seen, p, 0.0), slope


# limits: registers 128, spills 0
@triton.jit
def delta_kernel(
    out, grad, lse, grad_lse, delta,
    out_b, out_h, out_n, grad_b, grad_h, grad_n, heads, nq,
    HAS_LSE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """delta (B, H, nq) = sum(dO * O) - dlse of each query, 0 where there is no key."""
    tiles = tl.cdiv(nq, BM)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    i = tile * BM + tl.arange(0, BM)
    inside = i < nq
    o = load_rows(_rows_of(out, b, h, i, out_b, out_h, out_n, ALIGN), inside, 0, WIDTH, D, True)
    do = load_rows(
        _rows_of(grad, b, h, i, grad_b, grad_h, grad_n, ALIGN), inside, 0, WIDTH, D, True
    )
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = head * nq + i
    if HAS_LSE:
        total -= tl.load(grad_lse + at, mask=inside, other=0.0)
    none = tl.load(lse + at, mask=inside, other=0.0) == -float("inf")
    tl.store(delta + at, tl.where(none, 0.0, total), mask=inside)


@triton.jit
def _seen(begin, end):
    """Least begin and greatest end of some queries' intervals; (0, 0) where all are empty."""
    high = tl.max(end, 0)
    return tl.minimum(tl.min(tl.where(begin < end, begin, _MANY), 0), high), high


# limits: registers 64, spills 0
@triton.jit
def bounds_kernel(rows, bounds, nq, nk, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr):
    """First and last + 1 tile of BM queries that a tile of BN keys is seen by; (0, 0) for none.

    rows (planes, nq, 2), bounds (planes, key tiles, 2).
    """
    tiles = tl.cdiv(nk, BN)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.full((BLOCK,), _MANY, tl.int32)
    last = tl.zeros((BLOCK,), tl.int32)
    for start in span(0, nq, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = rows + 2 * (plane * nq + i)
        begin = tl.load(at, mask=i < nq, other=0)
        end = tl.load(at + 1, mask=i < nq, other=0)
        meets = (begin < end) & (begin < (tile + 1) * BN) & (end > tile * BN)
        first = tl.where(meets, tl.minimum(first, i), first)
        last = tl.where(meets, i + 1, last)
    high = tl.max(last, 0)
    at = bounds + 2 * (plane * tiles + tile)
    tl.store(at, tl.minimum(tl.min(first, 0), high) // BM)
    tl.store(at + 1, tl.cdiv(high, BM))


# limits: registers 255, spills 85, shared 101376
@triton.jit
def dkdv_kernel(
    query, key, value, grad, lse, delta, mask, rows, bounds, grad_key, grad_value,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    grad_b, grad_h, grad_n, mask_b, mask_h, mask_n, mask_k, rows_b, rows_h, bounds_b, bounds_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, kv_heads, group, nq, nk, scale, softcap,
    HAS_ROWS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of a key head: over the queries of each head of its group.

    Tiles have keys as rows, so that P and dS are operands of their products as they are. `bounds`
    (.., key tiles, 2) are those of `bounds_kernel`.
    """
    tiles = tl.cdiv(nk, BN)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head = head // kv_heads, head % kv_heads
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    dtype: tl.constexpr = query.dtype.element_ty
    j = tile * BN + tl.arange(0, BN)
    has_key = j < nk
    k = _load(_rows_of(key, b, kv_head, j, key_b, key_h, key_n, ALIGN), has_key, D, D0, D1, D2)
    if NEED_KEY:
        v = _load(
            _rows_of(value, b, kv_head, j, value_b, value_h, value_n, ALIGN),
            has_key,
            DV,
            V0,
            V1,
            V2,
        )
        dk = _zeros(BN, D0, D1, D2)
    if NEED_VALUE:
        dv = _zeros(BN, V0, V1, V2)
    first, last = tl.cast(0, tl.int32), tl.cdiv(nq, BM)
    for g in span(0, group, 1):
        h = kv_head * group + g
        at = (b * kv_heads * group + h) * nq
        interval = rows + b * rows_b + h * rows_h
        if HAS_ROWS:
            ends = bounds + b * bounds_b + h * bounds_h + 2 * tile
            first, last = tl.load(ends), tl.load(ends + 1)
        for t in span(first, last, 1):
            i = t * BM + tl.arange(0, BM)
            has_query = i < nq
            q = _load(
                _rows_of(query, b, h, i, query_b, query_h, query_n, ALIGN), has_query, D, D0, D1, D2
            )
            s = _product(k, q, BN, BM, D1, D2, PRECISION)
            total, d, begin, end = _of_query(lse + at, delta + at, interval, i, nq, HAS_ROWS)
            p, slope = _probability(
                s, total[None, :], begin[None, :], end[None, :], i[None, :], j[:, None], nq, nk,
                mask + b * mask_b + h * mask_h, mask_n, mask_k, scale, softcap,
                HAS_ROWS, MASK, SOFTCAP,
            )  # fmt: skip
            do = _load(
                _rows_of(grad, b, h, i, grad_b, grad_h, grad_n, ALIGN), has_query, DV, V0, V1, V2
            )
            if NEED_VALUE:
                dv = _add_product(dv, p, do, dtype, V1, V2, PRECISION)
            if NEED_KEY:
                ds = p * (_product(v, do, BN, BM, V1, V2, PRECISION) - d[None, :])
                if SOFTCAP:
                    ds *= slope
                dk = _add_product(dk, ds, q, dtype, D1, D2, PRECISION)
    if NEED_KEY:
        of_key = _rows_of(grad_key, b, kv_head, j, dk_b, dk_h, dk_n, ALIGN)
        _store(of_key, has_key, dk, scale, D, D0, D1, D2)
    if NEED_VALUE:
        of_value = _rows_of(grad_value, b, kv_head, j, dv_b, dv_h, dv_n, ALIGN)
        _store(of_value, has_key, dv, 1.0, DV, V0, V1, V2)


# limits: registers 255, spills 170, shared 101376
@triton.jit
def dq_kernel(
    query, key, value, grad, lse, delta, mask, rows, grad_query,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    grad_b, grad_h, grad_n, mask_b, mask_h, mask_n, mask_k, rows_b, rows_h,
    dq_s, dq_b, dq_h, dq_n, heads, group, nq, nk, scale, softcap,
    HAS_ROWS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of a head: grid (tiles, splits), each split over its part of the keys.

    Splits lie dq_s apart.
    """
    tiles = tl.cdiv(nq, BM)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b, h = head // heads, head % heads
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    dtype: tl.constexpr = query.dtype.element_ty
    i = tile * BM + tl.arange(0, BM)
    has_query = i < nq
    q = _load(_rows_of(query, b, h, i, query_b, query_h, query_n, ALIGN), has_query, D, D0, D1, D2)
    do = _load(_rows_of(grad, b, h, i, grad_b, grad_h, grad_n, ALIGN), has_query, DV, V0, V1, V2)
    at = head * nq
    interval = rows + b * rows_b + h * rows_h
    total, d, begin, end = _of_query(lse + at, delta + at, interval, i, nq, HAS_ROWS)
    first, last = tl.cast(0, tl.int32), tl.cdiv(nk, BN)
    if HAS_ROWS:
        low, high = _seen(begin, end)
        first, last = low // BN, tl.cdiv(high, BN)
    share = tl.cdiv(last - first, splits)
    first += split * share
    last = tl.minimum(first + share, last)
    dq = _zeros(BM, D0, D1, D2)
    for t in span(first, last, 1):
        j = t * BN + tl.arange(0, BN)
        has_key = j < nk
        of_key = _rows_of(key, b, h // group, j, key_b, key_h, key_n, ALIGN)
        k = _load(of_key, has_key, D, D0, D1, D2)
        s = _product(q, k, BM, BN, D1, D2, PRECISION)
        p, slope = _probability(
            s, total[:, None], begin[:, None], end[:, None], i[:, None], j[None, :], nq, nk,
            mask + b * mask_b + h * mask_h, mask_n, mask_k, scale, softcap,
            HAS_ROWS, MASK, SOFTCAP,
        )  # fmt: skip
        of_value = _rows_of(value, b, h // group, j, value_b, value_h, value_n, ALIGN)
        v = _load(of_value, has_key, DV, V0, V1, V2)
        ds = p * (_product(do, v, BM, BN, V1, V2, PRECISION) - d[:, None])
        if SOFTCAP:
            ds *= slope
        dq = _add_product(dq, ds, k, dtype, D1, D2, PRECISION)
    grad_query += split * wide(dq_s, ALIGN)
    of_query = _rows_of(grad_query, b, h, i, dq_b, dq_h, dq_n, ALIGN)
    _store(of_query, has_query, dq, scale, D, D0, D1, D2)


# limits: registers 255, spills 20, shared 101376
@triton.jit
def dmask_kernel(
    query, key, value, grad, lse, delta, mask, rows, grad_mask,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    grad_b, grad_h, grad_n, mask_b, mask_h, mask_n, mask_k, rows_b, rows_h,
    mask_batches, mask_heads, batch, heads, group, nq, nk, scale, softcap,
    BY_ROW: tl.constexpr, HAS_ROWS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of an additive mask: dS, summed over all that the mask is broadcast to.

    grad_mask is (splits, batch or 1, heads or 1, nq or 1, nk) fp32; BY_ROW says that it has nq
    rows. Grid (tiles, splits): a split takes its part of what is summed.
    """
    row_tiles, col_tiles = tl.cdiv(nq, BM), tl.cdiv(nk, BN)
    pid, own_tiles = tl.program_id(0), 1
    if BY_ROW:
        own_tiles = row_tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    col_tile, tile = pid % col_tiles, pid // col_tiles % own_tiles
    head = (pid // col_tiles // own_tiles).to(tl.int64)
    mask_batch, mask_head = head // mask_heads, head % mask_heads
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    j = col_tile * BN + tl.arange(0, BN)
    has_key = j < nk
    # what is summed: batch entries, heads and tiles of queries, the last fastest
    over_heads, over_tiles = heads // mask_heads, row_tiles // own_tiles
    count = batch // mask_batches * over_heads * over_tiles
    share = tl.cdiv(count, splits)
    first = split * share
    last = tl.minimum(first + share, count)
    if BY_ROW:
        acc = tl.zeros((BM, BN), tl.float32)
    else:
        acc = tl.zeros((BN,), tl.float32)
    for x in span(first, last, 1):
        b = mask_batch + x // over_tiles // over_heads
        h = mask_head + x // over_tiles % over_heads
        row_tile = tile + x % over_tiles
        i = row_tile * BM + tl.arange(0, BM)
        has_query = i < nq
        at = (b * heads + h) * nq
        interval = rows + b * rows_b + h * rows_h
        total, d, begin, end = _of_query(lse + at, delta + at, interval, i, nq, HAS_ROWS)
        touches = True
        if HAS_ROWS:
            low, high = _seen(begin, end)
            touches = (low < (col_tile + 1) * BN) & (high > col_tile * BN)
        if touches:
            q = _load(
                _rows_of(query, b, h, i, query_b, query_h, query_n, ALIGN), has_query, D, D0, D1, D2
            )
            of_key = _rows_of(key, b, h // group, j, key_b, key_h, key_n, ALIGN)
            k = _load(of_key, has_key, D, D0, D1, D2)
            s = _product(q, k, BM, BN, D1, D2, PRECISION)
            p, _slope = _probability(
                s, total[:, None], begin[:, None], end[:, None], i[:, None], j[None, :], nq, nk,
                mask + b * mask_b + h * mask_h, mask_n, mask_k, scale, softcap,
                HAS_ROWS, MASK, SOFTCAP,
            )  # fmt: skip
            do = _load(
                _rows_of(grad, b, h, i, grad_b, grad_h, grad_n, ALIGN), has_query, DV, V0, V1, V2
            )
            of_value = _rows_of(value, b, h // group, j, value_b, value_h, value_n, ALIGN)
            v = _load(of_value, has_key, DV, V0, V1, V2)
            ds = p * (_product(do, v, BM, BN, V1, V2, PRECISION) - d[:, None])
            if BY_ROW:
                acc += ds
            else:
                acc += tl.sum(ds, 0)
    columns = tl.cast(nk, tl.int64)
    plane = split * tl.cast(mask_batches, tl.int64) * mask_heads + head
    if BY_ROW:
        i = tile * BM + tl.arange(0, BM)
        at = grad_mask + (plane * nq + i)[:, None] * columns + j[None, :]
        tl.store(at, acc, mask=(i < nq)[:, None] & has_key[None, :])
    else:
        tl.store(grad_mask + plane * columns + j, acc, mask=has_key)


# limits: registers 168, spills 0
@triton.jit
def prepare_bwd_kernel(
    grad, x, weight, cos, sin, places, grad_x, weight_parts, bias_parts,
    x_b, x_h, x_n, weight_h, rope_b, dx_b, dx_h, dx_n, heads, n, first, half, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, PLACES: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient of rows before normalisation and rotation, from that of the rows after them.

    grad (B, H, n, D) fp32. Row i takes row first + i of cos and sin (.., half), or row places[i].
    A program takes TILES tiles of BM rows and leaves its sums for weight and bias in
    (row chunks, B, H, D) fp32.
    """
    chunks = tl.cdiv(n, BM * TILES)
    chunk, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    eps = tl.cast(eps, tl.float32)
    f = tl.arange(0, WIDTH)
    used = f < D
    turned = (f < 2 * half) & used
    if ROPE == _HALVES:
        low = f < half
        pair, partner = tl.where(low, f, f - half), tl.where(low, f + half, f - half)
    else:
        low = f % 2 == 0
        pair, partner = f // 2, f ^ 1
    if NORM:
        w = tl.load(weight + h * weight_h + f, mask=used, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((WIDTH,), tl.float32)
    tiles = tl.cdiv(n, BM)
    for t in span(chunk * TILES, tl.minimum((chunk + 1) * TILES, tiles), 1):
        i = t * BM + tl.arange(0, BM)
        inside = i < n
        full = inside[:, None] & used[None, :]
        at = grad + (head * n + i)[:, None] * D
        g = tl.load(at + f[None, :], mask=full, other=0.0)
        if ROPE:
            place = first + i
            if PLACES:
                place = tl.load(places + i, mask=inside, other=0)
            rotates = inside[:, None] & turned[None, :]
            angle = b * rope_b + place.to(tl.int64)[:, None] * half + pair[None, :]
            c = tl.load(cos + angle, mask=rotates, other=1.0)
            s = tl.load(sin + angle, mask=rotates, other=0.0)
            other = tl.load(at + partner[None, :], mask=rotates, other=0.0)
            # (a, b) became (a cos - b sin, b cos + a sin)
            g = g * c + tl.where(low[None, :], other, -other) * s
        if NORM:
            y = load_rows(_rows_of(x, b, h, i, x_b, x_h, x_n, ALIGN), inside, 0, WIDTH, D, True).to(
                tl.float32
            )
            if NORM == _LAYER:
                y = tl.where(used[None, :], y - (tl.sum(y, 1) / D)[:, None], 0.0)
            r = 1.0 / tl.sqrt(tl.sum(y * y, 1) / D + eps)
            y *= r[:, None]
            if NEED_WEIGHT:
                weight_sum += tl.sum(tl.where(inside[:, None], g * y, 0.0), 0)
            if NEED_BIAS:
                bias_sum += tl.sum(g, 0)
            g *= w[None, :]
            if NORM == _LAYER:
                g -= (tl.sum(g, 1) / D)[:, None]
            g = (g - y * (tl.sum(g * y, 1) / D)[:, None]) * r[:, None]
        if NEED_X:
            of_x = _rows_of(grad_x, b, h, i, dx_b, dx_h, dx_n, ALIGN)
            store_rows(of_x, g, inside, 0, WIDTH, D)
    planes = tl.num_programs(0) // chunks
    at = (chunk * tl.cast(planes, tl.int64) + head) * D + f
    if NEED_WEIGHT:
        tl.store(weight_parts + at, weight_sum, mask=used)
    if NEED_BIAS:
        tl.store(bias_parts + at, bias_sum, mask=used)
