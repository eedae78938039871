"""Views made in batch from int16 HU against a PIL pipeline that makes the same ones: images per second of CPU time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cases
import machine
import result
import torch
from command import Plan, add_output, finish, load_cases, tell
from harness import AGAIN, Contender, Local, Measurement, measure
from result import Result
from view_pipelines import EVERYTHING, ONE_WINDOW, Pipelines, windows_of

_EPILOG = """\
One core, one thread. The clock is the process's CPU time: what a pipeline takes from decoding and everything else.
Where there is a CUDA device, it is also counted how long the host is busy (drawing, copying, launching) while the
device makes the views.

examples:
  python benchmarks/views.py --output views.json
  python benchmarks/views.py --data scans/LIDC-IDRI-0001

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
OURS, OWN, ONE = "ours", "PIL, 8 bit", "PIL, 8 bit, one HU window"
ON_GPU, HOST = "ours on CUDA, until it is done", "ours on CUDA, host"
BATCH, BATCH_QUICK = 16, 4


def run(found: Sequence[cases.Case], plan: Plan) -> Result:
    """Measure on windows of the cases."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with machine.one_core() as core:
            return _run(found, plan, core)
    finally:
        torch.set_num_threads(threads)


def _run(found: Sequence[cases.Case], plan: Plan, core: int) -> Result:
    windows = windows_of([case.volume.hu for case in found], BATCH_QUICK if plan.quick else BATCH)
    pipelines = Pipelines(windows)
    made = result.begin(
        "views",
        data=[case.described() for case in found],
        conditions={**plan.conditions(core), "windows": list(windows.shape), "clock": "process CPU time"},
        versions={"dinox": machine.versions(("torch", "numpy", "pillow"))},
    )
    setups = {
        OURS: pipelines.ours(pipelines.settings),
        OURS + AGAIN: pipelines.ours(pipelines.settings),
        "ours, noise, gamma and flips in half": pipelines.ours(EVERYTHING),
        OWN: pipelines.pil(pipelines.pil_own_windows, None),
        ONE: pipelines.pil(pipelines.pil_one_window, ONE_WINDOW),
    }
    if torch.cuda.is_available():
        setups[ON_GPU] = pipelines.ours(pipelines.settings, "cuda")
        setups[HOST] = pipelines.ours(pipelines.settings, "cuda", wait=False)
        made.conditions["gpu"] = torch.cuda.get_device_name()
    else:
        made.notes.append("no CUDA device: what the host does for one was not measured")
    contenders: list[Contender] = [Local(name, setup, clock=time.process_time) for name, setup in setups.items()]
    measured = measure(contenders, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
    made.take(measured)
    figures(made, measured, pipelines.bytes_of())
    return made


def figures(made: Result, measured: Measurement, size: dict[str, float]) -> None:
    """Rates (images per second of CPU time), ratios of the same rounds, bytes, and the target where there is a GPU."""
    for name in measured.samples:
        made.timed(name, measured.rate(name), "images per CPU-second")
    for peer in (OWN, ONE):
        made.timed(f"{OURS} / {peer}", measured.ratio(OURS, peer), "×", gate=True)
    for name, count in size.items():
        made.exact(f"bytes to the device, {name}", count / 1e6, "MB an image", better="lower")
    if HOST in measured.samples:
        figure = made.timed(f"{OWN} / {HOST}: CPU time", measured.ratio(HOST, OWN), "×", gate=True)
        made.target("views: less host CPU time an image where the device is a GPU", figure, "at least", 20.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, nargs="+", default=[],
        help="folders of DICOM: every 512 x 512 series in them (default: the made-up phantom)",
    )  # fmt: skip
    add_output(parser, "bench/views.json")
    given = parser.parse_args(arguments)
    try:
        made = run(load_cases(given.data, quick=given.quick), Plan.of(given.quick))
    except (cases.CasesError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
