"""Where `make wheels` may write: what it would replace is refused first, in one line."""

import subprocess
import sys
from pathlib import Path

import collect_wheels
import pytest
import setup_environment
from environment.machine import SetupError


def test_a_new_folder_and_one_of_wheels_may_be_replaced(tmp_path: Path) -> None:
    collect_wheels.check_replaceable(tmp_path / "new")
    (tmp_path / "old.whl").touch()
    collect_wheels.check_replaceable(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SetupError, match="more than wheels"):
        collect_wheels.check_replaceable(tmp_path)


def test_an_output_that_is_a_file_is_refused_and_stays(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "wheels"
    file.write_text("mine")
    command = [sys.executable, str(repository / "tools/collect_wheels.py"), "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"wheels: {file} is no folder. Name a new one, or one that holds nothing but wheels.\n"
    assert file.read_text() == "mine"


def test_every_extra_of_setup_is_one_of_the_project(repository: Path) -> None:
    wanted = collect_wheels.wanted_packages(repository, "2.13.0+rocm7.2")
    assert any(line.startswith("python-gdcm") for line in wanted)
    assert any(line.startswith("pytest>") for line in wanted)
    assert not any(line.startswith("torch>") for line in wanted)


def test_triton_is_collected_with_a_cpu_build_of_torch_only(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_environment.platform, "system", lambda: "Linux")
    of_cpu, of_gpu = (collect_wheels.wanted_packages(repository, version) for version in ("2.13.0+cpu", "2.13.0"))
    assert [line for line in of_cpu if line not in of_gpu] == [setup_environment.TRITON_OF_CPU]
