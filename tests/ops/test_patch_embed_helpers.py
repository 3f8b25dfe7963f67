"""fold_normalization, patchify and interpolate_pos_embed, against fp64 and against transformers."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_kernels import fold_normalization, interpolate_pos_embed, patchify
from vlm_kernels.reference.patch_embed import patchify as reference_patchify
from vlm_kernels.testing.tolerances import assert_close, relative_error

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
E = 24


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return pytest.importorskip(
        "transformers", minversion="5.23", reason="needs transformers >= 5.23"
    )


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# --- fold_normalization ---


def photo() -> Tensor:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the photos of scikit-learn")
    return torch.from_numpy(datasets.load_sample_image("china.jpg")[None, :224, :336].copy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scene", ["photo", "page"])
def test_folding_is_no_worse_than_normalising_first(dtype: torch.dtype, scene: str) -> None:
    """Where both round their operands once; folding without the rounded weights is worse."""
    images = photo() if scene == "photo" else torch.full((1, 112, 112, 3), 255, dtype=torch.uint8)
    weight, bias = (torch.randn(64, 588) * 588**-0.5).to(dtype), torch.randn(64).to(dtype)
    normalised = patchify(
        images, 14, layout="nhwc", mean=MEAN, std=STD, dtype=torch.float64
    ).flatten(0, 1)
    raw = patchify(images, 14, layout="nhwc", rescale=1, dtype=torch.float64).flatten(0, 1)
    exact = normalised @ weight.double().T + bias.double()
    eager = normalised.to(dtype).double() @ weight.double().T + bias.double()
    folded, offset = fold_normalization(weight, bias, MEAN, STD)
    assert folded.dtype == dtype
    assert offset.dtype == torch.float32
    ours = raw @ folded.double().T + offset.double()
    assert_close("tokens", ours.float(), eager, exact)
    if dtype != torch.float32:
        _, unrounded = fold_normalization(weight, bias, MEAN, STD, torch.float64)
        naive = raw @ folded.double().T + unrounded
        errors = [relative_error(x, exact) for x in (ours, eager, naive)]
        assert errors[0] < 1.1 * errors[1]
        assert errors[0] < 0.75 * errors[2]


@pytest.mark.parametrize(
    ("shape", "k_order"),
    [((3, 4, 5), "cyx"), ((3, 2, 4, 5), "ctyx"), ((60,), "cyx"), ((120,), "ctyx"), ((60,), "yxc")],
)
@pytest.mark.parametrize("given", ["both", "mean", "std", "neither"])
def test_folding_is_exact_in_fp64(shape: tuple[int, ...], k_order: str, given: str) -> None:
    weight = torch.randn(7, *shape, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    mean, std = (
        (MEAN if given in ("both", "mean") else None),
        (STD if given in ("both", "std") else None),
    )
    folded, offset = fold_normalization(weight, bias, mean, std, rescale=0.5, k_order=k_order)
    assert folded.shape == weight.shape
    x = torch.randn(11, math.prod(shape), dtype=torch.float64)
    channel = torch.arange(x.shape[1])
    channel = channel % 3 if k_order == "yxc" else channel // (x.shape[1] // 3)
    shift = torch.tensor(mean or (0,) * 3, dtype=torch.float64)[channel]
    scale = torch.tensor(std or (1,) * 3, dtype=torch.float64)[channel]
    exact = (x * 0.5 - shift) / scale @ weight.flatten(1).T + bias
    torch.testing.assert_close(x @ folded.flatten(1).T + offset, exact, rtol=1e-12, atol=1e-12)


def test_folding_carries_gradients() -> None:
    weight = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, b: fold_normalization(w, b, MEAN, STD), (weight, bias)
    )


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"mean": (0.5,) * 4}, ValueError, "which 4 channels"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "other than 0"),
        ({"mean": torch.zeros(3)}, TypeError, "sequence of Python numbers"),
        ({"k_order": "yxc"}, ValueError, "k_order is 'yxc'"),
        ({"k_order": "xyc"}, ValueError, "expected one of"),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape"),
        ({"dtype": torch.int32}, TypeError, "expected floating point"),
        ({"rescale": 0.0}, ValueError, "rescale"),
    ],
)
def test_folding_refuses(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"bias": None, "mean": MEAN, "std": STD, **keywords}
    with pytest.raises(error, match=message):
        fold_normalization(torch.randn(2, 3, 4, 4), **arguments)


# --- patchify ---


def test_patchify_is_that_of_siglip2(hf: ModuleType) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    image = torch.randn(3, 48, 80)
    ours = patchify(image[None], 16, k_order="yxc")[0]
    theirs = torch.from_numpy(convert_image_to_patches(image.numpy(), 16))
    assert torch.equal(ours, theirs)
    interleaved = patchify(
        image.movedim(0, -1).contiguous()[None], 16, layout="nhwc", k_order="yxc"
    )
    assert torch.equal(interleaved[0], theirs)


def test_patchify_is_that_of_fuyu(hf: ModuleType) -> None:
    processor = hf.models.fuyu.image_processing_pil_fuyu.FuyuImageProcessorPil()
    images = torch.randn(2, 3, 60, 90)
    theirs = torch.as_tensor(processor.patchify_image(images.numpy()))
    assert torch.equal(patchify(images, 30, k_order="yxc"), theirs)


def test_patchify_is_that_of_qwen2_vl(hf: ModuleType) -> None:
    processor = hf.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil()
    image = torch.randn(3, 56, 84)
    theirs, gh, gw = processor.patchify(image.numpy(), 14, 2, 2)
    ours = patchify(image[None], 14, k_order="ctyx", merge=2, temporal=2)
    assert (gh, gw) == (4, 6)
    assert torch.equal(ours[0], torch.from_numpy(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["uint8", "float", "uint8, no mean"])
def test_values_are_those_of_fp64_rounded(source: str, dtype: torch.dtype) -> None:
    images = pixels(2, 3, 37, 57) if "uint8" in source else torch.rand(2, 3, 37, 57)
    norm: dict[str, Any] = {} if "no" in source else {"mean": MEAN, "std": STD}
    ours = patchify(images, (7, 5), dtype=dtype, merge=2, **norm)
    exact = reference_patchify(images, (7, 5), dtype=torch.float64, merge=2, **norm)
    assert ours.is_contiguous()
    assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"k_order": "yxc", "pad_space": "normalised"},
        {"k_order": "yxc", "pad_space": "normalised", "merge": 2, "stride": (9, 11)},
        {"pad_space": "normalised", "stride": 3},
        {"temporal": 2, "k_order": "ctyx", "pad_space": "normalised", "merge": 2},
        {"temporal": 2, "k_order": "yxc"},
        {"stride": (5, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("video", [False, True])
def test_patchify_against_the_reference(options: dict[str, Any], layout: str, video: bool) -> None:
    frames = 2 * options.get("temporal", 1)
    images = pixels(2, frames, 3, 28, 37) if video else pixels(2, 3, 28, 37)
    images = images.movedim(-3, -1) if layout == "nhwc" else images
    options = {"layout": layout, "mean": MEAN, "std": STD, "dtype": torch.float64, **options}
    ours = patchify(images, (8, 10), **options)
    torch.testing.assert_close(
        ours, reference_patchify(images, (8, 10), **options), rtol=1e-14, atol=1e-14
    )


def test_patchify_leaves_its_input_alone_and_has_a_gradient() -> None:
    images = torch.rand(1, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    before = images.detach().clone()
    assert torch.autograd.gradcheck(
        lambda x: patchify(x, 4, mean=MEAN, std=STD, pad_space="normalised", dtype=torch.float64),
        (images,),
    )
    copy = patchify(images.detach(), (9, 8), dtype=torch.float64)
    assert torch.equal(images, before)
    assert copy.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("images", "keywords", "error", "message"),
    [
        (pixels(3, 8, 8), {}, ValueError, "4 or 5 D"),
        (pixels(1, 3, 8, 3), {}, ValueError, "smaller than a patch"),
        (pixels(1, 3, 8, 8).int(), {}, TypeError, "uint8 or floating"),
        (pixels(1, 3, 8, 8), {"mean": (0.5,)}, ValueError, "3 channels"),
        (pixels(1, 3, 8, 12), {"merge": 2}, ValueError, "merge = 2"),
        (pixels(1, 3, 3, 8, 8), {"temporal": 2}, ValueError, "multiple of temporal"),
        (pixels(1, 3, 8, 8), {"layout": "chw"}, ValueError, "patchify: layout"),
        (pixels(1, 3, 8, 8), {"dtype": torch.int8}, TypeError, "dtype"),
        (pixels(1, 3, 8, 8), {"stride": (1, 2, 3)}, ValueError, "patchify: stride"),
        (None, {}, TypeError, "expected a tensor"),
    ],
)
def test_patchify_refuses(
    images: Any, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        patchify(images, 4, **keywords)


# --- interpolate_pos_embed ---

GRIDS = [(5, 9), (16, 16), (23, 11), (1, 40), (31, 17)]


def exact_resize(table: Tensor, grid: tuple[int, int], prefix: int = 0, **options: Any) -> Tensor:
    """torch's own interpolate in fp64: the rows of a square table after its prefix."""
    side = math.isqrt(table.shape[0] - prefix)
    square = table[prefix:].double().reshape(1, side, side, -1).movedim(-1, 1)
    resized = F.interpolate(square, size=grid, **options).movedim(1, -1).flatten(0, 2)
    return torch.cat([table[:prefix].double(), resized])


