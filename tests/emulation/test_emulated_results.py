"""What the emulator computes: collectives against the PTX ISA and the CUDA C++ guide, whole kernels
against fp64."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch


def exact_gemm_error(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> float:
    """The largest error against fp64, over what fp32 sums of k products may have."""
    exact = a.double() @ b.double().T
    bound = a.double().abs() @ b.double().abs().T * a.shape[1] * 2.0**-24
    return ((c.double() - exact).abs() / bound).max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(257, 129, 72), (64, 64, 32), (1, 1, 8)])
def test_tile_gemm(emulator: Any, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n)
    entry = "gemm_bf16" if dtype == torch.bfloat16 else "gemm_f16"
    emulator(entry, a, b, c, 1, 1, 8)  # loads debug information and symbols
    start = time.perf_counter()
    assert emulator(entry, a, b, c, m, n, k, unwritten=(c,)) == ""
    assert time.perf_counter() - start < 10  # tests of whole ops rely on fractions of a second
    assert exact_gemm_error(a, b, c) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mma_fragments(emulator: Any, dtype: torch.dtype) -> None:
    """Filled and read by the tables of the PTX ISA, every element distinct."""
    depth = 8 if dtype == torch.float32 else 16
    a = torch.randperm(16 * depth).view(16, depth).sub(100).to(dtype)
    b = torch.randperm(depth * 8).view(depth, 8).sub(50).to(dtype)
    c = torch.empty(16, 8)
    entry = {torch.bfloat16: "mma_bf16", torch.float16: "mma_f16", torch.float32: "mma_tf32"}[dtype]
    assert emulator(entry, a, b, c, unwritten=(c,)) == ""
    assert torch.equal(c.double(), 1 + a.double() @ b.double())  # integers: exact


def test_tf32_rounds_its_operands(emulator: Any) -> None:
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert emulator("mma_tf32", a, b, c, unwritten=(c,)) == ""
    error = (c - 1 - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    assert 2.0**-15 < error.max() < 2.0**-10  # half an ulp of 11 bits in each operand


@pytest.mark.parametrize(("count", "transposed"), [*itertools.product([1, 2, 4], [False, True])])
def test_ldmatrix_fragments(emulator: Any, count: int, transposed: bool) -> None:
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.empty(32, count, dtype=torch.int32)
    assert emulator("load_matrices", matrices, out, count, int(transposed), unwritten=(out,)) == ""
    # "each thread receives a row's fragment": thread t holds row t / 4, columns 2 (t % 4) and + 1
    source = (matrices.mT if transposed else matrices)[:count].reshape(count, 32, 2)
    assert torch.equal(out.view(torch.int16).view(32, count, 2), source.transpose(0, 1))


@pytest.mark.parametrize(("rows", "columns"), [(3, 1000), (1, 7), (2, 256)])
def test_reduction(emulator: Any, rows: int, columns: int) -> None:
    x, sums, largest = torch.randn(rows, columns), torch.empty(rows), torch.empty(rows)
    assert emulator("row_sums", x, sums, largest, rows, columns, unwritten=(sums, largest)) == ""
    exact = x.double().sum(1)
    bound = x.double().abs().sum(1) * columns * 2.0**-24
    assert ((sums - exact).abs() <= bound).all()
    assert torch.equal(largest, x.amax(1))


def test_collectives(emulator: Any) -> None:
    x = torch.randperm(64, dtype=torch.int32) + 1
    lane = torch.arange(64) % 32
    warp = torch.arange(64) - lane
    out = torch.empty(23, 64, dtype=torch.int32)
    assert emulator("all_collectives", x, out, unwritten=(out,)) == ""

    def signed(bits: int) -> int:
        return bits - 2**32 if bits >= 2**31 else bits

    def each(of_lanes: Any) -> list[int]:
        """of_lanes(lanes that agree, values of the warp) for each thread."""
        return [signed(of_lanes(i, x[i - i % 32 : i - i % 32 + 32].tolist())) for i in range(64)]

    def bits(flags: Any) -> int:
        return sum(int(flag) << i for i, flag in enumerate(flags))

    def xor(values: list[int]) -> int:
        result = 0
        for value in values:
            result ^= value
        return result

    def source(index: torch.Tensor) -> list[int]:
        return x[warp + index].tolist()

    def clamped(index: torch.Tensor, width: int) -> torch.Tensor:
        """CUDA C++ guide: what lies outside the segment leaves a thread its own value."""
        inside = (index >= 0) & (index // width == lane // width)
        return torch.where(inside, index, lane)

    reached = torch.where((lane ^ 9) // 8 > lane // 8, lane, lane ^ 9)
    expected = [
        source(torch.full_like(lane, 5)),
        source(x % 32),
        source(lane // 8 * 8 + 11 % 8),
        source(clamped(lane - 3, 32)),
        source(clamped(lane - 3, 16)),
        source(clamped(lane + 3, 32)),
        source(clamped(lane + 3, 16)),
        source(lane ^ 9),
        source(reached),
        source(lane ^ 9),
        each(lambda _, v: bits(e % 3 == 0 for e in v)),
        each(lambda _, v: int(40 in v)),
        each(lambda _, v: int(all(e < 60 for e in v))),
        each(lambda i, v: bits(e % 3 == x[i] % 3 for e in v)),
        each(lambda i, v: sum(v[:16] if i % 32 < 16 else v[16:])),
        each(lambda _, v: min(v)),
        each(lambda _, v: max(v)),
        each(lambda _, v: xor(v)),
        [sum(1 for e in x.tolist() if e % 3 == 0)] * 64,
        [0] * 64,
        [1] * 64,
        source(lane ^ 1),
        source(lane ^ 1),
    ]
    assert out.tolist() == expected


def test_atomics(emulator: Any) -> None:
    counters = torch.tensor([0, 0, 0, 0, 0, -1, 0, 0, 0], dtype=torch.int32)
    assert emulator("all_atomics", counters) == ""
    n = 3 * 64
    xor = 0
    for i in range(n):
        xor ^= i
    expected = [n * (n - 1) // 2, 1 - n, n - 1, 2**31 - 1, xor, ~0b11111, 7, 1, -1]
    assert counters.tolist() == expected


def test_conversions(emulator: Any) -> None:
    x = torch.cat(
        [
            torch.randn(2000) * torch.logspace(-44, 38, 2000),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65519.996, 65520.0, 2.0**-25]),
            torch.arange(4096).mul(2**12).add(2**11 + 0x38000000).int().view(torch.float32),
        ]
    )
    outs = [torch.empty(len(x), dtype=torch.int32) for _ in range(3)] + [torch.empty(len(x))]
    assert emulator("all_conversions", x, *outs, len(x), unwritten=tuple(outs)) == ""
    bf16, f16, tf32, exp2 = outs
    for out, dtype, high in ((bf16, torch.bfloat16, 1.0), (f16, torch.float16, -1.0)):
        low, upper = out.view(dtype).view(-1, 2).unbind(1)
        assert torch.equal(low.view(torch.int16), x.to(dtype).view(torch.int16))
        assert (upper == high).all()
    finite = x.isfinite() & (x.abs() < 2.0**127) & (x.abs() > 2.0**-120)
    error = ((tf32.view(torch.float32) - x.double()) / x.double()).abs()[finite]
    assert error.max() <= 2.0**-11
    assert ((tf32 & 0x1FFF)[finite] == 0).all()
    normal = (x > -126) & (x < 128)
    exact = torch.exp2(x.double())
    assert ((exp2.double() - exact).abs() <= exact * 2.0**-22)[normal].all()
    assert (exp2[x < -126.5] == 0).all()


def test_nan_converts_to_nan(emulator: Any) -> None:
    x = torch.tensor([torch.nan])
    outs = [torch.empty(1, dtype=torch.int32) for _ in range(3)] + [torch.empty(1)]
    assert emulator("all_conversions", x, *outs, 1, unwritten=tuple(outs)) == ""
    assert outs[0].view(torch.bfloat16)[0].isnan()
    assert outs[1].view(torch.float16)[0].isnan()
    assert outs[2].view(torch.float32).isnan()
    assert outs[3].isnan()
