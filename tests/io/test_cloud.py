"""F46: a set in a bucket gives what the folder gives, and a store that fails is told from a set that is damaged."""

import inspect
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dinox_io
from dinox_io import Loader, ShardError, cloud, open_shards, verify_set
from dinox_io.storage import read_bytes
from tests.io.unreliable_store import PLACE, UnreliableStore, fail

SHARD = "shard-000000.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume: Callable, write_set: Callable) -> Path:
    """A set of two shards that grew once, so that it has an earlier manifest."""
    folder = tmp_path_factory.mktemp("cloud") / "set"
    first = write_set(
        folder, [[make_volume(1, (8, 16, 20)), make_volume(2, (4, 16, 20))]], sides={make_volume(2).id: "val"}
    )
    write_set(folder, [[make_volume(3, (5, 24, 16))]], previous=first)
    return folder


@pytest.fixture
def placed(store: UnreliableStore, folder: Path, upload: Callable[..., None]) -> UnreliableStore:
    """The store with `folder` at PLACE."""
    upload(folder)
    return store


def take(loader: Loader, batches: int) -> None:
    for _ in range(batches):
        next(loader)


# --- the same set ------------------------------------------------------------------------------------------------


def test_the_same_set(placed: UnreliableStore, folder: Path) -> None:
    with open_shards(PLACE) as there, open_shards(folder) as here:
        assert there.manifest == here.manifest
        for mine, other in zip(there.volumes, here.volumes, strict=True):
            assert (mine.id, mine.shape, mine.orientation) == (other.id, other.shape, other.orientation)
            assert np.array_equal(there.read(mine, 0, mine.shape[0]), here.read(other, 0, other.shape[0]))
            assert np.array_equal(there.read_window(mine, 0, 5, 2), here.read_window(other, 0, 5, 2))
            assert there.facts(mine) == here.facts(other)
        assert there.verify(threads=2) == here.verify() == []
    assert {asked.method for asked in placed.asked} == {"GET", "HEAD"}, "nothing is written"


@pytest.mark.parametrize("mode", ["runs", "random"])
def test_the_same_batches(placed: UnreliableStore, folder: Path, mode: str) -> None:
    options = {"batch_size": 6, "seed": 3, "mode": mode, "run_length": 4, "threads": 4}
    with (
        open_shards(PLACE) as there,
        open_shards(folder) as here,
        Loader(there, **options) as mine,
        Loader(here, **options) as other,
    ):
        for _ in range(5):
            one, two = next(mine), next(other)
            assert np.array_equal(one.center, two.center)
            assert np.array_equal(one.images, two.images)


def test_an_earlier_manifest(placed: UnreliableStore, folder: Path) -> None:
    """Also one whose index is gone: it is rebuilt from the shards, without a word."""
    (earlier,) = (folder / "manifests").iterdir()
    with warnings.catch_warnings(), open_shards(f"{PLACE}/manifests/{earlier.name}") as there:
        warnings.simplefilter("error")
        assert [there.digest, len(there.volumes)] == [earlier.stem, 2]
        with open_shards(earlier) as here:
            assert np.array_equal(there.read(1, 1, 4), here.read(1, 1, 4))
    with open_shards(PLACE + "/manifest.json") as there:
        assert len(there.volumes) == 3


def test_without_its_index(store: UnreliableStore, folder: Path, upload: Callable[..., None]) -> None:
    upload(folder, "manifest.json", SHARD, "shard-000001.tar")
    with pytest.warns(UserWarning, match=r"index\.msgpack.*rebuilt"), open_shards(PLACE) as there:
        assert there.read(0, 0, 1).shape == (1, *there.volumes[0].shape[1:])


def test_a_run_is_one_request(placed: UnreliableStore) -> None:
    with open_shards(PLACE) as there:
        placed.asked.clear()
        there.read(_in_first_shard(there), 1, 4)
        (asked,) = placed.asked
        assert asked.method == "GET"
        assert asked.range.startswith("bytes=")


def test_several_ranges_are_in_flight(placed: UnreliableStore) -> None:
    """The proxy answers once four have met there: reads that wait for each other would never."""
    with open_shards(PLACE) as there, ThreadPoolExecutor(4) as pool:
        placed.fault = fail("shard-", "meet", times=1)
        read = list(pool.map(lambda z: there.read(0, z, z + 1), range(4)))
        placed.fault = lambda asked, before: None
        assert np.array_equal(np.concatenate(read), there.read(0, 0, 4))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_is_that_of_the_file(placed: UnreliableStore, folder: Path, data: st.DataObject) -> None:
    whole = (folder / SHARD).read_bytes()
    file = cloud.BucketFolder(PLACE).open(SHARD)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert read_bytes(file, start, stop) == whole[start:stop]


def test_reading_past_its_end(placed: UnreliableStore, folder: Path) -> None:
    file = cloud.BucketFolder(PLACE).open(SHARD)
    with pytest.raises(ShardError, match=rf"^{SHARD}: ends at byte {file.size}, 3 bytes early$"):
        file.read_into(file.size - 2, memoryview(bytearray(5)))


