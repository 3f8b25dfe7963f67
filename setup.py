"""Builds vlm_kernels._C by driving CMake; everything else about the package is in pyproject.toml.

Environment: VLM_CUDA=AUTO|ON|OFF, VLM_CUDA_ARCHS="80;90", VLM_SKIP_EXT=1 (pure Python),
VLM_SANITIZE=address,undefined, MAX_JOBS, CMAKE_ARGS.
"""

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_version() -> str:
    """torch's version, read without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"error: vlm_kernels is built against the torch you run it with, and {sys.executable} "
            "has none.\n  Install it first:  pip install torch\n"
            "  then build here:   pip install --no-build-isolation -e .\n"
            "  (without --no-build-isolation pip hides the installed torch from the build)"
        )
    return str(runpy.run_path(f"{spec.submodule_search_locations[0]}/version.py")["__version__"])


def find_tool(name: str) -> str | None:
    """A tool of this interpreter's environment (as a wheel installs it), or else of PATH."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return shutil.which(name, path=folders)


def require_tool(name: str) -> str:
    tool = find_tool(name)
    if tool is None:
        sys.exit(
            f"error: building vlm_kernels needs {name}, which is not on PATH: pip install {name}"
        )
    return tool


def commit() -> str:
    """The commit being built; the file COMMIT names it where the tree travels without .git."""
    if (ROOT / ".git").exists():  # without it, git would find another project's further up
        command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]
        try:
            return subprocess.check_output(command, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git, or no commit yet
    file = ROOT / "COMMIT"
    return file.read_text().strip() if file.is_file() else ""


def max_jobs() -> int:
    """Compilers to run at once: one a core, and 2 GiB of memory each."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


class CMakeBuild(build_ext):
    """Configures and builds in a folder per torch, Python and kind of build; copies the result."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("VLM_CUDA", "AUTO").upper()
        sanitize = os.environ.get("VLM_SANITIZE", "")
        kind = "cpu" if cuda == "OFF" else "auto"
        tag = "-".join(filter(None, [sys.implementation.cache_tag, kind, *sanitize.split(",")]))
        build = ROOT / "build" / f"torch-{torch_version()}-{tag}"
        flags = {
            "CMAKE_MAKE_PROGRAM": require_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "VLM_CUDA": cuda,
            "VLM_CUDA_ARCHS": os.environ.get("VLM_CUDA_ARCHS", "80;90").replace(",", ";"),
            "VLM_SANITIZE": sanitize,
            "VLM_COMMIT": commit(),
        }
        launcher = find_tool("ccache") or find_tool("sccache")
        if launcher:
            flags["CMAKE_CXX_COMPILER_LAUNCHER"] = flags["CMAKE_CUDA_COMPILER_LAUNCHER"] = launcher
        cache = build / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the tree has moved, and CMake would refuse to go on
        cmake = require_tool("cmake")
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        options = [f"-D{name}={value}" for name, value in flags.items()]
        self.call(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options, *extra)
        self.call(cmake, "--build", str(build), "--parallel", str(max_jobs()))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in (target.name, "_build.json"):
            self.install(build / name, target.with_name(name))

    def copy_extensions_to_source(self) -> None:
        """Called for editable and in-place builds, when build_lib has been filled."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for name in (built.name, "_build.json"):
                self.install(built.with_name(name), ROOT / "vlm_kernels" / name)

    def get_outputs(self) -> list[str]:
        files = super().get_outputs()
        return files + [str(Path(file).with_name("_build.json")) for file in files]

    @staticmethod
    def install(source: Path, target: Path) -> None:
        """Copies by renaming: a process that has the old file open keeps it whole."""
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(source, temporary)
        temporary.replace(target)

    @staticmethod
    def call(*command: str) -> None:
        print("+", shlex.join(command), flush=True)
        try:
            subprocess.check_call(command)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: building vlm_kernels failed (status {error.returncode}); see above")


skip = os.environ.get("VLM_SKIP_EXT", "0") not in ("", "0")
setup(
    ext_modules=[] if skip else [Extension("vlm_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
