"""A rehearsal: one that passes, ones that fail for the right reason, and what is compared."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinox_train.__main__ import main
from dinox_train.config import load_config
from dinox_train.metrics import read_lines
from dinox_train.rehearsal import REPORT, loss_falls, rehearsed, same_lines, same_tensors

Rehearse = Callable[..., tuple[int, dict, str]]
LEARNS = (
    *("optimizer.learning_rate=2.0e-3", "objective.teacher_temperature_start=0.04", "teacher.momentum=0.9"),
    *("objective.teacher_temperature=0.04", "objective.ibot.weight=0", "objective.koleo.weight=0"),
)
STANDS_STILL = ("optimizer.learning_rate=1.0e-12", "optimizer.final_learning_rate=0")


@pytest.fixture
def rehearse(tmp_path: Path, small_config: Path, small_set: Path, repository: Path, capfd) -> Rehearse:
    """Rehearse the small run with `a.b=value`…: exit code, report, what was said."""

    def run(*overrides: str) -> tuple[int, dict, str]:
        files = ["--config", str(small_config), "--config", str(repository / "configs/micro.yaml")]
        given = [f"data.shards={small_set}", f"run.folder={tmp_path / 'run'}", "evaluate.every=100"]
        given += ["train.batch_size=8", "train.accumulation=4", "evaluate.windows=4", "evaluate.neighbours=2"]
        code = main([*files, *given, "views.num_local=1", *overrides])
        return code, json.loads((tmp_path / "run-rehearsal" / REPORT).read_text()), capfd.readouterr().out

    return run


@pytest.mark.timeout(300)
def test_a_rehearsal_passes(rehearse: Rehearse, tmp_path: Path) -> None:
    code, report, said = rehearse("rehearsal.updates=20", *LEARNS)
    assert code == 0, said
    assert report["passed"]
    assert [check["name"] for check in report["checks"]] == [
        *("killed", "resumed", "finite", "loss", "lines", "tensors"),
    ]
    assert 11 <= report["killed_at"] < 20
    assert (report["updates"], report["batch_size"]) == (20, 4)  # two micro-batches of the four
    assert "rehearsal: PASS" in said
    assert not (tmp_path / "run").exists()
    events = (tmp_path / "run-rehearsal" / "killed" / "events.jsonl").read_text()
    assert '"resumed"' in events


@pytest.mark.fault
@pytest.mark.timeout(300)
def test_a_rehearsal_that_learns_nothing_fails(rehearse: Rehearse) -> None:
    code, report, said = rehearse("rehearsal.updates=12", *LEARNS, *STANDS_STILL)
    assert code == 1
    assert [check["name"] for check in report["checks"] if not check["passed"]] == ["loss"]
    assert "rehearsal: FAIL, the loss does not fall" in said


def test_a_run_that_learns_falls_and_one_that_stands_still_does_not(
    tmp_path: Path, train: Callable[..., int], tiny_preset: None
) -> None:
    given = ("train.updates=16", "schedule.updates=16", "evaluate.every=100", "train.batch_size=8", *LEARNS)
    assert train(tmp_path / "learns", *given) == 0
    assert train(tmp_path / "still", *given, *STANDS_STILL) == 0
    for name, falls in (("learns", True), ("still", False)):
        check = loss_falls([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")])
        assert check.passed == falls, check.words


def test_a_trainer_that_ends_and_time_that_runs_out_are_failures(rehearse: Rehearse) -> None:
    code, report, said = rehearse("data.limit=2")
    assert code == 1
    assert "exit code 2" in report["checks"][-1]["words"]
    assert "fewer than the 4 of a batch" in said
    code, report, said = rehearse("rehearsal.minutes=0.001")
    assert code == 1
    assert "rehearsal.minutes" in report["checks"][-1]["words"]


def test_the_small_run_has_the_micro_batches_of_the_real_one(tmp_path: Path, repository: Path) -> None:
    overlay = repository / "configs/micro.yaml"
    small = rehearsed(load_config([repository / "configs/vit_l.yaml", overlay]), tmp_path)
    assert (small.train.batch_size, small.train.accumulation, small.train.updates) == (32, 2, 40)
    assert (small.schedule.updates, small.data.limit, small.rehearsal) == (40, 1000, None)
    assert (small.model.preset, small.precision) == ("vit_l", "bf16")
    stages = tmp_path / "stages.yaml"
    stages.write_text(
        "train: {batch_size: 32}\nstages: [{updates: 900, train: {accumulation: 8}}, {views: {num_local: 2}}]\n"
    )
    small = rehearsed(load_config([stages, overlay]), tmp_path)
    assert (small.train.batch_size, small.train.accumulation) == (8, 2)
    assert [stage.updates for stage in small.stages] == [None]


def test_a_loss_falls_only_by_more_than_it_scatters() -> None:
    chance = random.Random(3)
    still = [4 + chance.gauss(0, 0.1) for _ in range(40)]
    assert not loss_falls(still).passed
    assert not loss_falls([4.0] * 40).passed
    assert not loss_falls([loss + 0.02 * i for i, loss in enumerate(still)]).passed
    assert loss_falls([loss - 0.02 * i for i, loss in enumerate(still)]).passed
    false_alarms = sum(loss_falls([chance.gauss(0, 1) for _ in range(40)]).passed for _ in range(2000))
    assert false_alarms <= 15


@pytest.fixture
def two_runs(tmp_path: Path) -> SimpleNamespace:
    """The folders of a run and of its copy: 3 lines, one checkpoint."""
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "checkpoints/step-00000003/train").mkdir(parents=True)
    save_file({"a": torch.ones(8), "b": torch.zeros(2)}, one / "checkpoints/step-00000003/train/student.safetensors")
    lines = [{"update": n, "applied": True, "loss": 4.0, "lr": 0.1 * n, "images_per_s": 5.0} for n in (1, 2, 3)]
    (one / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(one, other)
    return SimpleNamespace(one=one, other=other, lines=lines)


def test_lines_are_compared(two_runs: SimpleNamespace) -> None:
    def with_line(**changes: float | None) -> None:
        lines = [*two_runs.lines[:2], two_runs.lines[2] | changes]
        (two_runs.one / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def passes(tolerance: float | None) -> bool:
        return same_lines(two_runs.one, two_runs.other, tolerance).passed

    with_line(images_per_s=7.0)
    assert passes(None)
    with_line(loss=4.01)
    assert (passes(None), passes(0.01), passes(0.001)) == (False, True, False)
    with_line(loss=None)
    assert (passes(None), passes(0.5)) == (False, False)
    with_line(lr=0.4)
    assert (passes(None), passes(0.5)) == (False, False)
    (two_runs.one / "metrics.jsonl").write_text(json.dumps(two_runs.lines[0]) + "\n")
    assert (passes(None), passes(0.5)) == (False, False)


def test_tensors_are_compared(two_runs: SimpleNamespace) -> None:
    def passes(tolerance: float | None) -> bool:
        return same_tensors(two_runs.one, two_runs.other, tolerance).passed

    assert passes(None)
    file = two_runs.one / "checkpoints/step-00000003/train/student.safetensors"
    named = load_file(file)
    save_file(named | {"a": named["a"] * 1.01}, file)
    assert (passes(None), passes(0.02), passes(0.001)) == (False, True, False)
    save_file({"a": named["a"]}, file)
    assert (passes(None), passes(0.5)) == (False, False)
