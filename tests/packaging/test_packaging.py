"""What is shipped: the wheel, the sdist, the extension's link line, and the errors of the build.

The repository's folder would shadow an installed package, so everything here runs in a subprocess
whose working directory is empty.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="needs the source tree, with setup.py"
)


def run(*command: str, cwd: Path, env: Mapping[str, str] | None = None, fails: bool = False) -> str:
    """Output of a command that must succeed (or fail), without the caller's PYTHONPATH."""
    base = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**base, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def in_tree(command: list[str], folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a build command in the repository: CMake's folder is reused, the rest is in `folder`."""
    config = folder / "scratch.cfg"
    config.write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    env = {"DIST_EXTRA_CONFIG": str(config), **(env or {})}
    return run(sys.executable, *command, cwd=ROOT, env=env)


def build_wheel(folder: Path, env: Mapping[str, str] | None = None) -> Path:
    pip = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    in_tree(pip, folder, env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, site: Path) -> None:
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    run(sys.executable, *pip, cwd=wheel.parent)


def in_site(site: Path, code: str) -> str:
    """Output of Python code that sees `site` first, from an empty folder."""
    empty = site.parent / "empty"
    empty.mkdir(exist_ok=True)
    return run(sys.executable, "-c", code, cwd=empty, env={"PYTHONPATH": str(site)})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    site = wheel.parent / "site"
    install(wheel, site)
    return site


def extension(site: Path) -> Path:
    (file,) = (site / "vlm_kernels").glob("_C.*.so")
    return file


def test_wheel_imports_and_computes(site: Path) -> None:
    code = """
import json, torch, vlm_kernels, vlm_models
from vlm_kernels import _load
image, text = torch.randn(2, 6, 16).unbind()
loss = vlm_kernels.clip_loss(image, text, 10.0, backend="cpu")
reference = vlm_kernels.clip_loss(image, text, 10.0, backend="reference")
torch.testing.assert_close(loss, reference)
print(json.dumps([vlm_kernels.__file__, vlm_models.__file__, _load._C.__file__, _load.load_error]))
"""
    *files, error = json.loads(in_site(site, code).splitlines()[-1])
    assert error is None
    for file in files:
        assert Path(file).is_relative_to(site), f"{file} is not the wheel's"


def test_build_json_describes_the_build(site: Path) -> None:
    build = json.loads((site / "vlm_kernels/_build.json").read_text())
    assert build["torch"] == torch.__version__.split("+")[0]
    assert build["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    code = "import json, vlm_kernels._load as l; print(json.dumps(l._C.build_info()))"
    info = json.loads(in_site(site, code).splitlines()[-1])
    assert info["version"] == build["version"]
    assert info["torch"] == torch.__version__
    assert (info["cuda_version"] or "") == build["cuda"]
    assert "default" in info["isas"]


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlm_kernels", "vlm_models"}
    sources = {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in (
            ("vlm_kernels", ROOT / "vlm_kernels"),
            ("vlm_models", ROOT / "python/vlm_models"),
        )
        for file in folder.rglob("*.py*")
        if file.suffix in (".py", ".pyi")
    }
    assert sources <= set(names)
    assert "vlm_kernels/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_extension_needs_libtorch_and_no_cuda_library(site: Path) -> None:
    """libtorch.so pulls in libtorch_cuda, through which the CUDA stream's weak symbol resolves."""
    dynamic = run("readelf", "--dynamic", str(extension(site)), cwd=site)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.match(r"lib(cu|nv|torch_cuda|c10_cuda|gomp)", name)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_isa_objects_define_nothing_shared(wheel: Path) -> None:
    """A weak symbol compiled for AVX could replace its plain twin and crash an older CPU."""
    objects = [
        file
        for kind in ("auto", "cpu")
        for file in ROOT.glob(f"build/torch-*-{kind}/CMakeFiles/*_avx*.dir/**/*.o")
    ]
    if not objects:
        pytest.skip("needs objects per ISA, which only x86-64 builds have")
    for file in objects:
        isa = re.search(r"_(avx\w+)\.dir", str(file))
        assert isa
        symbols = run("nm", "--demangle", "--defined-only", str(file), cwd=ROOT).splitlines()
        shared = [
            line
            for line in symbols
            if line.split(maxsplit=2)[1] in "TWVuBDR" and f"isa_{isa[1]}::" not in line
        ]
        assert not shared, f"{file.relative_to(ROOT)} also defines {shared[:5]}"


def test_stub_agrees_with_the_extension(site: Path) -> None:
    """It declares the functions there are, and the ops with the arguments of their schemas."""
    code = """
import json, torch, vlm_kernels._load as l
names = [name for name in dir(l._C) if not name.startswith("_")]
schemas = {s.name: [a.name for a in s.arguments] for s in torch._C._jit_get_all_schemas()}
print(json.dumps({name: schemas.get("vlm_kernels::" + name) for name in names}))
"""
    arguments = json.loads(in_site(site, code).splitlines()[-1])
    stub = ast.parse((ROOT / "vlm_kernels/_C.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == arguments.keys()
    for name, expected in arguments.items():
        if expected is not None:
            assert [arg.arg for arg in functions[name].posonlyargs] == expected, name


def test_sdist_holds_what_the_build_needs(tmp_path: Path) -> None:
    in_tree(["setup.py", "-q", "sdist", "-d", str(tmp_path)], tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "vlm_kernels/py.typed"}
    for folder in ("csrc", "cmake"):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
        wanted |= {str(file.relative_to(ROOT)) for file in files}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]


def test_skipping_the_extension_gives_a_pure_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, env={"VLM_SKIP_EXT": "1"})
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith((".so", "_build.json"))]
    install(wheel, tmp_path / "site")
    code = "import vlm_kernels; from vlm_kernels import _load; print(_load._C, _load.FOLDER)"
    found, folder = in_site(tmp_path / "site", code).split()[-2:]
    assert found == "None"
    assert Path(folder).is_relative_to(tmp_path)


def test_setup_without_torch_names_the_fix(tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    output = run(sys.executable, "-c", code, cwd=ROOT, fails=True)
    assert "pip install torch" in output
    assert "pip install --no-build-isolation -e ." in output


def configure(folder: Path, cuda: str, fails: bool) -> str:
    """CMake's configuration on a machine without nvcc."""
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "cmake is a requirement of the build"
    options = ["-DVLM_CUDA=" + cuda, "-DPython_EXECUTABLE=" + sys.executable]
    command = [found, "-S", str(ROOT), "-B", str(folder / "build"), *options]
    return run(*command, cwd=folder, env={"CUDA_HOME": str(folder)}, fails=fails)


def test_asking_for_cuda_without_nvcc_names_the_fix(tmp_path: Path) -> None:
    output = " ".join(configure(tmp_path, "ON", fails=True).split())
    assert "there is no nvcc" in output
    assert "VLM_CUDA=OFF" in output
    assert "PATH" in output


def test_cuda_is_left_out_without_nvcc(tmp_path: Path) -> None:
    assert "off (no nvcc in CUDA_HOME" in configure(tmp_path, "AUTO", fails=False)
