"""What packing a series yields: a `Volume` of Hounsfield units, or a `Rejection` that says why there is none.

Invariant: neither holds anything that identifies a patient. Ids are keyed pseudonyms and `facts` are the values that
`privacy.py` lets through, so that both may be written to a shard, listed in a report or printed.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One contiguous stack of equally spaced axial slices.

    Shapes and units: `hu` is int16 of shape (z, y, x), C-contiguous, in Hounsfield units, z ascending along the slice
    normal, whose patient-z component is positive; spacings and positions are in mm.
    """

    id: str
    """`series`; or "<32 hex>-1", "<32 hex>-2" … for the contiguous runs of a series that was split at its gaps."""
    series: str
    """Series pseudonym, 32 hex digits."""
    patient: str
    """Patient pseudonym, 32 hex digits."""
    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    """(z, y, x): between slices, between rows, between columns."""
    z_positions_mm: tuple[float, ...]
    """Projection of each slice's position on the normal, ascending."""
    orientation: tuple[float, ...]
    """9 direction cosines (patient axes): along a row (x), along a column (y), the slice normal (z)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values merged into the volume record: per-slice facts, kernel, kVp, what was dropped, rounded, saturated."""

    def __post_init__(self) -> None:
        if self.hu.dtype != np.int16 or self.hu.ndim != 3 or not self.hu.flags.c_contiguous:
            raise ValueError(
                f"volume {self.id}: hu must be C-contiguous int16 (z, y, x), not {self.hu.dtype} {self.hu.shape}"
            )
        if len(self.z_positions_mm) != self.hu.shape[0] or len(self.orientation) != 9 or len(self.spacing_mm) != 3:
            raise ValueError(
                f"volume {self.id}: positions, orientation or spacing do not fit its {self.hu.shape[0]} slices"
            )


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """One line of `rejected.jsonl`: a series or a kind of foreign file that was not packed whole, and what to do."""

    code: str
    """A stable UPPER_CASE name."""
    reason: str
    """What was found, with its figures; free of identifying text."""
    series: str | None
    """Series pseudonym; None for files that belong to no series."""
    files: int
    """How many files this line stands for."""
    hint: str
    """What the user can do about it."""
