"""The knee's measurements on a small set and network: what each measures, how a process that fails is known, and the
command from end to end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import knee
import numpy as np
import psutil
import pytest
import torch
from knee_search import compute_rate, copies, decode_rate, instruments, probe, process, storage_rate
from knee_search.coupled import Watch, warm_updates
from knee_search.inflation import InflatedSet
from knee_search.points import CRASHED, OK, OUT_OF_MEMORY, TIMED_OUT
from knee_search.process import Ended, Interrupted, Stop, status_of
from knee_search.settings import Settings
from knee_search.worker import FOLDER

import dinox_io
from dinox_model import PRESETS
from dinox_train.config import difference, load_config
from dinox_train.fake import write_fake_set
from dinox_train.feed import Feed
from dinox_train.run import log

SMALL = """
device: cpu
views: {global_size: 32, local_size: 16, num_local: 2}
model: {preset: vit_ti}
objective: {prototypes: 64, head_hidden: 64, head_bottleneck: 32}
optimizer: {last_layer_frozen_updates: 1}
schedule: {warmup_updates: 2}
train: {updates: 9, batch_size: 4}
data: {pool_mib: 64}
"""
REQUEST = {"overrides": [], "storage_mbps": None, "inflation": 1, "copies": [], "given": {}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_set(tmp_path_factory.mktemp("knee") / "shards")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(f"{SMALL}\n")
    full = file.with_name("full.yaml")
    full.write_text(SMALL.replace("data: {", f"data: {{shards: {shards}, "))
    return full


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    yield
    log.handlers.clear()


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """What is measured in this process has a network of two narrow blocks: its size shows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        vit = replace(PRESETS["vit_ti"], num_layers=2, width=64, num_heads=2, mlp_hidden=128)
        patch.setitem(PRESETS, "vit_ti", vit)
        yield


