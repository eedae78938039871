"""The harness on a fake clock: known ratios come out, disturbances cancel; and workers in processes of their own."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import AGAIN, Local, Worker, WorkerError, measure
from timing import Prepared, TimedRun


def test_known_ratios(fake_machine: Callable[..., Any]) -> None:
    fake = fake_machine(0, 0.02)
    contenders = [fake.contender("a", 0.001, 5), fake.contender("b", 0.003, 2), fake.contender("a" + AGAIN, 0.001, 5)]
    measured = measure(contenders, rounds=41, round_s=0.05)
    ratio = measured.ratio("a", "b")
    assert ratio.low < 3 < ratio.high
    assert ratio.value == pytest.approx(3, rel=0.03)
    assert measured.rate("a").value == pytest.approx(1000, rel=0.02)
    assert 0 < measured.noise_floor() < 0.03
    both = measured.figure(lambda times: times["b"] / (times["a"] + times["a" + AGAIN]))
    assert both.value == pytest.approx(1.5, rel=0.03)
    assert measured.facts["b"] == {"seconds": 0.003}


def test_a_machine_that_slows_down_does_not_change_a_ratio() -> None:
    now = [0.0]

    def contender(name: str, seconds: float) -> Local:
        def run() -> float:
            now[0] += seconds * (1 + now[0] / 10)  # the longer it runs, the slower it gets: 11 times as slow at the end
            return 1.0

        return Local(name, lambda: Prepared(run, {}), clock=lambda: now[0])

    measured = measure([contender("a", 0.01), contender("b", 0.02)], rounds=800, round_s=0.0)
    assert measured.rate("a").low < 0.6 * measured.rate("a").quartiles[1]
    assert measured.ratio("a", "b").value == pytest.approx(2, rel=0.01)


def test_rounds_are_whole_seeded_and_shuffled(fake_machine: Callable[..., Any]) -> None:
    def order(seed: int) -> list[str]:
        fake = fake_machine(0, 0.0)
        measure([fake.contender(name, 0.001) for name in "abc"], rounds=20, round_s=0.0, seed=seed)
        return fake.order[6:]  # without the two runs of each that warm up

    first = order(1)
    rounds = ["".join(first[start : start + 3]) for start in range(0, 60, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert first == order(1)
    assert first != order(2)


def test_short_runs_are_repeated() -> None:
    now, runs = [0.0], [0]

    def run() -> float:
        now[0] += 0.01
        runs[0] += 1
        return 2.0

    timed = TimedRun(run, lambda: now[0])
    timed.warm_up(0.095)
    assert runs == [2]
    sample = timed.round()
    assert sample.amount == 20
    assert sample.seconds == pytest.approx(0.1)


def test_refusals(fake_machine: Callable[..., Any]) -> None:
    fake = fake_machine(0, 0.0)
    with pytest.raises(ValueError, match="different names"):
        measure([fake.contender("a", 1), fake.contender("a", 2)], rounds=2, round_s=0.0)
    with pytest.raises(ValueError, match="at least one round"):
        measure([fake.contender("a", 1)], rounds=0, round_s=0.0)
    with pytest.raises(ValueError, match="noise is not known"):
        measure([fake.contender("a", 1)], rounds=1, round_s=0.0).noise_floor()


MODULE = """
import os
import time
from timing import Prepared

def versions():
    return {"made_up": "1.0"}

def contenders(factor):
    print("this goes to stderr, not between the answers")
    def sleeping(seconds):
        def run():
            time.sleep(seconds * factor)
            return seconds * factor
        return lambda: Prepared(run, {"factor": factor, "threads": os.environ["OMP_NUM_THREADS"]})
    def failing():
        raise OSError("there is no such thing")
    return {"short": sleeping(0.004), "long": sleeping(0.008), "failing": failing}

def tables(factor):
    return {"sizes": lambda: [factor, factor + 1]}
"""


@pytest.fixture
def made_up_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_up_contenders.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "made_up_contenders"


def test_a_worker_takes_turns_with_us(made_up_module: str, fake_machine: Callable[..., Any]) -> None:
    fake = fake_machine(0, 0.0)
    with Worker(sys.executable, made_up_module, {"factor": 1.0}, environment="dinox") as worker:
        assert worker.names == ["short", "long", "failing"]
        assert worker.versions == {"made_up": "1.0"}
        assert worker.table("sizes") == [1.0, 2.0]
        contenders = [worker.contender("short"), worker.contender("short", "again"), fake.contender("ours", 0.001)]
        measured = measure(contenders, rounds=4, round_s=0.0)
        assert measured.facts["short"] == {"factor": 1.0, "threads": "1"}
        assert {name: len(samples) for name, samples in measured.samples.items()} == {"short": 4, "again": 4, "ours": 4}
        assert all(sample.seconds >= sample.amount == 0.004 for sample in measured.samples["short"])
        with pytest.raises(WorkerError, match="OSError: there is no such thing"):
            worker.contender("failing").prepare(0.0)


def test_workers_that_do_not_start(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="does not start"):
        Worker(str(tmp_path / "python"), "made_up", {}, environment="peers")
    with pytest.raises(WorkerError, match="worker of peers ended"):
        Worker(sys.executable, "no_such_module", {}, environment="peers")
