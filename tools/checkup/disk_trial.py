"""Tries the disk beside --output: writes a bounded file, syncs it, reads it past the system's cache, deletes it."""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from checkup.machine import Disk
from checkup.readings import ROOT, text

MOST_BYTES, MOST_SECONDS = 256 << 20, 4.0
"""What is written at most, and when writing stops."""
_PIECE = 8 << 20
_NAME = ".dinox-doctor.tmp"


def try_disk(folder: Path) -> Disk:
    """The file system of `folder` (or of the nearest folder above it that exists), its room and its speed."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    kind, free = file_system(folder), shutil.disk_usage(folder).free
    path = folder / f"{_NAME}-{secrets.token_hex(4)}"
    try:
        size, written_s = _write(path, min(MOST_BYTES, free // 4))
        read_s, cached = _read(path, size)
    except OSError as error:
        return Disk(kind=kind, free_bytes=free, trouble=error.strerror or type(error).__name__)
    finally:
        with suppress(OSError):  # of a disk that is mounted read-only, also where there is no such file
            path.unlink(missing_ok=True)
    return Disk(
        kind=kind,
        free_bytes=free,
        write_bytes_per_s=size / written_s,
        read_bytes_per_s=size / read_s,
        read_is_cached=cached,
    )


def file_system(folder: Path, root: Path = ROOT) -> str:
    """Its kind, by the longest mount point above it: ext4, nfs4, tmpfs; unknown."""
    found = ("", "unknown")
    inside = folder.resolve()
    for line in (text(root / "proc/self/mounts") or "").splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        place = words[1].replace("\\040", " ")
        if inside.is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, words[2])
    return found[1]


def _write(path: Path, most_bytes: int) -> tuple[int, float]:
    """Bytes written and synced, and seconds. Random bytes: some disks and file systems pack zeros."""
    piece, size = secrets.token_bytes(_PIECE), 0
    begin_s = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        while size + _PIECE <= max(most_bytes, _PIECE) and time.perf_counter() - begin_s < MOST_SECONDS:
            size += file.write(piece)
        os.fsync(file.fileno())
    return size, time.perf_counter() - begin_s


def _read(path: Path, size: int) -> tuple[float, bool]:
    """Seconds for all of it, and whether it may have come from the system's cache."""
    buffer = mmap.mmap(-1, _PIECE)  # aligned, as O_DIRECT wants it
    try:
        descriptor, cached = os.open(path, os.O_RDONLY | os.O_DIRECT), False
    except OSError:  # a file system without it
        descriptor, cached = os.open(path, os.O_RDONLY), True
    try:
        if cached:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begin_s, done = time.perf_counter(), 0
        while done < size:
            read = os.preadv(descriptor, [buffer], done)
            if not read:
                break
            done += read
        return max(time.perf_counter() - begin_s, 1e-9), cached
    finally:
        os.close(descriptor)
        buffer.close()
