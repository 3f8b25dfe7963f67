"""Compiles Triton kernels ahead of time, without a GPU, and reads what came out."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .report import Compiled


class Variant(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        name: of the specialisation; types: of each argument, as Triton names them.
        aligned: arguments that are multiples of 16 (pointers: of 16 bytes).
        mma: whether it must use the tensor cores.
    """

    kernel: Any
    name: str
    arch: int
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: set[str]
    options: dict[str, int]
    mma: bool

    def __str__(self) -> str:
        return f"{self.kernel.__name__}[{self.name}] sm_{self.arch}"


def modules() -> list[ModuleType]:
    """triton_<op>.py here: each has `kernels`, a module, and their variants, all and `quick`."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("triton_*.py"))
    found = (importlib.import_module(f".{name}", __package__) for name in names)
    return [module for module in found if hasattr(module, "variants")]


def compile_variant(variant: Variant) -> Compiled:
    """Compiles to SASS with the Triton wheel's own ptxas."""
    kernel = variant.kernel
    types = {name: variant.types[name] for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in variant.aligned
    }
    source = ASTSource(kernel, types, variant.constants, attributes)
    target = GPUTarget("cuda", variant.arch, 32)
    built = triton.compile(source, target=target, options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    return Compiled(
        kernel=kernel.__name__,
        variant=variant.name,
        arch=f"sm_{variant.arch}",
        registers=registers,
        shared=built.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        mma=len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
    )


def _run(tool: str, *arguments: str) -> str:
    """Output of a tool of the Triton wheel."""
    path = getattr(triton.knobs.nvidia, tool).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
