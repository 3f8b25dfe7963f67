"""CLIP against transformers' CLIPModel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_kernels.testing.tolerances import assert_close
from vlm_models import CLIP, CLIPConfig

transformers = pytest.importorskip("transformers", minversion="5.0", reason="the peer")

from tests.models import parity  # noqa: E402

EOS, LENGTH = 98, 9
SIZES: dict[str, Any] = {
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip(eos_id: int = EOS, activation: str = "quick_gelu") -> Any:
    rest = {"hidden_act": activation, **SIZES}
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 32, "image_size": 28, "patch_size": 14, **rest},
        text_config={
            **{"hidden_size": 24, "vocab_size": EOS + 1, "max_position_embeddings": LENGTH},
            **{"bos_token_id": 0, "eos_token_id": eos_id, "pad_token_id": 1, **rest},
        },
        projection_dim=16,
    )
    return parity.randomised(transformers.CLIPModel(config))


def texts() -> Tensor:
    """Five, of 2 to 6 tokens, behind whose end stands what must have no effect."""
    ids = torch.randint(3, EOS, (5, 7))
    ids[torch.arange(5), torch.tensor([1, 2, 3, 4, 6])] = EOS
    ids[1, 5] = EOS  # a tokenizer may pad with it
    return ids


def ours(model: CLIP, images: Tensor, ids: Tensor, layout: str = "nchw") -> parity.Outputs:
    features = model(images, ids, layout)
    return {
        "image": features.image,
        "text": features.text,
        "image tokens": model.vision.tokens(images, layout),
        "text tokens": model.text.tokens(ids),
        "logits": features.logit_scale * features.image @ features.text.T,
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


@pytest.mark.parametrize("eos_id", [EOS, 2])  # 2: transformers takes the highest id
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_model(eos_id: int, activation: str) -> None:
    peer, images, ids = clip(eos_id, activation), torch.randn(5, 3, 28, 28), texts()
    parity.assert_same(
        CLIP.from_hf(peer),
        peer,
        lambda model: ours(model, images, ids),
        lambda model, dtype: theirs(model, images.to(dtype), ids),
    )


def test_an_end_that_is_not_the_highest_id() -> None:
    peer, images, ids = clip(eos_id=50), torch.randn(5, 3, 28, 28), texts()
    ids[:, 1:4] = torch.tensor([60, 50, 97])
    parity.assert_same(
        CLIP.from_hf(peer),
        peer,
        lambda model: ours(model, images, ids),
        lambda model, dtype: theirs(model, images.to(dtype), ids),
    )


def test_pixels_channels_last() -> None:
    peer, ids = clip(), texts()
    images = torch.randint(0, 256, (5, 3, 28, 28), dtype=torch.uint8)
    model = CLIP.from_hf(peer)
    vision = model.config.vision
    processed = parity.normalised(images, vision.mean, vision.std)
    parity.assert_same(
        model,
        peer,
        lambda model: ours(model, images.permute(0, 2, 3, 1).contiguous(), ids, "nhwc"),
        lambda model, dtype: theirs(model, processed.to(dtype), ids),
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    peer, images, ids = clip(), torch.randn(5, 3, 28, 28), texts()
    exact = theirs(copy.deepcopy(peer).double(), images.double(), ids)
    dtype = torch.float32 if autocast else torch.bfloat16
    peer = peer.to(dtype)
    model = CLIP.from_hf(peer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = theirs(peer, images.to(dtype), ids)
        mine = ours(model, images.to(dtype), ids)
    assert mine["image"].dtype == torch.bfloat16
    for name in ("image", "text", "image tokens", "text tokens"):
        assert_close(name, mine[name], eager[name], exact[name])


def test_mean_and_std_are_openais() -> None:
    processor = transformers.CLIPImageProcessorPil()
    vision = CLIPConfig.named("B/32").vision
    assert vision.mean == tuple(processor.image_mean)
    assert vision.std == tuple(processor.image_std)


@pytest.mark.parametrize("buffers", [False, True])
def test_checkpoint(tmp_path: Path, buffers: bool) -> None:
    """As transformers writes it, and with the buffers that it wrote before 4.31."""
    from safetensors.torch import load_file, save_file

    peer = clip()
    file = parity.published(peer, tmp_path) / "model.safetensors"
    if buffers:
        ids = {
            "text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
            "vision_model.embeddings.position_ids": torch.arange(5)[None],
        }
        save_file({**load_file(file), **ids}, file)
    expected = CLIP.from_hf(peer)
    model = CLIP(expected.config)
    model.load_safetensors(file)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


# as open_clip counts them: ViT-B-32, ViT-B-16, ViT-L-14 and ViT-L-14-336
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("B/32", 151_277_313),
        ("B/16", 149_620_737),
        ("L/14", 427_616_513),
        ("L/14-336", 427_944_193),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = CLIP(CLIPConfig.named(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
