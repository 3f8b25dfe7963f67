"""benchmarks/gpu_check.sh names nothing that is not there: where it runs, nothing can be mended."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
TOOLS = {"compute-sanitizer", "env", "python3"}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


LIMIT = 525  # seconds, and the table has the rest of nine minutes


def steps(folder: Path, *op: str) -> dict[str, tuple[int, list[str]]]:
    """name -> when it ends at the latest, and its command, as a dry run prints them."""
    command = ["bash", str(SCRIPT), "--dry-run", str(folder), *op]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.replace("\t\n", "\0").split("\0")[:-1]:
        name, deadline, *words = line.split("\t")
        found[name] = int(deadline), words
    assert not list(folder.iterdir())
    return found


@pytest.mark.parametrize("op", [(), ("attention",), ("contrastive",)], ids=str)
def test_every_command_is_there(
    op: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    found = steps(tmp_path, *op)
    assert list(found)[:2] == ["stream", "build"]
    assert "sanitizer" in found
    deadlines = [deadline for deadline, _ in found.values()]
    assert deadlines == sorted(deadlines)
    assert deadlines[-1] <= LIMIT
    modules = set()
    for deadline, words in found.values():
        assert words[0] in TOOLS
        start = words.index("python3")
        if words[start + 1] == "-c":
            compile(words[start + 2], "stream", "exec")
        elif words[start + 1] == "-m":
            modules.add(words[start + 2])
            check_module(words[start + 2], words[start + 3 :], deadline)
        else:
            assert (ROOT / words[start + 1]).is_file()
    assert modules == {"benchmarks", "pytest", "vlm_kernels"}


def test_each_op_is_tested_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a choice all ops; each set of shapes of attention's targets is timed once."""
    monkeypatch.syspath_prepend(str(ROOT))
    targets = importlib.import_module("benchmarks.targets")
    both = steps(tmp_path)
    for op, other in (("attention", "contrastive"), ("contrastive", "attention")):
        alone = steps(tmp_path, op)
        assert any(op in word for _, words in alone.values() for word in words)
        assert not any(other in word for _, words in alone.values() for word in words)
        assert f"tests-{op}" in alone.keys() & both.keys()
    for found in (both, steps(tmp_path, "attention")):
        words = [words for _, words in found.values() if "--group" in words]
        groups = [group for each in words for group in each[each.index("--group") + 1].split(",")]
        assert sorted(groups) == sorted(targets.ATTENTION_GPU)


def check_module(module: str, arguments: list[str], deadline: int) -> None:
    assert importlib.util.find_spec(module) is not None
    if module == "benchmarks":
        run = importlib.import_module("benchmarks.run")
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        assert arguments[0] == "run"
        parsed = parser.parse_args(arguments[1:])
        known = {"cuda", "triton", "cuda:short", "cuda:long"}
        assert set(parsed.backend.split(",")) <= known
        assert run.cases(parsed)
        assert 0 < parsed.time_limit <= deadline - 15
    elif module == "pytest":
        paths = [ROOT / word for word in arguments if "/" in word]
        assert paths
        assert all(path.exists() for path in paths)
        marker = arguments[arguments.index("-m") + 1]
        declared = (ROOT / "pyproject.toml").read_text()
        assert f'"{marker}: ' in declared
        if "-k" in arguments:
            files = [file for path in paths for file in (path, *path.rglob("test_*.py"))]
            text = "".join(str(file) + file.read_text() for file in files if file.is_file())
            names = arguments[arguments.index("-k") + 1].replace("not ", "").split(" and ")
            assert all(name in text for name in names)
    else:
        main = importlib.import_module("vlm_kernels.__main__").main
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0


@pytest.mark.parametrize("arguments", [(), ("out", "nothing"), ("out", "attention", "more")])
def test_usage(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "OUTDIR" in done.stderr


def test_several_backends_and_a_device_are_rows(tmp_path: Path) -> None:
    """What the script asks of the suite, on the CPU."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--backend", "reference,cpu"]
    command += ["--op", "siglip_loss", "--dtype", "fp32", "--shapes", "40x16", "--peers", "none"]
    command += ["--min-time", "0", "--repeats", "1", "--json", str(out), "--append"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    record = importlib.import_module("benchmarks.record")
    rows = record.read(str(out))
    ran = [(row["backend"], row["counts"], row["device"], row["status"]) for row in rows]
    cpu = importlib.util.find_spec("vlm_kernels._C") is not None
    assert ran[0] == ("reference", False, "cpu", "ok")
    assert ran[1] == (("cpu", True, "cpu", "ok") if cpu else (None, False, "cpu", "error"))