def vit_like(hf: ModuleType, model: str) -> tuple[Any, str]:
    """A model's embeddings with a table of 16 x 16, and the name of its resizing method."""
    sizes: dict[str, Any] = {"hidden_size": E, "image_size": 64, "patch_size": 4}
    classes = {
        "vit": ("ViTConfig", "ViTEmbeddings"),
        "clip": ("CLIPVisionConfig", "CLIPVisionEmbeddings"),
        "siglip": ("SiglipVisionConfig", "SiglipVisionEmbeddings"),
        "dinov2": ("Dinov2Config", "Dinov2Embeddings"),
        "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersEmbeddings"),
        "blip_2": ("Blip2VisionConfig", "Blip2VisionEmbeddings"),
        "flava": ("FlavaImageConfig", "FlavaImageEmbeddings"),
        "owlvit": ("OwlViTVisionConfig", "OwlViTVisionEmbeddings"),
        "internvl": ("InternVLVisionConfig", "InternVLVisionEmbeddings"),
    }
    if model == "internvl":
        square = {name: [size] * 2 for name, size in sizes.items() if name != "hidden_size"}
        sizes = {**sizes, **square, "use_absolute_position_embeddings": True}
    module = getattr(hf.models, model)
    modeling = getattr(module, f"modeling_{model}")
    name, embeddings = classes[model]
    made = getattr(modeling, embeddings)(getattr(hf, name)(**sizes))
    return made, "interpolate_pos_encoding"


