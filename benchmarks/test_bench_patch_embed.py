"""`python -m pytest benchmarks --benchmark-autosave`, and later with `--benchmark-compare`.

For tracking one machine over time; for ratios to the peers, `python -m benchmarks run`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import patch_embed
from benchmarks.peers.patch_embed import Case

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

PAIRS = [
    (patch_embed.parse(shape, mode, dtype), provider)
    for shape, mode in (("2x224x224x16x768", "fwd"), ("float:2x224x224x16x768", "full"))
    for dtype in ("fp32", "bf16")
    # compiled peers would compile in each CI run
    for provider in (peers.OURS, *(p.name for p in peers.peers("patch_embed")))
    if "compile" not in provider
]


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=str)
def test_patch_embed(benchmark: Any, case: Case, provider: str) -> None:
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
