"""Draw a set of shards for people to look at before they train: see `--help`."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from preview.listing import PERCENTILES, Row, write_listing
from preview.sample import draw_samples
from preview.sheet import draw_sheet, read_volume, short_value

from dinox_io import ShardError, ShardSet, VolumeRecord, open_shards
from dinox_io.atomic import temporary_path
from dinox_io.hounsfield import HISTOGRAM_BIN_HU, HU_MIN
from dinox_io.pipeline import default_threads
from dinox_io.progress import ProgressReport
from dinox_io.verify import is_set_folder
from dinox_io.workers import Failure, WorkerPool

_EXAMPLES = """\
examples:
  python tools/preview_shards.py shards                       a sheet of every volume and index.html, in shards-preview/
  python tools/preview_shards.py shards --limit 20            of the first 20
  python tools/preview_shards.py shards --volumes 3f0a… 91c2…  of these (volumes, series or patients)
  python tools/preview_shards.py shards --sample 10           10 random windows of the whole set, 20 a page

What to look for: the coronal and sagittal pictures show a wrong order or a gap at once; air stands at -1000 HU, water
at 0 (another place of the peaks: a wrong rescale); text in a picture may be a name. Nothing but what the shards hold is
shown, and they hold no names; a face is still a face.

exit code: 0 all were drawn; 1 the set or a volume is damaged (the others are drawn); 2 the command cannot be carried
           out as it stands; 130 interrupted (what was drawn is whole)
