"""A small CLIP in plain torch.nn: a vision transformer, a text transformer, one shared space.

Radford et al. 2021 (arXiv:2103.00020); the logit bias is SigLIP's, Zhai et al. 2023
(arXiv:2303.15343).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IMAGE_SIZE, Tokenizer

PATCH_SIZE = 4
WIDTH = 64
EMBED_DIM = 64


def positions(length: int) -> nn.Parameter:
    # Features are the mean over tokens, so order is seen through the positions alone: at the usual
    # 0.02 the model spends its first 100 steps learning to see it.
    return nn.Parameter(0.5 * torch.randn(length, WIDTH))


def transformer(depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class VisionTransformer(nn.Module):
    """Images (N, 1, 16, 16) -> features (N, EMBED_DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH_SIZE, stride=PATCH_SIZE)
        self.pos = positions((IMAGE_SIZE // PATCH_SIZE) ** 2)
        self.blocks = transformer(depth=2)
        self.proj = nn.Linear(WIDTH, EMBED_DIM, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (N, L, WIDTH)
        return self.proj(self.blocks(x + self.pos).mean(dim=1))


class TextTransformer(nn.Module):
    """Token ids (N, L), 0 for padding -> features (N, EMBED_DIM)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(tokenizer.vocab_size, WIDTH)
        self.pos = positions(tokenizer.context_length)
        self.blocks = transformer(depth=1)
        self.proj = nn.Linear(WIDTH, EMBED_DIM, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.token_embed(tokens) + self.pos  # (N, L, WIDTH)
        x = self.blocks(x, src_key_padding_mask=padding)
        words = (~padding).unsqueeze(-1)
        return self.proj((x * words).sum(dim=1) / words.sum(dim=1))


class CLIP(nn.Module):
    """Both towers, the logit scale (learned as its log) and, for SigLIP, the logit bias."""

    def __init__(
        self, tokenizer: Tokenizer, *, logit_scale: float, logit_bias: float | None
    ) -> None:
        super().__init__()
        self.visual = VisionTransformer()
        self.text = TextTransformer(tokenizer)
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text(tokens), dim=-1)

    def forward(
        self, images: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What a contrastive loss takes: image and text features, logit scale, logit bias."""
        scale = self.log_scale.exp()
        return self.encode_image(images), self.encode_text(tokens), scale, self.logit_bias
