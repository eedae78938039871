"""Packing: speed against other formats, the share of DICOM parsing, and cost against the number of series."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cases
import floors
import machine
import our_codecs
import pack_parsing
import pack_scale
import result
from command import MB, Plan, add_options, add_output, finish, load_cases, open_peers, tell
from harness import AGAIN, Local, Measurement, WorkerError, measure
from result import Result
from timing import Prepared, Setup

from dinox_io import codec, filters
from dinox_io.shard import ShardWriter, encode_volume

_EPILOG = """\
examples:
  python benchmarks/pack.py speed --peers peers/bin/python --output pack.json
  python benchmarks/pack.py parsing --data scans/LIDC-IDRI-0001 --output pack_parsing.json
  python benchmarks/pack.py scale --series 10 100 1000 10000 --output pack_scale.json

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
COPY_BYTES = 256 << 20


def speed(found: Sequence[cases.Case], peers_python: str | None, scratch: Path, plan: Plan) -> Result:
    """Volumes in memory to files in `scratch`, one core. WorkerError if the peers' interpreter cannot."""
    with ExitStack() as stack:
        core = stack.enter_context(machine.one_core())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinox-pack-", dir=scratch)))
        cases.write_arrays(found, folder / "data")
        made = result.begin(
            "pack",
            data=[case.described() for case in found],
            conditions={
                **plan.conditions(core), "filters": filters.describe(), "filesystem": machine.filesystem(folder),
            },
            versions={"dinox": our_codecs.versions()},
        )  # fmt: skip
        theirs = {"data": str(folder / "data"), "scratch": str(folder / "stores"), "quick": plan.quick}
        peers = open_peers(stack, peers_python, "peer_stores", theirs, made.notes)
        ours = _ours(found, folder)
        contenders: list[Any] = [Local(name, setup) for name, setup in ours.items()]
        contenders.append(Local("dinox small" + AGAIN, ours["dinox small"]))
        if peers is not None:
            made.versions["peers"] = peers.versions
            contenders += [peers.contender(name) for name in peers.names]
        measured = measure(contenders, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
        made.take(measured)
        _figures(made, measured, peers.names if peers else [])
        return made


def _ours(found: Sequence[cases.Case], folder: Path) -> dict[str, Setup]:
    raw_bytes = sum(case.volume.hu.nbytes for case in found)

    def packing(preset: str) -> Setup:
        filter, level = codec.PRESETS[preset]
        shard = folder / "shard-000000.tar"

        def run() -> float:
            with ShardWriter(shard, config_digest="0" * 64) as writer:
                for case in found:
                    writer.add(encode_volume(case.volume, filter=filter, level=level))
                writer.finish()
            return raw_bytes

        def setup() -> Prepared:
            run()
            return Prepared(run, {"packed_bytes": shard.stat().st_size})

        return setup

    def encoding() -> Prepared:
        """Filter, zstd and checksum of each slice, and no more: what packing cannot do without."""
        slices = [one for case in found for one in case.volume.hu]

        def run() -> float:
            our_codecs.encode(slices, codec.PRESETS["small"])
            return raw_bytes

        return Prepared(run, {})

    return {
        "dinox small": packing("small"),
        "dinox fast": packing("fast"),
        "frames alone": encoding,
        "memory copy": floors.copying(COPY_BYTES),
    }


def _figures(made: Result, measured: Measurement, peers: Sequence[str]) -> None:
    for name in measured.samples:
        made.timed(f"pack {name}", measured.rate(name).scaled(1 / MB), "MB/s")
    for floor in ("frames alone", "memory copy"):
        distance = floors.distance(measured, "dinox small", floor)
        made.timed(f"pack / {floor}", distance, "× the time", better="lower", gate=floor == "frames alone")
    for name in peers:
        figure = made.timed(f"dinox small / {name}", measured.ratio("dinox small", name), "×", gate=True)
        made.target(f"pack: against {name}", figure, "at least", 25.0 if name.startswith("png16") else 2.0)


def _scratch() -> Path:
    """Memory where there is a file system in it, so that a disk is not what is measured."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="speed | parsing | scale")
    one = commands.add_parser("speed", help="MB/s from int16 volumes in memory to files, against other formats")
    add_options(one, "bench/pack.json")
    one = commands.add_parser("parsing", help="where the time goes with DICOM parsing; the share of pydicom")
    add_options(one, "bench/pack_parsing.json", peers=False)
    one = commands.add_parser("scale", help="time and memory of tools/pack_shards.py against the number of series")
    one.add_argument(
        "--series", metavar="N", type=int, nargs="+", help="numbers of tiny series (default: 10 100 1000 10000)"
    )
    one.add_argument(
        "--phantom-series", metavar="N", type=int, help="also a phantom of so many series (default: 1000; 0: none)"
    )
    one.add_argument("--workers", metavar="N", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    add_output(one, "bench/pack_scale.json")
    for one in commands.choices.values():
        one.add_argument(
            "--scratch", metavar="FOLDER", type=Path, default=_scratch(),
            help="where files are written while measuring (default: memory, if the system has such a folder)",
        )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parse_arguments(arguments)
    try:
        if given.what == "speed":
            found = load_cases(given.data, quick=given.quick)
            made = speed(found, given.peers, given.scratch, Plan.of(given.quick))
        elif given.what == "parsing":
            made = pack_parsing.run(given.data, given.scratch, quick=given.quick)
        else:
            made = pack_scale.run(given.series, given.phantom_series, given.workers, given.scratch, quick=given.quick)
    except (cases.CasesError, WorkerError, pack_scale.PackFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
