"""Published weights: one table of names a model, and files in the safetensors format.

A table maps each parameter of ours to the names it has had in transformers' state dicts, newest
first. `{i}` stands for the number of a layer, `{p}` for "weight" or "bias", and `<q|k|v>` for three
tensors that become one, stacked in that order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Table = Mapping[str, tuple[str, ...]]

SHOWN = 8  # names in an error


class Converted(NamedTuple):
    """`tensors` by our names, the names that nothing was found for, and those of no parameter."""

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]


def encoder_names(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Names of the layers of CLIP and of what transformers built after it."""
    return {
        f"{ours}.norm1.{{p}}": (f"{theirs}.layer_norm1.{{p}}",),
        f"{ours}.attn.qkv.{{p}}": (f"{theirs}.self_attn.<q|k|v>_proj.{{p}}",),
        f"{ours}.attn.proj.{{p}}": (f"{theirs}.self_attn.out_proj.{{p}}",),
        f"{ours}.norm2.{{p}}": (f"{theirs}.layer_norm2.{{p}}",),
        f"{ours}.mlp.fc1.{{p}}": (f"{theirs}.mlp.fc1.{{p}}",),
        f"{ours}.mlp.fc2.{{p}}": (f"{theirs}.mlp.fc2.{{p}}",),
    }


def convert(
    table: Table,
    parameters: Iterable[str],
    state_dict: Mapping[str, Tensor],
    prefixes: tuple[str, ...] = ("",),
) -> Converted:
    """Finds each of `parameters` in transformers' `state_dict`, under any of its names.

    Args:
        table: see the head of this file.
        parameters: our names.
        state_dict: tensors, or their gradients, by transformers' names; not changed.
        prefixes: what may stand before every name, as a model in a larger one has it.
    """
    tensors: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name in parameters:
        choices = [[p + n for n in names] for names in _names(table, name) for p in prefixes]
        # where one of three to be stacked is missing, that one is named
        best = max(choices, key=lambda names: sum(n in state_dict for n in names))
        parts = {n: state_dict[n] for n in best if n in state_dict}
        used |= parts.keys()
        if len(parts) < len(best):
            missing += [n for n in best if n not in parts]
        else:
            tensors[name] = torch.cat(list(parts.values())) if len(best) > 1 else parts[best[0]]
    return Converted(tensors, missing, sorted(state_dict.keys() - used))


def _names(table: Table, parameter: str) -> list[list[str]]:
    """transformers' names of one of our parameters: for each choice the tensors it is made of."""
    for ours, theirs in table.items():
        pattern = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)")
        pattern = pattern.replace(r"\{p\}", "(?P<p>weight|bias)")
        if match := re.fullmatch(pattern, parameter):
            return [_expand(name.format(**match.groupdict())) for name in theirs]
    raise KeyError(f"{parameter} is in no row of its model's table of names")


def _expand(name: str) -> list[str]:
    start, bracket, rest = name.partition("<")
    if not bracket:
        return [name]
    parts, _, end = rest.partition(">")
    return [start + part + end for part in parts.split("|")]


class Pretrained(nn.Module):
    """A model that loads published weights. A subclass says what they are called."""

    NAMES: ClassVar[Table] = {}
    PREFIXES: ClassVar[tuple[str, ...]] = ("",)
    IGNORED: ClassVar[str] = r".*\.position_ids"
    """Buffers and heads that this model has no use for: no error when they come."""

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies transformers' weights into this model, in its dtype and on its device.

        Args:
            state_dict: by the names of transformers 4 or 5, as `model.state_dict()` or the file of
                a published checkpoint has them.

        Raises:
            ValueError: weights are missing, unexpected or of another shape; all are named, in
                transformers' names, and the model is as it was.
        """
        own = self.state_dict()
        found, missing, unexpected = convert(self.NAMES, own, state_dict, self.PREFIXES)
        unexpected = [name for name in unexpected if not re.fullmatch(self.IGNORED, name)]
        shapes = [
            f"{name} {tuple(x.shape)}, expected {tuple(own[name].shape)}"
            for name, x in found.items()
            if _core(x) != _core(own[name])
        ]
        problems = [
            f"{what}: {_listed(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"{type(self).__name__}: these weights are not this model's. {'; '.join(problems)}"
            )
        self.load_state_dict({name: x.reshape(own[name].shape) for name, x in found.items()})

    def load_safetensors(self, path: str | Path) -> None:
        """`load_hf_state_dict` of a file, or of all files of a checkpoint's folder.

        Args:
            path: a .safetensors file, or a folder that has some.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: there is no such file.
            ValueError: as `load_hf_state_dict`.
        """
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("load_safetensors needs `pip install safetensors`") from error
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{type(self).__name__}: no .safetensors file at {path}")
        self.load_hf_state_dict({k: x for file in files for k, x in load_file(file).items()})

    def _take(self, peer: Any) -> None:
        """The weights of transformers' model, in its dtype and on its device."""
        first = next(peer.parameters())
        self.to(first.device, first.dtype).load_hf_state_dict(peer.state_dict())


def square(name: str, size: int | tuple[int, ...] | list[int]) -> int:
    """One side of a size that transformers' config may give as a pair."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name} is {size}, expected a square")
    return sides.pop()


def _core(x: Tensor) -> tuple[int, ...]:
    """The shape without the 1s in front, which parameters of one row come with or without."""
    shape = tuple(x.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
