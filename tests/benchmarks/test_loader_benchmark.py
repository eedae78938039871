"""loader.py from end to end on little data; its data, its meters, its way to empty the page cache."""

import json
import mmap
import multiprocessing
import os
import sys
import time
from pathlib import Path

import cases
import loader
import loader_data
import loader_figures
import loader_meters
import loader_order
import machine
import numpy as np
import our_loaders
import peer_loader_stores
import pytest
import result
from harness import Worker
from timing import TimedRun


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> loader_data.LoaderData:
    scratch = tmp_path_factory.mktemp("scratch")
    return loader_data.prepare(
        cases.phantom(quick=True, side=64), scratch, size_bytes=1_600_000, slices=24, tell=lambda _: None
    )


def test_from_end_to_end(
    little: loader_data.LoaderData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "load_cases", lambda folders, *, quick: cases.phantom(quick=True, side=64))
    monkeypatch.setattr(loader_data, "prepare", lambda *_, **__: little)
    given = ["--quick", "--scratch", str(tmp_path), "--output", str(tmp_path / "made.json")]
    assert loader.main([*given, "--plot", str(tmp_path / "made.png")]) == 0
    made = result.read(tmp_path / "made.json")
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["dinox random [1 core, cold]" if (os.cpu_count() or 1) > 1 else "dinox random [1 core, warm]"] > 0
    assert figures["order: resume, 1000000 windows"] > 0
    assert "no peers were measured: --peers was not given" in made.notes
    assert any(target.text == "index: bytes a slice" for target in made.targets)
    assert "| dinox runs, views |" in capsys.readouterr().out
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_slices_are_alike(little: loader_data.LoaderData) -> None:
    found = cases.phantom(quick=True, side=64)
    originals = {one.tobytes() for case in found for one in case.volume.hu}
    slices = [one for path in sorted((little.folder / "npy").glob("*.npy")) for one in np.load(path)]
    assert len({one.tobytes() for one in slices}) == len(slices) == little.facts["slices"]
    noisy = [one for one in slices if one.tobytes() not in originals]
    assert len(noisy) > len(slices) / 2
    nearest = min(
        int(np.abs(noisy[0].astype(int) - np.frombuffer(o, np.int16).reshape(64, 64)).max()) for o in originals
    )
    assert nearest == 1


def test_volumes_follow_from_the_cases_alone() -> None:
    found = cases.phantom(quick=True, side=64)
    once, again = (list(loader_data.volumes(found, 500_000, 24)) for _ in range(2))
    assert len(once) == 3
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_run_takes_what_it_decodes(little: loader_data.LoaderData) -> None:
    ours = our_loaders._Ours(str(little.folder), True, False)
    prepared = ours.loading("random", "random")()
    made, _ = ours.loader("small", "random", None, False)
    for _ in range(3):
        before = made.counters["decoded_bytes"]
        windows = prepared.run()
        assert made.counters["decoded_bytes"] - before == windows * 3 * 2 * 64 * 64
    made.close()


def test_wrong_pixels_are_not_timed(little: loader_data.LoaderData, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = our_loaders._Ours(str(little.folder), True, False)
    ours.loader("small", "random", None, False)
    monkeypatch.setattr(np, "array_equal", lambda *_: False)
    with pytest.raises(ValueError, match="does not give back what was packed"):
        ours.loading("random", "random")()
    for made, _ in ours.loaders.values():
        made.close()


def test_stores_of_numpy_alone(tmp_path: Path) -> None:
    hu = np.arange(5 * 8 * 8, dtype=np.int16).reshape(5, 8, 8)
    store = peer_loader_stores.STORES["npy memmap"]
    store.write()(hu, tmp_path / "0000")
    for name in ("npy memmap", "npy pread"):
        for mapped in (False, True):
            reader = peer_loader_stores.STORES[name].open(tmp_path, [hu.shape], mapped, 1)
            out = np.zeros((2, 3, 8, 8), np.int16)
            reader.read_many([(0, 0), (0, 2)], out)
            reader.close()
            assert np.array_equal(out, [hu[0:3], hu[2:5]])


def test_a_worker_says_what_is_missing(little: loader_data.LoaderData) -> None:
    arguments = {"folder": str(little.folder), "store": "array_record", "cores": 1, "quick": True, "cold": False}
    with Worker(sys.executable, "peer_loaders", {**arguments, "torch_path": ""}, environment="peers") as worker:
        assert "array_record" in worker.table("missing")


def test_meters_count_children(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(3_000_000))

    def work() -> None:
        (tmp_path / "data").read_bytes()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        time.sleep(2)

    before_s, before_bytes = loader_meters.cpu_s(), loader_meters.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    time.sleep(1.2)
    spent_s, read = loader_meters.cpu_s() - before_s, loader_meters.read_bytes() - before_bytes
    child.kill()
    child.join()
    assert 0.15 < spent_s < 1.0
    assert read > 3_000_000
    assert loader_meters.uss_bytes() > 1_000_000


def test_a_dropped_file_is_not_resident(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 << 20))
    loader_meters.write_out([path])
    assert loader_meters.resident_share([path]) == 1.0
    cold = loader_meters.Cold([path])
    cold()
    if machine.filesystem(tmp_path) == "tmpfs":
        pytest.skip("a file system in memory keeps its pages")
    assert cold.left == 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[0] is not None
        assert loader_meters.resident_share([path]) > 0


def test_a_cold_round_is_prepared_each_time_and_is_a_single_run() -> None:
    said: list[str] = []

    def run() -> float:
        said.append("run")
        return 1.0

    timed = TimedRun(run, before=lambda: said.append("before"))
    timed.warm_up(10.0)
    said.clear()
    assert timed.round().amount == 1.0
    assert timed.round().amount == 1.0
    assert said == ["before", "run"] * 2


def test_order_memory_does_not_grow_with_inflation() -> None:
    once, million = (loader_order.peak_bytes(inflation, 4) for inflation in (1, 10**6))
    assert million < 1.05 * once


def test_targets_name_contenders_that_exist() -> None:
    names = {f"{store}, {how}" for store in peer_loader_stores.STORES for how in ("users", "runs")}
    assert {one for members in loader_figures.FAMILIES.values() for one in members} <= names
    assert {family for limits in loader_figures.LIMITS.values() for family in limits} == set(loader_figures.FAMILIES)


def test_facts_are_kept(little: loader_data.LoaderData) -> None:
    facts = json.loads((little.folder / "facts.json").read_text("utf-8"))
    assert facts["raw_bytes"] == facts["slices"] * 2 * 64 * 64
    assert facts["ratio_with_noise"] > 1
