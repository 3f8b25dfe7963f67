"""CLIP and SigLIP of the model layer, small; and the same models in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_kernels.nn import Attention
from vlm_models import CLIP, CLIPConfig, SigLip, SigLipConfig
from vlm_models.blocks import PatchStem, TextConfig, VisionConfig

from .data import IMAGE_SIZE, MEAN, STD, Tokenizer

EMBED_DIM = 64


def build(kind: str, tokenizer: Tokenizer, batch: int) -> CLIP | SigLip:
    """A model to train with batches of `batch` pairs; kind is "clip" or "siglip"."""
    sizes: dict[str, Any] = {"width": EMBED_DIM, "heads": 4, "mlp_dim": 2 * EMBED_DIM}
    vision = VisionConfig(
        depth=2, image_size=IMAGE_SIZE, patch_size=4, mean=(MEAN,), std=(STD,), **sizes
    )
    text = TextConfig(
        depth=1,
        vocab_size=tokenizer.vocab_size,
        context_length=tokenizer.context_length,
        **sizes,
    )
    if kind == "clip":
        return CLIP(CLIPConfig(vision, text, EMBED_DIM))
    # -10 in the paper, for batches of 32768: about -log(batch), the odds of a random pair
    return SigLip(SigLipConfig(vision, text, logit_bias=-math.log(batch)))


def in_plain_pytorch(model: nn.Module) -> nn.Module:
    """Puts plain PyTorch in the place of vlm_kernels' kernels, in place; parameters stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, PatchStem):
                setattr(module, name, PlainStem(child))
            elif isinstance(child, Attention):
                setattr(module, name, PlainAttention(child))
    return model


class PlainStem(nn.Module):
    """Normalises, convolves, flattens, puts the class token in front, adds the positions."""

    def __init__(self, stem: PatchStem) -> None:
        super().__init__()
        self.size = stem.config.patch_size
        self.weight, self.bias = stem.weight, stem.bias
        self.prefix, self.pos = stem.prefix, stem.pos
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(stem.config.mean).view(shape)
        self.std = torch.tensor(stem.config.std).view(shape)

    def forward(self, images: Tensor, layout: str = "nchw") -> Tensor:
        if layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        pixels = (images / 255 - self.mean) / self.std
        x = F.conv2d(pixels, self.weight, self.bias, stride=self.size).flatten(2).mT  # (B, L, E)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos


class PlainAttention(nn.Module):
    """`vlm_kernels.nn.Attention` around torch's scaled_dot_product_attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.is_causal = attention.num_heads, attention.is_causal
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
            q, k, v = (F.linear(t, w, b) for t, w, b in zip((x, context, context), weights, biases))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)  # (B, H, N, D)
        return self.proj(y.transpose(1, 2).flatten(2))
