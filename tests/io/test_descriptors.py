"""Sets with more shards than a process may have files open. No read meets a file that is not its own."""

import os
import random
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io import Loader, ShardError, open_shards, storage
from dinox_io.descriptors import MOST_RAISED, Descriptors, HeldFile, most_descriptors, reachable_limit
from dinox_io.storage import LocalFile, read_bytes

MANY = 60


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory, make_volume: Callable, write_set: Callable) -> Path:
    """A set of 60 shards of one volume."""
    folder = tmp_path_factory.mktemp("many") / "set"
    write_set(folder, [[make_volume(number, (4, 6, 6))] for number in range(MANY)])
    return folder


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Descriptors:
    """Two files may be open, whatever the process's limit."""
    made = Descriptors(2)
    monkeypatch.setattr(storage, "SHARDS", made)
    return made


def numbered(folder: Path, count: int) -> list[Path]:
    """Files whose every byte is their number."""
    paths = [folder / f"{number}.tar" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 4096)
    return paths


# --- within a bound ----------------------------------------------------------------------------------------------


def test_a_set_of_more_shards_than_may_be_open(many_shards: Path, two: Descriptors) -> None:
    with open_shards(many_shards) as shards:
        assert len(two) == 2
        for record in (*shards.volumes, *shards.volumes):
            assert shards.read(record, 0, 4)[:, 0, 0].tolist() == [0, 1, 2, 3]
            assert len(two) <= 2
    assert len(two) == 0


