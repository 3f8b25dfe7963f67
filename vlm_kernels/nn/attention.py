"""`Attention`, the attention layer of a ViT or a decoder, with the parameters of timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.attention import Rope, Window, attention

_NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., arXiv:1706.03762) with its projections.

    Loads the state dict of timm's `Attention` (qkv.weight, qkv.bias, q_norm.weight, q_norm.bias,
    k_norm.weight, k_norm.bias, proj.weight, proj.bias). One projection makes queries, keys and
    values, which are read where it leaves them; heads are normalised and rotated as they are read.

    Args:
        dim: features of the input and the output.
        num_heads: heads of the queries, H.
        num_kv_heads: heads of keys and values; H is a multiple of it (default H).
        head_dim: features of a head (default dim / H).
        qkv_bias: whether the first projection has a bias.
        qk_norm: "rms" or "layer" normalises the queries and keys of each head; None does not.
        norm_eps: epsilon of that normalisation.
        proj_bias: whether the output projection has a bias.
        is_causal: token i sees the tokens up to i.
        backend: as in `vlm_kernels.attention`.

    Raises:
        ValueError: sizes that do not fit together, or an unknown qk_norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        proj_bias: bool = True,
        is_causal: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(
                f"Attention: dim {dim} is no multiple of num_heads {num_heads}; pass head_dim"
            )
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"Attention: num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}"
            )
        if qk_norm is not None and qk_norm not in _NORMS:
            known = ", ".join(map(repr, _NORMS))
            raise ValueError(f"Attention: qk_norm is {qk_norm!r}, expected None, {known}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.qk_norm = qk_norm
        self.is_causal = is_causal
        self.backend = backend
        width = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, width + 2 * num_kv_heads * self.head_dim, bias=qkv_bias)
        norm: Any = nn.Identity if qk_norm is None else _NORMS[qk_norm]
        self.q_norm = norm(self.head_dim, eps=norm_eps)
        self.k_norm = norm(self.head_dim, eps=norm_eps)
        self.proj = nn.Linear(width, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        window: Window | None = None,
        kv_range: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """(B, N, dim).

        Args:
            x: (B, N, dim), the tokens that ask.
            context: (B, M, dim), the tokens that are looked at; default x.
            attn_mask, window, kv_range, rope: as in `vlm_kernels.attention`, with N queries and M
                keys.
        """
        query, key, value = self._project(x, x if context is None else context)
        y = attention(
            query,
            key,
            value,
            attn_mask,
            0.0,
            self.is_causal,
            enable_gqa=True,
            window=window,
            kv_range=kv_range,
            rope=rope,
            q_norm=self._norm(self.q_norm),
            k_norm=self._norm(self.k_norm),
            backend=self.backend,
        )
        return self.proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, D): views of the projections."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if context is x:
            parts = self.qkv(x).unflatten(-1, (sum(heads), self.head_dim)).split(heads, 2)
        else:
            width = self.num_heads * self.head_dim
            q_bias, kv_bias = (
                (None, None)
                if self.qkv.bias is None
                else (
                    self.qkv.bias[:width],
                    self.qkv.bias[width:],
                )
            )
            query = nn.functional.linear(x, self.qkv.weight[:width], q_bias)
            both = nn.functional.linear(context, self.qkv.weight[width:], kv_bias)
            parts = (
                query.unflatten(-1, (self.num_heads, self.head_dim)),
                *both.unflatten(-1, (2 * self.num_kv_heads, self.head_dim)).chunk(2, 2),
            )
        query, key, value = (part.transpose(1, 2) for part in parts)
        return query, key, value

    def _norm(self, norm: nn.Module) -> tuple[Tensor, Tensor | None, float, str] | None:
        if self.qk_norm is None:
            return None
        return norm.weight, getattr(norm, "bias", None), norm.eps, self.qk_norm  # type: ignore

    def extra_repr(self) -> str:
        """What no submodule shows."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"is_causal={self.is_causal}, backend={self.backend!r}"
        )
