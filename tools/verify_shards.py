"""Verify a set of shards: read and hash every byte, decode every slice, name every damaged volume; with --against,
compare every volume bit for bit with the files that it was packed from. `--help` says how.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from dinox_io.against import Comparison, compare_with_source
from dinox_io.errors import ShardError
from dinox_io.manifest import read_manifest
from dinox_io.output import PackError
from dinox_io.pipeline import default_threads
from dinox_io.progress import ProgressReport
from dinox_io.verify import Damage, is_set_folder, verify_set

_EXAMPLES = """\
examples:
  python tools/verify_shards.py shards
  python tools/verify_shards.py shards --against /data/hospital_a /data/hospital_b --workers 8 --key-file my.key

With --against, INPUT is read again by the packer's own readers, with the options that the set was packed with, and
each volume is compared voxel by voxel, by digest and by geometry. Give all that the set was packed from: a volume
whose source is not in INPUT is not verified.

exit code: 0 the set is whole (and, with --against, every volume is its source, and nothing of INPUT is missing);
           1 something is damaged, differs, or could not be verified (a line each); 2 wrong usage;
           130 interrupted
Volumes imported from PNG have no source that can be compared: they are counted apart, and do not count as missing.
"""
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    options = parse(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("verify_shards: interrupted before the end: nothing is known of the rest", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    """Verify and compare; returns the exit code."""
    begin_s = time.monotonic()
    damages, size = verify(options.folder, options.threads)
    for damage in damages:
        print(damage)
    if damages:
        volumes = {damage.volume for damage in damages if damage.volume}
        print(f"DAMAGED: {len(damages)} things are not as they were packed, {len(volumes)} volumes among them")
    else:
        print(f"whole: {size / 1e6:.0f} MB of shards read, hashed and decoded in {time.monotonic() - begin_s:.1f} s")
    if not options.against:
        return 1 if damages else 0
    try:
        comparison = compare(options)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (PackError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(comparison.lines()))
    return 0 if comparison.is_whole and not damages else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Read and hash every byte of a set of shards, decode every slice, and name each damaged volume.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, metavar="OUT", help="folder that pack_shards made (it holds manifest.json)"
    )
    cores = default_threads()
    parser.add_argument(
        "--threads",
        type=int,
        default=cores,
        metavar="N",
        help=f"shards that are read at once (default: {cores}, all cores)",
    )
    source = parser.add_argument_group("comparing with the source")
    source.add_argument(
        "--against", type=Path, nargs="+", metavar="INPUT", help="files and folders that the set was packed from"
    )
    source.add_argument(
        "--key-file", type=Path, metavar="K", help="the key that the set was packed with (default: OUT/private/key)"
    )
    source.add_argument(
        "--workers", type=int, default=cores, metavar="N", help=f"processes that read INPUT (default: {cores})"
    )
    parser.add_argument(
        "--nifti-patient", metavar="REGEX", help="as the set was packed with; needed with --against only"
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if not is_set_folder(options.folder):
        parser.error(f"{options.folder} is not a set of shards: it has no manifest.json and no shard-*.tar")
    if options.threads < 1 or options.workers < 1:
        parser.error("--threads and --workers must be at least 1")
    if (options.key_file or options.nifti_patient) and not options.against:
        parser.error("--key-file and --nifti-patient are needed with --against only")
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


def compare(options: argparse.Namespace) -> Comparison:
    """The set beside its source."""
    with ProgressReport() as report:
        return compare_with_source(
            options.folder, options.against, progress=report, key_file=options.key_file, workers=options.workers,
            nifti_patient=options.nifti_patient,
        )  # fmt: skip


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:  # threads that read a shard would keep the process until its end; they write nothing
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
