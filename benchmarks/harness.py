"""Contenders measured side by side: interleaved rounds, paired ratios, and the noise of the measurement itself.

    contenders --warm-up--> rounds, each in another seeded order --> samples --> medians, ratios with intervals

Invariant: in every round each contender runs once, so that what disturbs the machine disturbs all of them, and a ratio
is the median of the rounds' ratios. Contenders of another environment (the peers') run in a process of theirs, and take
their turns with ours; their clock runs beside the work, so that the pipe costs nothing. Standard library only.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import machine
from intervals import Interval, median_interval
from timing import Clock, Sample, Setup, TimedRun

SERVE = Path(__file__).with_name("serve.py")
AGAIN = " (again)"
"""Ends the name under which a contender runs a second time: its ratio to itself is the noise."""


class WorkerError(RuntimeError):
    """A worker's process could not do what it was asked for; the message is its own."""


class Contender(Protocol):
    """Something that can be timed. `environment` says whose interpreter runs it: "dinox" or "peers"."""

    name: str
    environment: str

    def prepare(self, round_s: float) -> dict[str, Any]:
        """Set up and warm up; returns what the setup found out."""
        ...

    def round(self) -> Sample:
        """Run once."""
        ...


class Local:
    """A contender in this process."""

    environment = "dinox"

    def __init__(self, name: str, setup: Setup, *, clock: Clock = time.perf_counter) -> None:
        self.name, self._setup, self._clock = name, setup, clock

    def prepare(self, round_s: float) -> dict[str, Any]:
        prepared = self._setup()
        self._timed = TimedRun(prepared.run, self._clock, prepared.before)
        self._timed.warm_up(round_s)
        return prepared.facts

    def round(self) -> Sample:
        return self._timed.round()


class Worker:
    """A process that runs contenders of a module of this folder in an interpreter of its own; a context manager.

    Raises WorkerError if it cannot start: the interpreter lacks a package, say.
    """

    def __init__(
        self, python: str, module: str, arguments: Mapping[str, Any], *, environment: str,
        variables: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.environment = environment
        command = [python, str(SERVE), module, json.dumps(dict(arguments))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=machine.child_environment(variables, ours=environment == "dinox"),
            )
        except OSError as error:
            raise WorkerError(f"{python} does not start: {error.strerror}") from None
        try:
            listed = self._ask({"do": "list"})
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = listed["versions"]
        self.names: list[str] = listed["contenders"]
        self.tables: list[str] = listed["tables"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def table(self, name: str) -> Any:
        """What the module's table function returns: figures that need no clock."""
        return self._ask({"do": "table", "name": name})["table"]

    def contender(self, name: str, shown: str | None = None) -> Remote:
        """One of `names`, `shown` in the results under another name."""
        return Remote(self, name, shown or name)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker of {self.environment} ended; what it said stands above")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


class Remote:
    """A contender that runs in a worker's process."""

    def __init__(self, worker: Worker, asked: str, name: str) -> None:
        self.name, self.environment = name, worker.environment
        self._worker, self._asked = worker, asked

    def prepare(self, round_s: float) -> dict[str, Any]:
        return self._worker._ask({"do": "prepare", "name": self._asked, "round_s": round_s})["facts"]

    def round(self) -> Sample:
        return Sample(**self._worker._ask({"do": "round", "name": self._asked}))


Times = Mapping[str, float]
"""Contender -> s for one unit of work (a byte, a window …) in one round."""


class Measurement:
    """The samples of all rounds. `facts`: what each contender's setup found out."""

    def __init__(self, environments: Mapping[str, str]) -> None:
        self.environments = dict(environments)
        self.samples: dict[str, list[Sample]] = {name: [] for name in environments}
        self.facts: dict[str, dict[str, Any]] = {}

    def rate(self, name: str) -> Interval:
        """Units of work in a second."""
        return median_interval([sample.amount / sample.seconds for sample in self.samples[name]])

    def figure(self, formula: Callable[[Times], float]) -> Interval:
        """The median over the rounds of a formula in the contenders' times, all of the same round."""
        rounds = zip(*self.samples.values(), strict=True)
        times = [
            {name: sample.seconds / sample.amount for name, sample in zip(self.samples, one, strict=True)}
            for one in rounds
        ]
        return median_interval([formula(one) for one in times])

    def ratio(self, name: str, reference: str) -> Interval:
        """How many times as fast as `reference`: above 1 is faster."""
        return self.figure(lambda times: times[reference] / times[name])

    def noise_floor(self) -> float:
        """The largest difference, as a fraction, that a contender seems to have from itself: below it is nothing.

        Raises ValueError if no contender ran twice.
        """
        pairs = [name for name in self.samples if name + AGAIN in self.samples]
        if not pairs:
            raise ValueError("no contender ran twice: the noise is not known")
        return max(self.ratio(name + AGAIN, name).noise for name in pairs)


def measure(
    contenders: Sequence[Contender], *, rounds: int, round_s: float, seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Measurement:  # fmt: skip
    """Prepare all contenders, then `rounds` times each of them, in an order that (seed, round) decides.

    Args:
        round_s: a contender's run is repeated until a round of it lasts about this long (s).
        tell: is told the name of each contender that is being prepared.

    Raises:
        ValueError: no rounds, or two contenders of one name. WorkerError: a worker failed.
    """
    by_name = {contender.name: contender for contender in contenders}
    if rounds < 1 or len(by_name) != len(contenders):
        raise ValueError("a measurement needs at least one round, and contenders of different names")
    measured = Measurement({name: contender.environment for name, contender in by_name.items()})
    for name, contender in by_name.items():
        if tell is not None:
            tell(name)
        measured.facts[name] = contender.prepare(round_s)
    order, chance = list(by_name), random.Random(seed)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            measured.samples[name].append(by_name[name].round())
    return measured
