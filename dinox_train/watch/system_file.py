"""RUN/system.jsonl: the readings of the machine, one JSON object a line, of bounded size.

The lines are facts of the machine, not of the mathematics: a run that resumes keeps those past its checkpoint (what
the machine did before it fell over is what one wants to see), so that `update` may go back in the file. `elapsed_s`
begins anew with each process. Where the file is full, all but its newest quarter is thinned, evenly in time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinox_io.atomic import write_atomically

MOST_LINES = 40_000
"""About 25 MB at most, in a fortnight as in a year; the first 4.6 days, at 10 s, are there in full."""


class SystemFile:
    """Appends readings to a file."""

    def __init__(self, path: Path, most_lines: int = MOST_LINES) -> None:
        """most_lines: for tests. What a power loss left of a last line is dropped. Raises OSError."""
        self._path, self._most = path, most_lines
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if lines[-1]:
            write_atomically(path, b"".join(line + b"\n" for line in lines[:-1]))
        self._count = len(lines) - 1
        self.last = _object(lines[-2]) if self._count else {}
        """The last reading of the process before; empty where there was none."""
        self._file = path.open("ab", buffering=0)

    def write(self, reading: Mapping[str, Any]) -> None:
        """Append one reading; numbers that are not finite become null. Raises OSError."""
        if self._count >= self._most:
            self._thin()
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in reading.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._count += 1

    def close(self) -> None:
        self._file.close()

    def _thin(self) -> None:
        lines = self._path.read_bytes().splitlines()
        kept = thinned([_object(line).get("elapsed_s", 0.0) for line in lines], self._most)
        self._file.close()
        write_atomically(self._path, b"".join(lines[index] + b"\n" for index in kept))
        self._file = self._path.open("ab", buffering=0)
        self._count = len(kept)


def thinned(elapsed_s: Sequence[float], most: int) -> list[int]:
    """Which lines stay: the newest quarter of `most`, and of the older ones `most` / 2, evenly in the time of the run.

    elapsed_s: of each line; where it falls, another process began.
    """
    recent = max(len(elapsed_s) - most // 4, 0)
    steps = (max(now - before, 0.0) for before, now in itertools.pairwise(elapsed_s[:recent]))
    at_s = [0.0]
    for step in steps:
        at_s.append(at_s[-1] + step)
    width = at_s[-1] / max(most // 2, 1)
    kept, taken = [], -1
    for index in range(recent):
        place = int(at_s[index] / width) if width > 0 else 0
        if place > taken:
            kept.append(index)
            taken = place
    return kept + list(range(recent, len(elapsed_s)))


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
