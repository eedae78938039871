"""The storage alone: bytes a second of reads as large as the loader's, through the loader's own files, cold and warm.

Invariant: a rate is called cold only where the page cache was looked at, and held next to nothing of what was read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
from loader_meters import drop, resident_share

from dinox_io.storage import LocalFile
from knee_search.copies import distinct_copies, place_for_copies, shard_files, size_of

COLD, WARM = 0.05, 0.95
"""Shares of the files in the page cache: up to COLD they are cold, from WARM on they are warm."""


def measure(
    folder: str, *, read_bytes: int, threads: Sequence[int], cold_bytes: int, seconds: float, scratch: str
) -> dict[str, Any]:
    """Rates by number of threads. read_bytes: of one read; cold_bytes: that are read cold in all, at most."""
    place = place_for_copies(Path(folder), Path(scratch))
    rates = []
    with distinct_copies(Path(folder), place, cold_bytes) as folders:
        paths = [path for one in folders for path in shard_files(one)]
        for count in threads:
            drop(paths)
            before = resident_share(paths)
            cold = _rate(paths, read_bytes, count, seconds)
            after = resident_share(paths)
            rates.append(
                {"threads": count, "state": _state(before), "resident": before, "resident_after": after, **cold}
            )
        own = shard_files(Path(folder))
        _rate(own, read_bytes, 1, seconds)
        warm_share = resident_share(own)
        rates += [
            {
                "threads": count,
                "state": _state(warm_share),
                "resident": warm_share,
                **_rate(own, read_bytes, count, seconds),
            }
            for count in threads
        ]
        return {
            "rates": rates,
            "read_bytes": read_bytes,
            "set_bytes": size_of(own),
            "files_bytes": size_of(paths),
            "copies": len(folders) - 1,
            "file_system": machine.filesystem(place),
            "same_disk": place.stat().st_dev == Path(folder).stat().st_dev,
        }


def _state(share: float) -> str:
    return "cold" if share <= COLD else "warm" if share >= WARM else "mixed"


def _rate(paths: Sequence[Path], read_bytes: int, threads: int, seconds: float) -> dict[str, float]:
    """10^9 bytes a second; each piece of the files is read once at most, in a seeded order, for `seconds` at most."""
    files = [LocalFile(path) for path in paths]
    try:
        pieces = [(file, start) for file in files for start in range(0, max(file.size - read_bytes, 1), read_bytes)]
        random.Random(0).shuffle(pieces)
        end_s = time.perf_counter() + seconds

        def read(mine: Sequence[tuple[LocalFile, int]]) -> int:
            buffer, done = memoryview(bytearray(read_bytes)), 0
            for file, start in mine:
                part = buffer[: min(read_bytes, file.size - start)]
                file.read_into(start, part)
                done += len(part)
                if time.perf_counter() > end_s:
                    break
            return done

        with ThreadPoolExecutor(threads) as pool:
            begin_s = time.perf_counter()
            done = sum(pool.map(read, [pieces[number::threads] for number in range(threads)]))
            spent_s = time.perf_counter() - begin_s
        return {"gb_per_s": done / spent_s / 1e9, "bytes": done, "seconds": spent_s}
    finally:
        for file in files:
            file.close()
