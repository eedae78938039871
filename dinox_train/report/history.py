"""What a run folder tells of its run: lines, events, configuration, and how far it came.

Invariant: a history that was refreshed, or was kept (kept.py), equals one that is read anew from the same files. What
the run is judged by has to be whole (ValueError otherwise); what stands beside it, of the machine and of a monitor, is
left out where it is not, and `unread` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinox_train.config import Config, ConfigError, load_config
from dinox_train.report.columns import Columns
from dinox_train.report.kept import EVERY_BYTES, NAME, keep, kept
from dinox_train.report.monitored import Monitored
from dinox_train.report.tail import LineTail


@dataclass(kw_only=True)
class History:
    """One run: numbers of metrics.jsonl and system.jsonl; events; config and environment None where missing."""

    folder: Path
    lines: Columns = field(default_factory=Columns)
    system: Columns = field(default_factory=Columns)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: Config | None = None
    environment: dict[str, Any] | None = None
    monitored: Monitored = field(default_factory=Monitored)
    skipped: list[float] = field(default_factory=list)
    """The updates that were not applied."""
    texts: dict[str, str] = field(default_factory=dict)
    """What the lines say in words: the last of each field."""
    unread: list[str] = field(default_factory=list)
    """What could not be read of what stands beside the run, in words."""

    def add_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """More of metrics.jsonl."""
        for line in (lines := list(lines)):
            if line.get("applied") is False:
                self.skipped.append(float(line["update"]))
            for name, value in line.items():
                if type(value) is str:
                    self.texts[name] = value
        self.lines.add(lines)

    def now(self, name: str) -> float | None:
        """The mean of a field over the last updates; None where they hold no number."""
        return self.lines.now(name)

    def first(self, name: str) -> float | None:
        """The first value of a field; None where there is none."""
        return self.lines.first(name)

    def last(self, name: str) -> float | None:
        """The last value of a field; None where there is none."""
        return self.lines.last(name)

    def largest(self, name: str) -> float | None:
        """The largest value of a field; None where there is none."""
        return self.lines.largest(name)

    @property
    def last_update(self) -> int:
        """The number of updates done; 0 before the first line."""
        return int(self.lines.last("update") or 0)

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last update that there is a line of: what all curves run over."""
        return self.lines.first("update") or 0.0, self.lines.last("update") or 0.0

    @property
    def state(self) -> tuple[str, str]:
        """`done`, `running` or `stopped`, and what is known about it in words."""
        if self.config and self.last_update >= self.config.train.updates:
            return "done", ""
        if self.events and self.events[-1].get("event") == "ended":
            stops = [event for event in self.events[-2:] if event.get("event") in ("stopped", "ended")]
            return "stopped", str(stops[0].get("text", ""))
        return "running", ""


class HistoryReader:
    """Reads a run folder again and again, each time what is new in it: since the process before, where it was kept."""

    def __init__(self, folder: Path) -> None:
        self._history = History(folder=folder)
        self._lines = LineTail(folder / "metrics.jsonl")
        self._events = LineTail(folder / "events.jsonl")
        self._system = LineTail(folder / "system.jsonl")
        self._config_bytes: bytes | None = None
        self._kept_at = 0
        self._go_on()

    def read(self) -> History:
        """What the folder tells now. A torn last line is ignored, a missing file is as if empty.

        Raises ValueError where metrics.jsonl, events.jsonl or env.json hold something else than JSON (file and line).
        """
        history, folder = self._history, self._history.folder
        history.unread = []
        if self._lines.begins_anew():
            history.lines, history.skipped, history.texts = Columns(), [], {}
            self._kept_at = 0
        for lines in self._lines.blocks():
            history.add_lines(lines)
        if self._events.begins_anew():
            history.events = []
        for lines in self._events.blocks():
            history.events += lines
        self._read_system()
        history.unread += history.monitored.read(folder / "monitor")
        self._read_config()
        environment = folder / "env.json"
        history.environment = json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else None
        return history

    def keep(self) -> None:
        """Spare the next process to read the lines again, where they have become many since this was done."""
        if self._lines.offset - self._kept_at < EVERY_BYTES:
            return
        history, self._kept_at = self._history, self._lines.offset
        facts = {"tail": self._lines.facts(), "columns": history.lines.facts()}
        facts |= {"skipped": history.skipped, "texts": history.texts}
        keep(history.folder / NAME, facts, history.lines.arrays())

    def _go_on(self) -> None:
        found, history = kept(self._history.folder / NAME), self._history
        if found is not None:
            facts, arrays = found
            self._lines.go_on(facts["tail"])
            self._kept_at = self._lines.offset
            history.lines = Columns.restored(facts["columns"], arrays)
            history.skipped, history.texts = facts["skipped"], facts["texts"]

    def _read_system(self) -> None:
        try:
            if self._system.begins_anew():
                self._history.system = Columns()
            for lines in self._system.blocks():
                self._history.system.add(lines)
        except (OSError, ValueError) as error:
            self._history.unread.append(str(error))

    def _read_config(self) -> None:
        path = self._history.folder / "config.yaml"
        content = path.read_bytes() if path.exists() else None
        if content != self._config_bytes:
            self._config_bytes = content
            try:
                self._history.config = load_config([path]) if content is not None else None
            except ConfigError:
                self._history.config = None  # of another version: the report shows its text all the same
