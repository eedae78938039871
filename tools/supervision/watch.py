"""One trainer from its start to its end: watched, told to end where it is silent too long, killed if that fails."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from supervision.child import Child, condition
from supervision.errors import ErrorStream
from supervision.heartbeat import Heartbeat, Rhythm, limit_s
from supervision.policy import signal_name
from supervision.signals import Signals
from supervision.voice import say


@dataclass(frozen=True)
class Settings:
    """All in seconds but `max_restarts` (within 24 hours)."""

    hang_s: float
    slow_s: float
    grace_s: float
    first_wait_s: float
    max_restarts: int
    poll_s: float = 1.0
    dump_s: float = 3.0
    """Time to write its stacks, before it is told to end."""
    unkillable_s: float = 30.0
    """After SIGKILL: then its condition is said, and again and again."""

    @property
    def longest_gap_s(self) -> float:
        """Looks further apart than this count as this far: this process was stopped, or the machine paused."""
        return 5 * self.poll_s


class Watch:
    """A started trainer. `to_its_end`, `hung` and `asked` (the signal passed on last) say what became of it."""

    def __init__(self, settings: Settings, signals: Signals, folder: Path, child: Child, errors: ErrorStream) -> None:
        self.settings, self.signals, self.folder, self.child, self.errors = settings, signals, folder, child, errors
        self.heartbeat = Heartbeat(folder, time.monotonic(), settings.longest_gap_s)
        self.rhythm = Rhythm()
        self.asked: int | None = None
        self.hung = False
        self._times_asked = 0
        self._stage = "watched"

    def to_its_end(self) -> int | None:
        """Its exit code, or minus the signal's number; None where it does not die and we were told not to wait."""
        while not self.child.has_ended():
            self.signals.wait(self.settings.poll_s)
            self.errors.show()
            while (asked := self.signals.take()) is not None:
                if self._stage == "killed":
                    say(f"{signal_name(asked)}: process {self.child.pid} cannot be ended and is left behind")
                    self.asked = asked
                    return None
                self._pass_on(asked)
            before = self.heartbeat.beats
            self.heartbeat.look(time.monotonic())
            if before == 0 and self.heartbeat.beats:
                self._learn_rhythm()
            if self.heartbeat.silent_s > self._patience_s() and not self.child.has_ended():
                self._lose_patience()
        return self.child.reap()

    def _learn_rhythm(self) -> None:
        self.rhythm = Rhythm.read(self.folder)
        timeout_s = self.rhythm.loader_timeout_s
        if timeout_s is not None and timeout_s >= self.settings.hang_s:
            say(
                f"--hang-minutes ({self.settings.hang_s / 60:g}) is not longer than data.timeout_s ({timeout_s:g} s): "
                "a loader that stalls will be taken for a hang"
            )

    def _patience_s(self) -> float:
        limits = self.settings
        if self._stage == "killed":
            return limits.unkillable_s
        if self._stage == "told":
            # Told by us, it hangs already; told by a person, it may have to end a slow update and write a checkpoint.
            return limits.grace_s if self.hung else max(limits.hang_s, limits.slow_s)
        return limit_s(self.heartbeat, self.rhythm, hang_s=limits.hang_s, slow_s=limits.slow_s)

    def _lose_patience(self) -> None:
        silent, where = f"{self.heartbeat.silent_s:.0f} s", condition(self.child.pid)
        if self._stage == "watched":
            self.hung, self._stage = True, "told"
            update = self.heartbeat.update
            place = "before its first update" if update is None else f"after update {update}"
            say(f"no heartbeat for {silent} {place}: it hangs{where and f'; {where}'}. It is told to end")
            if self.child.dump_stacks():
                time.sleep(self.settings.dump_s)
                self.errors.show()
            if not self.child.has_ended():
                self.child.tell(signal.SIGTERM)
        elif self._stage == "told":
            say(f"it did not end within {silent}{where and f'; {where}'}: SIGKILL to all its processes")
            self._kill()
        else:
            say(
                f"not even SIGKILL ends it{where and f': {where}'}. No other is started, as it holds the device. If "
                "this stays so, restart the machine: the newest checkpoint is intact"
            )
        self.heartbeat.forgive()

    def _pass_on(self, number: int) -> None:
        """Tell the trainer what we were told: once, it ends with a checkpoint; twice, at once; three times, we kill."""
        self.asked, self._stage = number, "told"
        self._times_asked += 1
        self.heartbeat.forgive()
        if self.child.has_ended():
            return
        if self._times_asked >= 3:
            say(f"{signal_name(number)} for the third time: SIGKILL to all its processes")
            self._kill()
        else:
            say(f"{signal_name(number)}: passed on; " + ("it saves and ends" if self._times_asked == 1 else "at once"))
            self.child.tell(number)

    def _kill(self) -> None:
        self.child.kill()
        self._stage = "killed"
