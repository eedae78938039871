"""Each objective at each precision, three updates from the command line on made-up data, with every term on."""

from pathlib import Path

import pytest

import dinox_model
from dinox_io import open_shards
from dinox_io.labels import Mark, label_path, write_labels
from dinox_train.__main__ import main
from dinox_train.evaluate import Evaluator
from dinox_train.fake import write_fake_set
from dinox_train.metrics import read_lines

TINY = """
device: cpu
model: {preset: vit_ti, layer_scale: 0.1, drop_path: 0.2, rope_rescale: 1.5, untied_cls_norm: true}
views: {global_size: 32, local_size: 16, num_local: 2, noise_probability: 0.5}
objective:
  prototypes: 16
  head_hidden: 32
  head_bottleneck: 16
  gram: {weight: 1.0, start: 1, size: 64, max_patches: 3, negatives: clamp_both}
optimizer: {learning_rate: 1.0e-3, last_layer_frozen_updates: 1}
data: {step_mm: 4.0, threads: 1}
train: {updates: 3, batch_size: 4, accumulation: 2}
evaluate: {every: 3, windows: 2, neighbours: 1}
log: {every: 1}
"""
OTHERS = ("objective.gram.weight=0",)
OBJECTIVES = {"dinov3": (), "mae": OTHERS, "classification": OTHERS}
PRECISIONS = ("fp32", "bf16", "bf16_weights")

pytestmark = pytest.mark.usefixtures("tiny_preset")


@pytest.fixture(scope="module")
def marked_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes, one to train on and one to validate on; some slices of both bear a mark."""
    folder = write_fake_set(tmp_path_factory.mktemp("set") / "shards", {0: "train", 1: "val"})
    marks = []
    with open_shards(folder) as shards:
        for volume in shards.volumes:
            low, middle, high = (float(volume.z_positions_mm[index]) for index in (3, 5, 12))
            marks.append(
                Mark(
                    series=volume.series,
                    z_mm=middle,
                    center=(middle, 15.0, 15.0),
                    box=(low, 10, 10, high, 20, 20),
                    label="nodule",
                    reader="r1",
                    target=1,
                    ratings={},
                )
            )
    path = label_path(folder, "marks")
    path.parent.mkdir()
    write_labels(path, marks)
    return folder


def train(folder: Path, shards: Path, *words: str) -> int:
    file = folder.with_suffix(".yaml")
    file.write_text(TINY)
    return main(["--config", str(file), f"data.shards={shards}", f"run.folder={folder}", *words])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_at_every_precision(tmp_path: Path, marked_set: Path, name: str, precision: str) -> None:
    folder = tmp_path / "run"
    words = (f"objective.name={name}", f"precision={precision}", *OBJECTIVES[name])
    assert train(folder, marked_set, *words, f"model.scale_conditioning={str(name != 'mae').lower()}") == 0
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert all(line["applied"] and line["loss"] is not None for line in lines)
    assert lines[-1]["loss_val"] is not None
    terms = ("dino", "ibot", "koleo", "gram") if name == "dinov3" else (name,)
    assert all(lines[-1][f"loss_{term}"] is not None for term in terms)
    said = (folder / "train.log").read_text()
    assert f"precision: {precision} asserted, forward and backward" in said
    assert ("Gram anchoring, from update 2" in said) == (name == "dinov3")
    model = dinox_model.load(folder / "checkpoints/step-00000003")
    assert (model.preprocess.depth, model.preprocess.step, model.preprocess.step_mm) == (3, None, 4.0)


def test_a_single_window_to_validate_has_no_loss_with_koleo_and_one_without(
    tmp_path: Path, marked_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "_count", lambda self, side: 1 if side == "val" else 4)
    words = ("train.updates=1", "evaluate.every=1", "objective.gram.weight=0")
    assert train(tmp_path / "with", marked_set, *words) == 0
    assert read_lines(tmp_path / "with/metrics.jsonl")[0]["loss_val"] is None
    assert train(tmp_path / "without", marked_set, *words, "objective.koleo.weight=0") == 0
    assert read_lines(tmp_path / "without/metrics.jsonl")[0]["loss_val"] is not None
