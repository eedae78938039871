"""The doctor as a command: quick, private, stable; and what it reads of disk and configuration is true."""

import errno
import getpass
import json
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import doctor
import pytest
from checkup import checks, disk_trial, page
from checkup.disk_checks import PASSING
from checkup.machine import Disk
from checkup.wanted import checkpoint_bytes, config_of, kept_checkpoints

from dinox_train.__main__ import main
from dinox_train.fake import write_fake_set
from tests.tools.recorded_machines import write
from tests.train import conftest as of_runs


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_trial, "MOST_BYTES", 16 << 20)
    found_disk = disk_trial.try_disk(tmp_path / "not/there/yet")
    assert isinstance(found_disk, Disk)
    assert found_disk.trouble is None
    assert (found_disk.write_bytes_per_s or 0) > 0
    assert (found_disk.read_bytes_per_s or 0) > 0
    assert list(tmp_path.iterdir()) == []
    mounts = "/dev/sda1 / ext4 rw 0 0\ntmpfs /run/my\\040runs tmpfs rw 0 0\nnas:/a /run/my\\040runs/far nfs4 rw 0 0\n"
    root = write(tmp_path, {"proc/self/mounts": mounts})
    for folder, kind in (("/run/my runs/x", PASSING[0]), ("/run/my runs/far/x", "nfs4"), ("/home/x", "ext4")):
        assert disk_trial.file_system(Path(folder), root) == kind


def test_a_disk_that_is_mounted_read_only_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Such a disk refuses a deletion also where there is nothing to delete.
    monkeypatch.setattr(disk_trial, "_write", refuses)
    monkeypatch.setattr(Path, "unlink", refuses)
    assert disk_trial.try_disk(tmp_path).trouble == "Read-only file system"


small_config, small_set, tiny_preset = of_runs.small_config, of_runs.small_set, of_runs.tiny_preset  # fixtures


def test_what_a_run_asks_for_is_what_its_checkpoints_take(
    tmp_path: Path, repository: Path, small_config: Path, small_set: Path, tiny_preset: None
) -> None:
    settings = [f"data.shards={small_set}", f"run.folder={tmp_path / 'run'}", "train.updates=1"]
    assert main(["--config", str(small_config), *settings]) == 0
    written = sum(
        path.stat().st_size for path in (tmp_path / "run/checkpoints/step-00000001").rglob("*") if path.is_file()
    )
    assert written == pytest.approx(checkpoint_bytes(config_of([str(small_config)], settings)), rel=0.03)
    config = str(repository / "configs/demo.yaml")
    assert kept_checkpoints(config_of([config], [])) == 3
    assert kept_checkpoints(config_of([config], ["checkpoint.keep_every=50"])) == 2 + 4 + 1


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def this_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of this machine, with a disk and a set."""
    folder = tmp_path_factory.mktemp("doctor")
    shards = write_fake_set(folder / "shards", {0: "train"})
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(map(str, words)))
        patch.setattr(disk_trial, "MOST_BYTES", 8 << 20)
        code = doctor.main(["--json", "--output", str(folder), "--shards", str(shards)])
    made = json.loads("\n".join(lines))
    assert code == (1 if made["verdict"] == "fail" else 0)
    return made


def test_this_machine(this_machine: dict[str, Any]) -> None:
    assert this_machine["version"] == page.VERSION
    assert set(this_machine) == {"version", "verdict", "device", "seconds", "findings", "unread", "machine"}
    ids = [finding["id"] for finding in this_machine["findings"]]
    assert {"python", "torch", "devices", "environment", "kernel", "attention", "products", "copies"} <= set(ids)
    assert {"memory", "open-files", "disk", "disk-room", "disk-speed"} <= set(ids)
    assert this_machine["machine"]["wanted"]["shards"] == 1
    assert this_machine["machine"]["wanted"]["window_bytes"] > 0


def test_the_json_can_be_handed_on(this_machine: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(this_machine)
    names = [platform.node(), str(Path.home()), str(Path.cwd()), "doctor0", str(tmp_path.parent)]
    with suppress(KeyError, OSError):  # a user without a name
        names.append(getpass.getuser())
    for name in names:
        if len(name) > 4:  # `root` and `/` are words of file systems, too
            assert name not in text
    assert not re.search(r"UUID=|root=", text)


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--shards", str(tmp_path)]) == 2
    assert "manifest" in capsys.readouterr().err
    assert doctor.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        doctor.main(["seed=1"])
    assert caught.value.code == 2


def test_ids_are_stable() -> None:
    """An id that is taken away or changes its meaning needs another page.VERSION."""
    sources = (Path(checks.__file__).parent).glob("*_checks.py")
    ids = {
        name for path in sources for name in re.findall(r'(?:ok|warn|fail|Unread)\(\s*"([a-z-]+)"', path.read_text())
    }
    assert ids == {
        *("python", "torch", "devices", "environment", "triton", "compiler", "filters"),
        *("kernel", "firmware", "rocm", "gtt", "power-plan", "kernel-log", "sleep", "restarts"),
        *("temperatures", "power-limit", "memory-errors", "link", "attention", "products", "copies"),
        *(
            "processors",
            "memory",
            "memory-limit",
            "swap",
            "overcommit",
            "open-files",
            "disk",
            "disk-room",
            "disk-speed",
        ),
    }


@pytest.mark.gpu
def test_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    made = json.loads(capsys.readouterr().out)
    found = {finding["id"]: finding for finding in made["findings"]}
    assert made["device"] == "cuda:0"
    assert found["torch"]["status"] == "ok"
    assert found["attention"]["status"] == "ok", found["attention"]
    assert made["machine"]["trials"]["copies"]["device"] > made["machine"]["trials"]["copies"]["host"] / 4
    assert set(made["machine"]["trials"]["tflops"]) == {"forward", "grad_input", "grad_weight"}
