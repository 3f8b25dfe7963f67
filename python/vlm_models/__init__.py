"""The model layer: vision-language models built on vlm_kernels.

One short file a system, over shared parts: `blocks` (transformer, patch stem, text embeddings,
attention pooling) and `checkpoints` (names and files of published weights). It uses only the public
API of `vlm_kernels`, which never imports it: what a model needs and the public API lacks is a gap
in the API, not a reason to reach around it.
"""

from .clip import CLIP, CLIPConfig
from .siglip import SigLip, SigLipConfig
from .vit import ViT, ViTConfig
from .zero_shot import class_embeddings, classify

__all__ = [
    "CLIP",
    "CLIPConfig",
    "SigLip",
    "SigLipConfig",
    "ViT",
    "ViTConfig",
    "class_embeddings",
    "classify",
]
