"""Several processes of one run on CPU (gloo): equal to one, whatever their number, and to each other after any end."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinox_train.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint
from dinox_train.metrics import VARYING, read_lines
from tests.train.started_ranks import ended, output_of, ran, started, wait_for

UPDATES = 4
# Gradients of the first updates of a fresh network are rounding for many a weight, and Adam makes steps of them: a
# small rate keeps those below what is compared. Gram anchoring is on, and KoLeo's groups reach over the ranks.
SETTINGS = (
    *("train.updates=4", "schedule.updates=4", "train.batch_size=8", "optimizer.learning_rate=1e-4"),
    *("checkpoint.every=2", "checkpoint.keep_last=4", "watch.every_s=null", "parallel.timeout_s=120"),
    *("objective.gram.weight=1.0", "objective.gram.start=2"),
)


@pytest.fixture(scope="module")
def arguments(small_config: Path, small_set: Path) -> list[str]:
    return ["--config", str(small_config), f"data.shards={small_set}", *SETTINGS]


@pytest.fixture(scope="module")
def runs(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A whole run of so many processes, made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def of(count: int, mode: str = "ddp", accumulation: int = 1) -> Path:
        key = (count, mode, accumulation)
        if key not in made:
            made[key] = root / f"{mode}-{count}-{accumulation}"
            ran(count, made[key], *arguments, f"parallel.mode={mode}", f"train.accumulation={accumulation}")
        return made[key]

    return of


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def assert_same_lines(one: Path, other: Path) -> None:
    """Losses to 1e-6 of them, what is counted and scheduled exactly."""
    of_one, of_other = lines(one), lines(other)
    assert len(of_one) == len(of_other) == UPDATES
    for a, b in zip(of_one, of_other, strict=True):
        for name in ("loss", "loss_dino", "loss_ibot", "loss_gram", "loss_val"):  # a term is compared as a part of it
            assert a[name] == (None if b[name] is None else pytest.approx(b[name], abs=1e-6 * b["loss"])), name
        for name in ("update", "images", "views", "tokens", "epoch", "lr", "applied", "set_shares"):
            assert a[name] == b[name], name


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    names = ("student", "teacher_heads", "optimizer", "gram_teacher")
    return {f"{name}/{key}": value for name in names for key, value in checkpoint.tensors(name).items()}


def newest(folder: Path) -> Checkpoint:
    found, damage = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    assert not damage
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    """All that is not a time, in the lines and in the newest checkpoint."""
    for a, b in zip(lines(one), lines(other), strict=True):
        assert {name: a[name] for name in a.keys() - VARYING} == {name: b[name] for name in b.keys() - VARYING}
    a, b = newest(one), newest(other)
    assert a.update == b.update == UPDATES
    assert (a.folder / "model.safetensors").read_bytes() == (b.folder / "model.safetensors").read_bytes()
    of_a, of_b = tensors(a), tensors(b)
    assert of_a.keys() == of_b.keys()
    assert all(torch.equal(of_a[name], of_b[name]) for name in of_a)


def as_after(run: Path, update: int, folder: Path) -> Path:
    """The run folder as a kill after `update` updates leaves it: lines of later updates stand in it, too."""
    shutil.copytree(run, folder)
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if int(checkpoint.name[5:]) > update:
            shutil.rmtree(checkpoint)
    return folder


def test_one_two_and_four_processes_give_the_same_losses(runs: Callable[..., Path]) -> None:
    one = runs(1, accumulation=2)
    assert newest(one).state["update"] == UPDATES
    for count in (2, 4):
        assert_same_lines(runs(count), one)


def test_each_rank_says_the_same_of_the_run(runs: Callable[..., Path]) -> None:
    own = {"read_bytes", "decoded_bytes", "cached_bytes", "copied_bytes", "decoded_again", *VARYING}
    for first, second in zip(lines(runs(2)), lines(runs(2) / "ranks" / "00001"), strict=True):
        assert {name: first[name] for name in first.keys() - own} == {
            name: second[name] for name in second.keys() - own
        }


def test_two_go_on_with_the_run_of_one(runs: Callable[..., Path], arguments: list[str], tmp_path: Path) -> None:
    folder = as_after(runs(1, accumulation=2), 2, tmp_path / "run")
    ran(2, folder, *arguments, "parallel.mode=ddp")
    assert_same_lines(folder, runs(1, accumulation=2))


def test_shared_out_weights_learn_the_same_and_go_on_where_whole_ones_were(
    runs: Callable[..., Path], arguments: list[str], tmp_path: Path
) -> None:
    assert_same_lines(runs(2, "fsdp"), runs(2))
    folder = as_after(runs(2), 2, tmp_path / "run")
    ran(2, folder, *arguments, "parallel.mode=fsdp")
    assert_same_lines(folder, runs(2))


def test_a_killed_rank_ends_the_run_with_words_and_any_number_goes_on(
    runs: Callable[..., Path], arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    with started(2, folder, *arguments, "parallel.mode=ddp") as processes:
        wait_for(lambda: len(list_checkpoints(folder / "checkpoints")) == 1, processes)
        processes[1].kill()
        assert ended(processes)[0] == 1
    said = output_of(folder, 0).read_text()
    assert "lost each other" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert newest(folder).update == 2
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    ran(2, folder, *arguments, "parallel.mode=ddp")
    assert_same_bits(folder, runs(2))
    ran(1, alone, *arguments, "parallel.mode=ddp")  # what torchrun did not start needs no other configuration
    assert_same_lines(alone, runs(2))


def test_a_signal_to_one_rank_ends_all_after_the_same_update(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    endless = ("train.updates=1000", "schedule.updates=1000", "checkpoint.every=1000", "evaluate.every=1000")
    with started(2, folder, *arguments, *endless, "parallel.mode=ddp") as processes:
        wait_for(lambda: (folder / "heartbeat").exists(), processes)
        processes[1].send_signal(signal.SIGTERM)
        assert ended(processes) == [143, 143]
    assert len(lines(folder)) == len(lines(folder / "ranks" / "00001")) == newest(folder).update


@pytest.mark.fault
def test_damage_that_one_rank_meets_ends_all_after_a_checkpoint(
    arguments: list[str], small_set: Path, tmp_path: Path
) -> None:
    damaged, folder = tmp_path / "set", tmp_path / "run"
    shutil.copytree(small_set, damaged)
    shard = damaged / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 4096):  # some volumes' slices
        data[place] ^= 0xFF
    shard.write_bytes(data)
    longer = (f"data.shards={damaged}", "train.updates=1000", "schedule.updates=1000", "checkpoint.every=1000")
    with started(2, folder, *arguments, *longer, "parallel.mode=ddp") as processes:
        assert ended(processes) == [1, 1]
    said = [output_of(folder, rank).read_text() for rank in (0, 1)]
    assert any("The data is damaged" in words for words in said)
    stopped = [read_lines(folder / "events.jsonl"), read_lines(folder / "ranks" / "00001" / "events.jsonl")]
    assert all(any(line["event"] == "stopped" for line in events) for events in stopped)
    assert newest(folder).update == len(lines(folder))


# What goes wrong on rank 1 alone: its lines cannot be synced before the first checkpoint, and the first evaluation
# meets damage.
BREAKS = """
import os
if os.environ["RANK"] == "1":
    from dinox_io import ShardError, ShardSet
    from dinox_train.metrics import LineFile
    sync = LineFile.sync
    def failing(self):
        LineFile.sync = sync
        raise OSError(28, "No space left on device")
    def damaged(*_):
        raise ShardError("damaged here")
    LineFile.sync, ShardSet.read_window = failing, damaged
