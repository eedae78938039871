"""Hands a digest to the user's program (mail, ntfy, anything that reads), on a thread of its own.

No shell runs it. Invariant: `hand` returns at once, and a program that fails, hangs or is missing costs one warning.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue

log = logging.getLogger("dinox_train")
_MOST_WAITING, _SLACK_S = 8, 2.0


class Command:
    """One program, called for one digest after the other."""

    def __init__(self, arguments: Sequence[str], timeout_s: float, folder: Path) -> None:
        self._arguments, self._timeout_s, self._folder = list(arguments), timeout_s, folder
        self._waiting: Queue[tuple[str, str] | None] = Queue(_MOST_WAITING)
        self._warned = self._is_over = False
        self._running: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="dinox-command", daemon=True)
        self._thread.start()

    def hand(self, occasion: str, digest: str) -> None:
        """Have the program called with the digest on its standard input; dropped where too many wait already."""
        try:
            self._waiting.put_nowait((occasion, digest))
        except Full:
            self._warn("is slower than what it is told: a digest was not handed over")

    def close(self) -> None:
        """Wait for what was handed over, a little longer than one call may take; then end the program."""
        with suppress(Full):
            self._waiting.put(None, timeout=self._timeout_s)
        self._thread.join(self._timeout_s + _SLACK_S)
        if self._thread.is_alive():
            with suppress(Empty):
                while True:
                    self._waiting.get_nowait()
            with suppress(Full):
                self._waiting.put_nowait(None)
            self._is_over = True
            self._end()
            self._thread.join(_SLACK_S)

    def _work(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._call(*waiting)
            except OSError as error:
                self._warn(f"cannot be started: {error.strerror or error}")
            except Exception as error:
                self._warn(f"failed: {error}")

    def _call(self, occasion: str, digest: str) -> None:
        environment = os.environ | {"DINOX_EVENT": occasion, "DINOX_RUN": str(self._folder)}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own: Ctrl-C in the terminal is for the trainer, and what it starts can be ended with it.
        with subprocess.Popen(
            self._arguments, stdin=pipe, stdout=null, stderr=pipe, env=environment, start_new_session=True
        ) as self._running:
            try:
                _, said = self._running.communicate(digest.encode(), timeout=self._timeout_s)
            except subprocess.TimeoutExpired:
                self._end()
                self._warn(f"was ended: it ran for more than events.timeout_s, {self._timeout_s:g} s")
                return
        if self._is_over:
            self._warn("was ended: the run is over, and it had not come to its end")
        elif self._running.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            self._warn(f"failed with exit code {self._running.returncode}: {''.join(last)[:200]}")
        else:
            self._warned = False

    def _end(self) -> None:
        """End the program and what it started."""
        running = self._running
        if running is not None and running.poll() is None:
            with suppress(OSError):
                os.killpg(running.pid, signal.SIGKILL)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("events.command (%s) %s. Training goes on; RUN/digest.txt holds it.", self._arguments[0], what)
