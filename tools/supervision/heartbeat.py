"""How long a trainer has said nothing, and how long it may.

Invariant: only time that this process was awake for counts, so neither a set clock nor a stopped supervisor or a paused
machine looks like a hang.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_BEATS = 2
"""A process that has beaten no more often than that may still be compiling."""


class Heartbeat:
    """RUN/heartbeat as it changes under our eyes. `look` often; what was there at the beginning is no beat."""

    def __init__(self, folder: Path, now_s: float, longest_gap_s: float) -> None:
        """`now_s`: a monotonic clock. `longest_gap_s`: two looks further apart count as that: we were not awake."""
        self._file = folder / "heartbeat"
        self._longest_gap_s = longest_gap_s
        self._seen = self._read()
        self._looked_s = now_s
        self.silent_s = 0.0
        self.beats = 0
        self.update: int | None = None
        """The number of updates done that the last beat named; None before the first beat."""

    def look(self, now_s: float) -> None:
        """Take the file as it is now."""
        seen = self._read()
        if seen is not None and seen != self._seen:
            self._seen = seen
            self.silent_s = 0.0
            self.beats += 1
            self.update = int(seen[1]) if seen[1].strip().isdigit() else self.update
        else:
            self.silent_s += min(max(now_s - self._looked_s, 0.0), self._longest_gap_s)
        self._looked_s = now_s

    def forgive(self) -> None:
        """Count the silence afresh: the trainer has just been told something."""
        self.silent_s = 0.0

    def _read(self) -> tuple[int, bytes] | None:
        try:
            return self._file.stat().st_mtime_ns, self._file.read_bytes()
        except OSError:
            return None


@dataclass(frozen=True)
class Rhythm:
    """Which updates of a run take much longer than the others, as its config.yaml says. None: unknown."""

    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    updates: int | None = None
    stage_ends: frozenset[int] = frozenset()
    loader_timeout_s: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Rhythm:
        """Of RUN/config.yaml; all unknown where that is missing, half written or of another form."""
        import yaml

        try:
            tree = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return cls()
        ends, total = [], 0
        stages = tree.get("stages") if isinstance(tree, dict) else None
        for stage in stages if isinstance(stages, list) else []:
            length = _integer(stage, "updates")
            if length is None:
                break
            total += length
            ends.append(total)
        timeout_s = _section(tree, "data").get("timeout_s")
        return cls(
            _integer(_section(tree, "evaluate"), "every"),
            _integer(_section(tree, "checkpoint"), "every"),
            _integer(_section(tree, "train"), "updates"),
            frozenset(ends),
            float(timeout_s) if isinstance(timeout_s, int | float) else None,
        )

    def is_slow(self, done: int) -> bool:
        """Whether the trainer, `done` updates after its beginning, evaluates, saves, begins a stage or ends next."""
        if done in self.stage_ends or (self.updates is not None and done + 1 >= self.updates):
            return True
        return any(every and (done + 1) % every == 0 for every in (self.evaluate_every, self.checkpoint_every))


def limit_s(heartbeat: Heartbeat, rhythm: Rhythm, *, hang_s: float, slow_s: float) -> float:
    """The silence that is still no hang, seconds: `slow_s` for the first updates of a process and for slow ones."""
    update = heartbeat.update
    if heartbeat.beats <= FIRST_BEATS or update is None or rhythm.is_slow(update):
        return max(hang_s, slow_s)
    return hang_s


def _section(tree: Any, name: str) -> dict[str, Any]:
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def _integer(tree: Any, name: str) -> int | None:
    value = tree.get(name) if isinstance(tree, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
