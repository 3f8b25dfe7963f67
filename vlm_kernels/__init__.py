"""Fused kernels for vision-language models: attention, and contrastive losses over large batches.

`attention` has the call of torch's scaled_dot_product_attention, `attention_varlen` takes packed
sequences; the masks and rotary tables for them come from `causal_lower_right`, `prefix_lm`,
`rope_2d` and others, all in `vlm_kernels.ops.attention`. `clip_loss` and `siglip_loss` are plain
functions too. `nn` has the modules: `Attention` with timm's parameters, `ClipLoss` and `SigLipLoss`
with open_clip's constructors. `explain` says which backend runs a call and why the others cannot;
`python -m vlm_kernels doctor` says what is wrong with an installation and what mends it.
"""

from __future__ import annotations

from typing import Any

from . import _backends, _load, nn
from ._version import __version__
from .collect_env import collect_env
from .integrations.transformers import register_attention
from .ops.attention import (
    attention,
    attention_varlen,
    causal_lower_right,
    image_blocks,
    mrope,
    per_image_cross_attention,
    prefix_lm,
    rope_1d,
    rope_2d,
    sliding_window,
)
from .ops.contrastive import clip_loss, siglip_loss
from .ops.patch_embed import (
    fold_normalization,
    interpolate_pos_embed,
    patch_embed,
    patch_embed_packed,
    patchify,
)

__all__ = [
    "__version__",
    "attention",
    "attention_varlen",
    "causal_lower_right",
    "clip_loss",
    "collect_env",
    "empty_cache",
    "explain",
    "fold_normalization",
    "image_blocks",
    "interpolate_pos_embed",
    "mrope",
    "nn",
    "patch_embed",
    "patch_embed_packed",
    "patchify",
    "per_image_cross_attention",
    "prefix_lm",
    "register_attention",
    "rope_1d",
    "rope_2d",
    "siglip_loss",
    "sliding_window",
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
