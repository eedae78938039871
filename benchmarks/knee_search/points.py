"""DIR/points.jsonl: what was measured, a line a point, appended as soon as it is known.

Invariant: a line that is there is whole and never changes; a torn last one, which a kill can leave, is dropped. A point
counts for the same machine, versions, configuration and set only: its `context` says which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
OK, OUT_OF_MEMORY, TIMED_OUT, CRASHED = "ok", "out of memory", "timed out", "crashed"


class PointsError(ValueError):
    """A file of points that is none: where, what to do."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement by one process."""

    kind: str
    """probe | storage | decode | compute | beside | run."""
    settings: Mapping[str, Any]
    """Of the kind: all that the measurement depends on beside the context."""
    repeat: int = 0
    status: str = OK
    result: Mapping[str, Any] = field(default_factory=dict)
    """Of the kind; empty where it failed."""
    said: str = ""
    """The last lines that a process that failed has printed."""
    wall_s: float = 0.0
    date: str = ""

    @property
    def is_ok(self) -> bool:
        return self.status == OK

    @property
    def key(self) -> str:
        return key_of(self.kind, self.settings, self.repeat)


def key_of(kind: str, settings: Mapping[str, Any], repeat: int) -> str:
    """What makes a measurement the same."""
    return json.dumps([kind, settings, repeat], sort_keys=True)


def context_of(facts: Mapping[str, Any]) -> str:
    """A short digest of machine, versions, configuration and set."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class PointFile:
    """The points of a file that belong to one context, and the way to add one."""

    def __init__(self, path: Path, context: str) -> None:
        """Raises PointsError for a file that is not one of points, or of another version."""
        self.path, self.context = path, context
        self.others = 0
        """Points of other contexts, which stay in the file."""
        self._points: dict[str, Point] = {}
        whole = _without_torn_line(path)
        for number, line in enumerate(whole.splitlines(), 1):
            point, of = _read(line, f"{path}:{number}")
            if of == context:
                self._points[point.key] = point
            else:
                self.others += 1

    def get(self, kind: str, settings: Mapping[str, Any], repeat: int = 0) -> Point | None:
        return self._points.get(key_of(kind, settings, repeat))

    def all(self, kind: str) -> list[Point]:
        """In the order in which they were measured."""
        return [point for point in self._points.values() if point.kind == kind]

    def add(self, point: Point) -> None:
        """Append, and have it on the disk."""
        line = json.dumps({"version": VERSION, "context": self.context, **asdict(point)}, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._points[point.key] = point


def _without_torn_line(path: Path) -> bytes:
    """The file's whole lines; what stands behind the last of them is cut off."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return whole


def _read(line: bytes, place: str) -> tuple[Point, str]:
    try:
        values = json.loads(line)
        version, context = values.pop("version"), values.pop("context")
        if version == VERSION:
            return Point(**values), context
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PointsError(f"{place}: no point of a knee; give another --output") from None
    raise PointsError(f"{place}: a point of version {version}, not {VERSION}; give another --output")
