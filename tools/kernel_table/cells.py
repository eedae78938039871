"""What the compile table has rows for: each launch that a file of kernels ships for an architecture, and each cell of
`tiles.json` where another backend runs instead.

Invariant: a launch that is shipped on one architecture is, on every other one, shipped or said to run instead.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dinox_model.kernels import tiles
from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.tiles import Instead, Launch

PACKAGES = ("dinox_model.kernels", "dinox_train.kernels")


@dataclass(frozen=True)
class Cell:
    """Where in the table: what tells two rows apart. `facts` are sorted (name, value) pairs."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int | None
    facts: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        width = [] if self.head_dim is None else [f"head_dim {self.head_dim}"]
        facts = [name if value is True else f"{name} {value}" for name, value in self.facts if value is not False]
        return " ".join([self.arch, self.kernel, self.dtype, *width, *facts])


def files() -> list[ModuleType]:
    """The files of kernels, by name: those that say how they are launched."""
    names = [
        found.name
        for package in PACKAGES
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    ]
    modules = [importlib.import_module(name) for name in sorted(names)]
    return [one for one in modules if getattr(getattr(one, "launches", None), "__module__", None) == one.__name__]


def cell_of(launch: Launch, arch: str) -> Cell:
    return Cell(launch.kernel, arch, launch.dtype, launch.head_dim, tuple(sorted(launch.facts.items())))


@functools.cache
def shipped(arch: str) -> dict[Cell, Launch]:
    """What is compiled for `arch`. ValueError: two launches that nothing tells apart."""
    found: dict[Cell, Launch] = {}
    for launch in itertools.chain.from_iterable(module.launches(arch) for module in files()):
        cell = cell_of(launch, arch)
        if cell in found:
            raise ValueError(f"two launches of {cell}: they need a fact that tells them apart")
        found[cell] = launch
    return found


def replaced(cell: Cell) -> Instead | None:
    """What runs there instead, where `tiles.json` says so."""
    if cell.kernel not in tiles.table():
        return None
    return tiles.instead(
        cell.kernel, arch=cell.arch, dtype=cell.dtype, head_dim=cell.head_dim, length=dict(cell.facts).get("length")
    )


def everywhere() -> Iterator[Cell]:
    """Every cell of the table: what is shipped on any architecture, on all of them."""
    kinds = {
        (cell.kernel, cell.dtype, cell.head_dim or 0, cell.facts): cell
        for arch in ARCHITECTURES
        for cell in shipped(arch)
    }
    for _, cell in sorted(kinds.items(), key=lambda pair: repr(pair[0])):
        for arch in ARCHITECTURES:
            yield Cell(cell.kernel, arch, cell.dtype, cell.head_dim, cell.facts)
