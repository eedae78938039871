"""Where the knee is: the smallest settings of a run that are as fast as any, measured on this machine and these shards.

Each part is measured by itself (storage cold and warm, decoding, the training step), then the trainer as a whole, each
point in a process of its own. The global batch and the precision stay as the configuration has them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from knee_search.axes import Axes, AxesError, Given, Machine, axes_of
from knee_search.choice import knee_of
from knee_search.chosen_set import chosen_set
from knee_search.copies import distinct_copies, place_for_copies
from knee_search.instruments import Instruments
from knee_search.outcome import outcome
from knee_search.page import page_of
from knee_search.phantom_set import PhantomFailed
from knee_search.pictures import write_pictures
from knee_search.points import PointFile, PointsError, context_of
from knee_search.process import Interrupted, Stop
from knee_search.screen import Screen
from knee_search.search import Found, Search, SearchFailed

from dinox_io import ShardError
from dinox_io.atomic import write_atomically
from dinox_io.manifest import read_manifest
from dinox_train.config import Config, ConfigError, load_config, stage_configs, to_yaml

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
INFLATED_BATCHES = 64
"""A small set is inflated to so many batches a pass, so that it behaves like a large one."""
EPILOG = """\
DIR holds points.jsonl (each point as soon as it is measured), knee.json, knee.html, coupled.png, parts.png, and
overlay.yaml, which a run takes as it is:
  python -m dinox_train --config C.yaml --config DIR/overlay.yaml
Ctrl-C leaves all of that valid; the same command goes on where it was.

examples:
  python benchmarks/knee.py --config configs/demo.yaml --output knee             on its data.shards, or a phantom
  python benchmarks/knee.py --shards /data/shards --config configs/vit_b.yaml --output knee_b --minutes 60
  python benchmarks/knee.py --shards S --config C.yaml --output DIR --micro-batch 32,64 --threads 4,8
  python benchmarks/knee.py --shards S --config C.yaml --output DIR --storage-mbps 100     if they lay on a slow disk

exit codes: 0 found (the sentence says what) · 1 nothing can be measured here · 2 usage or a refused configuration ·
130 / 143 interrupted, with results
"""


@dataclass(frozen=True)
class Task:
    """What is searched: a configuration, with the set in it, and how."""

    config: Config
    given: Given
    output: Path
    seconds: float
    tolerance: float
    timeout_s: float
    storage_mbps: float | None
    cold: bool
    about_set: str


def integers(text: str) -> tuple[int, ...]:
    """`4,8` -> (4, 8)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 4,8") from None


def words(text: str) -> tuple[str, ...]:
    """`off,blocks` -> ("off", "blocks")."""
    return tuple(text.split(","))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--shards",
        metavar="S",
        help="a packed set (default: the configuration's own; where there is none, a phantom, made in DIR)",
    )
    made.add_argument(
        "--config", metavar="FILE", action="append", required=True, help="as for dinox_train; later ones overlay"
    )
    made.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the results go")
    made.add_argument("--stage", type=int, default=1, metavar="N", help="of a run with stages, which one (default: 1)")
    made.add_argument("--minutes", type=float, default=30.0, help="that the search may take, about (default: 30)")
    made.add_argument(
        "--tolerance", type=float, default=3.0, metavar="PERCENT", help="that the knee may be slower than the best (3)"
    )
    made.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of a point, in seconds (300)")
    axes = made.add_argument_group("axes (default: a few values that suit the machine)")
    for name, kind, what in (
        ("micro-batch", integers, "images at a time, e.g. 32,64; they divide the global batch"),
        ("threads", integers, "decoder threads"),
        ("prefetch-mib", integers, "memory for batches that are read ahead"),
        ("pool-mib", integers, "memory for decoded runs"),
        ("pin", words, "off, on, auto: pinned memory for batches"),
        ("compile", words, "off, blocks, full"),
        ("checkpointing", words, "none, selective, block"),
        ("batch-size", integers, "global batches, with --free-batch"),
        ("precision", words, "fp32, bf16, bf16_weights, with --free-precision"),
    ):
        axes.add_argument(f"--{name}", type=kind, metavar="V,V", help=what)
    axes.add_argument("--free-batch", action="store_true", help="vary the global batch too: changes what is learnt")
    axes.add_argument("--free-precision", action="store_true", help="vary the precision too: changes what is learnt")
    made.add_argument("--cold", action="store_true", help="coupled runs read from the disk, not from the page cache")
    made.add_argument(
        "--storage-mbps", type=float, metavar="MB/S", help="as if the storage delivered so many 10^6 bytes a second"
    )
    made.add_argument("overrides", nargs="*", metavar="a.b=value", help="single settings of the configuration")
    return made


