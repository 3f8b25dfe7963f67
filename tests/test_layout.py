"""Holds the tree to its rules: one name an op, torch-free kernels, one table of variables."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlm_kernels
from vlm_kernels import config
from vlm_kernels.ops import attention

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlm_kernels"
CSRC = ROOT / "csrc"
OPS = sorted(file.stem for file in (PACKAGE / "ops").glob("[a-z]*.py"))
OP_FILES = (
    "vlm_kernels/reference/{}.py",
    "vlm_kernels/_triton/{}.py",
    "vlm_kernels/testing/specs/{}.py",
    "csrc/include/vlm/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/ops/{}.cpp",
    "tests/ops/test_{}.py",
)
NOT_YET_ON_GPUS = {"patch_embed"}  # its Triton and CUDA kernels are yet to come
CPP = (".h", ".cpp", ".cu", ".cuh", ".inl")
VARIABLE = re.compile(r"VLM_[A-Z0-9_]+|MAX_JOBS")


def sources(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in suffixes)


def matches(files: list[Path], pattern: str) -> list[str]:
    """file:line of each match, in the terms of the repository."""
    found = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) for each absolute import; the name is None for `import module`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("file", OP_FILES)
def test_each_op_has_one_name_everywhere(op: str, file: str) -> None:
    expected = not ("_triton" in file and op in NOT_YET_ON_GPUS)
    assert (ROOT / file.format(op)).is_file() == expected


@pytest.mark.parametrize(
    "folder", ["vlm_kernels/reference", "vlm_kernels/_triton", "vlm_kernels/testing/specs"]
)
def test_no_file_without_an_op(folder: str) -> None:
    stray = [f.stem for f in (ROOT / folder).glob("[a-z]*.py") if f.stem not in OPS]
    assert not stray


def test_an_op_is_there() -> None:
    assert "contrastive" in OPS


def test_kernels_are_torch_free() -> None:
    seam = CSRC / "cpu" / "gemm.cpp"
    kernels = [f for d in ("include", "cpu", "cuda") for f in sources(CSRC / d, CPP) if f != seam]
    assert kernels
    assert not matches(kernels, r"#\s*include\s*[<\"](torch|ATen|c10|caffe2|pybind11)/")


def test_inline_assembly_and_launches_have_one_home() -> None:
    files = sources(CSRC, CPP)
    assembly = {CSRC / "cuda" / "ptx.cuh", CSRC / "cpu" / "vec.h"}  # of the GPU and of the CPU
    asm = r"\b(asm|__asm|__asm__)\s*(volatile|__volatile__|goto)?\s*\("
    assert not matches([f for f in files if f not in assembly], asm)
    assert not matches([f for f in files if f != CSRC / "cuda" / "launch.cuh"], r"<<<")


def test_the_package_does_not_know_the_model_layer() -> None:
    for file in sources(PACKAGE, (".py",)):
        modules = {module.split(".")[0] for module, _ in imports(file)}
        assert not modules & {"vlm_models", "benchmarks", "tests"}, file


def test_the_model_layer_uses_the_public_api_only() -> None:
    public = {
        "vlm_kernels": vlm_kernels.__all__,
        "vlm_kernels.nn": vlm_kernels.nn.__all__,
        "vlm_kernels.ops.attention": attention.__all__,
    }
    for file in sources(ROOT / "python" / "vlm_models", (".py",)):
        for module, name in imports(file):
            if module.split(".")[0] == "vlm_kernels":
                assert module in public, f"{file}: {module} is not public"
                assert name is None or name in public[module], f"{file}: {module}.{name}"
        private = r"\bvlm_kernels(\.\w+)*\._"
        assert not matches([file], private)


def test_no_module_shadows_triton() -> None:
    """A folder named triton on sys.path, as when a file beside it is run, would be imported."""
    folders = [PACKAGE, ROOT / "python", ROOT / "benchmarks", ROOT / "examples"]
    assert not [path for folder in folders for path in folder.rglob("triton")]
    assert not [path for folder in folders for path in folder.rglob("triton.py")]


def variables_read_by_python(file: Path) -> set[str]:
    """Names handed to environ[...], environ.get, getenv and config.get."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = node.args if node.func.attr in ("get", "getenv") else []
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            arguments = [node.slice]
        constants = (a.value for a in arguments if isinstance(a, ast.Constant))
        found |= {c for c in constants if isinstance(c, str) and VARIABLE.fullmatch(c)}
    return found


def test_every_variable_is_in_the_table_and_used() -> None:
    python = [ROOT / "setup.py"]
    for folder in ("vlm_kernels", "python", "benchmarks", "examples"):
        python += sources(ROOT / folder, (".py",))
    used = set().union(*map(variables_read_by_python, python))
    read = r"getenv\(\"(\w+)\"\)|ENV\{(\w+)\}"
    for file in [*sources(CSRC, CPP), *sources(ROOT / "cmake", (".cmake",))]:
        names = {name for pair in re.findall(read, file.read_text()) for name in pair}
        used |= {name for name in names if VARIABLE.fullmatch(name)}
    assert used == set(config.VARIABLES)


def test_the_readme_has_the_table() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("needs README.md")
    assert set(VARIABLE.findall(readme.read_text())) == set(config.VARIABLES)