# --- damage ------------------------------------------------------------------------------------------------------


def test_damage_is_told_as_of_a_folder(
    store: UnreliableStore,
    folder: Path,
    upload: Callable[..., None],
    tmp_path: Path,
    write_set: Callable,
    make_volume: Callable,
) -> None:
    write_set(tmp_path / "set", [[make_volume(5)]])
    path = tmp_path / "set" / SHARD
    with open_shards(tmp_path / "set") as whole:
        frame = int(whole._index.frames(0, 2, 3)[0]) + 20
    data = bytearray(path.read_bytes())
    data[frame] ^= 1
    path.write_bytes(data)
    upload(tmp_path / "set")
    told = []
    for place in (PLACE, tmp_path / "set"):
        with open_shards(place) as shards, pytest.raises(ShardError) as caught:
            shards.read(0, 0, 4)
        told.append((str(caught.value), caught.value.file, caught.value.slice_index, verify_set(place)))
    assert told[0] == told[1]
    assert told[0][1:3] == (SHARD, 2)
    path.write_bytes(data[:-512])
    upload(tmp_path / "set")
    for place in (PLACE, tmp_path / "set"):
        with pytest.raises(ShardError, match=rf"^{SHARD}: has \d+ bytes where the manifest says \d+$"):
            open_shards(place)


def test_a_large_manifest_is_not_read(placed: UnreliableStore) -> None:
    with pytest.raises(ShardError, match=r"^manifest\.json: has more than the 100 bytes that it may have$"):
        cloud.BucketFolder(PLACE).read("manifest.json", 100)


def test_what_is_missing(store: UnreliableStore, folder: Path, upload: Callable[..., None]) -> None:
    with pytest.raises(ShardError, match=rf"^manifest\.json: there is none in {PLACE}: not a set of shards"):
        open_shards(PLACE + "/")
    upload(folder, "manifest.json", "index.msgpack", SHARD)
    with pytest.raises(ShardError, match=rf"^{PLACE}/shard-000001\.tar: there is no such object$"):
        open_shards(PLACE)
    with pytest.raises(ShardError, match=r"^manifest\.json: there is none in s3://no-such-bucket: "):
        open_shards("s3://no-such-bucket")


def test_missing_in_the_middle(placed: UnreliableStore, moto: str) -> None:
    import obstore
    from obstore.store import S3Store

    with open_shards(PLACE) as there:
        obstore.delete(S3Store("scans", endpoint=f"http://{moto}"), "sets/a b%41/" + SHARD)
        volume = there.volumes[_in_first_shard(there)]
        with pytest.raises(ShardError, match=rf"^{PLACE}/{SHARD}: volume {volume.id}: there is no such object$"):
            there.read(volume, 0, 1)


def _in_first_shard(shards: dinox_io.ShardSet) -> int:
    (ids,) = [[one["id"] for one in shard["volumes"]] for shard in shards.manifest["shards"] if shard["name"] == SHARD]
    return next(volume.index for volume in shards.volumes if volume.id == ids[0])


# --- a store that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "hang", "cut", "stall"])
def test_what_fails_four_times_is_read_all_the_same(
    placed: UnreliableStore, folder: Path, environment: pytest.MonkeyPatch, fault: str
) -> None:
    """An answer that does not come, one that breaks off, one that stops in the middle."""
    environment.setattr(cloud, "TIMEOUT_S", 0.15)
    file = cloud.BucketFolder(PLACE).open(SHARD)
    placed.fault = fail("", fault, times=cloud.TRIES - 1)
    assert read_bytes(file, 100, 3000) == (folder / SHARD).read_bytes()[100:3000]
    assert cloud.BucketFolder(PLACE).read("index.msgpack", 1 << 20) == (folder / "index.msgpack").read_bytes()


def test_a_short_answer_is_asked_for_again(placed: UnreliableStore, folder: Path) -> None:
    file = cloud.BucketFolder(PLACE).open(SHARD)
    placed.fault = fail("", "short body", times=cloud.TRIES - 1)
    assert read_bytes(file, 100, 3000) == (folder / SHARD).read_bytes()[100:3000]


def test_opening_is_tried_again_too(placed: UnreliableStore) -> None:
    placed.fault = fail("", "500", times=1)
    open_shards(PLACE).close()
    assert {asked for asked in placed.asked if placed.asked.count(asked) == 1} == set()


@pytest.mark.parametrize(
    ("fault", "reason"), [("500", "500 Internal"), ("hang", "error sending request"), ("stall", "body error")]
)
def test_tries_are_bounded(placed: UnreliableStore, environment: pytest.MonkeyPatch, fault: str, reason: str) -> None:
    environment.setattr(cloud, "TIMEOUT_S", 0.2)
    with open_shards(PLACE) as there:
        volume = _in_first_shard(there)
        placed.asked.clear()
        placed.fault = fail("shard", fault)
        begin_s = time.monotonic()
        with pytest.raises(ShardError) as caught:
            there.read(volume, 0, 2)
        assert time.monotonic() - begin_s < 10
        start, stop = placed.asked[0].range.removeprefix("bytes=").split("-")
        text = str(caught.value)
        place = f"{PLACE}/{SHARD}: volume {there.volumes[volume].id}"
        assert text.startswith(f"{place}: bytes {start} to {int(stop) + 1} cannot be read, in 5 tries (")
        assert reason in text
        assert "5ecret" not in text
        assert "\n" not in text
        assert len(placed.asked) == cloud.TRIES


