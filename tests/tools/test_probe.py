"""probe.py on a small set with planted findings and a checkpoint of a real run: tables, refusals, the test side."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import probe
import pytest
import torch
from inference.network import network_of
from inference.scan import scans_of_set
from PIL import Image
from probing import dense, protocol
from probing.bootstrap import DIGITS
from probing.crossfit import splits
from probing.dense import Patches, Slice, dense_table
from probing.encoders import network_encoder, statistics_encoder
from probing.features import item_features
from probing.tasks import Item

import dinox_model
from dinox_io import open_shards
from dinox_io.labels import label_path, mark_of_mask, write_labels
from dinox_io.volume import Volume
from dinox_train.checkpoint import list_checkpoints
from tests.io.conftest import MakeVolume, WriteSet, make_volume, write_set  # noqa: F401 (fixtures)
from tests.model.foreign_weights import SMALL, perturbed
from tests.train.conftest import small_config, tiny_preset  # noqa: F401 (fixtures)

SIDE, DEPTH = 48, 6
SIDES = {**dict.fromkeys(range(6), "train"), **dict.fromkeys(range(6, 14), "val"), 14: "test", 15: "test", 16: "test"}


def disc(row: int, column: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def planted(volume: Volume, number: int) -> tuple[Volume, list[Any]]:
    """A volume with a bright and a dim disc on two slices each, and their marks."""
    random = np.random.default_rng(number)
    hu, marks = volume.hu.copy(), []
    for target, (first, bright) in enumerate([(1, True), (3, False)]):
        mask = disc(*random.integers(10, SIDE - 10, 2).tolist(), random.uniform(4, 7))
        hu[first : first + 2, mask] = 300 if bright else -250
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        z_mm, corner = volume.z_positions_mm[first : first + 2], (int(rows[0]), int(columns[0]))
        ratings = {"texture": 5.0 if bright else 1.0, "coin": float(random.integers(2))}
        about = {"series": volume.series, "label": "nodule", "reader": "r", "target": 10 * number + target}
        marks.append(mark_of_mask(np.stack([cut, cut]), z_mm=z_mm, corner=corner, ratings=ratings, **about))
    return dataclasses.replace(volume, hu=hu), marks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume: MakeVolume, write_set: WriteSet) -> Path:  # noqa: F811
    """A set of 17 patients with labels."""
    volumes, marks = [], []
    for number in SIDES:
        volume, own = planted(make_volume(number, (DEPTH, SIDE, SIDE)), number)
        volumes.append(volume)
        marks += own
    path = tmp_path_factory.mktemp("probed") / "set"
    write_set(path, [volumes], sides={volumes[number].id: side for number, side in SIDES.items()})
    write_labels(label_path(path, "planted"), marks)
    return path


@pytest.fixture(scope="module")
def run(
    folder: Path, small_config: Path, tmp_path_factory: pytest.TempPathFactory, tiny_preset: None  # noqa: F811
) -> Path:  # fmt: skip
    """A run's folder."""
    from dinox_train.__main__ import main

    path = tmp_path_factory.mktemp("runs") / "run"
    words = [f"data.shards={folder}", f"run.folder={path}", "train.updates=2", "schedule.updates=2",
             "schedule.warmup_updates=1", "evaluate.every=2", "evaluate.windows=4"]  # fmt: skip
    assert main(["--config", str(small_config), *words]) == 0
    return path


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DENSE_STEPS", 2)
    monkeypatch.setattr(protocol, "RESAMPLES", 100)
    monkeypatch.setattr(protocol, "DRAWS", 2)


def call(*words: object) -> int:
    return probe.main([str(word) for word in words])


def headline(table: dict[str, Any], encoder: str) -> float:
    return next(row["auroc_by_unit"]["value"] for row in table["rows"] if row["encoder"] == encoder and
                row["is_headline"])  # fmt: skip


# ------------------------------------------------------------------------------------------ tables


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another network's folder."""
    path = tmp_path_factory.mktemp("beside") / "another"
    dinox_model.save(perturbed(SMALL), path)
    return path


