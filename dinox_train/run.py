"""The run folder: one trainer at a time, what it says in words, and the events that are worth finding again."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dinox_io.atomic import write_atomically

log = logging.getLogger("dinox_train")


class RunFolderError(RuntimeError):
    """A run folder that cannot be used now: which, why, what to do."""


class RunFolder:
    """Paths of a run. `checkpoints`, `metrics`, `events`, `pictures` and the rest lie under `path`."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        """rank: of several processes of the run; from 1 on each has a folder of its own in it, but for checkpoints."""
        self.path = path / "ranks" / f"{rank:05d}" if rank else path
        self.checkpoints = path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.pictures = self.path / "pictures"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises RunFolderError where another trainer has it or it can't be made."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be written ({error.strerror}). Set run.folder to another place."
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"{self.path}: another process trains in this folder; wait for it or stop it."
                ) from None
            # A fork that outlives the trainer would keep the folder locked: it has to let go of its copy.
            os.register_at_fork(after_in_child=file.close)
            yield

    def write_text(self, name: str, text: str) -> None:
        """Write RUN/name whole or not at all."""
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")

    def beat(self, update: int) -> None:
        """Tell a watcher that the run lives: the file's time is now, its content the number of updates done."""
        # Renamed, so that a watcher never reads half; not synced, since after a power loss nobody waits for it.
        fresh = self.path / ".heartbeat.tmp"
        fresh.write_text(f"{update}\n")
        fresh.replace(self.path / "heartbeat")


@contextmanager
def logging_to(folder: Path, total_updates: int, *, quiet: bool = False) -> Iterator[Progress | None]:
    """Log to the terminal (quiet: warnings only) and to RUN/train.log. Yields the progress bar in a terminal, None
    elsewhere (plain lines)."""
    file = logging.FileHandler(folder / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = Console()
    if console.is_terminal and not quiet:
        screen: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
        columns = (TextColumn("updates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=console)
        progress.add_task("updates", total=total_updates)
        progress.start()
    else:
        screen, progress = logging.StreamHandler(sys.stdout), None
    if quiet:
        screen.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    log.propagate = False
    handlers = (file, screen)
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield progress
    finally:
        if progress:
            progress.stop()
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class StopSignals:
    """SIGTERM and SIGINT ask the run to end after the current update; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.received or 0)
