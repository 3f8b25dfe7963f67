"""`nn.ClipLoss` and `nn.SigLipLoss` against open_clip's own classes: values, gradients, calls."""

from __future__ import annotations

import importlib.util
import inspect
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_kernels import nn
from vlm_kernels.testing.specs.contrastive import Inputs, make_inputs
from vlm_kernels.testing.tolerances import SEEDS, assert_close, relative_error

NAMES = ("ClipLoss", "SigLipLoss")


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    """open_clip/loss.py alone: importing open_clip itself would need all that its models need."""
    try:
        distribution = metadata.distribution("open_clip_torch")
    except metadata.PackageNotFoundError:
        pytest.skip("needs open_clip: pip install --no-deps open_clip_torch")
    file = Path(str(distribution.locate_file("open_clip/loss.py")))
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: torch.nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The loss and the gradient of every input, in `dtype` or in the inputs' own dtypes."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    loss = module(*leaves)
    loss.backward()
    results = {"loss": loss.detach()}
    for name, leaf in zip(Inputs._fields, leaves, strict=True):
        if leaf is not None:
            assert leaf.grad is not None
            results[name] = leaf.grad
    return results


def make(seed: int, dtype: torch.dtype, scale: float, bias: float | None, shape: Any) -> Inputs:
    inputs = make_inputs(37, 37, 24, dtype, seed, scale=scale, bias=bias)
    bias_tensor = inputs.logit_bias
    return inputs._replace(
        logit_scale=inputs.logit_scale.reshape(shape),
        logit_bias=None if bias_tensor is None else bias_tensor.reshape(shape),
    )


@pytest.mark.parametrize(
    ("name", "scale", "bias"),
    [
        ("ClipLoss", 100.0, None),
        ("ClipLoss", 14.3, -2.0),
        ("SigLipLoss", 10.0, -10.0),
        ("SigLipLoss", 110.0, -16.5),
        ("SigLipLoss", 10.0, None),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, ()), (torch.float32, (1,)), (torch.bfloat16, ()), (torch.float16, ())],
    ids=["fp32", "fp32-shape1", "bf16", "fp16"],
)
def test_values_and_gradients(
    open_clip: ModuleType,
    name: str,
    scale: float,
    bias: float | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    theirs, ours = getattr(open_clip, name)(), getattr(nn, name)()
    seeds = [make(seed, dtype, scale, bias, shape) for seed in range(SEEDS)]
    peers = [(run(theirs, inputs, None), run(theirs, inputs, torch.float64)) for inputs in seeds]
    eager, exact = peers[0]
    result = run(ours, seeds[0], None)
    assert result["loss"].dtype == torch.float32
    for key, tensor in result.items():
        assert key == "loss" or tensor.dtype == eager[key].dtype
        assert tensor.shape == eager[key].shape
        errors = [relative_error(low[key], high[key]) for low, high in peers]
        assert_close(key, tensor, errors, exact[key], "fwd" if key == "loss" else "bwd")


@pytest.mark.parametrize("name", NAMES)
def test_same_constructor_and_call(open_clip: ModuleType, name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(open_clip, name)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters.values()
        actual = inspect.signature(getattr(ours, method)).parameters.values()
        shared = [(p.name, p.kind, p.default) for p in actual if p.name != "backend"]
        assert shared == [(p.name, p.kind, p.default) for p in expected]
    cache = ("labels", "prev_num_logits")
    for attribute, value in vars(theirs()).items():
        if not attribute.startswith("_") and attribute not in cache:
            assert getattr(ours(), attribute) == value
    assert not ours().state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_output_dict(name: str) -> None:
    inputs = make_inputs(5, 5, 8, bias=-10.0)
    loss = getattr(nn, name)()
    as_dict = loss(*inputs, output_dict=True)
    assert list(as_dict) == ["contrastive_loss"]
    assert torch.equal(as_dict["contrastive_loss"], loss(*inputs))
    assert torch.equal(loss(*inputs[:3], logit_bias=inputs.logit_bias), loss(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_more_than_one_process_names_the_way_out(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"coming `group=`.*open_clip's own {name}"):
        getattr(nn, name)(rank=1, world_size=2)


def test_unknown_dist_impl() -> None:
    with pytest.raises(ValueError, match="dist_impl='ring'; expected bidir, shift, reduce, gather"):
        nn.SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("name", NAMES)
def test_backend_is_passed_on(name: str) -> None:
    inputs = make_inputs(4, 4, 8, bias=-10.0)
    assert "backend='reference'" in repr(getattr(nn, name)(backend="reference"))
    with pytest.raises(ValueError, match="'fastest'"):
        getattr(nn, name)(backend="fastest")(*inputs)
