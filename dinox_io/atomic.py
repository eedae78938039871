"""Files and folders that are whole or absent: temporary name, fsync, rename, fsync of the folder.

A temporary name starts with "." and ends with ".tmp", so what a killed process leaves behind is known by its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO


def temporary_path(path: Path) -> Path:
    """The name under which `path` is written before it is whole (same folder, so that the rename is atomic)."""
    return path.with_name(f".{path.name}.tmp")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicFile:
    """A binary file that gets its name only by `commit()`; `abort()` leaves nothing. Neither may be called twice."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._temporary = temporary_path(self.path)
        self.file: BinaryIO = self._temporary.open("wb")

    def commit(self) -> None:
        """Raises OSError (disk full, say) with nothing left behind."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self._temporary.replace(self.path)
        except BaseException:
            self.abort()
            raise
        fsync_folder(self.path.parent)

    def abort(self) -> None:
        # Closing flushes, which fails again on a full disk: the temporary file must go all the same.
        with suppress(OSError):
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write: on success it takes the place of `path`, on an error nothing is left or changed."""
    with AtomicFile(path) as file:
        yield file


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data`: a reader sees the old bytes or the new ones, after a power cut too."""
    with atomic_file(path) as file:
        file.write(data)


def replace_folder(temporary: Path, final: Path) -> None:
    """Sync every file and folder of `temporary`, then rename it to `final`, which must not exist (FileExistsError)."""
    if final.exists():
        raise FileExistsError(f"{final} exists; a finished folder is never overwritten")
    for folder, _, names in os.walk(temporary):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(folder))
    temporary.rename(final)
    fsync_folder(final.parent)
