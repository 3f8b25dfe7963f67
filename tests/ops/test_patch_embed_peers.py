"""patch_embed against the stems of transformers, from photographs to tokens.

transformers normalises with its image processor and projects with its own module; ours takes the
bytes of the photographs and that module's parameters, whose gradients are compared too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlm_kernels
from vlm_kernels.testing.specs import patch_embed as spec
from vlm_kernels.testing.tolerances import assert_close

datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photographs")
transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")

from transformers.models.clip import image_processing_pil_clip, modeling_clip  # noqa: E402
from transformers.models.fuyu import image_processing_pil_fuyu  # noqa: E402
from transformers.models.idefics import configuration_idefics, vision  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: E402
from transformers.models.siglip import (  # noqa: E402
    image_processing_pil_siglip,
    modeling_siglip,
)
from transformers.models.siglip2 import (  # noqa: E402
    image_processing_pil_siglip2,
    modeling_siglip2,
)
from transformers.models.vit import image_processing_pil_vit, modeling_vit  # noqa: E402

needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
WIDTH = 32


@lru_cache
def photographs(h: int, w: int) -> Tensor:
    """Two of them, cut to (2, h, w, 3) of uint8; every third pixel, so that they have details."""
    images = datasets.load_sample_images().images
    cut = [image[20 : 20 + 3 * h : 3, 40 : 40 + 3 * w : 3] for image in images]
    return torch.from_numpy(np.stack(cut))


def config(kind: Any, patch: int, size: int) -> Any:
    return kind(hidden_size=WIDTH, num_attention_heads=2, image_size=size, patch_size=patch)


@dataclass(frozen=True)
class Peer:
    """A stem of transformers and what of ours is the same.

    Attributes:
        build: the module, with random weights.
        processor: its image processor.
        inputs: of a normalised image (C, H, W) as an array, what the module takes of it.
        tokens: of the module and those of a batch: (B, L, E).
        ours: of the module, our arguments.
    """

    size: tuple[int, int]
    build: Callable[[], nn.Module]
    processor: Any
    tokens: Callable[[Any, Tensor], Tensor]
    ours: Callable[[Any], dict[str, Any]]
    inputs: Callable[[Any, np.ndarray], np.ndarray] = field(default=lambda _, image: image)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, ...) in fp32, as transformers' processor normalises them."""
        made = self.processor()
        found = []
        for image in images.movedim(-1, -3).numpy():
            image = made.rescale(image, made.rescale_factor)
            image = made.normalize(image, made.image_mean, made.image_std)
            found.append(torch.from_numpy(np.asarray(self.inputs(made, image), dtype=np.float32)))
        return torch.stack(found)


def norm(processor: Any) -> dict[str, tuple[float, ...]]:
    made = processor()
    three = {"mean": made.image_mean, "std": made.image_std}
    return {k: tuple(v) if isinstance(v, (list, tuple)) else (v,) * 3 for k, v in three.items()}


def clip_like(module: Any) -> dict[str, Any]:
    return {
        "weight": module.patch_embedding.weight,
        "pos": module.position_embedding.weight,
        "prefix": module.class_embedding[None],
        "patch_size": module.patch_size,
    }


def vit(module: Any) -> dict[str, Any]:
    projection = module.patch_embeddings.projection
    return {
        "weight": projection.weight,
        "bias": projection.bias,
        "pos": module.position_embeddings,
        "prefix": module.cls_token,
        "patch_size": module.patch_size,
    }


def siglip(module: Any) -> dict[str, Any]:
    layer = module.patch_embedding
    pos = module.position_embedding.weight
    return {"weight": layer.weight, "bias": layer.bias, "pos": pos, "patch_size": 14}


SHAPES = torch.tensor([[3, 5], [3, 5]])  # of SigLIP 2's images, in patches


def siglip2(module: Any) -> dict[str, Any]:
    table = module.position_embedding.weight.view(4, 4, WIDTH)
    pos = module.resize_positional_embeddings(table, SHAPES, 15)
    layer = module.patch_embedding
    given = {"weight": layer.weight, "bias": layer.bias, "pos": pos}
    return {**given, "patch_size": 16, "k_order": "yxc"}


