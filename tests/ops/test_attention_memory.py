"""Peak memory of attention, and that nothing is spent on gradients nobody wants."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels
from vlm_kernels.testing import timing
from vlm_kernels.testing.specs import attention as spec
from vlm_kernels.testing.specs.attention import Case, Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no /proc/self/status"
)
MB = 2**20
SETUP = """
import torch, vlm_kernels
from vlm_kernels.testing.specs import attention as spec
torch.set_num_threads(2)

def inputs(n):
    made = spec.make_inputs(1, 2, n, n, 64, torch.{dtype})
    return made.map(lambda t: t.requires_grad_())

def step(inputs):
    out = vlm_kernels.attention(*inputs[:3], backend="cpu"{keywords})
    if {grad}:
        out.sum().backward()

# Compiles and caches what every shape needs, at one so small that its scratch does not count.
step(inputs(256))
vlm_kernels.empty_cache()
ready = inputs({n})
"""


def assert_peak(limit: int, **fields: Any) -> None:
    """A step needs at most `limit` bytes above its inputs."""
    setup = SETUP.format(**fields)
    # Threads that spin while they wait keep the other tests' from the cores, and theirs these.
    env = {"OMP_WAIT_POLICY": "passive"}
    # Pages of libraries that the system took while we waited and now brings back are counted too;
    # what we allocate is the same each time.
    peaks = []
    while not peaks or (peaks[-1] > limit and len(peaks) < 3):
        peaks.append(timing.peak_rss_delta(setup, "step(ready)", env=env))
    assert min(peaks) <= limit, f"{[f'{peak / MB:.1f} MB' for peak in peaks]}, not {limit / MB:.1f}"


@needs_cpu
@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype: str) -> None:
    """Scores alone have 2 GiB. Gradients, out and its gradient are five tensors like an input; each
    thread has a head's inputs and gradients packed; where heads are as few, up to 16 parts of the
    keys have a gradient of a head's queries each."""
    n, d, heads, threads = 16384, 64, 2, 2
    head = n * d * 4
    tensors = 5 * heads * n * d * getattr(torch, dtype).itemsize
    limit = tensors + (16 + 7 * threads) * head + 8 * MB
    assert_peak(limit, n=n, dtype=dtype, grad=True, keywords=", is_causal=True")


@needs_cpu
@needs_proc
def test_peak_memory_without_gradients() -> None:
    """What is kept for a backward is small: out, and a number a row."""
    n, width = 16384, 2 * 64
    limit = 4 * n * width * 4 + 8 * MB
    assert_peak(limit, n=n, dtype="float32", grad=False, keywords=", window=(1000, 1000)")


class Recorder(TorchDispatchMode):
    """The results of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "vlm_kernels":
            self.results.append((func._schema.name.split("::")[1], list(out)))
        return out


@needs_cpu
@pytest.mark.parametrize("wanted", spec.Inputs._fields)
def test_gradients_nobody_wants_are_not_made(wanted: str) -> None:
    """Each has a size of its own, by which it is found among the results of all ops."""
    variant = Variant("all", "additive_fp32", norm="rms_bias_heads")
    case = Case(1, 6, 7, 11, 16, variant=variant, kv_heads=3, dv=17)
    inputs = case.inputs()
    getattr(inputs, wanted).requires_grad_()
    fn = partial(vlm_kernels.attention, backend="cpu")
    with Recorder() as recorder:
        spec.call(fn, inputs, case.keywords()).sum().backward()
    (forward, _), (backward, gradients) = recorder.results
    assert (forward, backward) == ("attention_fwd", "attention_bwd")
    for name, gradient in zip(spec.Inputs._fields, gradients, strict=True):
        assert (gradient.numel() > 0) == (name == wanted), name


@needs_cpu
def test_memory_does_not_grow_from_step_to_step() -> None:
    inputs = spec.make_inputs(1, 2, 40, 40, 16).map(lambda t: t.requires_grad_())
    torch.set_num_threads(1)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def growth(count: int) -> int:
        before = resident()
        for _ in range(count):
            vlm_kernels.attention(*inputs[:3], backend="cpu").sum().backward()
        return resident() - before

    growth(200)
    # What leaks grows each time; the allocator's arenas and Python's garbage grow once.
    assert min(growth(1000) for _ in range(3)) < 1 * MB