@pytest.mark.parametrize("mode", ["runs", "random"])
def test_the_loader_gives_the_same_batches(
    many_shards: Path, two: Descriptors, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    options = {"batch_size": 12, "mode": mode, "run_length": 2, "seed": 4, "threads": 6}
    with open_shards(many_shards) as shards, Loader(shards, **options) as loader:
        few = [next(loader).images.copy() for _ in range(30)]
        assert len(two) <= 2
    monkeypatch.setattr(storage, "SHARDS", Descriptors(1000))
    with open_shards(many_shards) as shards, Loader(shards, **options) as loader:
        for images in few:
            np.testing.assert_array_equal(images, next(loader).images)


def test_no_thread_reads_another_file(tmp_path: Path, two: Descriptors) -> None:
    """Threads that read, and one that takes every number that becomes free for a file of its own."""
    files = [LocalFile(path) for path in numbered(tmp_path, 9)]
    over, decoy = threading.Event(), tmp_path / "decoy"
    decoy.write_bytes(b"\xff" * 4096)

    def take_numbers() -> None:
        while not over.is_set():
            os.close(os.open(decoy, os.O_RDONLY))

    def read(seed: int) -> int:
        chosen = random.Random(seed)
        for _ in range(400):
            number = chosen.randrange(9)
            assert set(read_bytes(files[number], 100, 3000)) == {number}
        return len(two)

    taker = threading.Thread(target=take_numbers)
    taker.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            assert max(pool.map(read, range(6))) <= 2
    finally:
        over.set()
        taker.join()
    for file in files:
        file.close()
    assert len(two) == 0


def test_threads_wait_for_room(tmp_path: Path) -> None:
    one, (first, second) = Descriptors(1), (HeldFile(path) for path in numbered(tmp_path, 2))
    one.take(first)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(one.take, second)
        time.sleep(0.05)
        assert not waits.done()
        one.give(first)
        assert waits.result(5) >= 0
    assert (first.descriptor, len(one)) == (-1, 1)


def test_the_one_used_longest_ago_gives_way(tmp_path: Path) -> None:
    three, files = Descriptors(3), [HeldFile(path) for path in numbered(tmp_path, 4)]
    for number in (0, 1, 2, 0, 3):
        three.take(files[number])
        three.give(files[number])
    assert [file.descriptor >= 0 for file in files] == [True, False, True, True]


def test_closing_waits_for_its_reader(tmp_path: Path, two: Descriptors) -> None:
    (path,) = numbered(tmp_path, 1)
    file = LocalFile(path)
    descriptor = two.take(file._held)
    file.close()
    file.close()
    assert os.pread(descriptor, 1, 0) == b"\0"
    two.give(file._held)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    with pytest.raises(ShardError, match=r"0\.tar: was closed"):
        read_bytes(file, 0, 1)


def test_after_a_fork(tmp_path: Path, two: Descriptors) -> None:
    """The child has neither the thread that held the lock nor those that were reading."""
    files = [LocalFile(path) for path in numbered(tmp_path, 3)]
    two.take(files[1]._held)
    two.take(files[2]._held)
    locked, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with two._changed:
            locked.set()
            let_go.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
        child = os.fork()
    if child == 0:
        os._exit(0 if read_bytes(files[0], 0, 1) == b"\0" and len(two) == 2 else 1)
    let_go.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


# --- opened again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "edited", "gone", "a folder"])
def test_a_file_that_is_no_longer_itself(tmp_path: Path, two: Descriptors, change: str) -> None:
    paths = numbered(tmp_path, 3)
    first, *others = [LocalFile(path) for path in paths]
    assert first._held.descriptor < 0, "two others are open"
    if change == "edited":
        paths[0].write_bytes(b"\1" * 4096)
        os.utime(paths[0], ns=(1, 1))
    else:
        paths[0].unlink()
    if change == "replaced":
        (tmp_path / "new").write_bytes(bytes(4096))
        (tmp_path / "new").rename(paths[0])
    if change == "a folder":
        paths[0].mkdir()
    problem = {"gone": "cannot be opened", "a folder": "is not a regular file"}.get(change, "changed since the set was")
    with pytest.raises(ShardError, match=rf"^0\.tar: .*{problem}"):
        read_bytes(first, 0, 1)
    assert len(two) <= 2
    assert read_bytes(others[1], 0, 1) == b"\2"


def test_from_another_folder(tmp_path: Path, two: Descriptors, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    files = [LocalFile(Path(f"{number}.tar")) for number in range(3)]
    monkeypatch.chdir("/")
    assert [read_bytes(file, 0, 1)[0] for file in files] == [0, 1, 2]
    assert len(two) == 2


def test_a_file_whose_size_is_given_is_opened_when_it_is_read(tmp_path: Path, two: Descriptors) -> None:
    (path,) = numbered(tmp_path, 1)
    file, wrong = LocalFile(path, 4096), LocalFile(path, 4095)
    absent = LocalFile(tmp_path / "absent.tar", 10)
    assert (len(two), file.size) == (0, 4096)
    assert read_bytes(file, 0, 2) == b"\0\0"
    with pytest.raises(ShardError, match=r"^0\.tar: has 4096 bytes where the manifest says 4095$"):
        read_bytes(wrong, 0, 1)
    with pytest.raises(ShardError, match=r"^absent\.tar: cannot be opened \(No such file"):
        read_bytes(absent, 0, 1)


# --- the process's limit -----------------------------------------------------------------------------------------

WITH_LIMITS = """
import os, resource, sys
import numpy.random
import dinox_io
from dinox_io.storage import SHARDS, LocalFile
soft, hard, others = map(int, sys.argv[2:])
shards = None
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(others)]
with dinox_io.open_shards(sys.argv[1]) as shards, dinox_io.Loader(shards, batch_size=8, threads=4) as loader:
    for _ in range(40):
        next(loader)
    assert len(os.listdir("/proc/self/fd")) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    print(len(SHARDS), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def with_limits(folder: Path, soft: int, hard: int, others: int = 0) -> tuple[int, int]:
    """Shards that are open after 40 batches of a process with these limits, and its soft limit then."""
    command = [sys.executable, "-c", WITH_LIMITS, str(folder), *map(str, (soft, hard, others))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shards, limit = map(int, done.stdout.split())
    return shards, limit


def test_a_limit_that_cannot_be_raised(many_shards: Path) -> None:
    shards, limit = with_limits(many_shards, 40, 40)
    assert limit == 40
    assert most_descriptors(40) - 4 <= shards <= most_descriptors(40), "each of four threads may just be opening one"


def test_a_limit_that_is_raised_when_it_is_reached(many_shards: Path) -> None:
    assert with_limits(many_shards, 40, 300) == (MANY, 300)
    assert with_limits(many_shards, 200, 300) == (MANY, 200), "there was room"


def test_others_have_the_rest(many_shards: Path) -> None:
    """Of 60, others take 40: the shards are content with what there is."""
    shards, limit = with_limits(many_shards, 60, 60, others=40)
    assert limit == 60
    assert 1 <= shards < most_descriptors(60)


def test_no_room_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the very first: an error, in its words."""
    (path,) = numbered(tmp_path, 1)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    pool, file = Descriptors(5), HeldFile(path)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"^0\.tar: cannot be opened \(Too many open files; see ulimit -n\)$"):
            pool.take(file)
    assert len(pool) == 0
    monkeypatch.undo()
    assert pool.take(file) >= 0


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_limits(soft: int, more: int) -> None:
    assert 1 <= most_descriptors(soft) <= max(-(-soft // 2), soft - 64)
    assert soft <= reachable_limit(soft, soft + more) <= max(soft, min(soft + more, MOST_RAISED))
    assert reachable_limit(soft, resource.RLIM_INFINITY) == max(soft, MOST_RAISED)
