"""The CUDA kernels of clip_loss and siglip_loss, emulated, against the rule of accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference
from vlm_kernels.ops import contrastive as op
from vlm_kernels.testing.specs import contrastive as spec
from vlm_kernels.testing.specs.contrastive import Case, Variant
from vlm_kernels.testing.tolerances import assert_close, relative_error

SHAPES = ((65, 129, 16), (1, 1, 8), (70, 130, 33), (64, 128, 64), (129, 31, 24))
BLOCKS = (450, 410, 8)  # several blocks in 1 MiB
ops = pytest.mark.parametrize("name", spec.OPS)
dtypes = pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _emulated(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """CPU tensors go to the emulated CUDA kernels, by the rules of CUDA tensors."""
    monkeypatch.setattr(op, "_C", extension)
    monkeypatch.setattr(op, "_kept_panels", lambda *_: 0)
    yield
    extension.set_contrastive_tiles("gemm")


def function(name: str, **keywords: Any) -> Callable[..., Any]:
    return partial(getattr(vlm_kernels, name), backend="cpu", **keywords)


def check(case: Case, **keywords: Any) -> dict[str, Tensor]:
    return spec.check(case, function(case.op, **keywords))


def variants() -> list[Case]:
    """Each choice of each keyword once; dtypes, shapes and scales take turns."""
    chosen = [v for name in spec.OPS for v in spec.covering_variants(name)]
    return [
        Case(*SHAPES[i % 5], spec.DTYPES[i % 3], variant, *spec.SCALES[i % 7])
        for i, variant in enumerate(chosen)
    ]


@pytest.mark.parametrize("case", variants(), ids=str)
def test_variants(case: Case) -> None:
    check(case)


@ops
@dtypes
@pytest.mark.parametrize("data", spec.DATA)
def test_scale_100(name: str, dtype: torch.dtype, data: str) -> None:
    """No row or column underflows, however far below its tile's largest entry it is."""
    check(Case(70, 90, 24, dtype, Variant(name), 100.0, None, data))


@ops
@pytest.mark.parametrize("shape", [(63, 127, 8), (64, 129, 1), (128, 65, 3), (1, 257, 5)], ids=str)
def test_tile_edges(name: str, shape: tuple[int, int, int]) -> None:
    check(Case(*shape, torch.float32, Variant(name), 14.3))


@ops
@dtypes
def test_blocks(name: str, dtype: torch.dtype) -> None:
    case = Case(*BLOCKS, dtype, Variant(name), 10.0, -10.0 if name == "siglip_loss" else None)
    first = check(case, workspace_mb=1)
    again = check(case, workspace_mb=1)
    assert all(torch.equal(first[key], again[key]) for key in first)  # bitwise
    check(case, workspace_mb=64)


