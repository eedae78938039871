"""F32 a loss that leaps, F34 a full memory, F40 clocks that jump, F48 a torn last line: what is said, what stays."""

import ast
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinox_train.alarms import Alarms, Setting
from dinox_train.learner import Learner
from dinox_train.metrics import read_lines
from dinox_train.step import StepResult
from tests.faults.run_outcome import assert_same_run, events, updates_saved

pytestmark = pytest.mark.usefixtures("tiny_preset")
Train = Callable[..., int]
FEW = "evaluate.every=100"
WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_set: Path, tiny_preset: None) -> Path:
    from dinox_train.__main__ import main

    folder = tmp_path_factory.mktemp("straight") / "run"
    assert main(["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}", FEW]) == 0
    return folder


def test_f32_a_loss_that_leaps_is_an_event(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    to_host, calls = StepResult.to_host, [0]

    def leaps(self: StepResult) -> dict[str, float]:
        calls[0] += 1
        return to_host(self) | ({"loss": 1000.0} if calls[0] in (12, 13) else {})

    monkeypatch.setattr(StepResult, "to_host", leaps)
    assert train(tmp_path, FEW, "train.updates=14") == 0
    found = [text for name, text in events(tmp_path) if name == "alarm"]
    assert len(found) == 1
    assert found[0].startswith("loss_spike: update 12 had a loss of 1000, the median of those before it is ")


def test_f32_what_is_said_does_not_depend_on_where_a_run_was_resumed() -> None:
    losses = [5.0] * 30 + [51.0, 51.0, 5.0, 49.0, 50.5]
    lines = [{"update": update, "loss": loss} for update, loss in enumerate(losses, 1)]
    setting = Setting(batch_size=4, prototypes=64, updates=100, warmup=0)
    whole = Alarms(setting)
    said = [[one.event for one in whole.add(line)] for line in lines]
    begun, over = ([n for n, one in enumerate(said, 1) if name in one] for name in ("alarm", "alarm over"))
    assert (begun, over) == ([31, 35], [33])
    for cut in range(len(losses)):
        first, second = Alarms(setting), Alarms(setting)
        for line in lines[:cut]:
            first.add(line)
        second.restore(first.state())
        assert [[one.event for one in second.add(line)] for line in lines[cut:]] == said[cut:]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_f34_a_full_memory(
    tmp_path: Path,
    train: Train,
    straight: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = Learner.step

    def fails(self: Learner, micro_batches: object, update: int, *rest: object) -> object:
        if update == 5:
            raise error
        return step(self, micro_batches, update, *rest)  # type: ignore[arg-type] # what it was given

    monkeypatch.setattr(Learner, "step", fails)
    assert train(tmp_path, FEW) == 1
    said = capsys.readouterr().err
    assert "GiB resident" in said
    assert "train.accumulation=2 (now 1: 4 images at a time; then 2; same result)" in said
    assert "execution.activation_checkpointing=block" in said
    assert updates_saved(tmp_path) == [3]
    monkeypatch.undo()
    assert train(tmp_path, FEW) == 0
    assert_same_run(straight, tmp_path)


def test_f40_clocks_that_jump_change_nothing(
    tmp_path: Path, train: Train, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + chance.uniform(-1e8, 1e8))
    assert train(tmp_path, FEW) == 0
    monkeypatch.undo()
    assert_same_run(straight, tmp_path)
    for line in read_lines(tmp_path / "metrics.jsonl"):
        assert 0 < line["images_per_s"] < 1e6
        assert 0 <= line["data_wait_fraction"] <= 1


def test_f40_the_packages_read_no_clock_that_jumps(repository: Path) -> None:
    found = []
    for package in ("dinox_io", "dinox_model", "dinox_train"):
        for file in sorted((repository / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCKS:
                    found.append(f"{file.name}:{node.lineno}")
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    found += [f"{file.name}: {name.name}" for name in node.names if name.name in ("time", "time_ns")]
    assert found == []


def test_f48_a_torn_last_line(tmp_path: Path, train: Train, straight: Path) -> None:
    assert train(tmp_path, FEW, "train.updates=5", "checkpoint.every=5") == 0
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"update": 6, "loss": 3.1')
    assert [line["update"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert train(tmp_path, FEW) == 0
    assert_same_run(straight, tmp_path)
