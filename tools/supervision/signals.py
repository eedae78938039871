"""Signals to the supervisor, taken one at a time, and a wait that each of them ends at once."""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from types import FrameType
from typing import Any


class Signals:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) are kept to be taken; SIGCHLD only ends a wait.

    SIGHUP stays ignored where it was (nohup).
    """

    def __init__(self) -> None:
        self._asked: deque[int] = deque()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._awake, self._wake = os.pipe()
        for descriptor in (self._awake, self._wake):
            os.set_blocking(descriptor, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._awake)
        os.close(self._wake)

    def wait(self, seconds: float) -> None:
        """Sleep so long, or until a signal arrives."""
        if self._asked:
            return
        select.select([self._awake], [], [], max(seconds, 0.0))
        try:
            while os.read(self._awake, 512):
                pass
        except BlockingIOError:
            pass

    def take(self) -> int | None:
        """The next signal that asks to stop, SIGTERM or SIGINT; None where there is none."""
        return self._asked.popleft() if self._asked else None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