@pytest.mark.parametrize(
    ("model", "prefix", "antialias"),
    [
        ("vit", 1, False),
        ("clip", 1, False),
        ("siglip", 0, False),
        ("dinov2", 1, False),
        ("dinov2_with_registers", 1, True),
        ("blip_2", 1, False),
        ("flava", 1, False),
        ("owlvit", 1, False),
        ("internvl", 1, False),
    ],
)
@torch.no_grad()
def test_bicubic_models(hf: ModuleType, model: str, prefix: int, antialias: bool) -> None:
    embeddings, method = vit_like(hf, model)
    holder = next(
        getattr(embeddings, name)
        for name in ("position_embeddings", "position_embedding")
        if hasattr(embeddings, name)
    )
    table = getattr(holder, "weight", holder)
    table.copy_(torch.randn_like(table))
    for gh, gw in GRIDS:
        x = torch.zeros(1, prefix + gh * gw, E)
        theirs = getattr(embeddings, method)(x, 4 * gh, 4 * gw)[0]
        ours = interpolate_pos_embed(table, (gh, gw), antialias=antialias, prefix=prefix)
        exact = exact_resize(
            table.view(-1, E), (gh, gw), prefix, mode="bicubic", antialias=antialias
        )
        assert relative_error(theirs, exact) < 1e-5  # one convention
        assert_close(f"{model} {gh} x {gw}", ours, theirs, exact)
        assert torch.equal(ours[:prefix], table.view(-1, E)[:prefix])


