"""`python -m vlm_kernels env | ops | explain OP | doctor`."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import os
import shlex
import sys
from typing import Any

import torch

import vlm_kernels

from . import _backends, _load, config
from .collect_env import main as print_env

_OLDEST_TORCH = (2, 11)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES |= {"fp64": torch.float64}


def _print_ops() -> None:
    """A table of ops x backends, then why a backend of the table cannot run in this process."""
    table = _backends.ops()
    width = max(map(len, table)) + 2
    print("op".ljust(width) + "".join(name.ljust(11) for name in _backends.ORDER))
    unavailable = {name: _backends.unavailable(name) for name in _backends.ORDER}
    for op, backends in table.items():
        cells = (
            ("no" if reason else "yes") if name in backends else "-"
            for name, reason in unavailable.items()
        )
        print(op.ljust(width) + "".join(cell.ljust(11) for cell in cells))
    used = {name for backends in table.values() for name in backends}
    for name, reason in unavailable.items():
        if reason and name in used:
            print(f"\n{name}: {reason}")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.replace(",", "x").split("x"))


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _required(op: str, shapes: list[tuple[int, ...]], **options: Any) -> list[Any]:
    """Values for the parameters of `op` that have no default: 1.0 where it may be a number, else a
    tensor; the shapes are used in turn, the last one for all that are left."""
    values: list[Any] = []
    remaining = list(shapes)
    for parameter in inspect.signature(getattr(vlm_kernels, op)).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            continue
        if "float" in str(parameter.annotation):
            values.append(1.0)
        else:
            shape = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            values.append(torch.empty(shape, **options))
    return values


def _explain(args: argparse.Namespace) -> int:
    known = _backends.ops()
    if args.op not in known:
        print(f"unknown op {args.op!r}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        required = _required(args.op, args.shape, dtype=_DTYPES[args.dtype], device=args.device)
        vlm_kernels.explain(args.op, *required, **dict(args.set))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        # torch names a device that is not there with any of the last two
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _torch() -> list[tuple[str, str]]:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _OLDEST_TORCH:
        return []
    oldest = ".".join(map(str, _OLDEST_TORCH))
    fix = f"{shlex.quote(sys.executable)} -m pip install 'torch>={oldest}'"
    return [(f"torch {torch.__version__} is older than {oldest}", fix)]


def _extension() -> list[tuple[str, str]]:
    if _load.load_error is None:
        return []
    what = _load.load_error.split(". To mend it: ")[0]
    build = _load.rebuild_command()
    if _load.shadowed_install() is None:
        return [(what, build)]
    return [(what, f"cd ~ (leave {_load.FOLDER.parent} to use the installed package), or {build}")]


def _variables() -> list[tuple[str, str]]:
    found = []
    isa_error = _load.apply_cpu_isa()
    if isa_error is not None:
        found.append((f"VLM_CPU_ISA is ignored: {isa_error}", "unset VLM_CPU_ISA"))
    for name in config.VARIABLES:
        try:
            config.get(name)
        except ValueError as error:
            if name != "VLM_CPU_ISA":
                found.append((str(error), f"unset {name}"))
    for name in sorted(os.environ):
        if name.startswith("VLM_") and name not in config.VARIABLES:
            close = difflib.get_close_matches(name, config.VARIABLES, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            found.append((f"{name} is not a variable of vlm_kernels{meant}", f"unset {name}"))
    return found


def _doctor() -> int:
    """Prints what is wrong and the command that mends it; 1 if there was anything."""
    problems = _torch() + _extension() + _variables()
    for what, fix in problems:
        print(f"problem: {what}\n    fix: {fix}")
    if _load._C is not None:
        print(f"info: the CPU kernels run on {_load._C.cpu_isa()}")
    missing = _backends.unavailable("triton")
    if missing is not None:
        print(f"info: {missing}; only GPU kernels need it")
    if torch.cuda.is_available() and _load._C is not None and not _load.build.get("cuda"):
        print("info: there is a GPU, but the extension was built without CUDA kernels")
    print(f"{len(problems)} problem(s) found" if problems else "nothing is wrong")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="what this machine and this installation are")
    env.add_argument("--json", action="store_true")
    commands.add_parser("ops", help="ops x backends")
    explain = commands.add_parser("explain", help="which backends can run a call, and why not")
    explain.add_argument("op", metavar="OP", help="such as clip_loss")
    explain.add_argument(
        "--shape",
        type=_shape,
        nargs="+",
        default=[(1024, 512)],
        metavar="NxD",
        help="of the tensor arguments in turn; the last one is used for the rest (1024x512)",
    )
    explain.add_argument("--dtype", choices=_DTYPES, default="fp32")
    explain.add_argument("--device", default="cpu")
    explain.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a keyword"
    )
    commands.add_parser("doctor", help="what is wrong, and the command that mends it")

    args = parser.parse_args(argv)
    if args.command == "explain":
        return _explain(args)
    if args.command == "doctor":
        return _doctor()
    if args.command == "ops":
        _print_ops()
    else:
        print_env(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
