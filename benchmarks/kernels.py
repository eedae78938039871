"""What our kernels move and how fast they are: bytes counted on any CPU; on a GPU attention timed against its peers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attention_case
import kernel_traffic
import machine
import result
import torch
from attention_case import FLEX, OURS, AttentionCase, device_clock
from command import Plan, add_output, finish, tell
from harness import AGAIN, Contender, Local, Measurement, measure
from result import Result

_EPILOG = """\
Bytes: what each kernel moves (its own count), what eager torch's operators move for the same work, and what Inductor's
plan leaves. On a GPU: medians of interleaved rounds at five lengths and two head widths, forward and backward apart.

examples:
  python benchmarks/kernels.py --output kernels.json
  python benchmarks/kernels.py --device cuda --output kernels_gpu.json

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
GPU_PLAN = Plan(7, 0.02, False)
TARGETS = {"forward": 340.0, "backward": 240.0}
"""TFLOP/s on an H200 at head width 64, from 1029 tokens on."""


def begin(device: torch.device, plan: Plan) -> Result:
    """A result without figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return result.begin(
        "kernels",
        data=[{"name": "normal deviates"}],
        conditions={**plan.conditions(-1), "device": name},
        versions={"dinox": machine.versions(("torch", "numpy", "triton"))},
    )


def traffic(made: Result, *, quick: bool) -> None:
    """Bytes of each kernel, and how many times less that is."""
    made.notes.append("torch.compile: a floor, as Inductor counts a tensor once where a loop of its reads it twice")
    for case in kernel_traffic.cases(quick=quick):
        tell(f"bytes of {case.name}")
        counted = kernel_traffic.count(case)
        name = f"{case.name} ({case.shape})"
        made.exact(f"{name}: kernel", case.kernel.bytes / 1e6, "MB", better="lower", gate=True)
        made.exact(f"{name}: eager torch", counted.eager / 1e6, "MB", better="lower")
        made.exact(f"{name}: eager / kernel", counted.saved_of_eager, "×")
        if counted.planned is not None and counted.saved_of_plan is not None:
            made.exact(f"{name}: torch.compile", counted.planned / 1e6, "MB", better="lower")
            made.exact(f"{name}: torch.compile / kernel", counted.saved_of_plan, "×")


def attention(made: Result, cases: Sequence[AttentionCase], plan: Plan) -> None:
    """Ours and every peer that runs and is right, at each shape, in interleaved rounds."""
    for case in cases:
        faults = attention_case.usable(case, attention_case.contenders(case.device))
        made.notes += [f"{case.name}: {name} was not timed: {fault}" for name, fault in faults.items() if fault]
        names = [name for name, fault in faults.items() if not fault]
        for way in ("forward", "backward") if names else ():
            measured = _measure(case, names, way, plan)
            made.take(measured)
            _figures(made, case, names, way, measured)


def _measure(case: AttentionCase, names: Sequence[str], way: str, plan: Plan) -> Measurement:
    clock = device_clock(case.device, time.perf_counter)
    listed: list[Contender] = [
        Local(
            f"{case.name} {way}: {name}", attention_case.contender(case, name, backward=way == "backward"), clock=clock
        )
        for name in names
    ]
    again = attention_case.contender(case, names[0], backward=way == "backward")
    listed.append(Local(f"{case.name} {way}: {names[0]}{AGAIN}", again, clock=clock))
    return measure(listed, rounds=plan.rounds, round_s=plan.round_s, tell=tell)


def _figures(made: Result, case: AttentionCase, names: Sequence[str], way: str, measured: Measurement) -> None:
    of = {name: f"{case.name} {way}: {name}" for name in names}
    for name in names:
        figure = made.timed(of[name], measured.rate(of[name]).scaled(1e-12), "TFLOP/s")
        if name == OURS and case.head_dim == 64 and case.tokens >= 1029 and "H200" in made.conditions["device"]:
            made.target(f"{case.name}, {way}", figure, "at least", TARGETS[way])
    for peer in names:
        if OURS in names and peer != OURS:
            ratio = made.timed(f"{of[OURS]} / {peer}", measured.ratio(of[OURS], of[peer]), "×", gate=peer != FLEX)
            if peer == "sdpa-flash":
                made.target(f"{case.name}, {way}: never slower than SDPA's flash", ratio, "at least", 1.0)


def packed(made: Result, case: AttentionCase, crops: int, plan: Plan) -> None:
    """Global and local views in one packed launch against a launch for each size."""
    clock, name = device_clock(case.device, time.perf_counter), f"{case.name}, 2 global and {crops} local views"
    setups = {
        f"{name}: packed": attention_case.packed_launch(case, crops, dense=False),
        f"{name}: packed{AGAIN}": attention_case.packed_launch(case, crops, dense=False),
        f"{name}: dense": attention_case.packed_launch(case, crops, dense=True),
    }
    listed: list[Contender] = [Local(key, setup, clock=clock) for key, setup in setups.items()]
    measured = measure(listed, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
    made.take(measured)
    ratio = measured.ratio(f"{name}: packed", f"{name}: dense")
    figure = made.timed(f"{name}: packed / dense", ratio, "×", gate=True)
    made.target("the packed launch beats separate dense ones", figure, "at least", 1.0)


def run(device: torch.device, *, quick: bool) -> Result:
    """All figures that this device can give."""
    plan = Plan.of(True) if quick else GPU_PLAN
    made = begin(device, plan)
    traffic(made, quick=quick)
    if device.type == "cuda":
        lengths, widths = attention_case.LENGTHS, attention_case.HEAD_DIMS
        attention(made, [AttentionCase.of(length, width, device) for width in widths for length in lengths], plan)
        packed(made, AttentionCase.of(261, 64, device), 8, plan)
    else:
        made.notes.append("no GPU: nothing was timed, bytes are counted")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: NVIDIA or AMD (default: cpu)")
    add_output(parser, "bench/kernels.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use; leave --device out", file=sys.stderr)
        return 2
    made = run(device, quick=given.quick)
    output: Path = given.output
    return finish(made, output)


if __name__ == "__main__":
    sys.exit(main())
