"""What measures: each point by a process of its own (worker.py), in the configuration that the user gave.

Invariant: of the configuration, a measurement changes the settings of its point and what a run does beside its updates,
nothing else.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinox_train.config import Config
from knee_search.copies import shard_files
from knee_search.coupled import Watch, overrides_of, warm_updates
from knee_search.points import OK, Point
from knee_search.process import Stop, measure
from knee_search.settings import Settings, of_record
from knee_search.worker import FOLDER

MEASURING_PREFETCH_MIB = 256
"""For measurements of one part: enough that the consumer never waits for the plan."""


@dataclass
class Instruments:
    """Measures points of one configuration and set. `Search` calls it."""

    config: Config
    file: Path
    """The configuration as a file, with all overrides in it."""
    scratch: Path
    """Where a run of a measurement, and copies of the set, may lie."""
    timeout_s: float
    stop: Stop
    inflation: int = 1
    storage_mbps: float | None = None
    """A storage of so many 10^6 bytes/s in the place of the one that is there; None: as it is."""
    copies: Sequence[Path] = ()
    """Distinct copies of the set, for coupled runs that read from the disk."""
    cold: bool = False
    cold_bytes: int = 1 << 28
    window_bytes: int = 0
    """Of a decoded window; known after the probe."""
    told: Callable[[str], None] = field(default=lambda _: None)

    def __call__(self, kind: str, settings: Mapping[str, Any], repeat: int, seconds: float) -> Point:
        """Raises Interrupted."""
        request = {
            "config": str(self.file),
            "overrides": self._overrides(kind, settings),
            "storage_mbps": self.storage_mbps,
            "inflation": self.inflation,
            "copies": [str(one) for one in self.copies] if kind == "run" else [],
            "given": self._given(kind, settings, seconds),
        }
        watch = self._watch(of_record(settings), seconds) if kind == "run" else None
        ended = measure(kind, request, timeout_s=self.timeout_s + 3 * seconds, stop=self.stop, watch=watch)
        if kind == "probe" and ended.status == OK:
            self.window_bytes = ended.answer["set"]["window_bytes"]
        return Point(
            kind=kind,
            settings=dict(settings),
            repeat=repeat,
            status=ended.status,
            result=ended.answer or {},
            said=ended.said,
            wall_s=ended.wall_s,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _given(self, kind: str, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        if kind == "storage":
            folder = self.config.data.shards
            return {
                **settings,
                "folder": folder,
                "cold_bytes": self.cold_bytes,
                "seconds": seconds,
                "scratch": str(self.scratch),
            }
        return {"seconds": seconds} if kind in ("decode", "compute", "beside") else {}

    def _overrides(self, kind: str, settings: Mapping[str, Any]) -> list[str]:
        lengths = self.config.schedule.updates or self.config.train.updates
        if kind == "run":
            return [*of_record(settings).overrides(), *overrides_of(f"{FOLDER}/run", lengths)]
        threads = [f"data.threads={settings['threads']}"] if kind in ("decode", "beside") else []
        if kind in ("compute", "beside"):
            pieces = settings["batch_size"] // settings["micro_batch"]
            threads += [f"train.batch_size={settings['batch_size']}", f"train.accumulation={pieces}"]
            threads += [f"precision={settings['precision']}", f"execution.compile={settings['compile']}"]
            threads += [f"execution.activation_checkpointing={settings['checkpointing']}"]
        return [*threads, f"data.prefetch_mib={MEASURING_PREFETCH_MIB}", f"schedule.updates={lengths}"]

    def _watch(self, settings: Settings, seconds: float) -> Watch:
        cold: list[Path] = []
        if self.cold:
            folders = [Path(str(self.config.data.shards)), *self.copies]
            cold = [path for folder in folders for path in shard_files(folder)]
        return Watch(
            batch_size=settings.batch_size,
            skip=warm_updates(settings, self.window_bytes),
            seconds=seconds,
            cold=cold,
            told=lambda update: self.told(f"update {update}"),
        )
