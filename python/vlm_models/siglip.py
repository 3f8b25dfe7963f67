"""SigLIP: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_kernels import siglip_loss

from .blocks import (
    AttentionPool,
    PatchStem,
    TextConfig,
    TextEmbeddings,
    Transformer,
    VisionConfig,
    init_weights,
)
from .checkpoints import Pretrained, encoder_names
from .clip import Features, text_config, vision_config

MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SigLipConfig:
    """Both towers; the space they share has the width of the vision tower."""

    vision: VisionConfig
    text: TextConfig
    logit_scale: float = 10.0  # both to begin with
    logit_bias: float = -10.0

    @classmethod
    def tiny(cls) -> SigLipConfig:
        """Small enough for a test."""
        sizes: dict[str, Any] = {"depth": 2, "heads": 2, "mlp_dim": 64}
        sizes["activation"] = "gelu_pytorch_tanh"
        return cls(
            VisionConfig(width=32, image_size=28, patch_size=14, **sizes),
            TextConfig(width=24, vocab_size=99, context_length=9, **sizes),
        )

    @classmethod
    def named(cls, name: str) -> SigLipConfig:
        """A published size: "B/16-224", "B/16-256", "L/16-256" or "so400m/14-384"."""
        if name not in SIZES:
            raise ValueError(f"SigLipConfig: no size {name!r}, only {', '.join(map(repr, SIZES))}")
        return SIZES[name]


def _size(
    width: int, depth: int, heads: int, mlp_dim: int, patch_size: int, image_size: int
) -> SigLipConfig:
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
    sizes["activation"] = "gelu_pytorch_tanh"
    return SigLipConfig(
        VisionConfig(image_size=image_size, patch_size=patch_size, mean=MEAN, std=STD, **sizes),
        TextConfig(vocab_size=32000, context_length=64, **sizes),
    )


SIZES = {
    "B/16-224": _size(768, 12, 12, 3072, 16, 224),
    "B/16-256": _size(768, 12, 12, 3072, 16, 256),
    "L/16-256": _size(1024, 24, 16, 4096, 16, 256),
    "so400m/14-384": _size(1152, 27, 16, 4304, 14, 384),
}


class VisionTower(nn.Module):
    """A ViT without a class token: attention pools the tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = PatchStem(config)
        self.blocks = Transformer(config)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.pool = AttentionPool(config)

    def tokens(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """(B, patches, width), normalised."""
        return self.norm(self.blocks(self.stem(images, layout)))

    def forward(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """(B, width)."""
        return self.pool(self.tokens(images, layout))


class TextTower(nn.Module):
    """A transformer that sees all tokens from all tokens, padding too: pad to context_length."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.embed = TextEmbeddings(config)
        self.blocks = Transformer(config)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, embed_dim)

    def tokens(self, ids: Tensor) -> Tensor:
        """(B, N, width), normalised."""
        return self.norm(self.blocks(self.embed(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, embed_dim), of the last token."""
        return self.head(self.tokens(ids)[:, -1])


class SigLip(Pretrained):
    """Images and texts in one space, trained pair by pair."""

    NAMES: ClassVar = {
        "vision.stem.pos": ("vision_model.embeddings.position_embedding.weight",),
        "vision.stem.{p}": ("vision_model.embeddings.patch_embedding.{p}",),
        **encoder_names("vision.blocks.{i}", "vision_model.encoder.layers.{i}"),
        "vision.norm.{p}": ("vision_model.post_layernorm.{p}",),
        "vision.pool.query": ("vision_model.head.probe",),
        "vision.pool.attn.qkv.{p}": ("vision_model.head.attention.in_proj_{p}",),
        "vision.pool.attn.proj.{p}": ("vision_model.head.attention.out_proj.{p}",),
        "vision.pool.norm.{p}": ("vision_model.head.layernorm.{p}",),
        "vision.pool.mlp.fc1.{p}": ("vision_model.head.mlp.fc1.{p}",),
        "vision.pool.mlp.fc2.{p}": ("vision_model.head.mlp.fc2.{p}",),
        "text.embed.tokens.weight": ("text_model.embeddings.token_embedding.weight",),
        "text.embed.pos": ("text_model.embeddings.position_embedding.weight",),
        **encoder_names("text.blocks.{i}", "text_model.encoder.layers.{i}"),
        "text.norm.{p}": ("text_model.final_layer_norm.{p}",),
        "text.head.{p}": ("text_model.head.{p}",),
        "log_scale": ("logit_scale",),
        "logit_bias": ("logit_bias",),
    }

    def __init__(self, config: SigLipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text, config.vision.width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias))
        init_weights(self)

    @classmethod
    def from_hf(cls, model: Any) -> SigLip:
        """The same model as transformers' SiglipModel, weights copied.

        Image processors keep mean and std; ours are 0.5, as Google's SigLIPs have them.
        """
        hf = model.config
        vision = vision_config(hf.vision_config, mean=MEAN, std=STD)
        ours = cls(SigLipConfig(vision, text_config(hf.text_config)))
        ours._take(model)
        return ours

    def encode_image(self, images: Tensor, layout: str = "nchw", normalize: bool = True) -> Tensor:
        """(B, width), of norm 1 unless `normalize` is off; `images` as `PatchStem` takes them."""
        x = self.vision(images, layout)
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids (B, N), padded to context_length -> (B, width), of norm 1 as above."""
        x = self.text(tokens)
        return F.normalize(x, dim=-1) if normalize else x

    def forward(self, images: Tensor, tokens: Tensor, layout: str = "nchw") -> Features:
        """Features of both, the exponentiated logit scale, and the logit bias."""
        image, text = self.encode_image(images, layout), self.encode_text(tokens)
        return Features(image, text, self.log_scale.exp(), self.logit_bias)

    def loss(self, images: Tensor, tokens: Tensor, layout: str = "nchw") -> Tensor:
        """`vlm_kernels.siglip_loss` of a batch of pairs, shape ()."""
        return siglip_loss(*self(images, tokens, layout))
