"""Labels of slices: where a mark's box lies, in mm, is a slice marked; nowhere else."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinox_io import open_shards
from dinox_io.labels import Mark, label_path, write_labels
from dinox_train.config import ConfigError
from dinox_train.fake import write_fake_set
from dinox_train.slice_labels import SliceLabels


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_set(tmp_path_factory.mktemp("set") / "shards", {0: "train", 1: "train"})


def mark(series: str, first_mm: float, last_mm: float) -> Mark:
    first_mm, last_mm = float(first_mm), float(last_mm)
    return Mark(
        series=series,
        z_mm=first_mm,
        center=(first_mm, 15.0, 15.0),
        box=(first_mm, 10, 10, last_mm, 20, 20),
        label="nodule",
        reader="r1",
        target=1,
        ratings={},
    )


def labels_of(folder: Path, name: str, marks: list[Mark]) -> SliceLabels:
    path = label_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_labels(path, marks)
    return SliceLabels(name, [(str(folder), open_shards(str(folder)).volumes)])


def test_slices_within_a_box_are_marked_its_ends_too(shards: Path) -> None:
    first, second = open_shards(str(shards)).volumes
    z_mm = first.z_positions_mm
    marks = [mark(first.series, z_mm[3], z_mm[5]), mark(first.series, z_mm[8] - 0.1, z_mm[8] + 0.1)]
    labels = labels_of(shards, "some", marks)
    count = first.shape[0]
    everywhere = [labels.of(np.zeros(count, int), np.full(count, volume), np.arange(count)) for volume in (0, 1)]
    assert np.flatnonzero(everywhere[0]).tolist() == [3, 4, 5, 8]
    assert not everywhere[1].any()
    assert everywhere[0].dtype == np.float32
    assert second.series != first.series


def test_a_box_between_two_slices_marks_none(shards: Path) -> None:
    first, _ = open_shards(str(shards)).volumes
    z_mm = first.z_positions_mm
    labels = labels_of(shards, "between", [mark(first.series, z_mm[3] + 0.01, z_mm[4] - 0.01)])
    count = first.shape[0]
    assert not labels.of(np.zeros(count, int), np.zeros(count, int), np.arange(count)).any()


def test_sets_are_told_apart(shards: Path) -> None:
    volumes = open_shards(str(shards)).volumes
    labels_of(shards, "both", [mark(volumes[0].series, *volumes[0].z_positions_mm[:2])])
    both = SliceLabels("both", [(str(shards), volumes[1:]), (str(shards), volumes)])
    assert both.of(np.array([0, 1]), np.array([0, 0]), np.array([0, 0])).tolist() == [0.0, 1.0]


def test_labels_that_are_missing_or_damaged_are_refused(shards: Path) -> None:
    volumes = open_shards(str(shards)).volumes
    with pytest.raises(ConfigError, match="no labels 'none'"):
        SliceLabels("none", [(str(shards), volumes)])
    labels_of(shards, "broken", [])
    label_path(shards, "broken").write_text("{}\n")
    with pytest.raises(ConfigError, match="broken"):
        SliceLabels("broken", [(str(shards), volumes)])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-5, 60), st.floats(0, 20)), max_size=5))
def test_a_slice_is_marked_where_any_box_holds_it(shards: Path, boxes: list[tuple[int, float, float]]) -> None:
    """Against the plain loop over slices and boxes; marks of a series that the set does not hold change nothing."""
    with open_shards(str(shards)) as opened:
        volumes = list(opened.volumes)
    marks = [mark(volumes[number].series, low, low + length) for number, low, length in boxes]
    labels = labels_of(shards, "random", [*marks, mark("f" * 32, 0.0, 1000.0)])
    for number, volume in enumerate(volumes):
        expected = [
            float(any(of == number and low - 1e-3 <= z <= low + length + 1e-3 for of, low, length in boxes))
            for z in volume.z_positions_mm.tolist()
        ]
        count = volume.shape[0]
        assert labels.of(np.zeros(count, int), np.full(count, number), np.arange(count)).tolist() == expected
    assert labels.of(*(np.zeros(0, int),) * 3).shape == (0,)
