"""A process for each measurement, with a limit of time: what crashes, hangs or fills the memory takes nothing with it.

Invariant: when `measure` returns or raises, the process and all that it started have ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import machine

from knee_search.points import CRASHED, OK, OUT_OF_MEMORY, TIMED_OUT

POLL_S = 0.1
SAID_CHARACTERS = 1500
_OF_MEMORY = (
    *("out of memory", "OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory"),
    *("memory is full", "Cannot allocate memory", "bad_alloc", "are free: lower"),
)


class Interrupted(Exception):
    """The search was told to end; `number` of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Stop:
    """SIGINT and SIGTERM are noted: what is being measured ends, and the results are written. A second one ends all."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def check(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)


@dataclass(frozen=True)
class Ended:
    """How a measurement ended."""

    status: str
    answer: Any
    """What the process wrote, or what `watch` gave; None where it failed."""
    said: str
    wall_s: float


def measure(
    kind: str,
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    stop: Stop,
    watch: Callable[[Path], Any] | None = None,
) -> Ended:
    """Have a process measure `kind` (worker.py).

    watch: is given the process's folder again and again; as soon as it gives something, that is the answer, and the
    process is killed. Raises Interrupted.
    """
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dinox-knee-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "request.json").write_text(
            json.dumps({"kind": kind, "folder": name, "parent": os.getpid(), **request})
        )
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                # -P: of the folder where the user is, paths are taken, but no modules.
                [sys.executable, "-P", "-m", "knee_search.worker", str(folder / "request.json")],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        try:
            answer, timed_out = _wait(process, folder, begin_s + timeout_s, stop, watch)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        spent_s = time.monotonic() - begin_s
        if answer is not None:
            return Ended(OK, answer, "", spent_s)
        file = folder / "answer.json"
        if not timed_out and process.returncode == 0 and file.exists():
            return Ended(OK, json.loads(file.read_text()), "", spent_s)
        text = (folder / "said").read_text(errors="replace").strip()
        return Ended(status_of(process.returncode, text, timed_out), None, text[-SAID_CHARACTERS:], spent_s)


def _wait(
    process: subprocess.Popen[bytes], folder: Path, until_s: float, stop: Stop, watch: Callable[[Path], Any] | None
) -> tuple[Any, bool]:
    """(what `watch` gave, whether the time ran out)."""
    while True:
        ended = process.poll() is not None
        found = watch(folder) if watch else None
        if found is not None or ended:
            return found, False
        stop.check()
        if time.monotonic() > until_s:
            return None, True
        time.sleep(POLL_S)


def status_of(code: int | None, said: str, timed_out: bool) -> str:
    """What a process died of. One that the system killed has, as a rule, taken too much memory."""
    if timed_out:
        return TIMED_OUT
    if code == -signal.SIGKILL or any(words in said for words in _OF_MEMORY):
        return OUT_OF_MEMORY
    return CRASHED


def environment() -> dict[str, str]:
    """Of a process: ours to be imported, the rest as it is."""
    folders = [str(machine.REPOSITORY), str(machine.REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
