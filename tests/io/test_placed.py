"""Marks find their slices by series and z; what finds none is counted, and never another slice."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dinox_io import ShardSet, open_shards
from dinox_io.labels import LabelError, Mark, mark_of_mask
from dinox_io.placed import join, of_set
from dinox_io.privacy import pseudonym
from tests.io.conftest import MakeVolume, WriteSet

KEY = b"a key for the tests"


@pytest.fixture
def shards(tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet) -> ShardSet:
    """Series 0, whole (z -10, -8 … 0); series 1 in two runs, 20 mm apart."""
    second = make_volume(1, run=2)
    moved = dataclasses.replace(second, z_positions_mm=tuple(z + 30.0 for z in second.z_positions_mm))
    write_set(tmp_path / "set", [[make_volume(0), make_volume(1, run=1), moved]])
    return open_shards(tmp_path / "set")


def marked(series: str, z_mm: list[float], *, corner: tuple[int, int] = (5, 6)) -> Mark:
    mask = np.zeros((len(z_mm), 2, 3), bool)
    mask[np.arange(len(z_mm)), np.arange(len(z_mm)) % 2] = True  # slices differ: a shift would be seen
    return mark_of_mask(mask, z_mm=z_mm, corner=corner, series=series, label="nodule", reader="r", target=1, ratings={})


def by_runs(shards: ShardSet) -> dict[str, int]:
    return {volume.id[32:]: volume.index for volume in shards.volumes}


def test_slices_are_found_by_z_within_the_tolerance(shards: ShardSet):
    index = by_runs(shards)[""]
    series = shards.volumes[index].series
    mark = marked(series, [-8.04, -6.0, -3.95])
    joined = join([mark, dataclasses.replace(mark, mask=None)], shards)
    assert (joined.placed, joined.partial, joined.outside, joined.foreign) == (2, 0, 0, 0)
    whole, boxed = joined.by_volume[index]
    assert whole.slices.tolist() == boxed.slices.tolist() == [1, 2, 3]
    assert mark.mask is not None
    np.testing.assert_array_equal(whole.mask(), mark.mask.decode())
    with pytest.raises(LabelError, match="mark 1 has no mask"):
        boxed.mask()


def test_what_the_set_does_not_hold_is_counted(shards: ShardSet):
    index = by_runs(shards)[""]
    series = shards.volumes[index].series
    marks = [marked(series, z) for z in ([-12.0, -10.0, -8.0], [-7.0], [2.0, 4.0])] + [marked("other", [-8.0])]
    joined = join(marks, shards)
    assert (joined.placed, joined.partial, joined.outside, joined.foreign) == (1, 1, 2, 1)
    (part,) = joined.by_volume[index]
    assert (part.number, part.slices.tolist(), part.mask_slices.tolist()) == (0, [0, 1], [1, 2])
    np.testing.assert_array_equal(part.mask(), marks[0].mask.decode()[1:])  # type: ignore[union-attr]


def test_a_mark_goes_to_the_runs_that_hold_its_slices(shards: ShardSet):
    numbers = by_runs(shards)
    series = shards.volumes[numbers["-1"]].series
    low, high, across = [-6.0, -4.0], [24.0, 26.0], [-2.0, 0.0, 20.0]
    joined = join([marked(series, z) for z in (low, high, across)], shards)
    assert (joined.placed, joined.partial) == (3, 0)
    first = {part.number: part.slices.tolist() for part in joined.by_volume[numbers["-1"]]}
    second = {
        part.number: (part.slices.tolist(), part.mask_slices.tolist()) for part in joined.by_volume[numbers["-2"]]
    }
    assert first == {0: [2, 3], 2: [4, 5]}
    assert second == {1: ([2, 3], [0, 1]), 2: ([0], [2])}


def test_marks_of_other_images_are_refused(shards: ShardSet):
    series = shards.volumes[by_runs(shards)[""]].series
    with pytest.raises(LabelError, match=r"goes to row 16 .* 16 x 20"):
        join([marked(series, [-8.0], corner=(15, 6))], shards)
    with pytest.raises(LabelError, match="lie on one slice"):
        join([marked(series, [-8.05, -7.95])], shards)


def test_series_become_pseudonyms_and_foreign_ones_stay_away(
    tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet
):
    name = pseudonym(KEY, "series", "1.2.3")
    write_set(tmp_path / "set", [[dataclasses.replace(make_volume(0), series=name, id=name)]])
    marks = [marked("1.2.3", [-8.0]), marked(name, [-6.0]), marked("1.2.4", [-8.0])]
    chosen, foreign = of_set(marks, open_shards(tmp_path / "set"), KEY)
    assert [mark.series for mark in chosen] == [name, name]
    assert foreign == 1
    assert of_set(marks, open_shards(tmp_path / "set"), b"another key, as long")[1] == 2


def test_a_volume_of_one_slice(tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet):
    volume = make_volume(0, (1, 16, 20))
    write_set(tmp_path / "set", [[volume]])
    joined = join([marked(volume.series, [-10.0]), marked(volume.series, [-9.0])], open_shards(tmp_path / "set"))
    assert (joined.placed, joined.outside) == (1, 1)
