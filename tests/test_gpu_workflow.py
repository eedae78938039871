"""The nightly CI on a GPU: what it calls exists and takes these arguments; only GitHub's own actions run beside it."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinox_train.config import load_config
from dinox_train.rehearsal import rehearsed

ALLOWED = {"actions/checkout", "actions/upload-artifact"}
PYTHON = ".venv/bin/python"


@pytest.fixture(scope="module")
def workflow(repository: Path) -> dict[str, Any]:
    found = yaml.safe_load((repository / ".github/workflows/gpu.yml").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    (job,) = workflow["jobs"].values()
    return job["steps"]


@pytest.fixture(scope="module")
def commands(steps: list[dict[str, Any]]) -> list[list[str]]:
    """The words of each command of our own."""
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines]


def test_it_runs_every_night_on_a_machine_of_ones_own(workflow: dict[str, Any]) -> None:
    on = workflow[True]  # YAML takes `on` for a truth value
    (night,) = on["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", night["cron"])
    assert "workflow_dispatch" in on
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    assert "vars.TORCH_INDEX" in job["env"]["TORCH_INDEX"]
    assert workflow["permissions"] == {"contents": "read"}


def test_nobody_elses_code_runs(steps: list[dict[str, Any]]) -> None:
    used = {step["uses"].partition("@")[0] for step in steps if "uses" in step}
    assert used == ALLOWED
    assert all(("uses" in step) != ("run" in step) for step in steps)


def test_what_it_calls_is_there(commands: list[list[str]], repository: Path) -> None:
    called = [" ".join(words[:3]) if words[1:2] == ["-m"] else words[1] for words in commands if words[0] == PYTHON]
    assert called == [
        *("tools/doctor.py", f"{PYTHON} -m pytest", "benchmarks/gpu_suite.py", f"{PYTHON} -m dinox_train"),
    ]
    assert all((repository / name).is_file() for name in called if not name.startswith(PYTHON))
    make = next(words for words in commands if words[0] == "make")
    assert make == ["make", "setup", "TORCH_INDEX=$TORCH_INDEX"]
    dry = ["make", "--dry-run", "setup", "TORCH_INDEX=https://example.org/x"]
    said = subprocess.run(dry, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert '--torch-index "https://example.org/x"' in said


def test_its_arguments_are_understood(commands: list[list[str]], repository: Path, monkeypatch: Any) -> None:
    import doctor

    monkeypatch.chdir(repository)
    of = {words[1]: words for words in commands if words[0] == PYTHON and words[1] != "-m"}
    words = of["tools/doctor.py"]
    options = doctor.parse(words[2 : words.index(">")])
    assert options.json
    assert load_config(options.config, options.overrides).device == "cuda"
    (trained,) = (words for words in commands if words[1:3] == ["-m", "dinox_train"])
    files = [trained[index + 1] for index, word in enumerate(trained) if word == "--config"]
    settings = [word for word in trained if "=" in word]
    config = load_config(files, settings)
    assert config.rehearsal is not None
    assert config.data.limit == 64
    small = rehearsed(config, Path(config.run.folder + "-rehearsal"))
    assert small.train.batch_size <= 64
    assert (small.device, small.precision) == ("cuda", "bf16")


def test_what_it_writes_is_kept_and_nothing_of_it_is_the_repositorys(
    steps: list[dict[str, Any]], commands: list[list[str]], repository: Path
) -> None:
    kept = steps[-1]["with"]["path"].split()
    written = [word for words in commands for word in words if word.startswith("bench/gpu/") and word.endswith(".json")]
    assert written
    assert "bench/gpu/*.json" in kept
    assert all(path.startswith("bench/") for path in kept)
    assert "/bench/" in (repository / ".gitignore").read_text().split()


def test_marked_tests_are_those_it_runs(commands: list[list[str]], repository: Path) -> None:
    assert [PYTHON, "-m", "pytest", "-m", "gpu"] in commands
    marked = [
        path.name for path in (repository / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text("utf-8")
    ]
    assert len(marked) >= 8
    # A test that skips by its own look at the GPU would not be among them.
    own = [
        path.name
        for path in (repository / "tests").rglob("test_*.py")
        if re.search(r"skipif\(not torch\.cuda\.is_available\(\)", path.read_text("utf-8"))
    ]
    assert own == []
