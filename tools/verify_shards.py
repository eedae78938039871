"""Verify a set of shards: read and hash every byte, decode every slice, name every damaged volume.

    python tools/verify_shards.py OUT

Exit: 0 the set is whole · 1 something is damaged (each thing is a line on standard output) · 2 usage.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dinox_io.errors import ShardError
from dinox_io.manifest import read_manifest
from dinox_io.pipeline import default_threads
from dinox_io.progress import ProgressReport
from dinox_io.verify import Damage, verify_set


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    options = parse(arguments)
    begin_s = time.monotonic()
    damages, size = verify(options.folder, options.threads)
    for damage in damages:
        print(damage)
    if damages:
        volumes = {damage.volume for damage in damages if damage.volume}
        print(f"DAMAGED: {len(damages)} things are not as they were packed, {len(volumes)} volumes among them")
        return 1
    print(f"whole: {size / 1e6:.0f} MB of shards read, hashed and decoded in {time.monotonic() - begin_s:.1f} s")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Read and hash every byte of a set of shards, decode every slice, and name each damaged volume.",
        epilog="Exit code: 0 the set is whole, 1 something is damaged (a line each), 2 wrong usage.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="OUT", help="folder that pack_shards made (it holds manifest.json)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=default_threads(),
        metavar="N",
        help="shards that are read at once (default: the number of cores, %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    return options


def verify(folder: Path, threads: int) -> tuple[list[Damage], int]:
    """What is damaged, and the bytes of all shards."""
    try:
        size = sum(shard["size"] for shard in read_manifest(folder)["shards"])
    except ShardError:
        return verify_set(folder), 0
    with ProgressReport() as report:
        report.stage("verify", size)
        return verify_set(folder, threads=threads, progress=lambda _, done: report.advance(done)), size


if __name__ == "__main__":
    sys.exit(main())
