"""One training run, and zero-shot classification with what it learned."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from vlm_models import class_embeddings, classify

from .data import NAMES, TEMPLATES, Tokenizer, captions_of, preprocess
from .losses import Loss
from .measure import Cost, peak_rss, reset_peak_rss

LEARNING_RATE = 3e-3


class Training:
    """A model, the loss it is trained with, and what was measured on the way."""

    def __init__(
        self, name: str, model: nn.Module, loss: Loss, steps: int, max_norm: float
    ) -> None:
        self.name, self.model, self.loss = name, model, loss
        self.max_norm = max_norm  # of the gradient of all parameters; longer ones are cut to it
        self.optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, steps, pct_start=0.2, cycle_momentum=False
        )
        self.curve: list[float] = []  # the loss of each step
        self.seconds: list[float] = []  # the time of each step
        self.peak_bytes = 0.0  # of the whole process, while it made a step of this run
        self.large: Cost | str = "left out (--no-large)"  # of the loss alone, or why it is missing

    def step(self, images: Tensor, tokens: Tensor) -> None:
        reset_peak_rss()
        start = time.perf_counter()
        loss = self.loss(*self.model(images, tokens))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.peak_bytes = max(self.peak_bytes, peak_rss())
        self.curve.append(loss.item())

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @torch.inference_mode()
    def evaluate(self, tokenizer: Tokenizer, images: Tensor, labels: Tensor) -> None:
        """Zero-shot: the digit whose captions, embedded and averaged, are nearest to the image."""
        self.model.eval()
        model: Any = self.model
        classes = class_embeddings(model.encode_text, tokenizer, NAMES, TEMPLATES)  # (10, E)
        text = model.encode_text(tokenizer([c for d in range(10) for c in captions_of(d)]))
        image = model.encode_image(preprocess(images))  # (N, E)
        self.predictions = classify(image, classes)  # (N,)
        self.accuracy = (self.predictions == labels).double().mean().item()
        self.similarity = image @ text.T  # (N, captions), those of one digit together
