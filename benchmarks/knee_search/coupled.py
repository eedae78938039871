"""A coupled run: the trainer itself, its metrics read as they come, killed when enough of them are there.

Invariant: what is read is RUN/metrics.jsonl of a run that nobody told it is measured; updates in which the loader still
lived on what it had read ahead do not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loader_meters import drop, resident_share

from knee_search.axes import ahead_of
from knee_search.settings import Settings

NEVER = 10**9
LOOK_S = 2.0
"""Between looks at the page cache, which are not free."""
LEAST_UPDATES, WARM_UPDATES = 4, 2
SUMS = ("read_bytes", "decoded_bytes", "read_s", "decode_s", "unfilter_s", "decoded_again")


def overrides_of(run_folder: str, schedule_updates: int) -> list[str]:
    """What makes of a configuration a run that does nothing but updates, for as long as it is left alone."""
    return [
        f"run.folder={run_folder}",
        f"train.updates={NEVER}",
        f"schedule.updates={schedule_updates}",
        f"checkpoint.every={NEVER}",
        f"evaluate.every={NEVER}",
        f"log.every={NEVER}",
    ]


def warm_updates(settings: Settings, window_bytes: int) -> int:
    """Updates until what was made ahead before the first of them is used up, and graphs are compiled."""
    ahead = -(-ahead_of(settings, window_bytes) // settings.accumulation)
    return WARM_UPDATES + ahead + (2 if settings.compile != "off" else 0)


class Watch:
    """Reads a run's metrics until they are enough; drops files that are to be cold from the page cache meanwhile."""

    def __init__(
        self,
        *,
        batch_size: int,
        skip: int,
        seconds: float,
        cold: Sequence[Path] = (),
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        """skip: updates that do not count. seconds: of updates that do, at least. told: of the number of updates."""
        self._batch_size, self._skip, self._seconds = batch_size, skip, seconds
        self._cold, self._told = list(cold), told
        self._done, self._look_at_s = 0, 0.0
        self._lines: list[dict[str, Any]] = []
        self._resident: list[float] = []

    def __call__(self, folder: Path) -> dict[str, Any] | None:
        """The result, as soon as there is one."""
        if self._cold:
            if time.monotonic() >= self._look_at_s:
                self._look_at_s = time.monotonic() + LOOK_S
                self._resident.append(resident_share(self._cold))
            drop(self._cold)
        self._read(folder / "run" / "metrics.jsonl")
        counted = self._lines[self._skip :]
        if len(counted) < LEAST_UPDATES or sum(updates_s(counted, self._batch_size)) < self._seconds:
            return None
        result = summary(counted, self._batch_size)
        return result | {"resident": sum(self._resident) / len(self._resident) if self._resident else None}

    def _read(self, file: Path) -> None:
        """Take the lines that have come since."""
        if not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(self._done)
            data = opened.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._done += len(whole)
        for line in whole.splitlines():
            self._lines.append(json.loads(line))
            self._told(len(self._lines))


def updates_s(lines: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
    """Seconds of each update, from its line."""
    return [batch_size / line["images_per_s"] for line in lines]


def summary(lines: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Of the updates of these lines: seconds of each, the share of them that went by waiting, sums and peaks."""
    seconds = updates_s(lines, batch_size)
    waited = [one * line["data_wait_fraction"] for one, line in zip(seconds, lines, strict=True)]
    return {
        "update_s": seconds,
        "batch_size": batch_size,
        "waits": sum(waited) / sum(seconds),
        "first_update": lines[0]["update"],
        "memory_bytes": max(line["memory_bytes"] for line in lines),
        "host_memory_bytes": max(line["host_memory_bytes"] for line in lines),
        "loader_threads": max(line["loader_threads"] for line in lines),
        "stage_s": {
            name: sum(line["stage_s"][name] for line in lines) / len(lines) for name in lines[0].get("stage_s", {})
        },
        **{name: sum(line[name] for line in lines) for name in SUMS},
    }
