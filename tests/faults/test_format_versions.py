"""F21: a run folder of each released format loads; one of a format that is not known is refused by its number.

tests/fixtures/run_version_1 was written by the first release: a run of 3 updates on `data.shards: fake` of a network of
one block, 16 wide, with patches of 8 pixels; its checkpoint of update 2.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dinox_model
from dinox_model import PRESETS
from dinox_train.checkpoint import CheckpointError, newest_checkpoint, open_checkpoint
from dinox_train.config import load_config
from dinox_train.learner import Learner
from dinox_train.metrics import read_lines

CLS_OF_A_RAMP = [-0.0784, 0.8725, 2.1015, 0.5405]
"""First numbers of the teacher's CLS token for an image that rises from -1 to 1."""


@pytest.fixture
def released(repository: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        small = replace(PRESETS["vit_ti"], num_layers=1, width=16, num_heads=2, mlp_hidden=16)
        patch.setitem(PRESETS, "vit_ti", small)
        yield repository / "tests/fixtures/run_version_1"


def test_version_1_loads_and_computes_the_same(released: Path) -> None:
    checkpoint, damage = newest_checkpoint(released / "checkpoints")
    assert checkpoint is not None
    assert (damage, checkpoint.update) == ([], 2)
    network = dinox_model.load(checkpoint.folder)
    with torch.inference_mode():
        cls = network(torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)).cls[0]
    assert cls[:4].tolist() == pytest.approx(CLS_OF_A_RAMP, abs=1e-3)

    learner = Learner(load_config([released / "config.yaml"]), network.preprocess, torch.device("cpu"))
    learner.restore(checkpoint)
    for name, expected in checkpoint.tensors("student").items():
        assert torch.equal(learner.tensors()["student"][name], expected), name
    assert learner.tensors()["optimizer"].keys() == checkpoint.tensors("optimizer").keys()
    assert learner.networks.gram is not None


def test_lines_of_version_1_are_read(released: Path) -> None:
    lines = read_lines(released / "metrics.jsonl")
    assert [(line["update"], line["version"]) for line in lines] == [(1, 1), (2, 1), (3, 1)]
    assert [event["event"] for event in read_lines(released / "events.jsonl")] == ["started", "ended"]


def test_another_version_is_named(released: Path, tmp_path: Path) -> None:
    lines = (released / "metrics.jsonl").read_text().replace('"version": 1', '"version": 7')
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: is of version 7; this program reads version 1"):
        read_lines(tmp_path / "metrics.jsonl")

    folder = tmp_path / "step-00000002"
    shutil.copytree(released / "checkpoints/step-00000002", folder)
    manifest = json.loads((folder / "MANIFEST.json").read_text()) | {"version": 7}
    del manifest["self"]
    text = json.dumps(manifest, sort_keys=True, indent=1)
    manifest["self"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"version 7; this program reads 'dinox-checkpoint' versions 1 and 2"):
        open_checkpoint(folder)
