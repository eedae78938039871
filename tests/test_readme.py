"""The README keeps its word: every command in it exists and runs, every link leads somewhere.

`make test` (which runs this) and `make demo` (which `.ci/run` runs in its short form) are not run here, only looked up.
The others run as they stand, in order, but for folders (temporary ones), the user's files (a small phantom) and the
size of the training run (two updates of a small network).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_RUN_HERE = {"make test", "make demo", "make demo DATA=/path/to/dicom"}
# Laid over the README's training command, so that it takes seconds on two cores without a GPU.
SMALL_RUN = """
device: cpu
precision: fp32
model: {preset: vit_ti}
views: {global_size: 64, local_size: 32, num_local: 2}
objective: {prototypes: 64, head_hidden: 32, head_bottleneck: 16}
train: {updates: 2, batch_size: 8, accumulation: 1}
checkpoint: {every: 2}
evaluate: {every: 2, windows: 8}
"""


def blocks(repository: Path, language: str) -> list[str]:
    text = (repository / "README.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(repository: Path) -> list[str]:
    return [line for block in blocks(repository, "bash") for line in block.splitlines() if line.strip()]


def make_targets(repository: Path) -> set[str]:
    return set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text("utf-8"), re.MULTILINE))


def run(command: list[str], cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{shlex.join(command)}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def home(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands run: it sees the tools, configs and packages, and a phantom as the user's DICOM."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tools", "configs", "dinox_io", "dinox_model", "dinox_train"):
        (folder / name).symlink_to(repository / name)
    (folder / "small_run.yaml").write_text(SMALL_RUN, "utf-8")
    phantom = [sys.executable, "tools/make_phantom.py", "dicom", "--patients", "4", "--size", "64", "--slices", "12"]
    run(phantom, folder)
    return folder


def on_a_small_scale(command: str) -> list[str]:
    """The README's command with this interpreter, the phantom, and for training the small run laid over its config."""
    words = shlex.split(command.replace(".venv/bin/python", sys.executable).replace("/path/to/dicom", "dicom"))
    if "dinox_train" in words:
        after_config = words.index("--config") + 2
        words[after_config:after_config] = ["--config", "small_run.yaml"]
    return words


def test_every_make_target_that_is_named_exists(repository: Path) -> None:
    named: set[str] = set()
    for file in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/hardware.md", ".ci/run"):
        text = (repository / file).read_text("utf-8")
        named |= set(re.findall(r"(?:`|^|stage \"\w+\" |&& )make ([a-z]+)", text, re.MULTILINE))
    assert {"demo", "test", "setup", "wheels", "faults"} <= named
    assert named <= make_targets(repository)


def test_make_alone_lists_the_targets(repository: Path) -> None:
    shown = run(["make", "--no-print-directory"], repository)
    assert set(re.findall(r"^  make ([a-z]+)", shown, re.MULTILINE)) == make_targets(repository)


def test_commands_are_run_or_excused(repository: Path) -> None:
    listed = commands(repository)
    assert set(listed) >= NOT_RUN_HERE, "an excuse that the README does not need any more"
    rest = [command for command in listed if command not in NOT_RUN_HERE]
    assert rest
    assert not [command for command in rest if command.startswith("make ")]
    for command in NOT_RUN_HERE:
        run(["make", "--dry-run", *shlex.split(command)[1:]], repository)


def test_the_commands_run_and_then_the_python_does(repository: Path, home: Path) -> None:
    for command in commands(repository):
        if command not in NOT_RUN_HERE:
            run(on_a_small_scale(command), home)
    (source,) = blocks(repository, "python")
    printed = run([sys.executable, "-c", re.sub(r"step-\d{8}", "step-00000002", source)], home)
    assert printed.startswith("torch.Size([1, ")


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/hardware.md", "docs/decisions.md"]
)
def test_relative_links_resolve(repository: Path, file: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (repository / file).read_text("utf-8"))
    broken = [link for link in links if "://" not in link and not (repository / file).parent.joinpath(link).exists()]
    assert not broken
