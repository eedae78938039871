"""The command itself, as a user runs it: exit codes, help, output, kills, a full disk, and no patient anywhere."""

import importlib.util
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packing.options import size_bytes
from pydicom.dataset import Dataset

from dinox_io import codec, open_shards
from dinox_io.output import OutputFolder
from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.small_packs import SameProcess

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
                 "--split-seed", "--key-file", "--split-gaps", "--allow-tilt", "--allow-burned-in", "--preset",
                 "--nifti-patient", "--about", "--part", "--merge", "--remove",
                 "INPUT may be given and is not read", "130", "examples:",
                 "exit code:", "rejected.jsonl"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("1000", 1000),
        ("64 kib", 65536),
        ("2TB", 2 * 10**12),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


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


@pytest.mark.parametrize(
    "bad",
    [
        ["--shard-size", "12 apples"],
        ["--no-such-option"],
        ["--workers", "many"],
        ["--preset", "tiny"],
        ["--part", "3/2", "--key-file", "k"],
        ["--part", "1/2"],
        ["--part", "1/2", "--key-file", "k", "--merge"],
        ["--merge", "--remove", "0" * 32],
        ["--about", "no_such_file.yaml"],
        ["--output", ""],
        ["--output", " "],
    ],
)
def test_usage_errors_exit_with_2(tool: ModuleType, tmp_path: Path, bad: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path), "--output", str(tmp_path / "out"), *bad])
    assert ended.value.code == 2
    assert tool.main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("option", ["--workers", "--min-slices", "--shard-size"])
