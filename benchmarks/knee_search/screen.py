"""What the user sees while it is measured: a bar of the time that there is, and what is being measured; plain lines
where nobody watches.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Screen:
    """A context manager; `tell` says what is begun, `detail` how far that is."""

    def __init__(self, seconds: float) -> None:
        """seconds: that the search may take."""
        self._begin_s = time.monotonic()
        self._progress: Progress | None = None
        if Console().is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns)
            self._task = self._progress.add_task("", total=seconds)
        self._what = ""

    def __enter__(self) -> Screen:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def tell(self, what: str) -> None:
        self._what = what
        if self._progress:
            self._progress.console.print(what, highlight=False)
        else:
            print(f"{time.monotonic() - self._begin_s:6.0f} s  {what}", file=sys.stderr, flush=True)
        self.detail("")

    def detail(self, text: str) -> None:
        if self._progress:
            done = time.monotonic() - self._begin_s
            self._progress.update(self._task, completed=done, description=text or self._what)