"""


class PreviewError(Exception):
    """The command cannot be carried out: what, and what to do."""


@dataclass
class Drawn:
    """What came of the sheets so far."""

    rows: list[Row]
    damaged: dict[str, str]
    """Id of a volume -> what is wrong with it."""


@dataclass(frozen=True)
class SheetTask:
    """A sheet to draw, in a worker."""

    folder: str
    volume: int
    path: str


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Draw a contact sheet (PNG) of each volume of a set, or a page of random windows.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="OUT", type=Path, help="folder that pack_shards made")
    command.add_argument(
        "--output", metavar="DIR", type=Path, help="where the pictures go, not inside OUT (default: OUT-preview)"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--volumes", metavar="PSEUDONYM", nargs="+", help="only these volumes, series or patients")
    which.add_argument("--limit", metavar="N", type=int, help="only the first N volumes")
    which.add_argument("--sample", metavar="N", type=int, help="N random windows instead of sheets")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="other windows for --sample (default: 0)")
    cores = default_threads()
    command.add_argument("--workers", metavar="N", type=int, default=cores, help=f"processes (default: {cores})")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    drawn = Drawn([], {})
    try:
        output = output_folder(given.folder, given.output)
        check_numbers(given)
        with open_shards(given.folder) as shards:
            volumes = chosen_volumes(shards, given.volumes, given.limit)
            output.mkdir(parents=True, exist_ok=True)
            if given.sample is not None:
                for name, page in draw_samples(shards, given.sample, given.seed):
                    page.write(output / name)
                    print(f"a page of random windows: {output / name}", flush=True)
                return 0
        draw_sheets(given.folder, volumes, output, given.workers, drawn)
        write_listing(output / "index.html", drawn.rows, drawn.damaged)
    except KeyboardInterrupt:
        done = "pages named above are whole" if given.sample is not None else f"{len(drawn.rows)} sheets are whole"
        print(f"interrupted: {done}; the same command begins again", file=sys.stderr)
        return 130
    except PreviewError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except ShardError as error:
        print(f"DAMAGED: {error}", file=sys.stderr)
        return 1
    for problem in drawn.damaged.values():
        print(f"DAMAGED: {problem}", file=sys.stderr)
    print(f"{len(drawn.rows)} sheets in {output}: begin with {output / 'index.html'}")
    return 1 if drawn.damaged else 0


def output_folder(folder: Path, output: Path | None) -> Path:
    """Where pictures go: beside the set, never in it. Raises PreviewError."""
    if not folder.is_dir():
        raise PreviewError(f"there is no folder {folder}")
    if not is_set_folder(folder):
        raise PreviewError(f"{folder} is not a set of shards: it has no manifest.json and no shard-*.tar")
    place = output or folder.resolve().with_name(folder.resolve().name + "-preview")
    if place.resolve().is_relative_to(folder.resolve()):
        raise PreviewError(f"{place} is in the set itself, where only the packer writes: give another --output")
    if place.exists() and not place.is_dir():
        raise PreviewError(f"{place} is a file: --output needs a folder")
    return place


def check_numbers(given: argparse.Namespace) -> None:
    """Raise PreviewError for numbers that cannot be meant."""
    for name in ("limit", "sample", "workers"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise PreviewError(f"--{name} must be at least 1")
    if given.sample is not None and given.sample > 1000:
        raise PreviewError("--sample draws at most 1000 windows: nobody looks at more than 50 pages")


def chosen_volumes(shards: ShardSet, names: list[str] | None, limit: int | None) -> list[VolumeRecord]:
    """The volumes that a user asked for, in the order of the set. Raises PreviewError for a name that is none."""
    if names is None:
        return list(shards.volumes)[:limit]
    of_each = {name: [v for v in shards.volumes if name in (v.id, v.series, v.patient)] for name in names}
    unknown = [name for name, found in of_each.items() if not found]
    if unknown:
        raise PreviewError(f"{unknown[0]} is no volume, series or patient of this set (manifest.json lists them)")
    wanted = {volume.index for found in of_each.values() for volume in found}
    return [volume for volume in shards.volumes if volume.index in wanted]


def draw_sheets(folder: Path, volumes: list[VolumeRecord], output: Path, workers: int, drawn: Drawn) -> None:
    """Draw a sheet of each volume, and note it in `drawn`. Raises OSError if a sheet cannot be written."""
    tasks = [SheetTask(str(folder), volume.index, str(output / f"{volume.id}.png")) for volume in volumes]
    by_index = {volume.index: volume for volume in volumes}
    with tidied(tasks), ProgressReport() as progress, WorkerPool(min(workers, len(tasks))) as pool:
        sizes = {volume.index: 2 * volume.shape[0] * volume.shape[1] * volume.shape[2] for volume in volumes}
        progress.stage("drawing", sum(sizes.values()))
        for task, outcome in pool.map(draw_one, tasks):
            if isinstance(outcome, Failure):
                why = f"{outcome.kind} {outcome.error}".strip()
                raise PreviewError(f"{task.path} cannot be drawn ({why}): try --workers 1, or report it as a bug")
            if isinstance(outcome, OSError):
                raise outcome
            if isinstance(outcome, str):
                drawn.damaged[by_index[task.volume].id] = outcome
            else:
                drawn.rows.append(outcome)
            progress.advance(sizes[task.volume])


@contextlib.contextmanager
def tidied(tasks: list[SheetTask]) -> Iterator[None]:
    """Removes, in the end, what workers that were killed have begun to write."""
    try:
        yield
    finally:
        for task in tasks:
            temporary_path(Path(task.path)).unlink(missing_ok=True)


def draw_one(task: SheetTask) -> Row | str | OSError:
    """Draw a sheet; its row of the index, or what is wrong with the volume or with writing. Runs in a worker."""
    try:
        shards = _opened(task.folder)
        volume = shards.volumes[task.volume]
        facts, reading = shards.facts(volume), read_volume(shards, volume)
        draw_sheet(volume, facts, reading).write(Path(task.path))
        low, middle, high = percentiles(reading.counts)
        return Row(volume, (low, middle, high), short_value(facts.get("kernel")), short_value(facts.get("kvp")))
    except ShardError as error:
        return str(error)
    except OSError as error:
        return OSError(error.errno, error.strerror, task.path)


def percentiles(counts: np.ndarray) -> list[int]:
    """HU below which 1, 50 and 99 per cent of the voxels of a histogram lie, as the beginnings of its bins."""
    sums = np.cumsum(counts)
    return [int(np.searchsorted(sums, part / 100 * sums[-1])) * HISTOGRAM_BIN_HU + HU_MIN for part in PERCENTILES]


@functools.cache
def _opened(folder: str) -> ShardSet:
    """The set, opened once in each worker."""
    return open_shards(folder)


if __name__ == "__main__":
    sys.exit(main())
