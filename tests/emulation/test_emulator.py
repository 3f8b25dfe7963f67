"""The emulator finds planted faults of each kind and their place, and nothing in clean kernels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

FAULTS = Path(__file__).parent / "kernels" / "faults.cu"

# entry of faults.cu: kernel, thread that goes wrong (None: any), words of the finding, its line
PLANTED: dict[str, tuple[str, str | None, str, str]] = {
    "read_race": (
        "reverse<false>",
        None,
        "race: read of 4 bytes of reverse<false>::s",
        "out[threadIdx.x] = s[n - 1 - threadIdx.x];",
    ),
    "write_after_read_race": (
        "write_after_read<false>",
        "(0, 0, 0)",
        "race: write of 4 bytes",
        "s[threadIdx.x] = in[threadIdx.x];",
    ),
    "write_race": (
        "write_write",
        "(1, 0, 0)",
        "race: write of 4 bytes of dynamic shared memory",
        "s[0] = in[threadIdx.x];",
    ),
    "shuffle_is_no_barrier": (
        "neighbours<false>",
        None,
        "race: read",
        "out[threadIdx.x] = s[threadIdx.x ^ 1];",
    ),
    "half_warp_race": (
        "half_warp<16>",
        None,
        "race: read",
        "out[threadIdx.x] = s[threadIdx.x ^ kDistance];",
    ),
    "unwritten_dynamic": (
        "unwritten_dynamic_shared",
        "(0, 0, 0)",
        "nobody has written",
        "out[threadIdx.x] = s[threadIdx.x];",
    ),
    "unwritten_static": (
        "unwritten_static_shared",
        "(0, 0, 0)",
        "nobody has written",
        "out[threadIdx.x] = s[threadIdx.x];",
    ),
    "unwritten_output": (
        "unwritten_global",
        "(0, 0, 0)",
        "at byte 0 of the 256 bytes of arg1",
        "out[threadIdx.x] += 1.f;",
    ),
    "memset_half": (
        "unwritten_global",
        "(32, 0, 0)",
        "at byte 128 of the 256 bytes of arg1",
        "out[threadIdx.x] += 1.f;",
    ),
    "read_out_of_bounds": (
        "read_past_the_end",
        "(0, 0, 0)",
        "at byte 256 of the 256 bytes of arg0",
        "out[threadIdx.x] = in[threadIdx.x + n];",
    ),
    "write_out_of_bounds": (
        "write_past_the_end",
        "(63, 0, 0)",
        "at byte 256 of the 256 bytes",
        "out[threadIdx.x + 1] = n;",
    ),
    "dynamic_out_of_bounds": (
        "dynamic_shared_past_the_end",
        "(63, 0, 0)",
        "out of bounds: write",
        "s[threadIdx.x + 1] = in[threadIdx.x];",
    ),
    "static_out_of_bounds": (
        "static_shared_past_the_end",
        "(32, 0, 0)",
        "at byte 128 of the 128 bytes of static_shared_past_the_end::s",
        "s[threadIdx.x] = in[threadIdx.x];",
    ),
    "pointer_to_the_host": ("host_pointer", "(0, 0, 0)", "no memory of the device", "*out = *p;"),
    "pointer_to_nothing": (
        "null_pointer",
        "(0, 0, 0)",
        "no memory of the device",
        "out[0] = p[threadIdx.x];",
    ),
    "stack_of_another": (
        "another_stack",
        None,
        "the stack of thread (0, 0, 0)",
        "out[threadIdx.x] = local[threadIdx.x & 1];",
    ),
    "vector_misaligned": (
        "vector_load<1>",
        "(0, 0, 0)",
        "misaligned",
        "const float4 v = *reinterpret_cast<const float4*>",
    ),
    "store_misaligned": (
        "misaligned_store",
        "(0, 0, 0)",
        "misaligned",
        "*reinterpret_cast<float2*>",
    ),
    "barrier_skipped": (
        "barrier_some_skip",
        "(33, 0, 0)",
        "to (32, 0, 0) have ended; threads (33, 0, 0) to (63, 0, 0) wait in __syncthreads",
        "__syncthreads();",
    ),
    "barrier_branch": (
        "barrier_in_a_branch",
        None,
        "the block meets at two barriers",
        "__syncthreads();",
    ),
    "shuffle_skipped": (
        "shuffle_some_skip",
        None,
        "thread (7, 0, 0) has ended",
        "__shfl_xor_sync(kFull, x, 1)",
    ),
    "shuffle_not_in_mask": (
        "shuffle_outside_its_mask",
        "(16, 0, 0)",
        "leaves out the thread",
        "__shfl_sync(0xffff, x, 3)",
    ),
    "shuffle_reads_outside": (
        "shuffle_from_outside_the_mask",
        "(0, 0, 0)",
        "reads lane 16",
        "__shfl_xor_sync(0xffff, x, 16)",
    ),
    "collectives_differ": (
        "two_collectives",
        None,
        "to (31, 0, 0) wait in __syncwarp",
        "__shfl_xor_sync(kFull, x, 1)",
    ),
    "instructions_differ": (
        "two_instructions",
        None,
        "the warp meets at two instructions",
        "ptx::mma<__half>(d, a, b);",
    ),
    "copy_without_wait": (
        "copy<(Async)1>",
        None,
        "has not been waited for",
        "out[i + k] = s[n - 1 - i - k];",
    ),
    "copy_without_barrier": (
        "copy<(Async)2>",
        None,
        "race: read",
        "out[i + k] = s[n - 1 - i - k];",
    ),
    "copy_overwritten": (
        "copy<(Async)3>",
        "(0, 0, 0)",
        "has not been waited for",
        "if (kMode == kOverwrite) s[i] = 0.f;",
    ),
    "copy_of_a_later_group": (
        "copy<(Async)4>",
        None,
        "has not been waited for",
        "out[i + k] = s[n - 1 - i - k];",
    ),
    "copy_shared_misaligned": (
        "copy<(Async)5>",
        "(0, 0, 0)",
        "misaligned: a cp.async of 16 bytes to",
        "ptx::cp_async_16(",
    ),
    "copy_global_misaligned": (
        "copy<(Async)6>",
        "(0, 0, 0)",
        "misaligned: a cp.async of 16 bytes from",
        "ptx::cp_async_16(",
    ),
    "copy_global_bounds": (
        "copy_out_of_bounds",
        "(0, 0, 0)",
        "at byte 256 of the 256 bytes of arg0",
        "ptx::cp_async_4(",
    ),
    "copy_shared_bounds": (
        "copy_past_shared",
        "(63, 0, 0)",
        "of dynamic shared memory",
        "ptx::cp_async_4(",
    ),
    "ldmatrix_misaligned": (
        "matrix_rows<8>",
        "(1, 0, 0)",
        "misaligned: an ldmatrix row",
        "ptx::ldmatrix(r, s + kStride * threadIdx.x);",
    ),
    "ldmatrix_bounds": (
        "matrix_rows<32>",
        "(16, 0, 0)",
        "out of bounds: an ldmatrix row",
        "ptx::ldmatrix(r, s + kStride * threadIdx.x);",
    ),
    "ldmatrix_race": ("matrix_race", None, "race: read", "ptx::ldmatrix(r, s + threadIdx.x);"),
    "ldmatrix_global": (
        "matrix_in_global_memory",
        "(0, 0, 0)",
        "out of bounds: an ldmatrix row",
        "ptx::ldmatrix(r, in);",
    ),
    "atomics_race": (
        "atomic_and_plain",
        "(40, 0, 0)",
        "race: read of 4 bytes of atomic_and_plain",
        "out[0] = count;",
    ),
    "endless_loop": (
        "endless",
        "(0, 0, 0)",
        "an endless loop?",
        "while (in[threadIdx.x] != 12345.f)",
    ),
    "blocks_write_the_same": (
        "blocks_race",
        "(0, 0, 0)",
        "that block 0 of this launch wrote",
        "out[threadIdx.x] = blockIdx.x;",
    ),
    "last_block_race": (
        "last_block<false>",
        "(0, 0, 0)",
        "that block 0 of this launch wrote",
        "sum += partial[i];",
    ),
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
    kernel, thread, words, line = PLANTED[entry]
    text, _ = run_fault(emulator, entry)
    matching = [f for f in text.splitlines() if words in f]
    assert matching, text
    pattern = (
        rf"  kernel {re.escape(kernel)}, block \((\d), 0, 0\), thread (\(\d+, 0, 0\)), "
        r"tests/emulation/kernels/faults\.cu:(\d+): "
    )
    match = re.match(pattern, matching[0])
    assert match, matching[0]
    later_block = {"blocks_write_the_same": "1", "last_block_race": "2"}
    assert match[1] == later_block.get(entry, "0")
    assert thread in (None, match[2])
    assert line in FAULTS.read_text().splitlines()[int(match[3]) - 1]


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


def test_an_op_runs_on_cpu_tensors(extension: Any) -> None:
    x = torch.randn(64)
    for zeroed in (False, True):
        out = torch.ops.vlm_kernels_emu.probe(x, "reverse_clean", zeroed)
        assert torch.equal(out, x.flip(0))
    # what torch's own ops write has a value
    out = torch.ops.vlm_kernels_emu.probe(x, "unwritten_output", True)
    assert torch.equal(out, torch.ones(64))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("unwritten_output", "at byte 0 of the 256 bytes of a tensor that the op allocated"),
        ("read_out_of_bounds", "at byte 256 of the 256 bytes of x"),
        ("write_out_of_bounds", "at byte 256 of the 256 bytes of a tensor that the op allocated"),
    ],
)
def test_an_op_raises_what_is_found(extension: Any, entry: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=r"kernels/faults\.cu:\d+: ") as error:
        torch.ops.vlm_kernels_emu.probe(torch.randn(64), entry, False)
    assert words in str(error.value)
    x = torch.randn(64)
    assert torch.equal(torch.ops.vlm_kernels_emu.probe(x, "reverse_clean", False), x.flip(0))


def test_torch_has_its_allocator_back(extension: Any) -> None:
    """What is allocated outside of an op is the device's memory only in a call it is passed to."""
    out = torch.ops.vlm_kernels_emu.probe(torch.randn(64), "reverse_clean", False)
    assert out.data_ptr() % 512 == 0
    addresses = [torch.empty(1000).data_ptr() for _ in range(50)]
    assert any(address % 512 for address in addresses)
