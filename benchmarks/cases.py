"""The volumes that codec and packing are measured on: 512 x 512 series of DICOM folders, or the made-up phantom.

Invariant: results name a case by its folder's name and a digest of its pixels, never by anything of its headers.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.discover import FoundSeries, Grouper, scan, walk
from dinox_io.formats import READERS
from dinox_io.hounsfield import volume_digest
from dinox_io.series import SeriesRules
from dinox_io.volume import Volume

RESULTS = Path(__file__).with_name("results")
SIDE = 512
"""Rows and columns of the slices that are measured: what scanners reconstruct."""
PHANTOM_PATIENTS, PHANTOM_EVERY, PHANTOM_EVERY_QUICK = 6, 8, 56


class CasesError(ValueError):
    """There is nothing to measure on; the message says why."""


@dataclass(frozen=True)
class Case:
    """One volume under the name it has in results."""

    name: str
    volume: Volume

    def described(self) -> dict[str, Any]:
        """What a result keeps of it."""
        return {
            "name": self.name,
            "shape": list(self.volume.hu.shape),
            "sha256": volume_digest(self.volume.hu),
        }


def from_folders(folders: Sequence[Path]) -> list[Case]:
    """Every series of 512 x 512 that the packer would accept, of each folder. CasesError if one holds none."""
    return [case for folder in folders for case in _from_folder(folder)]


def series_of(folders: Sequence[Path]) -> list[FoundSeries]:
    """The series under the folders, under pseudonyms of a new key. CasesError if a folder is not there."""
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        raise CasesError(f"there is no {missing[0]}")
    grouper = Grouper(os.urandom(32))
    for scanned in scan(list(walk(folders, without=RESULTS))):
        grouper.add(scanned)
    return grouper.result()


def volumes_of(found: FoundSeries) -> tuple[list[Volume], list[str]]:
    """What the packer would make of a series, and what it would say of it."""
    paths = [Path(file.path) for file in found.files]
    read = READERS[found.format]
    volumes, rows = read(paths, series=found.series, patient=found.patient, rules=SeriesRules(), **found.given)
    return volumes, [row.reason for row in rows]


def _from_folder(folder: Path) -> list[Case]:
    volumes: list[Volume] = []
    reasons: set[str] = set()
    for found in series_of([folder]):
        read, said = volumes_of(found)
        volumes += [one for one in read if one.hu.shape[1:] == (SIDE, SIDE)]
        reasons |= set(said)
    if not volumes:
        why = "; ".join(sorted(reasons)[:3]) or "no CT series"
        raise CasesError(f"{folder} holds no series of {SIDE} x {SIDE} that can be packed: {why}")
    name = folder.resolve().name
    volumes.sort(key=lambda one: volume_digest(one.hu))
    return [Case(name if len(volumes) == 1 else f"{name} {n}", one) for n, one in enumerate(volumes, 1)]


def phantom(*, quick: bool, side: int = SIDE) -> list[Case]:
    """Slices of the first patients of the phantom that have as many rows as columns: every 8th of each series, so that
    thin series count as much as in the phantom (every 56th if `quick`)."""
    export, studies = _phantom_modules()
    cases: list[Case] = []
    for number in range(PHANTOM_PATIENTS):
        study = studies.StudyPlan(seed=0, size=side, slices=56, number=number)
        if study.grid.rows != study.grid.columns:
            continue
        for series in studies.plan_series(study):
            indices = range(0, series.count, PHANTOM_EVERY_QUICK if quick else PHANTOM_EVERY)
            hu = np.stack([export.stored_values(series, series.slice_hu(index)) for index in indices])
            hu = np.clip(hu + study.storage.intercept, -32768, 32767).astype(np.int16)
            name = f"phantom {number} {series.protocol.kernel.lower()} {series.protocol.spacing_mm:g} mm"
            cases.append(Case(name, _made_up(name, hu, study.grid.pixel_mm)))
    return cases


def _made_up(name: str, hu: np.ndarray, pixel_mm: float) -> Volume:
    pseudonym = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Volume(
        id=pseudonym,
        series=pseudonym,
        patient=pseudonym,
        hu=hu,
        spacing_mm=(5.0, pixel_mm, pixel_mm),
        z_positions_mm=tuple(5.0 * z for z in range(len(hu))),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    )


def write_phantom(folder: Path, *, series: int, side: int, slices: int) -> Path:
    """Write so many series of the phantom as DICOM, patient after patient (there is no end of them); returns `folder`.

    `slices`: of a series of 5 mm; thinner ones have more.
    """
    export, studies = _phantom_modules()
    plans = (studies.plan_series(studies.StudyPlan(seed=0, size=side, slices=slices, number=n)) for n in count())
    for number, plan in enumerate(islice(chain.from_iterable(plans), series)):
        export.write_series(plan, folder / f"series-{number:05d}", lambda: None)
    return folder


def _phantom_modules() -> tuple[Any, Any]:
    """The phantom's parts (a folder of tools/, which is no package): its DICOM export, its studies."""
    tools = str(Path(__file__).resolve().parent.parent / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    return import_module("phantom.dicom_export"), import_module("phantom.study")


def write_arrays(cases: Sequence[Case], folder: Path) -> None:
    """What the workers read: the volumes as int16 arrays, one `.npy` each, in order."""
    folder.mkdir()
    for number, case in enumerate(cases):
        np.save(folder / f"{number:04d}.npy", case.volume.hu, allow_pickle=False)