@pytest.fixture(scope="module")
def answers(narrow: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the measurements that need no process of their own give, each made once."""
    folder, file = str(tmp_path_factory.mktemp("measured")), str(config)
    two = ["train.accumulation=2", "data.threads=1"]
    found = {
        "probe": probe.measure(file, [], folder),
        "decode": decode_rate.measure(file, ["data.threads=1"], folder, seconds=0.2),
        "compute": compute_rate.measure_alone(file, two, folder, seconds=0.2),
        "beside": compute_rate.measure_beside(file, two, folder, seconds=0.05),
    }
    return json.loads(json.dumps(found))


def test_the_probe_knows_machine_and_set(answers: dict[str, dict[str, Any]], shards: Path) -> None:
    found = answers["probe"]
    assert found["set"]["window_bytes"] == 3 * 2 * 256 * 256
    assert found["set"]["windows"] == 9 * 24
    assert found["set"]["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert found["run_slices"] == 8 + 2
    assert min(found["parameters"], found["flops_per_image"], found["activation_bytes_per_image"]) > 0
    assert found["memory_bytes"] <= psutil.virtual_memory().total


def test_decoding_counts_what_it_read(answers: dict[str, dict[str, Any]]) -> None:
    found = answers["decode"]
    assert found["windows"] == 4 * len(found["batch_s"])
    assert found["windows_per_s"] == pytest.approx(found["windows"] / sum(found["batch_s"]))
    assert found["slice_bytes"] == 2 * 256 * 256
    slices = found["decoded_bytes"] / found["slice_bytes"] / found["windows"]
    assert 0.5 < slices < 3.1, "3 slices a window at most, fewer where runs share them"
    assert found["decode_s"] + found["unfilter_s"] + found["read_s"] < 2 * sum(found["batch_s"])


def test_compute_alone_and_beside(answers: dict[str, dict[str, Any]]) -> None:
    alone, beside = answers["compute"], answers["beside"]
    assert len(alone["update_s"]) >= compute_rate.LEAST_UPDATES
    assert sum(alone["update_s"]) >= 0.2
    assert {"views", "teacher", "student", "backward", "optimizer"} <= alone["stage_s"].keys()
    assert sum(alone["stage_s"].values()) < sum(alone["update_s"]) / len(alone["update_s"]) * 1.05
    for name in ("update_alone_s", "update_beside_s", "loader_alone", "loader_beside"):
        assert len(beside[name]) >= compute_rate.ROUNDS
        assert min(beside[name]) > 0


def test_storage_is_cold_only_where_the_cache_was_empty(shards: Path, tmp_path: Path) -> None:
    size = copies.size_of(copies.shard_files(shards))
    found = storage_rate.measure(
        str(shards), read_bytes=100_000, threads=[1, 2], cold_bytes=3 * size, seconds=5.0, scratch=str(tmp_path)
    )
    assert found["copies"] == 2
    assert found["files_bytes"] == 3 * size
    assert not list(shards.parent.glob(f"{copies.PREFIX}*")), "the copies were not removed"
    cold, warm = found["rates"][:2], found["rates"][2:]
    assert [one["threads"] for one in cold] == [one["threads"] for one in warm] == [1, 2]
    for one in cold:
        assert one["state"] == ("cold" if one["resident"] <= 0.05 else "warm" if one["resident"] >= 0.95 else "mixed")
        assert one["resident_after"] > 0.5
        assert one["bytes"] > 2 * size
    assert {one["state"] for one in warm} == {"warm"}


def test_an_inflated_set_holds_the_same_windows(shards: Path) -> None:
    with dinox_io.open_shards(shards) as plain:
        inflated = InflatedSet([plain], 5)
        assert len(inflated.volumes) == 5 * 12
        assert len({volume.id for volume in inflated.volumes}) == 60
        assert inflated.slice_size == plain.slice_size
        with dinox_io.Loader([(inflated, 1.0)], batch_size=32, threads=1, seed=1, pool_bytes=2**26) as loader:
            assert loader.num_windows == (5 * 9 * 24,)
            for batch in (next(loader) for _ in range(4)):
                for image, volume, center in zip(batch.images, batch.volume, batch.center, strict=True):
                    assert inflated.volumes[volume].split == "train"
                    assert np.array_equal(image, plain.read_window(int(volume) % 12, int(center)))
        with pytest.raises(ValueError, match="at least once"):
            InflatedSet([plain], 0)


def test_pinning_is_the_gpus_alone() -> None:
    for pin in ("auto", "on", "off"):
        assert not Feed(torch.device("cpu"), pin=pin).pins


# --- metrics


def test_a_watch_counts_updates_after_the_warm_ones(tmp_path: Path) -> None:
    watch = Watch(batch_size=8, skip=2, seconds=4.0)
    assert watch(tmp_path) is None
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()

    def line(update: int, seconds: float) -> str:
        sums = dict.fromkeys(("read_bytes", "decoded_bytes", "read_s", "decode_s", "unfilter_s", "decoded_again"), 1)
        figures = {"images_per_s": 8 / seconds, "data_wait_fraction": 0.25, "stage_s": {"views": 0.5}}
        memory = {"memory_bytes": update, "host_memory_bytes": 2 * update, "loader_threads": 1}
        return json.dumps({"update": update, **figures, **memory, **sums})

    lines = [line(1, 50.0), line(2, 20.0), *(line(update, 1.0) for update in range(3, 7))]
    text = "\n".join(lines)
    file.write_text(text[:-5])
    assert watch(tmp_path) is None, "the last line is not whole yet"
    file.write_text(text + "\n")
    found = watch(tmp_path)
    assert found is not None
    assert found["update_s"] == pytest.approx([1.0] * 4)
    assert (found["waits"], found["memory_bytes"], found["first_update"], found["read_s"]) == (0.25, 6, 3, 4)


def test_what_was_made_ahead_is_waited_out() -> None:
    one = Settings(
        batch_size=16, precision="fp32", micro_batch=4, threads=1, prefetch_mib=64, pool_mib=64, pin="auto",
        compile="off", checkpointing="none",
    )  # fmt: skip
    assert warm_updates(one, 4 << 20) == 2 + 1  # 4 micro-batches ahead are one update
    assert warm_updates(one, 1 << 20) == 2 + 2


# --- processes


def test_how_a_process_ended() -> None:
    assert (
        status_of(1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", False) == OUT_OF_MEMORY
    )
    assert status_of(1, "torch.OutOfMemoryError: CUDA out of memory", False) == OUT_OF_MEMORY
    assert status_of(-signal.SIGKILL, "", False) == OUT_OF_MEMORY
    assert status_of(-signal.SIGSEGV, "Segmentation fault", False) == CRASHED
    assert status_of(None, "", True) == TIMED_OUT


def test_a_process_that_fails_is_told_by_what_it_said(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)  # its paths are those of the folder where the user is
    (shards.parent / "machine.py").write_text("raise ImportError('a module of the user')")
    given = {"folder": shards.name, "read_bytes": 10_000, "threads": [1], "cold_bytes": 1, "seconds": 0.1}
    with Stop() as stop:
        ended = process.measure("storage", REQUEST | {"given": given}, timeout_s=60, stop=stop)
        assert (ended.status, ended.answer) == (CRASHED, None)
        assert "scratch" in ended.said
        given["scratch"] = str(tmp_path)
        ended = process.measure("storage", REQUEST | {"given": given}, timeout_s=60, stop=stop)
        assert ended.status == OK
        assert ended.answer["rates"]
        slow = REQUEST | {"given": given | {"seconds": 60}, "storage_mbps": 0.001}
        ended = process.measure("storage", slow, timeout_s=1.5, stop=stop)
        assert ended.status == TIMED_OUT
        stop.received = signal.SIGINT
        with pytest.raises(Interrupted):
            process.measure("storage", slow, timeout_s=60, stop=stop)
    assert not [child for child in psutil.Process().children() if "knee_search" in " ".join(child.cmdline())]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]) -> list[str]:
    """The first run is a process; the rest was measured before. The kinds that were asked for."""
    kinds: list[str] = []
    ran: list[Ended] = []

    def measured(kind: str, request: dict[str, Any], **how: Any) -> Ended:
        kinds.append(kind)
        if kind == "run":
            ran.append(process.measure(kind, request, **how) if not ran else ran[0])
            return ran[-1]
        answer = storage_rate.measure(**request["given"]) if kind == "storage" else answers[kind]
        return Ended(OK, answer, "", 1.0)

    monkeypatch.setattr(instruments, "measure", measured)
    monkeypatch.setattr(knee, "INFLATED_BATCHES", 128)
    return kinds


def command(config: Path, shards: Path, output: Path, *more: str) -> list[str]:
    axes = ["--micro-batch", "4", "--threads", "1", "--prefetch-mib", "64", "--checkpointing", "none"]
    places = ["--config", str(config), "--shards", str(shards), "--output", str(output)]
    return [*places, "--minutes", "0.05", *axes, *more]


def test_from_end_to_end(
    config: Path, shards: Path, tmp_path: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "knee"
    assert knee.main(command(config, shards, output)) == 0
    assert here == ["probe", "decode", "storage", "compute", "beside", "run", "run"]
    result = json.loads((output / "knee.json").read_text())
    said = capsys.readouterr().out
    assert result["sentence"] in said
    assert result["complete"]
    assert "virtual inflation" in result["set"]["label"]
    assert result["knee"]["windows_per_s"] > 0
    assert result["noise"] is not None
    assert {path.name for path in output.iterdir()} == {
        "knee.json", "knee.html", "overlay.yaml", "coupled.png", "parts.png", "points.jsonl", "measured.yaml",
    }  # fmt: skip
    for file in output.rglob("*"):
        if file.suffix in (".html", ".json"):
            assert str(shards) not in file.read_text(), "a folder of the user's"
    overlaid = load_config([config, output / "overlay.yaml"])
    assert difference(load_config([config]), overlaid) == []
    # The same command measures nothing anew.
    here.clear()
    assert knee.main(command(config, shards, output)) == 0
    assert here == []
    assert json.loads((output / "knee.json").read_text())["knee"] == result["knee"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--micro-batch", "3"], "none divides"),
        (["--minutes", "0"], "must be above 0"),
        (["--stage", "2"], "the run has 1"),
        (["train.batches=4"], "unknown key"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    config: Path, shards: Path, tmp_path: Path, more: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert knee.main(command(config, shards, tmp_path / "knee", *more)) == 2
    assert words in capsys.readouterr().err


def test_a_set_that_is_none_is_told(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knee.main(command(config, tmp_path / "nothing", tmp_path / "knee")) == 1
    assert "error:" in capsys.readouterr().err


def test_a_run_takes_its_folder_from_the_measurement() -> None:
    assert FOLDER == "@FOLDER"


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_it_goes_on(config: Path, shards: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "knee"
    line = [sys.executable, "benchmarks/knee.py", *command(config, shards, output)]
    environment = os.environ | {"PYTHONPATH": str(Path(knee.__file__).parent.parent)}
    running = subprocess.Popen(line, cwd=Path(knee.__file__).parent.parent, env=environment)
    points = output / "points.jsonl"
    until = time.monotonic() + 120
    while not (points.exists() and len(points.read_bytes().splitlines()) >= 4) and time.monotonic() < until:
        time.sleep(0.05)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(number)
    code = running.wait(60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "a measurement outlived the search"
    before = points.read_bytes()
    if number != signal.SIGKILL:
        assert not json.loads((output / "knee.json").read_text())["complete"]
    done = subprocess.run(line, cwd=Path(knee.__file__).parent.parent, env=environment, timeout=300)
    assert done.returncode == 0
    assert points.read_bytes().startswith(before.rpartition(b"\n")[0])
    assert json.loads((output / "knee.json").read_text())["complete"]
