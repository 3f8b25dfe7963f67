"""`PatchEmbed`, the stem of a vision transformer, with the parameters of the layer it replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._patches import Pair
from ..ops.patch_embed import patch_embed

_ORDERS = ("cyx", "yxc", "ctyx")


class PatchEmbed(nn.Module):
    """Pixels to tokens (Dosovitskiy et al., arXiv:2010.11929), normalisation included.

    `weight` and `bias` have the names and shapes of the layer that the model was published with:
    Conv2d's (E, C, Py, Px), Conv3d's (E, C, T, Py, Px) with k_order="ctyx", Linear's (E, K) with
    k_order="yxc". The `from_` constructors take over the very parameters of such a layer, so that
    state dicts, adapters and optimisers notice nothing.

    Args:
        in_channels: C.
        embed_dim: E.
        patch_size, stride, layout, k_order, mean, std, rescale, merge, temporal, pad_space,
            backend: as in `vlm_kernels.patch_embed`.
        bias: whether there is one.
        remainder: what becomes of pixels right of and below the last whole patch: "pad" completes
            the patch, "crop" drops them as a convolution does.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown k_order or remainder, or sizes below 1.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 768,
        *,
        patch_size: Pair,
        stride: Pair | None = None,
        bias: bool = True,
        layout: str = "nchw",
        k_order: str = "cyx",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        rescale: float = 1 / 255,
        merge: int = 1,
        temporal: int = 1,
        pad_space: str = "raw",
        remainder: str = "pad",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.stride = self.patch_size if stride is None else _pair(stride)
        if k_order not in _ORDERS:
            known = ", ".join(map(repr, _ORDERS))
            raise ValueError(f"PatchEmbed: k_order is {k_order!r}, expected one of {known}")
        if remainder not in ("pad", "crop"):
            raise ValueError(f"PatchEmbed: remainder is {remainder!r}, expected 'pad' or 'crop'")
        if min(in_channels, embed_dim, temporal, merge, *self.patch_size, *self.stride) < 1:
            raise ValueError(
                f"PatchEmbed: {in_channels} channels, embed_dim {embed_dim}, temporal {temporal}, "
                f"merge {merge}, patch_size {self.patch_size} and stride {self.stride}; expected "
                "numbers from 1 on"
            )
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.layout = layout
        self.k_order = k_order
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.rescale = rescale
        self.merge = merge
        self.temporal = temporal
        self.pad_space = pad_space
        self.remainder = remainder
        self.backend = backend
        columns: tuple[int, ...] = (in_channels, *self.patch_size)
        if k_order == "yxc":
            columns = (temporal * math.prod(columns),)
        elif k_order == "ctyx" or temporal > 1:
            columns = (in_channels, temporal, *self.patch_size)
        self.weight = nn.Parameter(torch.empty(embed_dim, *columns, device=device, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's convolutions and linear layers: uniform within 1 / sqrt(K)."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> PatchEmbed:
        """That of a Conv2d stem (ViT, CLIP, SigLIP, InternVL), on its parameters.

        Args:
            conv: groups and dilation 1, no padding; any stride.
            options: keywords of the constructor; by default remainder="crop", as the layer.

        Raises:
            TypeError: another layer, or one whose weight is no parameter of its own.
            ValueError: groups, dilation or padding.
        """
        return cls._from_conv(conv, nn.Conv2d, "cyx", **options)

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d, **options: Any) -> PatchEmbed:
        """That of a Conv3d stem (the Qwen-VL family), on its parameters; as `from_conv2d`.

        Frames do not overlap: the stride over time is the kernel's.
        """
        if isinstance(conv, nn.Conv3d) and conv.stride[0] != conv.kernel_size[0]:
            raise ValueError(
                f"PatchEmbed: the stride over time is {conv.stride[0]}, expected that of the "
                f"kernel, {conv.kernel_size[0]}"
            )
        return cls._from_conv(conv, nn.Conv3d, "ctyx", **options)

    @classmethod
    def _from_conv(cls, conv: Any, kind: type, k_order: str, **options: Any) -> PatchEmbed:
        _check_layer(conv, kind)
        ones = (1,) * len(conv.kernel_size)
        padding = () if conv.padding == "valid" else conv.padding
        for name, value, fits in (
            ("groups", conv.groups, conv.groups == 1),
            ("dilation", conv.dilation, conv.dilation == ones),
            ("padding", padding, padding != "same" and not any(padding)),
        ):
            if not fits:
                expected = "0" if name == "padding" else "1"
                raise ValueError(f"PatchEmbed: {name} is {value}, expected {expected}")
        options = {"k_order": k_order, "remainder": "crop", **options}
        depth = {"temporal": conv.kernel_size[0]} if len(ones) == 3 else {}
        size, stride = conv.kernel_size[-2:], conv.stride[-2:]
        return cls._of(conv, conv.in_channels, patch_size=size, stride=stride, **depth, **options)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, patch_size: Pair, *, in_channels: int = 3, **options: Any
    ) -> PatchEmbed:
        """That of a Linear stem over ready patches (SigLIP 2, Fuyu), on its parameters.

        Args:
            linear: of K = temporal * Py * Px * C features.
            patch_size: P or (Py, Px).
            in_channels: C.
            options: keywords of the constructor; by default k_order="yxc". A weight of two
                dimensions may have any order.

        Raises:
            TypeError, ValueError: another layer, or one of another number of features.
        """
        _check_layer(linear, nn.Linear)
        (py, px), temporal = _pair(patch_size), options.get("temporal", 1)
        if linear.in_features != temporal * py * px * in_channels:
            raise ValueError(
                f"PatchEmbed: the layer takes {linear.in_features} features, patches of "
                f"{temporal} x {py} x {px} pixels and {in_channels} channels have "
                f"{temporal * py * px * in_channels}"
            )
        options = {"k_order": "yxc", **options}
        return cls._of(linear, in_channels, patch_size=(py, px), **options)

    @classmethod
    def _of(cls, layer: Any, in_channels: int, **options: Any) -> PatchEmbed:
        made = cls(in_channels, layer.weight.shape[0], bias=False, device="meta", **options)
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(
        self,
        images: Tensor,
        pos: Tensor | None = None,
        prefix: Tensor | None = None,
        newline: Tensor | None = None,
    ) -> Tensor:
        """(B, L, E); arguments as in `vlm_kernels.patch_embed`."""
        return patch_embed(
            self._cropped(images) if self.remainder == "crop" else images,
            self.weight,
            self.bias,
            patch_size=self.patch_size,
            stride=self.stride,
            layout=self.layout,
            k_order=self.k_order,
            mean=self.mean,
            std=self.std,
            rescale=self.rescale,
            pos=pos,
            prefix=prefix,
            newline=newline,
            merge=self.merge,
            temporal=self.temporal,
            pad_space=self.pad_space,
            backend=self.backend,
        )

    def _cropped(self, images: Tensor) -> Tensor:
        """A view of the pixels that whole patches cover."""
        y, x = (-3, -2) if self.layout == "nhwc" else (-2, -1)
        if images.dim() < 4:
            return images  # the op says what is wrong
        for dim, size, step in zip((y, x), self.patch_size, self.stride):
            rest = (images.shape[dim] - size) % step if images.shape[dim] > size else 0
            images = images.narrow(dim, 0, images.shape[dim] - rest)
        return images

    def extra_repr(self) -> str:
        """What no submodule shows."""
        shown = f"{self.in_channels}, {self.embed_dim}, patch_size={self.patch_size}"
        for name, default in (
            *(("stride", self.patch_size), ("layout", "nchw"), ("k_order", "cyx"), ("mean", None)),
            *(("std", None), ("merge", 1), ("temporal", 1), ("remainder", "pad")),
        ):
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)!r}"
        return shown + f", bias={self.bias is not None}, backend={self.backend!r}"


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_layer(layer: Any, kind: Any) -> None:
    if not isinstance(layer, kind):
        raise TypeError(
            f"PatchEmbed: the layer is {type(layer).__name__}, expected {kind.__name__}"
        )
    if not isinstance(layer.weight, nn.Parameter):
        raise TypeError(
            "PatchEmbed: the layer's weight is no parameter of its own; remove or merge the "
            "parametrisation that computes it"
        )
