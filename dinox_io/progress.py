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


class ProgressReport:
    """Shows one stage at a time: `stage(name, total)`, then `advance(bytes)`. A context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self._stream))
        self._name, self._total, self._done = "", 0, 0
        self._start_s = self._said_s = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total_bytes: int) -> None:
        """Begin a stage of `total_bytes`."""
        self._name, self._total, self._done = name, total_bytes, 0
        self._start_s = self._said_s = time.monotonic()
        if self._bar is not None:
            self._bar.add_task(name, total=total_bytes)
        else:
            self._say(f"{name}: {total_bytes / 1e6:.1f} MB")

    def advance(self, done_bytes: int) -> None:
        """Say that some more bytes of the stage are done."""
        self._done += done_bytes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], advance=done_bytes)
            return
        now_s = time.monotonic()
        if now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            speed = self._done / (now_s - self._start_s)
            left_s = (self._total - self._done) / speed if speed else float("inf")
            share = self._done / max(self._total, 1)
            self._say(f"{self._name}: {share:.0%}, {speed / 1e6:.1f} MB/s, {left_s:.0f} s left")

    def note(self, text: str) -> None:
        """Say something once."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
