"""Runs with stages, Gram anchoring and the other objectives: the same bit for bit however they are interrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dinox_model
from dinox_io import open_shards
from dinox_io.labels import Mark, label_path, write_labels
from dinox_train.__main__ import main
from dinox_train.fake import write_fake_set
from dinox_train.metrics import VARYING, read_lines

Train = Callable[..., int]
pytestmark = pytest.mark.usefixtures("tiny_preset")

STAGED = """
device: cpu
model: {preset: vit_ti, drop_path: 0.2, rope_rescale: 1.5, untied_cls_norm: true, scale_conditioning: true}
views: {global_size: 32, local_size: 16, num_local: 1}
objective:
  prototypes: 16
  head_hidden: 32
  head_bottleneck: 16
  balance: centering
  koleo: {group: null}
  gram: {weight: 1.0, start: 2, refresh_every: 2, max_refreshes: 1, size: 64, layers: [0, -1]}
stages:
  - {updates: 3}
  - {views: {global_size: 64}, objective: {dino: {local_weight: 0.5}}, train: {accumulation: 4}}
train: {updates: 6, batch_size: 4, accumulation: 2}
checkpoint: {every: 1, keep_last: 9}
evaluate: {every: 100, windows: 4, neighbours: 3}
"""


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_set(tmp_path_factory.mktemp("set") / "shards", {0: "train", 1: "train"})


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, tiny_set: Path, tiny_preset: None) -> Callable[..., int]:
    file = tmp_path_factory.mktemp("config") / "staged.yaml"
    file.write_text(STAGED)
    return lambda folder, *more: main(["--config", str(file), f"data.shards={tiny_set}", f"run.folder={folder}", *more])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, staged: Train) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert staged(folder) == 0
    return folder


def lines(folder: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in line.items() if key not in VARYING}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def tensors(folder: Path, update: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step-{update:08d}"
    return {
        f"{file.stem}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_the_lines_tell_stages_terms_and_counts(straight: Path) -> None:
    found = lines(straight)
    assert [line["stage"] for line in found] == [1, 1, 1, 2, 2, 2]
    assert [line["loss_gram"] is not None for line in found] == [False, False, True, True, True, True]
    assert all(line[f"loss_{term}"] is not None for line in found for term in ("dino", "ibot", "koleo"))
    early, late = (2 * (side + 5) + (1 + 5) for side in (4, 16))
    assert [line["tokens"] for line in found] == [4 * n for n in (early, 2 * early, 3 * early)] + [
        4 * (3 * early + n * late) for n in (1, 2, 3)
    ]
    assert [line["images"] for line in found] == [4, 8, 12, 16, 20, 24]
    assert all(line["clipped"] in (True, False) for line in found)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, staged: Train, straight: Path) -> None:
    """Stopped within both stages and at their border."""
    for updates in (2, 3, 5):
        assert staged(tmp_path, f"train.updates={updates}", "schedule.updates=6") == 0
    assert staged(tmp_path, "schedule.updates=6") == 0
    assert lines(tmp_path) == lines(straight)
    one, other = tensors(straight, 6), tensors(tmp_path, 6)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_gram_teacher_is_the_teacher_of_its_updates_and_moves_at_no_other(straight: Path) -> None:
    saved = {update: tensors(straight, update) for update in range(1, 7)}

    def part(update: int, file: str) -> dict[str, torch.Tensor]:
        return {name.partition("/")[2]: v for name, v in saved[update].items() if name.partition("/")[0] == file}

    assert [bool(part(update, "gram_teacher")) for update in range(1, 7)] == [False, False, True, True, True, True]
    # Taken when 2 updates are done, and once more 2 later: what update 3 uses is the teacher after 2.
    for update, taken_at in ((3, 2), (4, 2), (5, 4), (6, 4)):
        gram, teacher = part(update, "gram_teacher"), part(taken_at, "model")
        assert gram.keys() == teacher.keys()
        assert all(torch.equal(gram[name], teacher[name]) for name in gram), update
    assert not torch.equal(part(4, "model")["norm.weight"], part(2, "model")["norm.weight"])


def test_the_centre_is_kept(straight: Path) -> None:
    found = tensors(straight, 6)
    assert {name for name in found if name.startswith("objective/")} == {
        "objective/dino_centre",
        "objective/ibot_centre",
    }


def mark_some_slices(shards: Path) -> None:
    volume = open_shards(str(shards)).volumes[0]
    z_mm = volume.z_positions_mm
    box = (float(z_mm[3]), 10, 10, float(z_mm[8]), 20, 20)
    mark = Mark(
        series=volume.series,
        z_mm=float(z_mm[5]),
        center=(float(z_mm[5]), 15.0, 15.0),
        box=box,
        label="nodule",
        reader="r1",
        target=1,
        ratings={},
    )
    path = label_path(shards, "marks")
    path.parent.mkdir(exist_ok=True)
    write_labels(path, [mark])


@pytest.mark.parametrize("name", ["mae", "classification"])
def test_other_objectives_run_and_resume(tmp_path: Path, train: Train, name: str) -> None:
    shards = write_fake_set(tmp_path / "shards", {0: "train", 1: "val"})
    mark_some_slices(shards)
    common = (f"data.shards={shards}", f"objective.name={name}", "evaluate.every=1", "schedule.updates=2")
    assert train(tmp_path / "straight", *common, "train.updates=2") == 0
    for updates in (1, 2):
        assert train(tmp_path / "parts", *common, f"train.updates={updates}") == 0
    found = lines(tmp_path / "straight")
    assert found == lines(tmp_path / "parts")
    assert all(line[f"loss_{name}"] == line["loss"] and line["loss_dino"] is None for line in found)
    assert found[-1]["loss_val"] is not None


def test_labels_that_are_not_there_are_refused(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "objective.name=classification", "objective.classification.labels=none") == 2
    assert "has no labels 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [("model.scale_conditioning=true",), ("model.positions=rope_mm",)], ids=str)
def test_networks_that_know_millimetres_run_evaluate_save_and_resume(
    tmp_path: Path, train: Train, shape: tuple[str, ...]
) -> None:
    common = (*shape, "model.unknown_scale=0.5", "schedule.updates=2", "evaluate.every=1")
    common += ("evaluate.windows=4", "objective.gram.weight=1.0", "objective.gram.max_patches=2")
    for folder, stops in (("straight", (2,)), ("parts", (1, 2))):
        for updates in stops:
            assert train(tmp_path / folder, *common, f"train.updates={updates}") == 0
    assert lines(tmp_path / "straight") == lines(tmp_path / "parts")
    assert all(line["loss_val"] is not None and line["applied"] for line in lines(tmp_path / "parts"))
    one, other = tensors(tmp_path / "straight", 2), tensors(tmp_path / "parts", 2)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    model = dinox_model.load(tmp_path / "parts/checkpoints/step-00000002")
    hu = torch.full((2, 3, 40, 48), -850, dtype=torch.int16)
    known = dinox_model.encode(model, hu, torch.ones(2, 3))
    unknown = model(torch.zeros(2, 3, 48, 48), mm_per_pixel=torch.full((2, 2), torch.nan))
    assert all(part.isfinite().all() for part in (known.patches, unknown.patches))
