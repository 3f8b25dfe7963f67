"""The flash-attn-shaped functions against SDPA with the mask that flash-attn documents."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_kernels.integrations import flash_attn
from vlm_kernels.testing.tolerances import assert_close

H, HKV, D, DV = 4, 2, 8, 12


def masked(nq: int, nk: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Keys [i + nk - nq - left, i + nk - nq + right], inclusive; causal is right = 0."""
    distance = torch.arange(nk) - (torch.arange(nq)[:, None] + nk - nq)
    left, right = window
    visible = torch.ones(nq, nk, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if causal or right >= 0:
        visible &= distance <= (0 if causal else right)
    return visible


def peer(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """SDPA of (B, N, H, D); rows that see nothing are 0."""
    heads = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible | ~visible.any(-1, keepdim=True),
        scale=scale,
        enable_gqa=True,
    )
    return (heads * visible.any(-1, keepdim=True)).transpose(1, 2)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def doubles(*inputs: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def compare(ours: Any, expected: Any, inputs: list[Tensor]) -> None:
    """Outputs and gradients of two functions of the same tensors, the second at two precisions."""
    exact_inputs = doubles(*inputs)
    results = []
    for function, arguments in ((ours, inputs), (expected, inputs), (expected, exact_inputs)):
        out = function(*arguments)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), arguments)
        results.append((out.detach(), *gradients))
    for index, (mine, eager, exact) in enumerate(zip(*results)):
        name, kind = ("out", "fwd") if index == 0 else (f"gradient {index - 1}", "bwd")
        assert_close(name, mine, eager, exact, kind)


@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (2, 1), (-1, 2), (1, -1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("nq", "nk"), [(9, 9), (5, 9), (9, 5), (1, 7)])
def test_func(nq: int, nk: int, causal: bool, window: tuple[int, int]) -> None:
    inputs = tensors((2, nq, H, D), (2, nk, HKV, D), (2, nk, HKV, DV))
    visible = masked(nq, nk, causal, window)
    compare(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, causal, window),
        lambda q, k, v: peer(q, k, v, visible, 0.3),
        inputs,
    )


def test_softcap() -> None:
    inputs = [8 * x.detach() for x in tensors((2, 9, H, D), (2, 9, H, D))]
    inputs = [x.requires_grad_() for x in (*inputs, torch.randn(2, 9, H, DV))]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = 5 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5 / 5)
        scores = scores.masked_fill(~masked(9, 9, True, (-1, -1)), float("-inf"))
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    compare(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, softcap=5.0),
        formula,
        inputs,
    )


LENGTHS = [(4, 6), (0, 3), (5, 5), (7, 2)]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1))]
)
def test_varlen(causal: bool, window: tuple[int, int]) -> None:
    queries, keys = ([pair[i] for pair in LENGTHS] for i in (0, 1))
    inputs = tensors((16, H, D), (16, HKV, D), (16, HKV, DV))

    def segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(queries), k.split(keys), v.split(keys), LENGTHS)
        return torch.cat(
            [
                peer(a[None], b[None], c[None], masked(*n, causal, window), None)[0]
                for a, b, c, n in parts
            ]
        )

    compare(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q, k, v, starts(queries), starts(keys), 7, 6, causal=causal, window_size=window
        ),
        segments,
        inputs,
    )


def test_qkvpacked() -> None:
    visible = masked(9, 9, True, (-1, -1))
    compare(
        lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True),
        lambda qkv: peer(*qkv.unbind(2), visible, None),
        tensors((2, 9, 3, H, D)),
    )


def test_varlen_qkvpacked() -> None:
    lengths = [3, 6]
    compare(
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts(lengths), 6),
        lambda qkv: torch.cat(
            [
                peer(*part[None].unbind(2), masked(n, n, False, (-1, -1)), None)[0]
                for part, n in zip(qkv.split(lengths), lengths)
            ]
        ),
        tensors((9, 3, H, D)),
    )


def test_log_sum_exp() -> None:
    q, k, v = (x.detach() for x in tensors((2, 5, H, D), (2, 9, H, D), (2, 9, H, DV)))

    def lse(q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
        return scores.masked_fill(~masked(5, 9, True, (-1, -1)), float("-inf")).logsumexp(-1)

    out, ours, probabilities = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=0.5, causal=True, return_attn_probs=True
    )
    assert out.shape == (2, 5, H, DV)
    assert probabilities is None
    assert_close("lse", ours, lse(q, k), lse(q.double(), k.double()))
    out, ours, probabilities = flash_attn.flash_attn_varlen_func(
        q[0],
        k[0],
        v[0],
        starts([5]),
        starts([9]),
        softmax_scale=0.5,
        causal=True,
        return_attn_probs=True,
    )
    assert out.shape == (5, H, DV)
    assert probabilities is None
    assert_close("lse", ours, lse(q, k)[0], lse(q.double(), k.double())[0])


TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
TAIL += ["deterministic", "return_attn_probs"]
LENGTH = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("flash_attn_func", ["q", "k", "v", *TAIL]),
        ("flash_attn_qkvpacked_func", ["qkv", *TAIL]),
        ("flash_attn_varlen_func", ["q", "k", "v", *LENGTH, *TAIL, "block_table"]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen", *TAIL]),
    ],
)
def test_arguments_are_those_of_flash_attn(name: str, parameters: list[str]) -> None:
    """In the order of flash-attn 2.8, as code that passes them by position needs."""
    assert list(inspect.signature(getattr(flash_attn, name)).parameters) == parameters
    assert name in flash_attn.__all__


def test_errors() -> None:
    q = torch.randn(1, 4, H, D)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1, expected 0"):
        flash_attn.flash_attn_func(q, q, q, 0.1)
    with pytest.raises(ValueError, match=r"alibi_slopes came, expected None"):
        flash_attn.flash_attn_qkvpacked_func(torch.stack((q, q, q), 2), alibi_slopes=q[0, 0, :, 0])
    ends = starts([4])
    with pytest.raises(ValueError, match="block_table came, expected None"):
        flash_attn.flash_attn_varlen_func(
            q[0], q[0], q[0], ends, ends, 4, 4, block_table=torch.zeros(1, 1)
        )
