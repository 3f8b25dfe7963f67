"""`ClipLoss` and `SigLipLoss`, constructed and called as those of open_clip 3.3.0."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.contrastive import clip_loss, siglip_loss


def _check_world_size(name: str, world_size: int) -> None:
    if world_size > 1:
        raise NotImplementedError(
            f"{name}(world_size={world_size}): features are not gathered across processes before "
            f"the coming `group=` argument; use open_clip's own {name} meanwhile"
        )


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of CLIP (Radford et al. 2021, arXiv:2103.00020), without the N x N matrix.

    A drop-in for open_clip's `ClipLoss` on one process: same arguments, values and gradients, those
    of scale and bias included. The loss is fp32 whatever the dtype of the features. For ids,
    labels, weights, smoothing and metrics call `vlm_kernels.clip_loss`.

    Args:
        local_loss, gather_with_grad, rank, use_horovod: for more than one process; kept as
            attributes, without effect on one.
        cache_labels: kept as an attribute, without effect: no label tensor is made.
        world_size: number of processes; 1.
        backend: as in `vlm_kernels.clip_loss`.

    Raises:
        NotImplementedError: world_size > 1.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_world_size("ClipLoss", world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Mean loss over the batch, a tensor of shape ().

        Args:
            image_features: (N, D), normalised by the caller; fp32, bf16 or fp16.
            text_features: (N, D); row i is the positive of image i.
            logit_scale: the exponentiated scale, shape () or (1,), or a float.
            logit_bias: added to every logit, shape () or (1,), or a float.
            output_dict: return {"contrastive_loss": loss} instead of the loss.
        """
        loss = clip_loss(
            image_features, text_features, logit_scale, logit_bias, backend=self.backend
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """The argument that is not open_clip's."""
        return f"backend={self.backend!r}"


class SigLipLoss(nn.Module):
    """Sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343), without the N x N matrix.

    A drop-in for open_clip's `SigLipLoss` on one process: same arguments, values and gradients,
    those of scale and bias included. The loss is fp32 whatever the dtype of the features. For ids,
    labels, weights and metrics call `vlm_kernels.siglip_loss`.

    Args:
        cache_labels: kept as an attribute, without effect: no label tensor is made.
        rank: for more than one process; kept as an attribute.
        world_size: number of processes; 1.
        dist_impl: "bidir" (also None), "shift", "reduce" or "gather"; kept as an attribute.
        backend: as in `vlm_kernels.siglip_loss`.

    Raises:
        NotImplementedError: world_size > 1.
        ValueError: another dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_world_size("SigLipLoss", world_size)
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl and dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl={dist_impl!r}; expected {', '.join(known)}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Sum over all pairs divided by N, a tensor of shape ().

        Args:
            image_features: (N, D), normalised by the caller; fp32, bf16 or fp16.
            text_features: (N, D); row i is the positive of image i.
            logit_scale: the exponentiated scale, shape () or (1,), or a float.
            logit_bias: added to every logit, shape () or (1,), a float, or None for no bias.
            output_dict: return {"contrastive_loss": loss} instead of the loss.
        """
        loss = siglip_loss(
            image_features, text_features, logit_scale, logit_bias, backend=self.backend
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """The argument that is not open_clip's."""
        return f"backend={self.backend!r}"
