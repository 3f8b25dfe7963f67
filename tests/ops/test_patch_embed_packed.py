"""patch_embed_packed: each image as `patch_embed` has it alone, bit for bit; gradients; errors."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_kernels import attention_varlen, interpolate_pos_embed, patch_embed, patch_embed_packed
from vlm_kernels.testing.tolerances import assert_close

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(24, 36), (12, 12), (60, 24), (24, 36)]
E = 40
BACKENDS = ["reference"]
if importlib.util.find_spec("vlm_kernels._C") is not None:
    BACKENDS.append("cpu")


def image(height: int, width: int, *, frames: int = 0, nhwc: bool, dtype: torch.dtype) -> Tensor:
    shape = (height, width, 3) if nhwc else (3, height, width)
    shape = (frames, *shape) if frames else shape
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    return x if dtype == torch.uint8 else (x / 255).to(dtype)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="vlm_kernels._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge": 2, "k_order": "yxc"},
        {"temporal": 2, "merge": 2},
        {"temporal": 2, "frames": 4},
        {"stride": 4, "prefix": 2, "newline": True},
        {"prefix": 3, "own": True, "newline": True, "extra": 3},
        {"pad_space": "normalised", "extra": 3, "prefix": 1, "own": True},
    ],
    ids=str,
)
def test_each_image_is_bitwise_that_of_patch_embed(
    dtype: torch.dtype, source: torch.dtype, layout: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    frames, extra = options.pop("frames", 0), options.pop("extra", 0)
    own = options.pop("own", False)
    n, temporal = options.pop("prefix", 0), options.get("temporal", 1)
    images = [
        image(h + extra, w + extra, frames=frames, nhwc=layout == "nhwc", dtype=source)
        for h, w in SIZES
    ]
    weight = (torch.randn(E, temporal * 108) * 0.1).to(dtype)
    bias = torch.randn(E).to(dtype)
    prefix = torch.randn(len(images), n, E).to(dtype) if n else None
    newline = torch.randn(E).to(dtype) if options.pop("newline", False) else None
    shared = {"patch_size": 6, "layout": layout, "mean": MEAN, "std": STD, "backend": "cpu"}
    shared = {**shared, **options}

    def alone(i: int, pos: Tensor | None) -> Tensor:
        first = None if prefix is None else prefix[i]
        return patch_embed(
            *(images[i][None], weight, bias), pos=pos, prefix=first, newline=newline, **shared
        )[0]

    counts = [patch_embed(x[None], weight, **shared).shape[1] + (n if own else 0) for x in images]
    for pos in (None, torch.randn(sum(counts), E).to(dtype)):
        tokens, cu_seqlens = patch_embed_packed(
            *(images, weight, bias), pos=pos, prefix=prefix, newline=newline, **shared
        )
        rows = [None] * len(images) if pos is None else pos.split(counts)
        expected = [alone(i, each) for i, each in enumerate(rows)]
        assert tokens.dtype == dtype
        assert torch.equal(tokens, torch.cat(expected))
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.diff().tolist() == [len(each) for each in expected]
        assert cu_seqlens[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(backend: str, dtype: torch.dtype) -> None:
    """Of pixels, weight, bias, table, prefix and newline, against image by image in fp64."""
    sizes = [(24, 36), (12, 12), (18, 27)]
    images = [torch.randn(3, *size) for size in sizes]
    leaves = {
        **{f"image {i}": x for i, x in enumerate(images)},
        "weight": torch.randn(E, 3, 6, 6) * 0.1,
        **{"bias": torch.randn(E), "table": torch.randn(25 + 1, E)},
        **{"prefix": torch.randn(1, E), "newline": torch.randn(E)},
    }
    grids = [(-(-h // 6), -(-w // 6)) for h, w in sizes]
    mode = {"mode": "bilinear", "prefix": 1}

    def run(wide: torch.dtype, packed: bool) -> list[Tensor]:
        named = {name: x.to(dtype).to(wide).requires_grad_() for name, x in leaves.items()}
        pixels = [named[f"image {i}"] for i in range(3)]
        added = {"prefix": named["prefix"], "newline": named["newline"]}
        layer, table = (named["weight"], named["bias"]), named["table"]
        rest: dict[str, Any] = {"patch_size": 6, "mean": MEAN, "std": STD, **added}
        if packed:
            tokens = patch_embed_packed(
                pixels, *layer, pos_table=table, pos_mode=mode, backend=backend, **rest
            )[0]
        else:
            tokens = torch.cat(
                [
                    patch_embed(
                        *(x[None], *layer),
                        pos=interpolate_pos_embed(table, grid, **mode),
                        backend="reference",
                        **rest,
                    )[0]
                    for x, grid in zip(pixels, grids)
                ]
            )
        seed = torch.linspace(-1, 1, tokens.numel(), dtype=torch.float64).view(tokens.shape)
        return [tokens, *torch.autograd.grad(tokens, [*named.values()], seed.to(wide))]

    ours, eager, exact = run(dtype, True), run(dtype, False), run(torch.float64, False)
    for name, *three in zip(("tokens", *leaves), ours, eager, exact):
        assert_close(name, *three, "fwd" if name == "tokens" else "bwd")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="vlm_kernels._C is not built")
@pytest.mark.parametrize("strides", ["channels last", "cropped", "flipped axes"])
def test_images_in_place(strides: str) -> None:
    """The order of pixels in memory is that of the sums: it is kept."""
    images = [image(h, w, nhwc=strides == "channels last", dtype=torch.uint8) for h, w in SIZES]
    if strides == "channels last":
        images = [x.movedim(-1, 0) for x in images]
    elif strides == "cropped":
        images = [F.pad(x, (5, 3, 1, 7), value=9)[:, 1:-7, 5:-3] for x in images]
    else:
        images = [x.transpose(1, 2) for x in images]
    weight = torch.randn(E, 3, 6, 6) * 0.1
    options: dict[str, Any] = {"patch_size": 6, "mean": MEAN, "std": STD, "backend": "cpu"}
    tokens, _ = patch_embed_packed(images, weight, **options)
    alone = [patch_embed(x[None], weight, **options)[0] for x in images]
    assert torch.equal(tokens, torch.cat(alone))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="vlm_kernels._C is not built")
def test_compile_and_autocast() -> None:
    images = [image(h, w, nhwc=True, dtype=torch.uint8) for h, w in SIZES]
    weight, table, prefix = torch.randn(E, 108) * 0.1, torch.randn(26, E), torch.randn(1, E)

    def call(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return patch_embed_packed(
            *(images, weight),
            patch_size=6,
            layout="nhwc",
            pos_table=table,
            pos_mode={"mode": "bilinear", "prefix": 1},
            prefix=prefix,
            backend="cpu",
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(weight, table), call(weight, table)):
        assert torch.equal(mine, eager)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = call(weight, table)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, call(weight.bfloat16(), table)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_to_attention(backend: str) -> None:
    images = [image(h, w, nhwc=True, dtype=torch.uint8) for h, w in SIZES]
    tokens, cu_seqlens = patch_embed_packed(
        *(images, torch.randn(32, 108) * 0.1),
        patch_size=6,
        layout="nhwc",
        pos_table=torch.randn(64, 32),
        pos_mode={"mode": "bilinear", "antialias": True},
        backend=backend,
    )
    x = tokens.unflatten(1, (2, 16))
    y = attention_varlen(x, x, x, cu_seqlens, cu_seqlens)
    assert y.shape == x.shape
    assert y.isfinite().all()


def test_no_images() -> None:
    tokens, cu_seqlens = patch_embed_packed([], torch.randn(8, 108), patch_size=6)
    assert tokens.shape == (0, 8)
    assert cu_seqlens.tolist() == [0]


@pytest.mark.parametrize(
    ("images", "keywords", "error", "message"),
    [
        (torch.zeros(2, 3, 12, 12), {}, TypeError, "list of tensors"),
        ([torch.zeros(3, 12, 12), None], {}, TypeError, "list of tensors"),
        ([torch.zeros(1, 3, 12)], {}, ValueError, "smaller than a patch"),
        ([torch.zeros(12, 12)], {}, ValueError, "image 0"),
        ([torch.zeros(3, 12, 12), torch.zeros(3, 12, 12).half()], {}, ValueError, "image 1"),
        ([torch.zeros(3, 12, 12), torch.zeros(2, 3, 12, 12)], {}, ValueError, "image 1"),
        ([torch.zeros(3, 12, 18)], {"merge": 2}, ValueError, "merge = 2"),
        ([torch.zeros(3, 12, 12)], {"pos": torch.zeros(5, 8)}, ValueError, "expected 4 rows"),
        ([torch.zeros(3, 12, 12)], {"prefix": torch.zeros(8)}, ValueError, "prefix has shape"),
        ([torch.zeros(3, 12, 12)], {"prefix": torch.zeros(2, 1, 8)}, ValueError, "1 or 1"),
        (
            [torch.zeros(3, 12, 12)],
            {"newline": torch.zeros(8), "merge": 2},
            ValueError,
            "newline came",
        ),
        (
            [torch.zeros(3, 12, 12)],
            {"newline": torch.zeros(7)},
            ValueError,
            "newline has shape",
        ),
        (
            [torch.zeros(3, 12, 12)],
            {"pos": torch.zeros(4, 8), "pos_table": torch.zeros(4, 8)},
            ValueError,
            "one of them",
        ),
        ([torch.zeros(3, 12, 12)], {"layout": "hwc"}, ValueError, "patch_embed_packed: layout"),
    ],
)
def test_refusals(
    images: Any, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        patch_embed_packed(images, torch.randn(8, 108), patch_size=6, **keywords)
