"""The simulation: what it measures is the code's own, and the model follows its inputs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import simulate
from hypothesis import given
from hypothesis import strategies as st
from scale_sizes import (
    SLICES,
    Opening,
    Reading,
    extrapolated,
    made_up_index,
    made_up_manifest,
    measured_set,
    memory_of_index,
    opening_s,
    order_cost,
    reading_of,
    reopening_s,
)
from simulate import Cluster, Storage, breaks, load_of, memory_of_node, opening_of

import dinox_io
from dinox_io.canonical import canonical_json
from dinox_io.index import encode_index
from dinox_train.fake import write_fake_set

CLUSTER = Cluster(
    images_per_s=100.0, slice_s=4e-4, cores=8, ranks_per_node=8, node_memory_bytes=2.0**40, batch_size=256,
    open_files=1024,
)  # fmt: skip
LOCAL = Storage(name="disk", node_bytes_per_s=3e9, all_bytes_per_s=math.inf, reads_per_s=math.inf, wait_s=1e-4)
STORE = Storage(name="store", node_bytes_per_s=3e9, all_bytes_per_s=1e11, reads_per_s=5500.0, wait_s=0.03)


def test_a_made_up_manifest_has_the_size_of_a_real_one(tmp_path: Path) -> None:
    """A real set of 12 volumes of 24 slices in one shard: each volume takes as many bytes in either."""
    sides = dict.fromkeys(range(2), "train"), dict.fromkeys(range(12), "train")
    small, large = (write_fake_set(tmp_path / str(len(one)), one) for one in sides)
    real = ((large / "manifest.json").stat().st_size - (small / "manifest.json").stat().st_size) / 10
    made_up = (len(canonical_json(made_up_manifest(10))) - len(canonical_json(made_up_manifest(5)))) / 5
    assert made_up == pytest.approx(real, rel=0.1)


def test_a_made_up_index_has_the_columns_of_a_real_one(tmp_path: Path) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train"})
    with dinox_io.open_shards(folder) as opened:
        real = opened._index
    assert len(encode_index(real)) == (folder / "index.msgpack").stat().st_size
    one, two = (len(encode_index(made_up_index(volumes))) for volumes in (1, 2))
    assert two - one == pytest.approx(16 * SLICES + 145, abs=16)
    assert vars(real).keys() == vars(made_up_index(1)).keys()


def test_sizes_grow_with_the_set() -> None:
    small, large = measured_set(50), measured_set(100)
    for name in ("manifest_bytes", "index_bytes", "open_bytes"):
        assert getattr(large, name) == pytest.approx(2 * getattr(small, name), rel=0.2)
    far = extrapolated(large, 1000)
    assert (far.measured, large.measured) == (False, True)
    assert far.index_bytes == pytest.approx(measured_set(1000).index_bytes, rel=0.01)


def test_the_order_costs_little_for_many_volumes() -> None:
    few, many = order_cost(100, 256), order_cost(20_000, 256)
    assert many.peak_bytes > few.peak_bytes
    assert many.peak_bytes < 200 * 20_000


@pytest.mark.parametrize("mode", ["runs", "random"])
def test_what_a_rank_reads_is_what_the_loader_decodes(mode: str, small_set_256: Path) -> None:
    """The loader's own counter, for one rank and for one of four."""
    with dinox_io.open_shards(small_set_256) as opened:
        y, x = opened.slice_size
        for world in (1, 4):
            reading = reading_of(world, mode, batch_size=16, volumes=40, batches=64)
            with dinox_io.Loader(
                opened, batch_size=16, mode=mode, rank=0, world=world, threads=1, split=None
            ) as loader:
                batches = iter(loader)
                for _ in range(18):
                    next(batches)
                decoded = loader.counters["decoded_bytes"] / (2 * y * x) / (18 * 16 / world)
            # A short stream of a small set has runs that are cut by volumes' ends, and others that began before it.
            assert decoded == pytest.approx(reading.slices, rel=0.35)


@pytest.mark.parametrize("world", [2, 8])
def test_a_run_is_one_ranks(world: int) -> None:
    alone, shared = (reading_of(ranks, "runs", batch_size=256, batches=32).slices for ranks in (1, world))
    assert 1.2 < alone < 1.4
    assert shared < 1.1 * alone, "a rank decodes a run that others have windows of"
    assert reading_of(world, "random", batch_size=256) == Reading(3.0, 1.0)


