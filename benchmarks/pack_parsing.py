"""Where the time goes when DICOM files are packed: pydicom, pixels, filter and zstd, hashes, writing.

A timer interrupts the process every millisecond of its own time and looks at the stack; what passed since the last look
goes to the part that the stack is in. So nothing is slowed down (cProfile makes many small calls look dear), and a long
call into C counts in full, although it is looked at once.

Invariant: the shares of all parts add up to 1.
"""

from __future__ import annotations

import cProfile
import pstats
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import cases
import machine
import our_codecs
import result
from intervals import Interval, median_interval
from result import Figure, Result

from dinox_io import codec, filters
from dinox_io.shard import ShardWriter, encode_volume

EVERY_S = 0.001
ROUNDS, ROUNDS_QUICK = 7, 2
PARTS = {
    "codec.py": "filter and zstd",
    "filters.py": "filter and zstd",
    "pixels.py": "pixels",
    "hounsfield.py": "HU, digests and histogram",
    "shard.py": "writing and its hash",
    "atomic.py": "writing and its hash",
}
"""File of dinox_io -> part; the innermost one on the stack decides. With pydicom on the stack it is "pydicom", and with
what decodes JPEG and its kin there "decompressing pixels"."""


class StackSampler:
    """Seconds of this process's own time by part; a context manager, in the main thread."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> StackSampler:
        self._before = signal.signal(signal.SIGPROF, self._look)
        self._last = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._look(signal.SIGPROF, sys._getframe().f_back)
        signal.signal(signal.SIGPROF, self._before)

    def _look(self, _: int, frame: FrameType | None) -> None:
        now = time.process_time()
        self.seconds[part_of(frame)] += now - self._last
        self._last = now


def part_of(frame: FrameType | None) -> str:
    """The part that a stack is in."""
    innermost, in_pydicom = "", False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "pydicom" in path.parts:
            if "pixels" in path.parts:
                return "decompressing pixels"
            in_pydicom = True
        if not innermost and path.parent.name == "dinox_io":
            innermost = PARTS.get(path.name, "the rest of dinox")
        frame = frame.f_back
    return "pydicom" if in_pydicom else innermost or "outside of dinox"


def pack_folders(folders: Sequence[Path], shard: Path) -> tuple[int, int]:
    """Find, read, compress and write all series, as one worker and the parent do. (files, int16 bytes).

    CasesError if nothing can be packed.
    """
    files = raw_bytes = 0
    filter, level = codec.PRESETS["small"]
    with ShardWriter(shard, config_digest="0" * 64) as writer:
        for found in cases.series_of(folders):
            files += len(found.files)
            for volume in cases.volumes_of(found)[0]:
                writer.add(encode_volume(volume, filter=filter, level=level))
                raw_bytes += volume.hu.nbytes
        writer.finish()
    if not raw_bytes:
        raise cases.CasesError("no series in these folders can be packed")
    return files, raw_bytes


@contextmanager
def _folders(given: Sequence[Path], scratch: Path, quick: bool) -> Iterator[tuple[list[Path], list[dict[str, Any]]]]:
    """The folders to pack, and what a result says of them."""
    if given:
        yield list(given), [{"name": folder.resolve().name} for folder in given]
        return
    with tempfile.TemporaryDirectory(prefix="dinox-parsing-", dir=scratch) as name:
        series, side = 1 if quick else 4, 64 if quick else cases.SIDE
        folder = cases.write_phantom(Path(name) / "dicom", series=series, side=side, slices=8 if quick else 16)
        yield [folder], [{"name": "phantom", "series": series, "side": side}]


def run(given: Sequence[Path], scratch: Path, *, quick: bool) -> Result:
    """Shares of the parts over some rounds, and what halving pydicom's would take."""
    with _folders(given, scratch, quick) as (folders, data), machine.one_core() as core:
        rounds = ROUNDS_QUICK if quick else ROUNDS
        made = result.begin(
            "pack-parsing",
            data=data,
            conditions={"core": core, "rounds": rounds, "filters": filters.describe(), "quick": quick},
            versions={"dinox": our_codecs.versions()},
        )
        with tempfile.TemporaryDirectory(prefix="dinox-parsing-", dir=scratch) as name:
            shard = Path(name) / "shard-000000.tar"
            files, raw_bytes = pack_folders(folders, shard)
            sampled = []
            for _ in range(rounds):
                with StackSampler() as sampler:
                    pack_folders(folders, shard)
                sampled.append(sampler.seconds)
            _figures(made, sampled, raw_bytes)
            made.notes += _profile(folders, shard, files)
        return made


def _figures(made: Result, sampled: Sequence[Mapping[str, float]], raw_bytes: int) -> None:
    def add(name: str, interval: Interval, unit: str, better: str) -> Interval:
        noise = (interval.high - interval.low) / interval.value if interval.value else 0.0
        made.figures.append(Figure(name, interval.value, interval.low, interval.high, unit, better, noise, False))
        return interval

    totals = [sum(one.values()) for one in sampled]
    add("pack with DICOM parsing", median_interval([raw_bytes / total / 1e6 for total in totals]), "MB/s", "higher")
    for part in sorted(set().union(*sampled)):
        shares = [100 * one.get(part, 0.0) / total for one, total in zip(sampled, totals, strict=True)]
        add(f"share of {part}", median_interval(shares), "%", "lower")
    share = median_interval([one.get("pydicom", 0.0) / total for one, total in zip(sampled, totals, strict=True)]).value
    made.notes.append(halving(share))


def halving(share: float) -> str:
    """What must happen to a part of the time, whose share (0 to 1) is given, to halve that share."""
    rest = 1 - share
    left = rest * (share / 2) / (1 - share / 2)
    if not left:
        return "pydicom took no time that could be measured"
    return (
        f"pydicom takes {100 * share:.0f} % of the time. To halve that share it would have to be {share / left:.1f} "
        f"times as fast, and packing would take {100 * (share - left):.0f} % less time; without it, {100 * share:.0f} %"
    )


def _profile(folders: Sequence[Path], shard: Path, files: int) -> list[str]:
    """How often a file is parsed, and in which functions of pydicom the time lies (by cProfile: counts are exact)."""
    profiler = cProfile.Profile()
    profiler.runcall(pack_folders, folders, shard)
    stats = cast(dict[tuple[str, int, str], tuple[int, int, float, float, Any]], pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
    theirs = {key: value for key, value in stats.items() if "pydicom" in Path(key[0]).parts}
    parses = sum(value[1] for key, value in theirs.items() if key[2] == "read_partial")
    total = sum(value[2] for value in theirs.values()) or 1.0
    dearest = sorted(theirs.items(), key=lambda item: -item[1][2])[:5]
    named = ", ".join(f"{Path(key[0]).stem}.{key[2]} {100 * value[2] / total:.0f} %" for key, value in dearest)
    return [f"pydicom parses each file {parses / files:.1f} times; within it: {named}"]