def test_the_one_option_that_is_wrong_is_named(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    write_series(tmp_path / "in", 3)
    assert run(tmp_path / "in", "--output", tmp_path / "out", option, 0) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {option} must be at least 1, not 0\n")
    assert not (tmp_path / "out").exists()


def test_the_next_command_can_be_pasted(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "my scans; $HOME", tmp_path / "my 'set'"
    write_series(source, 3)
    assert run(source, "--output", out) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line, comments=True) == ["Next:", "python", "tools/verify_shards.py", str(out)]
    assert line.endswith("--against INPUT")
    assert "scans" not in line


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
    assert "Packed 1 new volume. " in done.stdout
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
            if element.VR in ("LO", "SH", "PN", "LT", "ST", "UT", "AE") and element.tag not in (0x00280004, 0x00281054):
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


def mounted(folder: Path, *options: str) -> bool:
    """Mount a file system in memory; False where this may not be done."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    if not mounted(folder, "-o", "size=400k"):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_is_said_and_room_lets_it_go_on(
    command: Command, small_disk: Path, tmp_path: Path
) -> None:  # F13
    several(tmp_path / "in", 8)
    options = (tmp_path / "in", "--output", small_disk / "out", "--shard-size", "100KB", "--workers", 1)
    done = command(*options)
    assert done.returncode == 2, done.stdout
    assert "no space left for" in done.stderr
    assert "bytes were to be written" in done.stderr
    assert "Traceback" not in done.stderr
    names = contents(small_disk / "out")
    assert "manifest.json" not in names
    assert not any(name.endswith(".tmp") for name in names)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = command(*options)
    assert done.returncode == 0, done.stderr
    assert "taken over from an interrupted run: " in done.stderr


def test_a_read_only_file_system_is_said(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path / "in", 3)
    if not mounted(tmp_path / "closed", "-o", "ro"):
        pytest.skip("no file system can be mounted here")
    try:
        assert tool.main([str(tmp_path / "in"), "--output", str(tmp_path / "closed/out"), "--workers", "1"]) == 2
    finally:
        subprocess.run(["umount", str(tmp_path / "closed")], check=True)
    assert "Read-only file system. Check its permissions" in capsys.readouterr().err


def test_a_second_packer_is_told_so(command: Command, tmp_path: Path) -> None:  # F14
    write_series(tmp_path / "in", 3)
    with OutputFolder(tmp_path / "out").held():
        done = command(tmp_path / "in", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "another packer is at work on" in done.stderr
    assert command(tmp_path / "in", "--output", tmp_path / "out").returncode == 0


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process, without workers."""
    monkeypatch.setattr("dinox_io.pack.WorkerPool", SameProcess)
    return lambda *arguments: tool.main([str(argument) for argument in arguments])


def test_parts_are_packed_and_united(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several(tmp_path / "in", 4, 20)
    (tmp_path / "key").write_bytes(bytes(32))
    out, options = tmp_path / "out", (tmp_path / "in", "--key-file", tmp_path / "key")
    assert run(*options, "--output", tmp_path / "whole") == 0
    for number in (0, 1):
        assert run(*options, "--output", out, "--part", f"{number}/2") == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("Next, when all parts are done: python tools/pack_")
    assert run("--merge", "--output", out) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"Next: python tools/verify_shards.py {out}   # ")
    with open_shards(out) as united, open_shards(tmp_path / "whole") as whole:
        assert [(v.id, v.digest, v.split) for v in united.volumes] == [(v.id, v.digest, v.split) for v in whole.volumes]
    assert run(tmp_path / "in", "--merge", "--output", out) == 0
    assert run("--merge", "--output", tmp_path / "in") == 2


def test_presets_differ_in_size_and_say_what_filters(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several(tmp_path / "in", 2)
    sizes = {}
    for preset in ("small", "fast"):
        assert run(tmp_path / "in", "--output", tmp_path / preset, "--preset", preset) == 0
        assert codec.describe() in capsys.readouterr().err
        manifest = json.loads((tmp_path / preset / "manifest.json").read_bytes())
        assert (manifest["options"]["filter"], manifest["options"]["level"]) == codec.PRESETS[preset]
        sizes[preset] = manifest["counts"]["shard_bytes"]
    assert sizes["small"] < sizes["fast"]
    several(tmp_path / "in", 3)
    assert run(tmp_path / "in", "--output", tmp_path / "small", "--preset", "fast") == 0
    with open_shards(tmp_path / "small", verify="always") as shards:
        assert all(shards.read(volume, 0, 6).shape == (6, 96, 96) for volume in shards.volumes)


def test_what_the_data_set_is_stands_in_the_manifest(run: Callable[..., int], tmp_path: Path) -> None:
    def about() -> object:
        return json.loads((out / "manifest.json").read_bytes())["about"]

    several(tmp_path / "in", 1, 20)
    file, out = tmp_path / "about.yaml", tmp_path / "out"
    file.write_text("name: made up\nlicence: CC0-1.0\nweights_may_be_released: no\n")
    assert run(tmp_path / "in", "--output", out, "--about", file) == 0
    assert about() == {"licence": "CC0-1.0", "name": "made up", "weights_may_be_released": "no"}
    before = contents(out)
    assert run(tmp_path / "in", "--output", out) == 0
    assert contents(out) == before
    file.write_text("name: another\nlicence: CC0-1.0\nweights_may_be_released: ask\n")
    assert run(tmp_path / "in", "--output", out, "--about", file) == 0
    assert about() == {"licence": "CC0-1.0", "name": "another", "weights_may_be_released": "ask"}
    assert len(list((out / "manifests").iterdir())) == 1


def test_a_patient_withdraws(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path / "in", 3, 20)
    out = tmp_path / "out"
    assert run(tmp_path / "in", "--output", out) == 0
    with open_shards(out) as shards:
        patient = shards.volumes[0].patient
    assert run("--output", out, "--remove", "f" * 32) == 2
    assert "has the pseudonym" in capsys.readouterr().err
    assert run("--output", tmp_path / "nowhere", "--remove", patient) == 2
    assert not (tmp_path / "nowhere").exists()
    assert run("--output", out, "--remove", patient) == 0
    assert f"Removed {patient}: 1 series" in capsys.readouterr().out
    several(tmp_path / "in", 4, 20)
    assert run(tmp_path / "in", "--output", out, "--remove", patient) == 0
    said = capsys.readouterr().out
    assert "was removed before" in said
    assert "Packed 1 new volume. " in said
    assert "6 files  WITHDRAWN" in said
    for name, data in contents(out).items():
        assert patient.encode() not in data, name
