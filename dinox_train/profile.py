"""Profiles of single updates: a torch.profiler trace, and a table of its stages.

    RUN/profile/update-00000120.json.gz     for ui.perfetto.dev
    RUN/profile/update-00000120.txt         by stage: time, bytes copied, peak memory

Invariant: nothing of what is learnt changes, and neither file holds a path or the name of a machine.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from dinox_io.atomic import write_atomically
from dinox_train.stage_timers import PREFIX, STAGES, StageTimers

OTHER = "other"
"""What lies between the stages."""
_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_BYTES_OF = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "short": 2, "int": 4, "long": 8}
"""Of an element, by the names that the profiler gives types; all others are one byte."""


@dataclass
class StageProfile:
    """What one stage of an update took."""

    host_s: float = 0.0
    """From its beginning to its end on the host."""
    device_s: float = 0.0
    """Of the kernels and copies that were launched in it; 0 on a CPU."""
    copied_bytes: int = 0
    """Between host and device; on a CPU, from tensor to tensor."""
    peak_bytes: int = 0
    """Most memory of the device that was taken in it beyond what was when the update began."""


class Profiler:
    """Looks on at the updates of `profile.at`."""

    def __init__(self, folder: Path, at: Collection[int], timers: StageTimers, device: torch.device) -> None:
        """folder: RUN/profile; at: updates, from 1."""
        self._folder, self._at, self._timers, self._device = folder, frozenset(at), timers, device

    @contextmanager
    def around(self, update: int) -> Iterator[None]:
        """Profile what is done within, if `update` is one of those that are asked for."""
        if update not in self._at:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            activities.append(ProfilerActivity.CUDA)
        self._timers.named = True
        try:
            with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as seen:
                yield
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
        finally:
            self._timers.named = False
        self._write(update, trace_of(seen))

    def _write(self, update: int, trace: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"update-{update:08d}"
        write_atomically(name.with_suffix(".json.gz"), gzip.compress(json.dumps(trace).encode(), mtime=0))
        table = table_of(by_stage(trace["traceEvents"], self._device.type), update)
        write_atomically(name.with_suffix(".txt"), table.encode())


def trace_of(seen: torch.profiler.profile) -> dict[str, Any]:
    """The profiler's events as a Chrome trace, without the path that it is written to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        trace = json.loads(file.read_bytes())
    trace.pop("traceName", None)
    return trace


def by_stage(events: Sequence[Mapping[str, Any]], device: str) -> dict[str, StageProfile]:
    """What each stage took, of a Chrome trace's events; what is between the stages is OTHER. device: its type."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    )
    begins = [begin for begin, _, _ in spans]

    def stage_at(moment: float) -> str:
        place = bisect_right(begins, moment) - 1
        return spans[place][2] if place >= 0 and moment <= spans[place][1] else OTHER

    found = {stage: StageProfile() for stage in (*(name for name in STAGES if name != "save"), OTHER)}
    for begin, end, stage in spans:
        found[stage].host_s += (end - begin) / 1e6
    # What the device does belongs to the stage that launched it, whenever it was done.
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") == "cuda_runtime" and "correlation" in event.get("args", {})
    }
    taken = 0
    for event in sorted((one for one in events if "ts" in one), key=lambda one: one["ts"]):
        arguments = event.get("args", {})
        if event.get("cat") in _ON_DEVICE:
            stage = found[stage_at(launched.get(arguments.get("correlation"), -math.inf))]
            stage.device_s += event["dur"] / 1e6
            stage.copied_bytes += int(arguments.get("bytes", 0)) if event["cat"] == "gpu_memcpy" else 0
        elif device == "cpu" and event.get("name") == "aten::copy_":
            found[stage_at(event["ts"])].copied_bytes += _bytes_of_first(arguments)
        elif event.get("name") == "[memory]" and (arguments["Device Type"] == 0) == (device == "cpu"):
            taken += arguments["Bytes"]
            stage = found[stage_at(event["ts"])]
            stage.peak_bytes = max(stage.peak_bytes, taken)
    return found


def table_of(stages: Mapping[str, StageProfile], update: int) -> str:
    """The table of one update, for people."""
    rows = [f"update {update}", f"{'stage':<12}{'host s':>10}{'device s':>10}{'copied MiB':>14}{'peak MiB':>12}"]
    rows += [
        f"{name:<12}{one.host_s:>10.4f}{one.device_s:>10.4f}{one.copied_bytes / 2**20:>14.2f}"
        f"{one.peak_bytes / 2**20:>12.1f}"
        for name, one in stages.items()
    ]
    notes = (
        "host: from a stage's beginning to its end; device: kernels and copies that it launched. peak: memory beyond "
        "what was taken when the update began."
    )
    return "\n".join([*rows, notes]) + "\n"


def _bytes_of_first(arguments: Mapping[str, Any]) -> int:
    shape, kind = arguments["Input Dims"][0], arguments["Input type"][0]
    return math.prod(shape) * _BYTES_OF.get(kind, 1)
