"""What the forward and backward kernels of attention share.

A head dim is up to three pieces, powers of two of which the last may be cut: START is the first
feature of a piece, SIZE its length, D the head dim. A piece of SIZE 0 does not exist: what stands
for it is the one before and is never looked at.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._compat import cast, dot

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2

LOG2E = tl.constexpr(1.4426950408889634)
_BOOL_MASK, _ADDITIVE_MASK = tl.constexpr(BOOL_MASK), tl.constexpr(ADDITIVE_MASK)


@triton.jit
def wide(x, ALIGN: tl.constexpr):
    """A stride as int64, known to be a multiple of ALIGN: rows of 72 features are of 16 bytes."""
    x = tl.cast(x, tl.int64)
    return x if ALIGN == 1 else tl.multiple_of(x, ALIGN)


@triton.jit
def load_rows(
    rows, inside, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr
):
    """(rows, SIZE): a piece of rows of D features; `rows` points to the first of each. Features
    beyond D, and with CHECK rows that are not `inside`, are 0."""
    column = START + tl.arange(0, SIZE)
    at = rows[:, None] + column[None, :]
    if START + SIZE <= D:
        if CHECK:
            return tl.load(at, mask=inside[:, None], other=0.0)
        else:
            return tl.load(at)
    else:
        if CHECK:
            return tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def load_columns(
    rows, inside, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr
):
    """(SIZE, rows): `load_rows` transposed."""
    column = START + tl.arange(0, SIZE)
    at = rows[None, :] + column[:, None]
    if START + SIZE <= D:
        if CHECK:
            return tl.load(at, mask=inside[None, :], other=0.0)
        else:
            return tl.load(at)
    else:
        if CHECK:
            return tl.load(at, mask=inside[None, :] & (column < D)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(column < D)[:, None], other=0.0)


@triton.jit
def store_rows(rows, x, inside, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Stores a piece (rows, SIZE) of fp32, rounded, to the rows that are `inside`."""
    column = START + tl.arange(0, SIZE)
    at = rows[:, None] + column[None, :]
    mask = inside[:, None] if START + SIZE <= D else inside[:, None] & (column < D)[None, :]
    tl.store(at, cast(x, rows.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """Relative error 2e-7: a polynomial near 0, where 1 - e would cancel."""
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = ((z * 1.984081e-2 - 5.381646e-2) * z + 1.3332966e-1) * z - 3.3333332e-1
    near = magnitude + magnitude * z * p
    y = tl.where(magnitude < 0.35, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap * tanh(x / softcap)


@triton.jit
def masked(x, mask_rows, columns, inside, column_stride, MASK: tl.constexpr):
    """Scores x (rows, columns) under a mask; entries that are not `inside` read none and stay."""
    at = mask_rows[:, None] + columns.to(tl.int64)[None, :] * column_stride
    if MASK == _BOOL_MASK:
        return tl.where(tl.load(at, mask=inside, other=1) != 0, x, -float("inf"))
    elif MASK == _ADDITIVE_MASK:
        return x + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        return x


@triton.jit
def product(a0, a1, a2, b0, b1, b2, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr):
    """(m, n) fp32: the sum over pieces of a (m, D) times b (D, n)."""
    acc = tl.zeros((a0.shape[0], b0.shape[1]), tl.float32)
    acc = dot(a0, b0, acc, PRECISION)
    if D1 > 0:
        acc = dot(a1, b1, acc, PRECISION)
    if D2 > 0:
        acc = dot(a2, b2, acc, PRECISION)
    return acc
