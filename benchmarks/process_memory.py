"""Peak memory of a command and all processes it starts, looked at ten times a second.

USS is what a process holds alone and would give back if it ended; RSS also counts what it shares (bytes).
Invariant: a peak between two looks is missed, so the figures are lower bounds.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

EVERY_S = 0.1


@dataclass
class Peaks:
    """Largest values seen: of the command itself, of the largest process it started, of all together."""

    parent_uss_bytes: int = 0
    parent_rss_bytes: int = 0
    worker_uss_bytes: int = 0
    worker_rss_bytes: int = 0
    total_uss_bytes: int = 0

    def look(self, parent: psutil.Process) -> None:
        """Take the values of now."""
        with suppress(psutil.Error):
            own = parent.memory_full_info()
            self.parent_uss_bytes = max(self.parent_uss_bytes, own.uss)
            self.parent_rss_bytes = max(self.parent_rss_bytes, own.rss)
            total = own.uss
            for worker in parent.children(recursive=True):
                with suppress(psutil.Error):
                    used = worker.memory_full_info()
                    self.worker_uss_bytes = max(self.worker_uss_bytes, used.uss)
                    self.worker_rss_bytes = max(self.worker_rss_bytes, used.rss)
                    total += used.uss
            self.total_uss_bytes = max(self.total_uss_bytes, total)


@dataclass(frozen=True)
class Ran:
    """A command that ended: exit code, wall time (s), peaks, and what it printed last."""

    code: int
    seconds: float
    peaks: Peaks
    said: str


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Run a command to its end, watching its memory."""
    peaks, ended = Peaks(), threading.Event()
    begin = time.perf_counter()
    process = subprocess.Popen(
        list(command), env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def watch() -> None:
        with suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            while not ended.wait(EVERY_S):
                peaks.look(parent)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        said, _ = process.communicate()
    finally:
        seconds = time.perf_counter() - begin
        ended.set()
        watcher.join()
    return Ran(process.returncode, seconds, peaks, said[-2000:])
