"""A broken installation imports, computes, warns once, and says what mends it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_kernels import __main__ as cli
from vlm_kernels import _load

TORCH = torch.__version__.split("+")[0]
EXTENSION = f"_C{EXTENSION_SUFFIXES[0]}"
USE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vlm_kernels
    from vlm_kernels import _load, reference
    x, y = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    losses = [vlm_kernels.clip_loss(x, y, 10.0) for _ in range(2)]
    vlm_kernels.siglip_loss(x, y, 10.0, -10.0)
    vlm_kernels.empty_cache()
expected = reference.clip_loss(x, y, 10.0)
print(json.dumps({
    "folder": str(_load.FOLDER),
    "load_error": _load.load_error,
    "warnings": [str(w.message) for w in caught if "vlm_kernels" in str(w.message)
                 or "VLM_" in str(w.message) or "_C" in str(w.message)],
    "warned_at": [w.filename for w in caught],
    "right": all(torch.equal(loss, expected) for loss in losses),
}))
"""


def copy_package(target: Path) -> Path:
    ignore = shutil.ignore_patterns("_C*.so", "_C_emu*", "_build.json", "__pycache__")
    return Path(shutil.copytree(_load.FOLDER, target / "vlm_kernels", ignore=ignore))


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLM_", "PYTHON"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )


def use(cwd: Path, **variables: str) -> dict[str, Any]:
    done = run("-c", USE, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "_C is not in"),
        (
            {EXTENSION: "never read", "_build.json": '{"torch": "2.0.1+cu118"}'},
            f"was built for torch 2.0.1, but this is torch {TORCH}",
        ),
        (
            {EXTENSION: "no ELF file", "_build.json": json.dumps({"torch": TORCH})},
            "_C could not be loaded: ImportError",
        ),
    ],
    ids=["no-extension", "other-torch", "corrupt-extension"],
)
def test_broken_installation(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    package = copy_package(tmp_path)
    (tmp_path / "setup.py").touch()
    for name, text in files.items():
        (package / name).write_text(text)
    rebuild = f"cd {tmp_path} && {sys.executable} setup.py build_ext --inplace"

    state = use(tmp_path)
    assert state["folder"] == str(package)
    assert state["right"]
    assert reason in state["load_error"]
    assert state["load_error"].endswith(rebuild)
    assert len(state["warnings"]) == 1
    assert state["load_error"] in state["warnings"][0]
    assert state["warned_at"] == ["<string>"]  # the caller's line, not one of the package

    doctor = run("-m", "vlm_kernels", "doctor", cwd=tmp_path)
    assert doctor.returncode == 1, doctor.stdout + doctor.stderr
    assert reason in doctor.stdout
    assert f"fix: {rebuild}" in doctor.stdout


def test_wrong_isa_only_warns(tmp_path: Path) -> None:
    copy_package(tmp_path)
    state = use(tmp_path, VLM_CPU_ISA="sse9", VLM_BACKEND="reference")
    assert state["right"]
    assert len(state["warnings"]) == 1
    assert "VLM_CPU_ISA='sse9'" in state["warnings"][0]
    assert "default, avx2, avx512" in state["warnings"][0]


def test_source_folder_shadows_the_installed_package(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    copy_package(source)
    (copy_package(installed) / EXTENSION).write_text("as if built")
    doctor = run("-m", "vlm_kernels", "doctor", cwd=source, PYTHONPATH=str(installed))
    assert doctor.returncode == 1
    assert f"shadows the built package in {installed / 'vlm_kernels'}" in doctor.stdout
    assert "fix: cd ~ " in doctor.stdout


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (None, "_build.json, which names the torch .*FileNotFoundError"),
        ("{", "_build.json, which names the torch .*JSONDecodeError"),
        ("[1]", "_build.json, which names the torch .*TypeError"),
        ('{"cuda": true}', "_build.json, which names the torch .*KeyError"),
        ('{"torch": "1.2.3"}', "built for torch 1.2.3, but this is torch"),
    ],
)
def test_unusable_build_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str | None, reason: str
) -> None:
    (tmp_path / EXTENSION).touch()
    if build is not None:
        (tmp_path / "_build.json").write_text(build)
    monkeypatch.setattr(_load, "FOLDER", tmp_path)
    extension, _, error = _load._load()
    assert extension is None
    assert error is not None
    assert re.search(reason, error)


def test_local_version_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / EXTENSION).touch()
    (tmp_path / "_build.json").write_text(json.dumps({"torch": f"{TORCH}+cu130"}))
    monkeypatch.setattr(_load, "FOLDER", tmp_path)
    assert _load._read_build()[1] is None


def test_extension_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    (tmp_path / "_C.pyi").touch()
    monkeypatch.setattr(_load, "FOLDER", tmp_path)
    error = _load._read_build()[1]
    assert error is not None
    assert "only _C.cpython-36m-x86_64-linux-gnu.so, which this Python cannot load" in error


def test_rebuild_command_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip records the folder a package came from; that is what has to be built anew."""
    source = tmp_path / "the source"
    source.mkdir()
    (source / "setup.py").touch()
    record = json.dumps({"url": source.as_uri(), "dir_info": {}})
    distribution = SimpleNamespace(read_text=lambda name: record)
    monkeypatch.setattr(_load, "FOLDER", tmp_path / "site-packages" / "vlm_kernels")
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)
    command = _load.rebuild_command()
    assert "pip install --no-build-isolation" in command
    assert command.endswith(f" '{source}'")


def test_doctor_names_misspelt_and_invalid_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLM_BAKCEND", "cpu")
    monkeypatch.setenv("VLM_BACKEND", "fast")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "did you mean VLM_BACKEND?" in out
    assert "fix: unset VLM_BAKCEND" in out
    assert "VLM_BACKEND='fast' is not valid" in out


def test_doctor_reports_an_isa_that_the_cpu_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"this CPU has no {name}; it has default")

    extension = SimpleNamespace(set_cpu_isa=refuse, cpu_isa=lambda: "default")
    monkeypatch.setattr(_load, "_C", extension)
    monkeypatch.setattr(_load, "load_error", None)
    monkeypatch.setenv("VLM_CPU_ISA", "avx512")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "VLM_CPU_ISA is ignored: this CPU has no avx512; it has default" in out
    assert "fix: unset VLM_CPU_ISA" in out


def test_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("a", "a", "b"):
            _load.warn_once(key, f"message {key}")
    assert [str(warning.message) for warning in caught] == ["message a", "message b"]
    assert {warning.category for warning in caught} == {UserWarning}


def test_the_extension_here() -> None:
    """Where there is a `_C`, it is the one that _build.json describes, and it answers."""
    if _load._C is None:
        pytest.skip(f"needs the extension: {_load.load_error}")
    assert _load.load_error is None
    assert _load.build["torch"].split("+")[0] == TORCH
    assert platform.python_version().startswith(_load.build["python"])
    best = _load._C.cpu_isa()
    try:
        _load._C.set_cpu_isa("default")
        assert _load._C.cpu_isa() == "default"
        with pytest.raises(ValueError, match="default"):
            _load._C.set_cpu_isa("sse9")
        assert _load._C.cpu_isa() == "default"
    finally:
        _load._C.set_cpu_isa(best)