class FuyuStem(nn.Module):
    """`vision_embed_tokens` of FuyuModel."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_embed_tokens = nn.Linear(30 * 30 * 3, WIDTH)


def fuyu(module: Any) -> dict[str, Any]:
    layer = module.vision_embed_tokens
    return {"weight": layer.weight, "bias": layer.bias, "patch_size": 30, "k_order": "yxc"}


def qwen_inputs(processor: Any, image: np.ndarray) -> np.ndarray:
    return processor.patchify(image, 14, 2, 2)[0]


PEERS = {
    "vit": Peer(
        (48, 48),
        lambda: modeling_vit.ViTEmbeddings(config(transformers.ViTConfig, 16, 48)).eval(),
        image_processing_pil_vit.ViTImageProcessorPil,
        lambda module, x: module(x),
        vit,
    ),
    "clip": Peer(
        (42, 42),
        lambda: modeling_clip.CLIPVisionEmbeddings(config(transformers.CLIPVisionConfig, 14, 42)),
        image_processing_pil_clip.CLIPImageProcessorPil,
        lambda module, x: module(x),
        clip_like,
    ),
    "idefics": Peer(
        (42, 42),
        lambda: vision.IdeficsVisionEmbeddings(
            configuration_idefics.IdeficsVisionConfig(embed_dim=WIDTH, image_size=42, patch_size=14)
        ),
        image_processing_pil_clip.CLIPImageProcessorPil,  # Idefics' own takes no arrays of floats
        lambda module, x: module(x),
        clip_like,
    ),
    "siglip": Peer(
        (56, 56),
        lambda: modeling_siglip.SiglipVisionEmbeddings(
            config(transformers.SiglipVisionConfig, 14, 56)
        ),
        image_processing_pil_siglip.SiglipImageProcessorPil,
        lambda module, x: module(x),
        siglip,
    ),
    "siglip2": Peer(
        (48, 80),
        lambda: modeling_siglip2.Siglip2VisionEmbeddings(
            transformers.Siglip2VisionConfig(hidden_size=WIDTH, patch_size=16, num_patches=16)
        ),
        image_processing_pil_siglip2.Siglip2ImageProcessorPil,
        lambda module, x: module(x, SHAPES),
        siglip2,
        lambda _, image: image_processing_pil_siglip2.convert_image_to_patches(image, 16),
    ),
    "fuyu": Peer(
        (60, 120),
        FuyuStem,
        image_processing_pil_fuyu.FuyuImageProcessorPil,
        lambda module, x: module.vision_embed_tokens(x),
        fuyu,
        lambda processor, image: processor.patchify_image(image),
    ),
    "qwen2_vl": Peer(
        (56, 84),
        lambda: modeling_qwen2_vl.PatchEmbed(14, 2, 3, WIDTH),
        qwen.Qwen2VLImageProcessorPil,
        lambda module, x: module(x.flatten(0, 1)).view(len(x), -1, WIDTH),
        lambda module: {
            "weight": module.proj.weight,
            "patch_size": 14,
            "k_order": "ctyx",
            "temporal": 2,
            "merge": 2,
        },
        qwen_inputs,
    ),
}


def run(module: nn.Module, fn: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Tokens, and the gradients of the module's parameters for random ones of the tokens."""
    out = fn(module)
    leaves = dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(leaves.values()), spec.gradient(out.detach()))
    return {"out": out.detach(), **{f"{name}.grad": g for name, g in zip(leaves, grads)}}


@dtypes
@pytest.mark.parametrize("name", PEERS)
@backends
def test_tokens_of_photographs(name: str, dtype: torch.dtype, backend: str) -> None:
    """As exact as the model itself at this dtype, by the rule of accuracy."""
    peer, images = PEERS[name], photographs(*PEERS[name].size)
    torch.manual_seed(0)
    module = peer.build().to(dtype)
    for parameter in module.parameters():  # whatever transformers would start it with
        nn.init.normal_(parameter, std=1 / (parameter[0].numel() or 1) ** 0.5)
    pixels = peer.pixels(images)
    eager = run(module, lambda module: peer.tokens(module, pixels.to(dtype)))

    def ours(module: Any) -> Tensor:
        given = peer.ours(module)
        return vlm_kernels.patch_embed(
            images, layout="nhwc", **given, **norm(peer.processor), backend=backend
        )

    found = run(module, ours)
    exact = run(module.double(), lambda module: peer.tokens(module, pixels.double()))
    if dtype != torch.float32:
        # of the gradient of the tokens as it was rounded
        rounded = spec.gradient(eager["out"]).double()
        out = peer.tokens(module, pixels.double())
        grads = torch.autograd.grad(out, list(module.parameters()), rounded)
        exact |= {f"{n}.grad": g for (n, _), g in zip(module.named_parameters(), grads)}
    for result, value in found.items():
        kind = "bwd" if result.endswith(".grad") else "fwd"
        assert_close(f"{name}: {result}", value, eager[result], exact[result], kind)


@backends
def test_the_layouts_of_fuyu_are_the_processor_s(backend: str) -> None:
    """A newline after each row of patches, where Fuyu has its id; and padding on the right and at
    the bottom, of 0 in the units of the image: those are what `pad_space` names."""
    torch.manual_seed(0)
    module = FuyuStem()
    newline = torch.randn(WIDTH)
    patch_embed = partial(
        vlm_kernels.patch_embed,
        **fuyu(module),
        layout="nhwc",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        backend=backend,
    )
    peer = PEERS["fuyu"]
    with torch.no_grad():
        wanted = peer.tokens(module, peer.pixels(photographs(60, 120))).unflatten(1, (2, 4))
        rows = patch_embed(photographs(60, 120), newline=newline).unflatten(1, (2, 5))
        torch.testing.assert_close(rows[:, :, :4], wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(rows[:, :, 4], newline.expand(2, 2, WIDTH))
        cut = photographs(60, 120)[:, :50, :100].clone()
        padded = torch.zeros(2, 60, 120, 3, dtype=torch.uint8)
        padded[:, :50, :100] = cut
        wanted = peer.tokens(module, peer.pixels(padded))
        torch.testing.assert_close(patch_embed(cut), wanted, rtol=1e-5, atol=1e-5)
        after = torch.zeros(2, 60, 120, 3)
        after[:, :50, :100] = (cut / 255 - 0.5) / 0.5
        wanted = peer.tokens(
            module,
            torch.stack(
                [
                    torch.from_numpy(peer.inputs(peer.processor(), image))
                    for image in after.movedim(-1, -3).numpy()
                ]
            ),
        )
        got = patch_embed(cut, pad_space="normalised")
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
