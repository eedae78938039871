"""Runs beside each other: the order, what their configurations differ in, and both as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from run_ledger.summary import BEST, Run

OWN_KEYS = ("run.folder",)  # differ in every run and say nothing
_ABSENT = object()


def _best(name: str) -> Callable[[Run], float]:
    sign = 1 if BEST[name] is min else -1

    def key(run: Run) -> float:
        found = run.progress.best.get(name)
        return math.inf if found is None else sign * found.value

    return key


ORDERS: dict[str, Callable[[Run], Any]] = {
    "folder": lambda run: str(run.folder),
    **{name: _best(name) for name in BEST},
    "images": lambda run: -run.progress.images,
    "hours": lambda run: -run.progress.seconds,
    "recent": lambda run: math.inf if run.age_s is None else run.age_s,
}
"""Names of `--sort`: best, most and most recent first, runs without the figure last."""


def ordered(runs: Sequence[Run], by: str) -> list[Run]:
    """The runs in an order of ORDERS; equal ones by folder."""
    return sorted(runs, key=lambda run: (ORDERS[by](run), str(run.folder)))


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys of the configurations that are not alike in all runs, and their values in the order of `runs`.

    A key that a run's configuration has not (another version wrote it) is `"-"`.
    """
    keys = sorted({key for run in runs for key in run.config} - set(OWN_KEYS))
    found: dict[str, list[Any]] = {}
    for key in keys:
        values = [run.config.get(key, _ABSENT) for run in runs]
        if any(repr(value) != repr(values[0]) for value in values):
            found[key] = ["-" if value is _ABSENT else value for value in values]
    return found


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders without what all of them begin with, as the table has little room."""
    folders = [run.folder.resolve() for run in runs]
    if len(folders) < 2:
        return [str(run.folder) for run in runs]
    parts = zip(*(folder.parts for folder in folders), strict=False)
    shared = 0
    for same in parts:
        if len(set(same)) > 1:
            break
        shared += 1
    return [str(Path(*folder.parts[shared:])) if folder.parts[shared:] else folder.name for folder in folders]


def overview(runs: Sequence[Run]) -> Table:
    """A row a run: how far, how good, how long, in what state."""
    table = Table(pad_edge=False)
    for name in ("run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("update", "images", "hours", *BEST, "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sets", overflow="fold")
    for name, run in zip(names_of(runs), runs, strict=True):
        progress = run.progress
        best = (f"{found.value:.4f} @{found.update}" if found else "" for found in map(progress.best.get, BEST))
        cells = (
            name,
            state_in_words(run),
            f"{progress.update}/{run.updates}",
            f"{progress.images:,}",
            f"{progress.seconds / 3600:.2f}",
            *best,
            str(run.restarts) if run.restarts else "",
            " ".join(digest[:12] for digest in run.sets),
        )
        table.add_row(*map(Text, cells))
    return table


def difference_table(runs: Sequence[Run]) -> Table | None:
    """A row a key that differs, a column a run; None where there is none."""
    found = differences(runs)
    if not found:
        return None
    table = Table("differs", pad_edge=False)
    for name in names_of(runs):
        table.add_column(Text(name), overflow="fold")
    for key, values in found.items():
        table.add_row(Text(key), *(Text("null" if value is None else str(value)) for value in values))
    return table


def state_in_words(run: Run) -> str:
    """`silent for 3.2 h (killed, or it hangs)`."""
    age = "" if run.age_s is None else time_in_words(run.age_s)
    if run.state == "running":
        return f"running, heartbeat {age} ago"
    words = f"silent for {age}" if run.state == "silent" else run.state
    return f"{words} ({run.why})" if run.why else words


def time_in_words(seconds: float) -> str:
    """42 s, 7 min, 3.2 h, 12 days."""
    for size, unit, digits in ((2 * 86400, "days", 0), (2 * 3600, "h", 1), (120, "min", 0)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else 3600 if unit == 'h' else 60):.{digits}f} {unit}"
    return f"{seconds:.0f} s"
