"""One run folder's supervisor: starts a trainer, has it watched to its end, starts another where the policy allows it.

Invariant: never two trainers at once, and no start that the policy has not allowed.
"""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from supervision.child import Child, condition, kill_group, started
from supervision.errors import ErrorStream, fingerprint, updates_done
from supervision.heartbeat import Heartbeat
from supervision.ledger import Ledger, Moment
from supervision.policy import End, decide, signal_name
from supervision.signals import Signals
from supervision.voice import say
from supervision.watch import Settings, Watch

EXIT_ERROR, EXIT_USAGE, EXIT_KILLED = 1, 2, 128 + signal.SIGKILL
_NO_HANG = (0, 2, 4)  # said by a trainer that was slow and ended by itself, in spite of what we took it for


class FolderBusy(RuntimeError):
    """Another process has the run folder: which, what to do."""


class Supervisor:
    """One supervised run. `run` gives the exit code."""

    def __init__(self, command: Sequence[str], folder: Path, settings: Settings) -> None:
        self.command, self.folder, self.settings = list(command), folder, settings

    def run(self) -> int:
        """Watch to the end. Raises OSError, ValueError (a damaged ledger), FolderBusy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), Signals() as self.signals:
            self.ledger = Ledger(self.folder)
            asked = self._await_free_folder()
            while asked is None:
                code, wait_s = self._one_start()
                if wait_s is None:
                    return code
                asked = self._sleep(wait_s)
            say(f"{signal_name(asked)}: no trainer was running")
            return 128 + asked

    def _one_start(self) -> tuple[int, float | None]:
        """Start a trainer and see it end: the exit code to end with, and the wait before the next start, or None."""
        begin = Moment.now()
        try:
            errors = ErrorStream(self.folder)
            with errors.open() as file:
                child = Child(self.command, file)
        except (FileNotFoundError, PermissionError) as error:
            say(f"{error.filename or self.command[0]}: cannot be started ({error.strerror})")
            return EXIT_USAGE, None
        except OSError as error:  # no memory for a process, a full disk: it may pass
            say(f"{self.command[0]}: cannot be started now ({error.strerror})")
            return self._judge(End(EXIT_ERROR, False, updates_done(self.folder), f"OSError {error.errno}"), begin)
        say(f"started process {child.pid}")
        self._note("start", begin, update=updates_done(self.folder), pid=child.pid, process_started=child.started)
        watch = Watch(self.settings, self.signals, self.folder, child, errors)
        code = watch.to_its_end()
        errors.show()
        if code is None:
            return EXIT_KILLED, None
        hung = watch.hung and code not in _NO_HANG
        # A hang's last words are its stacks, or nothing: no two are alike.
        error = "" if hung else fingerprint(errors.last())
        end = End(code, hung, updates_done(self.folder), error)
        if watch.asked is None:
            return self._judge(end, begin)
        self._record(end, begin, f"this supervisor got {signal_name(watch.asked)}", restarts=False)
        return (128 - code if code < 0 else code), None

    def _judge(self, end: End, begin: Moment) -> tuple[int, float | None]:
        limits = self.settings
        decision = decide(
            end,
            self.ledger.ends(),
            Moment.now(),
            max_restarts=limits.max_restarts,
            first_wait_s=limits.first_wait_s,
        )
        self._record(end, begin, decision.because, restarts=decision.restarts)
        if not decision.restarts:
            return end.exit_code, None
        say(f"it starts again in {decision.wait_s:.0f} s")
        return end.exit_code, decision.wait_s

    def _record(self, end: End, begin: Moment, because: str, *, restarts: bool) -> None:
        now = Moment.now()
        self._note(
            "end",
            now,
            update=end.update,
            why=end.why,
            exit_code=end.code,
            error=end.error,
            ran_s=round(now.monotonic_s - begin.monotonic_s, 3),
            next="restart" if restarts else "stop",
            because=because,
        )
        say(f"ended after update {end.update}: {end.why}" + (f"; not started again: {because}" if because else ""))

    def _note(self, event: str, moment: Moment, **values: object) -> None:
        error = self.ledger.add(event, moment, **values)
        if error is not None:
            say(f"restarts.jsonl cannot be written ({error.strerror}); the run goes on, this row is missing there")

    def _await_free_folder(self) -> int | None:
        """Wait until no trainer has the folder: one that lost its supervisor may still be writing its checkpoint.

        Gives the signal that ended the wait, if one did. Raises FolderBusy where the trainer is somebody else's.
        """
        if is_free(self.folder):
            return None
        pid = self._left_behind()
        if pid is None:
            raise FolderBusy(f"{self.folder}: another process trains in this folder; wait for it or stop it.")
        say(f"process {pid}, which an earlier supervisor left, still trains: waiting until it has saved and ended")
        heartbeat = Heartbeat(self.folder, time.monotonic(), self.settings.longest_gap_s)
        while not is_free(self.folder):
            self.signals.wait(self.settings.poll_s)
            if (asked := self.signals.take()) is not None:
                return asked
            heartbeat.look(time.monotonic())
            if heartbeat.silent_s > self.settings.grace_s:
                where = condition(pid)
                say(f"it does not end by itself{where and f'; {where}'}: SIGKILL to all its processes")
                kill_group(pid)
                heartbeat.forgive()
        return None

    def _left_behind(self) -> int | None:
        """The process of a start whose end no supervisor saw, if it still is that process."""
        row = self.ledger.unfinished()
        if row is None or row["boot"] != Moment.now().boot or row.get("process_started") is None:
            return None
        return row["pid"] if started(row["pid"]) == row["process_started"] else None

    def _sleep(self, seconds: float) -> int | None:
        """Sleep; the signal that ended it, if one did."""
        end_s = time.monotonic() + seconds
        while (asked := self.signals.take()) is None and (left_s := end_s - time.monotonic()) > 0:
            self.signals.wait(left_s)
        return asked


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One supervisor a run folder. Raises FolderBusy, OSError."""
    with (folder / ".supervise.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(f"{folder}: another supervisor watches this folder.") from None
        yield


def is_free(folder: Path) -> bool:
    """Whether no trainer holds the folder just now (the lock of `dinox_train.run`)."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
