"""Files of a set, distinct copies of them on the same disk, and what of them lies in the page cache.

A set that is smaller than what a measurement reads would be read from memory the second time. So its files are copied,
each copy other blocks of the disk, until there is enough to read each byte once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loader_meters import drop, files_under, write_out

COPY_CHUNK = 1 << 20
FREE_SHARE = 0.25
"""Of what is free on the disk, copies take so much at most."""
PREFIX = ".knee-copies-"


def shard_files(folder: Path) -> list[Path]:
    """The files that hold frames."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def size_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def place_for_copies(folder: Path, other: Path) -> Path:
    """Beside the set, so that the same disk is measured; `other` where nothing may be written there."""
    return folder.parent if os.access(folder.parent, os.W_OK) else other


@contextmanager
def distinct_copies(folder: Path, place: Path, wanted_bytes: int) -> Iterator[list[Path]]:
    """Folders with the set's files, on the disk and not in the page cache: the set's own, and as many copies as make
    `wanted_bytes`, within `FREE_SHARE` of what is free. The copies are removed at the end."""
    size = size_of(files_under(folder))
    room = int(shutil.disk_usage(place).free * FREE_SHARE)
    number = max(0, min(-(-wanted_bytes // max(size, 1)) - 1, room // max(size, 1)))
    above = place / f"{PREFIX}{os.getpid()}"
    folders = [folder]
    try:
        for copy in range(number):
            folders.append(above / f"{copy:04d}")
            _copy(folder, folders[-1])
        for one in folders:
            files = files_under(one)
            write_out(files)
            drop(files)
        yield folders
    finally:
        shutil.rmtree(above, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Byte by byte: a file system that could share blocks between the two is not given the chance."""
    for file in files_under(source):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, there.open("wb") as writer:
            while chunk := reader.read(COPY_CHUNK):
                writer.write(chunk)
