"""finetune.py beside the frozen probe: no step changes nothing, many learn what was planted, folds stay apart."""

import copy
import json
from pathlib import Path
from typing import Any

import finetune
import numpy as np
import pytest
import torch
from inference.network import network_of
from inference.scan import scans_of_set
from probing import protocol
from probing.crossfit import Split
from probing.encoders import network_encoder
from probing.features import unit_features
from probing.tasks import Item, Task
from torch import nn
from tuning.crossfit import probe_of, tuned_scores
from tuning.recipe import Recipe, optimizer_of, tuned
from tuning.windows import Windows

from dinox_io import open_shards
from tests.io.conftest import make_volume, write_set  # noqa: F401 (fixtures)
from tests.model.foreign_weights import SMALL, perturbed
from tests.tools.test_probe import folder, run  # noqa: F401 (fixtures)
from tests.train.conftest import small_config, tiny_preset  # noqa: F401 (fixtures)

FULL = Recipe(method="full", learning_rate=5e-6, steps=20, batch_size=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RESAMPLES", 20)


def call(*words: object) -> int:
    return finetune.main([str(word) for word in words])


def test_no_step_scores_as_the_frozen_probe(run: Path, folder: Path, tmp_path: Path, capsys: Any):  # noqa: F811
    words = [run, "--shards", folder, "--method", "full", "--steps", 0, "--device", "cpu", "--output", tmp_path / "o"]
    for name, kind in (("type", "mask"), ("presence", "cls")):
        assert call(*words, "--task", name) == 0
        report = json.loads((tmp_path / "o" / "finetune.json").read_text())
        [table] = report["tables"]
        assert table["features"] == kind
        frozen, full = table["rows"]
        assert full["auroc_by_unit"] == frozen["auroc_by_unit"]
        assert full["less_frozen_by_unit"]["value"] == 0
    assert (tmp_path / "o" / "finetune.md").read_text() in capsys.readouterr().out
    assert call(*words, "--task", "dense") == 2
    with pytest.raises(SystemExit, match="2"):
        call(*words, "--layer-decay", "2")


def made_up(scans: dict[int, Any], patients: list[str]) -> tuple[Task, list[Split]]:
    """A window of each volume; positive: every other."""
    labels = np.arange(len(patients)) % 2 == 0
    items = [Item(number, scans[number].shape[0] // 2) for number in range(len(patients))]
    task = Task(name="made up", selection="all", unit="window", items=items, unit_of=np.arange(len(items)),
                labels=labels, patients=np.array(patients))  # fmt: skip
    return task, [Split(0, frozenset(patients[:12]), frozenset(patients[12:]))]


def test_tuning_learns_its_training_patients_and_reads_no_label_of_the_tested(folder: Path):  # noqa: F811
    model = perturbed(SMALL)
    with open_shards(folder) as shards:
        scans = dict(enumerate(scans_of_set(shards, None)))
        task, [part] = made_up(scans, [volume.patient for volume in shards.volumes])
        windows = Windows(task, scans, model, "cpu")
        encoder = network_encoder("frozen", network_of(copy.deepcopy(model), "cpu", "fp32"))
        frozen = unit_features(encoder, scans, task, 4)["cls"]
        before = {name: one.clone() for name, one in model.state_dict().items()}

        def scores(task: Task, recipe: Recipe, parts: list[Split]) -> np.ndarray:
            found = tuned_scores(
                model, frozen, task, windows, parts, recipe, seed=0, device="cpu", say=lambda _: None
            )  # fmt: skip
            return found.scores

        itself = [Split(0, part.train, part.train)]
        none, some = (scores(task, Recipe(**{**vars(FULL), "steps": steps}), itself) for steps in (0, 20))
        probe = probe_of(frozen[:12], task.labels[:12], task.patients[:12])
        assert np.allclose(none, probe.scores(frozen[:12]), atol=1e-4)
        sign = np.where(task.labels[:12], 1, -1)
        assert np.logaddexp(0, -sign * some).mean() < np.logaddexp(0, -sign * none).mean() - 0.001

        first = scores(task, FULL, [part])
        turned = task.labels.copy()
        turned[12:] = ~turned[12:]
        assert np.array_equal(first, scores(Task(**{**vars(task), "labels": turned}), FULL, [part]))
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_rates_fall_towards_the_input():
    model = perturbed(SMALL)
    network = tuned(model, None, FULL)
    groups = optimizer_of(network, FULL).param_groups
    scale = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    depth = len(model.blocks)
    assert scale[id(network.head.weight)] == 1
    for number, block in enumerate(model.blocks):
        assert all(scale[id(one)] == pytest.approx(0.75 ** (depth - number)) for one in block.parameters())
    assert scale[id(model.patch_embed.weight)] == pytest.approx(0.75 ** (depth + 1))


def test_adapters_alone_learn_and_begin_as_nothing():
    pytest.importorskip("peft")
    model = perturbed(SMALL)
    x, spacing = torch.zeros(2, 3, 32, 32, dtype=torch.int16), torch.ones(2, 3)
    plain = tuned(copy.deepcopy(model), None, FULL).eval().feature(x, spacing, None)
    network = tuned(copy.deepcopy(model), None, Recipe(method="lora", learning_rate=1e-2)).eval()
    assert torch.allclose(network.feature(x, spacing, None), plain, atol=1e-6)
    learning = {name for name, one in network.named_parameters() if one.requires_grad}
    assert {name for name in learning if "lora" not in name} == {"head.weight", "head.bias"}
    wrapped = {name.split(".lora_")[0].rpartition(".")[2] for name in learning if "lora" in name}
    linears = {name for name, one in model.blocks.named_modules() if isinstance(one, nn.Linear)}
    assert wrapped == {name.rpartition(".")[2] for name in linears}
    groups = optimizer_of(network, Recipe(method="lora", learning_rate=1e-2)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(learning)
    assert all(group["lr_scale"] == 1 for group in groups)


def test_without_peft_it_says_what_to_do(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any  # noqa: F811
):  # fmt: skip
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    assert call(run, "--shards", folder, "--method", "lora") == 1
    assert "dinox[hf]" in capsys.readouterr().err
