"""Trains a small CLIP on handwritten digits twice, from the same seed and the same batches.

Once in plain PyTorch, once with the patch embedding, the attention and the loss of vlm_kernels.
Then compares the two, the losses alone also at a large batch, and draws a picture:

    python examples/train_digits.py [--loss siglip] [--no-large]

Exits with 1 if fewer than 95 % of the held-out digits are recognised zero-shot.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from digits_clip import report
from digits_clip.data import Tokenizer, batches, load_images
from digits_clip.losses import OURS, PLAIN
from digits_clip.measure import LARGE_DIM, LARGE_N, large_batch_cost
from digits_clip.model import EMBED_DIM, build, in_plain_pytorch
from digits_clip.training import Training
from tqdm import tqdm

import vlm_kernels

REQUIRED_ACCURACY = 0.95
STEPS = {"clip": 300, "siglip": 500}
MAX_NORM = {"clip": math.inf, "siglip": 1.0}  # at this rate SigLIP learns late or never without it


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    defaults = " or ".join(f"{steps} ({loss})" for loss, steps in STEPS.items())
    parser.add_argument("--steps", type=int, help=f"default: {defaults}")
    parser.add_argument("--batch", type=int, default=128, help="pairs in a batch, default: 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="demo.png", help="the picture, default: demo.png")
    parser.add_argument(
        "--no-large", action="store_true", help=f"leave out the loss alone at N = {LARGE_N}"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for the loss at that N"
    )
    args = parser.parse_args(argv)
    args.steps = STEPS[args.loss] if args.steps is None else args.steps
    if min(args.steps, args.batch) < 2 or args.threads < 1:
        parser.error("--steps and --batch must be at least 2, --threads at least 1")
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no such folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # for towers this small more gains little, and loses on a busy machine
    torch.manual_seed(args.seed)
    print(f"vlm_kernels {vlm_kernels.__version__}, torch {torch.__version__}")
    features = torch.zeros(args.batch, EMBED_DIM)
    vlm_kernels.explain(f"{args.loss}_loss", features, features, 1.0)  # says which backend runs

    images, labels, test_images, test_labels = load_images()
    tokenizer = Tokenizer()
    model = build(args.loss, tokenizer, args.batch)
    plain_model = in_plain_pytorch(copy.deepcopy(model))
    rest = args.steps, MAX_NORM[args.loss]
    plain = Training("plain PyTorch", plain_model, PLAIN[args.loss], *rest)
    ours = Training("vlm_kernels", model, OURS[args.loss], *rest)

    stream = batches(images, labels, tokenizer, steps=args.steps, batch=args.batch, seed=args.seed)
    progress = tqdm(stream, "training both", args.steps, unit="step", mininterval=0.5)
    for batch in progress:
        for run in (plain, ours):
            run.step(*batch)
        progress.set_postfix(plain=plain.curve[-1], ours=ours.curve[-1], refresh=False)
    for run in (plain, ours):
        run.evaluate(tokenizer, test_images, test_labels)
    report.print_training(plain, ours)

    if not args.no_large:
        size = f"N = {LARGE_N}, D = {LARGE_DIM}, fp32, {args.threads} threads"
        print(f"loss alone, forward + backward, {size}:", flush=True)
        plain.large = large_batch_cost(args.loss, plain=True, threads=args.threads)
        ours.large = large_batch_cost(args.loss, plain=False, threads=args.threads)
        report.print_large(plain, ours)
    report.draw(plain, ours, test_images, test_labels, args.out)
    print(f"wrote {args.out}")

    worst = min(plain.accuracy, ours.accuracy)
    if worst < REQUIRED_ACCURACY:
        print(
            f"FAILED: zero-shot accuracy {worst:.1%} after {args.steps} steps of {args.batch}, "
            f"below {REQUIRED_ACCURACY:.0%}; the default steps and batch reach it",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
