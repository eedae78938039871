"""Does pretraining learn anything? Phantom patients, several seeds, held-out patients. `--help` says how."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from learning.plan import ALLOWED, TERMS, Arm, Settings, arms, data_programs, is_trained, training
from learning.program import FailedError, OverError, run_program

_EXAMPLES = """\
examples:
  python tools/learn.py                                3 seeds, 4 runs each, in learn/
  python tools/learn.py --minutes 30                   of it, half an hour now; the same command goes on
  python tools/learn.py --folder quick --seeds 1 --term koleo --updates 60

A phantom is made, packed and labelled; for each seed a network is trained with all terms of the loss, and once without
each; each is probed (docs/evaluation.md) on patients that no run saw, beside the same network at random initialisation,
raw pixels, and size and intensity. FOLDER/learn.json and learn.md say what came out, whatever it is.

exit code: 0 done (learnt or not: learn.md says); 1 something failed; 2 wrong usage; 3 --minutes are over, and there is
           more to do; 130 stopped with Ctrl-C, and the same command goes on
"""
EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED, EXIT_INTERRUPTED = 0, 1, 3, 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Train on the phantom by seeds and loss terms, and probe on held-out patients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--folder", type=Path, default=Path("learn"), help="where it works, and goes on (learn)")
    command.add_argument("--minutes", type=float, help="of this session; without: to the end")
    command.add_argument("--patients", type=int, default=60, help="of the phantom (60)")
    command.add_argument("--size", type=int, default=128, help="pixels along a slice's side (128)")
    command.add_argument("--slices", type=int, default=40, help="of a scan (40)")
    command.add_argument("--val-fraction", type=float, default=0.4, help="of patients, held out (0.4)")
    command.add_argument("--seeds", type=int, default=3, help="runs of each kind (3)")
    command.add_argument("--updates", type=int, default=450, help="of each run (450)")
    command.add_argument("--term", choices=TERMS, action="append", help="left out in turn; again (default: each)")
    command.add_argument("--task", metavar="TASK", action="append", help="as of tools/probe.py (presence and type)")
    command.add_argument("--config", default="configs/demo.yaml", help="of all runs (configs/demo.yaml)")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="as of dinox_train")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    if min(given.seeds, given.updates, given.patients) < 1 or (given.minutes is not None and not given.minutes > 0):
        command.error("--seeds, --updates and --patients must be at least 1, --minutes above 0")
    end_s = time.monotonic() + 60 * given.minutes if given.minutes else float("inf")
    root = given.folder.resolve()
    settings = settings_of(given)
    file = root / "settings.json"
    if file.exists() and json.loads(file.read_bytes()) != asdict(settings):
        command.error(f"{file} has other settings: give those, or another --folder")
    from dinox_io.atomic import write_atomically

    root.mkdir(parents=True, exist_ok=True)
    write_atomically(file, as_json(asdict(settings)))
    try:
        work(settings, root, end_s)
    except OverError:
        print("not done yet; the same command goes on")
        return EXIT_UNFINISHED
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (FailedError, ValueError, OSError) as error:
        print(f"learn: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def settings_of(given: argparse.Namespace) -> Settings:
    """What decides every figure."""
    return Settings(
        patients=given.patients,
        size=given.size,
        slices=given.slices,
        val_fraction=given.val_fraction,
        seeds=given.seeds,
        updates=given.updates,
        terms=list(dict.fromkeys(given.term or TERMS)),
        tasks=list(dict.fromkeys(given.task or ["presence", "type"])),
        config=given.config,
        overrides=given.overrides,
    )


def work(settings: Settings, root: Path, end_s: float) -> None:
    """What is still to do, and the report. Raises OverError, FailedError."""
    for name, words in data_programs(settings, root):
        print(f"{name} …", flush=True)
        run_program(words, root / f"{name}.log", end_s, ALLOWED.get(name, (0,)))
    for arm in arms(settings):
        if not is_trained(settings, root, arm):
            print(f"seed {arm.seed}, {arm.name} …", flush=True)
            run_program(training(settings, root, arm), root / f"seed-{arm.seed}-{arm.name}.log", end_s)
    report = report_of(settings, root, end_s)
    from learning.report import markdown

    from dinox_io.atomic import write_atomically

    page = markdown(report)
    write_atomically(root / "learn.json", as_json(report))
    write_atomically(root / "learn.md", page.encode())
    print(page, end="")


def report_of(settings: Settings, root: Path, end_s: float) -> dict[str, Any]:
    """All figures. Raises OverError; the scores of each network are kept."""
    from learning.scores import Kept, Probed
    from learning.verdict import table_of
    from probing import protocol

    by_seed: list[dict[str, Kept]] = [{} for _ in range(settings.seeds)]
    with Probed(settings, root, Arm(0, None)) as probed:
        for arm in arms(settings):
            if time.monotonic() >= end_s:
                raise OverError
            by_seed[arm.seed] |= probed.of_arm(arm)
        tables = [table_of(task, by_seed, settings.terms) for task in probed.tasks]
    runs = [in_short(root, arm) for arm in arms(settings)]
    return {
        "protocol": protocol.VERSION,
        "settings": asdict(settings),
        "hours": sum(run["hours"] for run in runs),
        "tables": tables,
        "runs": runs,
    }


def in_short(root: Path, arm: Arm) -> dict[str, Any]:
    """What its lines say."""
    from releasing.lineage import hours_of

    from dinox_train.metrics import read_lines

    lines = read_lines(arm.folder(root) / "metrics.jsonl")
    knn_z = [line["knn_z"] for line in lines if line.get("knn_z") is not None] or [None]
    return {
        "seed": arm.seed,
        "name": arm.name,
        "without": arm.without,
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
        "knn_z": [knn_z[0], knn_z[-1]],
        "hours": hours_of(lines) or 0.0,
    }


def as_json(value: dict[str, Any]) -> bytes:
    """One spelling for equal values."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and no trainer is left behind
    sys.exit(main())
