"""Modules with the constructors and calls that existing code already uses."""

from .attention import Attention
from .contrastive import ClipLoss, SigLipLoss
from .patch_embed import PatchEmbed

__all__ = ["Attention", "ClipLoss", "PatchEmbed", "SigLipLoss"]
