"""What the models share: configs, the patch stem's checks, checkpoints' errors, zero-shot."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_models
from vlm_kernels.testing.tolerances import MODELS, relative_error
from vlm_models import CLIP, CLIPConfig, SigLip, SigLipConfig, ViT, ViTConfig
from vlm_models.checkpoints import Pretrained, convert

TINY: list[tuple[type[Any], Any]] = [(ViT, ViTConfig), (CLIP, CLIPConfig), (SigLip, SigLipConfig)]


def names(model: Pretrained) -> dict[str, Tensor]:
    """A state dict under the first of transformers' names, stacked tensors apart."""
    found = {}
    for ours, x in model.state_dict().items():
        missing = convert(model.NAMES, [ours], {}).missing
        found.update(zip(missing, x.chunk(len(missing)) if len(missing) > 1 else [x]))
    return found


@pytest.mark.parametrize(("model", "config"), TINY)
def test_every_parameter_has_a_name(model: Any, config: Any) -> None:
    first, second = model(config.tiny()), model(config.tiny())
    second.load_hf_state_dict(names(first))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_wrong_checkpoint_is_told_whole() -> None:
    model = ViT(ViTConfig.tiny())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    given = names(model)
    del given["layers.1.attention.k_proj.bias"]
    given["layers.0.mlp.fc1.weight"] = given["layers.0.mlp.fc1.weight"].mT
    given["embeddings.position_embeddings"] = torch.zeros(1, 10, 32)
    given["layers.2.mlp.fc1.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match="not this model's") as error:
        model.load_hf_state_dict(given)
    text = str(error.value)
    assert "missing: layers.1.attention.k_proj.bias;" in text
    assert "unexpected: layers.2.mlp.fc1.bias;" in text
    assert "stem.pos (1, 10, 32), expected (5, 32)" in text
    assert "blocks.0.mlp.fc1.weight (32, 64), expected (64, 32)" in text
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_missing_part_is_named_as_its_neighbours_are() -> None:
    """In a checkpoint of version 4 by the name of version 4."""
    table = ViT.NAMES
    stem = "encoder.layer.3.attention.attention"
    given = {f"{stem}.{part}.bias": torch.zeros(2) for part in ("query", "value")}
    found = convert(table, ["blocks.3.attn.qkv.bias"], given)
    assert found.missing == [f"{stem}.key.bias"]
    assert not found.unexpected


def test_files_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = ViT(ViTConfig.tiny())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
            model.load_safetensors(path)


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        ViT(ViTConfig.tiny()).load_safetensors(tmp_path)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    first, second = ViT(ViTConfig.tiny()), ViT(ViTConfig.tiny())
    tensors = list(names(first).items())
    for part in range(2):
        shard = {name: x.contiguous() for name, x in tensors[part::2]}
        save_file(shard, tmp_path / f"model-{part}.safetensors")
    second.load_safetensors(tmp_path)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 28, 28, 3), "nchw"),
        ((2, 3, 28, 28), "nhwc"),
        ((2, 3, 28, 29), "nchw"),
        ((3, 28, 28), "nchw"),
    ],
)
def test_images_of_another_shape(shape: tuple[int, ...], layout: str) -> None:
    with pytest.raises(ValueError, match="resize them to 28 x 28"):
        ViT(ViTConfig.tiny())(torch.zeros(shape), layout)


def test_texts_that_are_too_long() -> None:
    config = CLIPConfig.tiny()
    with pytest.raises(ValueError, match="10 tokens, at most 9"):
        CLIP(config).encode_text(torch.zeros(1, 10, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "no multiple of heads"),
        ({"activation": "relu"}, "expected one of 'gelu'"),
        ({"std": (1.0,)}, "3 channels, std 1"),
        ({"patch_size": 32}, "smaller than patch_size"),
    ],
)
def test_configs_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ViTConfig.tiny(), **change)


@pytest.mark.parametrize(("model", "config"), TINY)
def test_sizes(model: Any, config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tiny().vision = None
    with pytest.raises(ValueError, match="no size 'XXL', only 'B/"):
        config.named("XXL")


@pytest.mark.parametrize(("model", "config"), TINY[1:])
def test_training_starts(model: Any, config: Any) -> None:
    """From its random weights every parameter learns, and a few steps fit four pairs."""
    torch.manual_seed(0)
    towers = model(config.tiny())
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    ids = torch.randint(0, 99, (4, 9))
    optimizer = torch.optim.Adam(towers.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = towers.loss(images, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in towers.parameters())
    assert losses[-1] < 0.5 * losses[0]


def tokenize(captions: list[str]) -> Tensor:
    return torch.tensor([[ord(c) - 32 for c in f"{caption:<9}"] for caption in captions])


def test_zero_shot() -> None:
    model = CLIP(dataclasses.replace(CLIPConfig.tiny(), embed_dim=8))
    names, templates = ["cat", ("dog", "hound"), "owl"], ("{}", "a {}", "{}!")
    found = vlm_models.class_embeddings(model.encode_text, tokenize, names, templates)
    rows = []
    for words in (["cat"], ["dog", "hound"], ["owl"]):
        text = model.encode_text(tokenize([t.format(w) for w in words for t in templates]))
        rows.append(F.normalize(text.double().mean(0), dim=-1))
    exact = torch.stack(rows)
    assert relative_error(found, exact) <= MODELS["fwd"]
    near = F.normalize(exact[[2, 0, 0, 1]] + 1e-3, dim=-1).float()
    assert vlm_models.classify(near, found).tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "templates"), [([], ["{}"]), (["cat"], []), (["cat"], ["a photo of a cat"])]
)
def test_zero_shot_is_checked(labels: list[str], templates: list[str]) -> None:
    with pytest.raises(ValueError, match="class_embeddings"):
        vlm_models.class_embeddings(lambda x: x.float(), tokenize, labels, templates)
