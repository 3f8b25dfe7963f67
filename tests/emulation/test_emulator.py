"""The emulator of tests/emulation: planted faults are found, clean kernels raise nothing, and what
collectives compute agrees with the PTX ISA and with fp64."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FAULTS = Path(__file__).parent / "kernels" / "faults.cu"

# entry of faults.cu: kernel, first thread that goes wrong (None: any), words of the finding
PLANTED: dict[str, tuple[str, str | None, str]] = {
    "read_race": ("reverse<false>", None, "race: read of 4 bytes of reverse<false>::s"),
    "write_after_read_race": ("write_after_read<false>", "(0, 0, 0)", "race: write of 4 bytes"),
    "write_race": ("write_write", "(1, 0, 0)", "race: write of 4 bytes of dynamic shared memory"),
    "shuffle_is_no_barrier": ("neighbours<false>", None, "race: read"),
    "half_warp_race": ("half_warp<16>", None, "race: read"),
    "unwritten_dynamic": ("unwritten_dynamic_shared", "(0, 0, 0)", "nobody has written"),
    "unwritten_static": ("unwritten_static_shared", "(0, 0, 0)", "nobody has written"),
    "unwritten_output": ("unwritten_global", "(0, 0, 0)", "at byte 0 of the 256 bytes of arg1"),
    "memset_half": ("unwritten_global", "(32, 0, 0)", "at byte 128 of the 256 bytes of arg1"),
    "read_out_of_bounds": (
        "read_past_the_end",
        "(0, 0, 0)",
        "at byte 256 of the 256 bytes of arg0",
    ),
    "write_out_of_bounds": ("write_past_the_end", "(63, 0, 0)", "at byte 256 of the 256 bytes"),
    "dynamic_out_of_bounds": ("dynamic_shared_past_the_end", "(63, 0, 0)", "out of bounds: write"),
    "static_out_of_bounds": (
        "static_shared_past_the_end",
        "(32, 0, 0)",
        "at byte 128 of the 128 bytes of static_shared_past_the_end::s",
    ),
    "pointer_to_the_host": ("host_pointer", "(0, 0, 0)", "no memory of the device"),
    "pointer_to_nothing": ("null_pointer", "(0, 0, 0)", "no memory of the device"),
    "stack_of_another": ("another_stack", None, "the stack of thread (0, 0, 0)"),
    "vector_misaligned": ("vector_load<1>", "(0, 0, 0)", "misaligned"),
    "store_misaligned": ("misaligned_store", "(0, 0, 0)", "misaligned"),
    "barrier_skipped": (
        "barrier_some_skip",
        "(33, 0, 0)",
        "threads (0, 0, 0) to (32, 0, 0) have ended; threads (33, 0, 0) to (63, 0, 0) wait in "
        "__syncthreads",
    ),
    "barrier_branch": ("barrier_in_a_branch", None, "the block meets at two barriers"),
    "shuffle_skipped": ("shuffle_some_skip", None, "thread (7, 0, 0) has ended"),
    "shuffle_not_in_mask": ("shuffle_outside_its_mask", "(16, 0, 0)", "leaves out the thread"),
    "shuffle_reads_outside": ("shuffle_from_outside_the_mask", "(0, 0, 0)", "reads lane 16"),
    "collectives_differ": ("two_collectives", None, "to (31, 0, 0) wait in __syncwarp"),
    "instructions_differ": ("two_instructions", None, "the warp meets at two instructions"),
    "copy_without_wait": ("copy<(Async)1>", None, "has not been waited for"),
    "copy_without_barrier": ("copy<(Async)2>", None, "race: read"),
    "copy_overwritten": ("copy<(Async)3>", "(0, 0, 0)", "has not been waited for"),
    "copy_of_a_later_group": ("copy<(Async)4>", None, "has not been waited for"),
    "copy_shared_misaligned": (
        "copy<(Async)5>",
        "(0, 0, 0)",
        "misaligned: a cp.async of 16 bytes to",
    ),
    "copy_global_misaligned": (
        "copy<(Async)6>",
        "(0, 0, 0)",
        "misaligned: a cp.async of 16 bytes from",
    ),
    "copy_global_bounds": (
        "copy_out_of_bounds",
        "(0, 0, 0)",
        "at byte 256 of the 256 bytes of arg0",
    ),
    "copy_shared_bounds": ("copy_past_shared", "(63, 0, 0)", "of dynamic shared memory"),
    "ldmatrix_misaligned": ("matrix_rows<8>", "(1, 0, 0)", "misaligned: an ldmatrix row"),
    "ldmatrix_bounds": ("matrix_rows<32>", "(16, 0, 0)", "out of bounds: an ldmatrix row"),
    "ldmatrix_race": ("matrix_race", None, "race: read"),
    "ldmatrix_global": ("matrix_in_global_memory", "(0, 0, 0)", "out of bounds: an ldmatrix row"),
    "atomics_race": ("atomic_and_plain", "(40, 0, 0)", "race: read of 4 bytes of atomic_and_plain"),
    "endless_loop": ("endless", "(0, 0, 0)", "an endless loop?"),
    "blocks_write_the_same": ("blocks_race", "(0, 0, 0)", "that block 0 of this launch wrote"),
    "last_block_race": ("last_block<false>", "(0, 0, 0)", "that block 0 of this launch wrote"),
}
REFUSED = {
    "shared_memory_limit": "invalid argument",
    "memset_bounds": "invalid argument",
    "block_too_large": "invalid configuration argument",
}
CLEAN = {
    "reverse_clean",
    "write_after_read_clean",
    "syncwarp_clean",
    "half_warp_clean",
    "vector_clean",
    "copy_clean",
    "ldmatrix_clean",
    "atomics_clean",
    "last_block_clean",
    "shared_memory_clean",
    "memset_clean",
    "empty_grid",
}


def run_fault(emulator: Any, entry: str) -> tuple[str, torch.Tensor]:
    x, out = torch.arange(64.0), torch.empty(64)
    if entry.startswith("last_block"):
        return emulator(entry, x, out, torch.zeros(1, dtype=torch.int32), unwritten=(x, out)), out
    return emulator(entry, x, out, 64, unwritten=(out,)), out


def test_every_entry_is_tested() -> None:
    entries = re.findall(r"^(?:PLAIN\(|ENTRY )(\w+)", FAULTS.read_text(), re.MULTILINE)
    assert {*entries} == {*PLANTED, *REFUSED, *CLEAN, "host_reads_the_device"}


@pytest.mark.parametrize("entry", PLANTED)
def test_a_planted_fault_is_found(emulator: Any, entry: str) -> None:
    kernel, thread, words = PLANTED[entry]
    text, _ = run_fault(emulator, entry)
    findings = text.splitlines()[1:]
    block = r"\(1, 0, 0\)" if entry.startswith("blocks") else r"\(\d, 0, 0\)"
    where = rf"  kernel {re.escape(kernel)}, block {block}, thread (\(\d+, 0, 0\)), "
    matching = [f for f in findings if words in f]
    assert matching, text
    match = re.match(where + r"tests/emulation/kernels/faults\.cu:(\d+): ", matching[0])
    assert match, matching[0]
    assert thread in (None, match[1])
    lines = FAULTS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f" {kernel.split('<')[0]}(" in line)
    end = next(
        i for i in range(start, len(lines)) if lines[i].endswith("}") and lines[i][0] in "}_"
    )
    assert start < int(match[2]) <= end + 1  # a line of that kernel


@pytest.mark.parametrize("entry", REFUSED)
def test_a_refused_call_says_why(emulator: Any, entry: str) -> None:
    assert run_fault(emulator, entry)[0] == REFUSED[entry]


@pytest.mark.parametrize("entry", sorted(CLEAN))
def test_a_clean_kernel_raises_nothing(emulator: Any, entry: str) -> None:
    text, out = run_fault(emulator, entry)
    assert text == ""
    expected = {
        "reverse_clean": torch.arange(64.0).flip(0),
        "copy_clean": torch.arange(64.0).flip(0),
        "syncwarp_clean": torch.arange(64.0).view(-1, 2).flip(1).flatten(),
        "memset_clean": torch.ones(64),
        "atomics_clean": torch.full((64,), 64.0),
    }
    if entry in expected:
        assert torch.equal(out, expected[entry])


def test_host_code_that_reads_device_memory_is_found(emulator: Any) -> None:
    text, _ = run_fault(emulator, "host_reads_the_device")
    assert (
        "host code: read of 4 bytes of device memory (at byte 0 of the 256 bytes of arg0)" in text
    )


def test_the_next_launch_is_clean(emulator: Any) -> None:
    for entry in ("barrier_skipped", "read_out_of_bounds", "copy_without_wait", "shuffle_skipped"):
        assert run_fault(emulator, entry)[0]
        assert run_fault(emulator, "reverse_clean")[0] == ""


def test_two_runs_find_the_same(emulator: Any) -> None:
    def without_addresses(text: str) -> str:
        return re.sub(r"at byte -?\d+", "", text)

    for entry in ("copy_without_barrier", "half_warp_race", "write_after_read_race"):
        first, second = (run_fault(emulator, entry)[0] for _ in range(2))
        assert without_addresses(first) == without_addresses(second)


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
