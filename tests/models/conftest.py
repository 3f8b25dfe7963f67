from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """The models are tiny: a second thread costs more than it gains."""
    torch.set_num_threads(1)
