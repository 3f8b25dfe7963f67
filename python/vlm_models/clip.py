"""CLIP: Radford et al., Learning Transferable Visual Models, arXiv:2103.00020."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_kernels import clip_loss

from .blocks import PatchStem, TextConfig, TextEmbeddings, Transformer, VisionConfig, init_weights
from .checkpoints import Pretrained, encoder_names, square

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, and the size of the space they share.

    A text is pooled at its first token `eos_id`; None takes the token of the highest id.
    """

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    eos_id: int | None = None
    logit_scale: float = 1 / 0.07  # to begin with

    @classmethod
    def tiny(cls) -> CLIPConfig:
        """Small enough for a test."""
        sizes: dict[str, Any] = {"depth": 2, "heads": 2, "mlp_dim": 64, "activation": "quick_gelu"}
        return cls(
            VisionConfig(width=32, image_size=28, patch_size=14, mean=MEAN, std=STD, **sizes),
            TextConfig(width=24, vocab_size=99, context_length=9, **sizes),
            embed_dim=16,
        )

    @classmethod
    def named(cls, name: str) -> CLIPConfig:
        """A published size: "B/32", "B/16", "L/14" or "L/14-336" (pixels; else 224)."""
        if name not in SIZES:
            raise ValueError(f"CLIPConfig: no size {name!r}, only {', '.join(map(repr, SIZES))}")
        return SIZES[name]


def _size(vision: tuple[int, int, int], text: int, patch: int, image: int = 224) -> CLIPConfig:
    width, depth, heads = vision
    rest: dict[str, Any] = {"activation": "quick_gelu", "norm_eps": 1e-5}
    return CLIPConfig(
        VisionConfig(
            width=width,
            depth=depth,
            heads=heads,
            mlp_dim=4 * width,
            image_size=image,
            patch_size=patch,
            mean=MEAN,
            std=STD,
            **rest,
        ),
        TextConfig(
            width=text,
            depth=12,
            heads=text // 64,
            mlp_dim=4 * text,
            vocab_size=49408,
            context_length=77,
            **rest,
        ),
        embed_dim=text,
    )


SIZES = {
    "B/32": _size((768, 12, 12), 512, 32),
    "B/16": _size((768, 12, 12), 512, 16),
    "L/14": _size((1024, 24, 16), 768, 14),
    "L/14-336": _size((1024, 24, 16), 768, 14, 336),
}


class Features(NamedTuple):
    """What a contrastive loss takes."""

    image: Tensor
    """(B, D), of norm 1."""
    text: Tensor
    """(B, D), of norm 1."""
    logit_scale: Tensor
    logit_bias: Tensor | None = None


class VisionTower(nn.Module):
    """CLIP's ViT, with a norm in front of its blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = PatchStem(config, bias=False, prefix=1)
        self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = Transformer(config)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def tokens(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """(B, 1 + patches, width), the class token first, not normalised."""
        return self.blocks(self.pre_norm(self.stem(images, layout)))

    def forward(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """The class token, normalised: (B, width)."""
        return self.norm(self.tokens(images, layout)[:, 0])


class TextTower(nn.Module):
    """CLIP's causal transformer. What follows the end of a text has no effect."""

    def __init__(self, config: TextConfig, eos_id: int | None) -> None:
        super().__init__()
        self.eos_id = eos_id
        self.embed = TextEmbeddings(config)
        self.blocks = Transformer(config, is_causal=True)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def tokens(self, ids: Tensor) -> Tensor:
        """(B, N, width), normalised."""
        return self.norm(self.blocks(self.embed(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, width), at the end of each text."""
        ends = ids if self.eos_id is None else (ids == self.eos_id).int()
        return self.tokens(ids)[torch.arange(len(ids), device=ids.device), ends.argmax(dim=-1)]


class CLIP(Pretrained):
    """Images and texts in one space, where those that belong together are near each other."""

    NAMES: ClassVar = {
        "vision.stem.prefix": ("vision_model.embeddings.class_embedding",),
        "vision.stem.pos": ("vision_model.embeddings.position_embedding.weight",),
        "vision.stem.weight": ("vision_model.embeddings.patch_embedding.weight",),
        "vision.pre_norm.{p}": ("vision_model.pre_layrnorm.{p}",),  # the typo is transformers'
        **encoder_names("vision.blocks.{i}", "vision_model.encoder.layers.{i}"),
        "vision.norm.{p}": ("vision_model.post_layernorm.{p}",),
        "text.embed.tokens.weight": ("text_model.embeddings.token_embedding.weight",),
        "text.embed.pos": ("text_model.embeddings.position_embedding.weight",),
        **encoder_names("text.blocks.{i}", "text_model.encoder.layers.{i}"),
        "text.norm.{p}": ("text_model.final_layer_norm.{p}",),
        "vision_proj.weight": ("visual_projection.weight",),
        "text_proj.weight": ("text_projection.weight",),
        "log_scale": ("logit_scale",),
    }

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text, config.eos_id)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        init_weights(self)

    @classmethod
    def from_hf(cls, model: Any) -> CLIP:
        """The same model as transformers' CLIPModel, weights copied.

        Image processors keep mean and std; ours are OpenAI's.
        """
        hf = model.config
        eos = hf.text_config.eos_token_id
        vision = vision_config(hf.vision_config, mean=MEAN, std=STD)
        # 2 is what old checkpoints say whatever their tokenizer does; transformers then takes the
        # token of the highest id
        config = CLIPConfig(
            vision, text_config(hf.text_config), hf.projection_dim, None if eos == 2 else eos
        )
        ours = cls(config)
        ours._take(model)
        return ours

    def encode_image(self, images: Tensor, layout: str = "nchw", normalize: bool = True) -> Tensor:
        """(B, embed_dim), of norm 1 unless `normalize` is off; `images` as `PatchStem` takes."""
        x = self.vision_proj(self.vision(images, layout))
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids (B, N), N at most context_length -> (B, embed_dim), of norm 1 as above."""
        x = self.text_proj(self.text(tokens))
        return F.normalize(x, dim=-1) if normalize else x

    def forward(self, images: Tensor, tokens: Tensor, layout: str = "nchw") -> Features:
        """Features of both, and the exponentiated logit scale."""
        image, text = self.encode_image(images, layout), self.encode_text(tokens)
        return Features(image, text, self.log_scale.exp())

    def loss(self, images: Tensor, tokens: Tensor, layout: str = "nchw") -> Tensor:
        """`vlm_kernels.clip_loss` of a batch of pairs, shape ()."""
        return clip_loss(*self(images, tokens, layout))


def vision_config(hf: Any, *, mean: tuple[float, ...], std: tuple[float, ...]) -> VisionConfig:
    """Of transformers' CLIPVisionConfig and those that are like it."""
    return VisionConfig(
        **_common(hf),
        image_size=square("image_size", hf.image_size),
        patch_size=square("patch_size", hf.patch_size),
        mean=mean,
        std=std,
    )


def text_config(hf: Any) -> TextConfig:
    """Of transformers' CLIPTextConfig and those that are like it."""
    return TextConfig(
        **_common(hf), vocab_size=hf.vocab_size, context_length=hf.max_position_embeddings
    )


def _common(hf: Any) -> dict[str, Any]:
    return {
        "width": hf.hidden_size,
        "depth": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "mlp_dim": hf.intermediate_size,
        "activation": hf.hidden_act,
        "norm_eps": hf.layer_norm_eps,
    }
