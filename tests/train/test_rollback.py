"""Going back to a checkpoint from before the trouble: which windows come then, and that a kill changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinox_train import trainer as trainer_module
from dinox_train.__main__ import main
from dinox_train.checkpoint import list_checkpoints, set_aside
from dinox_train.config import ConfigError, validate
from dinox_train.evaluate import EVALUATION_POSITION
from dinox_train.guard import Guard
from dinox_train.metrics import read_lines
from dinox_train.micro_batch import GlobalBatch
from dinox_train.rollback import checkpoint_before, remove_after
from dinox_train.trainer import Trainer
from tests.faults.run_outcome import assert_same_run, events, lines, updates_saved

pytestmark = pytest.mark.usefixtures("tiny_preset")
Train = Callable[..., int]
FEW = ("evaluate.every=100", "checkpoint.keep_last=9")


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], list[int]]:
    """Global batches (from 0) whose views are not a number, and all that were drawn, in their order."""
    bad: set[int] = set()
    drawn: list[int] = []
    micro_batch = GlobalBatch.micro_batch

    def watched(self: GlobalBatch, images: torch.Tensor, *rest: Any, **named: Any) -> Any:
        views, plan = micro_batch(self, images, *rest, **named)
        if self.position < EVALUATION_POSITION:
            drawn.append(self.position)
        if self.position in bad:
            views.global_views.fill_(float("nan"))
        return views, plan

    monkeypatch.setattr(GlobalBatch, "micro_batch", watched)
    return bad, drawn


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], list[int]]:
    return watch_batches(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_set: Path, tiny_preset: None) -> Path:
    """A run whose global batches 4 and 5, of updates 5 and 6, are not a number, and that goes back."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        bad, drawn = watch_batches(patch)
        bad |= {4, 5}
        places = [f"data.shards={small_set}", f"run.folder={folder}"]
        assert main(["--config", str(small_config), *places, "health.rollback=2", *FEW]) == 0
    assert drawn == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    return folder


