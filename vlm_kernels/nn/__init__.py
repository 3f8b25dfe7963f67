"""Modules with the constructors and calls that existing code already uses."""

from .contrastive import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
