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


def steps(folder: Path) -> dict[str, list[str]]:
    """name -> command of each step, as a dry run prints them."""
    command = ["bash", str(SCRIPT), "--dry-run", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.replace("\t\n", "\0").split("\0")[:-1]:
        name, *words = line.split("\t")
        found[name] = words
    assert not list(folder.iterdir())
    return found


def test_every_command_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    found = steps(tmp_path)
    assert list(found)[:2] == ["stream", "build"]
    assert {"tests", "sanitizer"} <= found.keys()
    modules = set()
    for words in found.values():
        assert words[0] in TOOLS
        start = words.index("python3")
        if words[start + 1] == "-c":
            compile(words[start + 2], "stream", "exec")
        elif words[start + 1] == "-m":
            modules.add(words[start + 2])
            check_module(words[start + 2], words[start + 3 :])
        else:
            assert (ROOT / words[start + 1]).is_file()
    assert modules == {"benchmarks", "pytest", "vlm_kernels"}


def check_module(module: str, arguments: list[str]) -> None:
    assert importlib.util.find_spec(module) is not None
    if module == "benchmarks":
        run = importlib.import_module("benchmarks.run")
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        assert arguments[0] == "run"
        parsed = parser.parse_args(arguments[1:])
        known = {"cuda", "triton"}
        assert set(parsed.backend.split(",")) <= known
        assert run.cases(parsed)
    elif module == "pytest":
        folders = [word for word in arguments if "/" in word]
        assert folders
        assert all((ROOT / folder).exists() for folder in folders)
        marker = arguments[arguments.index("-m") + 1]
        declared = (ROOT / "pyproject.toml").read_text()
        assert f'"{marker}: ' in declared
        if "-k" in arguments:
            text = "".join(file.read_text() for file in (ROOT / folders[0]).rglob("test_*.py"))
            assert arguments[arguments.index("-k") + 1] in text
    else:
        main = importlib.import_module("vlm_kernels.__main__").main
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0


def test_usage() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
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
