"""Size and decoding speed of CT slices: our frames against plain zstd, blosc2, zarr, HDF5 and PNG, side by side."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cases
import machine
import our_codecs
import result
from command import MB, Plan, add_options, finish, load_cases, open_peers, tell
from harness import AGAIN, Contender, Local, Measurement, Worker, WorkerError, measure
from result import Result

from dinox_io import filters

_EPILOG = """\
Decoding is timed on one core, slice by slice into a given buffer, the unfilter included. Work is bytes of int16.

examples:
  python benchmarks/codec.py --peers peers/bin/python --output codec.json
  python benchmarks/codec.py --data scans/LIDC-IDRI-0001 scans/LIDC-IDRI-0002 --output codec.json

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""


def run(found: Sequence[cases.Case], peers_python: str | None, plan: Plan) -> Result:
    """Measure sizes and decoders of the cases. WorkerError if the peers' interpreter cannot."""
    with ExitStack() as stack:
        core = stack.enter_context(machine.one_core())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinox-codec-")))
        cases.write_arrays(found, scratch / "data")
        ours = {"data": str(scratch / "data")}
        theirs = {**ours, "quick": plan.quick}
        made = result.begin(
            "codec",
            data=[case.described() for case in found],
            conditions={**plan.conditions(core), "filters": filters.describe()},
            versions={"dinox": our_codecs.versions()},
        )
        peers = open_peers(stack, peers_python, "peer_codecs", theirs, made.notes)
        numpy_tier = stack.enter_context(
            Worker(sys.executable, "our_codecs", ours, environment="dinox", variables={"DINOX_FILTERS": "numpy"})
        )
        contenders = _contenders(ours, numpy_tier, peers)
        measured = measure(contenders, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
        made.take(measured)
        if peers is not None:
            made.versions["peers"] = peers.versions
            stores = {**theirs, "scratch": str(scratch / "stores")}
            with Worker(str(peers_python), "peer_stores", stores, environment="peers") as files:
                rows = peers.table("sizes") + files.table("sizes")
        else:
            rows = []
        sizes(made, found, ours["data"], rows)
        speeds(made, measured)
        return made


def _contenders(ours: dict[str, str], numpy_tier: Worker, peers: Worker | None) -> list[Contender]:
    setups = our_codecs.contenders(**ours)
    listed: list[Contender] = [Local(name, setup) for name, setup in setups.items()]
    listed.append(Local("hilp" + AGAIN, setups["hilp"]))
    listed += [numpy_tier.contender(name, f"{name} (NumPy)") for name in ("hilp", "unfilter")]
    if peers is not None:
        listed += [peers.contender(name) for name in peers.names]
    return listed


# ---------------------------------------------------------------------------------------------- figures


def sizes(made: Result, found: Sequence[cases.Case], data: str, rows: Sequence[dict[str, Any]]) -> None:
    """Figures "size …": raw int16 bytes by stored bytes, all cases pooled; and the targets."""
    raw = sum(case.volume.hu.nbytes for case in found)
    ours = {name: count() for name, count in our_codecs.tables(data).items()}
    for name, size in ours.items():
        made.exact(f"size {name}", raw / size, "raw/stored", gate=name != "raw zstd 3")
    made.conditions["sizes"] = [{"family": "dinox", "name": n, "bytes": size} for n, size in ours.items()] + list(rows)
    smallest: dict[str, dict[str, Any]] = {}
    for row in rows:
        family = row["name"] if row["family"] == "information" else row["family"]
        smallest[family] = min(smallest.get(family, row), row, key=lambda one: one["bytes"])
    for family, row in smallest.items():
        made.exact(f"size {family}, smallest", raw / row["bytes"], "raw/stored")
        made.notes.append(f"the smallest {family} is {row['name']}")
    small, fast = made.figures[0], made.figures[1]
    on_phantom = all(case["name"].startswith("phantom ") for case in made.data)
    made.target("size: pooled ratio of the default", small, "at least", 3.0 if on_phantom else 2.6)
    if not on_phantom:
        made.target("size: pooled ratio of the preset fast", fast, "at least", 2.1)
    for family, limit in (("blosc2", 1.05), ("zarr", 1.15), ("hdf5", 1.15), ("png16", 1.2)):
        if family in smallest:
            figure = made.exact(f"smaller than {family}", smallest[family]["bytes"] / ours["hilp"], "×", gate=True)
            made.target(f"size: against the smallest {family}", figure, "at least", limit)
    figure = made.exact("smaller than raw zstd 3", ours["raw zstd 3"] / ours["hilp"], "×", gate=True)
    made.target("size: against zstd 3 without a filter", figure, "at least", 1.3)


def speeds(made: Result, measured: Measurement) -> None:
    """Figures "decode …" (MB/s of int16), ratios of the same rounds, and the targets."""
    for name in measured.samples:
        rate = measured.rate(name)
        made.timed(f"decode {name}", rate.scaled(1 / MB), "MB/s")
    numpy_tier = made.timed("hilp NumPy / raw zstd 3", measured.ratio("hilp (NumPy)", "raw zstd 3"), "×", gate=True)
    made.target("decode, NumPy tier: against plain zstd 3", numpy_tier, "at least", 0.5)
    if filters.tier() != "c":
        made.notes.append("the C tier is not built here: its targets were not measured")
        return
    c_tier = made.timed("hilp C / raw zstd 3", measured.ratio("hilp", "raw zstd 3"), "×", gate=True)
    made.target("decode, C tier: against plain zstd 3", c_tier, "at least", 1.6)
    floor = made.timed(
        "hilp C / (zstd + byte floor)",
        measured.figure(lambda times: times["hilp"] / (times["zstd of hilp"] + times["copy"])),
        "× the time",
        better="lower",
        gate=True,
    )
    made.target("decode, C tier: time over zstd's own plus the unfilter's byte floor", floor, "at most", 1.1)
    made.timed("unfilter C / byte floor", measured.ratio("copy", "unfilter"), "× the time", better="lower", gate=True)
    pngs = [name for name in measured.samples if name.startswith("png16")]
    if pngs:
        png = made.timed(
            "hilp C / png16",
            measured.figure(lambda times: min(times[one] for one in pngs) / times["hilp"]),
            "×",
            gate=True,
        )
        made.target("decode, C tier: against the faster PNG", png, "at least", 12.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "bench/codec.json")
    given = parser.parse_args(arguments)
    try:
        made = run(load_cases(given.data, quick=given.quick), given.peers, Plan.of(given.quick))
    except (cases.CasesError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
