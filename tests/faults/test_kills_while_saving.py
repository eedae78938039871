"""F35, F39: signals while a checkpoint is written, and kills at random: within saves, stages and pieces of a batch."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinox_train.checkpoint import list_checkpoints, newest_checkpoint, open_checkpoint
from dinox_train.metrics import read_lines
from tests.faults.run_outcome import assert_same_run, events

EVERY, UPDATES = 3, 40
STAGES = """
stages:
- {updates: 11}
- {updates: 8, views: {global_size: 48, local_size: 16}, train: {accumulation: 1}}
- {objective: {gram: {weight: 1.0, start: 0}}, train: {accumulation: 4}}
"""
SETTINGS = (f"train.updates={UPDATES}", f"schedule.updates={UPDATES}", f"checkpoint.every={EVERY}", "evaluate.every=50")


def start(folder: Path, config: Path, shards: Path, *more: str) -> subprocess.Popen[bytes]:
    """A trainer that leads a group of its own."""
    command = [sys.executable, "-m", "dinox_train", "--config", str(config), *more]
    settings = (f"data.shards={shards}", f"run.folder={folder}", *SETTINGS, "train.accumulation=2")
    with (folder.parent / f"{folder.name}.output").open("ab") as output:
        return subprocess.Popen([*command, *settings], stdout=output, stderr=output, start_new_session=True)


def wait_for_a_save(run: subprocess.Popen[bytes], folder: Path, limit_s: float) -> None:
    """Until a checkpoint is being written, the run has ended, or the time is over."""
    deadline = time.monotonic() + limit_s
    while run.poll() is None and time.monotonic() < deadline and not list(folder.glob("checkpoints/.step-*.tmp")):
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_while_a_checkpoint_is_written(
    tmp_path: Path, small_config: Path, small_set: Path, number: int, code: int
) -> None:
    folder = tmp_path / "run"
    run = start(folder, small_config, small_set)
    wait_for_a_save(run, folder, 120)
    os.killpg(run.pid, number)
    assert run.wait(timeout=120) == code
    checkpoint, damage = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert damage == []
    assert checkpoint.update == read_lines(folder / "metrics.jsonl")[-1]["update"]
    assert list(folder.glob("checkpoints/.step-*")) == []
    assert events(folder)[-1][0] == "ended"


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_fifty_kills(tmp_path: Path, small_config: Path, small_set: Path) -> None:
    """At least every other while a checkpoint is written; DINOX_FAULT_KILLS of them, DINOX_FAULT_SEED chooses when."""
    stages = tmp_path / "stages.yaml"
    stages.write_text(STAGES)
    more = ("--config", str(stages))
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert start(straight, small_config, small_set, *more).wait(timeout=900) == 0
    chance = random.Random(int(os.environ.get("DINOX_FAULT_SEED", "0")))
    wanted, kills, attempt = int(os.environ.get("DINOX_FAULT_KILLS", "50")), 0, 0
    while kills < wanted:
        attempt += 1
        if attempt % 2:
            run = start(folder, small_config, small_set, *more)
            wait_for_a_save(run, folder, 120)
            time.sleep(chance.uniform(0, 0.15))
        else:
            run = start(folder, small_config, small_set, *more)
            time.sleep(chance.uniform(1, 8))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
        run.wait(timeout=60)
        saved = list_checkpoints(folder / "checkpoints")
        done = max((line["update"] for line in read_lines(folder / "metrics.jsonl")), default=0)
        newest = open_checkpoint(saved[-1]).update if saved else 0
        assert done - newest <= EVERY
        if newest >= UPDATES:  # done: once more from the beginning
            assert_same_run(straight, folder)
            folder = tmp_path / f"run-{kills}"
    assert start(folder, small_config, small_set, *more).wait(timeout=900) == 0
    assert_same_run(straight, folder)