@pytest.mark.parametrize("directions", spec.DIRECTIONS[1:])
@pytest.mark.parametrize("pairs", ["ids", "labels_dropped", "ignore_same_ids"])
def test_one_direction(directions: str, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass, its gradients formed in the forward, and in two."""
    variant = Variant("clip_loss", pairs, "both", 0.1, directions)
    for i, one_pass in enumerate((True, False)):
        monkeypatch.setattr(op, "_one_pass", lambda *_, answer=one_pass: answer)
        check(Case(97, 150, 16, spec.DTYPES[1 + i], variant))


def test_one_direction_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_one_pass", lambda *_: True)
    for directions in spec.DIRECTIONS[1:]:
        variant = Variant("clip_loss", directions=directions)
        check(Case(330, 1500, 4, torch.bfloat16, variant), workspace_mb=1)


@ops
@pytest.mark.parametrize("dtype", spec.DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(129, 140, 40), (257, 64, 128), (7, 300, 8)], ids=str)
def test_fused_tiles(extension: Any, name: str, dtype: torch.dtype, shape: Any) -> None:
    extension.set_contrastive_tiles("fused")
    first = check(Case(*shape, dtype, Variant(name, "ids")))
    again = check(Case(*shape, dtype, Variant(name, "ids")))
    assert all(torch.equal(first[key], again[key]) for key in first)


@ops
def test_fused_tiles_in_blocks(extension: Any, name: str) -> None:
    extension.set_contrastive_tiles("fused")
    check(Case(*BLOCKS, torch.bfloat16, Variant(name)), workspace_mb=1)


def test_rows_that_the_copies_cannot_take(extension: Any) -> None:
    extension.set_contrastive_tiles("fused")
    check(Case(65, 70, 33, torch.bfloat16))  # 66 bytes a row
    with pytest.raises(ValueError, match="'fused'"):
        extension.set_contrastive_tiles("other")


@ops
@pytest.mark.parametrize("tiles", ["gemm", "fused"])
@pytest.mark.parametrize("pairs", ["diagonal", "ids", "ignore_same_ids", "no_positive"])
def test_metrics(extension: Any, name: str, tiles: str, pairs: str) -> None:
    extension.set_contrastive_tiles(tiles)
    case = Case(70, 90, 16, torch.bfloat16, Variant(name, pairs), 14.3, 2.0)
    inputs, keywords = case.inputs(), case.keywords()
    keywords["return_metrics"] = True
    _, ours = function(name)(*inputs, **keywords)
    _, exact = getattr(reference, name)(*inputs.to(torch.float64), **keywords)
    _, eager = getattr(reference, name)(*inputs, **keywords)
    assert ours.keys() == exact.keys()
    for key, value in exact.items():
        error = relative_error(eager[key].double(), value.double())
        assert_close(key, ours[key], error, value.double(), terms=14.3)


@ops
@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (0, 0, 8)], ids=str)
def test_empty(name: str, shape: tuple[int, int, int]) -> None:
    check(Case(*shape, torch.float32, Variant(name)))
    image, text, scale, _ = Case(*shape, torch.float32).inputs()
    _, metrics = function(name)(image, text, scale, return_metrics=True)
    _, exact = getattr(reference, name)(image, text, scale, return_metrics=True)
    assert metrics == exact


@ops
@dtypes
def test_strided(name: str, dtype: torch.dtype) -> None:
    """Views with any row stride are read in place, and give what their copies give."""
    case = Case(66, 75, 24, dtype, Variant(name))
    inputs, keywords = case.inputs(), case.keywords()

    def wide(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]

    views = inputs._replace(
        image_features=wide(inputs.image_features), text_features=wide(inputs.text_features)
    )
    ours = spec.evaluate(function(name), views, keywords)
    for key, value in ours.items():
        spec.check_result(case, key, value)


@ops
def test_labels_that_are_no_column_count_as_none(name: str) -> None:
    image, text, scale, _ = Case(40, 30, 8).inputs()
    labels = torch.arange(40)
    dropped = torch.where(labels < 30, labels, -1)
    far = labels.where(labels < 30, labels * 2**40)
    results = [
        spec.evaluate(function(name), spec.Inputs(image, text, scale), {"labels": x})
        for x in (dropped, labels, far)
    ]
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@ops
def test_fp16_gradients_do_not_flush(name: str) -> None:
    """The smallest gradients of a large batch's mean are rounded once, from fp32."""
    for grad in (2.0**-6, 2.0**12):
        case = Case(300, 300, 8, torch.float16, Variant(name), 10.0, -10.0)
        spec.check(case, function(name), grad=grad)


@ops
def test_scale_and_bias_keep_shape_and_dtype(name: str) -> None:
    image, text, _, _ = Case(20, 20, 8).inputs()
    for dtype, shape in ((torch.bfloat16, ()), (torch.float64, (1,))):
        scale = torch.full(shape, 8.0, dtype=dtype, requires_grad=True)
        bias = torch.full(shape, -2.0, dtype=dtype, requires_grad=True)
        function(name)(image, text, scale, bias).backward()
        for x in (scale, bias):
            assert x.grad is not None
            assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    by_float = function(name)(image, text, 8.0, -2.0)
    by_tensor = function(name)(image, text, torch.tensor(8.0), torch.tensor(-2.0))
    assert torch.equal(by_float, by_tensor)


@ops
def test_locked_tower(name: str) -> None:
    image, text, scale, _ = Case(70, 80, 16, torch.bfloat16).inputs()
    both = spec.evaluate(function(name), spec.Inputs(image, text, scale), {})
    for locked, trained in ((image, text), (text, image)):
        trained.requires_grad_()
        [grad] = torch.autograd.grad(function(name)(image, text, scale), [trained])
        trained.requires_grad_(False)
        key = "text_features.grad" if trained is text else "image_features.grad"
        assert torch.equal(grad, both[key])
        assert not locked.requires_grad


@ops
def test_backward_twice(name: str) -> None:
    image, text, scale, _ = Case(33, 44, 8, torch.float16).inputs()
    leaves = [x.requires_grad_() for x in (image, text, scale)]
    loss = function(name)(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@ops
def test_nan_stays_nan(name: str) -> None:
    image, text, scale, _ = Case(70, 140, 8).inputs()
    image[69, 3] = torch.nan
    assert function(name)(image, text, scale).isnan()
