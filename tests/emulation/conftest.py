"""Builds the emulator and what runs on it, once: build/emulation, shared by all workers."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlm_kernels.ops import attention

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "emulation"


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert found, f"the emulated build needs {name}: pip install {name}"
    return found


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)


def _build(target: str) -> Path:
    """The folder in which `target` is up to date."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        _call(cmake, "-G", "Ninja", "-S", str(HERE), "-B", str(BUILD), *configure)
        jobs = len(os.sched_getaffinity(0))
        _call(cmake, "--build", str(BUILD), "--target", target, "--parallel", str(jobs))
    return BUILD


class Emulator:
    """Launches the kernels of tests/emulation/kernels on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def __call__(self, entry: str, *args: Any, unwritten: tuple[torch.Tensor, ...] = ()) -> str:
        """What the emulator found, or "". Tensors are device memory, `unwritten` ones without a
        value, and named arg0, arg1, ... in findings."""
        function = getattr(self._library, entry)
        function.restype = ctypes.c_char_p
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        for i, x in enumerate(tensors):
            known = all(x is not other for other in unwritten)
            self._library.vlm_emu_add_memory(
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_size_t(x.numel() * x.element_size()),
                int(known),
                f"arg{i}".encode(),
            )
        try:
            values = [
                ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a)
                for a in args
            ]
            return (function(*values) or b"").decode()
        finally:
            for x in tensors:
                self._library.vlm_emu_remove_memory(ctypes.c_void_p(x.data_ptr()))


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(_build("emulator_tests") / "libemulator_tests.so")


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """`_C_emu`: as `_C`, its ops in torch.ops.vlm_kernels_emu, where the CUDA kernels run emulated
    on CPU tensors. What the emulator finds is raised as a RuntimeError."""
    [file] = _build("_C_emu").glob("_C_emu*.so")
    spec = importlib.util.spec_from_file_location("_C_emu", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated_attention(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CPU tensors of attention go to the emulated CUDA kernels; gives `_C_emu`."""
    monkeypatch.setattr(attention, "_C", extension)
    yield extension
    extension.set_attention_kernels("auto")
