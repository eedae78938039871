"""What `--plan` says of a configuration on this machine, beside a run of it here.

    tune (measures products and copies) --> plan (images/s, a span) --> some updates of the trainer --> in the span?

Invariant: the plan is made before the run begins, and knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import result
from command import add_output
from intervals import median_interval

from dinox_train.config import Config, ConfigError, load_config
from dinox_train.learner import vit_config
from dinox_train.plan import plan_stage
from dinox_train.plan_machines import Unmeasured
from dinox_train.plan_report import machine_for
from dinox_train.plan_speed import StageSpeed, stage_speed
from dinox_train.prototype_counts import with_prototypes
from dinox_train.stages import stages_of

_EPILOG = """\
examples:
  python benchmarks/plan_check.py --config configs/demo.yaml
  python benchmarks/plan_check.py --config configs/vit_s.yaml --updates 12 train.batch_size=16 train.accumulation=1

exit code: 0 the measured rate lies in the plan's span; 1 it does not; 2 nothing could be measured
"""
WARM_UP = 4
"""Updates that are not counted."""


class CheckError(RuntimeError):
    """A program failed; the message holds what it said."""


@dataclass(frozen=True)
class Found:
    """What was planned, and what came out."""

    planned: StageSpeed
    by: str
    rates: tuple[float, ...]
    """images/s of each counted update."""


def _run(*arguments: str) -> None:
    paths = [str(machine.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    ran = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=variables)
    if ran.returncode != 0:
        raise CheckError(f"{' '.join(arguments[:2])} ended with {ran.returncode}: {ran.stderr.strip()[-2000:]}")


def planned(config: Config) -> tuple[StageSpeed, str]:
    """The speed of the first stage. Raises CheckError where nothing is known of this machine."""
    config = with_prototypes(config)
    vit = vit_config(config)
    found = machine_for(config, vit)
    if isinstance(found, Unmeasured):
        raise CheckError(found.words)
    return stage_speed(plan_stage(config, stages_of(config)[0]), vit, found), found.words


def check(files: Sequence[str], overrides: Sequence[str], updates: int, shards: str) -> Found:
    """Tune, plan, train. Raises CheckError, ConfigError."""
    configs = [part for file in files for part in ("--config", file)]
    _run("dinox_train.platform", "tune", *configs, *overrides)
    speed, by = planned(load_config(files, overrides))
    print(f"planned: {speed.images_per_s.words('images/s')}, by {by}", flush=True)
    with tempfile.TemporaryDirectory(prefix="dinox-plan-") as name:
        length = [f"train.updates={updates}", f"evaluate.every={updates}", f"checkpoint.every={updates}"]
        length += [f"data.shards={shards}", f"run.folder={name}/run"]
        _run("dinox_train", *configs, *overrides, *length)
        lines = (Path(name) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Found(speed, by, tuple(json.loads(line)["images_per_s"] for line in lines[WARM_UP:]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a YAML file; later overlay")
    parser.add_argument("--updates", type=int, default=30, help="that are run (default: 30)")
    parser.add_argument("--shards", default="fake", metavar="FOLDER", help="(default: made-up volumes)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    add_output(parser, "bench/plan_check.json")
    given = parser.parse_intermixed_args(arguments)
    updates = 8 if given.quick else given.updates
    try:
        made = result.begin(
            "plan_check",
            data=[{"name": given.shards if given.shards == "fake" else Path(given.shards).name}],
            conditions={"configs": [Path(file).name for file in given.config], "overrides": given.overrides,
                        "updates": updates, "quick": given.quick},
            versions={"dinox": machine.versions(("torch", "numpy"))},
        )  # fmt: skip
        found = check(given.config, given.overrides, updates, given.shards)
    except (CheckError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    low, high = found.planned.images_per_s
    made.notes.append(f"planned by {found.by}")
    made.exact("planned, lowest", low, "images/s")
    made.exact("planned, highest", high, "images/s")
    rate = median_interval(found.rates)
    measured = made.exact("measured, median", rate.value, "images/s")
    made.target("not slower than planned", measured, "at least", low)
    made.target("not faster than planned", measured, "at most", high)
    result.finish(made, given.output)
    print("\n".join(result.lines(made)))
    print(f"written: {given.output}")
    return 0 if all(target.passed for target in made.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
