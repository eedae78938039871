"""An install for a machine without internet: `make wheels` here, and there an install from that folder alone.

Needs a package index to collect from, so it is part of `make faults`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1200)]
IMPORT = "import dinox_io, dinox_model, dinox_train, torch; print(dinox_io.__file__, torch.__version__)"


def run(*command: str | Path, **environment: str) -> str:
    here = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=here | environment, cwd=Path.home()
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheels(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collected folder; collected with this machine's configuration of pip, installs below run without one."""
    folder = tmp_path_factory.mktemp("hospital") / "all wheels"
    collect = [sys.executable, str(repository / "tools/collect_wheels.py"), "--output", str(folder)]
    collected = subprocess.run(collect, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-3000:]
    assert list(folder.glob("dinox-*.whl"))
    if not list(folder.glob("torch-*.whl")):
        assert "Not in it: torch" in collected.stdout
        pytest.skip("torch belongs to this machine and cannot be fetched: the target would have to bring its own")
    return folder


def test_the_packages_install_into_a_fresh_environment(wheels: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    offline = {"PIP_CONFIG_FILE": os.devnull}
    run(python, "-m", "pip", "install", "--no-index", "--find-links", wheels, "dinox[dicom]", **offline)
    assert str(tmp_path / "env") in run(python, "-c", IMPORT)


def test_make_setup_works_from_the_folder(wheels: Path, repository: Path, tmp_path: Path) -> None:
    """`make setup WHEELS=folder` in a copy of the checkout, with pip's configuration pointing nowhere."""
    copy = tmp_path / "check out"
    leave = shutil.ignore_patterns(".venv", ".git", "wheels", "demo", "runs", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(repository, copy, ignore=leave)
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    base = getattr(sys, "_base_executable", sys.executable)
    run("make", "-C", copy, "setup", f"WHEELS={wheels}", f"PYTHON={base}", **nowhere)
    python = copy / ".venv" / "bin" / "python"
    assert str(copy) in run(python, "-c", IMPORT)
    again = run("make", "-C", copy, "setup", f"PYTHON={base}", **nowhere)
    assert "is ready" in again
    assert "installing" not in again
