"""Small synthetic volumes and sets of shards, for every test of the format and of the loader; and a store for them."""

import hashlib
import http.client
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from dinox_io import cloud
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume
from tests.io.unreliable_store import PLACE, UnreliableStore

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

MakeVolume = Callable[..., Volume]
WriteSet = Callable[..., dict]


@pytest.fixture(scope="session")
def make_volume() -> MakeVolume:
    """number -> Volume; its pixels are smooth with noise, and slice z is the only one whose corner value is z."""

    def make(
        number: int, shape: tuple[int, int, int] = (6, 16, 20), *, patient: int | None = None, run: int = 0
    ) -> Volume:
        noise = np.random.default_rng(number * 100 + run).normal(0, 20, shape)
        hu = (noise + 40 * np.sin(np.arange(shape[2]) / 5) - 600).astype(np.int16)
        hu[:, 0, 0] = np.arange(shape[0])
        series = hashlib.sha256(b"series %d" % number).hexdigest()[:32]
        return Volume(
            id=f"{series}-{run}" if run else series,
            series=series,
            patient=hashlib.sha256(b"patient %d" % (number if patient is None else patient)).hexdigest()[:32],
            hu=hu,
            spacing_mm=(2.0, 0.7, 0.7),
            z_positions_mm=tuple(-10.0 + 2.0 * z for z in range(shape[0])),
            orientation=AXIAL,
            facts={"kernel": "B30f", "kvp": 120.0},
        )

    return make


@pytest.fixture(scope="session")
def write_set() -> WriteSet:
    """(folder, [[volumes of a shard], …], sides={id: side}, filter=…, previous=…) -> the committed manifest."""

    def write(
        folder: Path,
        shards: Sequence[Sequence[Volume]],
        *,
        sides: dict[str, str] | None = None,
        filter: str = "hilp",
        previous: dict | None = None,
    ) -> dict:
        folder.mkdir(exist_ok=True)
        first = len(previous["shards"]) if previous else 0
        summaries = []
        for number, volumes in enumerate(shards, start=first):
            with ShardWriter(folder / f"shard-{number:06d}.tar", config_digest="c" * 64) as writer:
                for volume in volumes:
                    writer.add(encode_volume(volume, filter=filter))
                summaries.append(writer.finish())
        ids = [volume["id"] for volume in previous["volumes"]] if previous else []
        ids += [volume.id for volumes in shards for volume in volumes]
        manifest = build_manifest(
            summaries,
            sides=dict.fromkeys(ids, "train") | (sides or {}),
            options={"filter": filter},
            rejected_by_code={"LOCALIZER": 2},
            config_digest="c" * 64,
            leaks=[],
            packer="tests",
            sources={"files": 10, "bytes": 1000},
            previous=previous,
        )
        return commit_set(folder, manifest)

    return write


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """HOST:PORT of an S3 server of moto."""
    pytest.importorskip("obstore", reason="needs the extra dinox[cloud]")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer
    running = server(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Credentials for nothing, no proxies; tries that follow each other at once."""
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "5ecret"), ("REGION", "eu-west-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setattr(cloud, "FIRST_WAIT_S", 0.01)
    return monkeypatch


@pytest.fixture
def store(moto: str, environment: pytest.MonkeyPatch) -> Iterator[UnreliableStore]:
    """The store that the environment names: moto, its objects of earlier tests gone, behind a proxy that can fail."""
    connection = http.client.HTTPConnection(moto)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/scans")):
        connection.request(method, path, headers={"Host": moto})
        assert connection.getresponse().read() is not None
    connection.close()
    proxy = UnreliableStore(moto)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.let_go.set()
    proxy.shutdown()
    proxy.server_close()
    thread.join()


@pytest.fixture
def upload(moto: str) -> Callable[..., None]:
    """(folder, names=all): copies files to PLACE, past the proxy."""
    from obstore.store import S3Store

    def copy(folder: Path, *names: str) -> None:
        bucket = S3Store("scans", prefix=PLACE.removeprefix("s3://scans/"), endpoint=f"http://{moto}")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if not names or name in names:
                bucket.put(name, path.read_bytes())

    return copy
