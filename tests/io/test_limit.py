"""A limit of windows: a keyed choice, true neighbours, exact epochs over what was chosen."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dinox_io
from dinox_io.limit import limited, shared
from dinox_io.window import WindowTable, table_of

TABLES = st.builds(
    lambda slices, every, edge: table_of(
        np.arange(len(slices)) * 3, np.array(slices), depth=3, step=1, edge=edge, every=every
    ),
    st.lists(st.integers(3, 40), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from(["clamp", "error"]),
)


def windows_of(table: WindowTable) -> list[tuple[int, ...]]:
    """(volume, centre, step, every) of every window."""
    numbers = np.arange(table.num_windows)
    return list(zip(*(part.tolist() for part in (*table.locate(numbers), table.every_of(numbers))), strict=True))


@settings(max_examples=200, deadline=None)
@given(table=TABLES, share=st.floats(0, 1.2), seed=st.integers(0, 2**64 - 1))
def test_a_choice_is_some_of_the_windows_as_they_are(table: WindowTable, share: float, seed: int) -> None:
    limit = max(int(table.num_windows * share), 1)
    all_of_them, chosen = windows_of(table), windows_of(limited(table, limit, seed))
    assert len(chosen) == len(set(chosen)) == min(limit, len(all_of_them))
    assert chosen == [window for window in all_of_them if window in set(chosen)]  # in the table's order
    assert chosen == windows_of(limited(table, limit, seed))
    more = windows_of(limited(table, limit + 3, seed))
    assert set(chosen) <= set(more)
    assert windows_of(limited(limited(table, limit + 3, seed), limit, seed)) == [
        more[number] for number in _numbers(len(more), limit, seed)
    ]


def _numbers(count: int, limit: int, seed: int) -> list[int]:
    plain = table_of(np.zeros(1, np.int64), np.array([count]), depth=1, step=1, edge="clamp", every=1)
    return [center for _, center, _, _ in windows_of(limited(plain, limit, seed))]


@given(limit=st.integers(1, 10_000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_a_limit_is_shared_by_weight(limit: int, weights: list[float]) -> None:
    parts = shared(limit, weights)
    assert min(parts) >= 1
    assert abs(sum(parts) - limit) <= len(weights)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - max(limit * weight / sum(weights), 1)) <= 1


def test_seeds_choose_differently_and_none_is_refused() -> None:
    table = table_of(np.arange(4), np.full(4, 100), depth=3, step=1, edge="clamp", every=1)
    seen = Counter(volume for seed in range(50) for volume, *_ in windows_of(limited(table, 40, seed)))
    assert all(350 < seen[volume] < 650 for volume in range(4))  # 500 each, were it exactly even
    with pytest.raises(ValueError, match="limit is 0"):
        limited(table, 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume, write_set) -> Path:
    folder = tmp_path_factory.mktemp("limit") / "set"
    shapes = [(16, 8, 10), (3, 9, 10), (21, 8, 7), (12, 6, 6)]
    write_set(folder, [[make_volume(number, shape) for number, shape in enumerate(shapes)]])
    return folder


@pytest.mark.parametrize("mode", [{"mode": "random"}, {"mode": "runs", "run_length": 4}], ids=["random", "runs"])
def test_epochs_over_a_choice_are_exact_and_neighbours_true(folder: Path, mode: dict[str, object]) -> None:
    given = {"batch_size": 5, "depth": 3, "split": None, "seed": 3, "every": 2, "limit": 15, "threads": 2}
    with dinox_io.open_shards(folder) as shards:
        volumes = [shards.read(volume, 0, volume.shape[0]) for volume in shards.volumes]
        stream = []
        with dinox_io.Loader(shards, **(given | mode)) as loader:
            assert loader.num_windows == (15,)
            for batch in islice(loader, 9):
                for window, volume, center in zip(batch.windows, batch.volume, batch.center, strict=True):
                    near = np.clip(np.arange(center - 1, center + 2), 0, len(volumes[volume]) - 1)
                    np.testing.assert_array_equal(window, volumes[volume][near])
                    stream.append((int(volume), int(center)))
        epochs = [set(stream[begin : begin + 15]) for begin in (0, 15, 30)]
        assert len(epochs[0]) == 15
        assert epochs[0] == epochs[1] == epochs[2]
        with dinox_io.Loader(shards, **(given | mode | {"position": 4})) as loader:
            again = [
                (int(v), int(c)) for batch in islice(loader, 3) for v, c in zip(batch.volume, batch.center, strict=True)
            ]
        assert again == stream[20:35]


def test_sets_share_a_limit_and_too_small_a_one_is_refused(folder: Path) -> None:
    with dinox_io.open_shards(folder) as shards:
        sets = [(shards, 3.0), (shards, 1.0)]
        with dinox_io.Loader(sets, batch_size=4, split=None, limit=20) as loader:
            assert loader.num_windows == (15, 5)
        with pytest.raises(ValueError, match="fewer than the 8 of a batch"):
            dinox_io.Loader(shards, batch_size=8, split=None, limit=7)
