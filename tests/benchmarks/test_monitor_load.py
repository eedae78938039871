"""monitor_load.py with scripts in the places of trainer and monitor: whose turns are measured, and how."""

import json
import sys
import time
from pathlib import Path

import pytest
from harness import AGAIN, measure
from monitor_load import ALONE, BESIDE, LoadError, Looks, Training, Turn, many_checkpoints

# Updates of 0.01 s; while the file `looking` changes, of 0.03 s, which is what a monitor beside them costs here.
TRAINER = """
import json, sys, time
from pathlib import Path
run, looking = Path(sys.argv[1]), Path(sys.argv[2])
before = None
with (run / "metrics.jsonl").open("a") as file:
    for update in range(1, 100000):
        now = looking.read_text() if looking.exists() else None
        seconds, before = (0.03 if now != before else 0.01), now
        time.sleep(seconds)
        print(json.dumps({"update": update, "images_per_s": 1 / seconds}), file=file, flush=True)
        (run / ".new").write_text(str(update))
        (run / ".new").replace(run / "heartbeat")
"""
MONITOR = """
import sys, time
from pathlib import Path
output, looking = Path(sys.argv[1]), Path(sys.argv[2])
for number in range(100000):
    if number < 3:
        (output / f"step-{number:08d}").mkdir(parents=True)
        (output / f"step-{number:08d}" / "figures.json").write_text("{}")
    (output / ".new").write_text(str(number))
    (output / ".new").replace(looking)
    time.sleep(0.002)
"""


def test_updates_beside_looks_are_told_from_those_alone(tmp_path: Path) -> None:
    run, looking = tmp_path / "run", tmp_path / "looking"
    run.mkdir()
    (run / "heartbeat").write_text("0")
    (run / "metrics.jsonl").touch()
    log = tmp_path / "log"
    train = [sys.executable, "-c", TRAINER, str(run), str(looking)]
    watch = [sys.executable, "-c", MONITOR, str(tmp_path / "monitor"), str(looking)]
    with Training(train, run, log) as training, Looks(watch, tmp_path / "monitor", log) as looks:
        looks.rest()
        turns = [Turn(name, training, looks, 4) for name in (ALONE, ALONE + AGAIN, BESIDE)]
        measured = measure(turns, rounds=4, round_s=0.0)
        assert looks.cpu_s >= 0
        assert looks.done == 3
    # Not three: on a busy machine the second script may not have its turn within each update.
    assert 1.4 < measured.ratio(ALONE, BESIDE).value <= 3


def test_a_trainer_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("3")
    command = [sys.executable, "-c", "import sys; sys.exit('no such device')"]
    with Training(command, tmp_path, tmp_path / "log") as training:
        while training._process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(LoadError, match="no such device"):
            training.next(2)


def test_many_names_of_one_checkpoint(tmp_path: Path) -> None:
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    (newest / "MANIFEST.json").write_text(json.dumps({"self": "ab"}))
    seen = many_checkpoints(tmp_path / "run", tmp_path / "seen") / "checkpoints"
    assert (seen / "step-00000499" / "MANIFEST.json").read_text() == '{"self": "ab"}'
