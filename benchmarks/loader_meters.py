"""What a process and all that it started have spent, what they hold, and what of their files lies in the page cache.

Invariant: standard library only: this file also runs in the interpreter of the peers. Linux only (/proc, mincore).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = mmap.PAGESIZE


def tree(process: int) -> Iterator[int]:
    """A process and all its descendants that are alive."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text("ascii").split():
                yield from tree(int(child))


def cpu_s() -> float:
    """Processor time (user and system) of this process and its living descendants; theirs in steps of 10 ms."""
    total = time.process_time()
    for process in tree(os.getpid()):
        if process != os.getpid():
            with suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return total


def read_bytes() -> int:
    """Bytes that this process and its living descendants got from read calls; what they map is not counted."""
    total = 0
    for process in tree(os.getpid()):
        with suppress(OSError):
            total += int(Path(f"/proc/{process}/io").read_text("ascii").split()[1])
    return total


def uss_bytes() -> int:
    """Memory that this process and its descendants would give back if they ended (private pages)."""
    total = 0
    for process in tree(os.getpid()):
        with suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text("utf-8").splitlines():
                if line.startswith(("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")):
                    total += 1024 * int(line.split()[1])
    return total


class Meter:
    """Sums up what the runs of one contender spent."""

    def __init__(self) -> None:
        self.windows = 0.0
        self.cpu_s = self.read_bytes = 0.0

    def around(self, run: Callable[[], float]) -> Callable[[], float]:
        """The same run, metered; its amount is windows."""

        def metered() -> float:
            before_s, before_bytes = cpu_s(), read_bytes()
            windows = run()
            self.cpu_s += cpu_s() - before_s
            self.read_bytes += read_bytes() - before_bytes
            self.windows += windows
            return windows

        return metered

    def described(self) -> dict[str, float]:
        """For one window: CPU time (s), bytes read; and the memory of now (bytes)."""
        windows = max(self.windows, 1.0)
        return {
            "cpu_s": self.cpu_s / windows, "read_bytes": self.read_bytes / windows, "uss_bytes": uss_bytes(),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------- page cache


def files_under(path: Path) -> list[Path]:
    """A file, or all files of a folder."""
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def drop(paths: Sequence[Path]) -> None:
    """Ask the system to forget what it keeps of these files. Pages that are mapped or not yet written stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write_out(paths: Sequence[Path]) -> None:
    """Wait until these files are on the disk: only then can they be dropped."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def resident_share(paths: Sequence[Path]) -> float:
    """Which part of these files' pages (0 to 1) lies in the page cache, as mincore says."""
    library: Any = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = there = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
            count = -(-size // _PAGE_BYTES)
            present = (ctypes.c_ubyte * count)()
            failed = library.mincore(address, size, present)
            library.munmap(address, size)
            if failed:
                raise OSError(ctypes.get_errno(), f"the pages of {path} cannot be asked for")
            pages += count
            there += sum(one & 1 for one in present)
        finally:
            os.close(descriptor)
    return there / pages if pages else 0.0


class Cold:
    """Drops files before each round, and keeps what was left of them in the cache all the same."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.left = 0.0
        """The largest share that stayed."""

    def __call__(self) -> None:
        """Drop, and look at what stayed."""
        drop(self._paths)
        self.left = max(self.left, resident_share(self._paths))
