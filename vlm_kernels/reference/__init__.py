"""Plain, dense PyTorch versions of every op, capable of fp64: the ground truth of the tests."""

from .contrastive import clip_loss, siglip_loss

__all__ = ["clip_loss", "siglip_loss"]
