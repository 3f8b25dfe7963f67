"""Kernels of the contrastive losses; see contrastive.py for how they are put together.

Names: x is a tile of the similarity sign(scale) * image text^T, so that |scale| * x is the scaled
logit in both signs; G is dLoss/dx without the factors that all of its entries share.
`kind` says what the positives are: DIAGONAL, IDS (equal ids) or IGNORE_SAME (the diagonal, other
equal ids take no part).

tests/compile_only holds each kernel to the line of limits above it; a spill is an instruction. In
128 x 128 tiles kernels spill in the branch of the tiles that `_touches`, which needs every mask and
coefficient at once (and METRICS always does); without that branch they do not. Without ids only the
tiles on the diagonal and at the edges enter it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._compat import cast, dot

DIAGONAL, IDS, IGNORE_SAME = 0, 1, 2
ROWS, COLUMNS = 1, 2  # bits of DIRECTIONS: softmax over the texts of an image, and the reverse

_DIAGONAL, _IGNORE_SAME = tl.constexpr(DIAGONAL), tl.constexpr(IGNORE_SAME)
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Maxima begin here: far above _LOWEST, which excluded entries are set to, so that their
# exponentials are 0 even where a tile has nothing else.
_FLOOR = tl.constexpr(-1e30)
_SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _similarity(
    image, text, rows, cols, n, m, image_stride, text_stride, sign,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x of the given rows and columns; those beyond the last repeat it."""
    k = tl.arange(0, BK)
    row_offsets = tl.minimum(rows, n - 1).to(tl.int64) * image_stride
    col_offsets = tl.minimum(cols, m - 1).to(tl.int64) * text_stride
    a = image + row_offsets[:, None] + k[None, :]
    b = text + col_offsets[None, :] + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            acc = dot(tl.load(a), tl.load(b), acc, PRECISION)
        else:
            inside = k < D - start
            left = tl.load(a, mask=inside[None, :], other=0.0)
            right = tl.load(b, mask=inside[:, None], other=0.0)
            acc = dot(left, right, acc, PRECISION)
        a += BK
        b += BK
    return acc * sign


@triton.jit
def _touches(row, col, n, m, kind, BM: tl.constexpr, BN: tl.constexpr):
    """Whether the tile at (row, col) holds positives, excluded pairs or padding."""
    crosses = (row < col + BN) & (col < row + BM)
    return (kind != _DIAGONAL) | crosses | (row + BM > n) | (col + BN > m)


@triton.jit
def _pairs(rows, cols, n, m, kind, image_ids, text_ids):
    """(positive, excluded) of a tile; a positive may be excluded as well.

    No branch hands on a whole tile: that would cost every tile registers.
    """
    row_ids, col_ids = rows, cols
    if kind != _DIAGONAL:
        row_ids = tl.load(image_ids + rows, mask=rows < n, other=0)
        col_ids = tl.load(text_ids + cols, mask=cols < m, other=0)
    diagonal = rows[:, None] == cols[None, :]
    same = row_ids[:, None] == col_ids[None, :]
    ignore = kind == _IGNORE_SAME
    positive = (diagonal & ignore) | (same & (ignore == 0))
    excluded = (same & ignore & (diagonal == 0)) | (rows >= n)[:, None] | (cols >= m)[None, :]
    return positive, excluded


@triton.jit
def _log2_scale(scale):
    """sign(scale), and |scale| * log2(e), which is never 0 so that excluded entries stay out."""
    value = tl.load(scale).to(tl.float32)
    sign = tl.where(value < 0, -1.0, 1.0)
    return sign, tl.maximum(tl.abs(value) * _LOG2E, _SMALLEST)


@triton.jit
def _moved(entropy, total, shift):
    """sum of e * log e, and e, after their maximum rose by -shift (in log2)."""
    nats = tl.where(shift > -126.0, shift * (1.0 / _LOG2E) * total, 0.0)
    return tl.exp2(shift) * (entropy + nats)


