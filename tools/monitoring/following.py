"""A run followed to its end: each new checkpoint is looked at, once, oldest first.

Invariant: a damaged or rotated checkpoint, a full disk and short memory end nothing; a damaged set, another set, and a
checkpoint of another version do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervision.heartbeat import Heartbeat

from dinox_train.checkpoint import DamagedCheckpoint
from dinox_train.metrics import read_lines
from monitoring.observer import Observer, figures_of
from monitoring.snapshots import Gone, NoRoom, Opened, Snapshot, snapshots

ENDED_S = 300.0
"""Silence after which a run that said that it ends will not be started again by its supervisor."""

Say = Callable[[str], None]


class Follower:
    """One run, and the looks at it in OUTPUT. `damaged` and `waiting`: checkpoints that could not be looked at."""

    def __init__(self, run: Path, output: Path, observe: Callable[[Opened], Observer], say: Say) -> None:
        """observe: makes the observer, once there is a checkpoint that says of what."""
        self.run, self.output, self._observe, self._say = run, output, observe, say
        self._observer: Observer | None = None
        self._left: set[tuple[str, str | None]] = set()
        self.damaged = 0
        self.waiting: str | None = None

    def look(self) -> int:
        """Look at all that is new; returns how many looks that were. Raises OSError, ShardError, CheckpointError."""
        looks = 0
        self.waiting = None
        while (snapshot := self._next()) is not None:
            begin_s = time.monotonic()
            try:
                opened = snapshot.open()
                if self._observer is None:
                    self._observer = self._observe(opened)
                figures = self._observer.look(opened)
            except Gone:
                self._say(f"update {snapshot.update}: rotated away before it was read; the next one is taken")
                continue
            except DamagedCheckpoint as error:
                self._left.add((snapshot.folder.name, snapshot.digest))
                self.damaged += 1
                self._say(f"update {snapshot.update}: damaged, left out: {error}")
                continue
            except NoRoom as error:
                self.waiting = f"update {snapshot.update} waits: {error}"
                break
            looks += 1
            self._say(in_words(figures, time.monotonic() - begin_s))
        return looks

    def to_the_end(self, every_s: float, patience_s: float) -> None:
        """Look again and again, until the run is done or silent. Raises ShardError, CheckpointError."""
        heartbeat = Heartbeat(self.run, time.monotonic(), float("inf"))
        told: str | None = None
        while True:
            trouble: str | None = None
            try:
                looks = self.look()
                trouble = self.waiting
            except OSError as error:
                looks, trouble = 0, f"cannot look just now: {error.strerror or error}: {error.filename or self.output}"
            if trouble is not None and trouble != told:
                self._say(f"{trouble}; it is tried again")
            told = trouble
            heartbeat.look(time.monotonic())
            if looks:
                heartbeat.forgive()
            if over := self._over(heartbeat.silent_s, patience_s):
                self._say(over)
                return
            time.sleep(every_s)

    def _next(self) -> Snapshot | None:
        for snapshot in snapshots(self.run / "checkpoints"):
            left = (snapshot.folder.name, snapshot.digest) in self._left
            if not left and figures_of(self.output, snapshot) is None:
                return snapshot
        return None

    def _over(self, silent_s: float, patience_s: float) -> str | None:
        """Why there is no more to wait for; None while there is."""
        found = snapshots(self.run / "checkpoints")
        figures = figures_of(self.output, found[-1]) if found else None
        if figures is not None and figures["update"] >= figures["updates"]:
            return f"the run is done: {figures['update']} updates"
        if silent_s >= min(ENDED_S, patience_s) and self._says_ended():
            return "the run has ended"
        if silent_s >= patience_s:
            return f"the run has been silent for {silent_s / 60:.0f} minutes: no longer followed"
        return None

    def _says_ended(self) -> bool:
        try:
            events = read_lines(self.run / "events.jsonl")
        except (OSError, ValueError):
            return False
        return bool(events) and events[-1].get("event") == "ended"


def in_words(figures: dict[str, Any], seconds: float) -> str:
    """One line for people."""
    parts = []
    if figures["retrieval"] is not None:
        mrr = figures["retrieval"]["mrr"]
        reach = "" if mrr["low"] is None else f" ({mrr['low']:.3f} to {mrr['high']:.3f})"
        parts.append(f"mrr {mrr['value']:.3f}{reach}, chance {mrr['chance']:.3f}")
    names = (("feature std", "feature_std"), ("rank", "effective_rank"), ("patch similarity", "patch_similarity"))
    parts += [f"{name} {figures[key]:.3g}" for name, key in names if figures[key] is not None]
    drift = figures["gram_drift"]["previous"]
    if drift is not None and drift["rms"] is not None:
        parts.append(f"Gram drift {drift['rms']:.3f} since update {drift['update']}")
    return f"update {figures['update']}: {', '.join(parts)}; {seconds:.1f} s"
