"""Progress of long work: a bar where someone watches, plain lines now and then elsewhere.

Invariant: prints names of stages and figures only.
"""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 10.0
SURE_AFTER_S = 5.0
"""Seconds of data after which a time that is left is worth saying."""


def size_text(size_bytes: float) -> str:
    """`145.1 MB`; below a MB `12.3 kB`."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= least:
            return f"{size_bytes / least:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


class ProgressReport:
    """Shows one stage at a time: `stage(name, total)`, then `advance(bytes)`. A context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self._stream))
        self._name, self._total, self._done = "", 0, 0
        self._first_s: float | None = None
        self._start_s = self._said_s = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_stage()
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total_bytes: int) -> None:
        """Begin a stage of `total_bytes`."""
        self._end_stage()
        self._name, self._total, self._done, self._first_s = name, total_bytes, 0, None
        self._start_s = self._said_s = time.monotonic()
        if self._bar is not None:
            self._bar.add_task(name, total=total_bytes)
        else:
            self._say(f"{name}: {size_text(total_bytes)} to do")

    def advance(self, done_bytes: int) -> None:
        """Say that some more bytes of the stage are done."""
        self._done += done_bytes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], advance=done_bytes)
            return
        now_s = time.monotonic()
        # Before the first bytes come workers are started, and what was done before is taken over at once.
        if self._first_s is None and done_bytes:
            self._first_s = now_s
        if now_s - self._said_s >= LINE_EVERY_S and self._done < self._total:
            self._said_s = now_s
            self._say(f"{self._name}: {self._done / self._total:.0%}{self._rate(now_s)}")

    def _rate(self, now_s: float) -> str:
        if self._first_s is None or now_s - self._first_s < SURE_AFTER_S:
            return ""
        speed = self._done / (now_s - self._start_s)
        left_s = (self._total - self._done) / speed
        return f", {size_text(speed)}/s, {left_s:.0f} s left"

    def _end_stage(self) -> None:
        """Say what the stage took, where nobody sees a bar."""
        if self._name and self._bar is None:
            took_s = time.monotonic() - self._start_s
            rate = f", {size_text(self._done / took_s)}/s" if took_s >= 1 else ""
            self._say(f"{self._name}: {size_text(self._done)} done in {took_s:.1f} s{rate}")
        self._name = ""

    def note(self, text: str) -> None:
        """Say something once."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
