"""RUN/restarts.jsonl: a row for each start and each end of a supervised trainer, kept over restarts of the supervisor.

    {"event": "start", "time", "monotonic_s", "boot", "update", "pid", "process_started"}
    {"event": "end", "time", "monotonic_s", "boot", "update", "why", "exit_code", "error", "ran_s", "next", "because"}

`next` is "restart" or "stop". Rows hold no names, no paths and no texts of errors: an error is its kind and a digest,
its words stand in train.log and stderr.log.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "restarts.jsonl"
DAY_S = 86400.0


@dataclass(frozen=True)
class Moment:
    """A point in time by both clocks. `boot`: within one boot the monotonic clock is trusted, over two the wall's."""

    wall_s: float
    monotonic_s: float
    boot: str

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic(), boot_id())

    def since(self, row: dict[str, Any]) -> float:
        """Seconds from a row of the ledger to this moment; 0 where the clock was set back between two boots."""
        if row["boot"] == self.boot:
            return self.monotonic_s - row["monotonic_s"]
        return max(self.wall_s - datetime.fromisoformat(row["time"]).timestamp(), 0.0)


def boot_id() -> str:
    """What names this boot of the machine; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's ledger; none where there is none. A torn last line is ignored.

    Raises ValueError for a line in the middle that is no row (file and line).
    """
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(_row(line))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{folder / NAME}:{number}: not a row of the supervisor; move the file away.") from None
    return rows


def _row(line: bytes) -> dict[str, Any]:
    """A row. Raises ValueError, TypeError or KeyError where what every row or every end has is not there."""
    row = json.loads(line)
    times = datetime.fromisoformat(row["time"]).timestamp() + row["monotonic_s"] + row["update"]
    texts = [row["event"], row["boot"], *((row["why"], row["error"], row["next"]) if row["event"] == "end" else ())]
    if not isinstance(times, float) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return row


def restarts(rows: list[dict[str, Any]]) -> int:
    """How often a trainer was started again."""
    return sum(row.get("next") == "restart" for row in rows)


@dataclass
class Ledger:
    """The rows of a run folder, and its file. Held by one supervisor at a time."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises OSError, and ValueError for a damaged ledger."""
        self.rows = read_rows(self.folder)
        path = self.folder / NAME
        if path.exists():
            # A torn last line is cut off: what is appended to it would be lost with it.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def add(self, event: str, moment: Moment, **values: Any) -> OSError | None:
        """Append a row, synced. A full disk ends no supervisor: the error is given, and the row stays here alone."""
        row = {
            "event": event,
            "time": datetime.fromtimestamp(moment.wall_s, UTC).isoformat(timespec="seconds"),
            "monotonic_s": round(moment.monotonic_s, 3),
            "boot": moment.boot,
            **values,
        }
        self.rows.append(row)
        try:
            with (self.folder / NAME).open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)  # half a row would make the next one unreadable
                    raise
        except OSError as error:
            return error
        return None

    def ends(self) -> list[dict[str, Any]]:
        """Rows of ends since the last one that was left to a person: somebody who starts again has looked at it."""
        ends = [row for row in self.rows if row["event"] == "end"]
        last = max((number for number, row in enumerate(ends) if row.get("next") == "stop"), default=-1)
        return ends[last + 1 :]

    def unfinished(self) -> dict[str, Any] | None:
        """The start whose end no supervisor saw."""
        return self.rows[-1] if self.rows and self.rows[-1]["event"] == "start" else None
