"""Zero-shot classification: a class is the mean of its captions (arXiv:2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}.",)


def class_embeddings(
    encode_text: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    names: Sequence[str | Sequence[str]],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """One vector a class: its captions, embedded, normalised, averaged, normalised again.

    Args:
        encode_text: token ids (N, L) -> (N, D), such as `CLIP.encode_text`.
        tokenize: captions -> token ids (N, L).
        names: of C classes; one may have several, as ("seven", "7").
        templates: captions with {} in place of the name, used for every class.

    Returns:
        (C, D), of norm 1.

    Raises:
        ValueError: no names, no templates, or a template without {}.
    """
    bad = [template for template in templates if "{}" not in template]
    if not names or not templates or bad:
        raise ValueError(
            f"class_embeddings: {len(names)} names and {len(templates)} templates"
            + (f", of which {bad[0]!r} has no {{}} for the name" if bad else ", expected some")
        )
    rows = []
    for name in names:
        synonyms = [name] if isinstance(name, str) else name
        captions = [template.format(word) for template in templates for word in synonyms]
        rows.append(F.normalize(encode_text(tokenize(captions)), dim=-1).mean(dim=0))
    return F.normalize(torch.stack(rows), dim=-1)


def classify(image_features: Tensor, classes: Tensor) -> Tensor:
    """The class nearest to each image: (N, D) and (C, D), both of norm 1 -> (N,) int64."""
    return (image_features @ classes.mT).argmax(dim=-1)
