"""Cost of tools/pack_shards.py against the number of series: time, and memory of the parent and of its workers.

Tiny series (4 slices of 32 x 32) show what a series costs beside its pixels; a phantom of 1,000 series, a real mix.
Invariant: every pack begins with an empty output folder and ends with all series in it, or nothing is reported.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cases
import machine
import our_codecs
import process_memory
import result
import tiny_series
from process_memory import Ran
from result import Figure, Result

from dinox_io import filters

SERIES, SERIES_QUICK = (10, 100, 1000, 10000), (4, 16)
PHANTOM_SERIES, PHANTOM_SERIES_QUICK = 1000, 3
PHANTOM_SIDE, PHANTOM_SIDE_QUICK, PHANTOM_SLICES = 128, 32, 8
REPEATS = 3
"""How often the smallest set is packed to know the noise."""
MIB = 1 << 20


class PackFailed(RuntimeError):
    """The packer failed, or left a series out; the message holds what it said."""


@dataclass(frozen=True)
class _Point:
    kind: str
    series: int
    workers: int
    ran: Ran

    @property
    def name(self) -> str:
        return f"{self.series} {self.kind} series, {self.workers} worker{'s' if self.workers > 1 else ''}"


def run(
    series: Sequence[int] | None, phantom_series: int | None, workers: Sequence[int], scratch: Path, *, quick: bool
) -> Result:
    """Pack sets of so many series with so many workers each. PackFailed if one cannot be packed."""
    sizes = sorted(series or (SERIES_QUICK if quick else SERIES))
    phantoms = (PHANTOM_SERIES_QUICK if quick else PHANTOM_SERIES) if phantom_series is None else phantom_series
    side = PHANTOM_SIDE_QUICK if quick else PHANTOM_SIDE
    data = [{"kind": "tiny", "series": n, "slices": tiny_series.SLICES, "side": tiny_series.SIDE} for n in sizes]
    data += [{"kind": "phantom", "series": phantoms, "slices": PHANTOM_SLICES, "side": side}] if phantoms else []
    made = result.begin(
        "pack-scale",
        data=data,
        conditions={"filesystem": machine.filesystem(scratch), "filters": filters.describe(), "quick": quick},
        versions={"dinox": our_codecs.versions()},
    )
    points: list[_Point] = []
    again: list[_Point] = []
    with tempfile.TemporaryDirectory(prefix="dinox-scale-", dir=scratch) as name:
        folder = Path(name)
        for count in sizes:
            tiny_series.write(folder / "in", count)
            if count == sizes[0]:
                again = [_pack("tiny", folder, count, workers[0]) for _ in range(REPEATS)]
                points.append(again[0])
            left = workers[1:] if count == sizes[0] else workers
            points += [_pack("tiny", folder, count, number) for number in left]
            shutil.rmtree(folder / "in")
        if phantoms:
            cases.write_phantom(folder / "in", series=phantoms, side=side, slices=PHANTOM_SLICES)
            points += [_pack("phantom", folder, phantoms, number) for number in workers]
    made.noise_floor = _spread([point.ran.seconds for point in again])
    _times(made, points)
    _memory(made, points, _spread([point.ran.peaks.total_uss_bytes for point in again]))
    return made


def _pack(kind: str, folder: Path, series: int, workers: int) -> _Point:
    output = folder / "out"
    tool = machine.REPOSITORY / "tools" / "pack_shards.py"
    command = [sys.executable, str(tool), str(folder / "in"), "--output", str(output), "--workers", str(workers)]
    ran = process_memory.run(command, machine.child_environment(ours=True))
    if ran.code != 0:
        raise PackFailed(f"packing {series} series with {workers} workers ended with {ran.code}: {ran.said}")
    manifest = output / "manifest.json"
    packed = len(json.loads(manifest.read_text("utf-8"))["volumes"]) if manifest.exists() else 0
    if packed != series:
        raise PackFailed(f"of {series} series {packed} were packed: {ran.said}")
    shutil.rmtree(output)
    point = _Point(kind, series, workers, ran)
    print(
        f"  {point.name}: {ran.seconds:.1f} s, {ran.peaks.total_uss_bytes / MIB:.0f} MiB", file=sys.stderr, flush=True
    )
    return point


def _spread(values: Sequence[float]) -> float:
    """By what fraction the same thing came out differently."""
    return max(values) / min(values) - 1


def _add(made: Result, name: str, value: float, unit: str, noise: float) -> Figure:
    figure = Figure(name, value, value, value, unit, "lower", noise, False)
    made.figures.append(figure)
    return figure


def _times(made: Result, points: Sequence[_Point]) -> None:
    noise = made.noise_floor or 0.0
    for point in points:
        _add(made, f"time: {point.name}", point.ran.seconds, "s", noise)
    for small, large, after in _last_steps(points):
        slope = _add(made, f"exponent of the time: {after}", exponent(small, large), "", noise)
        made.target(f"scale: linear in series, {after}", slope, "at most", 1.1)


def _memory(made: Result, points: Sequence[_Point], noise: float) -> None:
    for point in points:
        peaks = point.ran.peaks
        for whose, size in (
            ("the parent", peaks.parent_uss_bytes), ("a worker", peaks.worker_uss_bytes), ("all", peaks.total_uss_bytes)
        ):  # fmt: skip
            _add(made, f"peak USS of {whose}: {point.name}", size / MIB, "MiB", noise)
    for small, large, after in _last_steps(points):
        before, then = small.ran.peaks, large.ran.peaks
        growth = (then.parent_uss_bytes - before.parent_uss_bytes) / (large.series - small.series)
        _add(made, f"memory of the parent for each further series: {after}", growth, "bytes", noise)
        worker = then.worker_uss_bytes / max(1, before.worker_uss_bytes)
        flat = _add(made, f"memory of a worker, growth: {after}", worker, "×", noise)
        made.target(f"scale: memory of a worker flat, {after}", flat, "at most", 1.1)


def _last_steps(points: Sequence[_Point]) -> list[tuple[_Point, _Point, str]]:
    """The two largest sets of tiny series with each number of workers, and how to call the step between them."""
    steps: list[tuple[_Point, _Point, str]] = []
    for workers in sorted({point.workers for point in points}):
        tiny = [point for point in points if point.kind == "tiny" and point.workers == workers]
        if len(tiny) > 1:
            steps.append((tiny[-2], tiny[-1], f"{tiny[-2].series} to {tiny[-1].name}"))
    return steps


def exponent(small: _Point, large: _Point) -> float:
    """p of time ~ series^p between two points; 1 is linear. A fixed cost makes it smaller."""
    return math.log(large.ran.seconds / small.ran.seconds) / math.log(large.series / small.series)
