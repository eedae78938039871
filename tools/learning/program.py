"""A program in a process of its own, that is told to end when the session is over and does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from learning.plan import REPOSITORY

PATIENCE_S = 120
_POLL_S = 0.05


class OverError(RuntimeError):
    """The session's minutes are over."""


class FailedError(RuntimeError):
    """A program failed; the message says which, and where its words are."""


def run_program(words: Sequence[str], log: Path, end_s: float, allowed: Sequence[int] = (0,)) -> None:
    """Run Python with these words to the end. end_s: of time.monotonic().

    Raises OverError where it had to be stopped (SIGTERM: a trainer saves its work), FailedError for another exit code.
    """
    if time.monotonic() >= end_s:
        raise OverError
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this program, which tells the child what it means for it
        )
    try:
        while child.poll() is None and time.monotonic() < end_s:
            time.sleep(_POLL_S)
    finally:
        stopped = child.poll() is None
        if stopped:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    if stopped:
        raise OverError
    if child.returncode not in allowed:
        last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise FailedError(f"{' '.join(words[:2])} ended with exit code {child.returncode}: {last} (all of it: {log})")
