"""The loader: the same stream for any threads and parts, exact resume, true pixels, and failures that surface."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import dinox_io
from dinox_io.filters import Scratch, remove_filter
from dinox_io.memory import _group_free_bytes, check_memory
from dinox_io.storage import LocalFile

SHAPES = [(6, 16, 20), (3, 9, 20), (11, 16, 7), (1, 4, 4), (8, 12, 12)]
SETTINGS = {"batch_size": 12, "depth": 3, "step": 1, "seed": 11, "mode": "random"}
MODES = [{"mode": "random"}, {"mode": "runs", "run_length": 3}]
both_modes = pytest.mark.parametrize("mode", MODES, ids=["random", "runs"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_volume, write_set) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "set"
    volumes = [make_volume(number, shape) for number, shape in enumerate(SHAPES)]
    # One series in two runs, split at a gap.
    volumes += [make_volume(9, (4, 8, 8), run=1), make_volume(9, (5, 8, 8), run=2)]
    held_out = make_volume(20, (5, 10, 10))
    write_set(folder, [volumes[:3], [*volumes[3:], held_out]], sides={held_out.id: "val"})
    return folder


@pytest.fixture
def shards(folder: Path) -> Iterator[dinox_io.ShardSet]:
    with dinox_io.open_shards(folder) as opened:
        yield opened


def decoder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dinox-decoder")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    deadline_s = time.monotonic() + 2
    while decoder_threads() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert decoder_threads() == []


def content(batch: dinox_io.Batch) -> tuple:
    fields = (
        batch.images,
        batch.sizes,
        batch.set,
        batch.volume,
        batch.center,
        batch.epoch,
        batch.rows,
        batch.spacing_mm,
    )
    return (*(field.tobytes() for field in fields), batch.position, batch.part)


def stream(shards: dinox_io.loader.Sets, count: int, **settings) -> list[tuple]:
    with dinox_io.Loader(shards, **(SETTINGS | settings)) as loader:
        return [content(batch) for batch in islice(loader, count)]


@both_modes
@pytest.mark.parametrize("edge", ["clamp", "reflect", "error"])
def test_batches_hold_what_they_claim(folder: Path, edge: str, mode: dict) -> None:
    with dinox_io.open_shards(folder, edge=edge) as shards, dinox_io.Loader(shards, **(SETTINGS | mode)) as loader:
        for position, batch in enumerate(islice(loader, 12)):
            assert (batch.position, loader.position) == (position, position + 1)
            assert batch.images.dtype == np.int16
            assert batch.images.shape == (12, 3, 16, 20)
            assert batch.rows.tolist() == list(range(12))
            for row, window in enumerate(batch.windows):
                record = shards.volumes[batch.volume[row]]
                assert np.shares_memory(window, batch.images) == (mode["mode"] == "random")
                np.testing.assert_array_equal(window, batch.images[row, :, : window.shape[1], : window.shape[2]])
                np.testing.assert_array_equal(window, shards.read_window(record, int(batch.center[row])))
                assert tuple(batch.sizes[row]) == record.shape[1:] == window.shape[1:]
                assert tuple(batch.spacing_mm[row]) == record.spacing_mm
                assert (batch.images[row, :, window.shape[1] :] == -1024).all()
                assert (batch.images[row, :, :, window.shape[2] :] == -1024).all()
                assert record.split == "train"


@both_modes
def test_an_epoch_holds_every_window_once(shards: dinox_io.ShardSet, mode: dict) -> None:
    expected = [(v.index, z) for v in shards.volumes if v.split == "train" for z in range(v.shape[0])]
    with dinox_io.Loader(shards, **(SETTINGS | mode)) as loader:
        assert loader.num_windows == (len(expected),) == (sum(shape[0] for shape in SHAPES) + 9,)
        batches = [(b.volume.copy(), b.center.copy(), b.epoch.copy()) for b in islice(loader, 20)]
    volume, center, epoch = (np.concatenate(column) for column in zip(*batches, strict=True))
    for number in range(5):
        chosen = epoch == number
        assert sorted(zip(volume[chosen].tolist(), center[chosen].tolist(), strict=True)) == sorted(expected)


@both_modes
def test_threads_and_prefetch_change_nothing(shards: dinox_io.ShardSet, mode: dict) -> None:
    expected = stream(shards, 10, **mode, threads=1, prefetch_bytes=0)
    for threads, prefetch_bytes in ((2, 0), (3, 1 << 30), (8, 1 << 20)):
        assert stream(shards, 10, **mode, threads=threads, prefetch_bytes=prefetch_bytes) == expected


@both_modes
def test_resume_at_every_position(shards: dinox_io.ShardSet, mode: dict) -> None:
    whole = stream(shards, 9, **mode)
    for position in range(9):
        with dinox_io.Loader(shards, **(SETTINGS | mode), position=position) as loader:
            assert loader.position == position
            assert [content(batch) for batch in islice(loader, 9 - position)] == whole[position:]


@both_modes
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_are_the_batch_cut_up(shards: dinox_io.ShardSet, parts: int, mode: dict) -> None:
    settings = SETTINGS | mode
    with dinox_io.Loader(shards, **settings) as whole, dinox_io.Loader(shards, **settings, parts=parts) as cut:
        for position, batch in enumerate(islice(whole, 5)):
            for part in range(parts):
                piece = next(cut)
                assert (piece.position, piece.part) == (position, part)
                assert cut.position == position + (part == parts - 1)
                for name in ("images", "sizes", "volume", "center", "epoch", "rows", "spacing_mm"):
                    rows = slice(part * 12 // parts, (part + 1) * 12 // parts)
                    np.testing.assert_array_equal(getattr(piece, name), getattr(batch, name)[rows])


@both_modes
@pytest.mark.parametrize(("parts", "world"), [(1, 2), (2, 3), (3, 4), (1, 12)])
def test_ranks_share_each_part(shards: dinox_io.ShardSet, parts: int, world: int, mode: dict) -> None:
    """Rank r of w gets rows [r·b/w, (r+1)·b/w) of each part of b rows: together the batch, whatever w is."""
    with dinox_io.Loader(shards, **(SETTINGS | mode)) as whole:
        batches = [batch.images.copy() for batch in islice(whole, 3)]
    for rank in range(world):
        with dinox_io.Loader(shards, **(SETTINGS | mode), parts=parts, rank=rank, world=world) as loader:
            for position, part in np.ndindex(3, parts):
                piece = next(loader)
                first = part * 12 // parts + rank * 12 // (parts * world)
                assert piece.rows.tolist() == list(range(first, first + 12 // (parts * world)))
                np.testing.assert_array_equal(piece.images, batches[position][piece.rows])


@both_modes
def test_an_inflated_epoch_holds_every_window_so_often(shards: dinox_io.ShardSet, mode: dict) -> None:
    with dinox_io.Loader(shards, **(SETTINGS | mode), inflation=3) as loader:
        batches = [(b.volume.copy(), b.center.copy(), b.epoch.copy()) for b in islice(loader, 12)]
    for volume, center, _ in batches:
        assert len(set(zip(volume.tolist(), center.tolist(), strict=True))) == 12
    volume, center, epoch = (np.concatenate(column) for column in zip(*batches, strict=True))
    counts = Counter(zip(volume[epoch == 0].tolist(), center[epoch == 0].tolist(), strict=True))
    assert set(counts.values()) == {3}
    assert len(counts) == 38


@both_modes
def test_a_mixture_of_sets(shards: dinox_io.ShardSet, tmp_path: Path, make_volume, write_set, mode: dict) -> None:
    other_folder = tmp_path / "other"
    write_set(other_folder, [[make_volume(40 + number, (10, 24, 8)) for number in range(4)]])
    with dinox_io.open_shards(other_folder) as other:
        sets = [(shards, 3.0), (other, 1.0)]
        with dinox_io.Loader(sets, **(SETTINGS | mode)) as loader:
            assert loader.num_windows == (38, 40)
            drawn = np.zeros(2)
            for batch in islice(loader, 20):
                assert batch.images.shape == (12, 3, 24, 20)  # the largest y and the largest x of both
                drawn += np.bincount(batch.set, minlength=2)
                for row, window in enumerate(batch.windows):
                    source = sets[batch.set[row]][0]
                    expected = source.read_window(int(batch.volume[row]), int(batch.center[row]))
                    np.testing.assert_array_equal(window, expected)
                    assert tuple(batch.spacing_mm[row]) == source.volumes[batch.volume[row]].spacing_mm
                assert loader.shares == pytest.approx((drawn / drawn.sum()).tolist())
        assert drawn.tolist() == [180, 60]
        expected = stream(sets, 6, **mode, threads=1, prefetch_bytes=0)
        assert stream(sets, 6, **mode, threads=3) == expected
        assert stream(sets, 3, **mode, position=3) == expected[3:]


@both_modes
def test_thinned_centres_keep_true_neighbours(shards: dinox_io.ShardSet, mode: dict) -> None:
    with dinox_io.Loader(shards, **(SETTINGS | mode | {"batch_size": 8}), every=3) as loader:
        for batch in islice(loader, 4):
            assert (batch.center % 3 == 0).all()
            for row, window in enumerate(batch.windows):
                expected = shards.read_window(int(batch.volume[row]), int(batch.center[row]))
                np.testing.assert_array_equal(window, expected)


@both_modes
def test_a_step_in_mm(shards: dinox_io.ShardSet, mode: dict) -> None:
    distance_mm = 2 * shards.volumes[0].spacing_mm[0]
    with dinox_io.Loader(shards, **(SETTINGS | mode), step_mm=distance_mm) as loader:
        batch = next(loader)
        for row, window in enumerate(batch.windows):
            step = max(round(distance_mm / batch.spacing_mm[row, 0]), 1)
            expected = shards.read_window(int(batch.volume[row]), int(batch.center[row]), step=step)
            np.testing.assert_array_equal(window, expected)


@both_modes
def test_a_batch_is_valid_until_the_next_is_asked_for(shards: dinox_io.ShardSet, mode: dict) -> None:
    with dinox_io.Loader(shards, **(SETTINGS | mode), threads=4, prefetch_bytes=0) as loader:
        for batch in islice(loader, 12):
            before = [window.copy() for window in batch.windows]
            time.sleep(0.02)  # the threads have all the time to spoil it
            for window, copy in zip(batch.windows, before, strict=True):
                np.testing.assert_array_equal(window, copy)


def test_runs_of_one_series_count_as_one(shards: dinox_io.ShardSet) -> None:
    """9 of 38 windows, in two volumes: with batches of 2 at most 1 + ceil(2·2·9/38) = 2, with 1 of them never two."""
    from dinox_io.loader import _by_series

    table, sizes = _by_series(shards, "train", 3, 1, 1, step_mm=None, every_mm=None)
    assert sorted(sizes.tolist()) == sorted([*(shape[0] for shape in SHAPES), 9])
    located, *_ = table.locate(np.arange(table.num_windows))
    names = [shards.volumes[number].series for number in located]
    assert [names.count(name) for name in dict.fromkeys(names)] == sizes.tolist()
    assert names == sorted(names)


def test_counters_only_grow_and_count_bytes(shards: dinox_io.ShardSet) -> None:
    with dinox_io.Loader(shards, **SETTINGS, threads=1, prefetch_bytes=0) as loader:
        sums = {
            "read_bytes",
            "decoded_bytes",
            "read_s",
            "decode_s",
            "unfilter_s",
            "wait_s",
            "decoded_again",
            "copied_bytes",
            "cached_bytes",
        }
        assert set(loader.counters) == sums | {"active_threads"}
        next(loader)
        first = loader.counters
        next(loader)
        second = loader.counters
    assert all(second[name] >= first[name] >= 0 for name in first)
    assert second["decoded_bytes"] >= 2 * 12 * 2 * 16
    assert second["read_bytes"] > 0


def test_a_small_pool_costs_time_and_changes_nothing(shards: dinox_io.ShardSet) -> None:
    runs = MODES[1]
    slot_bytes = 2 * (3 + 2) * 16 * 20
    expected = stream(shards, 12, **runs)
    with dinox_io.Loader(shards, **(SETTINGS | runs), pool_bytes=13 * slot_bytes, threads=2) as loader:
        assert [content(batch) for batch in islice(loader, 12)] == expected
        assert loader.counters["decoded_again"] > 0
    with dinox_io.Loader(shards, **(SETTINGS | runs)) as loader:
        assert [content(batch) for batch in islice(loader, 12)] == expected
        assert loader.counters["decoded_again"] == 0


def test_runs_decode_less(tmp_path: Path, make_volume, write_set) -> None:
    """(K + 2)/K slices a window, where random windows take 3."""
    write_set(tmp_path / "set", [[make_volume(number, (60, 16, 16)) for number in range(12)]])
    frames = {}
    with dinox_io.open_shards(tmp_path / "set") as shards:
        for mode in ("runs", "random"):
            with dinox_io.Loader(shards, batch_size=16, mode=mode, prefetch_bytes=0) as loader:
                for _ in islice(loader, 90):  # two epochs
                    pass
                frames[mode] = loader.counters["decoded_bytes"] / (90 * 16 * 16 * 16 * 2)
    assert 2.9 < frames["random"] < 3.2
    assert 1.25 < frames["runs"] < 1.75  # 96 of 720 windows are alive in runs at once: ends of passes weigh


@both_modes
def test_filtered_windows_are_what_the_filter_made(shards: dinox_io.ShardSet, mode: dict) -> None:
    with dinox_io.Loader(shards, **(SETTINGS | mode), filtered=True) as loader:
        for batch in islice(loader, 4):
            with pytest.raises(ValueError, match="filtered"):
                _ = batch.images
            for row, window in enumerate(batch.windows):
                expected = shards.read_window(int(batch.volume[row]), int(batch.center[row]))
                assert window.dtype == np.uint8
                for slice_bytes, slice_hu in zip(window, expected, strict=True):
                    out = np.empty_like(slice_hu)
                    remove_filter(np.ascontiguousarray(slice_bytes), "hilp", out, Scratch())
                    np.testing.assert_array_equal(out, slice_hu)


@both_modes
def test_memory_may_be_given(shards: dinox_io.ShardSet, mode: dict) -> None:
    given: list[np.ndarray] = []

    def allocate(size: int) -> np.ndarray:
        given.append(np.full(size + 100, 7, np.uint8))
        return given[-1]

    with dinox_io.Loader(shards, **(SETTINGS | mode), slab=allocate) as loader:
        assert all(np.shares_memory(window, given[0]) for window in next(loader).windows)
    assert len(given) == 1
    with pytest.raises(ValueError, match="the memory given is"):
        dinox_io.Loader(shards, **(SETTINGS | mode), slab=lambda size: np.empty(size - 1, np.uint8))


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 39}, "38 windows, fewer than the 39"),
        ({"batch_size": 0}, "batch_size"),
        ({"parts": 5}, "must divide batch_size"),
        ({"parts": 3, "world": 3}, "must divide batch_size"),
        ({"world": 2, "rank": 2}, "rank"),
        ({"inflation": 0}, "inflation"),
        ({"step_mm": 0.0}, "mm"),
        ({"every": 0}, "every"),
        ({"parts": 0}, "parts"),
        ({"depth": 2}, "odd"),
        ({"step": 0}, "step"),
        ({"mode": "walk"}, "mode"),
        ({"mode": "runs", "pool_bytes": 1 << 10}, "pool_bytes is 1024, room for 0 runs"),
        ({"max_gbps": 0.0}, "cap"),
        ({"prefetch_bytes": -1}, "prefetch_bytes"),
        ({"position": -1}, "position"),
        ({"seed": -1}, "seed"),
        ({"split": "test"}, "train 7, val 1, test 0, none 0"),
        ({"split": "left"}, "not one of"),
        ({"threads": 0}, "threads"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_refusals(shards: dinox_io.ShardSet, settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dinox_io.Loader(shards, **(SETTINGS | settings))


def test_memory_is_checked_before_it_is_taken(shards: dinox_io.ShardSet) -> None:
    check_memory(1 << 20)
    with pytest.raises(MemoryError, match=r"need \d+ MiB and \d+ MiB are free: lower prefetch_bytes"):
        check_memory(1 << 60)


def test_the_page_cache_is_no_use_of_memory(tmp_path: Path) -> None:
    """In a container that has read many shards, memory.current is near its limit, and all of that is cache."""
    (tmp_path / "memory.max").write_text("1000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("990\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 90\nfile 900\nshmem 50\n", encoding="ascii")
    assert _group_free_bytes(tmp_path) == 1000 - 90 - 50
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert _group_free_bytes(tmp_path) is None
    assert _group_free_bytes(tmp_path / "absent") is None


# --- failures ----------------------------------------------------------------------------------------------------


def test_damage_names_file_volume_and_slice(tmp_path: Path, make_volume, write_set) -> None:
    volume = make_volume(1, (8, 32, 32))
    write_set(tmp_path / "set", [[volume]])
    path = tmp_path / "set" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    with dinox_io.open_shards(tmp_path / "set") as shards:
        data[int(shards._index.frames(0, 5, 6)[0]) + 200] ^= 4
    path.write_bytes(data)
    with (
        dinox_io.open_shards(tmp_path / "set") as shards,
        dinox_io.Loader(shards, batch_size=8, mode="random") as loader,
    ):
        begin_s = time.monotonic()
        with pytest.raises(dinox_io.ShardError, match=rf"shard-000000\.tar: volume {volume.id}: slice 5"):
            next(loader)
        assert time.monotonic() - begin_s < 5
        with pytest.raises(dinox_io.ShardError):
            next(loader)  # and not a batch after all


def test_a_read_that_fails_surfaces(shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with dinox_io.Loader(shards, **SETTINGS, prefetch_bytes=0) as loader:
        next(loader)
        monkeypatch.setattr("dinox_io.storage.os.preadv", fail)
        begin_s = time.monotonic()
        message = r"shard-00000\d\.tar: volume \w+(-\d)?: byte \d+ cannot be read \(Input/output error\)"
        with pytest.raises(dinox_io.ShardError, match=message) as error:
            list(islice(loader, 5))
        assert time.monotonic() - begin_s < 5
        assert error.value.volume in {record.id for record in shards.volumes}


def test_any_other_failure_of_a_thread_surfaces(shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with dinox_io.Loader(shards, **SETTINGS, prefetch_bytes=0) as loader:
        monkeypatch.setattr(LocalFile, "read_into", fail)
        message = r"shard-00000\d\.tar: volume \w+.*slices \d+ to \d+: RuntimeError: a bug"
        with pytest.raises(dinox_io.LoaderError, match=message):
            list(islice(loader, 5))


def test_a_stall_is_said_with_stacks(
    shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(LocalFile, "read_into", lambda *_: let_go.wait(20))
    loader = dinox_io.Loader(shards, **SETTINGS, timeout_s=0.3, threads=2)
    try:
        with pytest.raises(dinox_io.LoaderStalled, match=r"no batch in 0\.3 s; decoding shard-00000\d\.tar: volume"):
            next(loader)
        begin_s = time.monotonic()
        loader.close()
        assert time.monotonic() - begin_s < 2
        assert "Thread" in (stacks := capfd.readouterr().err)
        assert "read_frames_into" in stacks
    finally:
        let_go.set()


def test_close_ends_the_threads(shards: dinox_io.ShardSet) -> None:
    loader = dinox_io.Loader(shards, **SETTINGS, threads=3)
    next(loader)
    assert len(decoder_threads()) == 3
    begin_s = time.monotonic()
    loader.close()
    assert time.monotonic() - begin_s < 2
    assert decoder_threads() == []
    with pytest.raises(dinox_io.LoaderError, match="closed"):
        next(loader)
    loader.close()


def test_a_dropped_loader_ends_its_threads(shards: dinox_io.ShardSet) -> None:
    next(dinox_io.Loader(shards, **SETTINGS))
    next(iter(shards.windows("train")))
    # no_thread_is_left checks


def test_no_file_handle_is_left(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with dinox_io.open_shards(folder) as shards, dinox_io.Loader(shards, **SETTINGS) as loader:
            next(loader)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_abandoned_loader_does_not_hang_the_interpreter(folder: Path, repository: Path) -> None:
    program = (
        "import dinox_io, sys\n"
        f"loader = dinox_io.Loader(dinox_io.open_shards({str(folder)!r}), batch_size=12)\n"
        "next(loader)\n"
        "print('done')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=20, check=True
    )
    assert run.stdout == "done\n"
    assert run.stderr == ""


@pytest.mark.fault
@pytest.mark.timeout(900)  # 22,000 batches
def test_memory_does_not_grow(folder: Path) -> None:
    """F29: less than 1 KB a batch over 20,000 batches, after a warm-up."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with dinox_io.open_shards(folder) as shards, dinox_io.Loader(shards, **SETTINGS) as loader:
        for _ in islice(loader, 2000):
            pass
        before = resident_bytes()
        for _ in islice(loader, 20000):
            pass
        assert resident_bytes() - before < 20000 * 1024
