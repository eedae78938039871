"""Labels by SeriesInstanceUID come into a set under its pseudonyms: the phantom's nodules are bright in the shards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import label_series
import make_phantom

from dinox_io import open_shards
from dinox_io.labels import read_labels, write_labels
from dinox_io.output import OutputFolder
from dinox_io.placed import join

TEXTURE_BRIGHTER_HU = {5: 400, 1: 120}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "out"
    assert make_phantom.main([str(folder), "--patients", "2", "--slices", "10", "--size", "64", "--seed", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def shards(phantom: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The phantom packed under a key of its own."""
    folder = tmp_path_factory.mktemp("set") / "shards"
    tool, environment = repository / "tools" / "pack_shards.py", {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, tool, phantom / "dicom", "--output", folder, "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 3), done.stderr
    return folder


def test_the_phantoms_masks_lie_on_its_nodules(phantom: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    labels = phantom / "labels" / "nodules.jsonl"
    assert label_series.main([str(labels), str(shards)]) == 0
    marks = read_labels(shards / "labels" / "nodules.jsonl")
    before = read_labels(labels)
    assert len(marks) == len(before) >= 2
    assert f"{len(marks)} lie wholly on slices of the set, 0 in part, 0 on none" in capsys.readouterr().out
    text = (shards / "labels" / "nodules.jsonl").read_text()
    assert not any(mark.series in text for mark in before)
    with open_shards(shards) as opened:
        joined = join(marks, opened)
        assert joined.placed == len(marks)
        for index, parts in joined.by_volume.items():
            for part in parts:
                _, y, x, _, y_end, x_end = part.mark.box
                hu = opened.read(index, int(part.slices[0]), int(part.slices[-1]) + 1)
                around = hu[:, max(y - 3, 0) : y_end + 3, max(x - 3, 0) : x_end + 3]
                inside = hu[:, y:y_end, x:x_end][part.mask()].mean()
                assert inside > np.percentile(around, 20) + TEXTURE_BRIGHTER_HU[int(part.mark.ratings["texture"])]


def test_marks_of_other_series_are_left_out(phantom: Path, shards: Path, tmp_path: Path):
    marks = read_labels(phantom / "labels" / "nodules.jsonl")
    foreign = [type(mark)(**{**vars(mark), "series": "1.2.3.4.5"}) for mark in marks]
    write_labels(tmp_path / "mixed.jsonl", marks + foreign)
    assert label_series.main([str(tmp_path / "mixed.jsonl"), str(shards), "--name", "chosen"]) == 0
    assert len(read_labels(shards / "labels" / "chosen.jsonl")) == len(marks)


def test_faults_are_one_message_and_write_nothing(
    phantom: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    labels = phantom / "labels" / "nodules.jsonl"
    foreign = [type(mark)(**{**vars(mark), "series": "1.2.3.4.5"}) for mark in read_labels(labels)]
    write_labels(tmp_path / "foreign.jsonl", foreign)
    (tmp_path / "broken.jsonl").write_text("{}\n")
    (tmp_path / "key").write_bytes(b"another key of some length")
    (tmp_path / "empty.jsonl").write_text("")
    for code, options, problem in (
        (1, [tmp_path / "foreign.jsonl", shards], "its series are not in the set"),
        (1, [tmp_path / "broken.jsonl", shards], "broken.jsonl: line 1: a mark misses"),
        (1, [tmp_path / "empty.jsonl", shards], "holds no marks"),
        (2, [tmp_path / "none.jsonl", shards], "there is no file"),
        (2, [tmp_path, shards], "is a folder: name the file in it"),
        (2, [shards, labels], "the other way round"),
        (2, [labels, labels], "is a file, no folder"),
        (2, [labels, tmp_path / "none"], "there is no folder"),
        (2, [labels, tmp_path], "not a set of shards"),
        (2, [labels, shards, "--key-file", tmp_path / "key"], "not the one that the set was packed with"),
        (2, [labels, shards, "--key-file", tmp_path], "no key to read"),
    ):
        assert label_series.main([*map(str, options), "--name", "no"]) == code
        message = capsys.readouterr().err
        assert message.startswith("label_series: ")
        assert message.count("\n") == 1
        assert "Errno" not in message
        assert problem in message
    assert not (shards / "labels" / "no.jsonl").exists()


def test_a_set_that_is_being_changed_is_left_alone(phantom: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    """A removal at work could otherwise take a patient out while their marks come in."""
    with OutputFolder(shards).locked():
        assert label_series.main([str(phantom / "labels" / "nodules.jsonl"), str(shards), "--name", "no"]) == 1
    assert "another packer is at work" in capsys.readouterr().err
    assert not (shards / "labels" / "no.jsonl").exists()


def test_a_copy_without_its_private_folder_takes_labels_by_key_file(phantom: Path, shards: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("private", "labels"))
    key = shards / "private" / "key"
    assert label_series.main([str(phantom / "labels" / "nodules.jsonl"), str(copy), "--key-file", str(key)]) == 0
    assert (copy / "labels" / "nodules.jsonl").is_file()
    assert not (copy / "private").exists()


def test_labels_that_are_replaced_are_counted_and_kept_from_an_empty_file(
    phantom: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    marks = read_labels(phantom / "labels" / "nodules.jsonl")
    write_labels(tmp_path / "one.jsonl", marks[:1])
    write_labels(tmp_path / "all.jsonl", marks)
    (tmp_path / "empty.jsonl").write_text("")

    def code(name: str) -> int:
        return label_series.main([str(tmp_path / f"{name}.jsonl"), str(shards), "--name", "grown"])

    assert code("one") == 0
    assert "1 marks written to" in capsys.readouterr().out
    assert code("all") == 0
    assert f"replaced 1 marks by {len(marks)} in" in capsys.readouterr().out
    assert code("empty") == 1
    assert len(read_labels(shards / "labels" / "grown.jsonl")) == len(marks)
