"""Loads the compiled extension `_C`, or keeps why it cannot be loaded and what mends that."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import warnings
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from . import config

FOLDER = Path(__file__).resolve().parent

_warned: set[str] = set()


def warn_once(key: str, message: str, *, stacklevel: int = 3) -> None:
    """Issues a UserWarning the first time `key` is seen in this process."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def extension_file(folder: Path) -> Path | None:
    """The `_C` in `folder` that this Python would load."""
    files = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def shadowed_install() -> Path | None:
    """An installed vlm_kernels with a `_C`, later on sys.path than this one, which has none."""
    if extension_file(FOLDER) is not None:
        return None
    folders = (Path(entry or ".").resolve() / "vlm_kernels" for entry in sys.path)
    return next((f for f in folders if f != FOLDER and extension_file(f) is not None), None)


def rebuild_command() -> str:
    """The shell command that builds `_C` anew for the torch of this Python."""
    python = shlex.quote(sys.executable)
    if (FOLDER.parent / "setup.py").is_file():
        return f"cd {shlex.quote(str(FOLDER.parent))} && {python} setup.py build_ext --inplace"
    pip = f"{python} -m pip install --no-build-isolation --no-deps --force-reinstall"
    return f"{pip} {_source_folder()}"


def _source_folder() -> str:
    """Where pip installed this package from, as it recorded it (PEP 610)."""
    try:
        record = metadata.distribution("vlm_kernels").read_text("direct_url.json")
        url = urlparse(json.loads(record or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError):
        url = urlparse("")
    folder = unquote(url.path)
    if url.scheme == "file" and Path(folder, "setup.py").is_file():
        return shlex.quote(folder)
    return "PATH_TO_THE_SOURCE_OF_VLM_KERNELS"


def _public(version: str) -> str:
    return version.split("+")[0]


def _read_build() -> tuple[dict[str, Any], str | None]:
    """`_build.json`, and why the `_C` beside it must not be loaded (None: it may be)."""
    file = extension_file(FOLDER)
    if file is None:
        others = sorted(other.name for other in FOLDER.glob("_C.*") if other.suffix != ".pyi")
        found = f", only {', '.join(others)}, which this Python cannot load" if others else ""
        return {}, f"the compiled extension _C is not in {FOLDER}{found}"
    try:
        build = json.loads((FOLDER / "_build.json").read_text())
        built_for = _public(build["torch"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}"
        return {}, f"_build.json, which names the torch that {file.name} was built for: {cause}"
    running = _public(torch.__version__)
    # a _C built for another torch may crash the process rather than raise, so it is not tried
    if built_for != running:
        return build, f"{file.name} was built for torch {built_for}, but this is torch {running}"
    return build, None


def _load() -> tuple[Any, dict[str, Any], str | None]:
    build, error = _read_build()
    if error is None:
        try:
            return importlib.import_module(f"{__package__}._C"), build, None
        except Exception as exception:  # a C++ initialiser may raise anything; importing must not
            error = f"_C could not be loaded: {type(exception).__name__}: {exception}"
    shadowed = shadowed_install()
    if shadowed is not None:
        error += f" (and this folder shadows the built package in {shadowed})"
    return None, build, f"{error}. To mend it: {rebuild_command()}"


def apply_cpu_isa() -> str | None:
    """Hands VLM_CPU_ISA to the CPU kernels; returns why that failed (None: done, or unset)."""
    if not os.environ.get("VLM_CPU_ISA"):
        return None
    try:
        isa = config.get("VLM_CPU_ISA")
        if _C is not None:
            _C.set_cpu_isa(isa)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


_C, build, load_error = _load()

_isa_error = apply_cpu_isa()
if _isa_error is not None:
    warn_once("VLM_CPU_ISA", f"VLM_CPU_ISA is ignored: {_isa_error}")
