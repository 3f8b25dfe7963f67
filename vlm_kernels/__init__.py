"""Fused kernels for vision-language models: contrastive losses over large batches.

`clip_loss` and `siglip_loss` are plain functions, `nn.ClipLoss` and `nn.SigLipLoss` the modules
with open_clip's constructors. `explain` says which backend runs a call and why the others cannot;
`python -m vlm_kernels doctor` says what is wrong with an installation and what mends it.
"""

from __future__ import annotations

from typing import Any

from . import _backends, _load, nn
from ._version import __version__
from .collect_env import collect_env
from .ops.attention import attention, attention_varlen
from .ops.contrastive import clip_loss, siglip_loss

__all__ = [
    "__version__",
    "attention",
    "attention_varlen",
    "clip_loss",
    "collect_env",
    "empty_cache",
    "explain",
    "nn",
    "siglip_loss",
]


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Prints and returns, for each backend, whether it can run a call, or why not.

    Args:
        op: name of the function, such as "clip_loss".
        *args, **kwargs: the arguments of that call, `backend=` included. Nothing is computed.

    Raises:
        ValueError: an unknown op or backend; the message lists the known ones.
    """
    text = _backends.explain(op, *args, **kwargs)
    print(text)
    return text


def empty_cache() -> None:
    """Gives back the workspace that the CPU kernels keep between calls (see `workspace_mb`)."""
    if _load._C is not None:
        _load._C.empty_cache()
