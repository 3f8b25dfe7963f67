"""What autocast does to the operands of the ops' products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cast(x: Any) -> Any:
    """As torch's own for products, which leaves fp64 alone, as it does what is no tensor."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        return x
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
