"""`python -m pytest benchmarks --benchmark-autosave`, and later with `--benchmark-compare`.

For tracking one machine over time; for ratios to the peers, `python -m benchmarks run`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.peers.contrastive import Case

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

PAIRS = [
    (Case(op, mode, dtype, 1024, 1024, 512), provider)
    for op in peers.contrastive.OPS
    for mode in ("fwd", "full")
    for dtype in ("fp32", "bf16")
    # compiled peers would compile in each CI run
    for provider in (peers.OURS, *(p.name for p in peers.peers(op) if "compile" not in p.name))
]


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=str)
def test_contrastive(benchmark: Any, case: Case, provider: str) -> None:
    inputs = case.inputs()
    benchmark.group = str(case)
    benchmark.extra_info.update(
        provider=provider,
        flops=case.flops,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    if provider == peers.OURS:
        benchmark.extra_info["backend"] = case.backend("auto")
    loss = peers.named(case.op, provider).build(False)
    benchmark(case.call(loss, inputs))
