"""ViT against transformers' ViTModel and ViTForImageClassification."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_models import ViT, ViTConfig

transformers = pytest.importorskip("transformers", minversion="5.0", reason="the peer")

from tests.models import parity  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def vit(**config: Any) -> Any:
    return parity.randomised(transformers.ViTModel(transformers.ViTConfig(**SIZES, **config)))


def ours(model: ViT, images: Tensor, layout: str = "nchw") -> parity.Outputs:
    return {"tokens": model.tokens(images, layout), "pooled": model(images, layout)}


def theirs(model: Any, images: Tensor) -> parity.Outputs:
    out = model(images)
    return {"tokens": out.last_hidden_state, "pooled": out.pooler_output}


@pytest.mark.parametrize("config", [{}, {"qkv_bias": False, "hidden_act": "quick_gelu"}])
def test_model(config: dict[str, Any]) -> None:
    peer, images = vit(**config), torch.randn(3, 3, 28, 28)
    parity.assert_same(
        ViT.from_hf(peer),
        peer,
        lambda model: ours(model, images),
        lambda model, dtype: theirs(model, images.to(dtype)),
    )


def test_classifier() -> None:
    config = transformers.ViTConfig(**SIZES, num_labels=5)
    peer, images = transformers.ViTForImageClassification(config), torch.randn(3, 3, 28, 28)
    parity.randomised(peer)
    parity.assert_same(
        ViT.from_hf(peer),
        peer,
        lambda model: {"logits": model(images)},
        lambda model, dtype: {"logits": model(images.to(dtype)).logits},
    )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_pixels(layout: str) -> None:
    """uint8, as a decoder gives them; the patches do not cover the last 2 rows and columns."""
    peer = parity.randomised(
        transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "image_size": 30}))
    )
    images = torch.randint(0, 256, (3, 3, 30, 30), dtype=torch.uint8)
    given = images if layout == "nchw" else images.permute(0, 2, 3, 1).contiguous()
    model = ViT.from_hf(peer)
    processed = parity.normalised(images, model.config.mean, model.config.std)
    parity.assert_same(
        model,
        peer,
        lambda model: ours(model, given, layout),
        lambda model, dtype: theirs(model, processed.to(dtype)),
    )


def test_names_of_version_4(tmp_path: Path) -> None:
    peer, images = vit(), torch.randn(2, 3, 28, 28)
    folder = parity.published(peer, tmp_path)
    model = ViT(ViT.from_hf(peer).config)
    model.load_safetensors(folder)
    for path in (folder / "model.safetensors", folder):
        from_file = ViT(model.config)
        from_file.load_safetensors(path)
        torch.testing.assert_close(from_file.state_dict(), model.state_dict(), rtol=0, atol=0)
    parity.assert_same(
        model,
        peer,
        lambda model: ours(model, images),
        lambda model, dtype: theirs(model, images.to(dtype)),
    )


def test_dtype_and_mask_token_of_the_peer() -> None:
    peer = transformers.ViTModel(transformers.ViTConfig(**SIZES), use_mask_token=True)
    model = ViT.from_hf(peer.bfloat16())
    assert model(torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)).dtype == torch.bfloat16


# as torchvision (vit_b_32, vit_b_16) and timm (vit_huge_patch14_224, 632.05 M) count them
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("B/32", 88_224_232), ("B/16", 86_567_656), ("H/14", 632_045_800)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ViT(dataclasses.replace(ViTConfig.named(name), num_classes=1000))
    assert sum(p.numel() for p in model.parameters()) == parameters
