"""Every environment variable of vlm_kernels, in one table."""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable; an empty value counts as unset."""

    name: str
    default: str
    when: str  # "build": setup.py and CMake read and check it; "run": `get` does
    meaning: str
    choices: tuple[str, ...] = ()


_TABLE = (
    Variable(
        "VLM_BACKEND",
        "auto",
        "run",
        'backend of every call that leaves backend="auto"; it must be able to run the call',
        ("auto", "cuda", "cpu", "triton", "reference"),
    ),
    Variable(
        "VLM_CPU_ISA",
        "",
        "run",
        "instruction set of the CPU kernels, read at import; unset: the best that this CPU has",
        ("default", "avx2", "avx512"),
    ),
    Variable(
        "VLM_CHECK",
        "0",
        "run",
        "1 checks the values of labels and cu_seqlens on CUDA tensors too, which waits for them",
        ("0", "1"),
    ),
    Variable(
        "VLM_CUDA", "AUTO", "build", "CUDA kernels: ON, OFF, or AUTO, which is ON if there is nvcc"
    ),
    Variable("VLM_CUDA_ARCHS", "80;90", "build", "GPU architectures to compile for"),
    Variable(
        "VLM_SKIP_EXT", "0", "build", "1 installs without the extension: every op on its reference"
    ),
    Variable("VLM_SANITIZE", "", "build", "sanitizers such as address,undefined"),
    Variable(
        "MAX_JOBS", "", "build", "compilers at a time; unset: one a core, if memory allows it"
    ),
)

VARIABLES: dict[str, Variable] = {variable.name: variable for variable in _TABLE}


def get(name: str) -> str:
    """Value of a variable of the table, or its default when unset.

    Read anew on each call. Raises ValueError naming the variable, its value and what it may be.
    """
    value = os.environ.get(name)
    variable = VARIABLES[name]
    if not value:
        return variable.default
    if variable.choices and value not in variable.choices:
        raise ValueError(f"{name}={value!r} is not valid; known: {', '.join(variable.choices)}")
    return value
