"""Both losses in plain PyTorch (open_clip's formulas), and vlm_kernels' drop-ins for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_kernels.nn import ClipLoss, SigLipLoss

Loss = Callable[..., Tensor]  # image features, text features, logit scale, logit bias -> ()


def similarity(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * image @ text.T  # (N, N): what vlm_kernels never holds
    if bias is not None:
        logits += bias
    return logits


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of each image over the texts and of each text over the images, halved."""
    logits = similarity(image, text, scale, bias)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Every pair is a yes-no question: yes (+1) on the diagonal, no (-1) elsewhere."""
    logits = similarity(image, text, scale, bias)
    sign = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


PLAIN: dict[str, Loss] = {"clip": clip_loss, "siglip": siglip_loss}
OURS: dict[str, Loss] = {"clip": ClipLoss(), "siglip": SigLipLoss()}
