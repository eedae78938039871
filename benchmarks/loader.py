"""Windows of CT into batches of 64: our loader against the peers', each as its users run it, and given our pattern."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import cases
import loader_data
import loader_figures
import loader_order
import machine
import our_loaders
import peer_loader_stores
import peer_loaders
import result
from command import Plan, add_options, load_cases, tell
from harness import AGAIN, Contender, Measurement, Worker, WorkerError, measure
from loader_figures import Session
from result import Result

from dinox_io import filters

_EPILOG = """\
The job: random windows of 3 slices, int16, into batches of 64. Work is windows. Cold: the files are dropped from the
page cache before each round (the disk's own cache is not). The stores are written once into --scratch, and stay there.

examples:
  python benchmarks/loader.py --quick
  python benchmarks/loader.py --data scans/LIDC-IDRI-0001 scans/LIDC-IDRI-0002 --peers peers/bin/python \\
      --scratch /data/scratch --output loader.json --plot loader.png

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
SIZE, SLICES = 1500, 128
SIZE_QUICK, SLICES_QUICK = 100, 24
ROUNDS, COLD_ROUNDS = 9, 5
"""Of so many contenders that each round takes half a minute."""
PEERS = (*peer_loader_stores.STORES, peer_loaders.WEBDATASET)
QUICK_COLD = ("npy pread", "tensorstore blosc")
"""Peers of the cold session with --quick."""
ABSENT = {
    "MosaicML MDS": "its package asks for torchvision and cloud packages, and replaces torch",
    "FFCV": "its package needs libraries of the system",
}


class Given(NamedTuple):
    """What was asked for on the command line."""

    peers: str | None
    scratch: Path
    size_bytes: int
    slices: int
    cores: Sequence[int]
    only: Sequence[str] = ()
    """Names of peers; none: all."""


@contextmanager
def held_to(cores: int) -> Iterator[None]:
    """Hold this process, and those it starts meanwhile, to so many cores (the last ones)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[-cores:]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(found: Sequence[cases.Case], given: Given, plan: Plan) -> Result:
    """Write the stores, then measure all sessions. WorkerError if a worker cannot."""
    data = loader_data.prepare(found, given.scratch, size_bytes=given.size_bytes, slices=given.slices, tell=tell)
    made = result.begin(
        "loader",
        data=[case.described() for case in found],
        conditions={
            **plan.conditions(-1), "batch_size": our_loaders.BATCH_SIZE, "depth": our_loaders.DEPTH, "set": data.facts,
            "filters": filters.describe(), "filesystem": machine.filesystem(given.scratch),
            "rounds": min(plan.rounds, ROUNDS), "cold_rounds": min(plan.rounds, COLD_ROUNDS),
        },
        versions={"dinox": our_loaders.versions()},
    )  # fmt: skip
    stores = _written(data, given, plan, made)
    sessions = []
    for cores in given.cores:
        for cold in (False, True):
            if plan.quick and cold != (cores == min(given.cores)) and len(given.cores) > 1:
                continue
            sessions.append(_session(data, stores, given, plan, made, cores=cores, cold=cold))
    tell("tables")
    for session in sessions:
        loader_figures.rates(made, session)
    with held_to(1):
        resume = loader_order.measure(made, quick=plan.quick)
    tables = _tables(data, plan)
    loader_figures.targets(made, sessions, tables, resume)
    made.conditions["spent"] = {session.name: session.spent for session in sessions}
    made.conditions["tables"] = tables
    return made


def _peer_arguments(data: loader_data.LoaderData, store: str, plan: Plan, *, cores: int, cold: bool) -> dict[str, Any]:
    torch = find_spec("torch")
    path = str(Path(torch.origin).parent.parent) if torch is not None and torch.origin else ""
    folder = str(data.folder)
    return {"folder": folder, "store": store, "cores": cores, "quick": plan.quick, "cold": cold, "torch_path": path}


def _written(data: loader_data.LoaderData, given: Given, plan: Plan, made: Result) -> list[str]:
    """Write the stores that are not there, each in a process of its own; the names of those that can be measured."""
    made.notes += [f"{name} was not measured: {why}" for name, why in ABSENT.items()]
    if given.peers is None:
        made.notes.append("no peers were measured: --peers was not given")
        return []
    stores = []
    for store in PEERS:
        if given.only and store not in given.only:
            continue
        arguments = _peer_arguments(data, store, plan, cores=1, cold=False)
        with Worker(given.peers, "peer_loaders", arguments, environment="peers") as worker:
            made.versions["peers"] = worker.versions
            if missing := worker.table("missing"):
                made.notes.append(f"{store} was not measured: not installed: {', '.join(missing)}")
                continue
            tell(f"{store} in its folder")
            size = worker.table("write")["bytes"]
            made.exact(f"size {store}", data.facts["raw_bytes"] / size, "raw/stored")
            stores.append(store)
    for preset in ("small", "fast"):
        made.exact(f"size dinox {preset}", data.facts["raw_bytes"] / data.facts[f"{preset}_bytes"], "raw/stored")
    return stores


def _session(
    data: loader_data.LoaderData, stores: Sequence[str], given: Given, plan: Plan, made: Result, *, cores: int,
    cold: bool,
) -> Session:  # fmt: skip
    """All contenders with so many cores, in one interleaved measurement."""
    name = f"{cores} core{'s' if cores > 1 else ''}, {'cold' if cold else 'warm'}"
    tell(f"session {name}")
    with ExitStack() as stack:
        stack.enter_context(held_to(cores))
        ours = {"folder": str(data.folder), "quick": plan.quick, "cold": cold}
        c_tier = stack.enter_context(Worker(sys.executable, "our_loaders", ours, environment="dinox"))
        numpy_tier = stack.enter_context(
            Worker(sys.executable, "our_loaders", ours, environment="dinox", variables={"DINOX_FILTERS": "numpy"})
        )
        workers = {"dinox": c_tier, "dinox NumPy": numpy_tier}
        contenders: list[Contender] = [
            c_tier.contender(one, f"dinox {one} [{name}]")
            for one in c_tier.names
            if cores > 1 or one != "random, 1 thread"
        ]
        contenders.append(c_tier.contender("random", f"dinox random [{name}]{AGAIN}"))
        contenders += [numpy_tier.contender(one, f"dinox NumPy {one} [{name}]") for one in ("random", "runs, views")]
        for store in stores if not (plan.quick and cold) else [one for one in stores if one in QUICK_COLD]:
            arguments = _peer_arguments(data, store, plan, cores=cores, cold=cold)
            for how in ("users", "runs"):
                if how == "runs" and store in ("nifti gz", peer_loaders.WEBDATASET):
                    continue  # a stream has no runs, and gzip no random access that they could save
                worker = stack.enter_context(Worker(str(given.peers), "peer_loaders", arguments, environment="peers"))
                workers[f"{store}, {how}"] = worker
                contenders.append(worker.contender(how, f"{store}, {how} [{name}]"))
        rounds = min(plan.rounds, COLD_ROUNDS if cold else ROUNDS)
        measured: Measurement = measure(contenders, rounds=rounds, round_s=plan.round_s, tell=tell)
        made.take(measured)
        spent: dict[str, Any] = {}
        for label, worker in workers.items():
            table = worker.table("spent")
            if label.startswith("dinox"):
                spent |= {f"{label} {one}": values for one, values in table.items()}
            else:
                spent[label] = table
        return Session(name, cores, cold, measured, spent)


def _tables(data: loader_data.LoaderData, plan: Plan) -> dict[str, Any]:
    """Figures that need no rounds; those of memory each in a process that did nothing else."""
    ours = {"folder": str(data.folder), "quick": plan.quick, "cold": False}
    found: dict[str, Any] = {}
    one_core = ("index bytes", "stages", "python share")
    for names, cores in ((("memory random",), 2), (("memory runs",), 2), (one_core, 1)):
        with held_to(cores), Worker(sys.executable, "our_loaders", ours, environment="dinox") as worker:
            for name in names:
                tell(name)
                found[name] = worker.table(name)
    for name in ("memory random", "memory runs"):
        uss = found[name]["uss_bytes"]
        found[name]["spread"] = (max(uss) - min(uss)) / statistics.median(uss)
    return found


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "bench/loader.json")
    parser.add_argument(
        "--scratch", metavar="FOLDER", type=Path, default=Path(tempfile.gettempdir()) / "dinox-benchmarks",
        help="where the stores are written, and found again: about 12 times --size (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", metavar="MB", type=int, help=f"of the volumes, raw (default: {SIZE}, with --quick {SIZE_QUICK})"
    )
    parser.add_argument("--peer", action="append", choices=PEERS, help="only this one; repeatable (default: all)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also a picture of the rates, a .png or .svg")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    asked = parse_arguments(arguments)
    size = asked.size or (SIZE_QUICK if asked.quick else SIZE)
    there = len(os.sched_getaffinity(0))
    cores = sorted({1, min(2, there)}, reverse=True)
    slices = SLICES_QUICK if asked.quick else SLICES
    given = Given(asked.peers, asked.scratch, size * 10**6, slices, cores, asked.peer or ())
    try:
        made = run(load_cases(asked.data, quick=asked.quick), given, Plan.of(asked.quick))
    except (cases.CasesError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.quick:
        made.notes.append("a pass of the quick set is a few batches: too few for mode runs to share what it decodes")
    made.notes.append(f"{there} cores were there: scaling beyond {max(cores)} was not measured")
    result.finish(made, asked.output)
    print("\n".join(result.lines(made)))
    print("\n".join(loader_figures.table(made)))
    print(f"written: {asked.output}")
    if asked.plot is not None:
        loader_figures.plot(made, asked.plot)
        print(f"written: {asked.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
