"""Choosing a backend, saying why not, and the environment variables that take part."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import vlm_kernels
from vlm_kernels import __main__ as cli
from vlm_kernels import _backends, _load, config

ODD = torch.zeros(3)
EVEN = torch.zeros(2)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose `cpu` wants an even length, in a process that has an extension without CUDA."""
    monkeypatch.setattr(_backends, "_REGISTRY", {})
    monkeypatch.setattr(_load, "_C", SimpleNamespace(cpu_isa=lambda: "default"))
    monkeypatch.setattr(_load, "build", {"cuda": False})
    monkeypatch.setattr(_load, "load_error", None)
    monkeypatch.setattr(_load, "_warned", set())
    monkeypatch.delenv("VLM_BACKEND", raising=False)
    for backend in ("reference", "cpu", "cuda"):  # not in the order of choice
        _backends.register("toy", backend, lambda x, *, scale=1.0: None)
    _backends.register("toy", "cpu", lambda x, *, scale=1.0: "odd length" if len(x) % 2 else None)


def _without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_C", None)
    monkeypatch.setattr(_load, "load_error", "no extension, because of the test")


def test_auto_takes_the_first_that_can_run() -> None:
    assert _backends.ops() == {"toy": ("cuda", "cpu", "reference")}
    assert _backends.select("toy", "auto", EVEN) == "cpu"
    assert _backends.select("toy", "auto", ODD, scale=2.0) == "reference"
    _load.build["cuda"] = True
    assert _backends.select("toy", "auto", ODD) == "cuda"


def test_explicit_runs_or_raises_with_every_reason() -> None:
    assert _backends.select("toy", "reference", EVEN) == "reference"
    with pytest.raises(RuntimeError) as error:
        _backends.select("toy", "cpu", ODD)
    lines = str(error.value).splitlines()
    assert lines[0] == "toy: backend 'cpu' cannot run this call: odd length"
    assert [line.split()[0] for line in lines[1:]] == list(_backends.ORDER)
    assert "built without CUDA" in lines[1]
    assert "has no triton kernel" in lines[3]
    assert "can run" in lines[4]


def test_nothing_can_run() -> None:
    _backends.register("toy", "reference", lambda x, *, scale=1.0: "not today")
    with pytest.raises(RuntimeError, match=r"no backend can run this call[^$]*odd[^$]*not today"):
        _backends.select("toy", "auto", ODD)


@pytest.mark.parametrize("name", ["triton", "cdua"])
def test_unknown_backend_lists_the_known(name: str) -> None:
    for call in (_backends.select, _backends.can_run):
        with pytest.raises(ValueError, match=rf"'{name}'.*cuda, cpu, reference"):
            call("toy", name, EVEN)


def test_unknown_names_at_registration_and_explain() -> None:
    with pytest.raises(ValueError, match="known: cuda, cpu, triton, reference"):
        _backends.register("toy", "tpu", lambda x: None)
    with pytest.raises(ValueError, match="unknown op 'toys'; known: toy"):
        _backends.explain("toys", EVEN)


def test_can_run_decides_and_explains() -> None:
    assert _backends.can_run("toy", "cpu", EVEN, raise_error=True)
    assert not _backends.can_run("toy", "cpu", ODD)
    with pytest.raises(RuntimeError, match="odd length"):
        _backends.can_run("toy", "cpu", ODD, raise_error=True)


def test_variable_replaces_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BACKEND", "reference")
    assert _backends.select("toy", "auto", EVEN) == "reference"
    assert _backends.select("toy", "cpu", EVEN) == "cpu"
    monkeypatch.setenv("VLM_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="odd length"):
        _backends.select("toy", "auto", ODD)
    monkeypatch.setenv("VLM_BACKEND", "triton")
    with pytest.raises(ValueError, match="environment variable VLM_BACKEND"):
        _backends.select("toy", "auto", EVEN)
    monkeypatch.setenv("VLM_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"VLM_BACKEND='fast'.*auto, cuda, cpu, triton, reference"):
        _backends.select("toy", "auto", EVEN)


def test_no_extension_warns_once_and_only_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_extension(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("toy", "reference", EVEN) == "reference"
    with pytest.warns(UserWarning, match="because of the test"):
        assert _backends.select("toy", "auto", EVEN) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("toy", "auto", EVEN) == "reference"
    with pytest.raises(RuntimeError, match="because of the test"):
        _backends.select("toy", "cpu", EVEN)


def test_explain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = vlm_kernels.explain("toy", ODD, scale=2.0)
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert lines[0] == "toy(float32[3] on cpu, scale=2.0)"
    assert [line.split()[0] for line in lines[1:]] == [*_backends.ORDER, "auto"]
    assert "odd length" in lines[2]
    assert lines[-1].endswith("runs reference")
    assert "call raises" in _backends.explain("toy", ODD, backend="cpu").splitlines()[-1]
    monkeypatch.setenv("VLM_BACKEND", "cpu")
    assert "cpu is asked for: it runs" in _backends.explain("toy", EVEN)


def test_select_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sees through the choice, without a graph break, and keeps no stale one."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if _backends.select("toy", "auto", x) == "cpu" else 2)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(EVEN).tolist() == [1, 1]
    assert compiled(ODD).tolist() == [2, 2, 2]
    monkeypatch.setenv("VLM_BACKEND", "reference")
    torch.compiler.reset()
    assert compiled(EVEN).tolist() == [2, 2]


def test_command_explain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def toy(x: torch.Tensor, factor: float | torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x * factor * scale

    monkeypatch.setattr(vlm_kernels, "toy", toy, raising=False)
    monkeypatch.setattr(_backends, "_REGISTRY", {})
    for backend in ("cpu", "reference"):
        _backends.register("toy", backend, lambda x, factor, *, scale=1.0: None)
    options = ["--shape", "4x2", "--dtype", "bf16", "--set", "scale=3"]
    assert cli.main(["explain", "toy", *options]) == 0
    assert "toy(bfloat16[4, 2] on cpu, 1.0, scale=3)" in capsys.readouterr().out
    assert cli.main(["explain", "toys"]) == 2
    assert "known: toy" in capsys.readouterr().err
    assert cli.main(["explain", "toy", "--set", "backend=cuda"]) == 2
    assert "has no backend 'cuda'" in capsys.readouterr().err


def test_command_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ops"]) == 0
    header, row, *rest = capsys.readouterr().out.splitlines()
    assert header.split() == ["op", "cuda", "cpu", "triton", "reference"]
    assert row.split() == ["toy", "no", "yes", "-", "yes"]
    assert any("built without CUDA" in line for line in rest)


@pytest.mark.parametrize("name", sorted(config.VARIABLES))
def test_unset_and_empty_are_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = config.VARIABLES[name]
    monkeypatch.delenv(name, raising=False)
    assert config.get(name) == variable.default
    monkeypatch.setenv(name, "")
    assert config.get(name) == variable.default
    for value in variable.choices:
        monkeypatch.setenv(name, value)
        assert config.get(name) == value


def test_table() -> None:
    assert len(config.VARIABLES) <= 8
    for variable in config.VARIABLES.values():
        assert variable.when in ("build", "run")
        assert variable.meaning
        assert not (variable.choices and variable.default) or variable.default in variable.choices
