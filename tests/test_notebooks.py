"""The notebooks run from top to bottom, and are kept without outputs.

Their code cells are run as plain Python, one after the other in one namespace: they may ask no more of Jupyter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
LOOK, KNEE, CHECKPOINT = (
    REPOSITORY / "docs" / "notebooks" / f"{name}.ipynb"
    for name in ("look_and_measure", "read_a_knee", "look_at_a_checkpoint")
)
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
print("cells done")
"""

ASKED_FOR = ("DINOX_SHARDS", "DINOX_KNEE", "DINOX_RUN")
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)


def run(notebook: Path, folder: Path, **environment: str) -> str:
    """Runs it in `folder`, its temporary files there too; what it printed."""
    settings = {"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "agg", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, notebook],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in ASKED_FOR} | settings | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.endswith("cells done\n")
    return done.stdout


def test_they_are_there() -> None:
    assert {LOOK, KNEE, CHECKPOINT} == set(NOTEBOOKS)


@each
def test_it_is_short_and_has_no_outputs(notebook: Path) -> None:
    document = json.loads(notebook.read_text("utf-8"))
    assert (document["nbformat"], len(document["cells"]) < 12) == (4, True)
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert not [line for line in cell["source"] if line.lstrip().startswith(("%", "!"))]


def test_it_runs_on_a_phantom_of_its_own(tmp_path: Path) -> None:
    printed = run(LOOK, tmp_path)
    assert "train {" in printed
    for mode in ("random", "runs"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{mode} ")]
        assert "slices decoded" in line
    assert not list(tmp_path.iterdir()), "the phantom was not removed"


def test_it_opens_the_set_that_it_is_given(tmp_path: Path) -> None:
    shards = tmp_path / "mine"
    made = "import sys, pathlib; from dinox_train.fake import write_fake_set; write_fake_set(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", made, shards], cwd=REPOSITORY, check=True)
    printed = run(LOOK, tmp_path, DINOX_SHARDS=str(shards))
    assert printed.startswith("12 volumes")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "something else was written"


def test_the_knee_on_record_is_read_and_drawn(tmp_path: Path) -> None:
    printed = run(KNEE, tmp_path)
    assert "windows/s" in printed
    assert "train:" in printed, "its overlay"
