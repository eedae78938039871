"""List run folders and compare them: state, best figures, images, hours, differences. `--help` says how."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from run_ledger.search import find_runs
from run_ledger.summary import Run, RunError, read_run
from run_ledger.table import ORDERS, difference_table, differences, ordered, overview

_EXAMPLES = """\
examples:
  python tools/runs.py runs
  python tools/runs.py runs/small runs/large --sort knn_z
  python tools/runs.py runs --json > runs.json

Each FOLDER is a run folder, or one with run folders somewhere below it. Hours are those of updates: without pauses,
evaluations, checkpoints, and work that was lost and done again. A run is silent if its heartbeat is older than 15
minutes and it did not say that it ends. Nothing is written into a run folder.

exit code: 0 all folders were read; 1 one of them is damaged, or no run (a line each on standard error); 2 wrong usage
"""
WIDTH = 200  # where there is no terminal


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="List run folders and compare them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a run folder, or one above several")
    command.add_argument(
        "--sort",
        choices=ORDERS,
        default="folder",
        help="the order: best, most, or most recent first (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="everything as one JSON object, for other programs")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    for folder in given.folders:
        if not folder.is_dir():
            command.error(f"{folder} is not a folder")
    runs, unread = read_all(given.folders)
    runs = ordered(runs, given.sort)
    if given.json:
        print(json.dumps(as_json(runs, unread), indent=1, allow_nan=False, default=str))
    else:
        show(runs)
        for line in unread:
            print(line, file=sys.stderr)
    return 1 if unread else 0


def read_all(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs at and below folders, each once, and a line for each folder that could not be read."""
    runs: list[Run] = []
    unread: list[str] = []
    seen: set[Path] = set()
    for folder in folders:
        found = find_runs(folder)
        if not found:
            unread.append(
                f"{folder}: no run of DINOX here or below (no metrics.jsonl, no config.yaml with checkpoints/)"
            )
        for path in found:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(read_run(path))
            except RunError as error:
                unread.append(str(error))
    return runs, unread


def show(runs: list[Run]) -> None:
    """The tables."""
    if not runs:
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(overview(runs))
    table = difference_table(runs)
    if table is not None:
        console.print(table)
    elif len(runs) > 1:
        console.print("the configurations are equal")


def as_json(runs: list[Run], unread: list[str]) -> dict[str, object]:
    """What `--json` prints."""
    return {"runs": [run.as_json() for run in runs], "differences": differences(runs), "unread": unread}


if __name__ == "__main__":
    sys.exit(main())
