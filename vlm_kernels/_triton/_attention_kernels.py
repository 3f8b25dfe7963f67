"""Forward kernels of attention; see attention.py for how they are put together.

tests/compile_only holds each kernel to the line of limits above it. What spills a
little are tiles of at most 64 queries with softcap or TOGETHER, nearly all of them on sm_80.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._attention_math import (
    ADDITIVE_MASK,
    LOG2E,
    NO_MASK,
    capped,
    load_columns,
    load_rows,
    masked,
    product,
    store_rows,
    wide,
)
from ._compat import cast, dot, span

NO_NORM, RMS, LAYER = 0, 1, 2
NO_ROPE, HALVES, INTERLEAVED = 0, 1, 2

_NO_MASK, _ADDITIVE_MASK = tl.constexpr(NO_MASK), tl.constexpr(ADDITIVE_MASK)
_NO_NORM, _LAYER = tl.constexpr(NO_NORM), tl.constexpr(LAYER)
_NO_ROPE, _HALVES = tl.constexpr(NO_ROPE), tl.constexpr(HALVES)
_MANY = tl.constexpr(2**31 - 1)


# limits: registers 255, spills 20
@triton.jit
def attention_kernel(
    q, k, v, mask, rows, out, lse,
    nq, nk, kv_heads, group, tiles, splits,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, rows_batch, rows_head,
    out_split, out_batch, out_head, out_row, lse_split, scale, softcap,
    MASK: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATE: tl.constexpr,
    TOGETHER: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of a head against a share of their keys: grid (batch x heads x splits x tiles,).
    TOGETHER: the queries of all heads of a key head are one head's.

    `scale` is not negative; NEGATE changes the sign of q. The softmax' running maximum is that of
    q k^T itself, or with softcap or an additive mask that of the scores. Writes out / sum, and the
    natural logarithm of the sum of exponentials, of the share.
    """
    pid = tl.program_id(0)
    tile, split, head = pid % tiles, pid // tiles % splits, (pid // tiles // splits).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    if TOGETHER:
        b, kv = head // kv_heads, head % kv_heads
        h, query = kv * group + row // nq, (row % nq).to(tl.int64)
        count = nq * group
    else:
        b, kv = head // (kv_heads * group), head // group % kv_heads
        h, query = head % (kv_heads * group), row.to(tl.int64)
        count = nq
    valid = row < count
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    # exp2 takes c times what the maximum is taken of; above 0, so that -inf stays -inf
    c = LOG2E if SOFTCAP or MASK == _ADDITIVE_MASK else tl.maximum(scale * LOG2E, 1e-30)

    lane = tl.arange(0, BN)
    lo, hi, seen_from, seen_upto = 0, nk, 0, nk  # keys of any row; keys of every row
    begin, end = row, row  # not read
    if ROWS:
        at = rows + b * rows_batch + h * rows_head + query * 2
        begin = tl.load(at, mask=valid, other=0)
        end = tl.load(at + 1, mask=valid, other=0)
        seen_from = tl.max(begin, 0)
        seen_upto = tl.min(tl.where(valid, end, _MANY), 0)
        lo = tl.min(tl.where(begin < end, begin, _MANY), 0)
        hi = tl.max(end, 0)
        lo = tl.minimum(lo, hi)
    share = tl.cdiv(tl.cdiv(hi - lo, BN), splits) * BN
    lo = tl.minimum(lo + split * share, hi)
    hi = tl.minimum(lo + share, hi)
    # Tiles `whole_from` and the `whole` - 1 after it need no look at the intervals.
    total = tl.cdiv(hi - lo, BN)
    whole_from = tl.cdiv(tl.maximum(seen_from - lo, 0), BN)
    whole = tl.minimum(hi, seen_upto) - lo
    whole = tl.maximum(tl.where(whole > 0, whole // BN, 0) - whole_from, 0)
    whole_from = tl.minimum(whole_from, total)

    q_rows = q + b * wide(q_batch, ALIGN) + h * wide(q_head, ALIGN) + query * wide(q_row, ALIGN)
    k_stride, v_stride = wide(k_row, ALIGN), wide(v_row, ALIGN)
    k_base = k + b * wide(k_batch, ALIGN) + kv * wide(k_head, ALIGN)
    v_base = v + b * wide(v_batch, ALIGN) + kv * wide(v_head, ALIGN)
    k_lanes, v_lanes = lane.to(tl.int64) * k_stride, lane.to(tl.int64) * v_stride
    mask_rows = mask + b * mask_batch + h * mask_head + query * mask_row

    q0 = load_rows(q_rows, valid, 0, D0, D, True)
    q1 = load_rows(q_rows, valid, D0, D1, D, True) if D1 > 0 else q0
    q2 = load_rows(q_rows, valid, D0 + D1, D2, D, True) if D2 > 0 else q0
    if NEGATE:
        q0, q1, q2 = _negative(q0), _negative(q1), _negative(q2)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total_e = tl.zeros((BM,), tl.float32)
    acc0 = tl.zeros((BM, V0), tl.float32)
    if V1 > 0:
        acc1 = tl.zeros((BM, V1), tl.float32)
    if V2 > 0:
        acc2 = tl.zeros((BM, V2), tl.float32)

    for EDGE in tl.static_range(2):
        steps = total - whole if EDGE else whole
        for i in span(0, steps, 1):
            t = i + tl.where(i < whole_from, 0, whole) if EDGE else i + whole_from
            first = lo + t * BN
            column = first + lane
            inside = column < hi
            k_rows = k_base + tl.cast(first, tl.int64) * k_stride + k_lanes
            v_rows = v_base + tl.cast(first, tl.int64) * v_stride + v_lanes
            k0 = load_columns(k_rows, inside, 0, D0, D, EDGE)
            k1 = load_columns(k_rows, inside, D0, D1, D, EDGE) if D1 > 0 else k0
            k2 = load_columns(k_rows, inside, D0 + D1, D2, D, EDGE) if D2 > 0 else k0
            x = product(q0, q1, q2, k0, k1, k2, D1, D2, PRECISION)
            if SOFTCAP:
                x = capped(x * scale, softcap)
            elif MASK == _ADDITIVE_MASK:
                x = x * scale
            if MASK != _NO_MASK:
                there = valid[:, None] & inside[None, :] if EDGE else valid[:, None]
                x = masked(x, mask_rows, column, there, mask_column, MASK)
            if EDGE:
                seen = inside[None, :]
                if ROWS:
                    seen = (column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None])
                x = tl.where(seen, x, -float("inf"))
            new = tl.maximum(top, tl.max(x, 1))
            safe = tl.where(new == -float("inf"), 0.0, new)
            if MASK == _ADDITIVE_MASK:  # the lowest finite number times c would be -inf
                p = tl.exp2((x - safe[:, None]) * c)
                keep = tl.exp2((top - safe) * c)
            else:
                p = tl.exp2(x * c - (safe * c)[:, None])
                keep = tl.exp2(top * c - safe * c)
            top = new
            total_e = total_e * keep + tl.sum(p, 1)
            p = cast(p, v.dtype.element_ty)
            acc0 = acc0 * keep[:, None]
            acc0 = dot(p, load_rows(v_rows, inside, 0, V0, DV, EDGE), acc0, PRECISION)
            if V1 > 0:
                acc1 = acc1 * keep[:, None]
                acc1 = dot(p, load_rows(v_rows, inside, V0, V1, DV, EDGE), acc1, PRECISION)
            if V2 > 0:
                acc2 = acc2 * keep[:, None]
                acc2 = dot(p, load_rows(v_rows, inside, V0 + V1, V2, DV, EDGE), acc2, PRECISION)

    nothing = total_e == 0.0
    inverse = 1.0 / tl.where(nothing, 1.0, total_e)
    if not SOFTCAP and MASK != _ADDITIVE_MASK:
        top = top * tl.maximum(scale, 1e-30)
    log = tl.where(nothing, -float("inf"), top + tl.log(tl.where(nothing, 1.0, total_e)))
    split64 = split.to(tl.int64)
    at = lse + split64 * lse_split + head * count + row
    tl.store(at, log, mask=valid)
    out_rows = out + split64 * out_split + b * wide(out_batch, ALIGN) + h * wide(out_head, ALIGN)
    out_rows += query * wide(out_row, ALIGN)
    # a sum of nothing but hidden keys may be that of 0 * NaN
    store_rows(out_rows, _share(acc0, inverse, nothing), valid, 0, V0, DV)
    if V1 > 0:
        store_rows(out_rows, _share(acc1, inverse, nothing), valid, V0, V1, DV)
    if V2 > 0:
        store_rows(out_rows, _share(acc2, inverse, nothing), valid, V0 + V1, V2, DV)


@triton.jit
def _negative(x):
    return cast(-x.to(tl.float32), x.dtype)


@triton.jit
def _share(acc, inverse, nothing):
    return tl.where(nothing[:, None], 0.0, acc * inverse[:, None])


# limits: registers 128, spills 0
@triton.jit
def combine_kernel(
    parts, part_lses, out, lse, nq, heads, blocks, splits, part_split, lse_split,
    out_batch, out_head, out_row, DV: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Puts the shares of BR rows of a head together in order: grid (batch x heads x blocks,).

    parts (splits, B, H, Nq, Dv) and part_lses (splits, B, H, Nq) are fp32.
    """
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    row = (pid % blocks) * BR + tl.arange(0, BR)
    valid = row < nq
    column = tl.arange(0, BV)
    inside = valid[:, None] & (column < DV)[None, :]
    row64 = row.to(tl.int64)
    share = head * nq + row64
    logs = part_lses + share
    values = parts + share[:, None] * DV + column[None, :]
    top = tl.full((BR,), -float("inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BV), tl.float32)
    for s in span(0, splits, 1):
        s64 = tl.cast(s, tl.int64)
        log = tl.load(logs + s64 * lse_split, mask=valid, other=0.0)
        new = tl.maximum(top, log)
        safe = tl.where(new == -float("inf"), 0.0, new)
        keep, weight = tl.exp2((top - safe) * LOG2E), tl.exp2((log - safe) * LOG2E)
        part = tl.load(values + s64 * part_split, mask=inside, other=0.0)
        acc = acc * keep[:, None] + part * weight[:, None]
        total = total * keep + weight
        top = new
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(lse + share, tl.where(nothing, -float("inf"), top + tl.log(total)), mask=valid)
    at = out + b * out_batch + h * out_head + (row64 * out_row)[:, None] + column[None, :]
    tl.store(at, cast(acc / total[:, None], out.dtype.element_ty), mask=inside)


# limits: registers 128, spills 0
@triton.jit
def prepare_kernel(
    x, out, weight, bias, cos, sin, places, rows, heads, blocks,
    x_batch, x_head, x_row, weight_head, table_batch, first, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ROPE: tl.constexpr, PLACES: tl.constexpr,
    HALF: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Normalises and then rotates BR rows of a head in fp32: grid (batch x heads x blocks,).

    out is (B, H, rows, D), contiguous. Row i takes row first + i of the tables, or places[i].
    """
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    row = (pid % blocks) * BR + tl.arange(0, BR)
    valid = row < rows
    row64 = row.to(tl.int64)
    column = tl.arange(0, BD)
    known = column < D
    x_rows = x + b * x_batch + h * x_head + (row64 * x_row)[:, None]
    inside = valid[:, None] & known[None, :]
    value = tl.load(x_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((BR,), tl.float32)
    scale = tl.full((BR,), 1.0, tl.float32)
    if NORM != _NO_NORM:
        if NORM == _LAYER:
            mean = tl.sum(value, 1) / D
        centred = tl.where(inside, value - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / D
        scale = 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32))
    weight += h * weight_head
    bias += h * weight_head
    y = _normalised(value, mean, scale, weight, bias, column, known, NORM, BIAS)
    if ROPE != _NO_ROPE:
        turned = column < 2 * HALF
        if ROPE == _HALVES:
            early = column < HALF
            pair = tl.where(early, column, column - HALF)
            partner = tl.where(early, column + HALF, column - HALF)
        else:
            early = column % 2 == 0
            pair = column // 2
            partner = tl.where(early, column + 1, column - 1)
        partner = tl.where(turned, partner, column)
        place = first + row
        if PLACES:
            place = tl.load(places + row64, mask=valid, other=0)
        at = b * table_batch + (tl.maximum(place, 0).to(tl.int64) * HALF)[:, None] + pair[None, :]
        rotates = valid[:, None] & turned[None, :]
        cosine = tl.load(cos + at, mask=rotates, other=1.0)
        sine = tl.load(sin + at, mask=rotates, other=0.0)
        other = tl.load(x_rows + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        other = _normalised(other, mean, scale, weight, bias, partner, known, NORM, BIAS)
        y = y * cosine + tl.where(early[None, :], -other, other) * sine
    out_rows = out + (head * rows + row64)[:, None] * D
    tl.store(out_rows + column[None, :], cast(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(
    x, mean, scale, weight, bias, column, known, NORM: tl.constexpr, BIAS: tl.constexpr
):
    if NORM != _NO_NORM:
        factor = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
        x = (x - mean[:, None]) * scale[:, None] * factor[None, :]
        if BIAS:
            x += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    return x


# limits: registers 64, spills 0
@triton.jit
def intervals_kernel(
    kv_range, cu_q, cu_k, rows, places, nq, nk, heads, blocks, segments, steps,
    range_batch, range_head, range_row, range_side, q_stride, k_stride, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RANGE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one of the heads that differ: grid (batch x heads x blocks,)."""
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    row = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = row < nq
    place = row.to(tl.int64)
    begin = tl.zeros((BLOCK,), tl.int64)
    end = begin + nk
    if PACKED:
        # The segment is that whose end is the first above the row; `steps` halvings find it.
        low = tl.zeros((BLOCK,), tl.int64)
        high = low + segments
        for _ in span(0, steps, 1):
            open_ = low < high
            middle = (low + high) // 2
            ends = tl.load(cu_q + (middle + 1) * q_stride, mask=open_, other=0).to(tl.int64)
            passed = ends <= row
            low = tl.where(open_ & passed, middle + 1, low)
            high = tl.where(open_ & (passed == 0), middle, high)
        inside = valid & (low < segments)
        first = tl.load(cu_q + low * q_stride, mask=inside, other=0).to(tl.int64)
        last = tl.load(cu_q + (low + 1) * q_stride, mask=inside, other=0).to(tl.int64)
        begin = tl.load(cu_k + low * k_stride, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_k + (low + 1) * k_stride, mask=inside, other=0).to(tl.int64)
        # Offsets may be anything, also such that their sums overflow.
        begin = tl.minimum(tl.maximum(begin, 0), nk)
        end = tl.minimum(tl.maximum(end, 0), nk)
        last = tl.minimum(tl.maximum(last, 0), nq)
        inside = inside & (first <= row)
        begin, end = tl.where(inside, begin, 0), tl.where(inside, end, 0)
        place += tl.where(inside, end - last, 0)
        at_key = tl.maximum(tl.minimum(place, nk - 1), 0)
        tl.store(places + row, at_key.to(tl.int32), mask=valid)
    if RANGE:
        at = kv_range + head // heads * range_batch + head % heads * range_head
        at += row.to(tl.int64) * range_row
        begin = tl.load(at, mask=valid, other=0).to(tl.int64)
        end = tl.load(at + range_side, mask=valid, other=0).to(tl.int64)
    if CAUSAL:
        end = tl.minimum(end, place + 1)
    if LEFT:
        begin = tl.maximum(begin, place - left)
    if RIGHT:
        end = tl.minimum(end, place + right + 1)
    begin = tl.maximum(begin, 0)
    end = tl.minimum(end, nk)
    sees = begin < end
    out = rows + (head * nq + row) * 2
    tl.store(out, tl.where(sees, begin, 0).to(tl.int32), mask=valid)
    tl.store(out + 1, tl.where(sees, end, 0).to(tl.int32), mask=valid)
