"""`nn.Attention` against the formula of timm's `Attention`: values, gradients, parameters."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_kernels
from vlm_kernels.testing.tolerances import SEEDS, assert_close, relative_error

B, N, M, DIM, HEADS, HEAD_DIM = 2, 19, 23, 48, 4, 12
DTYPES = [torch.float32, torch.bfloat16]
needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vlm_kernels._C") is None, reason="vlm_kernels._C is not built"
)

Parameters = dict[str, Tensor]


def timm_attention(
    parameters: Parameters,
    x: Tensor,
    context: Tensor | None,
    kv_heads: int,
    qk_norm: str | None,
    **keywords: Any,
) -> Tensor:
    """As timm's layer: F.linear, norms, scaled_dot_product_attention, F.linear."""
    width, kv_width = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    weights = parameters["qkv.weight"].split((width, kv_width, kv_width))
    biases: Any = (None,) * 3
    if "qkv.bias" in parameters:
        biases = parameters["qkv.bias"].split((width, kv_width, kv_width))
    context = x if context is None else context
    q, k, v = (
        F.linear(tokens, weight, bias).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for tokens, weight, bias in zip((x, context, context), weights, biases, strict=True)
    )
    if qk_norm == "rms":
        q = F.rms_norm(q, (HEAD_DIM,), parameters["q_norm.weight"], 1e-6)
        k = F.rms_norm(k, (HEAD_DIM,), parameters["k_norm.weight"], 1e-6)
    elif qk_norm == "layer":
        q, k = (
            F.layer_norm(
                t, (HEAD_DIM,), parameters[f"{n}.weight"], parameters[f"{n}.bias"], eps=1e-6
            )
            for t, n in ((q, "q_norm"), (k, "k_norm"))
        )
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != HEADS, **keywords)
    return F.linear(
        y.transpose(1, 2).flatten(2), parameters["proj.weight"], parameters["proj.bias"]
    )


def drawn(module: torch.nn.Module, seed: int, dtype: torch.dtype) -> Parameters:
    """Parameters about 1 in effect, so that softmaxes are not flat."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, like in module.state_dict().items():
        x = torch.randn(like.shape, generator=generator)
        x = 1 + 0.3 * x if "norm.weight" in name else x / like.shape[-1] ** 0.5
        parameters[name] = x.to(dtype)
    for name, rows in (("x", N), ("context", M)):
        parameters[name] = torch.randn(B, rows, DIM, generator=generator).to(dtype)
    return parameters


def evaluate(fn: Any, leaves: Parameters, dtype: torch.dtype, cross: bool) -> dict[str, Tensor]:
    """out and the gradient of every leaf."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    if not cross:
        del leaves["context"]
    parameters = {k: t for k, t in leaves.items() if k not in ("x", "context")}
    out = fn(parameters, leaves["x"], leaves.get("context"))
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"{k}.grad": g for k, g in zip(leaves, grads, strict=True)}}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "rms": {"qk_norm": "rms"},
    "layer": {"qk_norm": "layer", "qkv_bias": True},
    "gqa": {"num_kv_heads": 2, "qk_norm": "rms"},
    "causal": {"is_causal": True},
}


@needs_cpu
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant: str, dtype: torch.dtype, cross: bool) -> None:
    options = VARIANTS[variant]
    module = vlm_kernels.nn.Attention(DIM, HEADS, backend="cpu", **options).to(dtype)

    def peer(parameters: Parameters, x: Tensor, context: Tensor | None) -> Tensor:
        kv_heads, causal = options.get("num_kv_heads", HEADS), options.get("is_causal", False)
        norm = options.get("qk_norm")
        return timm_attention(parameters, x, context, kv_heads, norm, is_causal=causal)

    def ours(parameters: Parameters, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, context), strict=True)

    @cache
    def peers(seed: int) -> list[dict[str, Tensor]]:
        leaves = drawn(module, seed, dtype)
        return [evaluate(peer, leaves, each, cross) for each in (dtype, torch.float64)]

    exact = peers(0)[1]
    for name, value in evaluate(ours, drawn(module, 0, dtype), dtype, cross).items():
        kind = "bwd" if name.endswith(".grad") else "fwd"
        errors = (relative_error(*(each[name] for each in peers(seed))) for seed in range(SEEDS))
        assert_close(name, value, errors, exact[name], kind)


@needs_cpu
def test_masks_and_rotation_reach_the_op() -> None:
    module = vlm_kernels.nn.Attention(DIM, HEADS)
    x, angle = torch.randn(B, N, DIM), torch.rand(N, HEAD_DIM // 2)
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    allowed = torch.rand(B, 1, N, N) < 0.7
    keywords: dict[str, Any] = {
        "window": (4, 5),
        "kv_range": torch.tensor([2, N], dtype=torch.int32).expand(1, 1, N, 2),
        "rope": (angle.cos(), angle.sin(), "interleaved"),
    }
    y = vlm_kernels.attention(q, k, v, allowed, **keywords)
    wanted = module.proj(y.transpose(1, 2).reshape(B, N, DIM))
    assert torch.equal(module(x, None, allowed, **keywords), wanted)


def test_the_output_needs_no_copy_before_the_projection() -> None:
    """Queries, keys and values are views of one projection, and so is the output of its rows."""
    module = vlm_kernels.nn.Attention(DIM, HEADS, qk_norm="rms")
    q, k, v = module._project(x := torch.randn(B, N, DIM), x)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    if importlib.util.find_spec("vlm_kernels._C") is not None:
        assert vlm_kernels.attention(q, k, v).transpose(1, 2).is_contiguous()


def test_parameters_are_those_of_timm() -> None:
    module = vlm_kernels.nn.Attention(DIM, HEADS, qkv_bias=True, qk_norm="layer")
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "qkv.weight": (3 * DIM, DIM),
        "qkv.bias": (3 * DIM,),
        "q_norm.weight": (HEAD_DIM,),
        "q_norm.bias": (HEAD_DIM,),
        "k_norm.weight": (HEAD_DIM,),
        "k_norm.bias": (HEAD_DIM,),
        "proj.weight": (DIM, DIM),
        "proj.bias": (DIM,),
    }
    plain = vlm_kernels.nn.Attention(DIM, HEADS, proj_bias=False)
    assert sorted(plain.state_dict()) == ["proj.weight", "qkv.weight"]


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm: pip install timm")
@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_state_dict_of_timm(qk_norm: str | None) -> None:
    from timm.layers import Attention

    peer = Attention(DIM, HEADS, qkv_bias=True, qk_norm=qk_norm is not None)
    module = vlm_kernels.nn.Attention(DIM, HEADS, qkv_bias=True, qk_norm=qk_norm, norm_eps=1e-5)
    module.load_state_dict(peer.state_dict())
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    exact = peer.double()(x)
    with torch.no_grad():
        assert_close("out", module(x.float()), peer.float()(x.float()), exact)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "no multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "no multiple of num_kv_heads 3"),
        ({"qk_norm": "l2"}, "'l2', expected None, 'rms'"),
    ],
)
def test_bad_constructor(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vlm_kernels.nn.Attention(**{"dim": DIM, "num_heads": HEADS, **options})


def test_repr() -> None:
    assert "num_heads=4, num_kv_heads=2" in repr(vlm_kernels.nn.Attention(48, 4, num_kv_heads=2))
