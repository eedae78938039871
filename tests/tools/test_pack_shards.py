"""The command itself, as a user runs it: exit codes, help, output, kills, a full disk, and no patient anywhere."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pydicom.dataset import Dataset

from dinox_io import open_shards
from tests.io.dicom_factory import set_pixels, stored_slice, write_series

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def arguments(repository: Path) -> list[str]:
    return [sys.executable, str(repository / "tools" / "pack_shards.py")]


@pytest.fixture(scope="module")
def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository)}


@pytest.fixture(scope="module")
def command(arguments: list[str], environment: dict[str, str]) -> Command:
    def run(*options: object, **process: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*arguments, *map(str, options)], env=environment, capture_output=True, text=True, check=False, **process
        )  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack_shards", repository / "tools" / "pack_shards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def several(folder: Path, count: int, size: int = 96) -> None:
    for number in range(count):
        write_series(
            folder / f"s{number}", 6, series=f"1.7.{number}", patient=f"P{number}",
            change=lambda z, dataset, first=100 * number: set_pixels(dataset, stored_slice(first + z, size, size)),
        )  # fmt: skip


def test_help_is_for_newcomers(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in ("--output", "--workers", "--shard-size", "--min-slices", "--val-fraction", "--test-fraction",
                 "--split-seed", "--key-file", "--split-gaps", "--allow-tilt", "--allow-burned-in", "examples:",
                 "exit code:", "rejected.jsonl"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("1000", 1000), ("64 kib", 65536)],
)
def test_sizes(tool: ModuleType, text: str, size: int) -> None:
    assert tool.size_bytes(text) == size


def test_workers_default_to_the_cores_on_systems_without_affinity(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:  # macOS
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert tool.parser().parse_args(["in", "--output", "out"]).workers == 7


@pytest.mark.parametrize(("minimum", "modality", "code"), [(3, "CT", 1), (3, "MR", 0), (2, "CT", 0)])
def test_an_end_without_a_set_is_said_last(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], minimum: int, modality: str, code: int
) -> None:
    write_series(tmp_path / "in", 2, change=lambda _, dataset: setattr(dataset, "Modality", modality))
    out = tmp_path / "out"
    assert (
        tool.main([str(tmp_path / "in"), "--output", str(out), "--workers", "1", "--min-slices", str(minimum)]) == code
    )
    last = capsys.readouterr().out.splitlines()[-1]
    whole = minimum == 2
    assert (out / "manifest.json").exists() == last.startswith("Next: ") == whole
    assert last.startswith(f"There is no set in {out}") != whole


@pytest.mark.parametrize("bad", [["--shard-size", "12 apples"], ["--no-such-option"], ["--workers", "many"]])
def test_usage_errors_exit_with_2(tool: ModuleType, tmp_path: Path, bad: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path), "--output", str(tmp_path / "out"), *bad])
    assert ended.value.code == 2
    assert tool.main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2


def test_a_damaged_set_exits_with_2_and_no_traceback(command: Command, tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    assert command(tmp_path / "in", "--output", tmp_path / "out").returncode == 0
    (tmp_path / "out/shard-000000.tar").unlink()
    done = command(tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "error: the set in" in done.stderr
    assert "shard-000000.tar: cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_first_pack_with_its_own_key(command: Command, tmp_path: Path) -> None:
    write_series(tmp_path / "in/a", 4, series="1.1", patient="P1")
    write_series(tmp_path / "in/b", 2, series="1.2", patient="P2")
    done = command(tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "Packed 1 new volumes" in done.stdout
    assert "TOO_FEW_SLICES" in done.stdout
    assert "packing" in done.stderr
    key = tmp_path / "out/private/key"
    assert key.stat().st_mode & 0o777 == 0o600
    before = contents(tmp_path / "out")
    again = command(tmp_path / "in", "--output", tmp_path / "out")
    assert (again.returncode, contents(tmp_path / "out")) == (3, before)


def test_the_lidc_series_have_their_digests(command: Command, shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    for workers, out in ((1, "one"), (2, "two")):
        done = command(
            shared_data / "lidc_classic_uid_layout", shared_data / "idc_index_layout",
            "--output", tmp_path / out, "--workers", workers, "--key-file", tmp_path / "key",
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    cases = json.loads((shared_data / "expected.json").read_text())["cases"]
    expected = {
        volume["sha256_hu_i16le"]
        for case in cases
        if case["id"] in ("LIDC-IDRI-0001", "LIDC-IDRI-0002", "LIDC-IDRI-0314")
        for volume in case["expected_volumes"]
    }
    with open_shards(tmp_path / "one") as shards:
        assert {volume.digest for volume in shards.volumes} == expected


def test_no_patient_leaves_the_private_folder(command: Command, shared_data: Path, tmp_path: Path) -> None:  # F44
    def change(_: int, dataset: Dataset) -> None:
        for element in list(dataset):
            if element.VR in ("LO", "SH", "PN", "LT", "ST", "UT", "AE") and element.tag != 0x00280004:
                element.value = "ZZPHI"
        dataset.AccessionNumber = dataset.StudyDescription = dataset.PatientComments = "ZZPHI"
        dataset.PatientBirthDate = "19420228"
        dataset.KVP = "19420228"
        dataset.StudyInstanceUID = "1.19420228"

    write_series(tmp_path / "ZZPHI_in/ZZPHI", 4, change=change)
    write_series(tmp_path / "ZZPHI_in/ZZPHI two", 2, series="1.19420228", change=change)
    (tmp_path / "ZZPHI_in/ZZPHI notes.txt").write_text("ZZPHI 19420228")
    cut = write_series(tmp_path / "ZZPHI_in/ZZPHI cut", 3, series="1.3", change=change)[1]
    cut.write_bytes(cut.read_bytes()[:-9])
    done = command(shared_data / "derived/25_phi_everywhere", tmp_path / "ZZPHI_in", "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "Packed 2 new volumes" in done.stdout
    places = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    places |= {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith("private/")}
    places |= {f"the name of {name}": name.encode() for name in contents(tmp_path / "out")}
    for name, data in places.items():
        assert b"ZZPHI" not in data, name
        assert b"19420228" not in data, name
    assert b"ZZPHI" in contents(tmp_path / "out")["private/sources.jsonl"]


def test_a_full_disk_is_said_and_leaves_no_stump(command: Command, tmp_path: Path) -> None:  # F13
    several(tmp_path / "in", 3)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    done = command(tmp_path / "in", "--output", tmp_path / "out", "--workers", 1, preexec_fn=limit)
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert "free" in done.stderr
    assert not any(name.endswith((".tar", ".tmp")) or name == "manifest.json" for name in contents(tmp_path / "out"))
    assert command(tmp_path / "in", "--output", tmp_path / "out").returncode == 0


def kill_once(arguments: list[str], environment: dict[str, str], options: list[str], after: Callable[[], bool]) -> int:
    """Start a pack and SIGKILL it as soon as `after()`; returns its exit status."""
    process = subprocess.Popen(
        [*arguments, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not after():
        time.sleep(0.002)
    process.kill()
    return process.wait()


def test_a_killed_pack_leaves_the_set_as_it_was(  # F12
    arguments: list[str], environment: dict[str, str], command: Command, tmp_path: Path
) -> None:
    several(tmp_path / "in", 8)
    (tmp_path / "key").write_bytes(bytes(32))
    options = [str(tmp_path / "in"), "--shard-size", "100KB", "--workers", "2", "--key-file", str(tmp_path / "key")]
    assert command(*options, "--output", tmp_path / "whole").returncode == 0
    out = tmp_path / "out"
    started = time.monotonic()
    moments: list[Callable[[], bool]] = [
        lambda: (out / ".shard-000000.tar.tmp").exists(),
        lambda: (out / "shard-000001.tar").exists(),
        lambda: (out / "rejected.jsonl").exists(),
        lambda: time.monotonic() - started > 8,
    ]
    killed = 0
    for moment in moments:
        killed += kill_once(arguments, environment, [*options, "--output", str(out)], moment) == -signal.SIGKILL
        if (out / "manifest.json").exists():
            open_shards(out).close()
    assert killed >= 2
    assert command(*options, "--output", out).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
