"""What several processes on one machine cost beside one (gloo, ddp), at an equal global batch; and how long a run of so
many takes to start and to go on.

    overhead = time of an update of two processes of one thread each / half of that of one process of one thread - 1

That is what remains when each process has half of the images: what they send, what each does for itself, and waiting
for the slower one. Beside it stands one process with two threads, which has the same cores.
Invariant: all take their turns in the same rounds; who has none is stopped (SIGSTOP), and takes no core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import machine
import psutil
import result
from command import Plan, add_output, finish, tell
from harness import AGAIN, measure
from monitor_load import PATIENCE_S, ROOT, LoadError, Training
from result import Result
from timing import Sample

_EPILOG = """\
examples:
  python benchmarks/ranks.py --quick                                    the demo's network on made-up data
  python benchmarks/ranks.py --output benchmarks/results/ranks.json     in full, for a quiet machine of two cores
  python benchmarks/ranks.py --config configs/vit_s.yaml data.shards=/data/shards train.batch_size=16

exit code: 0 measured, whatever came out; 2 it cannot be measured so
"""
ONE_THREAD, TWO_THREADS, TWO_PROCESSES = "1 process, 1 thread", "1 process, 2 threads", "2 processes, 1 thread each"
ARMS = {ONE_THREAD: (1, 1), TWO_THREADS: (1, 2), TWO_PROCESSES: (2, 1)}
"""Processes, and threads of each."""
RANKS = (1, 2, 4)
ROUNDS, STARTS, UPDATES = 10, 6, 3
ENDLESS = ("train.updates=1000000", "schedule.updates=1000000", "checkpoint.every=1000000", "evaluate.every=1000000")


class Processes(Training):
    """A run of one or more processes that does not end by itself, and stands still but in its turns."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path, threads: int) -> None:
        super().__init__(command, folder, log)
        self._threads = threads

    def __enter__(self) -> Processes:
        self._process = started(self._command, self._log, self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)

    def first(self) -> None:
        """Wait for the first update, and stand still."""
        begin_s = time.monotonic()
        while not self._heartbeat.exists() or self._done() < 1:
            if self._process.poll() is not None or time.monotonic() - begin_s > PATIENCE_S:
                raise LoadError(f"the run ended or hangs: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self.stand_still()

    def stand_still(self) -> None:
        for one in family(self._process):
            one.suspend()

    def go_on(self) -> None:
        for one in family(self._process):
            one.resume()


class Turn:
    """A contender: some updates of a run."""

    environment = "dinox"

    def __init__(self, name: str, run: Processes, images: int, updates: int) -> None:
        self.name, self._run, self._images, self._updates = name, run, images, updates

    def prepare(self, round_s: float) -> dict[str, Any]:
        self.round()
        return {}

    def round(self) -> Sample:
        self._run.go_on()
        seconds = self._run.next(self._updates)  # of an image
        self._run.stand_still()
        return Sample(self._images * sum(seconds), len(seconds))


class Start:
    """A contender: from the command to the end of the first update that it does."""

    environment = "dinox"

    def __init__(self, name: str, command: Sequence[str], folder: Path, before: Path | None, log: Path) -> None:
        """before: a run that is gone on with; None: a new one."""
        self.name, self._command, self._folder, self._before, self._log = name, command, folder, before, log

    def prepare(self, round_s: float) -> dict[str, Any]:
        return {}  # what is read from the disk was read for the runs before

    def round(self) -> Sample:
        shutil.rmtree(self._folder, ignore_errors=True)
        wanted = 1
        if self._before is not None:
            shutil.copytree(self._before, self._folder)
            wanted = 2
        lines, begin_s = self._folder / "metrics.jsonl", time.perf_counter()
        process = started(self._command, self._log, 1)
        try:
            while not lines.exists() or lines.read_bytes().count(b"\n") < wanted:
                if time.perf_counter() - begin_s > PATIENCE_S:
                    raise LoadError("the run hangs")
                if process.poll() is not None and lines.read_bytes().count(b"\n") < wanted:
                    raise LoadError(f"the run ended: {self._log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.01)
            seconds = time.perf_counter() - begin_s
            process.wait(timeout=PATIENCE_S)
        finally:
            end(process)
        return Sample(seconds, 1.0)


def started(command: Sequence[str], log: Path, threads: int) -> psutil.Popen:
    """The command, with so many threads for products."""
    with log.open("ab") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        return psutil.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)


def family(process: psutil.Popen) -> list[psutil.Process]:
    """A process and all that it started."""
    if process.poll() is not None:
        raise LoadError("a run ended")
    return [psutil.Process(process.pid), *process.children(recursive=True)]


def end(process: psutil.Popen) -> None:
    """Kill it and all that it started."""
    if process.poll() is None:
        for one in family(process):
            one.kill()
    process.wait()


def command_of(count: int, config: Path, folder: Path, *overrides: str) -> list[str]:
    """A run of `count` processes, as a user would start it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    last = ["parallel.mode=ddp"] if count > 1 else []
    return [sys.executable, *launcher, "-m", "dinox_train", "--config", str(config), f"run.folder={folder}",
            "data.threads=1", *overrides, *last]  # fmt: skip


@contextmanager
def arms(config: Path, overrides: Sequence[str], images: int, updates: int, scratch: Path) -> Iterator[list[Turn]]:
    """All ways of doing an update, each at its first one."""
    with ExitStack() as stack:
        runs: dict[str, Processes] = {}
        for number, (name, (count, threads)) in enumerate(ARMS.items()):
            tell(name)
            folder = scratch / f"run-{number}"
            command = command_of(count, config, folder, *overrides, *ENDLESS)
            runs[name] = stack.enter_context(Processes(command, folder, scratch / f"log-{number}", threads))
            runs[name].first()
        turns = [Turn(name, run, images, updates) for name, run in runs.items()]
        yield [*turns, Turn(TWO_THREADS + AGAIN, runs[TWO_THREADS], images, updates)]


def starts(config: Path, overrides: Sequence[str], scratch: Path, ranks: Sequence[int]) -> list[Start]:
    """New runs, and runs that go on, of so many processes."""
    found, short = [], [*overrides, "schedule.updates=1000000", "evaluate.every=1000000"]
    before = scratch / "before"
    tell("a run to go on with")
    log = scratch / "log"
    if started(command_of(1, config, before, *short, "train.updates=1"), log, 1).wait() != 0:
        raise LoadError(f"the run ended: {log.read_text(errors='replace')[-2000:]}")
    for name, updates, folder_before in (("start", 1, None), ("go on", 2, before)):
        for count in ranks:
            folder = scratch / "run"
            command = command_of(count, config, folder, *short, f"train.updates={updates}")
            found.append(Start(f"{name}, {_words(count)}", command, folder, folder_before, log))
    again = found[0]
    return [*found, Start(again.name + AGAIN, again._command, again._folder, None, log)]


def run(config: Path, overrides: Sequence[str], plan: Plan, begun: int) -> Result:
    """Measure. begun: how often each run is started. Raises LoadError where that cannot be done."""
    import yaml

    keys = dict(one.split("=", 1) for one in overrides)
    images = int(keys.get("train.batch_size") or yaml.safe_load(config.read_text())["train"]["batch_size"])
    made = result.begin(
        "ranks",
        data=[{"name": config.name, "overrides": list(overrides), "images": images}],
        conditions={**plan.conditions(-1), "updates of a turn": UPDATES, "rounds of starts": begun},
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    with tempfile.TemporaryDirectory(prefix="dinox-ranks-") as name:
        scratch = Path(name)
        with arms(config, overrides, images, 1 if plan.quick else UPDATES, scratch) as turns:
            updates = measure(turns, rounds=plan.rounds, round_s=0.0)
        made.take(updates)
        over = updates.figure(lambda seconds: 2 * seconds[TWO_PROCESSES] / seconds[ONE_THREAD] - 1)
        beside = updates.figure(lambda seconds: seconds[TWO_PROCESSES] / seconds[TWO_THREADS])
        made.timed("2 processes, beyond half of 1 process on one core", over.scaled(100.0), "%", better="lower")
        made.timed("2 processes / 1 process on the same cores, time of an update", beside, "×", better="lower")
        begun_runs = measure(
            starts(config, overrides, scratch, RANKS[:2] if plan.quick else RANKS), rounds=begun, round_s=0.0
        )
        made.take(begun_runs)
        for name in begun_runs.samples:
            if not name.endswith(AGAIN):
                seconds = begun_runs.figure(lambda times, name=name: times[name])
                made.timed(f"{name}: to the end of the first update", seconds, "s", better="lower")
    return made


def _words(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="keys of the configuration, as in training")
    parser.add_argument("--config", metavar="C.yaml", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each (default: {ROUNDS})")
    parser.add_argument("--starts", type=int, default=STARTS, help=f"how often each run is started (default: {STARTS})")
    add_output(parser, "bench/ranks.json")
    given = parser.parse_args(arguments)
    overrides = given.overrides or ["data.shards=fake", "train.batch_size=8"]
    plan, begun = (Plan.of(True), 1) if given.quick else (Plan(given.rounds, 0.0, False), given.starts)
    try:
        made = run(given.config.resolve(), overrides, plan, begun)
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
