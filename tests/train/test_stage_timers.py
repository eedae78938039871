"""Where an update's time goes, what of the machine's best it reaches, and whether memory grows."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dinox_train.config import Config, load_config
from dinox_train.learner import Learner, preprocess_of
from dinox_train.memory_trend import MemoryTrend
from dinox_train.metrics import read_lines
from dinox_train.plan import flops_of
from dinox_train.stage_timers import STAGES, StageTimers
from dinox_train.utilisation import Utilisation


def test_stages_are_timed_apart_and_add_up() -> None:
    timers = StageTimers(torch.device("cpu"))
    for stage in ("views", "student", "views"):
        with timers(stage):
            time.sleep(0.01)
    seconds = timers.take().seconds()
    assert tuple(seconds) == STAGES
    assert seconds["views"] >= 0.02
    assert seconds["student"] >= 0.01
    assert {stage for stage, part in seconds.items() if part} == {"views", "student"}
    assert not any(timers.take().seconds().values())
    with pytest.raises(KeyError), timers("no such stage"):
        pass


@pytest.mark.gpu
def test_the_device_s_stages_are_timed_on_the_device() -> None:
    device = torch.device("cuda")
    timers, matrix = StageTimers(device), torch.randn(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    with timers("backward"):
        for _ in range(50):
            result = matrix @ matrix
    with timers("optimizer"):
        pass
    stages = timers.take()
    result.sum().item()
    seconds = stages.seconds()
    assert seconds["backward"] > 1e-3 > seconds["optimizer"]


def test_a_run_says_where_its_time_went(tmp_path: Path, train: Callable[..., int], tiny_preset: None) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.accumulation=2", "evaluate.every=100") == 0
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        stages, seconds = line["stage_s"], 4 / line["images_per_s"]
        assert set(stages) == set(STAGES)
        assert all(stages[name] > 0 for name in STAGES if name not in ("transfer", "save"))
        assert sum(stages.values()) - stages["save"] <= seconds
        assert stages["wait"] <= line["data_wait_fraction"] * seconds + 1e-9
        assert line["host_memory_bytes"] > 0
        assert line["model_flops_utilisation"] > 0
    assert [line["update"] for line in lines if line["stage_s"]["save"] > 0] == [4, 7]  # checkpoints after 3 and 6
    assert sum(sum(line["stage_s"].values()) for line in lines[3:]) > 0.1 * sum(
        4 / r["images_per_s"] for r in lines[3:]
    )


def test_utilisation_is_operations_over_time_over_peak(small_config: Path, tiny_preset: None) -> None:
    config = load_config([small_config], ["objective.gram.weight=1", "objective.gram.size=32"])
    learner = _learner(config)
    flops = flops_of(learner.config, learner.vit, learner.objective)
    seen = Utilisation(2.0)
    seen.enter(learner)
    assert seen.of(0.5, gram=True) == pytest.approx(flops.total / 0.5 / 2e12)
    assert seen.of(0.5, gram=False) < seen.of(0.5, gram=True)
    nothing_measured = Utilisation(None)
    nothing_measured.enter(learner)
    assert nothing_measured.of(0.5, gram=True) is None

    twice = _learner(load_config([small_config], ["execution.activation_checkpointing=block"]))
    assert flops_of(twice.config, twice.vit, twice.objective).of(step="recomputation") > 0
    plain, again = Utilisation(2.0), Utilisation(2.0)
    plain.enter(_learner(load_config([small_config])))
    again.enter(twice)
    assert plain.of(0.5, gram=False) == again.of(0.5, gram=False)


def _learner(config: Config) -> Learner:
    return Learner(config, preprocess_of(config, np.ones(4096, np.int64)), torch.device("cpu"))


def test_what_leaks_has_a_trend() -> None:
    still, leaks = MemoryTrend(), MemoryTrend()
    early = [leaks.add(update, 10**9 + 5000 * update) for update in range(1, 32)]
    assert early == [None] * 31
    assert leaks.add(32, 10**9 + 5000 * 32) == pytest.approx(5000)
    for update in range(1, 3000):
        flat = still.add(update, 10**9 if update > 1500 else 10**6 * update)
    assert flat == pytest.approx(0, abs=1e-3)
