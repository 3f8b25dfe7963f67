"""Which backend runs a call, and why the others cannot: one registry decides and explains both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from . import _load, config

ORDER = ("cuda", "cpu", "triton", "reference")  # "auto" takes the first that can run

WhyNot = Callable[..., "str | None"]

_REGISTRY: dict[str, dict[str, WhyNot]] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def register(op: str, backend: str, why_not: WhyNot) -> None:
    """Makes `backend` a choice for `op`.

    `why_not` takes the op's own arguments and returns None if the backend can run them, or the
    reason in words. What holds for every call (no extension, no Triton) is checked before it.
    """
    if backend not in ORDER:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(ORDER)}")
    known = {**_REGISTRY.get(op, {}), backend: why_not}
    _REGISTRY[op] = {name: known[name] for name in ORDER if name in known}


def ops() -> dict[str, tuple[str, ...]]:
    """The registered ops and, in order of choice, the backends of each."""
    return {op: tuple(backends) for op, backends in sorted(_REGISTRY.items())}


def unavailable(backend: str) -> str | None:
    """Why `backend` can run nothing at all in this process, or None."""
    if backend in ("cpu", "cuda") and _load._C is None:
        return _load.load_error
    if backend == "cuda" and not _load.build.get("cuda"):
        return "the extension was built without CUDA kernels"
    if backend == "triton" and not _HAS_TRITON:
        return "the package triton is not installed"
    return None


def _registered(op: str) -> dict[str, WhyNot]:
    try:
        return _REGISTRY[op]
    except KeyError:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(_REGISTRY))}") from None


def _why_not(op: str, backend: str, *args: Any, **kwargs: Any) -> str | None:
    return unavailable(backend) or _registered(op)[backend](*args, **kwargs)


def _reasons(op: str, *args: Any, **kwargs: Any) -> str:
    registered = _registered(op)
    lines = []
    for backend in ORDER:
        if backend in registered:
            reason = _why_not(op, backend, *args, **kwargs)
        else:
            reason = f"{op} has no {backend} kernel"
        lines.append(f"  {backend:<10} {'can run' if reason is None else f'cannot: {reason}'}")
    return "\n".join(lines)


def _check_name(op: str, backend: str, source: str) -> None:
    registered = _registered(op)
    if backend not in registered:
        known = ", ".join(("auto", *registered))
        raise ValueError(f"{op} has no backend {backend!r} ({source}); it has {known}")


def can_run(op: str, backend: str, *args: Any, raise_error: bool = False, **kwargs: Any) -> bool:
    """Whether `backend` can run `op` on these arguments.

    With `raise_error`, a RuntimeError says why not, and what each other backend could do. A name
    that the op does not have is a ValueError either way.
    """
    _check_name(op, backend, "asked of can_run")
    reason = _why_not(op, backend, *args, **kwargs)
    if reason is not None and raise_error:
        raise RuntimeError(
            f"{op}: backend {backend!r} cannot run this call: {reason}\n"
            f"{_reasons(op, *args, **kwargs)}"
        )
    return reason is None


def select(op: str, requested: str, *args: Any, **kwargs: Any) -> str:
    """The backend that runs `op` on these arguments.

    "auto" is VLM_BACKEND where that is set, else the first of `ORDER` that can run. Anything else
    must run: ValueError for a name that the op does not have, RuntimeError with the reasons of each
    backend where it cannot.
    """
    # this runs in every call: no helper with *args in between, and no text before it is needed
    source = "the argument backend="
    if requested == "auto":
        requested = config.get("VLM_BACKEND")
        source = "the environment variable VLM_BACKEND"
    if requested != "auto":
        _check_name(op, requested, source)
        if unavailable(requested) or _REGISTRY[op][requested](*args, **kwargs):
            can_run(op, requested, *args, raise_error=True, **kwargs)
        return requested
    for backend, why_not in _registered(op).items():
        if unavailable(backend) is None and why_not(*args, **kwargs) is None:
            if backend == "reference" and _load._C is None:
                _warn_reference(op)
            return backend
    raise RuntimeError(f"{op}: no backend can run this call\n{_reasons(op, *args, **kwargs)}")


def _warn_reference(op: str) -> None:
    if not torch.compiler.is_compiling():
        _load.warn_once(
            "reference",
            f"{op} and other ops run on their plain PyTorch reference, slower and with more "
            f"memory: {_load.load_error}",
            stacklevel=6,  # warn_once, this, select, the op's own choice, the op, its caller
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} on {value.device}"
    return repr(value)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """One line a backend: whether it can run `op` on these arguments, or why not; then the choice.

    A `backend=` among the arguments is what is asked for, as in the call itself.
    """
    requested = kwargs.pop("backend", "auto")
    shown = [_describe(arg) for arg in args]
    shown += [f"{name}={_describe(value)}" for name, value in kwargs.items()]
    lines = [f"{op}({', '.join(shown)})", _reasons(op, *args, **kwargs)]
    if requested == "auto":
        requested = config.get("VLM_BACKEND")
    if requested == "auto":
        able = (name for name in _registered(op) if can_run(op, name, *args, **kwargs))
        lines.append(f"  auto runs {next(able, 'nothing: the call raises')}")
    else:
        _check_name(op, requested, "asked for")
        runs = can_run(op, requested, *args, **kwargs)
        lines.append(f"  {requested} is asked for: {'it runs' if runs else 'the call raises'}")
    return "\n".join(lines)
