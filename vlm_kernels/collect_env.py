"""What vlm_kernels runs on, for bug reports and benchmark records.

Standard library only: `python vlm_kernels/collect_env.py [--json]` still reports when torch or
vlm_kernels cannot be imported. Every probe is guarded; a failure is a value in the report.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

_CPU_FLAGS = re.compile(r"sse4_2|f16c|fma|bmi2|avx2?|avx_vnni|avx512\w+|amx_\w+|asimd|sve2?|bf16")
_LIBRARIES = re.compile(
    r"/((?:libtorch|libc10|libgomp|libiomp|libomp|libmkl|libdnnl|libcuda|libcublas|libtriton|"
    r"libasan|_C\.|_C_emu)[^/ ]*)$"
)
_VARIABLES = re.compile(
    r"(VLM|TORCH|PYTORCH|TRITON|OMP|GOMP|KMP|MKL|ONEDNN|DNNL|ATEN|CUDA|NVIDIA)_\w+|"
    r"MAX_JOBS|LD_PRELOAD|LD_LIBRARY_PATH|CC|CXX|CFLAGS|CXXFLAGS"
)


def _guard(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # the report must always come
        return f"failed: {type(error).__name__}: {error}"


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable}


def _os() -> dict[str, Any]:
    libc = " ".join(platform.libc_ver())
    return {"platform": platform.platform(), "libc": libc}


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report: dict[str, Any] = {"cores": os.cpu_count(), "usable_cores": usable}
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.MULTILINE)
    report["model"] = model[1] if model else platform.processor()
    present = flags[1].split() if flags else []
    report["flags"] = " ".join(sorted(filter(_CPU_FLAGS.fullmatch, present)))
    return report


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": str(torch.__version__),
        "folder": str(Path(torch.__file__).parent),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def _vlm_kernels() -> dict[str, Any]:
    import vlm_kernels
    from vlm_kernels import _load

    return {
        "version": vlm_kernels.__version__,
        "folder": str(_load.FOLDER),
        "build": _load.build,
        "load_error": _load.load_error,
        "cpu_isa": None if _load._C is None else _load._C.cpu_isa(),
    }


def _libraries() -> list[str]:
    """Shared libraries that are mapped now, which may differ from those installed."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(filter(_LIBRARIES.search, paths))


def _triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=10)
    release = re.search(r"release ([\d.]+, V[\d.]+)", done.stdout)
    return f"{release[1] if release else done.stdout.strip()} at {nvcc}"


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB, "
        f"{device.multi_processor_count} SMs"
        for device in devices
    ]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)}


def collect_env() -> dict[str, Any]:
    """Everything that decides what runs here, as a dict of plain JSON values.

    Keys: python, os, cpu, torch, vlm_kernels, libraries, triton, nvcc, gpus, environment. Where a
    probe fails, its value is a string that starts with "failed:". Never raises.
    """
    probes = {
        "python": _python,
        "os": _os,
        "cpu": _cpu,
        "torch": _torch,
        "vlm_kernels": _vlm_kernels,
        "libraries": _libraries,
        "triton": _triton,
        "nvcc": _nvcc,
        "gpus": _gpus,
        "environment": _environment,
    }
    return {name: _guard(probe) for name, probe in probes.items()}


def as_text(report: dict[str, Any]) -> str:
    """The report for people: one line a value."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict) and value:
            lines.append(f"{name}:")
            lines += [f"  {key}: {entry}" for key, entry in value.items()]
        elif isinstance(value, list) and value:
            lines.append(f"{name}:")
            lines += [f"  {entry}" for entry in value]
        else:
            lines.append(f"{name}: {value or 'none'}")
    return "\n".join(lines)


def main(as_json: bool) -> None:
    """Prints the report."""
    report = collect_env()
    print(json.dumps(report, indent=2) if as_json else as_text(report))


if __name__ == "__main__":
    # run as a file, this folder is first on sys.path, where `nn` or `ops` could be taken for others
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(p for p in sys.path if Path(p).resolve() != folder)]
    main("--json" in sys.argv[1:])
