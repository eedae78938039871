"""Run folders below a folder."""

from __future__ import annotations

import os
from pathlib import Path


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's: a configuration, and lines or checkpoints beside it."""
    return (folder / "metrics.jsonl").is_file() or (
        (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
    )


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below a folder, sorted; links and hidden folders are not followed, nor is there a run in a
    run.
    """
    found: list[Path] = []
    for place, names, _ in os.walk(folder):
        here = Path(place)
        if is_run(here):
            found.append(here)
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
    return sorted(found)
