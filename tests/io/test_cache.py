"""Slices that stay decoded: the same stream bit for bit, fewer reads, no more memory than was allowed."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import dinox_io
from dinox_io.cache import with_cache

SHAPES = [(6, 16, 20), (3, 9, 20), (11, 16, 7), (1, 4, 4), (8, 12, 12)]
ALL_BYTES = sum(2 * z * y * x for z, y, x in SHAPES)
SETTINGS = {"batch_size": 7, "seed": 3, "threads": 2, "split": None}
MODES = [{"mode": "random"}, {"mode": "runs", "run_length": 3}, {"mode": "random", "step": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume, write_set) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "set"
    write_set(folder, [[make_volume(number, shape) for number, shape in enumerate(SHAPES)]])
    return folder


def stream(folder: Path, count: int = 30, **settings) -> tuple[list, dict[str, float]]:
    with dinox_io.open_shards(folder) as shards, dinox_io.Loader(shards, **SETTINGS | settings) as loader:
        batches = [[window.tobytes() for window in batch.windows] for batch in islice(loader, count)]
        return batches, loader.counters


@pytest.mark.parametrize("filtered", [False, True], ids=["pixels", "filtered"])
@pytest.mark.parametrize("mode", MODES, ids=["random", "runs", "step 2"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_cache_changes_no_bit_and_spares_reads(folder: Path, mode: dict, share: float, filtered: bool) -> None:
    plain, without = stream(folder, filtered=filtered, **mode)
    cached, having = stream(folder, filtered=filtered, cache_bytes=int(share * ALL_BYTES), **mode)
    assert cached == plain
    assert without["cached_bytes"] == 0 < having["cached_bytes"]
    assert having["decoded_bytes"] < without["decoded_bytes"]
    if share == 1.0:
        # Two threads may meet at a slice that is not there yet, and both decode it.
        assert having["decoded_bytes"] <= 2 * ALL_BYTES
        assert having["read_bytes"] < without["read_bytes"]


def test_resumed_in_the_middle_it_is_the_same_stream(folder: Path) -> None:
    whole, _ = stream(folder, 20)
    rest, _ = stream(folder, 8, position=12, cache_bytes=ALL_BYTES)
    assert rest == whole[12:]


def test_the_budget_holds_whole_volumes_of_the_set_drawn_most(folder: Path) -> None:
    with dinox_io.open_shards(folder) as shards:
        volumes = np.arange(len(SHAPES))
        sizes = [2 * int(np.prod(volume.shape)) for volume in shards.volumes]
        budget = sizes[0] + sizes[1]
        rare, often = with_cache([shards, shards], [volumes, volumes], [1.0, 2.0], cache_bytes=budget)
        assert sum(one.nbytes for one in often._slices.values()) <= budget
        assert not rare._slices
        kept = {0, 1} if sizes[0] + sizes[1] == budget else set()
        assert kept <= set(often._slices)


def test_damage_is_found_though_slices_are_kept(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("shard-*.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 40] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(dinox_io.ShardError):
        stream(copy, cache_bytes=ALL_BYTES)


@pytest.mark.parametrize(("cache_bytes", "error"), [(-1, ValueError), (1 << 50, MemoryError)])
def test_impossible_budgets_are_refused(folder: Path, cache_bytes: int, error: type[Exception], monkeypatch) -> None:
    if error is MemoryError:
        monkeypatch.setattr("dinox_io.memory.free_memory_bytes", lambda: 100)
    with pytest.raises(error):
        stream(folder, cache_bytes=cache_bytes)