def test_ranks_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="must divide batch_size"):
        reading_of(7, "runs", batch_size=256)


rates = st.floats(1.0, 1e4)


@given(rates, st.integers(1, 64), st.sampled_from([1, 8, 64, 1024]), st.floats(1.0, 10.0))
def test_no_rank_is_faster_than_what_holds_it(images: float, cores: int, ranks: int, slices: float) -> None:
    cluster, reading = replace(CLUSTER, images_per_s=images, cores=cores), Reading(slices, 1.0)
    for storage in (LOCAL, STORE):
        load = load_of(cluster, storage, reading, ranks)
        assert load.images_per_s <= images
        assert load.images_per_s <= cores / (slices * cluster.slice_s) * (1 + 1e-9)
        assert load.reads_per_s <= storage.reads_per_s * (1 + 1e-9)
        assert load.threads >= 1
    assert load_of(cluster, STORE, reading, ranks).images_per_s <= load_of(cluster, LOCAL, reading, ranks).images_per_s


def test_what_binds_is_named() -> None:
    assert load_of(CLUSTER, LOCAL, Reading(1.3, 0.13), 1).bound == "compute"
    assert load_of(CLUSTER, STORE, Reading(3.0, 1.0), 1024).bound == "storage, requests/s"
    assert load_of(replace(CLUSTER, images_per_s=1e6, cores=1), LOCAL, Reading(3.0, 1.0), 1).bound == "decode"


def test_what_breaks_first() -> None:
    small, order = measured_set(100), order_cost(100, 256)
    assert breaks(CLUSTER, small, order, {"disk": 1.0}) == []
    large = extrapolated(small, 10**6)
    found = breaks(CLUSTER, large, order, {"disk": 1.0, "store": 4000.0})
    assert found[0].startswith("the manifest is beyond 256 MiB")
    assert found[-1] == "opening takes 67 min (store)"
    assert not [one for one in found if "open shards" in one], "a shard gives way to another one"
    assert (CLUSTER.open_shards, replace(CLUSTER, open_files=20000).open_shards) == (768, 15000)


def test_memory_is_counted_per_host() -> None:
    """17 bytes a slice: two of 4 and one of 8 in the index, and one that says whether it was checked."""
    per_volume, per_slice = memory_of_index()
    assert per_slice == pytest.approx(17, abs=0.2)
    assert 3000 < per_volume < 8000
    sizes, order = measured_set(200), order_cost(200, 256)
    assert sizes.open_bytes == pytest.approx(200 * (per_volume + SLICES * per_slice), rel=0.1)
    eight = memory_of_node(CLUSTER, sizes, order)
    assert eight == 8 * memory_of_node(replace(CLUSTER, ranks_per_node=1), sizes, order)


def test_ranks_share_the_reads_of_opening() -> None:
    sizes, of_volume = replace(measured_set(1000), parse_s=0.0), Opening(1e-4, 4e-4)
    one, eight = (opening_of(sizes, of_volume, (LOCAL, STORE), ranks) for ranks in (1, 8))
    assert sizes.opening_reads(1) == 2 + sizes.shards + 1000
    assert 8 * (sizes.opening_reads(8) - 2) == sizes.shards + 1000
    assert one["store"] > 3 * eight["store"]
    assert one["disk"] > 1.5 * eight["disk"]


def test_a_file_is_opened_again_in_no_time(tmp_path: Path) -> None:
    assert 0 < reopening_s(tmp_path) < 0.01


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(simulate, "VOLUMES", (100, 1000))
    monkeypatch.setattr(simulate, "RANKS", (1, 3))
    monkeypatch.setattr(simulate, "OPENED", (2, 6))
    assert simulate.main(["--largest", "100", "--batch-size", "64"]) == 0
    said = capsys.readouterr().out
    assert "| 1,000 | ~" in said
    assert "| 3 | any | | any | | | | | a batch of 64 has no window for each |" in said
    assert simulate.main(["--cores", "0"]) == 2
    assert "~768 |" not in said
    opened = opening_s(tmp_path, 2)
    assert opened.known_s > 0
    assert opened.checked_s >= 0


@pytest.fixture(scope="module")
def small_set_256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_set(tmp_path_factory.mktemp("set") / "shards")
