"""Several ranks on one set in a bucket, by the store's own log: nothing is listed, and nothing asked for twice."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dinox_io import Loader, ShardError, cloud, index, open_shards, shardset
from dinox_io.shardset import ShardSet
from dinox_train.data import open_dataset
from dinox_train.sections import DataSection
from tests.io.unreliable_store import PLACE, Asked, UnreliableStore, fail

SHARDS, VOLUMES = 4, 10
SHAPES = [(8, 64, 60), (6, 64, 60), (10, 64, 60)]
"""Large enough that a volume's members lie apart."""


@pytest.fixture(scope="module")
def four_shards(tmp_path_factory: pytest.TempPathFactory, make_volume: Callable, write_set: Callable) -> Path:
    """A set of 4 shards, 10 volumes and 80 slices that grew once."""
    folder = tmp_path_factory.mktemp("ranks") / "set"
    volumes = [make_volume(number, SHAPES[number % 3]) for number in range(VOLUMES)]
    first = write_set(folder, [volumes[:3], volumes[3:6]])
    write_set(folder, [volumes[6:8], volumes[8:]], previous=first)
    return folder


@pytest.fixture
def there(store: UnreliableStore, four_shards: Path, upload: Callable[..., None]) -> UnreliableStore:
    """The store with that set at PLACE, and nothing asked yet."""
    upload(four_shards)
    return store


def opened_by(ranks: int) -> list[ShardSet]:
    """The set as that many ranks open it at once."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: open_shards(PLACE, share=(rank, ranks)), range(ranks)))


def counts(asked: list[Asked]) -> Counter[str]:
    """How often each object was asked for."""
    return Counter(one.name for one in asked)


# --- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_opening_asks_two_more_of_each_further_rank(there: UnreliableStore, ranks: int) -> None:
    sets = opened_by(ranks)
    of_name = counts(there.asked)
    assert (of_name.pop("manifest.json"), of_name.pop("index.msgpack")) == (ranks, ranks)
    assert sum(of_name.values()) == SHARDS + VOLUMES, "each head and each volume is looked into by one rank"
    assert there.listed == 0
    assert {one.method for one in there.asked} == {"GET"}
    of_shards = [one for one in there.asked if one.name.startswith("shard")]
    assert len(set(of_shards)) == len(of_shards), "nothing is asked twice"
    assert {one.digest for one in sets} == {sets[0].digest}
    for one in sets:
        for record in one.volumes:
            assert one.read(record, 0, record.shape[0])[:, 0, 0].tolist() == list(range(record.shape[0]))


def test_a_share_finds_what_is_wrong_in_it(
    store: UnreliableStore,
    four_shards: Path,
    upload: Callable[..., None],
    tmp_path: Path,
) -> None:
    """A shard that was edited is found by the rank whose share it is, the others by what they read of it."""
    folder = tmp_path / "set"
    shutil.copytree(four_shards, folder)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b'"B30f"', b'"B31f"'))
    upload(folder)
    with pytest.raises(ShardError, match=r"shard-000001\.tar.*KEY\.json is not the one that was packed"):
        open_shards(PLACE, share=(1, 2))
    with pytest.raises(ShardError, match=r"KEY\.json is not the one that was packed"):
        open_shards(PLACE)
    open_shards(PLACE, share=(0, 2)).close()
    path.write_bytes(path.read_bytes()[:-512])
    upload(folder, "shard-000001.tar")
    with open_shards(PLACE, share=(0, 2)) as shards, pytest.raises(ShardError, match=r"has \d+ bytes where the manif"):
        [shards.read(record, 0, 1) for record in shards.volumes]


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0)])
def test_an_impossible_share(four_shards: Path, share: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the rank at least 0 and below the ranks"):
        open_shards(four_shards, share=share)


def test_an_index_that_one_of_several_ranks_finds_wrong(four_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it is rebuilt; of several ranks the others would go on with it."""
    real = index.load_index

    def wrong(*arguments: object) -> index.SetIndex:
        read = real(*arguments)  # type: ignore[arg-type]
        read.checksum = read.checksum ^ 1
        return read

    monkeypatch.setattr(shardset, "load_index", wrong)
    with pytest.raises(ShardError, match=r"^index\.msgpack: volume \w+: is not what the shard says"):
        open_shards(four_shards, share=(0, 2))
    with pytest.warns(UserWarning, match="rebuilt"), open_shards(four_shards) as shards:
        assert shards.read(0, 0, 1).shape[0] == 1


