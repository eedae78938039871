"""`.ci/run` on a made-up machine: what it installs, the order of its stages, and how long it lets the last one run."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD_PYTHON = "exit 0"
OLD_PYTHON = "exit 1"
# Offers an old python3 and, of the newer ones, python3.11 alone.
APT_GET = f"""
case "$*" in
    *python3.12*) exit 100 ;;
    *python3.11-venv*) printf '#!/bin/sh\\n{GOOD_PYTHON}\\n' > "$MACHINE/python3.11"; chmod +x "$MACHINE/python3.11" ;;
esac
"""

Machine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def machine(repository: Path, tmp_path: Path) -> Machine:
    """Runs the script where nothing but the given programs (name=shell text) and a shell is; calls.txt notes calls."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(repository / ".ci/run", checkout / ".ci/run")

    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >> "$MACHINE/../calls.txt"\n{text}\n')
        path.chmod(0o755)

    def run(**given: str) -> subprocess.CompletedProcess[str]:
        for name in ("dirname", "env", "chmod"):
            (programs / name).parent.mkdir(exist_ok=True)
            (programs / name).symlink_to(str(shutil.which(name)))
        for name, text in given.items():
            program(programs / name.replace("_", "."), text)
        program(programs / "git", "exit 0")
        program(programs / "id", "echo 0")
        program(checkout / ".venv/bin/python", "exit 0")
        environment = {"PATH": str(programs), "MACHINE": str(programs)}
        return subprocess.run(
            [str(shutil.which("bash")), str(checkout / ".ci/run")], env=environment, capture_output=True, text=True
        )

    return run


def _calls(folder: Path, program: str) -> list[str]:
    lines = (folder / "calls.txt").read_text().splitlines()
    return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


def test_the_stages_and_the_time_of_the_last(machine: Machine, tmp_path: Path) -> None:
    done = machine(python3=GOOD_PYTHON, make="exit 0")
    assert done.returncode == 0, done.stderr
    assert _calls(tmp_path, "make") == ["setup", "test", "demo SHORT=1", "faults FAULTS_MINUTES=15"]
    assert _calls(tmp_path, "python") == [
        "tools/compile_kernels.py --check --minutes 5",
        "-m pytest --numprocesses auto --dist loadfile tests/io tests/model",
        "-m pytest tests/test_checkpoint_notebook.py -k demo",
        "-m pip install -q -c .venv/constraints.txt --editable .[hf,cluster] tensorboard",
        "-m pytest tests/model tests/train/test_watch_run.py tests/io/test_ray_pool.py "
        "-k huggingface or lora or tensorboard or ray_pool",
    ]


def test_a_stage_that_fails_ends_it(machine: Machine, tmp_path: Path) -> None:
    done = machine(python3=GOOD_PYTHON, make='[ "$1" != test ] || exit 2')
    assert done.returncode == 2
    assert _calls(tmp_path, "make") == ["setup", "test"]
    assert re.search(r"^=== tests: \d+ s, exit 2$", done.stdout, re.MULTILINE)


def test_where_python_is_too_old_a_newer_one_is_installed(machine: Machine, tmp_path: Path) -> None:
    done = machine(python3=OLD_PYTHON, make='echo "with $PYTHON"', **{"apt-get": APT_GET})
    assert done.returncode == 0, done.stderr
    assert "with python3.11" in done.stdout
    installs = [call.split()[-1] for call in _calls(tmp_path, "apt-get") if call.startswith("install")]
    assert installs == ["python3-venv", "python3.12-venv", "python3.11-venv"]


def test_without_any_good_python_it_says_so(machine: Machine) -> None:
    done = machine(python3=OLD_PYTHON, make="exit 0", **{"apt-get": "exit 0"})
    assert done.returncode == 1
    assert "no Python 3.11 or newer" in done.stderr
