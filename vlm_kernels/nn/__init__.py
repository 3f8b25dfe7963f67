"""Modules with the constructors and calls that existing code already uses."""

from .attention import Attention
from .contrastive import ClipLoss, SigLipLoss

__all__ = ["Attention", "ClipLoss", "SigLipLoss"]
