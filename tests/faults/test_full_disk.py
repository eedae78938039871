"""F37: the disk is full when a checkpoint is written: told, nothing of it stays, training goes on; at last it stops."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.run_outcome import assert_same_run, events, lines, updates_saved

pytestmark = pytest.mark.usefixtures("tiny_preset")
Train = Callable[..., int]
FEW = ("evaluate.every=100", "checkpoint.every=2")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As a full disk for the tensors of a checkpoint; lines and logs still fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_without_a_checkpoint_and_resumes(tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    assert train(run, *FEW, "train.updates=3") == 0
    with no_file_larger_than(300_000):
        assert train(run, *FEW, "evaluate.windows=4") == 1
    assert updates_saved(run) == [2, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    failed = [text for name, text in events(run) if name == "not saved"]
    assert [text[:29] for text in failed] == [f"the checkpoint of update {update} fa" for update in (4, 6, 8)]
    assert "File too large" in failed[0]
    assert [line["update"] for line in lines(run)] == list(range(1, 10))

    assert train(run, *FEW) == 0
    assert train(tmp_path / "straight", *FEW) == 0
    assert_same_run(tmp_path / "straight", run)


def test_it_stops_after_so_many(tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, *FEW, "train.updates=2") == 0
    with no_file_larger_than(300_000):
        assert train(tmp_path, *FEW, "checkpoint.max_failures=2", "train.updates=40", "schedule.updates=9") == 1
    said = capsys.readouterr().err
    assert "the last 2 checkpoints could not be written (File too large)" in said
    assert "The newest whole one is of update 2" in said
    assert updates_saved(tmp_path) == [2]
    assert lines(tmp_path)[-1]["update"] <= 8
    assert events(tmp_path)[-1][0] == "stopped"
