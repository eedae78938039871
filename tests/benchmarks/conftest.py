"""Made-up contenders on a made-up clock, and results made of them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import result
from harness import AGAIN, Local, measure
from result import Result
from timing import Prepared


class FakeClock:
    """Time that passes only when a contender works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeMachine:
    """Contenders whose runs take given times (s for each unit of work) with relative noise, on one fake clock."""

    def __init__(self, seed: int, noise: float) -> None:
        self.clock, self.chance, self.noise = FakeClock(), random.Random(seed), noise
        self.order: list[str] = []

    def contender(self, name: str, seconds: float, amount: float = 1.0) -> Local:
        def run() -> float:
            self.order.append(name)
            self.clock.now += seconds * amount * self.chance.lognormvariate(0.0, self.noise)
            return amount

        return Local(name, lambda: Prepared(run, {"seconds": seconds}), clock=self.clock)


@pytest.fixture
def fake_machine() -> Callable[..., FakeMachine]:
    """(seed, noise as a fraction) -> FakeMachine."""
    return FakeMachine


@pytest.fixture
def made_result(fake_machine: Callable[..., FakeMachine]) -> Callable[..., Result]:
    """(seed, slower=1.0, noise=0.03, …) -> a result in which `ours` takes `slower` ms and `peer` 2 ms."""

    def make(
        seed: int, *, slower: float = 1.0, noise: float = 0.03, rounds: int = 25, size: float = 2.5, gate: bool = True
    ) -> Result:
        fake = fake_machine(seed, noise)
        contenders = [
            fake.contender("ours", 0.001 * slower),
            fake.contender("ours" + AGAIN, 0.001 * slower),
            fake.contender("peer", 0.002),
        ]
        made = result.begin("made up", data=[{"name": "none"}], conditions={}, versions={"dinox": {}})
        made.take(measured := measure(contenders, rounds=rounds, round_s=0.0))
        made.timed("ours / peer", measured.ratio("ours", "peer"), "×", gate=gate)
        made.exact("size", size, "raw/stored", gate=True)
        return made

    return make


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Result, str], Path]:
    """(result, name) -> its file."""

    def write(made: Result, name: str) -> Path:
        result.finish(made, tmp_path / name)
        return tmp_path / name

    return write
