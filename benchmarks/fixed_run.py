"""A fixed run of 50 updates: how fast the whole trainer is, and whether it still computes the same.

    made-up set (seeded) --> python -m dinox_train, 50 updates --> losses against a kept curve, time against a floor

Invariant: a run whose losses leave the kept curve fails, however fast it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import result
import torch
from command import add_output, tell
from harness import AGAIN, Local, Measurement, measure
from matrix_floor import Floor, Tensors
from result import Result
from timing import Prepared, Sample

import dinox_model
from dinox_train.fake import write_fake_set

_EPILOG = """\
The run: vit_ti, DINO + iBOT + KoLeo, 50 updates of 8 images, on made-up volumes. Each loss is compared with the one in
benchmarks/results/fixed_run_curve.json: within 1e-5 of it where processor, threads and versions are the curve's, within
2e-2 elsewhere (other instructions round in another order, and training carries that on). The floor is the matrix
products of such a network, in the same rounds; updates / floor is what compare.py gates.

examples:
  python benchmarks/fixed_run.py                 measure and compare
  python benchmarks/fixed_run.py --keep          the curve is meant to be another one: keep this one

exit code: 0 measured, the curve is the kept one; 1 it is another curve; 2 the run failed, or there is no kept curve
"""
CURVE = Path(__file__).parent / "results" / "fixed_run_curve.json"
CURVE_FORMAT, CURVE_VERSION = "dinox-fixed-run", 1
UPDATES, WARM_UP, BATCH = 50, 5, 8
ROUNDS, ROUNDS_QUICK = 5, 2
SIDES = {number: "val" if number == 3 else "train" for number in range(4)}
SETTINGS = f"""\
seed: 20
device: cpu
precision: fp32
model: {{preset: vit_ti, layer_scale: 0.5}}
views: {{global_size: 96, local_size: 48, num_local: 2}}
objective: {{prototypes: 256, head_hidden: 256, head_bottleneck: 64, ibot: {{prototypes: 256}}}}
optimizer: {{learning_rate: 5.0e-4}}
schedule: {{updates: {UPDATES}, warmup_updates: 5}}
teacher: {{momentum: 0.95}}
train: {{updates: {UPDATES}, batch_size: {BATCH}, accumulation: 2}}
data: {{threads: 1, pool_mib: 256, prefetch_mib: 16}}
checkpoint: {{every: {UPDATES}}}
evaluate: {{every: {UPDATES}, windows: 8, neighbours: 3}}
log: {{every: {UPDATES}}}
"""
TOLERANCE_HERE, TOLERANCE_ELSEWHERE = 1e-5, 2e-2
"""Largest relative difference of a loss."""


class FixedRunError(RuntimeError):
    """The run could not be done; the message holds what it said."""


@dataclass(frozen=True)
class Curve:
    """The losses of the fixed run, and where they came out so."""

    losses: tuple[float, ...]
    settings: str
    where: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """As JSON."""
        content = {"format": CURVE_FORMAT, "version": CURVE_VERSION, "where": dict(self.where)}
        content |= {"settings": self.settings.splitlines(), "losses": list(self.losses)}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_curve(path: Path) -> Curve:
    """Raises FixedRunError where there is none, or it is of other settings."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["format"], content["version"]
        curve = Curve(tuple(content["losses"]), "\n".join(content["settings"]) + "\n", content["where"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FixedRunError(f"{path.name} is no kept curve ({error}); --keep writes one") from None
    if kind != (CURVE_FORMAT, CURVE_VERSION) or curve.settings != SETTINGS:
        raise FixedRunError(f"{path.name} is of another run or version; --keep writes this one's")
    return curve


def where() -> dict[str, Any]:
    """What the losses may depend on beside the code."""
    return {
        "cpu": machine.describe()["cpu"],
        "architecture": machine.describe()["architecture"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": machine.versions(("numpy",)).get("numpy", ""),
        "threads": torch.get_num_threads(),
    }


def tolerance_for(kept: Curve, here: Mapping[str, Any]) -> float:
    """How far a loss may be from the kept one here."""
    return TOLERANCE_HERE if dict(kept.where) == dict(here) else TOLERANCE_ELSEWHERE


def largest_difference(losses: Sequence[float], kept: Sequence[float]) -> tuple[float, int]:
    """The largest relative difference, and at which update (from 1); infinite where the lengths differ, or a loss is
    no number."""
    if len(losses) != len(kept):
        return math.inf, min(len(losses), len(kept)) + 1
    apart = [abs(one / other - 1) for one, other in zip(losses, kept, strict=True)]
    apart = [math.inf if math.isnan(one) else one for one in apart]
    worst = max(apart)
    return worst, apart.index(worst) + 1


def train_once(shards: Path, folder: Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of one run, in a process of its own. Raises FixedRunError."""
    config = folder / "fixed.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "dinox_train", "--config", str(config), f"data.shards={shards}"]
    command += [f"run.folder={folder / 'run'}", *overrides]
    paths = [str(machine.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)
    if ran.returncode != 0:
        raise FixedRunError(f"the run ended with {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Training:
    """The fixed run as a contender: each round is a run in a new process, of which only the updates are timed."""

    environment = "dinox"

    def __init__(self, name: str, shards: Path, scratch: Path, *, updates: int) -> None:
        self.name, self._shards, self._scratch, self._updates = name, shards, scratch, updates
        self.curves: list[tuple[float, ...]] = []

    def prepare(self, round_s: float) -> dict[str, Any]:
        """Nothing to set up: a process warms up in its first updates, which are not timed."""
        return {}

    def round(self) -> Sample:
        """One run: seconds and images of its updates after the first ones."""
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._scratch) as name:
            lines = train_once(self._shards, Path(name), (f"train.updates={self._updates}",))
        self.curves.append(tuple(math.nan if line["loss"] is None else line["loss"] for line in lines))
        # The median update, not the sum: an evaluation, a save, or somebody else's work is no update.
        seconds = statistics.median(BATCH / line["images_per_s"] for line in lines[min(WARM_UP, len(lines) - 1) :])
        return Sample(seconds, BATCH)


def floor() -> Prepared:
    """The matrix products of about an update: vit_ti, forward of the teacher, forward and backward of the student."""
    config, tensors = dinox_model.PRESETS["vit_ti"], Tensors(torch.device("cpu"), torch.float32)
    teacher, student = Floor(tensors, backward=False), Floor(tensors, backward=True)
    for one in (teacher, student):
        one.network(config, BATCH, 96)  # two global views of half a batch, as a micro-batch has them
    student.network(config, BATCH, 48)

    def run() -> float:
        for _ in range(2):
            teacher.run()
            student.run()
        return BATCH

    return Prepared(run, {})


def run(*, rounds: int, updates: int, scratch: Path) -> tuple[Result, tuple[float, ...]]:
    """Measure; the result and the losses. Raises FixedRunError where a run fails, or two runs differ."""
    shards = write_fake_set(scratch / "shards", SIDES)
    made = result.begin(
        "fixed_run",
        data=[{"name": "made-up volumes", "volumes": len(SIDES), "settings": SETTINGS.splitlines()}],
        conditions={
            "quick": rounds == ROUNDS_QUICK,
            "rounds": rounds,
            "updates": updates,
            "threads": torch.get_num_threads(),
            "core": -1,
        },
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    one, again = (Training(name, shards, scratch, updates=updates) for name in ("updates", "updates" + AGAIN))
    measured = measure([one, again, Local("floor", floor)], rounds=rounds, round_s=1.0, tell=tell)
    curves = {*one.curves, *again.curves}
    if len(curves) > 1:
        raise FixedRunError(f"{2 * rounds} runs of the same settings gave {len(curves)} curves: a run does not repeat")
    figures(made, measured)
    return made, one.curves[0]


def figures(made: Result, measured: Measurement) -> None:
    """Speed, and the time of an update over that of its floor."""
    made.take(measured)
    made.timed("updates", measured.rate("updates"), "images/s")
    made.timed("floor", measured.rate("floor"), "images/s")
    made.timed("updates / floor", measured.ratio("floor", "updates"), "× the time", better="lower", gate=True)


def judge(made: Result, losses: Sequence[float], kept: Curve) -> bool:
    """Whether the losses are the kept ones; adds the difference, and a note that says what was compared."""
    apart, update = largest_difference(losses, kept.losses)
    limit = tolerance_for(kept, where())
    figure = made.exact("largest difference of a loss", min(apart, 1e9), "of the kept loss", better="lower")
    made.target("the losses are the kept ones", figure, "at most", limit)
    elsewhere = {key: value for key, value in kept.where.items() if where().get(key) != value}
    made.notes.append(
        f"losses of {len(losses)} updates, the farthest at update {update}; the kept curve is of "
        + ("this machine and these versions" if not elsewhere else f"another place: {elsewhere}")
    )
    return apart <= limit


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="keep this curve as the right one")
    parser.add_argument("--curve", metavar="FILE", type=Path, default=CURVE, help="the kept curve")
    add_output(parser, "bench/fixed_run.json")
    given = parser.parse_args(arguments)
    try:
        kept = None if given.keep else read_curve(given.curve)
        with tempfile.TemporaryDirectory(prefix="dinox-fixed-") as name:
            made, losses = run(rounds=ROUNDS_QUICK if given.quick else ROUNDS, updates=UPDATES, scratch=Path(name))
    except FixedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if kept is None:
        kept = Curve(losses, SETTINGS, where())
        kept.write(given.curve)
        print(f"kept: {given.curve}")
    same = judge(made, losses, kept)
    result.finish(made, given.output)
    print("\n".join(result.lines(made)))
    print(f"written: {given.output}")
    if not same:
        print("FAILED: the losses are not the kept ones: this is another training, however fast it is", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
