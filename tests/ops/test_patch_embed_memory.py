"""Peak memory of patch_embed: no normalised image, no patches, no second set of tokens."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

import vlm_kernels
from vlm_kernels.testing import timing
from vlm_kernels.testing.specs.patch_embed import Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no /proc/self/status"
)
MB = 2**20
PATCH, WIDTH = 16, 64
K = 3 * PATCH * PATCH
SETUP = """
import torch, vlm_kernels
torch.set_num_threads(2)

def inputs(b):
    pixels = torch.randint(0, 256, (b, 512, 512, 3), dtype=torch.uint8)
    images = pixels if {pixels!r} == "uint8" else (pixels / 255).to(torch.{dtype}).requires_grad_()
    weight = torch.randn({width}, {k}).to(torch.{dtype}).requires_grad_()
    return images, weight

def step(inputs):
    out = vlm_kernels.patch_embed(
        *inputs, patch_size={patch}, layout="nhwc", k_order="yxc", mean=(0.5,) * 3, std=(0.3,) * 3,
        backend="cpu",
    )
    if {grad}:
        out.backward(torch.ones((), dtype=out.dtype).expand(out.shape))

# Compiles and caches what every shape needs, at one so small that it does not count.
step(inputs(1))
vlm_kernels.empty_cache()
ready = inputs({b})
"""
BATCH = 64
TOKENS = BATCH * (512 // PATCH) ** 2


def assert_peak(limit: int, **fields: Any) -> None:
    """A step needs at most `limit` bytes above its inputs."""
    setup = SETUP.format(patch=PATCH, width=WIDTH, k=K, b=BATCH, **fields)
    env = {"OMP_WAIT_POLICY": "passive"}
    # Pages of libraries that the system took while we waited and now brings back are counted too;
    # what we allocate is the same each time.
    peaks: list[int] = []
    while not peaks or (peaks[-1] > limit and len(peaks) < 3):
        peaks.append(timing.peak_rss_delta(setup, "step(ready)", env=env))
    assert min(peaks) <= limit, f"{[f'{peak / MB:.1f} MB' for peak in peaks]}, not {limit / MB:.1f}"


@needs_cpu
@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype: str) -> None:
    """The images have 48 MiB of uint8, and 192 MiB as floats, as have the patches in fp32; tokens
    and their gradient have 16 MiB of fp32 each. What the kernels hold does not grow with them."""
    tokens = TOKENS * WIDTH * getattr(torch, dtype).itemsize
    assert_peak(2 * tokens + 6 * MB, dtype=dtype, pixels="uint8", grad=True)


@needs_cpu
@needs_proc
def test_peak_memory_with_gradients_of_the_images() -> None:
    """Their own size, and no fp32 copy of them: bf16 pixels and their gradient."""
    tokens, images = TOKENS * WIDTH * 2, BATCH * 512 * 512 * 3 * 2
    assert_peak(2 * tokens + images + 6 * MB, dtype="bfloat16", pixels="bfloat16", grad=True)


@needs_cpu
def test_memory_does_not_grow_from_step_to_step() -> None:
    case = Case(2, 16, 16, (8, 8), 20, variant=Variant(pixels="fp32"))
    images, weight, *_ = case.inputs().leaves()
    torch.set_num_threads(1)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def growth(count: int) -> int:
        before = resident()
        for _ in range(count):
            vlm_kernels.patch_embed(images, weight, patch_size=8, backend="cpu").sum().backward()
        return resident() - before

    growth(200)
    # What leaks grows each time; the allocator's arenas and Python's garbage grow once.
    assert min(growth(1000) for _ in range(3)) < 1 * MB
