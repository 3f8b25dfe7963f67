"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test starts from one seed and few threads, whatever ran before it."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ  # a worker a core: one thread each
    threads = 1 if parallel else min(2, os.cpu_count() or 1)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(threads)
