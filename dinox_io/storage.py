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

from dinox_io.errors import ShardError


class ShardFile(Protocol):
    """Random access to one immutable file; safe to use from many threads at once."""

    name: str
    size: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on; ShardError if the file ends before or cannot be read."""
        ...

    def close(self) -> None: ...


class ShardFolder(Protocol):
    """Where the files of a set lie; as text, what a message calls it. Names are NAME or FOLDER/NAME."""

    in_flight: int
    """How many files are worth opening, or looking into, at once."""

    def open(self, name: str) -> ShardFile:
        """ShardError if it cannot be opened."""
        ...

    def read(self, name: str, limit_bytes: int) -> bytes:
        """All bytes of a small file. OSError (FileNotFoundError if there is none), or ShardError: it has more."""
        ...

    def names(self, folder: str) -> list[str]:
        """FOLDER/NAME of all that lies in a subfolder, sorted; empty if there is none."""
        ...


class LocalFolder:
    """A folder of the file system; a ShardFolder."""

    in_flight = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path / name)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return read_whole(self.path / name, limit_bytes)

    def names(self, folder: str) -> list[str]:
        return sorted(f"{folder}/{path.name}" for path in (self.path / folder).glob("*"))


class LocalFile:
    """A file of the local file system, read with `preadv` (no shared offset, so threads do not wait for each other)."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            # Not blocking, and only what fstat calls a regular file: opening a pipe would wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ShardError(f"cannot be opened ({error.strerror})", file=path.name) from error
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            self.close()
            raise ShardError(f"cannot be looked at ({error.strerror})", file=path.name) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ShardError("is not a regular file", file=path.name)
        self.size = status.st_size

    def read_into(self, start: int, buffer: memoryview) -> None:
        done = 0
        # One system call as a rule; the kernel may give less at 2 GiB or when a signal comes.
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:  # a failing disk, or a share that went away
                raise ShardError(f"byte {start + done} cannot be read ({error.strerror})", file=self.name) from error
            if count == 0:
                raise ShardError(f"ends at byte {start + done}, {len(buffer) - done} bytes early", file=self.name)
            done += count

    def close(self) -> None:
        """Idempotent. No thread may be reading any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


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