def test_siglip2(hf: ModuleType) -> None:
    resize = hf.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings.resize_positional_embeddings
    table = torch.randn(256, E)
    theirs = resize(table.view(16, 16, E), torch.tensor(GRIDS), 600)
    ours = interpolate_pos_embed(table, GRIDS, mode="bilinear", antialias=True)
    counts = [gh * gw for gh, gw in GRIDS]
    for grid, mine, other in zip(GRIDS, ours.split(counts), theirs):
        exact = exact_resize(table, grid, mode="bilinear", antialias=True)
        assert relative_error(other[: len(mine)], exact) < 1e-5
        assert_close(str(grid), mine, other[: len(mine)], exact)


@pytest.mark.parametrize(
    ("mode", "align_corners", "merge"),
    [("bilinear", True, 2), ("bilinear", False, 1), ("bicubic", False, 1), ("bicubic", True, 2)],
)
def test_videos_in_merge_order(hf: ModuleType, mode: str, align_corners: bool, merge: int) -> None:
    """Qwen3-VL (bilinear, corners, blocks of 2 x 2) and Kimi (bicubic), over several grids."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights as taps

    grids = [(1, 4, 6), (3, 2, 22), (2, 16, 16), (1, 48, 30), (1, 2, 2)]
    table = torch.randn(256, E)
    indices, weights = taps(
        torch.tensor(grids), 16, mode=mode, align_corners=align_corners, spatial_merge_size=merge
    )
    theirs = (table[indices] * weights[..., None]).sum(1)
    ours = interpolate_pos_embed(table, grids, mode=mode, align_corners=align_corners, merge=merge)
    parts = []
    for t, gh, gw in grids:
        rows = exact_resize(table, (gh, gw), mode=mode, align_corners=align_corners)
        blocks = rows.view(gh // merge, merge, gw // merge, merge, E).transpose(1, 2)
        parts += [blocks.reshape(-1, E)] * t
    exact = torch.cat(parts)
    assert relative_error(theirs, exact) < 1e-5
    assert_close("rows", ours, theirs, exact)


@torch.no_grad()
def test_glm4v(hf: ModuleType) -> None:
    settings = hf.models.glm4v.configuration_glm4v.Glm4vVisionConfig(
        hidden_size=E, image_size=64, patch_size=4
    )
    embeddings = hf.models.glm4v.modeling_glm4v.Glm4vVisionEmbeddings(settings)
    table = embeddings.position_embedding.weight
    table.copy_(torch.randn_like(table))
    gh, gw = 10, 22
    at = torch.arange(gh * gw)
    theirs = embeddings(
        *(torch.zeros(gh * gw, E), [gh * gw], torch.tensor([[1, gh, gw]])),
        *(at // gw, at % gw),
    )
    exact = exact_resize(table, (gh, gw), mode="bicubic")
    assert relative_error(theirs, exact) < 1e-5
    assert_close("rows", interpolate_pos_embed(table, (gh, gw)), theirs, exact)


@pytest.mark.parametrize("antialias", [False, True])
def test_the_offset_of_dinov2(antialias: bool) -> None:
    """Its own code hands the scale (g + 0.1) / 16 to torch, which samples with it."""
    table = torch.randn(257, E)
    for gh, gw in GRIDS:
        scale = ((gh + 0.1) / 16, (gw + 0.1) / 16)
        square = table[1:].view(1, 16, 16, E).movedim(-1, 1)
        options: Any = {"scale_factor": scale, "mode": "bicubic", "antialias": antialias}
        exact, theirs = (
            F.interpolate(x, **options).movedim(1, -1).flatten(0, 2)
            for x in (square.double(), square)
        )
        ours = interpolate_pos_embed(table, (gh, gw), offset=0.1, prefix=1, antialias=antialias)
        if (gh, gw) == (16, 16):  # which its code does not resample
            assert torch.equal(ours, table)
            continue
        assert ours.shape == (1 + gh * gw, E)
        assert_close(f"{gh} x {gw}", ours[1:], theirs, exact)


@pytest.mark.parametrize("side", [8, 27, 70])
@torch.no_grad()
def test_idefics_positions(hf: ModuleType, side: int) -> None:
    """Row for row those of Idefics 2, in its arithmetic, whatever rounding does at a boundary."""
    modeling = hf.models.idefics2.modeling_idefics2
    settings = hf.models.idefics2.configuration_idefics2.Idefics2VisionConfig(
        hidden_size=1, image_size=side, patch_size=1
    )
    embeddings = modeling.Idefics2VisionEmbeddings(settings)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    table = torch.arange(side * side, dtype=torch.float32)[:, None]
    embeddings.position_embedding.weight.copy_(table)
    for n in range(1, 97, 1 if side == 8 else 5):
        grid = (n, 97 - n)
        theirs = embeddings(torch.zeros(1, 3, *grid), torch.ones(1, *grid, dtype=torch.bool))
        assert torch.equal(interpolate_pos_embed(table, grid, mode="nearest"), theirs[0])


def test_the_own_grid_is_a_copy_of_the_rows() -> None:
    table = torch.randn(1, 2 + 6 * 8, E).bfloat16()
    for options in ({}, {"mode": "bilinear", "antialias": True}):
        ours = interpolate_pos_embed(table, (6, 8), prefix=2, table_grid=(6, 8), **options)
        assert torch.equal(ours, table[0])
    half = interpolate_pos_embed(table, [(2, 3, 4), (6, 8)], prefix=2, table_grid=(6, 8))
    assert half.dtype == torch.bfloat16
    assert half.shape == (2 + 24 + 2 + 48, E)
    assert torch.equal(half[-50:], table[0])


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_positions_carry_gradients(mode: str) -> None:
    table = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: interpolate_pos_embed(x, [(4, 2), (2, 2), (4, 2)], mode=mode, prefix=1, merge=2),
        (table,),
    )


@pytest.mark.parametrize(
    ("grid", "keywords", "error", "message"),
    [
        ((4, 4), {"mode": "area"}, ValueError, "mode is 'area'"),
        ((4, 4), {"antialias": True, "align_corners": True}, ValueError, "do not go together"),
        ((4, 4), {"mode": "nearest", "antialias": True}, ValueError, "do not go together"),
        ((4, 4), {"prefix": 1}, ValueError, "expected a square"),
        ((4, 4), {"table_grid": (4, 5)}, ValueError, "expected 4 x 5"),
        ((4, 5), {"merge": 2}, ValueError, "merge = 2 divides"),
        ((4, 0), {}, ValueError, "positive"),
        ([(4, 4), (4,)], {}, ValueError, "positive"),
        (torch.tensor([4, 4]), {}, TypeError, "tolist"),
    ],
)
def test_positions_refuse(
    grid: Any, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        interpolate_pos_embed(torch.randn(16, 4), grid, **keywords)
