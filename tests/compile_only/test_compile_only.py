"""Kernels compiled without a GPU, held to the limits beside their sources."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.compile_only import cuda_sources, report

needs_nvcc = pytest.mark.skipif(cuda_sources.nvcc() is None, reason="needs nvcc")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)


@needs_nvcc
@pytest.mark.parametrize("source", cuda_sources.SOURCES, ids=lambda source: source.stem)
def test_cuda_source(source: Path) -> None:
    """No warning, no spill, no more registers than the file allows."""
    limits = report.limits_in(source)
    rows = cuda_sources.compile_source(source)
    wrong = [e for r in rows for e in report.excesses(r, cuda_sources.limits_of(r.kernel, limits))]
    assert not wrong
    unlimited = {r.kernel for r in rows if r.mma and not cuda_sources.limits_of(r.kernel, limits)}
    assert not unlimited, "a kernel of tensor-core products says what it may use"
    for name in limits:
        assert any(cuda_sources.limits_of(r.kernel, {name: {"registers": 1}}) for r in rows), name


def _triton_variants() -> Iterator[Any]:
    if importlib.util.find_spec("triton") is not None:
        from tests.compile_only import triton_kernels

        for module, arch in product(triton_kernels.modules(), (80, 90)):
            yield from module.quick(arch)


@needs_triton
@pytest.mark.parametrize("variant", list(_triton_variants()), ids=str)
def test_triton_variant(variant: Any) -> None:
    from tests.compile_only import triton_kernels

    row = triton_kernels.compile_variant(variant)
    limits = report.limits_in(Path(variant.kernel.fn.__code__.co_filename))
    assert variant.kernel.__name__ in limits
    assert not report.excesses(row, limits[variant.kernel.__name__])
    assert (row.mma > 0) == variant.mma


PTXAS = """
ptxas info    : Compiling entry function '_ZN3vlm4cuda11some_kernelIfEEvPKf' for 'sm_80'
ptxas info    : Function properties for _ZN3vlm4cuda11some_kernelIfEEvPKf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3vlm4cuda5otherEv' for 'sm_90'
ptxas info    : Function properties for _ZN3vlm4cuda5otherEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 352 bytes cmem[0]
"""


def test_what_ptxas_prints_is_read(tmp_path: Path) -> None:
    kernel, other = cuda_sources.parse(PTXAS, {("_ZN3vlm4cuda5otherEv", "sm_90"): 7})
    assert (kernel.registers, kernel.shared, kernel.spills, kernel.mma) == (40, 1024, 16, None)
    assert (other.arch, other.registers, other.shared, other.mma) == ("sm_90", 12, 0, 7)
    source = tmp_path / "some.cu"
    source.write_text(
        "// limits: registers 32, spills 0\ntemplate <class T>\n"
        "__global__ void __launch_bounds__(128) some_kernel(const T* x) {}\n"
        "// limits: registers 12\n__global__ void other() {}\n"
    )
    limits = report.limits_in(source)
    assert limits == {"some_kernel": {"registers": 32, "spills": 0}, "other": {"registers": 12}}
    own = cuda_sources.limits_of(kernel.kernel, limits)
    found = [text.split(": ")[1] for text in report.excesses(kernel, own)]
    assert found == ["registers 40, limit 32", "spills 16, limit 0"]
    assert not report.excesses(other, cuda_sources.limits_of(other.kernel, limits))
    # without a line of limits a kernel must not spill
    assert len(report.excesses(kernel, {})) == 1


def test_limits_must_belong_to_a_kernel(tmp_path: Path) -> None:
    source = tmp_path / "some.cu"
    source.write_text("// limits: registers 32\n\n\n\n\nvoid far_away() {}\n")
    with pytest.raises(ValueError, match="no kernel follows"):
        report.limits_in(source)
    source.write_text("// limits: speed 32\n__global__ void kernel() {}\n")
    with pytest.raises(ValueError, match="unknown limits of kernel"):
        report.limits_in(source)


@needs_triton
def test_every_triton_kernel_ships_in_some_variant() -> None:
    from tests.compile_only import triton_kernels

    for module in triton_kernels.modules():
        named, quick = (
            {variant.kernel.__name__ for arch in (80, 90) for variant in which(arch)}
            for which in (module.variants, module.quick)
        )
        assert named == {name for name in vars(module.kernels) if name.endswith("_kernel")}
        assert quick == named
