"""A trainer's process: started in a session of its own, asked about its condition, told, and ended with all it started.

Invariant: its number is not reaped before its group was cleared, so that no signal can reach somebody else's process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_STATES = {
    "D": "waits in the kernel and cannot be interrupted (state D: the GPU's driver or a disk does not answer)",
    "T": "is stopped (SIGSTOP)",
    "t": "is held by a debugger",
    "Z": "has ended and is not reaped",
}


class Child:
    """A running command. Raises OSError where it cannot be started."""

    def __init__(self, command: Sequence[str], errors: BinaryIO) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True, preexec_fn=_ends_with_its_parent()
        )
        self.pid = self._process.pid
        self.started = started(self.pid)

    def has_ended(self) -> bool:
        """Whether it has; it stays to be reaped."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def reap(self) -> int:
        """End what is left of its group, and give its exit code, or minus the signal's number. Only once it ended."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    def tell(self, number: int) -> None:
        """Send it a signal, and let it go on if it is stopped, as a stopped process hears nothing."""
        os.kill(self.pid, number)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGCONT)

    def dump_stacks(self) -> bool:
        """Ask for its stacks by SIGUSR1, if it handles that (faulthandler.register); any other would die of it."""
        if not catches(self.pid, signal.SIGUSR1):
            return False
        os.kill(self.pid, signal.SIGUSR1)
        return True

    def kill(self) -> None:
        """SIGKILL to its group and to all that it started, in other groups too."""
        kill_group(self.pid)


def kill_group(pid: int) -> None:
    """SIGKILL to the group that a process leads and to all its descendants."""
    descendants: list[psutil.Process] = []
    with suppress(psutil.Error):
        descendants = psutil.Process(pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for process in descendants:
        with suppress(psutil.Error):
            process.kill()


def started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since boot: with the number it names one process of a boot.

    None where it is gone, or the system does not say.
    """
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return int(fields[19]) if fields else None


def condition(pid: int) -> str:
    """In words, what a process or one of its threads is in that it cannot come out of by itself; else empty."""
    found: dict[str, list[Path]] = {}
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        fields = _stat(task / "stat")
        if fields:
            found.setdefault(fields[0], []).append(task)
    for state, words in _STATES.items():
        if tasks := found.get(state):
            where = _waits_in(tasks[0])
            one = f"process {pid}" if sum(map(len, found.values())) == 1 else f"a thread of process {pid}"
            return f"{one} {words}{f', in {where}' if where else ''}"
    return ""


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; False where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _waits_in(task: Path) -> str:
    with suppress(OSError):
        name = (task / "wchan").read_text().strip()
        return "" if name == "0" else name
    return ""


def _stat(path: Path) -> list[str]:
    """The fields of a /proc/…/stat from the third on (the second is a name, which may hold anything)."""
    try:
        return path.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _ends_with_its_parent() -> Callable[[], None] | None:
    """SIGTERM for the child when this process dies: nobody would watch it any more, and it holds the run folder."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def arrange() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # died before that
            os._exit(1)

    return arrange
