"""The wheel: the three packages whole, typed, with the licence, and nothing else; built without a network.

With the extension in C where there is a compiler and Python's headers, and installed without it where there is none.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from dinox_io import filters

PACKAGES = ("dinox_io", "dinox_model", "dinox_train")


EXTENSION = "dinox_io/_filters.abi3.so"


@pytest.fixture(scope="module")
def sources(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the whole checkout, tests, tools and documents with it, nothing built."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in (*PACKAGES, "tests", "tools", "configs", "docs"):
        shutil.copytree(repository / name, copy / name, ignore=leave)
    (copy / "data").mkdir()
    (copy / "data" / "shard-000000.tar").write_bytes(bytes(512))
    return copy


def pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-build-isolation", "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    output = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", output, sources)
    (file,) = output.glob("*.whl")
    return zipfile.ZipFile(file)


def can_compile() -> bool:
    """Whether the compiler that this Python names, or CC, is there, and Python.h with it."""
    compiler = os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc")
    return bool(shutil.which(compiler.split()[0])) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def test_every_module_is_in_the_wheel_and_nothing_else(sources: Path, wheel: zipfile.ZipFile) -> None:
    here = {
        file.relative_to(sources).as_posix()
        for package in PACKAGES
        for file in (sources / package).rglob("*")
        if file.suffix in {".py", ".typed", ".json"}
    }
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert there - {EXTENSION} == here
    assert {f"{package}/py.typed" for package in PACKAGES} <= there


SAME_BITS = """
import numpy as np, dinox_io
from dinox_io import filters
print(dinox_io.__file__, filters.tier())
random = np.random.default_rng(0)
for shape in ((1, 1), (1, 100), (100, 1), (7, 33), (512, 512)):
    slice_hu = random.integers(-32768, 32768, shape).astype(np.int16)
    counts = np.zeros((2, 4096), np.int64)
    for name in filters.FILTERS:
        c, numpy = (filters.apply_filter(slice_hu, name, tier=tier) for tier in (filters.C, filters.NUMPY))
        assert np.array_equal(c, numpy)
        out = np.empty_like(slice_hu)
        filters.remove_filter(c, name, out, filters.Scratch(), filters.C)
        assert np.array_equal(out, slice_hu)
    for row, tier in zip(counts, (filters.C, filters.NUMPY)):
        filters.add_histogram(slice_hu, row, tier)
    assert np.array_equal(*counts)
"""


@pytest.mark.skipif(not can_compile(), reason="no C compiler, or no Python.h, on this machine")
def test_where_there_is_a_compiler_the_c_tier_is_built(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """One wheel for every Python from 3.11. Whether its extension is right, test_codec_filters.py asks further."""
    assert EXTENSION in wheel.namelist()
    assert "-cp311-abi3-" in Path(str(wheel.filename)).name
    wheel.extractall(tmp_path)  # of our own making, a moment ago
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "DINOX_FILTERS": "c"}
    ran = subprocess.run(
        [sys.executable, "-c", SAME_BITS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "dinox_io/__init__.py"), "c"]


@pytest.mark.skipif(not can_compile(), reason="no C compiler, or no Python.h, on this machine")
def test_an_editable_install_builds_it_beside_its_source(sources: Path, tmp_path: Path) -> None:
    """As `make setup` installs: the checkout then runs it."""
    copy = tmp_path / "sources"
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip("install", "--target", tmp_path / "installed", "--editable", copy)
    assert (copy / EXTENSION).is_file()


@pytest.mark.skipif(not (os.environ.get("CI") and can_compile()), reason="no CI, or no C compiler")
def test_ci_tests_the_c_tier() -> None:
    """Else the tests that need it would be skipped, and nobody would see."""
    assert filters.C is not None, filters.describe()


def test_without_a_compiler_it_installs_all_the_same(sources: Path, tmp_path: Path) -> None:
    """An ordinary and an editable install, with a compiler that is not there: NumPy runs, and it is said."""
    copy = tmp_path / "sources"
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    no_compiler = {"CC": str(tmp_path / "no-compiler")}
    pip("install", "--target", tmp_path / "ordinary", copy, **no_compiler)
    pip("install", "--target", tmp_path / "editable", "--editable", copy, **no_compiler)
    assert not list(tmp_path.rglob("_filters*.so"))
    # An editable install of this checkout would find its own library for any dinox_io: its finder must go.
    code = (
        "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]\n"
        "from dinox_io import codec; print(codec.tier(), codec.describe(), sep='|')"
    )
    for folder in (tmp_path / "ordinary", copy):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(folder)}
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert told.stdout.startswith("numpy|filters: NumPy (")
        assert "no compiler" in told.stdout


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
