"""Packing on a Ray cluster gives the bytes of packing here, whatever is lost, and leaves no name in Ray's logs.

The cluster is two machines of one core each, on this one; without Ray all but the first tests are skipped.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dinox_io import ray_pool
from dinox_io.output import PackError
from dinox_io.ray_pool import RayPool
from dinox_io.workers import Failure
from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.ray_tasks import begun, held_task, loses_its_ray_worker, own_sight, sight
from tests.io.small_packs import KEY, contents

needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray (extra `cluster`)")
PLANTED = "ZZPLANTED"


@pytest.mark.parametrize("address", ["", "ray://head:10001", "head", "head:", ":6379", "a b:1", "local:1:2"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="give auto, local, or HOST:PORT"):
        RayPool(address, local_cores=1, sight=sight)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PackError, match=r"dinox\[cluster\]"), RayPool("auto", local_cores=1, sight=sight):
        pass


@needs_ray
def test_where_nobody_listens_it_is_said_at_once(token: None) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        no_one = pytest.raises(PackError, match=f"no Ray cluster could be reached at {address}")
        with no_one, RayPool(address, local_cores=1, sight=sight):
            pass


def test_other_versions_and_other_code_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    code, versions = ray_pool._code(), ray_pool.tool_versions()
    assert ray_pool._differing(code, versions) == ""
    assert ray_pool._differing("another", versions) == "the source of dinox_io"
    monkeypatch.setattr(ray_pool, "tool_versions", lambda: {**versions, "zstd": "1.0", "python-gdcm": "3"})
    told = ray_pool._differing(code, {**versions, "python-gdcm": "4", "nibabel": "5"})
    assert "python-gdcm 3, not 4" in told
    assert f"zstd 1.0, not {versions['zstd']}" in told


class Cluster:
    """The process of ray_cluster.py."""

    def __init__(self, repository: Path, logs: Path) -> None:
        self.logs = logs
        environment = {**os.environ, "PYTHONPATH": str(repository), "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(repository / "tests/io/ray_cluster.py"), str(logs)], env=environment,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.address = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> None:
        """`kill` or `add`."""
        assert self.process.stdin
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def token() -> Iterator[None]:
    """Ray asks for it, as it should where strangers reach its ports. It reads these when it is imported: no test may
    import it in this process without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield


@pytest.fixture(scope="module")
def cluster(repository: Path, token: None) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as logs:
        started = Cluster(repository, Path(logs))
        yield started
        started.close()


def until(true: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@needs_ray
@pytest.mark.filterwarnings("default")
def test_what_is_lost_is_done_again_and_comes_in_order(cluster: Cluster, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
    orders = [(number, tmp_path) for number in range(5)]
    with RayPool(cluster.address, local_cores=1, sight=sight) as pool:
        outcomes = list(pool.map(loses_its_ray_worker, orders))
        made = [0, 1, Failure("crashed"), Failure("error", "ValueError"), 16]
        assert outcomes == list(zip(orders, made, strict=True))
        assert [len(begun(folder)) for folder in folders] == [1, 2, 2, 1, 1]
        assert pool.repeats == 1

        (tmp_path / "held").mkdir()
        results = pool.map(held_task, [(number, tmp_path / "held") for number in range(6)])
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.extend(result for _, result in results))
        thread.start()
        until(lambda: len(begun(tmp_path / "held")) == 2)
        cluster.tell("kill")
        (tmp_path / "held" / "go").touch()
        thread.join()
        assert found == [0, 1, 4, 9, 16, 25]
        assert len(begun(tmp_path / "held")) == 7
        assert pool.repeats >= 2
        cluster.tell("add")

        pool._expected = pool._ray.put(("another", ray_pool.tool_versions()))
        with pytest.raises(PackError, match=r"another dinox or other packages .*\(the source of dinox_io\)"):
            list(pool.map(held_task, orders))
    refused = pytest.raises(PackError, match="does not see the files of INPUT")
    with refused, RayPool(cluster.address, local_cores=1, sight=own_sight) as pool:
        list(pool.map(held_task, orders))


def identified(folder: Path) -> Path:
    """Series of patients whose names stand in headers and paths, one of them truncated, one too short."""

    def change(seed: int) -> Callable[..., None]:
        def marked(z: int, dataset: object) -> None:
            set_pixels(dataset, stored_slice(z + seed, 256, 256))  # type: ignore[arg-type]
            dataset.PatientName = dataset.StudyDescription = dataset.AccessionNumber = PLANTED  # type: ignore[attr-defined]

        return marked

    for number in range(12):
        series = folder / f"{PLANTED}^{number}"
        write_series(series, 20, series=f"1.7.9999.{number}", patient=f"{PLANTED}{number}", change=change(100 * number))
    broken = next(iter(sorted((folder / f"{PLANTED}^3").iterdir())))
    broken.write_bytes(broken.read_bytes()[:5000])
    write_series(folder / f"{PLANTED}^short", 2, series="1.7.9999.100", patient=f"{PLANTED}S")
    return folder


def command(repository: Path, folder: Path, output: str, *more: str) -> list[str]:
    (folder / "key").write_bytes(KEY)
    tool = [sys.executable, str(repository / "tools/pack_shards.py"), str(folder / "in"), "--output"]
    return [*tool, str(folder / output), "--key-file", str(folder / "key"), "--shard-size", "3MB", *more]


@needs_ray
def test_with_a_machine_killed_the_set_is_the_same_and_ray_logs_name_no_one(
    cluster: Cluster, repository: Path, tmp_path: Path
) -> None:
    identified(tmp_path / "in")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    here = subprocess.run(command(repository, tmp_path, "here"), env=environment, capture_output=True)
    there = subprocess.Popen(
        command(repository, tmp_path, "there", "--ray", cluster.address), env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: list((tmp_path / "there").glob("shard-*.tar")) or there.poll() is not None)
    cluster.tell("kill")
    said, _ = there.communicate(timeout=120)
    assert (here.returncode, there.returncode) == (3, 3), said
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(list((tmp_path / "here").glob("shard-*.tar"))) >= 4
    assert "2 cores on 2 machines" in said
    assert PLANTED not in said
    cluster.tell("add")
    logs = [path for path in cluster.logs.rglob("*") if path.is_file()]
    assert len(logs) > 20
    assert not [path for path in logs if PLANTED.encode() in (data := path.read_bytes()) or b"1.7.9999" in data]


@needs_ray
@pytest.mark.fault
def test_ctrl_c_ends_all_and_the_next_run_goes_on(repository: Path, tmp_path: Path, token: None) -> None:
    identified(tmp_path / "in")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with tempfile.TemporaryDirectory() as logs:
        process = subprocess.Popen(
            command(repository, tmp_path, "out", "--ray", "local", "--workers", "1"), start_new_session=True,
            env={**environment, "RAY_TMPDIR": logs}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        until(lambda: list((tmp_path / "out").glob("shard-*.tar")) or process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130, said
        psutil.wait_procs(children, timeout=20)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "out/manifest.json").exists()
    again = subprocess.run(command(repository, tmp_path, "out"), env=environment, capture_output=True, text=True)
    assert again.returncode == 3
    assert "taken over from an interrupted run" in again.stderr
