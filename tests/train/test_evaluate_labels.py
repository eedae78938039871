"""knn_label and shortcut in the lines of a run: from labels beside the set, and from what records say of the scan."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinox_io.labels import label_path, mark_of_mask, write_labels
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume
from dinox_train.fake import fake_volume
from dinox_train.metrics import read_lines

pytestmark = pytest.mark.usefixtures("tiny_preset")
Train = Callable[..., int]
SHORT = ("train.updates=2", "evaluate.every=1")
SEES = ("evaluate.windows=40", "model.layer_scale=0.5")


def brightening(number: int) -> Volume:
    """A made-up volume whose slices are the brighter, the higher they lie: any network can tell heights."""
    made = fake_volume(number)
    hu = made.hu // 4 + np.arange(-400, 400, 800 / len(made.hu), dtype=np.int16)[:, None, None]
    return replace(made, hu=hu, facts={"kernel": "BONE" if number % 3 else "SOFT"})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 volumes of two kernels, 6 to train on; slices 4 to 12 of each bear a mark of the labels `nodules`."""
    folder = tmp_path_factory.mktemp("labelled") / "shards"
    folder.mkdir()
    volumes = [brightening(n) for n in range(8)]
    writer = ShardWriter(folder / "shard-000000.tar", config_digest="test")
    for volume in volumes:
        writer.add(encode_volume(volume))
    manifest = build_manifest(
        [writer.finish()],
        sides={volume.id: "val" if n in (3, 7) else "train" for n, volume in enumerate(volumes)},
        options={},
        rejected_by_code={},
        config_digest="test",
        leaks=[],
        packer="test",
        sources={"files": 0, "bytes": 0},
        previous=None,
    )
    commit_set(folder, manifest)
    marks = [
        mark_of_mask(
            np.ones((9, 2, 2), bool),
            z_mm=volume.z_positions_mm[4:13],
            corner=(100, 100),
            series=volume.series,
            label="nodule",
            reader="phantom",
            target=1,
            ratings={},
        )
        for volume in volumes
    ]
    write_labels(label_path(folder, "nodules"), marks)
    write_labels(label_path(folder, "none"), [])
    return folder


def test_a_run_with_labels_has_knn_label_and_shortcut(tmp_path: Path, train: Train, labelled: Path) -> None:
    assert train(tmp_path, f"data.shards={labelled}", "evaluate.labels=nodules", *SEES, *SHORT) == 0
    for line in read_lines(tmp_path / "metrics.jsonl"):
        assert 0.0 <= line["knn_label"] <= 1.0
        assert line["knn_label"] > 0.6
        assert line["shortcut_name"] == "kernel"
        assert line["shortcut_chance"] == pytest.approx(2 / 3, abs=0.1)
        expected = (line["shortcut_accuracy"] - line["shortcut_chance"]) / (1 - line["shortcut_chance"])
        assert line["shortcut"] == pytest.approx(expected)
        assert math.isfinite(line["knn_z"])


def test_labels_without_marks_are_null_and_missing_ones_refused(
    tmp_path: Path, train: Train, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "none", f"data.shards={labelled}", "evaluate.labels=none", *SHORT) == 0
    assert [line["knn_label"] for line in read_lines(tmp_path / "none/metrics.jsonl")] == [None, None]
    assert train(tmp_path / "missing", f"data.shards={labelled}", "evaluate.labels=nodule", *SHORT) == 2
    assert "evaluate.labels: " in capsys.readouterr().err


def test_without_labels_or_facts_all_is_null(tmp_path: Path, train: Train, small_set: Path) -> None:
    assert train(tmp_path, *SHORT) == 0
    last = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert last["knn_z"] is not None
    names = ("knn_label", "shortcut", "shortcut_name", "shortcut_accuracy", "shortcut_chance")
    assert [last[name] for name in names] == [None] * 5