"""


def test_what_one_rank_alone_meets_beside_the_step_is_agreed_on(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("checkpoint.every=1", "evaluate.every=3", "parallel.mode=ddp", "parallel.timeout_s=60")
    with started(2, folder, *arguments, *settings, first=BREAKS) as processes:
        assert ended(processes) == [1, 1]
    assert "lost each other" not in "".join(output_of(folder, rank).read_text() for rank in (0, 1))
    for events in (folder / "events.jsonl", folder / "ranks" / "00001" / "events.jsonl"):
        told = {line["event"]: line["text"] for line in read_lines(events)}
        assert "No space left" in told["not saved"]
        assert "damaged here" in told["stopped"]
    assert [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")] == [2, 3]
    assert len(lines(folder)) == newest(folder).update == 3
    assert [path.parent for path in folder.rglob("*.png")] == [folder / "pictures"]  # patients' slices: in one place


def test_processes_that_would_train_each_for_itself_are_refused(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert train(tmp_path / "run") == 2
    assert "parallel.mode is none, and 2 processes were started" in capsys.readouterr().err
    assert train(tmp_path / "run", "parallel.mode=ddp", "precision=bf16_weights") == 2
    assert "set precision to bf16" in capsys.readouterr().err


def test_a_process_alone_never_initialises_torch_distributed(train: Callable[..., int], tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.updates=1", "parallel.mode=ddp") == 0
    assert not torch.distributed.is_initialized()
    assert json.loads((tmp_path / "run" / "env.json").read_text())["ranks"] == 1
