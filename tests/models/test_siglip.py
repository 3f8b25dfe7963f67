"""SigLIP against transformers' SiglipModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_models import SigLip, SigLipConfig

transformers = pytest.importorskip("transformers", minversion="5.0", reason="the peer")

from tests.models import parity  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def siglip(image_size: int = 28, text_width: int = 32) -> Any:
    text = {**SIZES, "hidden_size": text_width, "projection_size": 32, **IDS}
    config = transformers.SiglipConfig(
        vision_config={"image_size": image_size, "patch_size": 14, **SIZES},
        text_config={"vocab_size": 99, "max_position_embeddings": 9, **text},
    )
    return parity.randomised(transformers.SiglipModel(config))


def ours(model: SigLip, images: Tensor, ids: Tensor, layout: str = "nchw") -> parity.Outputs:
    features = model(images, ids, layout)
    assert features.logit_bias is not None
    return {
        "image": features.image,
        "text": features.text,
        "image tokens": model.vision.tokens(images, layout),
        "text tokens": model.text.tokens(ids),
        "logits": features.logit_scale * features.image @ features.text.T + features.logit_bias,
        "loss": model.loss(images, ids, layout),
    }


def theirs(model: Any, images: Tensor, ids: Tensor) -> parity.Outputs:
    out = model(input_ids=ids, pixel_values=images, return_loss=True)
    return {
        "image": out.image_embeds,
        "text": out.text_embeds,
        "image tokens": out.vision_model_output.last_hidden_state,
        "text tokens": out.text_model_output.last_hidden_state,
        "logits": out.logits_per_image,
        "loss": out.loss,
    }


@pytest.mark.parametrize("length", [9, 5])
def test_model(length: int) -> None:
    """Towers of two widths, full and shorter texts."""
    peer, images = siglip(text_width=24), torch.randn(4, 3, 28, 28)
    ids = torch.randint(0, 99, (4, length))
    parity.assert_same(
        SigLip.from_hf(peer),
        peer,
        lambda model: ours(model, images, ids),
        lambda model, dtype: theirs(model, images.to(dtype), ids),
    )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_pixels(layout: str) -> None:
    """uint8; as 384 is for patches of 14, the image is no multiple of the patches."""
    peer, ids = siglip(image_size=40), torch.randint(0, 99, (4, 9))
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    given = images if layout == "nchw" else images.permute(0, 2, 3, 1).contiguous()
    model = SigLip.from_hf(peer)
    vision = model.config.vision
    processed = parity.normalised(images, vision.mean, vision.std)
    parity.assert_same(
        model,
        peer,
        lambda model: ours(model, given, ids, layout),
        lambda model, dtype: theirs(model, processed.to(dtype), ids),
    )


def test_checkpoint(tmp_path: Path) -> None:
    peer = siglip()
    expected = SigLip.from_hf(peer)
    model = SigLip(expected.config)
    model.load_safetensors(parity.published(peer, tmp_path))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


# millions, as open_clip counts them: ViT-B-16-SigLIP, ViT-B-16-SigLIP-256, ViT-L-16-SigLIP-256 and
# ViT-SO400M-14-SigLIP-384
@pytest.mark.parametrize(
    ("name", "millions"),
    [("B/16-224", 203.16), ("B/16-256", 203.20), ("L/16-256", 652.15), ("so400m/14-384", 877.96)],
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = SigLip(SigLipConfig.named(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