def task_of(options: argparse.Namespace, tell: Callable[[str], None]) -> Task:
    """What the command line asks for. ConfigError, AxesError, PhantomFailed, ShardError."""
    if options.minutes <= 0 or options.timeout <= 0 or not 0 < options.tolerance < 50:
        raise AxesError("--minutes and --timeout must be above 0, --tolerance between 0 and 50")
    config = load_config(options.config, options.overrides)
    stages = stage_configs(config)
    if not 1 <= options.stage <= len(stages):
        raise AxesError(f"--stage {options.stage}: the run has {len(stages)}")
    config = stages[options.stage - 1]
    given = Given(**{name: getattr(options, name) for name in Given.__dataclass_fields__})
    axes_of(given, config, Machine(cores=1, is_gpu=False, unified=True, can_compile=False))  # refuses what is wrong now
    chosen = chosen_set(options.shards, config.data, options.output / "phantom", tell)
    data = config.data.model_copy(update={"shards": chosen.path, "temperature": None})  # weights need several sets
    config = config.model_copy(update={"data": data, "stages": (), "rehearsal": None})
    if (options.cold or options.storage_mbps) and not Path(chosen.path).is_dir():
        raise AxesError("--cold and --storage-mbps are for shards in a local folder")
    return Task(
        config=config,
        given=given,
        output=options.output,
        seconds=60 * options.minutes,
        tolerance=options.tolerance / 100,
        timeout_s=options.timeout,
        storage_mbps=options.storage_mbps,
        cold=options.cold,
        about_set=chosen.about,
    )


