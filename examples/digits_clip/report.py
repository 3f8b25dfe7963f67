"""What is printed and drawn at the end."""

from __future__ import annotations

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from .data import captions_of
from .measure import LARGE_DIM, LARGE_N, Cost
from .training import Training

matplotlib.use("Agg")  # writes files, needs no display
import matplotlib.pyplot as plt

COLOURS = "#e69f00", "#0072b2"  # plain, ours
WRONG_COLOUR = "#d00000"
GALLERY = 4, 12  # rows, columns


def curve_difference(plain: Training, ours: Training) -> tuple[float, float]:
    """Relative difference of the losses of the first step, and the largest of any.

    In the first both have the same weights. Later roundings have made them two models, and an
    unlucky step of training makes much of a little.
    """
    differences = [abs(a - b) / abs(a) for a, b in zip(plain.curve, ours.curve)]
    return differences[0], max(differences)


def print_training(plain: Training, ours: Training) -> None:
    runs = plain, ours
    _row("", *(run.name for run in runs))
    _row("zero-shot accuracy, held-out digits", *(f"{run.accuracy:.1%}" for run in runs))
    _row("training step, median", *(f"{run.step_seconds * 1e3:.1f} ms" for run in runs))
    _row("peak memory of the process", *(f"{run.peak_bytes / 1e6:.0f} MB" for run in runs))
    first, largest = curve_difference(plain, ours)
    apart = f"{first:.1e} at first, {largest:.1e} at most"
    print(f"relative difference along the two loss curves: {apart}")


def print_large(plain: Training, ours: Training) -> None:
    runs = plain, ours
    costs = [run.large for run in runs if isinstance(run.large, Cost)]
    for run in runs:
        if isinstance(run.large, str):
            print(f"  {run.name}: {run.large}")
    if len(costs) == 2:
        faster = costs[0].seconds / costs[1].seconds
        smaller = costs[0].extra_bytes / costs[1].extra_bytes
        _row("  time", *(f"{c.seconds:.2f} s" for c in costs), f"{faster:.1f}x faster")
        extra = (f"{c.extra_bytes / 1e6:.0f} MB" for c in costs)
        _row("  peak extra memory", *extra, f"{smaller:.0f}x less")


def _row(what: str, *columns: str) -> None:
    print(f"{what:<36}" + "".join(f"{column:>16}" for column in columns))


def draw(plain: Training, ours: Training, images: Tensor, labels: Tensor, path: str) -> None:
    """Digits and similarities of `ours`, both loss curves, and the cost at a large batch."""
    figure = plt.figure(figsize=(16, 10), layout="constrained")
    panels = figure.subfigures(
        2, 2, squeeze=False, width_ratios=[1.5, 1], height_ratios=[1.1, 1], wspace=0.03, hspace=0.04
    )
    _draw_digits(panels[0, 0], ours.predictions, images, labels)
    _draw_similarity(panels[0, 1], ours.similarity, labels)
    _draw_curves(panels[1, 0].subplots(), plain, ours)
    _draw_large(panels[1, 1], plain, ours)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_digits(figure: SubFigure, predictions: Tensor, images: Tensor, labels: Tensor) -> None:
    wrong = predictions != labels
    title = f"Held-out digits and predictions: {wrong.sum()} of {len(wrong)} wrong (in red)"
    figure.suptitle(title)
    # the wrong ones first, as many as fit
    order = torch.argsort(wrong.int(), descending=True, stable=True).tolist()
    for axis, index in zip(figure.subplots(*GALLERY).flat, order):
        axis.imshow(images[index, 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        if wrong[index]:
            text = f"{predictions[index]}, is {labels[index]}"
            axis.set_title(text, color=WRONG_COLOUR, fontsize=11, fontweight="bold")
            axis.spines[:].set(color=WRONG_COLOUR, linewidth=2.5)
        else:
            axis.set_title(str(int(predictions[index])), fontsize=11)


def _draw_similarity(figure: SubFigure, similarity: Tensor, labels: Tensor) -> None:
    axis = figure.subplots()
    by_digit = torch.argsort(labels, stable=True)
    shown = axis.imshow(similarity[by_digit], aspect="auto", interpolation="nearest")
    digits = [str(digit) for digit in range(10)]
    counts = torch.bincount(labels, minlength=10)
    captions = len(captions_of(0))
    axis.set_yticks((counts.cumsum(0) - counts / 2 - 0.5).tolist(), digits)
    axis.set_xticks([captions * (digit + 0.5) - 0.5 for digit in range(10)], digits)
    axis.tick_params(length=0)
    axis.set_title("Image-text similarity")
    axis.set_xlabel(f"captions, {captions} of each digit")
    axis.set_ylabel("held-out images, by digit")
    figure.colorbar(shown, ax=axis, label="cosine similarity")


def _draw_curves(axis: Axes, plain: Training, ours: Training) -> None:
    steps = range(1, len(plain.curve) + 1)
    axis.plot(steps, plain.curve, color=COLOURS[0], linewidth=6, alpha=0.6, label=plain.name)
    axis.plot(steps, ours.curve, color=COLOURS[1], linewidth=1.2, label=ours.name)
    first, largest = curve_difference(plain, ours)
    axis.set_title(f"Loss, same seed and batches: {first:.0e} to {largest:.0e} apart (relative)")
    axis.set(xlabel="training step", ylabel="loss")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_large(figure: SubFigure, plain: Training, ours: Training) -> None:
    figure.suptitle(f"Loss alone, forward + backward, N = {LARGE_N}, D = {LARGE_DIM}, fp32")
    runs = plain, ours
    time, memory = figure.subplots(1, 2)
    for axis, field, unit, scale in (
        (time, "seconds", "time, s", 1.0),
        (memory, "extra_bytes", "peak extra memory, GB", 1e-9),
    ):
        values = [
            getattr(run.large, field) * scale if isinstance(run.large, Cost) else 0.0
            for run in runs
        ]
        bars = axis.bar([run.name for run in runs], values, color=COLOURS, width=0.6)
        measured = [f"{v:.2f}" if v else "not\nmeasured" for v in values]
        axis.bar_label(bars, measured, padding=3)
        axis.set_ylabel(unit)
        axis.set_ylim(0, 1.15 * max(values) or 1)
        axis.spines[["top", "right"]].set_visible(False)