# limits: registers 255, spills 300
@triton.jit
def stats_kernel(
    image, text, scale, image_ids, text_ids, row_parts, col_parts, kept_similarity,
    n, m, image_stride, text_stride, kept_stride, first_row, part_rows, tiles, kind, smoothing,
    fields,
    DIRECTIONS: tl.constexpr, METRICS: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of BM rows x `tiles` tiles of columns: grid (row tiles, splits).

    Writes row_parts (splits, fields, part_rows) and col_parts (row tiles, fields, m), which
    `merge_kernel` merges; the fields are those of the op's `stats`. KEEP writes x as well.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    sign, c = _log2_scale(scale)
    row = first_row + tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    row_max = tl.full((BM,), _FLOOR, tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    row_positive = tl.zeros((BM,), tl.float32)
    row_kept = tl.zeros((BM,), tl.float32)
    row_entropy = tl.zeros((BM,), tl.float32)
    row_best = tl.full((BM,), _LOWEST, tl.float32)
    row_other = tl.full((BM,), _LOWEST, tl.float32)
    wide, long = tl.cast(m, tl.int64), tl.cast(part_rows, tl.int64)
    t = tl.program_id(1) * tiles
    last = tl.minimum(t + tiles, tl.cdiv(m, BN))
    while t < last:  # the interpreter has no range of what it computed, under numpy 2.4
        col = t * BN
        cols = col + tl.arange(0, BN)
        x = _similarity(
            image, text, rows, cols, n, m, image_stride, text_stride, sign,
            D, BM, BN, BK, PRECISION,
        )  # fmt: skip
        inside = cols < m
        out = col_parts + tile * fields * wide + cols
        if KEEP:
            at = kept_similarity + (tile * BM + tl.arange(0, BM))[:, None] * kept_stride
            tl.store(at + cols[None, :], x, mask=(rows < n)[:, None] & inside[None, :])
        col_positive = tl.zeros((BN,), tl.float32)
        if _touches(row, col, n, m, kind, BM, BN) | (smoothing != 0) | METRICS:
            positive, excluded = _pairs(rows, cols, n, m, kind, image_ids, text_ids)
            x = tl.where(excluded, 0.0, x)
            taken = tl.where(positive, x, 0.0)
            row_positive += tl.sum(taken, 1)
            col_positive += tl.sum(taken, 0)
            if METRICS | (smoothing != 0):
                row_kept += tl.sum(x, 1)
                if DIRECTIONS & 2:
                    tl.store(out + 3 * wide, tl.sum(x, 0), mask=inside)
            if METRICS:
                best = tl.where(positive & (excluded == 0), x, _LOWEST)
                other = tl.where(positive | excluded, _LOWEST, x)
                row_best = tl.maximum(row_best, tl.max(best, 1))
                row_other = tl.maximum(row_other, tl.max(other, 1))
                tl.store(out + 5 * wide, tl.max(best, 0), mask=inside)
                tl.store(out + 6 * wide, tl.max(other, 0), mask=inside)
            x = tl.where(excluded, _LOWEST, x)
        if DIRECTIONS & 1:
            new_max = tl.maximum(row_max, tl.max(x, 1))
            shift = (row_max - new_max) * c
            y = (x - new_max[:, None]) * c
            e = tl.exp2(y)
            if METRICS:
                row_entropy = _moved(row_entropy, row_sum, shift)
                row_entropy += tl.sum(tl.where(e > 0, e * y, 0.0), 1) * (1.0 / _LOG2E)
            row_sum = row_sum * tl.exp2(shift) + tl.sum(e, 1)
            row_max = new_max
        if DIRECTIONS & 2:
            col_max = tl.maximum(tl.max(x, 0), _FLOOR)
            y = (x - col_max[None, :]) * c
            e = tl.exp2(y)
            tl.store(out, col_max, mask=inside)
            tl.store(out + wide, tl.sum(e, 0), mask=inside)
            tl.store(out + 2 * wide, col_positive, mask=inside)
            if METRICS:
                nats = tl.sum(tl.where(e > 0, e * y, 0.0), 0) * (1.0 / _LOG2E)
                tl.store(out + 4 * wide, nats, mask=inside)
        t += 1
    if DIRECTIONS & 1:
        out = row_parts + split * fields * long + tile * BM + tl.arange(0, BM)
        inside = rows < n
        tl.store(out, row_max, mask=inside)
        tl.store(out + long, row_sum, mask=inside)
        tl.store(out + 2 * long, row_positive, mask=inside)
        if METRICS | (smoothing != 0):
            tl.store(out + 3 * long, row_kept, mask=inside)
        if METRICS:
            tl.store(out + 4 * long, row_entropy, mask=inside)
            tl.store(out + 5 * long, row_best, mask=inside)
            tl.store(out + 6 * long, row_other, mask=inside)


# limits: registers 64, spills 0
@triton.jit
def merge_kernel(
    parts, stats, scale, count, length, part_length, stats_stride, fields, fresh, smoothing,
    METRICS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Merges parts (count, fields, part_length), in order, into stats (fields, length).

    What stats holds comes first, unless `fresh`.
    """
    _sign, c = _log2_scale(scale)
    part_length, stats_stride = tl.cast(part_length, tl.int64), tl.cast(stats_stride, tl.int64)
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < length
    best = tl.full((B,), _FLOOR, tl.float32)
    total = tl.zeros((B,), tl.float32)
    positive = tl.zeros((B,), tl.float32)
    kept = tl.zeros((B,), tl.float32)
    entropy = tl.zeros((B,), tl.float32)
    best_positive = tl.full((B,), _LOWEST, tl.float32)
    best_negative = tl.full((B,), _LOWEST, tl.float32)
    old = stats + i
    if fresh == 0:
        best = tl.load(old, mask=inside, other=_FLOOR)
        total = tl.load(old + stats_stride, mask=inside, other=0.0)
        positive = tl.load(old + 2 * stats_stride, mask=inside, other=0.0)
        if METRICS | (smoothing != 0):
            kept = tl.load(old + 3 * stats_stride, mask=inside, other=0.0)
        if METRICS:
            entropy = tl.load(old + 4 * stats_stride, mask=inside, other=0.0)
            best_positive = tl.load(old + 5 * stats_stride, mask=inside, other=_LOWEST)
            best_negative = tl.load(old + 6 * stats_stride, mask=inside, other=_LOWEST)
    new = parts + i
    part = 0
    while part < count:
        other = tl.load(new, mask=inside, other=_FLOOR)
        other_total = tl.load(new + part_length, mask=inside, other=0.0)
        positive += tl.load(new + 2 * part_length, mask=inside, other=0.0)
        now = tl.maximum(best, other)
        a, b = (best - now) * c, (other - now) * c
        if METRICS | (smoothing != 0):
            kept += tl.load(new + 3 * part_length, mask=inside, other=0.0)
        if METRICS:
            nats = tl.load(new + 4 * part_length, mask=inside, other=0.0)
            entropy = _moved(entropy, total, a) + _moved(nats, other_total, b)
            found = tl.load(new + 5 * part_length, mask=inside, other=_LOWEST)
            best_positive = tl.maximum(best_positive, found)
            found = tl.load(new + 6 * part_length, mask=inside, other=_LOWEST)
            best_negative = tl.maximum(best_negative, found)
        total = total * tl.exp2(a) + other_total * tl.exp2(b)
        best = now
        new += fields * part_length
        part += 1
    tl.store(old, best, mask=inside)
    tl.store(old + stats_stride, total, mask=inside)
    tl.store(old + 2 * stats_stride, positive, mask=inside)
    if METRICS or smoothing:
        tl.store(old + 3 * stats_stride, kept, mask=inside)
    if METRICS:
        tl.store(old + 4 * stats_stride, entropy, mask=inside)
        tl.store(old + 5 * stats_stride, best_positive, mask=inside)
        tl.store(old + 6 * stats_stride, best_negative, mask=inside)


# limits: registers 255, spills 140
@triton.jit
def clip_grads_kernel(
    image, text, scale, image_ids, text_ids, row_coefs, col_coefs, kept_similarity, grads, sums,
    n, m, image_stride, text_stride, kept_stride, coefs_stride, grads_stride, sums_stride,
    first_row, first_col, kind, smoothing,
    DIRECTIONS: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G of InfoNCE for a block: grid (row tiles, column tiles).

    The rows of row_coefs (4, n) and col_coefs (4, m) are the maximum of the softmax, the
    coefficient of its exponential, and what each positive and each kept entry takes away. Writes G
    to grads (rows, columns) of the block, and the sum of G * x to sums (row tiles, column tiles) of
    the whole matrix. KEEP reads x as `stats_kernel` wrote it.
    """
    row_tile, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sign, c = _log2_scale(scale)
    row, col = first_row + tl.program_id(0) * BM, first_col + tl.program_id(1) * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    row_inside, col_inside = rows < n, cols < m
    inside = row_inside[:, None] & col_inside[None, :]
    local = row_tile * BM + tl.arange(0, BM)
    if KEEP:
        at = kept_similarity + local[:, None] * kept_stride + cols[None, :]
        x = tl.load(at, mask=inside, other=0.0)
    else:
        x = _similarity(
            image, text, rows, cols, n, m, image_stride, text_stride, sign,
            D, BM, BN, BK, PRECISION,
        )  # fmt: skip
    g = tl.zeros((BM, BN), tl.float32)
    coefs_stride = tl.cast(coefs_stride, tl.int64)
    a, b = row_coefs + rows, col_coefs + cols
    if DIRECTIONS & 1:
        shift = tl.load(a, mask=row_inside, other=0.0)
        weight = tl.load(a + coefs_stride, mask=row_inside, other=0.0)
        g += weight[:, None] * tl.exp2((x - shift[:, None]) * c)
    if DIRECTIONS & 2:
        shift = tl.load(b, mask=col_inside, other=0.0)
        weight = tl.load(b + coefs_stride, mask=col_inside, other=0.0)
        g += weight[None, :] * tl.exp2((x - shift[None, :]) * c)
    if _touches(row, col, n, m, kind, BM, BN) | (smoothing != 0):
        positive, excluded = _pairs(rows, cols, n, m, kind, image_ids, text_ids)
        if DIRECTIONS & 1:
            taken = tl.load(a + 2 * coefs_stride, mask=row_inside, other=0.0)
            g -= tl.where(positive, taken[:, None], 0.0)
            here = row_inside & (smoothing != 0)
            g -= tl.load(a + 3 * coefs_stride, mask=here, other=0.0)[:, None]
        if DIRECTIONS & 2:
            taken = tl.load(b + 2 * coefs_stride, mask=col_inside, other=0.0)
            g -= tl.where(positive, taken[None, :], 0.0)
            here = col_inside & (smoothing != 0)
            g -= tl.load(b + 3 * coefs_stride, mask=here, other=0.0)[None, :]
        g = tl.where(excluded, 0.0, g)
    tl.store(sums + (row // BM) * sums_stride + col // BN, tl.sum(g * x))
    at = grads + local[:, None] * grads_stride + (col_tile * BN + tl.arange(0, BN))[None, :]
    tl.store(at, cast(g, grads.dtype.element_ty), mask=inside)


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1]: e times a polynomial, 1e-7 off at most, however small e is."""
    p = e * -0.00325637848 + 0.019907161
    p = p * e - 0.0570642008
    p = p * e + 0.106142647
    p = p * e - 0.153118631
    p = p * e + 0.196781173
    p = p * e - 0.249545589
    p = p * e + 0.33330004
    p = p * e - 0.49999904
    p = p * e + 0.999999995
    return p * e


# limits: registers 255, spills 240
@triton.jit
def sigmoid_kernel(
    image, text, scale, bias, image_ids, text_ids, row_weight, col_weight, losses, grads, sums,
    n, m, image_stride, text_stride, losses_stride, grads_stride, sums_stride,
    first_row, first_col, kind, weighted,
    GRADS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pair losses of a block of the sigmoid loss, and G: grid (row tiles, column tiles).

    Writes the row sums of each tile to losses (column tiles, rows) of the block, G to grads (rows,
    columns) of the block, and the sums of G * x and of G to sums (2, row tiles, column tiles) of
    the whole matrix, whose planes are sums_stride * (row tiles) apart.
    """
    row_tile, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sign, _c = _log2_scale(scale)
    row, col = first_row + tl.program_id(0) * BM, first_col + tl.program_id(1) * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    local = row_tile * BM + tl.arange(0, BM)
    x = _similarity(
        image, text, rows, cols, n, m, image_stride, text_stride, sign,
        D, BM, BN, BK, PRECISION,
    )  # fmt: skip
    z = x * tl.abs(tl.load(scale).to(tl.float32)) + tl.load(bias).to(tl.float32)
    touches = _touches(row, col, n, m, kind, BM, BN)
    # the masks are formed anew each time: kept, they would cost every tile registers
    if touches:
        positive, _excluded = _pairs(rows, cols, n, m, kind, image_ids, text_ids)
        z = tl.where(positive, -z, z)
    e = tl.exp2(-tl.abs(z) * _LOG2E)
    of_row = tl.full((BM,), 1.0, tl.float32)
    of_col = tl.full((BN,), 1.0, tl.float32)
    if weighted != 0:
        of_row = tl.load(row_weight + rows, mask=rows < n, other=0.0)
        of_col = tl.load(col_weight + cols, mask=cols < m, other=0.0)
    loss = of_col[None, :] * (tl.maximum(z, 0.0) + _log1p_unit(e))
    if touches:
        _positive, excluded = _pairs(rows, cols, n, m, kind, image_ids, text_ids)
        loss = tl.where(excluded, 0.0, loss)
    at = losses + col_tile * losses_stride + local
    tl.store(at, of_row * tl.sum(loss, 1), mask=rows < n)
    if GRADS:
        g = of_row[:, None] * of_col[None, :] * (tl.where(z > 0, 1.0, e) / (1.0 + e))
        if touches:
            positive, excluded = _pairs(rows, cols, n, m, kind, image_ids, text_ids)
            g = tl.where(excluded, 0.0, tl.where(positive, -g, g))
        at = sums + (row // BM) * sums_stride + col // BN
        tl.store(at, tl.sum(g * x))
        tl.store(at + sums_stride * tl.cdiv(n, BM), tl.sum(g))
        at = grads + local[:, None] * grads_stride + (col_tile * BN + tl.arange(0, BN))[None, :]
        inside = (rows < n)[:, None] & (cols < m)[None, :]
        tl.store(at, cast(g, grads.dtype.element_ty), mask=inside)
