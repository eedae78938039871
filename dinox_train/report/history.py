"""What a run folder tells of its run: lines, events, configuration, and how far it came. Reads, never writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinox_train.config import Config, ConfigError, load_config
from dinox_train.metrics import read_lines

RECENT = 20  # "now" is the last so many updates, or the last twentieth of a longer run


@dataclass(frozen=True, kw_only=True)
class History:
    """One run: `lines` of metrics.jsonl, `events` of events.jsonl; config and environment None where missing."""

    folder: Path
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: Config | None
    environment: dict[str, Any] | None
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # a column is read from all lines once

    @property
    def updates(self) -> np.ndarray:
        """The updates that `lines` are of, float64 (n,)."""
        return self.column("update")

    def column(self, name: str) -> np.ndarray:
        """The values of one field, float64 (n,), NaN where a line has no number."""
        if name not in self._columns:
            values = [_number(line.get(name)) for line in self.lines]
            self._columns[name] = np.array(values, dtype=np.float64)
        return self._columns[name]

    def now(self, name: str) -> float | None:
        """The mean of a field over the last updates; None where they hold no number."""
        values = self.column(name)[-max(RECENT, len(self.lines) // 20) :]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    def first(self, name: str) -> float | None:
        """The first value of a field; None where there is none."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return float(values[0]) if len(values) else None

    def last(self, name: str) -> float | None:
        """The last value of a field; None where there is none."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    @property
    def last_update(self) -> int:
        """The number of updates done; 0 before the first line."""
        return int(self.lines[-1]["update"]) if self.lines else 0

    @property
    def skipped(self) -> list[float]:
        """The updates that were not applied."""
        return [float(line["update"]) for line in self.lines if line.get("applied") is False]

    @property
    def state(self) -> tuple[str, str]:
        """`done`, `running` or `stopped`, and what is known about it in words."""
        if self.config and self.last_update >= self.config.train.updates:
            return "done", ""
        if self.events and self.events[-1].get("event") == "ended":
            stops = [event for event in self.events[-2:] if event.get("event") in ("stopped", "ended")]
            return "stopped", str(stops[0].get("text", ""))
        return "running", ""


def read_history(folder: Path) -> History:
    """Read a run folder. A torn last line is ignored, a missing file is as if empty.

    Raises ValueError where metrics.jsonl, events.jsonl or env.json hold something else than JSON (file and line).
    """
    environment = folder / "env.json"
    try:
        config = load_config([folder / "config.yaml"])
    except ConfigError:
        config = None  # missing, or of another version: the report shows its text all the same
    return History(
        folder=folder,
        lines=read_lines(folder / "metrics.jsonl"),
        events=read_lines(folder / "events.jsonl"),
        config=config,
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else None,
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
