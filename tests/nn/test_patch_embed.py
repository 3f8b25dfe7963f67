"""`nn.PatchEmbed` against the layers it replaces: values, gradients, parameters, errors."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vlm_kernels import patchify
from vlm_kernels.nn import PatchEmbed
from vlm_kernels.testing.tolerances import assert_close

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BACKENDS = ["reference"]
if importlib.util.find_spec("vlm_kernels._C") is not None:
    BACKENDS.append("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def check(made: PatchEmbed, layer: nn.Module, images: Tensor, eager: Any, exact: Any) -> None:
    """Tokens and gradients of `made`, on the parameters of `layer`, under the rule of all tests."""
    results = []
    for module, call, x in (
        (made, made, images),
        (layer, eager, images),
        (copy.deepcopy(layer).double(), exact, images.double()),
    ):
        x = x.detach().requires_grad_()
        tokens = call(x) if module is made else call(module, x)
        seed = torch.linspace(-1, 1, tokens.numel(), dtype=torch.float64).view(tokens.shape)
        gradients = torch.autograd.grad(tokens, [x, *module.parameters()], seed.to(tokens.dtype))
        results.append((tokens, *gradients))
    names = ("tokens", "images", *(name for name, _ in layer.named_parameters()))
    for name, mine, theirs, true in zip(names, *results):
        assert mine.dtype == theirs.dtype
        assert_close(name, mine, theirs, true, "fwd" if name == "tokens" else "bwd")


def conv_tokens(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(8, 6), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_conv2d(backend: str, dtype: torch.dtype, stride: tuple[int, int], bias: bool) -> None:
    """Whole patches only, as a convolution sees them."""
    conv = nn.Conv2d(3, 33, (8, 6), stride, bias=bias, dtype=dtype)
    made = PatchEmbed.from_conv2d(conv, backend=backend)
    assert made.weight is conv.weight
    assert made.bias is conv.bias
    images = torch.randn(2, 3, 44, 41).to(dtype)
    check(made, conv, images, conv_tokens, conv_tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv3d(backend: str, dtype: torch.dtype) -> None:
    conv = nn.Conv3d(3, 40, (2, 6, 6), (2, 6, 6), bias=False, dtype=dtype)
    made = PatchEmbed.from_conv3d(conv, backend=backend)
    assert made.weight is conv.weight
    assert (made.temporal, made.k_order) == (2, "ctyx")
    videos = torch.randn(2, 4, 3, 20, 26).to(dtype)

    def tokens(conv: nn.Module, x: Tensor) -> Tensor:
        return conv_tokens(conv, x.transpose(1, 2))

    check(made, conv, videos, tokens, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(backend: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(5 * 7 * 3, 29, dtype=dtype)
    made = PatchEmbed.from_linear(linear, (5, 7), backend=backend)
    assert made.weight is linear.weight
    assert made.k_order == "yxc"

    def tokens(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(patchify(x, (5, 7), k_order="yxc", dtype=x.dtype))

    check(made, linear, torch.randn(2, 3, 25, 40).to(dtype), tokens, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_and_what_stands_around_them(backend: str) -> None:
    """8-bit pixels, positions, class token and newlines against the same by hand in fp64."""
    conv = nn.Conv2d(3, 24, 8, 8)
    made = PatchEmbed.from_conv2d(conv, mean=MEAN, std=STD, layout="nhwc", backend=backend)
    pixels = torch.randint(0, 256, (2, 34, 24, 3), dtype=torch.uint8)
    pos, prefix, newline = torch.randn(1 + 12, 24), torch.randn(1, 24), torch.randn(24)

    def by_hand(dtype: torch.dtype) -> Tensor:
        mean, std = (torch.tensor(x, dtype=dtype) for x in (MEAN, STD))
        x = ((pixels.to(dtype) / 255 - mean) / std).movedim(-1, 1)
        grid = copy.deepcopy(conv).to(dtype)(x).movedim(1, -1)
        grid = grid + pos[1:].to(dtype).view(4, 3, 24)
        rows = torch.cat([grid, newline.to(dtype).expand(2, 4, 1, 24)], 2).flatten(1, 2)
        return torch.cat([(prefix + pos[:1]).to(dtype).expand(2, 1, 24), rows], 1)

    tokens = made(pixels, pos, prefix, newline)
    assert_close("tokens", tokens, by_hand(torch.float32), by_hand(torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_stems_of_qwen2_vl_and_siglip2(backend: str) -> None:
    """From 8-bit pixels what transformers makes of its own patches, where a still is two frames."""
    hf = pytest.importorskip(
        "transformers", minversion="5.23", reason="needs transformers >= 5.23"
    ).models
    pixels = torch.randint(0, 256, (3, 56, 84), dtype=torch.uint8)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    image = ((pixels / 255.0).double() - mean) / std
    qwen = hf.qwen2_vl.modeling_qwen2_vl.PatchEmbed(14, 2, 3, 32)
    processor = hf.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil()
    patches = torch.from_numpy(processor.patchify(image.numpy(), 14, 2, 2)[0])
    norm: dict[str, Any] = {"mean": MEAN, "std": STD, "backend": backend}
    made = PatchEmbed.from_conv3d(qwen.proj, merge=2, **norm)
    exact = conv_tokens(copy.deepcopy(qwen.proj).double(), patches.double().view(-1, 3, 2, 14, 14))[
        :, 0
    ]
    assert_close("Qwen2-VL", made(pixels[None])[0], qwen(patches.float()), exact)

    linear = nn.Linear(588, 32)
    convert = hf.siglip2.image_processing_pil_siglip2.convert_image_to_patches
    patches = torch.from_numpy(convert(image.numpy(), 14))
    tokens = PatchEmbed.from_linear(linear, 14, **norm)(pixels[None])[0]
    exact = patches @ linear.weight.double().T + linear.bias.double()
    assert_close("SigLIP 2", tokens, linear(patches.float()), exact)


def test_the_parameters_are_the_layers() -> None:
    """State dicts go both ways, an optimiser of the old layer moves the new one, copies live."""
    conv = nn.Conv2d(3, 8, 4, 4)
    conv.weight.requires_grad_(False)
    made = PatchEmbed.from_conv2d(conv.eval())
    assert list(made.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    assert not made.weight.requires_grad
    assert not made.training
    nn.Conv2d(3, 8, 4, 4).load_state_dict(made.state_dict())
    optimiser = torch.optim.SGD(conv.parameters(), lr=1.0)
    before = made.bias.detach().clone()
    made(torch.rand(1, 3, 8, 8)).sum().backward()
    optimiser.step()
    assert not torch.equal(made.bias, before)
    twin = copy.deepcopy(made)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(twin(images), made(images))
    assert twin.weight is not made.weight


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (16, 3, 4, 5)),
        ({"temporal": 2, "k_order": "ctyx"}, (16, 3, 2, 4, 5)),
        ({"temporal": 2}, (16, 3, 2, 4, 5)),
        ({"k_order": "yxc"}, (16, 60)),
        ({"k_order": "yxc", "temporal": 2, "bias": False}, (16, 120)),
    ],
)
def test_shapes_of_a_new_module(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    made = PatchEmbed(3, 16, patch_size=(4, 5), dtype=torch.bfloat16, **options)
    assert made.weight.shape == shape
    assert made.weight.dtype == torch.bfloat16
    assert (made.bias is None) == ("bias" in options)
    assert 0 < made.weight.abs().max() <= made.weight[0].numel() ** -0.5 * 1.01
    assert made(torch.rand(2, 3, 9, 10)).shape == (2, 6, 16)  # the last row is padded
    assert "patch_size=(4, 5)" in repr(made)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(4, 8, 4, 4, groups=2), ValueError, "groups is 2"),
        (nn.Conv2d(3, 8, 4, 4, dilation=2), ValueError, r"dilation is \(2, 2\)"),
        (nn.Conv2d(3, 8, 4, 4, padding=1), ValueError, r"padding is \(1, 1\)"),
        (nn.Conv2d(3, 8, 3, 1, padding="same"), ValueError, "padding is same"),
        (nn.Linear(48, 8), TypeError, "is Linear, expected Conv2d"),
        (
            parametrizations.weight_norm(nn.Conv2d(3, 8, 4, 4)),
            TypeError,
            "no parameter of its own",
        ),
    ],
)
def test_from_conv2d_refuses(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchEmbed.from_conv2d(layer)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="over time is 1, expected that of the kernel, 2"):
        PatchEmbed.from_conv3d(nn.Conv3d(3, 8, (2, 4, 4), (1, 4, 4)))
    with pytest.raises(TypeError, match="is Conv2d, expected Conv3d"):
        PatchEmbed.from_conv3d(nn.Conv2d(3, 8, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 50 features"):
        PatchEmbed.from_linear(nn.Linear(50, 8), 4)
    with pytest.raises(ValueError, match="remainder is 'drop'"):
        PatchEmbed(patch_size=4, remainder="drop")
    with pytest.raises(ValueError, match="k_order is 'xyc'"):
        PatchEmbed(patch_size=4, k_order="xyc")
    with pytest.raises(ValueError, match="from 1 on"):
        PatchEmbed(patch_size=0)
    made = PatchEmbed.from_conv2d(nn.Conv2d(3, 8, 4, 4, padding="valid"))
    for images, message in (
        (torch.rand(3, 8, 8), "shape"),
        (torch.rand(1, 3, 3, 8), "smaller than a patch"),
        (torch.rand(1, 4, 8, 8), "weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            made(images)
