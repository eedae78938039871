#!/usr/bin/env python3
"""Write a seeded, believable chest-CT study as DICOM files, with exact labels for its nodules.

Nobody in it exists. The same seed and options give the same bytes. What it holds is described in docs/phantom.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from phantom.dicom_export import write_series
from phantom.nodules import mark
from phantom.study import SeriesPlan, StudyPlan, plan_series
from phantom.surroundings import series_folder, write_around_study, write_rubbish

from dinox_io.atomic import replace_folder, temporary_path
from dinox_io.labels import Mark, label_path, write_labels

RECORD = "phantom.json"
VERSION = 2


class PhantomError(ValueError):
    """The phantom cannot be written there; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """What decides every byte."""

    patients: int
    slices: int
    size: int
    seed: int


class Progress(Protocol):
    """Told of every slice and every finished patient."""

    def slice_done(self) -> None: ...

    def patient_done(self, text: str) -> None: ...


class _Lines:
    def slice_done(self) -> None:
        pass

    def patient_done(self, text: str) -> None:
        print(text, flush=True)


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def slice_done(self) -> None:
        self._bar.advance(self._task)

    def patient_done(self, text: str) -> None:
        self._bar.console.print(text, highlight=False)


@contextlib.contextmanager
def _progress(slices: int) -> Iterator[Progress]:
    """A bar in a terminal, a line a patient elsewhere."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("slices"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns) as bar:
        yield _Bar(bar, bar.add_task("slices", total=slices))


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a finished phantom in `folder`; None where it holds nothing. Else PhantomError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["phantom"] == VERSION:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise PhantomError(
        f"{folder} is not empty and is no phantom of this version: nothing was changed. Name a new or empty folder."
    )


def write_study(study: StudyPlan, folder: Path, progress: Progress) -> tuple[list[Mark], int]:
    """Write all files of one study; returns the marks of its nodules and the number of files beside its CT slices."""
    marks: list[Mark] = []
    projections = []
    series = plan_series(study)
    for one in series:
        projections.append(write_series(one, folder / series_folder(one), progress.slice_done))
        marks += _marks(one)
    return marks, write_around_study(study, folder, series[0], projections[0])


def _marks(series: SeriesPlan) -> list[Mark]:
    study = series.study
    found = (
        mark(
            nodule,
            series=series.uid,
            target=1000 * (study.number + 1) + number,
            grid=study.grid,
            z_mm=series.heights_mm,
            offset_mm=series.offset_mm,
        )
        for number, nodule in enumerate(study.patient.nodules, start=1)
    )
    return [one for one in found if one is not None]


def make(folder: Path, options: Options) -> dict[str, Any]:
    """Write the phantom to `folder` (new or empty), whole or not at all; returns its record.

    Raises PhantomError where the folder holds something else or a phantom of other options.
    """
    record = record_of(folder)
    if record is not None:
        if record["options"] != asdict(options):
            raise PhantomError(
                f"{folder} is a phantom of other options ({_spell(record['options'])}). Name another or delete it."
            )
        return record
    studies = [StudyPlan(options.seed, options.size, options.slices, number) for number in range(options.patients)]
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # what a run that was killed has left
    temporary.mkdir(parents=True)
    record = _write_all(temporary, studies, options)
    if folder.exists():
        folder.rmdir()
    replace_folder(temporary, folder)
    return record


def _write_all(folder: Path, studies: list[StudyPlan], options: Options) -> dict[str, Any]:
    marks: list[Mark] = []
    others = 0
    total = sum(series.count for study in studies for series in plan_series(study))
    with _progress(total) as progress:
        for study in studies:
            place = folder / "dicom" / f"PA{study.number + 1:06d}" / "ST000001"
            found, beside = write_study(study, place, progress)
            marks += found
            others += beside
            text = ", ".join(
                f"{s.count} × {s.protocol.spacing_mm:g} mm {s.protocol.kernel}" for s in plan_series(study)
            )
            progress.patient_done(f"{study.patient_name}: {text}; {len(study.patient.nodules)} nodules")
    others += write_rubbish(folder / "dicom", studies[0])
    write_labels(label_path(folder, "nodules"), marks)
    record = {
        "phantom": VERSION,
        "options": asdict(options),
        "patients": len(studies),
        "series": sum(len(plan_series(study)) for study in studies),
        "slices": total,
        "other_files": others,
        "nodules": sum(len(study.patient.nodules) for study in studies),
        "marks": len(marks),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _spell(options: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items())


def _whole(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    parse.__name__ = "whole number"  # argparse names the type by it in its messages
    return parse


def parse_arguments(arguments: list[str] | None) -> tuple[Path, Options]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python tools/make_phantom.py demo/phantom --patients 6 --size 256"
    )
    parser.add_argument(
        "output", type=Path, help="folder to write: new, empty, or already this phantom (then nothing is done)"
    )
    parser.add_argument("--patients", type=_whole(1, 99), default=12, help="number of patients (default 12)")
    parser.add_argument(
        "--slices",
        type=_whole(3, 64),
        default=56,
        help="length of each scan, in slices of 5 mm (default 56: the whole chest); thinner series have more slices",
    )
    parser.add_argument(
        "--size", type=_whole(32, 1024), default=256, help="columns of the matrix (default 256; scanners: 512)"
    )
    parser.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, help="another seed, other people (default 0)")
    values = parser.parse_args(arguments)
    return values.output, Options(values.patients, values.slices, values.size, values.seed)


def main(arguments: list[str] | None = None) -> int:
    """Exit 0 written or there already, 1 cannot be written, 2 usage or a folder of something else, 130 interrupted."""
    folder, options = parse_arguments(arguments)
    begin = time.monotonic()
    try:
        existed = record_of(folder) is not None
        record = make(folder, options)
    except PhantomError as error:
        print(f"make_phantom: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_phantom: cannot write: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_phantom: interrupted; the same command begins again", file=sys.stderr)
        return 130
    took = "was there already" if existed else f"written in {time.monotonic() - begin:.0f} s"
    print(
        f"{folder}: {took}. {record['patients']} patients, {record['series']} CT series, {record['slices']} slices, "
        f"{record['nodules']} nodules, {record['other_files']} files that are no CT volume.\n"
        f"DICOM files: {folder / 'dicom'}\nLabels: {folder / 'labels' / 'nodules.jsonl'} ({record['marks']} marks)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
