"""Compiles csrc/cuda/*.cu with nvcc as the build does, and reads what ptxas says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .report import Compiled

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def nvcc() -> str | None:
    """The compiler, where the build would find it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures(source: Path) -> list[str]:
    """`*_sm90.cu` is compiled for sm_90a only, all others for sm_80, sm_90 and PTX."""
    if source.stem.endswith("_sm90"):
        return ["arch=compute_90a,code=sm_90a"]
    return [f"arch=compute_80,code={code}" for code in ("sm_80", "compute_80")] + [
        "arch=compute_90,code=sm_90"
    ]


def compile_source(source: Path) -> list[Compiled]:
    """A row for each kernel and architecture of one file. RuntimeError has nvcc's output."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.o")
        command = [compiler, "-std=c++20", "-O3", "-lineinfo", "-c", str(source), "-o", str(out)]
        command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", "-Xptxas=-v"]
        command += [part for arch in architectures(source) for part in ("-gencode", arch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name}:\n{done.stdout}{done.stderr}")
        return parse(done.stdout + done.stderr, _mma(compiler, out))


def parse(output: str, mma: dict[tuple[str, str], int]) -> list[Compiled]:
    """Rows from what ptxas prints under -v; `mma` counts by (mangled kernel, architecture)."""
    rows = []
    entries = list(_ENTRY.finditer(output))
    ends = [following.start() for following in entries[1:]] + [len(output)]
    for entry, end in zip(entries, ends):
        text = output[entry.end() : end]
        spills, registers, shared = (p.search(text) for p in (_SPILLS, _REGISTERS, _SHARED))
        if spills is None or registers is None:
            raise ValueError(f"ptxas says nothing of {entry[1]}:\n{text}")
        rows.append(
            Compiled(
                kernel=entry[1],
                variant="",
                arch=entry[2],
                registers=int(registers[1]),
                shared=int(shared[1]) if shared else 0,
                spills=int(spills[1]) + int(spills[2]),
                mma=mma.get((entry[1], entry[2])),
            )
        )
    return rows


def _mma(compiler: str, out: Path) -> dict[tuple[str, str], int]:
    """Tensor-core instructions by (mangled kernel, architecture), where there is a cuobjdump."""
    # it calls nvdisasm, which lies beside it
    path = os.pathsep.join([str(Path(compiler).resolve().parent), os.environ["PATH"], *_wheel()])
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        return {}
    command = [found, "-sass", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    counts: dict[tuple[str, str], int] = {}
    arch = kernel = ""
    for line in done.stdout.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = match[1]
            counts[kernel, arch] = 0
        elif re.search(r"\bHG?MMA\b", line):
            counts[kernel, arch] += 1
    return counts


def _wheel() -> list[str]:
    """The folder where Triton keeps its cuobjdump, if Triton is installed."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return []
    return [str(Path(found.origin).parent / "backends" / "nvidia" / "bin")]


def limits_of(kernel: str, limits: dict[str, dict[str, int]]) -> dict[str, int]:
    """Those of a mangled kernel: its name stands in it, behind its length."""
    found = [value for name, value in limits.items() if f"{len(name)}{name}" in kernel]
    return found[0] if found else {}


def readable(kernel: str) -> str:
    """The demangled name without its arguments, where there is a c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return kernel
    done = subprocess.run([tool, kernel], capture_output=True, text=True)
    name = done.stdout.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    end = name.rfind(">(") + 1 or name.find("(")
    return name[:end] or kernel
