"""Handwritten digits (bundled with scikit-learn, nothing is downloaded) and captions for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a photo of the number {}",
    "a handwritten {}",
    "handwritten digit {}",
    "the number {} written by hand",
    "a small grey picture of a {}",
    "somebody wrote a {}",
    "{}",
)
IMAGE_SIZE = 16  # drawn at twice their 8x8 so that turning and shifting them keeps detail
MEAN, STD = 0.3, 0.38  # of the pixels in [0, 1]


NAMES = [(word, str(digit)) for digit, word in enumerate(WORDS)]


def captions_of(digit: int) -> list[str]:
    """Every caption of a digit: each template with "seven" and with "7"."""
    return [template.format(name) for template in TEMPLATES for name in NAMES[digit]]


class Tokenizer:
    """One token a word, then the one of the highest id, which ends a caption; 0 is padding."""

    def __init__(self) -> None:
        captions = [caption.split() for digit in range(10) for caption in captions_of(digit)]
        words = sorted({word for caption in captions for word in caption})
        self.token_of = {word: token for token, word in enumerate(words, start=1)}
        self.end = len(words) + 1
        self.vocab_size = self.end + 1
        self.context_length = max(len(caption) for caption in captions) + 1

    def __call__(self, captions: list[str]) -> Tensor:
        """Captions -> token ids (N, context_length), int64."""
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(tokens, captions):
            ids = [*(self.token_of[word] for word in caption.split()), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (1437, 1, 8, 8) in [0, 1], their digits (1437,), and 360 held-out ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=360, stratify=digits.target, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def preprocess(images: Tensor, affine: Tensor | None = None) -> Tensor:
    """(N, 1, 8, 8) in [0, 1] -> uint8 (N, 1, 16, 16); `affine` (N, 2, 3) moves each image."""
    if affine is None:
        affine = torch.eye(2, 3).expand(len(images), 2, 3)
    size = [len(images), 1, IMAGE_SIZE, IMAGE_SIZE]
    grid = F.affine_grid(affine, size, align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False) * 255).round().to(torch.uint8)


def random_affine(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2, 3): turn by up to 12 degrees, scale by up to 12 %, shift by up to a pixel of 8."""
    turn, scale, dx, dy = torch.rand(4, count, generator=generator) * 2 - 1
    angle, zoom = turn * math.radians(12), 1 + 0.12 * scale
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    top, bottom = torch.stack([cos, -sin, dx / 4]), torch.stack([sin, cos, dy / 4])
    return torch.stack([top, bottom]).permute(2, 0, 1)


def batches(
    images: Tensor, labels: Tensor, tokenizer: Tokenizer, *, steps: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields `steps` pairs: uint8 images (batch, 1, 16, 16), and tokens of a caption of each."""
    if batch > len(images):
        raise ValueError(f"a batch of {batch} does not fit: there are {len(images)} images")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([tokenizer(captions_of(digit)) for digit in range(10)])  # (10, C, L)
    for _ in range(steps):
        index = torch.randperm(len(images), generator=generator)[:batch]
        caption = torch.randint(tokens.shape[1], index.shape, generator=generator)
        moved = preprocess(images[index], random_affine(len(index), generator))
        yield moved, tokens[labels[index], caption]