def test_a_refusal_is_not_tried_again(placed: UnreliableStore) -> None:
    placed.fault = fail("manifest.json", "403")
    with pytest.raises(ShardError, match=rf"^{PLACE}/manifest\.json: it cannot be read \(.*403 Forbidden"):
        open_shards(PLACE)
    assert len(placed.asked) == 1


def test_an_outage_at_opening_is_not_taken_for_a_bad_index(placed: UnreliableStore) -> None:
    placed.fault = fail("index.msgpack", "500")
    with pytest.raises(ShardError, match=rf"^{PLACE}/index\.msgpack: it cannot be read"):
        open_shards(PLACE)
    placed.fault = fail("shard-000001.tar", "500")
    with pytest.raises(ShardError, match=rf"^{PLACE}/shard-000001\.tar: bytes 0 to \d+ cannot be read"):
        open_shards(PLACE)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("short range", ".*got 0..300"),
        ("short body", "only 300 bytes came"),
        ("long body", "more than 600 bytes came"),
        ("whole", ".*non-partial"),
    ],
)
def test_a_wrong_answer_is_not_believed(placed: UnreliableStore, fault: str, problem: str) -> None:
    file = cloud.BucketFolder(PLACE).open(SHARD)
    placed.fault = fail("shard", fault)
    with pytest.raises(ShardError, match=rf"^{PLACE}/{SHARD}: bytes 0 to 600 cannot be read, in 5 tries \({problem}"):
        read_bytes(file, 0, 600)


@pytest.mark.parametrize("heeds_if_match", [True, False])
def test_an_object_that_changes(
    placed: UnreliableStore, folder: Path, upload: Callable[..., None], tmp_path: Path, heeds_if_match: bool
) -> None:
    """Same size, other bytes, in the middle of a run: the loader says so within 5 s."""
    with open_shards(PLACE) as there, Loader(there, batch_size=4, threads=2, prefetch_bytes=0) as loader:
        next(loader)
        for name in (SHARD, "shard-000001.tar"):
            data = bytearray((folder / name).read_bytes())
            data[-1] ^= 1
            (tmp_path / name).write_bytes(data)
        upload(tmp_path)
        if not heeds_if_match:
            placed.fault = fail("shard", "ignores If-Match")
        begin_s = time.monotonic()
        with pytest.raises(ShardError, match=r"^s3://.*: volume .*: the object changed since the set was opened"):
            take(loader, 20)
        assert time.monotonic() - begin_s < 5


def test_an_error_reaches_who_waits_for_a_batch(placed: UnreliableStore) -> None:
    with open_shards(PLACE) as there, Loader(there, batch_size=4, threads=2, prefetch_bytes=0) as loader:
        next(loader)
        placed.fault = fail("shard", "500")
        with pytest.raises(ShardError, match=r"shard-00000\d\.tar: volume \w+: bytes \d+ to \d+ cannot be read"):
            take(loader, 20)


# --- addresses and the environment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("gs://scans/set", "or from s3://BUCKET/PREFIX"),
        ("https://example.org/set", "or from s3://BUCKET/PREFIX"),
        ("s3://", "is not s3://BUCKET/PREFIX"),
        ("s3:///set", "is not s3://BUCKET/PREFIX"),
        ("s3://name:word@host/set", "is not s3://BUCKET/PREFIX"),
        ("s3://scans/a/../b", "is not s3://BUCKET/PREFIX"),
        ("s3://scans/a//b", "is not s3://BUCKET/PREFIX"),
        (Path("s3://scans/set"), "give it as a string"),
    ],
)
def test_other_addresses_are_refused(address: str | Path, problem: str) -> None:
    with pytest.raises(ShardError, match=problem):
        open_shards(address)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'dinox\[cloud\]'"):
        open_shards(PLACE)


def test_an_endpoint_without_tls_must_be_allowed(placed: UnreliableStore, environment: pytest.MonkeyPatch) -> None:
    environment.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ShardError, match="AWS_ALLOW_HTTP=true"):
        open_shards(PLACE)
    assert not placed.asked


def test_all_tries_end_before_a_loader_gives_up() -> None:
    """Though each waits for its answer to the end."""
    timeout_s = inspect.signature(Loader).parameters["timeout_s"].default
    waits_s = [cloud.FIRST_WAIT_S * 2**number for number in range(cloud.TRIES - 1)]
    assert timeout_s > cloud.TRIES * cloud.TIMEOUT_S + sum(waits_s)
