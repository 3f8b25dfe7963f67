"""What the systems share: transformer blocks, the patch stem, text embeddings, attention pooling.

Attention and patch embedding are vlm_kernels', everything else is torch.nn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_kernels import patch_embed
from vlm_kernels.nn import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU (arXiv:1606.08415) that OpenAI's CLIP uses."""
    return x * torch.sigmoid(1.702 * x)


# by transformers' names
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a tower: features of a token, layers, attention heads, features inside the MLP."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.width % self.heads:
            raise ValueError(f"{name}: width {self.width} is no multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{name}: activation is {self.activation!r}, expected one of {known}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A tower over patches of square images, in pixels.

    `mean` and `std` are those of each channel of pixels in [0, 1], for uint8 images.
    """

    image_size: int
    patch_size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"{type(self).__name__}: mean has {len(self.mean)} channels, std {len(self.std)}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: image_size {self.image_size} is smaller than patch_size "
                f"{self.patch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A tower over token ids below vocab_size, at most context_length of them."""

    vocab_size: int
    context_length: int


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: TransformerConfig, *, is_causal: bool = False, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads, qkv_bias=qkv_bias, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """(B, N, width); `attention` takes vlm_kernels.nn.Attention's masks and positions."""
        x = x + self.attn(self.norm1(x), **attention)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.ModuleList):
    """`config.depth` blocks; every one is called with the same masks and positions."""

    def __init__(
        self, config: TransformerConfig, *, is_causal: bool = False, qkv_bias: bool = True
    ) -> None:
        make = partial(Block, config, is_causal=is_causal, qkv_bias=qkv_bias)
        super().__init__(make() for _ in range(config.depth))

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        for block in self:
            x = block(x, **attention)
        return x


class PatchStem(nn.Module):
    """Images to tokens: patches, projected, with positions, behind `prefix` learned tokens.

    uint8 images are normalised with the config's mean and std inside the same kernel; those of
    floating point are taken as an image processor leaves them.
    """

    def __init__(self, config: VisionConfig, *, bias: bool = True, prefix: int = 0) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, config.channels, size, size))
        self.bias = nn.Parameter(torch.empty(config.width)) if bias else None
        self.prefix = nn.Parameter(torch.empty(prefix, config.width)) if prefix else None
        self.pos = nn.Parameter(torch.empty(prefix + config.patches, config.width))

    def forward(self, images: Tensor, layout: str = "nchw") -> Tensor:
        """(B, prefix + patches, width).

        Args:
            images: uint8 in 0..255, or normalised floating point; (B, C, S, S) as layout="nchw" or
                (B, S, S, C) as "nhwc", with the config's channels C and image_size S.
            layout: "nchw" or "nhwc".

        Raises:
            ValueError: images of another shape, or an unknown layout.
        """
        config = self.config
        side = config.image_size
        channels_last = layout == "nhwc"
        shape = (side, side, config.channels) if channels_last else (config.channels, side, side)
        if tuple(images.shape[1:]) != shape or images.dim() != 4:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, "
                f"{', '.join(map(str, shape))}) for layout={layout!r}; resize them to {side} x "
                f"{side} pixels, or name their layout"
            )
        whole = side // config.patch_size * config.patch_size
        if whole < side:  # what patches do not cover is left out, as by a convolution
            first = 1 if channels_last else 2
            images = images.narrow(first, 0, whole).narrow(first + 1, 0, whole)
        pixels = images.dtype == torch.uint8
        return patch_embed(
            images,
            self.weight,
            self.bias,
            patch_size=config.patch_size,
            layout=layout,
            mean=config.mean if pixels else None,
            std=config.std if pixels else None,
            pos=self.pos,
            prefix=self.prefix,
        )


class TextEmbeddings(nn.Module):
    """Token ids (B, N) -> (B, N, width): a row of a table each, and one of positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.pos = nn.Parameter(torch.empty(config.context_length, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if length > len(self.pos):
            raise ValueError(
                f"texts have {length} tokens, at most {len(self.pos)} fit; shorten them"
            )
        return self.tokens(tokens) + self.pos[:length]


class AttentionPool(nn.Module):
    """One vector of all tokens: a learned query attends to them, then an MLP (the "MAP head").

    Zhai et al., Scaling Vision Transformers, arXiv:2106.04560.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, config.width))
        self.attn = Attention(config.width, config.heads, qkv_bias=True)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width) -> (B, width)."""
        x = self.attn(self.query.expand(len(tokens), -1, -1), tokens)
        return (x + self.mlp(self.norm(x))).squeeze(1)


def init_weights(model: nn.Module) -> None:
    """Random weights to train from, in place.

    Linear layers as in the ViT paper's code (Glorot; zero biases); class and query tokens,
    positions and token tables normal with a variance of 1 / width, as CLIP's class token.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, PatchStem):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, (PatchStem, TextEmbeddings, AttentionPool)):
            for name in ("prefix", "pos", "query"):
                tokens = getattr(module, name, None)
                if tokens is not None:
                    nn.init.normal_(tokens, std=tokens.shape[-1] ** -0.5)
