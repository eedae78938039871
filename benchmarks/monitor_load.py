"""What `tools/monitor.py` costs the training beside it: the time of an update with looks under way, and without."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import psutil
import result
from command import Plan, add_output, finish, tell
from harness import AGAIN, measure
from result import Result
from timing import Sample

ROOT = Path(__file__).resolve().parent.parent
_EPILOG = """\
A trainer runs on and on; beside it a monitor looks at checkpoint after checkpoint without a pause, and is stopped
(SIGSTOP) and let go on in turns. That is the worst case: in a run looks last for a part of the time between two
checkpoints. CPU seconds of a look, divided by the seconds between two checkpoints of yours, says for which part.

examples:
  python benchmarks/monitor_load.py --quick
  python benchmarks/monitor_load.py --output monitor_load.json                        the demo's network on made-up data
  python benchmarks/monitor_load.py --config configs/vit_s.yaml data.shards=/data/shards device=cuda

exit code: 0 measured, whatever came out (the target is in the result); 2 it cannot be measured so
"""
ALONE, BESIDE = "alone", "beside a monitor"
ROUNDS, UPDATES = 20, 6
LIMIT = 1.05
"""Of the time of an update while looks are under way, in the time of one without."""
PATIENCE_S = 600.0
NAMES = 500
"""More looks than a measurement has time for."""


class LoadError(RuntimeError):
    """A trainer or a monitor ended or says nothing."""


class Training:
    """A trainer that does not end by itself; a context manager."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        self._lines, self._heartbeat = folder / "metrics.jsonl", folder / "heartbeat"
        self._log, self._command = log, command

    def __enter__(self) -> Training:
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=file, stderr=file)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def next(self, count: int) -> list[float]:
        """Seconds, for each image, of the next `count` updates that begin from now on."""
        first, begin_s = self._done() + 2, time.monotonic()  # one is under way
        while self._done() <= first + count:  # and one more, by which time the line of the last is written
            if self._process.poll() is not None or time.monotonic() - begin_s > PATIENCE_S:
                raise LoadError(f"the trainer ended or hangs: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        rows = [json.loads(line) for line in self._lines.read_bytes().split(b"\n")[:-1]]
        return [1 / row["images_per_s"] for row in rows if first <= row["update"] < first + count]

    def _done(self) -> int:
        return int(self._heartbeat.read_text())


class Looks:
    """A monitor that looks without end, unless it rests; a context manager."""

    def __init__(self, command: Sequence[str], output: Path, log: Path) -> None:
        self._command, self._output, self._log = command, output, log

    def __enter__(self) -> Looks:
        with self._log.open("ab") as file:
            self._process = psutil.Popen(self._command, cwd=ROOT, stdout=file, stderr=file)
        begin_s = time.monotonic()
        while not self.done:  # the first one makes the baselines, too
            if time.monotonic() - begin_s > PATIENCE_S:
                raise LoadError("the monitor hangs")
            self._alive()
            time.sleep(0.05)
        self._before = self._cpu_s(), self.done
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def done(self) -> int:
        """Looks so far."""
        return len(list(self._output.glob("step-*/figures.json")))

    @property
    def cpu_s(self) -> float:
        """CPU time of a look, but for the first."""
        return (self._cpu_s() - self._before[0]) / max(self.done - self._before[1], 1)

    def rest(self) -> None:
        self._alive()
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        self._alive()
        os.kill(self._process.pid, signal.SIGCONT)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _alive(self) -> None:
        if self._process.poll() is not None:
            raise LoadError(f"the monitor ended: {self._log.read_text(errors='replace')[-2000:]}")


class Turn:
    """A contender: some updates, with looks beside them or without."""

    environment = "dinox"

    def __init__(self, name: str, training: Training, looks: Looks, updates: int) -> None:
        self.name, self._training, self._looks, self._updates = name, training, looks, updates

    def prepare(self, round_s: float) -> dict[str, Any]:
        self.round()
        return {}

    def round(self) -> Sample:
        if self.name == BESIDE:
            self._looks.go_on()
        seconds = self._training.next(self._updates)
        self._looks.rest()
        return Sample(sum(seconds), len(seconds))


def run(config: Path, overrides: Sequence[str], threads: int, plan: Plan) -> Result:
    """Measure. Raises LoadError where that cannot be done."""
    made = result.begin(
        "monitor_load",
        data=[{"name": config.name, "overrides": list(overrides)}],
        conditions={**plan.conditions(-1), "updates of a turn": UPDATES, "threads of the monitor": threads},
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinox-load-")))
        train = [sys.executable, "-m", "dinox_train", "--config", str(config), f"run.folder={scratch / 'run'}"]
        train += ["data.shards=fake", *overrides, "schedule.updates=1000000", "evaluate.every=1000000"]
        tell("a first checkpoint")
        with (scratch / "log").open("wb") as log:
            if subprocess.run([*train, "train.updates=1"], cwd=ROOT, stdout=log, stderr=log).returncode:
                raise LoadError(f"the trainer ended: {(scratch / 'log').read_text(errors='replace')[-2000:]}")
        seen = many_checkpoints(scratch / "run", scratch / "seen")
        watch = [sys.executable, "tools/monitor.py", str(seen), "--once", "--threads", str(threads)]
        watch += ["--shards", *sets_of(scratch / "run")]
        endless = [*train, "train.updates=1000000", "checkpoint.every=1000000"]
        training = stack.enter_context(Training(endless, scratch / "run", scratch / "log"))
        looks = stack.enter_context(Looks(watch, seen / "monitor", scratch / "monitor.log"))
        updates = 2 if plan.quick else UPDATES
        turns = [Turn(name, training, looks, updates) for name in (ALONE, ALONE + AGAIN, BESIDE)]
        measured = measure(turns, rounds=plan.rounds, round_s=0.0, tell=tell)
        made.take(measured)
        ratio = made.timed("an update beside a monitor / alone", measured.ratio(ALONE, BESIDE), "×", better="lower")
        made.exact("a look, CPU time", looks.cpu_s, "s", better="lower")
        made.target("an update while looks are under way, in the time of one without", ratio, "at most", LIMIT)
    return made


def many_checkpoints(run: Path, folder: Path) -> Path:
    """A folder like a run's, with the run's newest checkpoint under many names."""
    (folder / "checkpoints").mkdir(parents=True)
    newest = max((run / "checkpoints").glob("step-????????"))
    for number in range(1, NAMES):
        (folder / "checkpoints" / f"step-{number:08d}").symlink_to(newest)
    return folder


def sets_of(run: Path) -> list[str]:
    """Where the sets of a run lie."""
    import yaml

    shards = yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"]
    if shards == "fake":
        return [str(run / "fake-shards")]
    return [shards] if isinstance(shards, str) else [one["path"] for one in shards]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="keys of the configuration, as in training")
    parser.add_argument("--config", metavar="C.yaml", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of the monitor (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each takes its turn (default: {ROUNDS})")
    add_output(parser, "bench/monitor_load.json")
    given = parser.parse_args(arguments)
    plan = Plan.of(True) if given.quick else Plan(given.rounds, 0.0, False)
    try:
        made = run(given.config.resolve(), given.overrides, given.threads, plan)
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
