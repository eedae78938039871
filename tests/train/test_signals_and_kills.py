"""A run that is stopped or killed from outside loses at most one interval and resumes as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinox_train.checkpoint import list_checkpoints
from dinox_train.metrics import VARYING, read_lines

UPDATES = 40


class Run:
    """A trainer in a process of its own."""

    def __init__(self, folder: Path, config: Path, shards: Path, *overrides: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "dinox_train", "--config", str(config), f"data.shards={shards}"]
        settings = (f"run.folder={folder}", f"train.updates={UPDATES}", f"schedule.updates={UPDATES}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.output = folder.parent / f"{folder.name}.output"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen([*command, *settings, *overrides], stdout=output, stderr=subprocess.STDOUT)

    def wait_for_update(self, update: int) -> None:
        deadline = time.monotonic() + 120
        while not any(line["update"] >= update for line in read_lines(self.folder / "metrics.jsonl")):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, "the run does not advance"
            time.sleep(0.02)

    def send(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=120)


def outcome(folder: Path) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """Lines without times, and every tensor of the last checkpoint."""
    found = [{k: v for k, v in line.items() if k not in VARYING} for line in read_lines(folder / "metrics.jsonl")]
    last = list_checkpoints(folder / "checkpoints")[-1]
    files = sorted(last.rglob("*.safetensors"))
    return found, {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_equal_runs(first: Path, second: Path) -> None:
    (lines, tensors), (other_lines, other_tensors) = outcome(first), outcome(second)
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    assert lines == other_lines
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_set: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Run(folder, small_config, small_set, "train.accumulation=2").process.wait(timeout=300) == 0
    return folder


def test_signals_end_with_a_checkpoint_and_kills_lose_at_most_one_interval(
    tmp_path: Path, undisturbed: Path, small_config: Path, small_set: Path
) -> None:
    folder = tmp_path / "run"

    def start() -> Run:
        return Run(folder, small_config, small_set, "train.accumulation=2")

    for number, code, update in ((signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 11)):
        run = start()
        run.wait_for_update(update)
        assert run.send(number) == code
        done = read_lines(folder / "metrics.jsonl")[-1]["update"]
        assert list_checkpoints(folder / "checkpoints")[-1].name == f"step-{done:08d}"

    run = start()
    run.wait_for_update(20)
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    done = read_lines(folder / "metrics.jsonl")[-1]["update"]
    newest = int(list_checkpoints(folder / "checkpoints")[-1].name[5:])
    assert done - newest <= 3

    assert start().process.wait(timeout=300) == 0
    assert_equal_runs(undisturbed, folder)


def test_a_second_signal_stops_at_once(tmp_path: Path, small_config: Path, small_set: Path) -> None:
    run = Run(tmp_path / "run", small_config, small_set, "train.batch_size=128", "checkpoint.every=1000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "env.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    begin = time.monotonic()
    assert run.send(signal.SIGTERM) == 143
    assert time.monotonic() - begin < 30


@pytest.mark.fault
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_at_random_moments_again_and_again(
    tmp_path: Path, small_config: Path, small_set: Path, accumulation: int
) -> None:
    pieces = f"train.accumulation={accumulation}"
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert Run(straight, small_config, small_set, pieces).process.wait(timeout=300) == 0
    chance = random.Random(int(os.environ.get("DINOX_FAULT_SEED", "0")) + accumulation)
    kills = 0
    for _ in range(int(os.environ.get("DINOX_FAULT_KILLS", "15"))):
        run = Run(folder, small_config, small_set, pieces)
        try:
            # From before the first import is done to well into training, checkpoints and evaluations.
            run.process.wait(timeout=chance.uniform(0.5, 9.0))
            break
        except subprocess.TimeoutExpired:
            assert run.send(signal.SIGKILL) == -signal.SIGKILL
            kills += 1
    assert Run(folder, small_config, small_set, pieces).process.wait(timeout=300) == 0
    assert kills >= 3
    assert_equal_runs(straight, folder)