def test_tables_of_every_kind(run: Path, folder: Path, beside: Path, tmp_path: Path, capsys: Any):
    tasks = [word for name in ("presence", "type", "rating:coin:0", "dense") for word in ("--task", name)]
    words = [run, "--shards", folder, *tasks, "--beside", beside, "--device", "cpu"]
    assert call(*words, "--output", tmp_path / "one") == 0
    said = capsys.readouterr()
    page = (tmp_path / "one" / "probe.md").read_text()
    assert said.out == page
    report = json.loads((tmp_path / "one" / "probe.json").read_text())
    assert [table["task"] for table in report["tables"]] == ["presence", "type", "rating:coin:0", "dense"]
    assert report["pretraining"]["patients"] == 6
    assert report["data"]["tested_patients"] == {"never seen in pretraining": 8}
    names = ["pretrained", "random initialisation", "raw pixels", "size and intensity", "another"]
    for table in report["tables"]:
        assert list(dict.fromkeys(row["encoder"] for row in table["rows"])) == names
        assert table["counts"]["tested_patients"] == 8
    presence, kind, coin, outlines = report["tables"]
    assert presence["counts"]["tested_units"] == 8 * 3
    assert presence["counts"]["tested_positive"] == 8 * 2
    assert presence["counts"]["training_patients"] == 14
    assert headline(kind, "size and intensity") == 1.0  # bright or dim, measured
    for row in coin["rows"]:  # eight patients in five folds: too few pairs for an interval
        assert row["auroc_by_unit"]["pairs"] < protocol.PAIRS
        assert row["auroc_by_unit"]["low"] is None
    assert {row["head"] for row in outlines["rows"]} == {"linear", "upsampling"}
    assert kind["difference"]["minus"] == "random initialisation"
    for volume in open_shards(folder).volumes:
        assert not any(volume.patient in text for text in (page, json.dumps(report), said.err))


def test_equal_input_gives_equal_bytes(run: Path, folder: Path, tmp_path: Path):
    for name in ("one", "two"):
        words = [run, "--shards", folder, "--task", "type", "--task", "dense", "--device", "cpu"]
        assert call(*words, "--output", tmp_path / name) == 0
    for name in ("probe.json", "probe.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_features_are_those_of_encode(folder: Path):
    model = perturbed(SMALL)
    shards = open_shards(folder)
    scans = dict(enumerate(scans_of_set(shards, None)))
    from probing.case import labels_of, make_case

    findings = make_case(shards, labels_of(folder, None), {}, held_out=False).findings[:5]
    items = [Item(finding.volume, finding.center, finding) for finding in findings]
    encoder = network_encoder("it", network_of(model, "cpu", None))
    rows = item_features(encoder, scans, items, ("cls", "mean", "mask"), batch_size=2)
    measured = item_features(statistics_encoder(16), scans, items, ("statistics",), batch_size=2)["statistics"]
    for number, item in enumerate(items):
        finding, volume = findings[number], shards.volumes[item.volume]
        hu = shards.read_window(volume, item.center)
        expected = dinox_model.encode(model, hu[None], np.array([volume.spacing_mm]))
        assert expected.cls is not None
        np.testing.assert_allclose(rows["cls"][number], expected.cls[0], atol=1e-5)
        np.testing.assert_allclose(rows["mean"][number], expected.patches[0].mean(dim=0), atol=1e-5)
        mask, total = finding.on_slice(item.center, (SIDE, SIDE)), torch.zeros(SMALL.width)
        for y, x in np.argwhere(mask):
            total += expected.patches_as_grid[0, y // 16, x // 16]
        np.testing.assert_allclose(rows["mask"][number], total / int(mask.sum()), atol=1e-5)
        inside = hu[1][mask].astype(float)
        found = measured[number]
        assert found[0] == pytest.approx(2 * mask.sum() * 2.0 * 0.7 * 0.7)
        assert found[6:10] == pytest.approx(
            np.array([inside.mean(), inside.std(), inside.min(), inside.max()]) / 1000, abs=1e-5
        )


# ------------------------------------------------------------------------------------------ refusals


def test_seen_patients_are_refused_or_stand_apart(run: Path, folder: Path, tmp_path: Path, capsys: Any):
    newest = list_checkpoints(run / "checkpoints")[-1]
    words = [newest, "--shards", folder, "--task", "type", "--output", tmp_path / "out"]
    assert call(*words, "--side", "both") == 3
    assert "saw 6 of the 14 patients" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call(*words, "--side", "both", "--allow-seen") == 0
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [(table["tested"], table["counts"]["tested_patients"]) for table in report["tables"]] == [
        ("never seen in pretraining", 8), ("seen in pretraining", 6)
    ]  # fmt: skip
    assert "patients seen in pretraining" in (tmp_path / "out" / "probe.md").read_text()


def test_weights_without_a_record_are_refused(folder: Path, beside: Path, tmp_path: Path, capsys: Any):
    assert call(beside, "--shards", folder) == 3
    assert "no record of their training" in capsys.readouterr().err
    assert call(beside, "--shards", folder, "--task", "type", "--allow-seen", "--output", tmp_path) == 0
    assert "unknown whether pretraining saw them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--final", "--side", "val"], 2, "--side names another"),
        (["--ledger", "file"], 2, "--ledger is of --final"),
        (["--task", "malignancy"], 1, "malignancy: none of the"),
        (["--task", "nothing"], 2, "unknown"),
        (["--labels", "other"], 2, "no labels 'other'"),
        (["--beside", "nowhere"], 2, "nowhere"),
    ],
)
def test_what_cannot_be(run: Path, folder: Path, words: list[str], code: int, said: str, capsys: Any):
    try:
        found = call(run, "--shards", folder, *words)
    except SystemExit as error:
        found = error.code
    assert found == code
    assert said in capsys.readouterr().err