def test_a_run_that_began_with_the_smaller_set_lists_nothing(there: UnreliableStore, four_shards: Path) -> None:
    (earlier,) = (four_shards / "manifests").iterdir()
    said: list[str] = []
    data = DataSection(shards=PLACE)
    dataset = open_dataset(data, four_shards.parent / "run", [(earlier.stem, 1.0)], said.append, share=(1, 2))
    assert len(dataset.volumes) == 6
    assert "has grown" in said[0]
    assert there.listed == 0


def test_tries_of_opening_are_bounded(there: UnreliableStore) -> None:
    there.fault = fail("shard", "500")
    with pytest.raises(ShardError, match=f"cannot be read, in {cloud.TRIES} tries"):
        open_shards(PLACE, share=(0, 2))
    assert max(Counter(there.asked).values()) == cloud.TRIES
    assert len(there.asked) <= 2 + cloud.TRIES * cloud.BucketFolder.in_flight


# --- an epoch ----------------------------------------------------------------------------------------------------


def read_by(there: UnreliableStore, shards: ShardSet, *, depth: int, rank: int, world: int) -> list[Asked]:
    """The ranges that a rank asks for in one epoch of 80 windows, ten batches of eight."""
    there.asked.clear()
    with Loader(
        shards, batch_size=8, depth=depth, mode="random", seed=2, rank=rank, world=world, threads=1, prefetch_bytes=0
    ) as loader:
        for _ in range(10):
            next(loader)
    # One thread asks in the order of the plan; what it asked ahead is of the next epoch.
    return there.asked[: 80 // world]


@pytest.mark.parametrize("world", [2, 4])
def test_an_epoch_of_several_ranks_asks_for_what_one_would(there: UnreliableStore, world: int) -> None:
    """Each window's range is asked for by one rank, and all ranks together ask for what one rank asks for."""
    with open_shards(PLACE) as shards:
        alone = Counter(read_by(there, shards, depth=3, rank=0, world=1))
        ranks = [Counter(read_by(there, shards, depth=3, rank=rank, world=world)) for rank in range(world)]
    assert sum(ranks, Counter()) == alone
    assert set(alone.values()) == {1}
    assert {one.method for one in alone} == {"GET"}


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_of_ranks_are_disjoint(there: UnreliableStore, world: int) -> None:
    """With windows of one slice: no byte twice, and together every frame of the set."""
    with open_shards(PLACE) as shards:
        asked = [one for rank in range(world) for one in read_by(there, shards, depth=1, rank=rank, world=world)]
        seen: dict[str, list[tuple[int, int]]] = {}
        for one in asked:
            start, last = map(int, one.range.removeprefix("bytes=").split("-"))
            seen.setdefault(one.name, []).append((start, last + 1))
        for ranges in seen.values():
            ranges.sort()
            assert all(stop <= begin for (_, stop), (begin, _) in pairwise(ranges))
        frame_bytes = int(shards._index.frame_bytes.sum())
        assert sum(stop - start for ranges in seen.values() for start, stop in ranges) == frame_bytes


@pytest.mark.parametrize("world", [2, 4])
def test_runs_are_read_once_too(there: UnreliableStore, world: int) -> None:
    """In mode runs, but for runs that a pass begins or ends with."""
    options = {"batch_size": 4, "mode": "runs", "run_length": 2, "seed": 2, "threads": 1, "prefetch_bytes": 0}

    def read(rank: int, ranks: int) -> Counter[Asked]:
        there.asked.clear()
        with Loader(shards, **options, rank=rank, world=ranks) as loader:
            for _ in range(40):
                next(loader)
        return Counter(there.asked)

    with open_shards(PLACE) as shards:
        alone = sum(read(0, 1).values())
        ranks = sum((read(rank, world) for rank in range(world)), Counter())
    assert sum(ranks.values()) <= 1.15 * alone


def test_threads_of_two_ranks_read_at_once(there: UnreliableStore) -> None:
    """Two loaders in one process, as two ranks of a host, give the global batch between them."""
    options = {"batch_size": 8, "mode": "random", "seed": 5, "threads": 2}
    one, two = opened_by(2)
    with open_shards(PLACE) as whole, Loader(whole, **options) as alone:
        loaders = [Loader(shards, **options, rank=rank, world=2) for rank, shards in enumerate((one, two))]
        barrier = threading.Barrier(2)

        def take(loader: Loader) -> list[np.ndarray]:
            barrier.wait(10)
            return [next(loader).images.copy() for _ in range(6)]

        with ThreadPoolExecutor(2) as pool:
            halves = list(pool.map(take, loaders))
        for loader in loaders:
            loader.close()
        for first, second in zip(*halves, strict=True):
            np.testing.assert_array_equal(np.concatenate([first, second]), next(alone).images)
