"""metrics.jsonl and events.jsonl: one JSON object a line, each update once, readable while the run goes on.

A line is in the file (not only in this process) before the next update ends. A run that resumes drops the lines past
its checkpoint; a torn last line, which a power loss can leave, is dropped too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dinox_io.atomic import write_atomically

VERSION = 1
"""Of the format of a line, which each of a run's lines carries; one that carries none is of version 1."""
_BLOCK_BYTES = 1 << 20


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
        """Raises ValueError for a broken line, or one of another version, at either end of the file."""
        drop_after(path, keep_updates)
        self._file = path.open("ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        self._file.write(_encode(line))

    def sync(self) -> None:
        """Bring every line to the disk: what a checkpoint says was done must not be missing here after a power loss."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def drop_after(path: Path, updates: int) -> None:
    """Drop the lines of updates after `updates` from a file, where there is one, and what is left of a torn last line.

    It is read from its end, so that what this takes is the time and the memory of the lines dropped, not of the file.
    In it, `update` may fall by one from a line to the next (a rollback's event stands with the update that is next),
    and by no more. Raises ValueError for what is no line of ours there, or in the first line (file and line number).
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        first = file.readline()
        if first.endswith(b"\n") and first.strip():
            object_of(path, 1, first)
        begin, kept = _kept_at_the_end(path, file, updates)
        tail = b"".join(line + b"\n" for line in kept)
        file.seek(begin)
        if file.read(len(tail)) in (tail, tail[:-1]):  # what is dropped comes after it; at most a newline is missing
            file.seek(begin)
            file.write(tail)
            file.truncate()
            os.fsync(file.fileno())
            return
        file.seek(0)
        whole = file.read(begin) + tail
    write_atomically(path, whole)


def _kept_at_the_end(path: Path, file: BinaryIO, updates: int) -> tuple[int, list[bytes]]:
    """Up to which byte all lines stay, and which of those behind it do."""
    kept: list[bytes] = []
    is_last = True
    for begin, line in _lines_from_the_end(file):
        if line.strip() and (_is_json(line) or not is_last):
            update = _object_at(path, file, begin, line)["update"]
            if update < updates and not is_last:
                return begin + len(line) + 1, kept[::-1]
            kept += [line] if update <= updates else []
        is_last = False
    return 0, kept[::-1]


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; first what stands after the last newline, mostly nothing."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        step = min(position, _BLOCK_BYTES)
        position -= step
        file.seek(position)
        rest, *lines = (file.read(step) + rest).split(b"\n")
        end = position + len(rest) + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            yield end - len(line), line
            end -= len(line) + 1
    yield 0, rest


def _object_at(path: Path, file: BinaryIO, begin: int, line: bytes) -> dict[str, Any]:
    try:
        return object_of(path, 0, line)
    except ValueError:
        file.seek(0)
        before = sum(file.read(min(_BLOCK_BYTES, begin - at)).count(b"\n") for at in range(0, begin, _BLOCK_BYTES))
        return object_of(path, 1 + before, line)


def _encode(line: Mapping[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
