"""Peak memory of clip_loss and siglip_loss, and that nothing is spent on gradients nobody wants."""

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
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Variant

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no /proc/self/status"
)
MB = 2**20
SETUP = """
import torch, vlm_kernels
from functools import partial
from vlm_kernels.testing.specs import contrastive as spec
torch.set_num_threads(2)
fn = partial(vlm_kernels.{op}, backend="cpu", workspace_mb={workspace_mb})

def step(inputs):
    loss = fn(*inputs)
    if loss.requires_grad:
        loss.backward()

def inputs(n, m, d):
    made = spec.make_inputs(n, m, d, torch.{dtype}, scale=20.0, bias=-10.0)
    return made.map(lambda t: t.requires_grad_({grad}))

# Compiles and caches what every shape needs, at one so small that its workspace does not count.
step(inputs(256, 256, {d}))
vlm_kernels.empty_cache()
ready = inputs({n}, {m}, {d})
"""


def assert_peak(
    limit: int, op: str, n: int, m: int, d: int, dtype: str, workspace_mb: int, grad: bool
) -> None:
    """A step needs at most `limit` bytes above its inputs."""
    fields = {"op": op, "n": n, "m": m, "d": d, "dtype": dtype, "grad": grad}
    setup = SETUP.format(workspace_mb=workspace_mb, **fields)
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
@pytest.mark.parametrize("op", spec.OPS)
def test_peak_memory(op: str, dtype: str) -> None:
    """The N x M matrix alone has 256 MiB in fp32, and a 16-bit copy of one side 8 MiB."""
    n, d, workspace_mb = 8192, 512, 8
    gradients = 2 * n * d * getattr(torch, dtype).itemsize
    accumulator = 4 * n * d if dtype == "bfloat16" else 0
    limit = gradients + workspace_mb * MB + accumulator + 4 * MB
    assert_peak(limit, op, n, n, d, dtype, workspace_mb, grad=True)


@needs_cpu
@needs_proc
@pytest.mark.parametrize("op", spec.OPS)
def test_peak_memory_without_gradients(op: str) -> None:
    assert_peak((16 + 4) * MB, op, 8192, 8192, 512, "bfloat16", workspace_mb=16, grad=False)


@needs_cpu
@needs_proc
@pytest.mark.parametrize("op", spec.OPS)
def test_peak_memory_of_a_long_and_a_short_side(op: str) -> None:
    """The fp32 accumulator is that of one side; which one is the kernel's choice."""
    n, m, d, workspace_mb = 65536, 1024, 128, 16
    limit = (n + m) * d * 2 + workspace_mb * MB + 4 * n * d + 8 * MB
    assert_peak(limit, op, n, m, d, "bfloat16", workspace_mb, grad=True)


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
@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "nothing requires it"])
@pytest.mark.parametrize(
    "variant",
    [Variant("clip_loss", directions=d) for d in spec.DIRECTIONS] + [Variant("siglip_loss")],
)
def test_nothing_is_spent_on_gradients(variant: Variant, way: str) -> None:
    n, m, d = 600, 500, 256
    inputs = spec.make_inputs(n, m, d)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if way in modes:
        inputs = inputs.map(lambda t: t.requires_grad_())
    keywords = variant.keywords(n, m)
    fn = partial(getattr(vlm_kernels, variant.op), backend="cpu", **keywords)
    with modes.get(way, torch.enable_grad)(), Recorder() as recorder:
        loss = fn(*inputs)
    assert not loss.requires_grad
    assert len(recorder.results) == 1
    _, results = recorder.results[0]
    assert sum(t.numel() for t in results) <= 16 * (n + m)


@needs_cpu
@pytest.mark.parametrize("wanted", ["image_features", "text_features", "logit_scale"])
@pytest.mark.parametrize(
    "variant",
    [Variant("clip_loss", directions=d) for d in spec.DIRECTIONS] + [Variant("siglip_loss")],
)
def test_gradients_nobody_wants_are_not_made(variant: Variant, wanted: str) -> None:
    """No tensor of the shape of a locked tower's features comes out of any op."""
    n, m, d = 97, 61, 33
    inputs = spec.make_inputs(n, m, d)
    getattr(inputs, wanted).requires_grad_()
    fn = partial(getattr(vlm_kernels, variant.op), backend="cpu", **variant.keywords(n, m))
    with Recorder() as recorder:
        fn(*inputs).backward(retain_graph=True)
    shapes = {tuple(t.shape) for _, results in recorder.results for t in results}
    assert ((n, d) in shapes) == (wanted == "image_features")
    assert ((m, d) in shapes) == (wanted == "text_features")


@needs_cpu
@pytest.mark.parametrize("op", spec.OPS)
def test_memory_does_not_grow_from_step_to_step(op: str) -> None:
    fn = partial(getattr(vlm_kernels, op), backend="cpu")
    inputs = spec.make_inputs(64, 64, 32).map(lambda t: t.requires_grad_())
    torch.set_num_threads(1)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def steps(count: int) -> int:
        for _ in range(count):
            fn(*inputs).backward()
        return resident()

    def growth() -> int:
        before = resident()
        return steps(2000) - before

    steps(200)
    # What leaks grows each time; the allocator's arenas and Python's garbage grow once.
    assert min(growth() for _ in range(3)) < 1 * MB
