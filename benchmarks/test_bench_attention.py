"""`python -m pytest benchmarks --benchmark-autosave`, and later with `--benchmark-compare`.

For tracking one machine over time; for ratios to the peers, `python -m benchmarks run`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import attention
from benchmarks.peers.attention import Case

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

SHAPES = ("2x12x197x64", "2x12x32x257x64", "windows:16x1024x80", "prefix_lm:1x8x512x64")
CASES = [
    attention.parse(shape, mode, dtype)
    for shape in SHAPES
    for mode in ("fwd", "full")
    for dtype in ("fp32", "bf16")
]
PAIRS = [
    (case, provider.name)
    for case in CASES
    # a compiled peer would compile in each CI run
    for provider in (peers.ours("attention"), *peers.peers("attention"))
    if case.takes(provider) and provider.name != "flex"
]


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=str)
def test_attention(benchmark: Any, case: Case, provider: str) -> None:
    benchmark.group = str(case)
    benchmark.extra_info.update(
        provider=provider,
        flops=case.flops,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    if provider == peers.OURS:
        benchmark.extra_info["backend"] = case.backend("auto")
    fn = peers.named(case.op, provider).build(False)
    benchmark(case.call(fn, case.inputs()))
