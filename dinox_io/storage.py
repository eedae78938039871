"""The folder of a set and bytes [start, stop) of its files: the one door through which sets are read.

A folder of the file system is here, a bucket in cloud.py.

Invariant: what is returned has the length that was asked for, or ShardError; nothing is ever written here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from dinox_io.descriptors import SHARDS, HeldFile
from dinox_io.errors import ShardError


class ShardFile(Protocol):
    """Random access to one immutable file; safe to use from many threads at once."""

    name: str

    @property
    def size(self) -> int: ...

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on; ShardError if the file ends before or cannot be read."""
        ...

    def close(self) -> None: ...


class ShardFolder(Protocol):
    """Where the files of a set lie; as text, what a message calls it. Names are NAME or FOLDER/NAME."""

    in_flight: int
    """How many files are worth opening, or looking into, at once."""

    def open(self, name: str, size: int | None = None) -> ShardFile:
        """ShardError if it cannot be opened. size: that it is to have; it is then not looked at before it is read, and
        the first read is ShardError where that is not so."""
        ...

    def read(self, name: str, limit_bytes: int) -> bytes:
        """All bytes of a small file. OSError (FileNotFoundError if there is none), or ShardError: it has more."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file; ShardError where that cannot be told."""
        ...

    def names(self, folder: str) -> list[str]:
        """FOLDER/NAME of all that lies in a subfolder, sorted; empty if there is none. Verifying asks, nobody else: a
        store lists slowly."""
        ...


class LocalFolder:
    """A folder of the file system; a ShardFolder."""

    in_flight = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str, size: int | None = None) -> LocalFile:
        return LocalFile(self.path / name, size)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return read_whole(self.path / name, limit_bytes)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def names(self, folder: str) -> list[str]:
        return sorted(f"{folder}/{path.name}" for path in (self.path / folder).glob("*"))


class LocalFile:
    """A file of the local file system, read with `preadv` (no shared offset, so threads do not wait for each other).

    It is open while the process has room for it (descriptors.py), and opened again when it is read after that.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        """size: that it is to have; it is then opened, and looked at, when it is first read. ShardError."""
        self._held = HeldFile(path, size)
        self.name = path.name
        if size is None:
            SHARDS.take(self._held)
            SHARDS.give(self._held)

    @property
    def size(self) -> int:
        assert self._held.size is not None, "given, or known since it was opened"
        return self._held.size

    def read_into(self, start: int, buffer: memoryview) -> None:
        descriptor = SHARDS.take(self._held)
        try:
            self._fill(descriptor, start, buffer)
        finally:
            SHARDS.give(self._held)

    def _fill(self, descriptor: int, start: int, buffer: memoryview) -> None:
        done = 0
        # One system call as a rule; the kernel may give less at 2 GiB or when a signal comes.
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], start + done)
            except OSError as error:  # a failing disk, or a share that went away
                raise ShardError(f"byte {start + done} cannot be read ({error.strerror})", file=self.name) from error
            if count == 0:
                raise ShardError(f"ends at byte {start + done}, {len(buffer) - done} bytes early", file=self.name)
            done += count

    def close(self) -> None:
        """Idempotent; a thread that reads it now comes to its end first."""
        SHARDS.end(self._held)


def read_bytes(file: ShardFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop); bounds are checked against the file's size before memory is taken."""
    if not 0 <= start <= stop <= file.size:
        raise ShardError(f"bytes {start} to {stop} lie outside its {file.size} bytes", file=file.name)
    buffer = bytearray(stop - start)
    file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def read_whole(path: Path, limit_bytes: int) -> bytes:
    """All bytes of a small file. ShardError if it is no regular file or has more than the limit; OSError else."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 (a descriptor)
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ShardError("is not a regular file", file=path.name)
        if status.st_size > limit_bytes:
            raise ShardError(f"has more than the {limit_bytes} bytes that it may have", file=path.name)
        # No more than it had: a file that grows while it is read must not fill the memory.
        return file.read(status.st_size)


Given = TypeVar("Given")
Result = TypeVar("Result")


def each(do: Callable[[Given], Result], things: Iterable[Given], in_flight: int) -> list[Result]:
    """What `do` gives for each thing, in their order, so many at once; raises what the first that fails raises."""
    if in_flight == 1:
        return [do(thing) for thing in things]
    pool = ThreadPoolExecutor(in_flight)
    try:
        return list(pool.map(do, things))
    finally:
        pool.shutdown(cancel_futures=True)
