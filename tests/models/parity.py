"""A model of ours against transformers' own: outputs, and the gradient of every parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_kernels.testing.tolerances import MODELS, relative_error
from vlm_models.checkpoints import Pretrained, convert

Outputs = dict[str, Tensor]


def randomised(peer: Any) -> Any:
    """Weights large enough for every part to matter; nothing is 0 or 1 as it is to begin with."""
    for name, parameter in peer.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return peer.eval()


def assert_same(
    ours: Pretrained,
    peer: Any,
    run_ours: Callable[[Any], Outputs],
    run_peer: Callable[[Any, torch.dtype], Outputs],
) -> None:
    """Holds `ours` in fp32 to `peer`, which runs in fp64.

    Args:
        run_ours: the model -> its outputs.
        run_peer: transformers' model and its dtype -> the same outputs.
    """
    exact_peer = copy.deepcopy(peer).double()
    exact_peer.set_attn_implementation("sdpa")  # eager computes its softmax in fp32
    mine, exact = run_ours(ours), run_peer(exact_peer, torch.float64)
    assert mine.keys() == exact.keys()
    for name, expected in exact.items():
        error = relative_error(mine[name], expected)
        assert error <= MODELS["fwd"], f"{name}: {error:.1e}"

    objective(mine).backward()
    objective(exact).backward()
    gradients = {n: p.grad for n, p in exact_peer.named_parameters() if p.grad is not None}
    parameters = dict(ours.named_parameters())
    found = convert(ours.NAMES, parameters, gradients, ours.PREFIXES)
    assert not found.missing
    assert not found.unexpected
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        error = relative_error(parameter.grad, found.tensors[name].reshape(parameter.shape))
        assert error <= MODELS["bwd"], f"gradient of {name}: {error:.1e}"


def objective(outputs: Outputs) -> Tensor:
    """One number that depends on every element of every output."""
    total: Any = 0.0
    for x in outputs.values():
        total = total + (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum()
    return total


def published(peer: Any, folder: Path) -> Path:
    """A checkpoint as transformers writes it, which is under the names of version 4."""
    peer.save_pretrained(folder)
    return folder


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What an image processor makes of uint8 (B, C, H, W), in fp64."""
    shape = (1, -1, 1, 1)
    pixels = images.double() / 255
    return (pixels - torch.tensor(mean).double().view(shape)) / torch.tensor(std).double().view(
        shape
    )
