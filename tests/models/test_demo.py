"""The demo in a few steps; `make demo` runs all of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_kernels

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def demo(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    package = str(Path(vlm_kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "train_digits.py"), *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_too_few_steps_are_drawn_and_fail(loss: str, tmp_path: Path) -> None:
    done = demo("--steps=2", "--batch=16", "--no-large", f"--loss={loss}", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "FAILED: zero-shot accuracy" in done.stderr
    assert "relative difference along the two loss curves" in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_there_is_told_before_training(tmp_path: Path) -> None:
    done = demo("--out=nowhere/demo.png", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cost_of_a_large_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits_clip.measure import Cost, large_batch_cost

    n = 2048
    plain = large_batch_cost(kind, plain=True, threads=1, n=n, dim=32)
    ours = large_batch_cost(kind, plain=False, threads=1, n=n, dim=32)
    assert isinstance(plain, Cost)
    assert isinstance(ours, Cost)
    assert min(plain.seconds, ours.seconds) > 0
    if not math.isnan(plain.extra_bytes):  # measured on Linux only
        assert plain.extra_bytes > 4 * n * n  # plain PyTorch holds at least one N x N matrix


def test_a_loss_that_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits_clip import measure

    monkeypatch.setattr(measure, "available_memory", lambda: 1e9)
    reason = measure.large_batch_cost("clip", plain=True, threads=1)
    assert isinstance(reason, str)
    assert "1.0 GB are free" in reason