def about_of(task: Task, options: argparse.Namespace, label: str, digest: str) -> dict[str, Any]:
    """What knee.json says of the circumstances. Of the set and the command no folder is named."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": machine.command_line(),
        "machine": machine.describe(),
        "versions": machine.versions(("torch", "numpy", "zstandard")),
        "config": " + ".join(machine.command_line(options.config)),
        "overlay_name": str(task.output / "overlay.yaml"),
        "set": {"about": task.about_set, "digests": [digest], "label": label},
    }


def inflation_of(config: Config, folder: str) -> tuple[int, str]:
    """How many times the set's volumes are to stand in it, and what that means, in words."""
    manifest = read_manifest(folder)
    slices = sum(int(volume["shape"][0]) for volume in manifest["volumes"])
    wanted = INFLATED_BATCHES * config.train.batch_size
    if slices >= wanted:
        return 1, "the set as it is"
    factor = -(-wanted // slices)
    return factor, f"virtual inflation: each volume counts as {factor}, so that a pass is as long as of a large set"


@contextlib.contextmanager
def cold_copies(task: Task) -> Iterator[Sequence[Path]]:
    """Distinct copies of the set for coupled runs that read from the disk; none where that was not asked for."""
    if not task.cold:
        yield ()
        return
    folder = Path(str(task.config.data.shards))
    with distinct_copies(folder, place_for_copies(folder, task.output), Instruments.cold_bytes) as folders:
        yield folders[1:]


def write_results(result: Mapping[str, Any], folder: Path) -> None:
    """knee.json, knee.html, overlay.yaml and the pictures, each whole or not at all."""
    write_atomically(folder / "knee.json", json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    write_atomically(folder / "knee.html", page_of(result).encode())
    if result["overlay"]:
        write_atomically(folder / "overlay.yaml", result["overlay"].encode())
    write_pictures(result, folder)


def search(task: Task, options: argparse.Namespace, screen: Screen, stop: Stop) -> tuple[dict[str, Any], int]:
    """knee.json's content and the exit code. SearchFailed."""
    folder = str(task.config.data.shards)
    digest = read_manifest(folder)["self"]
    factor, label = inflation_of(task.config, folder)
    task.output.mkdir(parents=True, exist_ok=True)
    file = task.output / "measured.yaml"
    write_atomically(file, to_yaml(task.config).encode())
    with cold_copies(task) as copies:
        if task.cold:
            label += f"; coupled runs read {len(copies) + 1} distinct copies from the disk, dropped from the page cache"
        else:
            label += "; coupled runs read through the page cache, as a second epoch does"
        if task.storage_mbps:
            label += f"; as if the storage delivered {task.storage_mbps:g} MB/s"
        instruments = Instruments(
            config=task.config,
            file=file,
            scratch=task.output,
            timeout_s=task.timeout_s,
            stop=stop,
            inflation=max(factor, len(copies) + 1),
            storage_mbps=task.storage_mbps,
            copies=copies,
            cold=task.cold,
            told=screen.detail,
        )
        points = PointFile(task.output / "points.jsonl", context_of(_context(task, digest, factor)))
        about = about_of(task, options, label, digest)
        running = Search(
            lambda probe: _axes(task, probe), instruments, points,
            seconds=task.seconds, tolerance=task.tolerance, cold=task.cold, tell=screen.tell,
        )  # fmt: skip
        code = EXIT_DONE
        try:
            for known in points.all("probe"):
                instruments.window_bytes = known.result["set"]["window_bytes"] if known.is_ok else 0
            running.run()
        except Interrupted as error:
            code = 128 + error.number
        return _result(running.found, task, about), code


def _result(found: Found, task: Task, about: Mapping[str, Any]) -> dict[str, Any]:
    if found.knee is None and found.rates():  # interrupted on the way: the best of what is known
        found.knee = knee_of(found.rates(), task.tolerance)
    given = task.given
    return outcome(
        found, task.config, about, tolerance=task.tolerance, free_batch=given.free_batch,
        free_precision=given.free_precision,
    )  # fmt: skip


def _axes(task: Task, probe: Mapping[str, Any]) -> Axes:
    names = ("cores", "is_gpu", "unified", "can_compile")
    return axes_of(task.given, task.config, Machine(**{name: probe[name] for name in names}))


def _context(task: Task, digest: str, factor: int) -> dict[str, Any]:
    """What makes points comparable. Where things lie, and what is varied, does not."""
    tree = task.config.model_dump(mode="json")
    for name in ("run", "checkpoint", "evaluate", "log", "health", "profile", "rehearsal"):
        tree.pop(name, None)
    for name in ("shards", "threads", "prefetch_mib", "pin"):
        tree["data"].pop(name)
    return {
        "config": tree,
        "set": digest,
        "inflation": factor,
        "storage_mbps": task.storage_mbps,
        "cold": task.cold,
        "machine": machine.describe(),
        "versions": machine.versions(("torch", "numpy", "zstandard")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(arguments)
    with Stop() as stop, Screen(60 * max(options.minutes, 0.01)) as screen:
        try:
            task = task_of(options, screen.tell)
            result, code = search(task, options, screen, stop)
        except (AxesError, ConfigError, PointsError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USAGE
        except (OSError, PhantomFailed, SearchFailed, ShardError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    write_results(result, task.output)
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"{task.output / 'knee.html'}: open it in a browser")
    print(result["sentence"])
    return code


if __name__ == "__main__":
    sys.exit(main())
