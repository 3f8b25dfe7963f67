"""ViT, the vision transformer: Dosovitskiy et al., arXiv:2010.11929."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .blocks import PatchStem, Transformer, VisionConfig, init_weights
from .checkpoints import Pretrained, square


@dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """Sizes of a ViT.

    `pooler` puts a linear layer and tanh behind the class token, as transformers' ViTModel has
    them; `num_classes` a linear classifier behind that.
    """

    pooler: bool = False
    num_classes: int = 0
    qkv_bias: bool = True

    @classmethod
    def tiny(cls) -> ViTConfig:
        """Small enough for a test."""
        return cls(width=32, depth=2, heads=2, mlp_dim=64, image_size=28, patch_size=14)

    @classmethod
    def named(cls, name: str) -> ViTConfig:
        """A published size: "B/32", "B/16", "L/14", "L/14-336" (pixels; else 224) or "H/14"."""
        if name not in SIZES:
            raise ValueError(f"ViTConfig: no size {name!r}, only {', '.join(map(repr, SIZES))}")
        return SIZES[name]


def _size(width: int, depth: int, heads: int, patch_size: int, image_size: int = 224) -> ViTConfig:
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        patch_size=patch_size,
        image_size=image_size,
    )


SIZES = {
    "B/32": _size(768, 12, 12, 32),
    "B/16": _size(768, 12, 12, 16),
    "L/14": _size(1024, 24, 16, 14),
    "L/14-336": _size(1024, 24, 16, 14, 336),
    "H/14": _size(1280, 32, 16, 14),
}


class ViT(Pretrained):
    """Images to tokens, a pooled vector and, with `config.num_classes`, logits."""

    PREFIXES: ClassVar = ("", "vit.")  # ViTModel, and inside of ViTForImageClassification
    IGNORED: ClassVar = r"(vit\.)?embeddings\.mask_token"
    NAMES: ClassVar = {
        "stem.prefix": ("embeddings.cls_token",),
        "stem.pos": ("embeddings.position_embeddings",),
        "stem.{p}": ("embeddings.patch_embeddings.projection.{p}",),
        "blocks.{i}.norm1.{p}": (
            "layers.{i}.layernorm_before.{p}",
            "encoder.layer.{i}.layernorm_before.{p}",
        ),
        "blocks.{i}.attn.qkv.{p}": (
            "layers.{i}.attention.<q|k|v>_proj.{p}",
            "encoder.layer.{i}.attention.attention.<query|key|value>.{p}",
        ),
        "blocks.{i}.attn.proj.{p}": (
            "layers.{i}.attention.o_proj.{p}",
            "encoder.layer.{i}.attention.output.dense.{p}",
        ),
        "blocks.{i}.norm2.{p}": (
            "layers.{i}.layernorm_after.{p}",
            "encoder.layer.{i}.layernorm_after.{p}",
        ),
        "blocks.{i}.mlp.fc1.{p}": (
            "layers.{i}.mlp.fc1.{p}",
            "encoder.layer.{i}.intermediate.dense.{p}",
        ),
        "blocks.{i}.mlp.fc2.{p}": (
            "layers.{i}.mlp.fc2.{p}",
            "encoder.layer.{i}.output.dense.{p}",
        ),
        "norm.{p}": ("layernorm.{p}",),
        "pooler.{p}": ("pooler.dense.{p}",),
        "head.{p}": ("classifier.{p}",),
    }

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchStem(config, prefix=1)
        self.blocks = Transformer(config, qkv_bias=config.qkv_bias)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.pooler = nn.Linear(config.width, config.width) if config.pooler else None
        self.head = nn.Linear(config.width, config.num_classes) if config.num_classes else None
        init_weights(self)

    @classmethod
    def from_hf(cls, model: Any) -> ViT:
        """The same model as transformers' ViTModel or ViTForImageClassification, weights copied.

        Image processors keep mean and std; ours are 0.5, as Google's ViTs have them.
        """
        hf = model.config
        named = {name for name, _ in model.named_parameters()}
        ours = cls(
            ViTConfig(
                width=hf.hidden_size,
                depth=hf.num_hidden_layers,
                heads=hf.num_attention_heads,
                mlp_dim=hf.intermediate_size,
                activation=hf.hidden_act,
                norm_eps=hf.layer_norm_eps,
                image_size=square("image_size", hf.image_size),
                patch_size=square("patch_size", hf.patch_size),
                mean=(0.5,) * hf.num_channels,
                std=(0.5,) * hf.num_channels,
                qkv_bias=hf.qkv_bias,
                pooler="pooler.dense.weight" in named,
                num_classes=hf.num_labels if "classifier.weight" in named else 0,
            )
        )
        ours._take(model)
        return ours

    def tokens(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """(B, 1 + patches, width), the class token first, normalised; `images` as `PatchStem`."""
        return self.norm(self.blocks(self.stem(images, layout)))

    def forward(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """Logits (B, num_classes), or without classes the class token, pooled, (B, width)."""
        x = self.tokens(images, layout)[:, 0]
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        return x if self.head is None else self.head(x)
