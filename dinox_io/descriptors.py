"""The open files of this process, bounded: where one more is to be opened, the one that was used longest ago is closed.

A set may have more shards than a process may have files open (`ulimit -n`, often 1,024). Invariant: no descriptor is
closed, nor its number given to another file, while a thread reads through it; and a file that is opened again is the
one that it was, or ShardError.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from dinox_io.errors import ShardError

MOST_RAISED = 1 << 16
"""The soft limit is raised to the hard one, but no higher: each open file costs the system about a kilobyte."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE)


def most_descriptors(limit: int) -> int:
    """How many of the `limit` files that a process may have open may be shards: the others leave room for the rest."""
    return max(limit - min(max(64, limit // 4), limit // 2), 1)


def reachable_limit(soft: int, hard: int) -> int:
    """To what the soft limit may be raised."""
    return max(soft, MOST_RAISED if hard == resource.RLIM_INFINITY else min(hard, MOST_RAISED))


class HeldFile:
    """One regular file, closed or open; `size` is None until it was opened."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        """size: what it is to have. Nothing is opened here."""
        # Absolute, as it may be opened again when the process stands elsewhere.
        self.path, self.name, self.size = path.absolute(), path.name, size
        self.descriptor, self.readers, self.opening, self.over = -1, 0, False, False
        self._identity: tuple[int, int, int] | None = None

    def open(self) -> int:
        """A descriptor of it. OSError where there is no room for one; ShardError."""
        try:
            # Not blocking, and only what fstat calls a regular file: opening a pipe would wait for a writer.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            raise ShardError(f"cannot be opened ({error.strerror})", file=self.name) from error
        try:
            self._check(os.fstat(descriptor))
        except OSError as error:
            os.close(descriptor)
            raise ShardError(f"cannot be looked at ({error.strerror})", file=self.name) from error
        except ShardError:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise ShardError("is not a regular file", file=self.name)
        identity = status.st_dev, status.st_ino, status.st_mtime_ns
        if self._identity is not None and (identity, status.st_size) != (self._identity, self.size):
            raise ShardError("the file changed since the set was opened; open it again", file=self.name)
        if self.size is not None and status.st_size != self.size:
            raise ShardError(f"has {status.st_size} bytes where the manifest says {self.size}", file=self.name)
        self._identity, self.size = identity, status.st_size


class Descriptors:
    """The open ones among files. Safe to use from many threads at once, and after a fork."""

    def __init__(self, most: int | None = None) -> None:
        """most: that are open at once; None: as the process's limit says, which is raised when it is reached."""
        self._most, self._may_raise = most, most is None
        self._open: OrderedDict[HeldFile, None] = OrderedDict()  # the one used last stands last
        self._changed = threading.Condition()
        os.register_at_fork(after_in_child=self._forget_readers)

    def __len__(self) -> int:
        return len(self._open)

    def take(self, file: HeldFile) -> int:
        """Its descriptor, open until `give`. Waits while all that may be open are being read. ShardError."""
        with self._changed:
            while file.descriptor < 0:
                if file.over:
                    raise ShardError("was closed", file=file.name)
                if file.opening:
                    self._changed.wait()
                else:
                    self._open_it(file)
            if file.over:
                raise ShardError("was closed", file=file.name)
            self._open.move_to_end(file)
            file.readers += 1
            return file.descriptor

    def give(self, file: HeldFile) -> None:
        """The thread that took it reads no more."""
        with self._changed:
            file.readers -= 1
            if file.over and not file.readers:
                self._close(file)
            self._changed.notify_all()

    def end(self, file: HeldFile) -> None:
        """Close it for good: now, or when the last thread that reads it is done. Idempotent."""
        with self._changed:
            file.over = True
            if file.descriptor >= 0 and not file.readers:
                self._close(file)
                self._changed.notify_all()

    # --- with the lock held --------------------------------------------------------------------------------------

    def _open_it(self, file: HeldFile) -> None:
        """Open it, or ShardError; afterwards it may have been ended meanwhile."""
        file.opening = True
        try:
            while not self._opened(file):
                pass
        finally:
            file.opening = False
            self._changed.notify_all()
        if file.over:
            self._close(file)

    def _opened(self, file: HeldFile) -> bool:
        """Whether the system had a descriptor for it; if not, there is more room or less to be content with."""
        self._make_room()
        self._open[file] = None
        self._changed.release()  # a storage that is slow to open one file keeps nobody from the others
        full = None
        try:
            descriptor = file.open()
        except OSError as error:
            descriptor, full = -1, error
        except ShardError:
            self._changed.acquire()
            del self._open[file]
            raise
        self._changed.acquire()
        if full is None:
            file.descriptor = descriptor
            return True
        del self._open[file]
        if not self._raised():
            if not self._open:
                raise ShardError(f"cannot be opened ({full.strerror}; see ulimit -n)", file=file.name) from full
            # Others in this process have the rest, and may need more.
            self._most = max(3 * len(self._open) // 4, 1)
        return False

    def _make_room(self) -> None:
        if self._most is None:
            self._most = most_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        while len(self._open) >= self._most and not self._raised():
            idle = next((file for file in self._open if not file.readers and not file.opening), None)
            if idle is None:
                self._changed.wait()
            else:
                self._close(idle)

    def _raised(self) -> bool:
        """Whether the process's limit could be raised, once, so that there is room."""
        if not self._may_raise:
            return False
        self._may_raise = False
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = reachable_limit(soft, hard)
        if wanted > soft:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (OSError, ValueError):
                return False
        self._most = most_descriptors(wanted)
        return len(self._open) < self._most

    def _close(self, file: HeldFile) -> None:
        descriptor, file.descriptor = file.descriptor, -1
        del self._open[file]
        os.close(descriptor)

    # -------------------------------------------------------------------------------------------------------------

    def _forget_readers(self) -> None:
        """In a child: the threads that read, or held the lock, are the parent's."""
        self._changed = threading.Condition()
        for file in list(self._open):
            file.readers, file.opening = 0, False
            if file.descriptor < 0:
                del self._open[file]


SHARDS = Descriptors()
"""Of all sets of this process: the limit is the process's."""
