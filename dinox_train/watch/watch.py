"""The watch of a run: a thread that looks at the machine, writes digests, and feeds the user's command and the sinks.

What the training thread does here is to put things into queues. Invariant: whatever fails in here is said once in the
log, and neither ends nor slows the run; figures and texts are of the run and the machine, none of patients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from dinox_train.checkpoint import list_checkpoints
from dinox_train.metrics import VERSION, read_lines
from dinox_train.watch.command import Command
from dinox_train.watch.concerns import CONCERNS, Concerns
from dinox_train.watch.digest import News, digest_of
from dinox_train.watch.machine import Machine, host_bytes
from dinox_train.watch.sinks import Sinks
from dinox_train.watch.system_file import SystemFile

if TYPE_CHECKING:
    from dinox_train.config import Config

log = logging.getLogger("dinox_train")
Tell = Callable[[str, str], None]
DAY_S = 86400.0
_AGAIN_S = 3600.0
"""The same alarm is told to the command once in so long: one that comes and goes shall not fill a mailbox."""
_SPEED_EVERY_S, _SPEED_OVER = 10.0, 361
"""The speed is of an hour of updates: so many marks, so far apart."""
_END_S = 10.0
_CLOSE = object()
_ALWAYS = ("not saved", "rollback", "stopped", "ended")


class Watch:
    """One run's, on this machine: `start`, then `line` and `event` from the training thread, then `close`."""

    def __init__(self, folder: Path, config: Config, device: torch.device, machine: Machine | None = None) -> None:
        """machine: for tests; None: this one. The packages of log.sinks are installed (sinks.check_installed)."""
        self._folder, self._config, self._device, self._machine = folder, config, device, machine
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        self._command: Command | None = None
        self._sinks: Sinks | None = None
        self._system: SystemFile | None = None
        self._said: set[str] = set()
        self._untold: list[tuple[str, str]] = []

        # --- what digests are made of
        self._line: dict[str, Any] = {}
        self._evaluated: dict[str, Any] = {}
        self._reading: dict[str, Any] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=_SPEED_OVER)
        self._events: Counter[str] = Counter()
        self._newest = ""
        self._alarms: dict[str, str] = {}
        self._handed_s: dict[str, float] = {}
        self._digest_s = 0.0
        self._looks, self._look_s = 0, 0.0

    # --- the training thread

    def start(self, update: int, tell: Tell) -> None:
        """Begin to watch, after so many updates. tell: takes an event and its text, from any thread."""
        self._tell, self._begin_s = tell, time.monotonic()
        self._line = {"update": update} if update else {}
        arguments = self._config.events.arguments
        if arguments is not None:
            self._command = Command(arguments, self._config.events.timeout_s, self._folder.absolute())
        if self._config.log.sinks:
            self._sinks = Sinks(self._config.log.sinks, self._folder, tell)
        self._thread = threading.Thread(target=self._work, name="dinox-watch", daemon=True)
        self._thread.start()

    def line(self, line: dict[str, Any]) -> None:
        """The line of an update is written."""
        self._line = line
        if line.get("loss_val") is not None:
            self._evaluated = line
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= _SPEED_EVERY_S or line["update"] <= self._marks[-1][1]:
            self._marks.append((now, line["update"]))
        if self._sinks is not None:
            self._sinks.put(line)

    def event(self, event: str, text: str, alarm: str | None = None) -> None:
        """An event is written; alarm: its name, of an event `alarm` or `alarm over`."""
        self._inbox.put((event, text, alarm))

    def end(self) -> None:
        """A last reading, and what was told so far is in the digest; nothing is heard from here on."""
        if self._thread is not None and not self._has_ended:
            self._has_ended = True
            self._inbox.put(_CLOSE)
            self._thread.join(_END_S)

    def close(self) -> None:
        """`end`; then wait, within limits, for what was handed to the command and the sinks."""
        self.end()
        for part in (self._command, self._sinks):
            if part is not None:
                part.close()
        self._command = self._sinks = None

    # --- the thread

    def _work(self) -> None:
        self._try(self._prepare)
        every = self._config.watch.every_s
        # The day's digest needs a turn now and then, also of a run whose machine is not looked at.
        turn_s = every or 60.0
        next_s = self._begin_s + turn_s
        while True:
            try:
                given = self._inbox.get(timeout=max(next_s - time.monotonic(), 0.0))
            except Empty:
                self._try(self._turn)
                next_s = time.monotonic() + turn_s
                continue
            if given is _CLOSE:
                break
            self._try(lambda given=given: self._hear(*given))
        self._try(self._look)
        self._try(self._say_cost)
        if self._system is not None:
            self._system.close()

    def _prepare(self) -> None:
        self._read_alarms()
        if self._config.watch.every_s is None:
            return
        self._machine = self._machine or Machine(self._device, self._folder)
        shared = self._device.type == "cuda" and bool(torch.cuda.get_device_properties(self._device).is_integrated)
        self._concerns = Concerns(host_bytes(), shared=shared)
        self._system = SystemFile(self._folder / "system.jsonl")
        since = self._system.last.get("since_digest_s")
        self._digest_s = -since if isinstance(since, int | float) else 0.0

    def _turn(self) -> None:
        reading = self._look()
        if reading is not None:
            self._untold += self._concerns.see(reading, self._checkpoint_bytes())
        while self._untold:  # one that cannot be told now (the lines are reopened) is told later
            self._tell(*self._untold[0])
            del self._untold[0]
        if self._elapsed_s() - self._digest_s >= DAY_S:
            self._digest("daily", "a day has gone by")

    def _look(self) -> dict[str, Any] | None:
        """A reading of the machine, kept in the file."""
        system = self._system
        if self._machine is None or system is None:
            return None
        begin_s = time.thread_time()
        elapsed_s = self._elapsed_s()
        reading = {
            "version": VERSION,
            "update": self._line.get("update", 0),
            "elapsed_s": round(elapsed_s, 2),
            "since_digest_s": round(elapsed_s - self._digest_s),
            **self._machine.read(),
        }
        self._reading = reading
        self._try(lambda: system.write(reading))
        self._looks, self._look_s = self._looks + 1, self._look_s + time.thread_time() - begin_s
        return reading

    def _hear(self, event: str, text: str, alarm: str | None) -> None:
        self._events[event] += 1
        self._newest = f"{event}: {text}"
        if event == "rollback":  # which undoes alarms, too
            self._read_alarms()
        self._keep_alarm(event, text, alarm)
        if event == "alarm":
            self._digest("alarm", alarm or event)
        elif event in CONCERNS:
            self._digest("machine", event)
        elif event in _ALWAYS:
            self._digest(event, event)

    def _read_alarms(self) -> None:
        """Know the alarms of updates that were done before; concerns about the machine are of this process alone."""
        self._alarms = {name: text for name, text in self._alarms.items() if name in CONCERNS}
        for line in read_lines(self._folder / "events.jsonl"):
            if line["event"].removesuffix(" over") == "alarm":
                self._keep_alarm(line["event"], line["text"], line.get("alarm"))

    def _keep_alarm(self, event: str, text: str, alarm: str | None) -> None:
        """Know what is wrong now: alarms of the training, and concerns about the machine."""
        kind = event.removesuffix(" over")
        if kind != "alarm" and kind not in CONCERNS:
            return
        name = alarm or kind
        if event.endswith(" over"):
            self._alarms.pop(name, None)
        else:
            self._alarms[name] = text

    def _digest(self, occasion: str, why: str) -> None:
        """Write a digest, and hand it over where that is wished."""
        text = digest_of(
            News(
                run=self._folder.absolute().name,
                occasion=occasion if why == occasion else f"{occasion} ({why})",
                total=self._config.train.updates,
                line=self._line,
                evaluated=self._evaluated,
                updates_per_s=self._updates_per_s(),
                reading=self._reading,
                events=self._events.most_common(),
                newest=self._newest,
                checkpoint=max((int(path.name[5:]) for path in self._checkpoints()), default=None),
                alarms=dict(self._alarms),
            )
        )
        self._events.clear()
        now = self._elapsed_s()
        if occasion == "daily":
            self._digest_s = now
        if self._command is not None and occasion in self._config.events.on and self._is_due(occasion, why, now):
            self._command.hand(occasion, text)
        (self._folder / "digest.txt").write_text(text, encoding="utf-8")
        with (self._folder / "digests.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _is_due(self, occasion: str, why: str, now: float) -> bool:
        """Whether the command was not told the same a short while ago."""
        key = f"{occasion}/{why}"
        if occasion not in _ALWAYS and now - self._handed_s.get(key, -_AGAIN_S) < _AGAIN_S:
            return False
        self._handed_s[key] = now
        return True

    def _updates_per_s(self) -> float | None:
        if len(self._marks) < 2 or self._line["update"] <= self._marks[0][1]:
            return None
        (begin_s, first) = self._marks[0]
        return (self._line["update"] - first) / max(time.monotonic() - begin_s, 1e-9)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    def _checkpoints(self) -> list[Path]:
        return list_checkpoints(self._folder / "checkpoints")

    def _checkpoint_bytes(self) -> int | None:
        """What the newest checkpoint takes."""
        newest = self._checkpoints()[-1:]
        return sum(file.stat().st_size for file in newest[0].rglob("*") if file.is_file()) if newest else None

    def _say_cost(self) -> None:
        whole = max(self._elapsed_s(), 1e-9)
        if self._looks:
            log.info(
                "watch: %d looks at the machine, %.1f ms of CPU time each, %.3f %% of one core over %.0f s",
                *(self._looks, 1e3 * self._look_s / self._looks, 100 * self._look_s / whole, whole),
            )

    def _try(self, do: Callable[[], Any]) -> None:
        """Whatever fails is said, each kind once."""
        try:
            do()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if said not in self._said and len(self._said) < 20:
                self._said.add(said)
                log.warning("the watch of the machine: %s (training goes on)", said)
