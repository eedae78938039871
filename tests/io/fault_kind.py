"""What a kind of fault is: how to write a scan that has it, what packing it must give; the table of all kinds.

Invariant: nothing of dinox_io is used here: what must come out is not computed by what is tested.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.io.random_scan import Change, Scan


@dataclass(frozen=True)
class Expected:
    """What packing must give: volumes (int16 HU), rows of the report, facts of the volume's record."""

    volumes: list[np.ndarray] = field(default_factory=list)
    rows: dict[tuple[str | None, str], int] = field(default_factory=dict)
    """(SeriesInstanceUID or None for files of no series, code) -> files."""
    facts: dict[str, Any] = field(default_factory=dict)
    tolerance_hu: int = 0


Make = Callable[[Scan, Path], Expected]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how to write it, and the cases of the ground truth (expected.json) that are of this kind."""

    make: Make
    cases: tuple[str, ...]
    rules: dict[str, Any]
    syntax: str | None
    """The only transfer syntax that a scan of this kind can be asked for in; None: any."""


KINDS: dict[str, Kind] = {}


def kind(*cases: str, syntax: str | None = None, **rules: Any) -> Callable[[Make], Make]:
    """Put a function into the table; `rules`: those of SeriesRules under which its scan is packed."""

    def register(make: Make) -> Make:
        KINDS[make.__name__] = Kind(make, cases, rules, syntax)
        return make

    return register


def accepted(scan: Scan, *, dropped: dict[str, int] | None = None, **facts: Any) -> Expected:
    """The scan as it is; `dropped`: rows that say what was left out of it."""
    return Expected([scan.hu], {(scan.uid, code): files for code, files in (dropped or {}).items()}, facts)


def refused(scan: Scan, code: str, files: int | None = None) -> Expected:
    """No volume, and this row (default: as many files as slices)."""
    return Expected(rows={(scan.uid, code): scan.count if files is None else files})


def setting(**values: Any) -> Change:
    """A change that sets attributes in every slice; None removes one."""

    def change(_: int, dataset: Dataset) -> None:
        for keyword, value in values.items():
            if value is not None:
                setattr(dataset, keyword, value)
            elif keyword in dataset:
                delattr(dataset, keyword)

    return change


def one_item(**values: Any) -> Sequence:
    """A sequence of one item."""
    item = Dataset()
    setting(**values)(0, item)
    return Sequence([item])