def test_back_before_the_trouble_and_on_with_the_windows_after_it(
    tmp_path: Path, train: Train, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lines(straight)
    assert [line["update"] for line in found] == list(range(1, 10))
    assert all(line["applied"] for line in found)
    assert [line["images"] for line in found] == [4 * update for update in range(1, 10)]
    said = [event for event in read_lines(straight / "events.jsonl") if event["event"] == "rollback"]
    assert [event["update"] for event in said] == [4]
    assert "number 1 (at most 3): from update 5 on" in said[0]["text"]
    assert "back after update 3 and leaves out the 3 batches drawn since" in said[0]["text"]
    assert "masked" not in [name for name, _ in events(straight)]  # those updates were done again
    assert updates_saved(straight) == [3, 6, 9]
    state = json.loads((straight / "checkpoints/step-00000009/train/state.json").read_bytes())
    assert (state["update"], state["position"], state["skipped"], state["rollbacks"]) == (9, 12, 3, 1)
    assert state["went_back_to"] == [3]
    assert (straight / "masked_batches/update-00000005.json").is_file()

    # The reference: a run that is stopped after update 3, and goes on with global batch 6, as nobody told it to.
    assert train(tmp_path / "told", "train.updates=3", *FEW) == 0
    resume = Trainer.resume

    def skipping(self: Trainer, checkpoint: Any) -> None:
        resume(self, checkpoint)
        self.guard.skipped += 3

    monkeypatch.setattr(Trainer, "resume", skipping)
    assert train(tmp_path / "told", *FEW) == 0
    assert_same_run(straight, tmp_path / "told")


@pytest.mark.parametrize(
    "killed_in",
    [
        pytest.param(4, id="in the trouble", marks=pytest.mark.fault),
        pytest.param(5, id="gone back"),
        pytest.param(7, id="before a checkpoint", marks=pytest.mark.fault),
    ],
)
def test_a_kill_comes_to_the_same(
    tmp_path: Path,
    train: Train,
    straight: Path,
    poisoned: tuple[set[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    killed_in: int,
) -> None:
    bad, drawn = poisoned
    bad |= {4, 5}

    class Killed(BaseException):
        """As sudden as SIGKILL to what stands on the disk: nothing is saved."""

    draw = Trainer._draw

    def dies(self: Trainer, batches: Any) -> Any:
        if drawn and drawn[-1] == killed_in:
            raise Killed
        return draw(self, batches)

    monkeypatch.setattr(Trainer, "_draw", dies)
    with pytest.raises(Killed):
        train(tmp_path / "killed", "health.rollback=2", *FEW)
    monkeypatch.setattr(Trainer, "_draw", draw)
    assert updates_saved(tmp_path / "killed") == [3]
    assert train(tmp_path / "killed", "health.rollback=2", *FEW) == 0
    assert_same_run(straight, tmp_path / "killed")
    runs = (straight, tmp_path / "killed")
    told = [[text for name, text in events(run) if name == "rollback"] for run in runs]
    assert told[0] == told[1]


def test_trouble_again_skips_further_and_too_often_stops_with_code_4(
    tmp_path: Path, train: Train, poisoned: tuple[set[int], list[int]]
) -> None:
    bad, drawn = poisoned
    bad |= {4, 5, 7, 8, 10}
    assert train(tmp_path / "twice", "health.rollback=1", "health.max_rollbacks=9", *FEW) == 0
    # 4 is bad: back to update 3, on with 5; that is bad as update 4: on with 6. 7 as update 5: back, 8 as update 4 …
    assert drawn == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    state = json.loads((tmp_path / "twice/checkpoints/step-00000009/train/state.json").read_bytes())
    assert state["rollbacks"] == 5
    assert state["went_back_to"] == [3] * 5
    assert state["position"] == 17
    kept = [path.stem.removeprefix("update-0000000") for path in (tmp_path / "twice/masked_batches").iterdir()]
    assert sorted(kept) == ["4-1", "4-3", "5", "5-2", "5-4"]

    assert train(tmp_path / "often", "health.rollback=1", "health.max_rollbacks=2", *FEW) == 4
    assert [name for name, _ in events(tmp_path / "often")][-2:] == ["stopped", "ended"]
    assert "after 2 rollbacks" in dict(events(tmp_path / "often"))["stopped"]


def test_without_a_checkpoint_before_it_the_run_goes_on(
    tmp_path: Path, train: Train, poisoned: tuple[set[int], list[int]]
) -> None:
    bad, drawn = poisoned
    bad |= {1, 2}
    assert train(tmp_path, "health.rollback=1", *FEW) == 0
    assert drawn == list(range(9))
    told = [text for name, text in events(tmp_path) if name == "not rolled back"]
    assert told == ["no checkpoint is from before update 2, where the trouble began"]
    assert updates_saved(tmp_path) == [6, 9]  # none in the midst of the trouble
    assert [line["applied"] for line in lines(tmp_path)] == [True, False, False, *[True] * 6]


def test_a_loss_that_leaps_and_stays_high_is_a_trouble(
    tmp_path: Path, train: Train, poisoned: tuple[set[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, drawn = poisoned
    to_host = trainer_module.StepResult.to_host

    def leaps(self: Any) -> dict[str, float]:
        return to_host(self) | ({"loss": 1000.0} if 12 <= drawn[-1] < 14 else {})

    monkeypatch.setattr(trainer_module.StepResult, "to_host", leaps)
    assert train(tmp_path, "health.rollback=2", "train.updates=14", *FEW) == 0
    assert drawn == list(range(16))
    assert "leaves out the 2 batches" in dict(events(tmp_path))["rollback"]
    assert max(float(str(line["loss"])) for line in lines(tmp_path)) < 1000


def test_on_alarm_stop_ends_with_code_4_and_the_same_command_goes_on(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_host = trainer_module.StepResult.to_host
    monkeypatch.setattr(trainer_module.StepResult, "to_host", lambda self: to_host(self) | {"patch_similarity": 1.0})
    health = ("health.grace_updates=2", "health.patience_updates=2")
    assert train(tmp_path / "told", *health, *FEW) == 0
    stop = ("health.on_alarm=stop", "health.stop_at=[patches_alike]")
    assert train(tmp_path / "run", *stop, *health, *FEW) == 4
    assert updates_saved(tmp_path / "run") == [3, 4]
    found = read_lines(tmp_path / "run/events.jsonl")
    begun = [event for event in found if event.get("alarm") == "patches_alike"]
    assert [(event["update"], event["event"]) for event in begun] == [(4, "alarm")]
    assert "objective.gram.weight" in begun[0]["text"]
    assert "the alarm patches_alike began" in next(event["text"] for event in found if event["event"] == "stopped")
    assert train(tmp_path / "run", *stop, *health, *FEW) == 0
    assert_same_run(tmp_path / "told", tmp_path / "run")
    again = read_lines(tmp_path / "run/events.jsonl")
    assert [event for event in again if event.get("alarm") == "patches_alike"] == begun


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no alarm 'rank_lo'; did you mean 'rank_low'"):
        validate({"health": {"stop_at": ["rank_lo"]}})
    with pytest.raises(ConfigError, match=r"rollback 11 never comes"):
        validate({"health": {"rollback": 11}})
    with pytest.raises(ConfigError, match=r"keep_last is 1: a signal"):
        validate({"health": {"rollback": 2}, "checkpoint": {"keep_last": 1}})
    assert validate({}).health.rollback is None


def test_a_guard_stops_at_the_alarms_that_were_named() -> None:
    for named, stops in (("rank_low", False), ("patches_alike", True)):
        health = {"on_alarm": "stop", "stop_at": [named], "grace_updates": 0, "patience_updates": 2}
        guard = Guard(validate({"health": health}))
        for update in (1, 2):
            guard.look({"update": update, "applied": True, "clipped": False, "patch_similarity": 1.0})
        assert (guard.stops is not None) == stops
        assert guard.alarms.on == ("patches_alike",)


def test_a_reason_to_stop_outlives_the_line_after_it() -> None:
    # On a GPU an update that evaluates or saves writes two lines before the loop asks the guard.
    health = {"on_alarm": "stop", "stop_at": ["patches_alike"], "grace_updates": 0, "patience_updates": 2}
    guard = Guard(validate({"health": health}))
    for update in (1, 2, 3):
        guard.look({"update": update, "applied": True, "clipped": False, "patch_similarity": 1.0})
    assert guard.stops is not None


def test_back_at_a_checkpoint_of_before_the_alarms_all_begins_afresh() -> None:
    guard = Guard(validate({"health": {"rollback": 2}}))
    for update in range(1, 30):
        guard.look({"update": update, "applied": True, "clipped": True, "loss": 1.0 if update < 28 else 99.0})
    assert guard.wants_back
    assert guard.went_back({"masked_in_a_row": 0}, 20) == 9
    assert (guard.skipped, guard.rollbacks, guard.alarms.on, guard.is_troubled) == (9, 1, (), False)
    line = {"update": 21, "applied": True, "clipped": False, "loss": 1.0}
    assert guard.look(line) == []
    assert line["clipped_updates"] == 0


def test_a_guard_without_rollback_wants_none() -> None:
    guard = Guard(validate({}))
    for update in range(1, 9):
        said = guard.look({"update": update, "applied": False, "clipped": False, "loss": None})
        assert [one.event for one in said] == ["masked"]
        assert not guard.wants_back
        assert not guard.is_troubled
    assert guard.stops is None


def test_checkpoints_before_and_after(tmp_path: Path, train: Train) -> None:
    assert train(tmp_path, "checkpoint.every=2", "train.updates=8", *FEW) == 0
    root = tmp_path / "checkpoints"
    found = checkpoint_before(root, 7)
    assert found is not None
    assert found.update == 6
    model = root / "step-00000006/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    found = checkpoint_before(root, 7)
    assert found is not None
    assert found.update == 4
    assert (root / "step-00000006.damaged").is_dir()
    assert checkpoint_before(root, 2) is None
    assert remove_after(root, 2) == [8, 4]
    assert [folder.name for folder in list_checkpoints(root)] == ["step-00000002"]
    set_aside(root / "step-00000002")
    assert checkpoint_before(root, 9) is None
