"""What Triton's interpreter (TRITON_INTERPRET=1) gets wrong, and on a GPU plain Triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether this process interprets its kernels; as for `triton.jit` itself, settled at import."""


def _steps(start, end, step):
    """The interpreter has no range of what a kernel computed, under numpy 2.4."""
    first, last = (x.handle.data.item() if isinstance(x, tl.tensor) else x for x in (start, end))
    return range(first, last, step)


span = _steps if INTERPRET.value else tl.range
"""tl.range(start, end, step)."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, summed in fp32. The interpreter would multiply the bits of bf16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`, rounded to nearest even. The interpreter would truncate to bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)
