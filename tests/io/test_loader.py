"""The loader: the same stream for any threads and parts, exact resume, true pixels, and failures that surface."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import dinox_io
from dinox_io.pipeline import _group_free_bytes, check_memory
from dinox_io.storage import LocalFile

SHAPES = [(6, 16, 20), (3, 9, 20), (11, 16, 7), (1, 4, 4), (8, 12, 12)]
SETTINGS = {"batch_size": 12, "depth": 3, "step": 1, "seed": 11}


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
    fields = (batch.images, batch.sizes, batch.volume, batch.center, batch.epoch, batch.rows, batch.spacing_mm)
    return (*(field.tobytes() for field in fields), batch.position, batch.part)


def stream(shards: dinox_io.ShardSet, count: int, **settings) -> list[tuple]:
    with dinox_io.Loader(shards, **(SETTINGS | settings)) as loader:
        return [content(batch) for batch in islice(loader, count)]


@pytest.mark.parametrize("edge", ["clamp", "reflect", "error"])
def test_batches_hold_what_they_claim(folder: Path, edge: str) -> None:
    with dinox_io.open_shards(folder, edge=edge) as shards, dinox_io.Loader(shards, **SETTINGS) as loader:
        for position, batch in enumerate(islice(loader, 12)):
            assert (batch.position, loader.position) == (position, position + 1)
            assert batch.images.dtype == np.int16
            assert batch.images.shape == (12, 3, 16, 20)
            assert batch.rows.tolist() == list(range(12))
            for row, window in enumerate(batch.windows):
                record = shards.volumes[batch.volume[row]]
                assert np.shares_memory(window, batch.images)
                np.testing.assert_array_equal(window, shards.read_window(record, int(batch.center[row])))
                assert tuple(batch.sizes[row]) == record.shape[1:] == window.shape[1:]
                assert tuple(batch.spacing_mm[row]) == record.spacing_mm
                assert (batch.images[row, :, window.shape[1] :] == -1024).all()
                assert (batch.images[row, :, :, window.shape[2] :] == -1024).all()
                assert record.split == "train"


def test_an_epoch_holds_every_window_once(shards: dinox_io.ShardSet) -> None:
    expected = [(v.index, z) for v in shards.volumes if v.split == "train" for z in range(v.shape[0])]
    with dinox_io.Loader(shards, **SETTINGS) as loader:
        assert loader.num_windows == len(expected) == sum(shape[0] for shape in SHAPES) + 9
        batches = [(b.volume.copy(), b.center.copy(), b.epoch.copy()) for b in islice(loader, 20)]
    volume, center, epoch = (np.concatenate(column) for column in zip(*batches, strict=True))
    for number in range(5):
        chosen = epoch == number
        assert sorted(zip(volume[chosen].tolist(), center[chosen].tolist(), strict=True)) == sorted(expected)


def test_threads_and_prefetch_change_nothing(shards: dinox_io.ShardSet) -> None:
    expected = stream(shards, 10, threads=1, prefetch_bytes=0)
    for threads, prefetch_bytes in ((2, 0), (3, 1 << 30), (8, 1 << 20)):
        assert stream(shards, 10, threads=threads, prefetch_bytes=prefetch_bytes) == expected


def test_resume_at_every_position(shards: dinox_io.ShardSet) -> None:
    whole = stream(shards, 9)
    for position in range(9):
        with dinox_io.Loader(shards, **SETTINGS, position=position) as loader:
            assert loader.position == position
            assert [content(batch) for batch in islice(loader, 9 - position)] == whole[position:]


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_are_the_batch_cut_up(shards: dinox_io.ShardSet, parts: int) -> None:
    with dinox_io.Loader(shards, **SETTINGS) as whole, dinox_io.Loader(shards, **SETTINGS, parts=parts) as cut:
        for position, batch in enumerate(islice(whole, 5)):
            for part in range(parts):
                piece = next(cut)
                assert (piece.position, piece.part) == (position, part)
                assert cut.position == position + (part == parts - 1)
                for name in ("images", "sizes", "volume", "center", "epoch", "rows", "spacing_mm"):
                    rows = slice(part * 12 // parts, (part + 1) * 12 // parts)
                    np.testing.assert_array_equal(getattr(piece, name), getattr(batch, name)[rows])


def test_a_batch_is_valid_until_the_next_is_asked_for(shards: dinox_io.ShardSet) -> None:
    with dinox_io.Loader(shards, **SETTINGS, threads=4, prefetch_bytes=0) as loader:
        for batch in islice(loader, 6):
            before = batch.images.copy()
            time.sleep(0.02)  # the threads have all the time to spoil it
            np.testing.assert_array_equal(batch.images, before)


def test_runs_of_one_series_count_as_one(shards: dinox_io.ShardSet) -> None:
    """9 of 38 windows, in two volumes: with batches of 2 at most 1 + ceil(2·2·9/38) = 2, with 1 of them never two."""
    from dinox_io.loader import _by_series

    table, sizes = _by_series(shards, shards.volumes_of("train"), 3, 1)
    assert sorted(sizes.tolist()) == sorted([*(shape[0] for shape in SHAPES), 9])
    located, _ = table.locate(np.arange(table.num_windows))
    names = [shards.volumes[number].series for number in located]
    assert [names.count(name) for name in dict.fromkeys(names)] == sizes.tolist()
    assert names == sorted(names)


def test_counters_only_grow_and_count_bytes(shards: dinox_io.ShardSet) -> None:
    with dinox_io.Loader(shards, **SETTINGS, threads=1, prefetch_bytes=0) as loader:
        assert set(loader.counters) == {"read_bytes", "decoded_bytes", "read_s", "decode_s", "unfilter_s", "wait_s"}
        next(loader)
        first = loader.counters
        next(loader)
        second = loader.counters
    assert all(second[name] >= first[name] >= 0 for name in first)
    assert second["decoded_bytes"] >= 2 * 12 * 2 * 16
    assert second["read_bytes"] > 0


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 39}, "38 windows, fewer than the 39"),
        ({"batch_size": 0}, "batch_size"),
        ({"parts": 5}, "must divide batch_size"),
        ({"parts": 0}, "parts"),
        ({"depth": 2}, "odd"),
        ({"step": 0}, "step"),
        ({"mode": "runs"}, "mode"),
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
        data[int(shards._index.frame_offset[5]) + 200] ^= 4
    path.write_bytes(data)
    with dinox_io.open_shards(tmp_path / "set") as shards, dinox_io.Loader(shards, batch_size=8) as loader:
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
        message = r"shard-00000\d\.tar: volume \w+.*slices around \d+: RuntimeError: a bug"
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
