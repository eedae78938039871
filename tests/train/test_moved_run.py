"""A run that goes on in another folder, with its set at another path: the same windows, views, schedule and losses."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dinox_train.__main__ import main
from dinox_train.rehearsal import same_lines, same_tensors


def test_a_run_and_its_set_move(
    tmp_path: Path, small_config: Path, small_set: Path, train: Callable[..., int], tiny_preset: None
) -> None:
    there, here = tmp_path / "first machine", tmp_path / "second machine"
    there.mkdir()
    shutil.copytree(small_set, there / "shards")
    given = ["--config", str(small_config)]
    assert main([*given, f"data.shards={there / 'shards'}", f"run.folder={there / 'run'}", "train.updates=2"]) == 0
    there.rename(here)
    assert main([*given, f"data.shards={here / 'shards'}", f"run.folder={here / 'run'}", "train.updates=5"]) == 0
    assert not there.exists()
    assert train(tmp_path / "stayed", "train.updates=2") == 0
    assert train(tmp_path / "stayed", "train.updates=5") == 0
    for same in (same_lines, same_tensors):
        check = same(here / "run", tmp_path / "stayed", None)
        assert check.passed, check.words
