"""Draw a set of shards for people to look at before they train: see `--help`."""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

from preview.sample import draw_sample
from preview.sheet import draw_sheet

from dinox_io import ShardError, ShardSet, VolumeRecord, open_shards
from dinox_io.pipeline import default_threads
from dinox_io.progress import ProgressReport
from dinox_io.workers import Failure, WorkerPool

_EXAMPLES = """\
examples:
  python tools/preview_shards.py shards                       a sheet of every volume, in shards-preview/
  python tools/preview_shards.py shards --limit 20            of the first 20
  python tools/preview_shards.py shards --volumes 3f0a… 91c2…  of these (volumes, series or patients)
  python tools/preview_shards.py shards --sample 10           one page of 10 random windows of the whole set

What to look for: the coronal and sagittal pictures show a wrong order or a gap at once; air stands at -1000 HU, water
at 0 (another place of the peaks: a wrong rescale); text in a picture may be a name. Nothing but what the shards hold is
shown, and they hold no names; a face is still a face.

exit code: 0 all were drawn; 1 the set or a volume is damaged (the others are drawn); 2 the command cannot be carried
           out as it stands
"""


class PreviewError(Exception):
    """The command cannot be carried out: what, and what to do."""


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
    which.add_argument("--sample", metavar="N", type=int, help="one page of N random windows instead of sheets")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="other windows for --sample (default: 0)")
    cores = default_threads()
    command.add_argument("--workers", metavar="N", type=int, default=cores, help=f"processes (default: {cores})")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        output = output_folder(given.folder, given.output)
        check_numbers(given)
        with open_shards(given.folder) as shards:
            volumes = chosen_volumes(shards, given.volumes, given.limit)
            output.mkdir(parents=True, exist_ok=True)
            if given.sample is not None:
                page = draw_sample(shards, given.sample, given.seed)
                page.write(output / "sample.png")
                print(f"one page of random windows: {output / 'sample.png'}")
                return 0
        problems = draw_sheets(given.folder, volumes, output, given.workers)
    except PreviewError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except ShardError as error:
        print(f"DAMAGED: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"DAMAGED: {problem}", file=sys.stderr)
    print(f"{len(volumes) - len(problems)} sheets in {output}")
    return 1 if problems else 0


def output_folder(folder: Path, output: Path | None) -> Path:
    """Where pictures go: beside the set, never in it. Raises PreviewError."""
    if not folder.is_dir():
        raise PreviewError(f"there is no folder {folder}")
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
        raise PreviewError("--sample draws at most 1000 windows: the page would be too high")


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


def draw_sheets(folder: Path, volumes: list[VolumeRecord], output: Path, workers: int) -> list[str]:
    """Draw a sheet of each volume; returns what is damaged. Raises OSError if a sheet cannot be written."""
    tasks = [SheetTask(str(folder), volume.index, str(output / f"{volume.id}.png")) for volume in volumes]
    problems: list[str] = []
    with ProgressReport() as progress, WorkerPool(min(workers, len(tasks))) as pool:
        sizes = {volume.index: 2 * volume.shape[0] * volume.shape[1] * volume.shape[2] for volume in volumes}
        progress.stage("drawing", sum(sizes.values()))
        for task, outcome in pool.map(draw_one, tasks):
            if isinstance(outcome, Failure):
                why = f"{outcome.kind} {outcome.error}".strip()
                raise PreviewError(f"{task.path} cannot be drawn ({why}): try --workers 1, or report it as a bug")
            if isinstance(outcome, OSError):
                raise outcome
            problems += [outcome] if outcome else []
            progress.advance(sizes[task.volume])
    return problems


def draw_one(task: SheetTask) -> str | OSError | None:
    """Draw a sheet; what is wrong with the volume, or with writing, if anything. Runs in a worker."""
    try:
        shards = _opened(task.folder)
        draw_sheet(shards, shards.volumes[task.volume]).write(Path(task.path))
    except ShardError as error:
        return str(error)
    except OSError as error:
        return OSError(error.errno, error.strerror, task.path)
    return None


@functools.cache
def _opened(folder: str) -> ShardSet:
    """The set, opened once in each worker."""
    return open_shards(folder)


if __name__ == "__main__":
    sys.exit(main())
