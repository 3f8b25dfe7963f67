"""Runs these tests in Triton's interpreter, which has to be asked for before Triton is imported.

Another test of the same session may have imported Triton long ago (torch.compile does), and
Inductor must not see the variable. So without TRITON_INTERPRET=1 a file here is collected as one
test, which runs it in a process of its own. With it, `pytest tests/triton -k ...` works as usual.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Failed(Exception):
    """The output of a run whose tests did not all pass."""


class Run(pytest.Item):
    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("needs the package triton")
        # numpy reports what the kernels may well do: exponentials that overflow and are masked
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", str(self.path)],
            cwd=self.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise Failed(done.stdout)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style=None):  # type: ignore[no-untyped-def]
        if isinstance(excinfo.value, Failed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class Interpreted(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield Run.from_parent(self, name="in_the_interpreter")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Interpreted | None:
    return None if INTERPRETED else Interpreted.from_parent(parent, path=module_path)
