"""Slicing: a window holds exactly the slices it claims, in order, from one contiguous read, whatever is asked for."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dinox_io
from dinox_io.storage import LocalFile
from dinox_io.window import EDGES, in_slices, table_of, window_slices

SIDES = ("train", "val", "test", "none")
DEPTHS = (1, 3, 5, 9)
SHAPES = [(1, 5, 4), (2, 4, 8), (3, 8, 8), (7, 9, 6), (12, 8, 8)]


def naive(center: int, depth: int, step: int, count: int, edge: str) -> list[int]:
    """Walk one slice at a time, turning round (reflect) or standing still (clamp) at the ends."""
    found = []
    for direction in (-1, 1):
        z, heading, side = center, direction, []
        for walked in range(1, depth // 2 * step + 1):
            if not 0 <= z + heading < count:
                if edge == "error":
                    raise ValueError
                heading = -heading if edge == "reflect" else heading
            z = min(max(z + heading, 0), count - 1)
            if walked % step == 0:
                side.append(z)
        found.append(side)
    return [*reversed(found[0]), center, *found[1]]


@given(
    count=st.integers(1, 12),
    center=st.integers(0, 11),
    depth=st.sampled_from(DEPTHS),
    step=st.integers(1, 5),
    edge=st.sampled_from(EDGES),
)
def test_window_slices(count: int, center: int, depth: int, step: int, edge: str) -> None:
    if center >= count:
        with pytest.raises(IndexError, match="not in a volume"):
            window_slices(center, depth, step, count, edge)
        return
    try:
        expected = naive(center, depth, step, count, edge)
    except ValueError:
        with pytest.raises(ValueError, match="beyond"):
            window_slices(center, depth, step, count, edge)
        return
    assert window_slices(center, depth, step, count, edge).tolist() == expected


def test_refusals() -> None:
    for depth, step, edge in ((2, 1, "clamp"), (0, 1, "clamp"), (-1, 1, "clamp"), (3, 0, "clamp"), (3, 1, "wrap")):
        with pytest.raises(ValueError):
            window_slices(0, depth, step, 5, edge)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    every=st.integers(1, 4),
    depth=st.sampled_from(DEPTHS),
    step=st.integers(1, 2),
    edge=st.sampled_from(EDGES),
)
def test_table_lists_every_window_once(counts: list[int], every: int, depth: int, step: int, edge: str) -> None:
    volume = np.arange(len(counts)) * 10
    table = table_of(volume, np.array(counts), depth=depth, step=step, edge=edge, every=every)
    margin = depth // 2 * step if edge == "error" else 0
    expected = [(10 * i, z) for i, count in enumerate(counts) for z in range(margin, count - margin, every)]
    *located, steps = table.locate(np.arange(table.num_windows))
    assert (steps == step).all()
    assert list(zip(*(column.tolist() for column in located), strict=True)) == expected
    for index, center in expected:
        window_slices(center, depth, step, counts[index // 10], edge)  # exists


def test_distances_in_mm_are_each_volumes_nearest_number_of_slices() -> None:
    spacing_mm = np.array([0.625, 1.25, 2.5, 5.0, 0.0])
    assert in_slices(2.5, spacing_mm).tolist() == [4, 2, 1, 1, 1]
    table = table_of(
        np.arange(5),
        np.full(5, 9),
        depth=3,
        step=in_slices(2.5, spacing_mm),
        edge="error",
        every=in_slices(5, spacing_mm),
    )
    assert table.first_center.tolist() == [4, 2, 1, 1, 1]
    assert table.every.tolist() == [8, 4, 2, 1, 1]
    assert table.centers.tolist() == [1, 2, 4, 7, 7]
    volume, center, step = table.locate(np.arange(table.num_windows))
    assert list(zip(volume, center, step, strict=True))[:5] == [(0, 4, 4), (1, 2, 2), (1, 6, 2), (2, 1, 1), (2, 3, 1)]
    for distance_mm in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mm"):
            in_slices(distance_mm, spacing_mm)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, make_volume, write_set):
    """Open sets by edge policy, and the volumes in them by id."""
    folder: Path = tmp_path_factory.mktemp("sets") / "set"
    volumes = [make_volume(number, shape) for number, shape in enumerate(SHAPES * 4)]
    sides = {volume.id: SIDES[number // len(SHAPES)] for number, volume in enumerate(volumes)}
    write_set(folder, [volumes[:7], volumes[7:]], sides=sides)
    opened = {edge: dinox_io.open_shards(folder, edge=edge) for edge in EDGES}
    yield opened, {volume.id: volume.hu for volume in volumes}
    for shards in opened.values():
        shards.close()


@pytest.fixture(scope="module")
def reads(sets):
    """Every read of pixels that is made, as (start, stop)."""
    made: list[tuple[int, int]] = []
    real = LocalFile.read_into

    def counted(file: LocalFile, start: int, buffer: memoryview) -> None:
        made.append((start, start + len(buffer)))
        real(file, start, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFile, "read_into", counted)
        yield made


@given(
    number=st.integers(0, len(SHAPES) * 4 - 1),
    center=st.integers(0, 11),
    depth=st.sampled_from(DEPTHS),
    step=st.integers(1, 5),
    edge=st.sampled_from(EDGES),
)
def test_read_window(sets, reads, number: int, center: int, depth: int, step: int, edge: str) -> None:
    opened, pixels = sets
    shards = opened[edge]
    record = shards.volumes[number]
    center %= record.shape[0]
    try:
        slices = window_slices(center, depth, step, record.shape[0], edge)
    except ValueError:
        with pytest.raises(ValueError, match="beyond"):
            shards.read_window(record, center, depth, step)
        return
    reads.clear()
    window = shards.read_window(record, center, depth, step)
    np.testing.assert_array_equal(window, pixels[record.id][slices])
    assert window.dtype == np.int16
    assert window[:, 0, 0].tolist() == slices.tolist()  # the slices themselves say their number
    assert len(reads) == 1


@given(number=st.integers(0, len(SHAPES) * 4 - 1), bounds=st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_read(sets, reads, number: int, bounds: tuple[int, int]) -> None:
    opened, pixels = sets
    record = opened["clamp"].volumes[number]
    start, stop = bounds
    if not start < stop <= record.shape[0]:
        with pytest.raises(IndexError, match="not in volume"):
            opened["clamp"].read(record, start, stop)
        return
    reads.clear()
    np.testing.assert_array_equal(opened["clamp"].read(record, start, stop), pixels[record.id][start:stop])
    assert len(reads) == 1


@given(
    split=st.sampled_from([*SIDES, None]),
    every=st.integers(1, 4),
    depth=st.sampled_from((1, 3, 5)),
    step=st.integers(1, 2),
    edge=st.sampled_from(EDGES),
    size=st.integers(1, 9),
)
def test_windows_of_a_side(
    sets, reads, split: str | None, every: int, depth: int, step: int, edge: str, size: int
) -> None:
    opened, pixels = sets
    shards, expected = opened[edge], []
    for record in shards.volumes:
        for center in range(record.shape[0]) if split in (None, record.split) else ():
            try:
                expected.append((record.index, center, window_slices(center, depth, step, record.shape[0], edge)))
            except ValueError:
                continue
    if edge == "error":  # the first window of a volume is its first that fits
        groups = [list(group) for _, group in itertools.groupby(expected, key=lambda window: window[0])]
        expected = [window for group in groups for window in group[::every]]
    else:
        expected = [window for window in expected if window[1] % every == 0]
    reads.clear()
    given_windows = 0
    for position, batch in enumerate(shards.windows(split, every=every, depth=depth, step=step, batch_size=size)):
        assert (batch.position, batch.part) == (position, 0)
        assert batch.images.shape == (len(batch), depth, 9, 8)
        for row, window in enumerate(batch.windows):
            index, center, slices = expected[given_windows]
            assert (batch.volume[row], batch.center[row]) == (index, center)
            np.testing.assert_array_equal(window, pixels[shards.volumes[index].id][slices])
            y, x = window.shape[1:]
            assert (batch.images[row, :, y:] == -1024).all()
            assert (batch.images[row, :, :, x:] == -1024).all()
            given_windows += 1
    assert given_windows == len(expected) == len(reads)
