"""Time and memory of a loss alone at a large batch, and of a process."""

from __future__ import annotations

import math
import multiprocessing
import signal
import statistics
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import OURS, PLAIN, Loss

LARGE_N, LARGE_DIM = 16384, 512


def _proc(file: str, key: str) -> float:
    """A figure of Linux's /proc in bytes, or nan on another system."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024.0
    return math.nan


def available_memory() -> float:
    return _proc("/proc/meminfo", "MemAvailable")


def peak_rss() -> float:
    """The most memory this process has held since it began, or since `reset_peak_rss`."""
    return _proc("/proc/self/status", "VmHWM")


def reset_peak_rss() -> None:
    with suppress(OSError):  # some containers forbid it: then the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")


class Cost(NamedTuple):
    seconds: float
    extra_bytes: float  # peak memory above the features and their gradients


def _measure(send: Connection, loss: Loss, n: int, dim: int, siglip: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: int) -> list[Tensor]:
        image, text = F.normalize(torch.randn(2, rows, dim, generator=generator), dim=-1)
        scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
        args = [image.clone(), text.clone(), scale, bias]
        return [x.requires_grad_() for x in (args if siglip else args[:3])]

    def step(args: list[Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss(*args), args)
        return time.perf_counter() - start

    step(inputs(256))  # starts the threads and loads what is loaded on first use
    args = inputs(n)
    reset_peak_rss()
    before = _proc("/proc/self/status", "VmRSS")
    seconds = [step(args)]
    while sum(seconds) < 8 and len(seconds) < 5:  # a plain step takes many seconds on two cores
        seconds.append(step(args))
    gradients = 2 * n * dim * 4
    send.send(Cost(statistics.median(seconds), peak_rss() - before - gradients))


def large_batch_cost(
    kind: str, *, plain: bool, threads: int, n: int = LARGE_N, dim: int = LARGE_DIM
) -> Cost | str:
    """Forward and backward of the loss alone, fp32, in a fresh process; or why it was not run."""
    matrices = {"clip": 5, "siglip": 6}[kind] if plain else 0  # N x N, held at once
    needed, free = 4 * n * n * matrices, available_memory()
    if free < needed:
        return f"not run: it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    loss = (PLAIN if plain else OURS)[kind]
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure, args=(send, loss, n, dim, kind == "siglip", threads))
    process.start()
    send.close()  # so that its end in the process is the only one, and recv sees it close
    try:
        return receive.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return "killed by the system, most likely for want of memory"
        raise RuntimeError(f"measuring the loss failed, exit code {process.exitcode}") from None
    finally:
        process.join()