def test_output_in_the_set_and_a_model_that_is_not_there(run: Path, folder: Path, tmp_path: Path):
    assert call(run, "--shards", folder, "--output", folder / "labels") == 2
    assert call(tmp_path / "none", "--shards", folder) == 2
    assert call(run, "--shards", tmp_path) == 2


def test_a_damaged_checkpoint_is_left_as_it_is(run: Path, folder: Path, capsys: Any):
    newest = list_checkpoints(run / "checkpoints")[-1]
    weights = newest / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert call(newest, "--shards", folder) == 1
        assert "model.safetensors" in capsys.readouterr().err
        assert newest.is_dir()
    finally:
        weights.write_bytes(whole)


# ------------------------------------------------------------------------------------------ the test side


@pytest.fixture
def ledger(folder: Path) -> Iterator[Path]:
    path = folder.with_name("set.test-openings.jsonl")
    yield path
    path.unlink(missing_ok=True)


def test_the_test_side_is_opened_and_counted(run: Path, folder: Path, tmp_path: Path, ledger: Path, capsys: Any):
    words = [run, "--shards", folder, "--task", "type", "--output", tmp_path]
    assert call(*words) == 0
    assert json.loads((tmp_path / "probe.json").read_text())["final"] is None
    assert not ledger.exists()
    for before in range(2):
        assert call(*words, "--final") == 0
        report = json.loads((tmp_path / "probe.json").read_text())
        assert report["final"] == {"opened_before": before}
    assert f"opened {before} times before" in capsys.readouterr().err
    [table] = report["tables"]
    assert table["counts"]["tested_patients"] == 3
    assert table["counts"]["training_patients"] == 14
    assert table["counts"]["folds"] == 1
    assert len(ledger.read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------ dense, heatmaps


@pytest.mark.parametrize("planted_one", [True, False])
def test_heads_outline_what_patches_tell(planted_one: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "DENSE_STEPS", 60)
    monkeypatch.setattr(protocol, "DENSE_RATE", 0.05)
    random = np.random.default_rng(0)
    slices, values = [], []
    for number in range(30):
        mask = np.zeros((32, 30), bool)
        y, x = random.integers(0, 2, 2)
        mask[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = True
        told = torch.from_numpy(random.normal(size=(4, 6)).astype(np.float32))
        told[2 * y + x, 0] += 8.0 * planted_one
        slices.append(Slice(Item(number, 0), f"{number % 10:032x}", mask))
        values.append(told)
    everybody = {one.patient for one in slices}
    patches = Patches("told", 16, values, [(2, 2)] * 30)
    monkeypatch.setattr(dense, "HEADS", {"linear": 0})
    table = dense_table(
        slices, [patches], splits(everybody, everybody, held_out=False), tested="unseen", compare="none", seed=0,
        device="cpu",
    )  # fmt: skip
    [row] = table["rows"]
    assert table["counts"]["tested_patients"] == 10
    assert (row["dice_by_patient"]["low"] > 0.7) == planted_one
    assert planted_one or row["dice_by_patient"]["high"] < 0.6
    assert round(row["dice_by_patient"]["value"], DIGITS) == row["dice_by_patient"]["value"]


def test_heatmaps(run: Path, folder: Path, tmp_path: Path):
    words = ["heatmap", run, "--shards", folder, "--count", 5, "--seed", 1]
    for name in ("one", "two"):
        assert call(*words, "--output", tmp_path / name) == 0
    report = json.loads((tmp_path / "one" / "heatmap.json").read_text())
    assert report["findings"] == 5
    assert set(report["maps"]) == {"pretrained", "random initialisation"}
    for maps in report["maps"].values():
        assert set(maps) == {"attention", "similarity"}
        assert all(0 <= one["auroc_by_patient"]["value"] <= 1 for one in maps.values())
    with Image.open(tmp_path / "one" / "heatmap.png") as picture:
        assert np.asarray(picture).std() > 10
    for name in ("heatmap.json", "heatmap.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert call(*words, "--side", "train", "--output", tmp_path / "seen") == 3
    assert not (tmp_path / "seen").exists()
