import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import result
import torch
import train_step
import update_case
import update_stages
from torch.utils._python_dispatch import TorchDispatchMode
from update_case import OurUpdate, UpdateCase, UpdateError, compare, with_gram
from update_stages import ClockedObjective, StageClock, read_stages

import dinox_model
from dinox_model import ViTConfig
from dinox_train.objectives.dinov3 import DINOv3

CPU = torch.device("cpu")
TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: False)
    monkeypatch.setitem(dinox_model.PRESETS, "vit_ti", TINY)
    monkeypatch.setattr(update_case, "SLICE", 96)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case() -> UpdateCase:
    return UpdateCase(
        preset="vit_ti", batch=4, precision="fp32", device=CPU, threads=1, prototypes=32, global_size=64,
        local_size=32, num_local=3,
    )  # fmt: skip


class Products(TorchDispatchMode):
    """Counts matrix products of two matrices by the lengths of their three sides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm"):
            left, right = args[-2:]
            self.found[tuple(sorted((*left.shape, right.shape[1])))] += 1
        return func(*args, **(kwargs or {}))


def test_the_floor_has_the_updates_products(case: UpdateCase) -> None:
    ours = OurUpdate(case, DINOv3(case.settings))
    run = train_step.floor_run(case, ours.masked_patches)
    with Products() as in_floor:
        assert run() == case.batch
    with Products() as in_update:
        ours.run()
    assert not in_floor.found - in_update.found
    assert in_update.found - in_floor.found == Counter({(8, 8, 32): 1}), "the features' Gram matrix, a figure of health"


def test_the_stages_of_an_update(case: UpdateCase) -> None:
    clock = StageClock(CPU)
    objective = ClockedObjective(with_gram(case.settings, case.global_size), clock)
    found = read_stages(OurUpdate(case, objective, gram=True), clock, 2)
    expected = {
        update_stages.TEACHER, update_stages.GRAM, update_stages.STUDENT, update_stages.LOSSES, update_stages.BACKWARD,
        update_stages.CLIP, update_stages.ADAMW, update_stages.AVERAGE, update_stages.OTHER,
    }  # fmt: skip
    assert [set(one) for one in found] == [expected] * 2
    assert all(seconds > 0 for one in found for seconds in one.values())


def test_the_clock_gives_each_stage_its_own_time(case: UpdateCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves only in the networks and in the optimizer."""
    now = 0.0
    monkeypatch.setattr(update_stages.time, "perf_counter", lambda: now)
    clock = StageClock(CPU)
    update = OurUpdate(case, ClockedObjective(case.settings, clock))

    def passes(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            nonlocal now
            now += seconds

        return hook

    networks = update.networks
    networks.teacher.backbone.register_forward_hook(passes(1.0))
    networks.student.backbone.register_forward_hook(passes(2.0))
    networks.student.backbone.norm.register_full_backward_hook(passes(4.0))
    update.optimizer.register_step_pre_hook(passes(8.0))
    update.optimizer.register_step_post_hook(passes(16.0))
    (found,) = read_stages(update, clock, 1)
    spent = {stage: seconds for stage, seconds in found.items() if seconds}
    assert spent == {
        update_stages.TEACHER: 1.0,
        update_stages.STUDENT: 4.0,
        update_stages.BACKWARD: 8.0,
        update_stages.CLIP: 8.0,
        update_stages.ADAMW: 16.0,
    }


def test_updates_that_differ_are_refused(case: UpdateCase) -> None:
    def fresh() -> OurUpdate:
        return OurUpdate(case, DINOv3(case.settings))

    other = fresh()
    terms = [{name: float(value) for name, value in other.run().terms.items()} for _ in range(2)]
    assert terms[0] != terms[1]
    assert compare(case, fresh(), terms) < 1e-6
    for name in ("dino", "ibot", "koleo"):
        wrong = [terms[0], terms[1] | {name: 1.01 * terms[1][name]}]
        with pytest.raises(UpdateError, match=f"{name} of update 2"):
            compare(case, fresh(), wrong)
    still = replace(case, hyperparameters=replace(case.hyperparameters, learning_rate=0.0))
    frozen = OurUpdate(still, DINOv3(case.settings))
    with pytest.raises(UpdateError, match="change nothing"):
        compare(still, frozen, [terms[0], terms[0]])


@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
def test_what_the_peer_is_given(case: UpdateCase, tmp_path: Path, precision: str) -> None:
    """The very weights, in fp32 whatever the networks hold, under names that lead back to ours."""
    case = replace(case, precision=precision)
    ours = OurUpdate(case, DINOv3(case.settings))
    arguments = update_case.write(case, tmp_path, ours)
    masters = dict(ours.networks.student_weights.named)
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as weights:
        assert {weights[name].dtype for name in weights.files} == {np.dtype(np.float32)}
        assert sum(weights[name].size for name in weights.files) == sum(one.numel() for one in masters.values())
        for name in ("heads.dino.mlp.0.weight", "heads.ibot.last_layer.weight"):
            assert np.array_equal(weights[name], masters[name].detach().numpy())
        up = masters["backbone.blocks.1.mlp.up.weight"].detach().numpy()
        assert np.array_equal(weights["backbone.layer.1.mlp.up_proj.weight"], up)
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as batch:
        assert set(batch.files) == {"global_views", "local_views", "masks", "indices", "weights"}
        assert len(batch["indices"]) == ours.masked_patches == batch["masks"].sum()
    assert arguments["precision"] == precision
    assert arguments["numbers"]["teacher_momentum"] == case.hyperparameters.teacher_momentum


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "train_step.json"
    assert train_step.main(["--quick", "--threads", "1", "--output", str(output)]) == 0
    made = result.read(output)
    figures = {figure.name: figure for figure in made.figures}
    assert figures["ours / floor"].value > 1.0
    for name in ("update", "update with Gram anchoring"):
        shares = [figure.value for figure in made.figures if figure.name.startswith(f"{name}: ")]
        assert sum(shares) == pytest.approx(100.0)
    assert figures["Gram anchoring, in all"].value > 0
    assert [target.figure for target in made.targets] == ["ours / floor"]
    assert any("dinov3's own step was not run" in note for note in made.notes)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed here")
def test_beside_the_same_written_plainly(tmp_path: Path) -> None:
    output = tmp_path / "train_step.json"
    arguments = ["--quick", "--threads", "1", "--peers", sys.executable, "--output", str(output)]
    assert train_step.main(arguments) == 0
    assert result.read(output).conditions["largest relative difference of a term"] < 1e-4
