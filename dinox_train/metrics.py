"""metrics.jsonl and events.jsonl: one JSON object a line, each update once, readable while the run goes on.

A line is in the file (not only in this process) before the next update ends. A run that resumes drops the lines past
its checkpoint; a torn last line, which a power loss can leave, is dropped too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinox_io.atomic import write_atomically

VERSION = 1
"""Of the format of a line, which each of a run's lines carries; one that carries none is of version 1."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file, in order; a missing file is empty, a torn last line is ignored.

    Raises ValueError for a broken line in the middle (file and line number), or one of another version.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == len(lines) and not _is_json(line):
            break
        objects.append(object_of(path, number, line))
    return objects


def object_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object of line `number` of a file. Raises ValueError where it is none, or one of another version."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: not a JSON object; the file was changed by something else.")
    if value.get("version", VERSION) != VERSION:
        raise ValueError(
            f"{path}:{number}: is of version {value['version']}; this program reads version {VERSION}. Use the "
            "release of DINOX that wrote it."
        )
    return value


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


VARYING = frozenset(
    {"images_per_s", "data_wait_fraction", "memory_bytes", "loader_threads", "stage_s", "model_flops_utilisation"}
    | {"host_memory_bytes", "host_memory_trend"}
    | {
        "read_bytes",
        "decoded_bytes",
        "cached_bytes",
        "copied_bytes",
        "read_s",
        "decode_s",
        "unfilter_s",
        "decoded_again",
    }
)
"""What may differ between the lines of runs that are the same: time, memory, and how far the loader is ahead."""


class LineFile:
    """Appends JSON objects to a file. `keep_updates`: on opening, lines with a larger `update` are dropped."""

    def __init__(self, path: Path, keep_updates: int) -> None:
        kept = [line for line in read_lines(path) if line["update"] <= keep_updates]
        write_atomically(path, b"".join(_encode(line) for line in kept))
        self._file = path.open("ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        self._file.write(_encode(line))

    def sync(self) -> None:
        """Bring every line to the disk: what a checkpoint says was done must not be missing here after a power loss."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _encode(line: Mapping[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
