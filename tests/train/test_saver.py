"""A checkpoint is written beside training: of the moment it was begun at, one at a time, and what fails is told."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dinox_model
from dinox_train import saver as module
from dinox_train.checkpoint import CheckpointError, list_checkpoints, open_checkpoint
from dinox_train.host_copy import HostCopy
from dinox_train.saver import Saver
from dinox_train.sections import CheckpointSection

REFUSED = "Permission denied"


@pytest.fixture
def teacher() -> dinox_model.VisionTransformer:
    return dinox_model.build(dinox_model.ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64), seed=1)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    made = Saver(tmp_path, torch.device("cpu"), CheckpointSection(keep_last=2, max_failures=2))
    yield made
    made.close()


def begin(
    saver: Saver, update: int, teacher: dinox_model.VisionTransformer, weight: torch.Tensor, before: object = None
) -> None:
    tensors, state = {"student": {"weight": weight}}, {"update": update, "lately": [1.0]}
    before = before or (lambda: None)
    weights = teacher.state_dict()
    saver.begin(update, teacher=teacher, weights=weights, tensors=tensors, state=state, before=before)  # type: ignore[arg-type]


def test_what_is_written_is_of_the_moment_of_begin(
    saver: Saver, tmp_path: Path, teacher: dinox_model.VisionTransformer
) -> None:
    weight, go = torch.arange(6.0), threading.Event()
    first = {name: value.clone() for name, value in teacher.state_dict().items()}
    begin(saver, 3, teacher, weight, lambda: go.wait(30))
    with torch.no_grad():  # training goes on: every tensor changes in place
        for value in (weight, *teacher.state_dict().values()):
            value.zero_()
    assert (saver.saved, list_checkpoints(tmp_path)) == (None, [])
    go.set()
    assert saver.heard() is None
    assert saver.saved == 3
    checkpoint = open_checkpoint(tmp_path / "step-00000003")
    assert checkpoint.tensors("student")["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert checkpoint.state["lately"] == [1.0]
    loaded = dinox_model.load(checkpoint.folder)
    assert loaded.preprocess == teacher.preprocess
    assert all(torch.equal(value, first[name]) for name, value in loaded.state_dict().items())


def test_later_ones_have_their_own_values_and_old_ones_go(
    saver: Saver, tmp_path: Path, teacher: dinox_model.VisionTransformer
) -> None:
    for update in (1, 2, 3):
        begin(saver, update, teacher, torch.full((4,), float(update)))
        assert saver.heard() is None
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    for update in (2, 3):
        opened = open_checkpoint(tmp_path / f"step-{update:08d}")
        assert opened.tensors("student")["weight"].tolist() == [update] * 4


def test_failures_are_told_once_each_and_too_many_stop(
    saver: Saver, tmp_path: Path, teacher: dinox_model.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    def attempt(update: int) -> str | None:
        begin(saver, update, teacher, torch.ones(2))
        return saver.heard()

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", full)
        assert attempt(1) == "the checkpoint of update 1 failed: No space left on device"
        assert saver.heard() is None
    assert attempt(2) is None
    monkeypatch.setattr(module, "save_checkpoint", full)
    assert attempt(3) is not None
    with pytest.raises(CheckpointError, match=r"the last 2 checkpoints could not be written .* of update 2"):
        attempt(4)
    assert saver.saved == 2


def test_old_ones_that_cannot_be_deleted_are_no_failed_save(
    saver: Saver, teacher: dinox_model.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> list[Path]:
        raise OSError(errno.EACCES, REFUSED)

    monkeypatch.setattr(module, "rotate", refuses)
    for update in (1, 2, 3):
        begin(saver, update, teacher, torch.ones(2))
        told = saver.heard()
        assert told == f"the checkpoint of update {update} is whole, but older ones could not be deleted: {REFUSED}"
        assert saver.saved == update


def test_where_there_is_no_room_for_a_copy_the_caller_waits(
    saver: Saver,
    tmp_path: Path,
    teacher: dinox_model.VisionTransformer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    written_by = []
    begin(saver, 1, teacher, torch.ones(2), lambda: written_by.append(threading.current_thread()))
    assert saver.saved == 1
    assert written_by == [threading.current_thread()]
    assert open_checkpoint(tmp_path / "step-00000001").tensors("student")["weight"].tolist() == [1, 1]
    assert "training WAITS" in caplog.text


def test_close_waits_for_the_save_under_way(saver: Saver, teacher: dinox_model.VisionTransformer) -> None:
    go = threading.Event()
    begin(saver, 1, teacher, torch.ones(2), lambda: go.wait(30))
    threading.Timer(0.2, go.set).start()
    saver.close()
    assert saver.saved == 1


def test_a_copy_uses_its_memory_again_and_follows_what_changes_shape() -> None:
    copy = HostCopy(torch.device("cpu"))
    one = copy.take({"a": {"x": torch.ones(3), "y": torch.tensor(2)}})["a"]
    again = copy.take({"a": {"x": torch.zeros(3), "y": torch.tensor(3)}, "b": {"x": torch.ones(2)}})
    assert again["a"]["x"] is one["x"]
    assert (one["x"].tolist(), int(again["a"]["y"]), again["b"]["x"].tolist()) == ([0, 0, 0], 3, [1, 1])
    other = copy.take({"a": {"x": torch.ones(2, 2)}})["a"]["x"]
    assert other.shape == (2, 2)
