"""Plain, dense PyTorch versions of every op, capable of fp64: the ground truth of the tests."""

from .attention import attention, attention_varlen
from .contrastive import clip_loss, siglip_loss
from .patch_embed import patch_embed

__all__ = ["attention", "attention_varlen", "clip_loss", "patch_embed", "siglip_loss"]
