"""What is scanned and how: the protocols, and for each patient a plan that holds everything the files will say.

Variety goes by the patient's number, not by chance, so that a small phantom has it all; sizes and places are drawn.
Invariant: a plan is a pure function of (seed, size, slices, number): more patients leave the earlier ones as they are.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from phantom.anatomy import Patient, draw_patient, render
from phantom.body import outer_half_axes
from phantom.grid import Array, Grid
from phantom.noise import overlap_share, slice_noise

THICKEST_MM = 5.0
PADDING_STORED = -2000


@dataclass(frozen=True)
class Protocol:
    """A reconstruction: slice geometry, and the kernel: noise in the middle of the body, its blur, the edges' width."""

    description: str
    kernel: str
    spacing_mm: float
    thickness_mm: float
    sigma_hu: float
    blur_px: float
    edge_px: float


def _soft(spacing_mm: float, thickness_mm: float) -> Protocol:
    return Protocol(f"CHEST {thickness_mm:g} SOFT", "SOFT", spacing_mm, thickness_mm, 11.0, SOFT_BLUR_PX, 1.6)


def _sharp(spacing_mm: float) -> Protocol:
    return Protocol(f"CHEST {spacing_mm:g} LUNG", "LUNG", spacing_mm, spacing_mm, 22.0, SHARP_BLUR_PX, 1.1)


SOFT_BLUR_PX, SHARP_BLUR_PX = 1.0, 0.9
# The series of patient n are those of row n modulo the number of rows.
PROTOCOLS: tuple[tuple[Protocol, ...], ...] = (
    (_soft(5.0, 5.0),),
    (_soft(2.5, 2.5),),
    (_soft(5.0, 5.0), _sharp(1.25)),
    (_soft(3.0, 4.0),),
    (_soft(5.0, 5.0), _sharp(5.0)),
    (_soft(5.0, 5.0),),
)


@dataclass(frozen=True)
class Storage:
    """How a scanner stores HU: stored = HU - intercept."""

    signed: bool
    bits: int
    intercept: int
    padded: bool  # -2000 beyond the reconstruction circle


STORAGES = (Storage(True, 16, -1024, True), Storage(False, 12, -1024, False), Storage(True, 16, 0, False))


@dataclass(frozen=True)
class Export:
    """Habits of the station that wrote the files."""

    implicit: bool
    descending: bool  # InstanceNumber runs against z
    position: str
    file_name: str


@dataclass(frozen=True)
class StudyPlan:
    """One patient's examination."""

    seed: int
    size: int
    slices: int
    number: int  # from 0

    def random(self, purpose: int) -> np.random.Generator:
        """An independent source for each purpose."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, purpose, self.number))))

    def uid(self, name: str) -> str:
        """A valid UID under 2.25 (DICOM PS3.5 annex B.2), a pure function of the plan and the name."""
        text = f"dinox phantom 1/{self.seed}/{self.size}/{self.slices}/{self.number}/{name}"
        return f"2.25.{uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4).int}"

    @cached_property
    def patient(self) -> Patient:
        return draw_patient(self.random(1), self.slices * THICKEST_MM)

    @property
    def patient_id(self) -> str:
        return f"PHANTOM-{self.seed}-{self.number + 1:02d}"

    @property
    def patient_name(self) -> str:
        return f"PHANTOM^{self.number + 1:02d}"

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        return PROTOCOLS[self.number % len(PROTOCOLS)]

    @property
    def storage(self) -> Storage:
        return STORAGES[self.number % len(STORAGES)]

    @property
    def export(self) -> Export:
        return Export(
            implicit=self.number % 4 == 2,
            descending=self.number % 2 == 1,
            position="FFS" if self.number % 6 == 5 else "HFS",
            file_name=("IM_{:04d}", "{:08d}.dcm", "I{:07d}")[self.number % 3],
        )

    @cached_property
    def grid(self) -> Grid:
        """A field of view that holds the chest; one patient in six has fewer rows than columns."""
        body = self.patient.body
        chest = 2.0 * outer_half_axes(body, 0.4 * body.lung_height)[0]
        field_mm = float(np.clip(10.0 * np.ceil((chest + self.random(2).uniform(12.0, 45.0)) / 10.0), 300.0, 460.0))
        rows = self.size * 7 // 8 if self.number % 6 == 3 else self.size
        return Grid(rows, self.size, round(field_mm / self.size, 6))

    @cached_property
    def noise_spread(self) -> Array:
        """Relative noise of each pixel, float32 (rows, columns): 1 in the middle of the body, where the fewest photons
        arrive, 0.55 at the skin and beyond."""
        half_x, half_y = outer_half_axes(self.patient.body, 0.4 * self.patient.body.lung_height)
        square = (self.grid.x[None, :] / half_x) ** 2 + (self.grid.y[:, None] / half_y) ** 2
        return np.asarray(0.55 + 0.45 * np.maximum(1.0 - square, 0.0), np.float32)

    @cached_property
    def origin_mm(self) -> tuple[float, float, float]:
        """Where the body's axis at the scan's lowest slice lies in the scanner's coordinates (x, y, z)."""
        x, y, z = self.random(3).uniform((-8.0, -175.0, -900.0), (8.0, -120.0, -150.0)).tolist()
        return round(x, 1), round(y, 1), round(z, 1)


@dataclass(frozen=True)
class SeriesPlan:
    """One series of a study; slices count from 0 in ascending z."""

    study: StudyPlan
    number: int  # from 0
    protocol: Protocol

    @property
    def uid(self) -> str:
        return self.study.uid(f"series {self.number}")

    @property
    def count(self) -> int:
        return max(3, round(self.study.slices * THICKEST_MM / self.protocol.spacing_mm))

    @property
    def heights_mm(self) -> Array:
        """Height of each slice in the body, ascending."""
        return self.study.patient.z_low + np.arange(self.count) * self.protocol.spacing_mm

    @property
    def offset_mm(self) -> float:
        """What takes a height in the body to the z of the files."""
        return self.study.origin_mm[2] - self.study.patient.z_low

    def position_mm(self, index: int) -> tuple[float, float, float]:
        """ImagePositionPatient: the centre of the first pixel."""
        grid, origin = self.study.grid, self.study.origin_mm
        z = origin[2] + index * self.protocol.spacing_mm
        return round(float(grid.x[0]) + origin[0], 3), round(float(grid.y[0]) + origin[1], 3), round(z, 3)

    def slice_hu(self, index: int) -> np.ndarray[Any, np.dtype[np.int16]]:
        """The slice as reconstructed: anatomy plus noise, rounded to whole HU, int16 (rows, columns)."""
        study, protocol, grid = self.study, self.protocol, self.study.grid
        clean = render(
            study.patient,
            grid,
            float(self.heights_mm[index]),
            edge_mm=protocol.edge_px * grid.pixel_mm,
            thickness_mm=protocol.thickness_mm,
        )
        noise = slice_noise(
            grid.rows,
            grid.columns,
            sigma_hu=protocol.sigma_hu,
            blur_px=protocol.blur_px,
            overlap=overlap_share(protocol.thickness_mm, protocol.spacing_mm),
            key=(study.seed, 4, study.number, self.number),
            index=index,
        )
        return np.rint(clean + study.noise_spread * noise).astype(np.int16)


def plan_series(study: StudyPlan) -> list[SeriesPlan]:
    """The CT series of a study."""
    return [SeriesPlan(study, number, protocol) for number, protocol in enumerate(study.protocols)]
