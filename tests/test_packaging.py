"""The wheel: the three packages whole, typed, with the licence, and nothing else; built without a network."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

PACKAGES = ("dinox_io", "dinox_model", "dinox_train")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the whole checkout, tests, tools and documents with it."""
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "tests", "tools", "configs", "docs"):
        shutil.copytree(repository / name, copy / name, ignore=leave)
    (copy / "data").mkdir()
    (copy / "data" / "shard-000000.tar").write_bytes(bytes(512))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(output),
        str(copy),
    ]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (file,) = output.glob("*.whl")
    return zipfile.ZipFile(file)


def test_every_module_is_in_the_wheel_and_nothing_else(repository: Path, wheel: zipfile.ZipFile) -> None:
    here = {
        file.relative_to(repository).as_posix()
        for package in PACKAGES
        for file in (repository / package).rglob("*")
        if file.suffix in {".py", ".typed"} and "__pycache__" not in file.parts
    }
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert there == here
    assert {f"{package}/py.typed" for package in PACKAGES} <= there


def test_the_licence_travels(wheel: zipfile.ZipFile, repository: Path) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert wheel.read(name) == (repository / "LICENSE").read_bytes()


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    described = message_from_bytes(wheel.read(name))
    assert described["Name"] == "dinox"
    assert described["License-Expression"] == "Apache-2.0"
    required = " ".join(described.get_all("Requires-Dist", []))
    # These replace a CPU or ROCm torch by a CUDA one, or are not free to pass on.
    for never in ("torchvision", "torchaudio", "timm", "pylibjpeg[all]", "pylibjpeg-libjpeg"):
        assert never not in required


def test_it_installs_offline_and_its_modules_are_imported_from_there(
    wheel: zipfile.ZipFile, sockets_forbidden: Path, tmp_path: Path
) -> None:
    """An install from a folder alone (`make faults` does the same with all dependencies, where they can be had)."""
    folder, target = Path(str(wheel.filename)).parent, tmp_path / "installed"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    def run(*arguments: str | Path, path: str) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    offline = ("--no-index", "--no-deps", "--find-links", folder, "--target", target)
    run("-m", "pip", "install", *offline, "dinox", path=str(sockets_forbidden))
    code = """
import importlib.util, socket, dinox_io
assert socket.socket.__name__ == "Refused"
for name in ("dinox_io", "dinox_model", "dinox_train"):
    print(importlib.util.find_spec(name).origin)
"""
    found = run("-c", code, path=f"{target}:{sockets_forbidden}").split()
    assert found == [str(target / name / "__init__.py") for name in PACKAGES]
