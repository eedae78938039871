"""The soak in small: kills, a session that ends and goes on, the comparison, and what fails it."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import soak

# Adds an update each 0.02 s, keeps every third in a checkpoint, and resumes there; FORGETS: from its last line instead.
TRAINER = """
import json, os, pathlib, signal, sys, time
settings = dict(item.split('=', 1) for item in sys.argv[1:] if '=' in item)
run = pathlib.Path(settings['run.folder']); run.mkdir(exist_ok=True)
kept, metrics, state = run / 'kept', run / 'metrics.jsonl', 1
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
update, state = json.loads(kept.read_text()) if kept.exists() else (0, 1)
lines = metrics.read_text().splitlines()[:update] if metrics.exists() else []
metrics.write_text(''.join(line + chr(10) for line in lines))
if update and os.environ.get('SOAK_TEST') == 'forgets':
    state += 1
if update and os.environ.get('SOAK_TEST') == 'dies':
    print('no space left'); sys.exit(1)
def keep():
    (run / 'new').write_text(json.dumps([update, state])); (run / 'new').replace(kept)
while update < int(settings['train.updates']) and not stopped:
    time.sleep(0.02)
    update, state = update + 1, state * 5 % 1009
    with metrics.open('a') as file:
        file.write(json.dumps({'update': update, 'loss': state, 'host_memory_bytes': 10**8}) + chr(10))
    if update % 3 == 0:
        keep()
keep()
folder = run / f'checkpoints/step-{update:08d}'; folder.mkdir(parents=True, exist_ok=True)
sys.exit(143 if stopped else 0)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trainer that is as quick as its test; the folder of the soak."""
    module = tmp_path / "modules" / "dinox_train"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "soak"


HOURS = str(4 / 3600)


def test_a_soak_is_killed_goes_on_and_passes(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--folder", str(stand_in), "--hours", HOURS, "--kills", "6"]
    codes = []
    while (code := soak.main([*given, "--minutes", str(2.5 / 60)])) == soak.EXIT_UNFINISHED:
        codes.append(code)
        assert len(codes) < 20
    assert code == 0, capsys.readouterr().out
    assert codes
    state = json.loads((stand_in / "soak.json").read_text())
    assert len(state["kills"]) >= 6
    assert state["seconds"] >= 4
    assert state["updates"] == state["kills"][-1] + 5
    assert state["verdict"]["passed"]
    capsys.readouterr()
    assert soak.main(given) == 0  # what is done stays done
    assert "soak: PASS" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        soak.main([*given, "seed=7"])


def test_a_trainer_that_resumes_wrongly_fails(stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SOAK_TEST", "forgets")
    assert soak.main(["--folder", str(stand_in), "--hours", str(2 / 3600), "--kills", "3"]) == 1
    said = capsys.readouterr().out
    assert "FAIL lines: update" in said
    assert "differs in loss" in said


def test_a_trainer_that_ends_by_itself_fails(stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SOAK_TEST", "dies")
    assert soak.main(["--folder", str(stand_in), "--hours", str(2 / 3600), "--kills", "3"]) == 1
    assert "exit code 1: no space left" in capsys.readouterr().err


def test_memory_that_grows_fails() -> None:
    still = [10**8 + (update % 7) * 10**5 for update in range(800)]
    assert soak.memory_growth(still)["passed"]
    assert soak.memory_growth([*range(10**6, 10**8, 10**6), *[10**8] * 700])["passed"]  # warming up is no growth
    leaks = soak.memory_growth([10**8 + 10**5 * update for update in range(800)])
    assert not leaks["passed"]
    assert leaks["bytes_per_update"] == pytest.approx(10**5, rel=0.2)


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_the_real_trainer_soaks(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    views = ("views.global_size=32", "views.local_size=16", "views.num_local=1", "train.batch_size=4")
    small = (*views, "objective.prototypes=64", "objective.ibot.weight=0", "checkpoint.every=5")
    code = soak.main(["--folder", str(tmp_path), "--hours", str(90 / 3600), "--kills", "4", *small])
    assert code == 0, capsys.readouterr().out
