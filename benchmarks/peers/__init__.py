"""Who takes part in a row: our op, and how people compute it without us. A module an op."""

from __future__ import annotations

from types import ModuleType

from ..case import FALLBACKS, OURS, Provider
from . import attention, contrastive, patch_embed

__all__ = ["FALLBACKS", "MODULES", "OPS", "OURS", "Provider", "choose", "module", "named", "ours"]

MODULES: dict[str, ModuleType] = {
    "contrastive": contrastive,
    "attention": attention,
    "patch_embed": patch_embed,
}
"""Each has OPS, MODES, SHAPES, AXES, GROUPS, Case, overhead, cases, memory_cases, peers, ours."""
OPS = tuple(op for module in MODULES.values() for op in module.OPS)


def module(op: str) -> ModuleType:
    """The module of an op."""
    return next(module for module in MODULES.values() if op in module.OPS)


def peers(op: str) -> list[Provider]:
    """Every peer of an op."""
    return module(op).peers(op)


def floors(op: str) -> set[str]:
    """Names of peers that do only a part of the op."""
    return {peer.name for peer in peers(op) if peer.floor}


def choose(op: str, names: str) -> list[Provider]:
    """Peers of an op by name: "all", "none", or names with commas between them; with a minus
    before each, all but these.

    ValueError for a name that no op has; a name that only another op has is left out.
    """
    if names == "none":
        return []
    if names == "all":
        return peers(op)
    others = all(name.startswith("-") for name in names.split(","))
    wanted = {name.removeprefix("-") if others else name for name in names.split(",")}
    known = {peer.name for other in OPS for peer in peers(other)}
    if not wanted <= known:
        raise ValueError(
            f"unknown peer {', '.join(sorted(wanted - known))}; known: all, none, -name, "
            + ", ".join(sorted(known))
        )
    return [peer for peer in peers(op) if (peer.name in wanted) != others]


def ours(op: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Our public function."""
    return module(op).ours(op, workspace_mb, backend)


def named(op: str, name: str, workspace_mb: int | None = None, backend: str = "auto") -> Provider:
    """Ours or a peer, by its name."""
    return ours(op, workspace_mb, backend) if name == OURS else choose(op, name)[0]
