"""Ten lines about a run, for somebody who is not at the machine. Pure: what is not known is said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_LINES = 10
_WIDTH = 300
"""Characters of a line: the text of an event may be longer."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What a digest is made of."""

    run: str
    occasion: str
    total: int
    """Updates of the run."""
    line: Mapping[str, Any]
    """The newest line of metrics.jsonl; empty before the first."""
    evaluated: Mapping[str, Any] = field(default_factory=dict)
    """The newest line with an evaluation."""
    updates_per_s: float | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    """The newest of system.jsonl."""
    events: Sequence[tuple[str, int]] = ()
    """Names of what happened since the digest before, and how often."""
    newest: str = ""
    """The newest event in words."""
    checkpoint: int | None = None
    """The update of the newest one."""
    alarms: Mapping[str, str] = field(default_factory=dict)
    """What is wrong now: names and texts."""


def digest_of(news: News) -> str:
    """The digest: NUM_LINES lines, the alarm last."""
    lines = (
        f"DINOX {news.run}: {news.occasion}",
        _progress(news),
        _time_left(news),
        _health(news.line),
        _speed(news.line),
        _memory(news.reading),
        _heat(news.reading),
        _validation(news.evaluated),
        _events(news),
        _alarms(news.alarms),
    )
    return "".join(" ".join(line.split())[:_WIDTH] + "\n" for line in lines)


def _progress(news: News) -> str:
    line = news.line
    if not line:
        return f"progress: no update of this process is done yet, of {news.total:,}"
    share, images = line["update"] / news.total, line.get("images")
    seen = "" if images is None else f", {images:,} images"
    return f"progress: update {line['update']:,} of {news.total:,} ({share:.1%}){seen}"


def _time_left(news: News) -> str:
    if not news.line or not news.updates_per_s:
        return "time to the end: not known yet"
    left = max(news.total - news.line["update"], 0)
    if not left:
        return "time to the end: none, all updates are done"
    hours = left / news.updates_per_s / 3600
    return f"time to the end: {_duration(hours)} at the speed of the last hour, evaluations and checkpoints counted in"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _health(line: Mapping[str, Any]) -> str:
    names = {
        "loss": "loss {:.4f}",
        "teacher_entropy": "teacher entropy {:.2f} of ln K",
        "effective_rank": "effective rank {:.1f}",
        "feature_std": "feature std {:.2f}",
        "prototype_use": "prototypes used {:.1%}",
        "patch_similarity": "patch similarity {:.2f}",
        "grad_norm": "gradient norm {:.2f}",
    }
    return "health: " + _listed(line, names)


def _speed(line: Mapping[str, Any]) -> str:
    names = {
        "images_per_s": "{:.1f} images/s",
        "data_wait_fraction": "data wait {:.1%}",
        "model_flops_utilisation": "utilisation {:.1%} of the measured peak",
    }
    return "speed: " + _listed(line, names)


def _memory(reading: Mapping[str, Any]) -> str:
    names = {
        "gpu_memory_allocated_bytes": "GPU {:.1f} GiB allocated",
        "gpu_memory_reserved_bytes": "{:.1f} reserved",
        "gpu_memory_free_bytes": "{:.1f} free",
        "host_free_bytes": "host {:.1f} GiB free",
        "swap_used_bytes": "swap {:.1f}",
    }
    in_gib = {name: value / 2**30 for name, value in reading.items() if name in names and value is not None}
    return "memory: " + _listed(in_gib, names)


def _heat(reading: Mapping[str, Any]) -> str:
    names = {
        "gpu_temperature_c": "GPU {:.0f} °C",
        "gpu_power_w": "{:.0f} W",
        "gpu_clock_mhz": "{:.0f} MHz",
        "gpu_busy": "busy {:.0%}",
        "cpu_temperature_c": "CPU {:.0f} °C",
        "cpu_busy": "CPU busy {:.0%}",
    }
    throttled = ", THROTTLED" if reading.get("gpu_throttled") else ""
    return "heat: " + _listed(reading, names) + throttled


def _validation(line: Mapping[str, Any]) -> str:
    if not line:
        return "validation: none yet in this process"
    names = {"loss_val": "loss {:.4f}", "knn_z": "knn_z {:.3f}", "knn_label": "knn_label {:.3f}"}
    return f"validation: {_listed(line, names)} (update {line['update']:,})"


def _events(news: News) -> str:
    counted = ", ".join(f"{name}" if count == 1 else f"{name} x {count}" for name, count in news.events) or "none"
    newest = f"; newest: {news.newest}" if news.newest else ""
    kept = "none yet" if news.checkpoint is None else f"of update {news.checkpoint:,}"
    disk = news.reading.get("disk_free_bytes")
    free = "" if disk is None else f", {disk / 2**30:.1f} GiB of disk free"
    return f"checkpoint {kept}{free}; events since the last digest: {counted}{newest}"


def _alarms(alarms: Mapping[str, str]) -> str:
    return "alarm: " + ("; ".join(f"{name}: {text}" for name, text in alarms.items()) or "none")


def _listed(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The values that are there, each in its words."""
    found = (words.format(values[name]) for name, words in names.items() if values.get(name) is not None)
    return ", ".join(found) or "not known"
