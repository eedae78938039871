"""The demo's logic with small stand-ins for the programs: order, interruptions, resumption, failures, own data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import demo as demo_program

LOG = "import sys, pathlib\nwith open('calls.txt', 'a') as f: f.write(repr(sys.argv) + '\\n')\n"
PHANTOM = LOG + "p = pathlib.Path(sys.argv[1]) / 'dicom'; p.mkdir(parents=True, exist_ok=True)\n"
PACK = (
    LOG
    + """
out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1]); out.mkdir(exist_ok=True)
sys.exit(3)
"""
)
# Writes a line an update, a checkpoint every 3 and when told to stop, resumes from the newest one and ends at once when
# told twice, as the contract says of the trainer.
TRAIN = (
    LOG
    + """
import json, os, signal, time
settings = dict(a.split('=', 1) for a in sys.argv[1:] if '=' in a)
run = pathlib.Path(settings['run.folder']); run.mkdir(exist_ok=True)
total, metrics, checkpoint = int(settings.get('train.updates', 16)), run / 'metrics.jsonl', run / 'checkpoint'
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
stopped = []
def stop(number, frame):
    if stopped:
        os._exit(128 + number)
    stopped.append(number)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
lines = metrics.read_text().splitlines()[:done] if metrics.exists() else []
metrics.write_text(''.join(line + '\\n' for line in lines))
for update in range(done + 1, total + 1):
    time.sleep(0.08)
    with metrics.open('a') as f:
        f.write(json.dumps({'update': update, 'loss': 9.0 / update, 'images_per_s': 5.0, 'knn_z': None}) + '\\n')
    (run / 'begun').touch()
    if update % 3 == 0 or update == total or stopped:
        (run / 'new').write_text(str(update)), (run / 'new').rename(checkpoint)
    if stopped:
        sys.exit(128 + stopped[0])
(run / 'report.html').write_text('done')
"""
)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo_program, "POLL_S", 0.02)
    folder = tmp_path / "repository"
    for name, text in {
        "tools/make_phantom.py": PHANTOM,
        "tools/pack_shards.py": PACK,
        "tools/verify_shards.py": LOG,
        "dinox_train/__init__.py": "",  # a real package, so that it hides the one that is installed
        "dinox_train/__main__.py": TRAIN,
        "configs/demo.yaml": "train: {updates: 16}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _calls(repository: Path) -> list[str]:
    programs = ("make_phantom", "pack_shards", "verify_shards", "dinox_train")
    lines = (repository / "calls.txt").read_text().splitlines()
    return [next(name for name in programs if name in line.split(",")[0]) for line in lines]


def _updates(folder: Path) -> list[int]:
    return [json.loads(line)["update"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_full_form_is_interrupted_twice_and_every_update_stands_once(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "demo"
    assert demo_program.main(["--folder", str(folder)], repository) == 0
    assert _calls(repository) == ["make_phantom", "pack_shards", "verify_shards", *["dinox_train"] * 3]
    assert _updates(folder) == list(range(1, 17))
    said = capfd.readouterr().out
    assert "Interrupted with SIGTERM" in said
    assert "exit code 143" in said
    assert "Interrupted with SIGKILL" in said
    assert "left out. Expected" in said  # what exit code 3 of the packer means here
    assert "loss: 9.000 at first, 0.562 at last" in said
    assert "knn_z: " not in said.split("What was made")[1].split("(knn_z")[0]  # never measured, never shown


def test_again_on_a_finished_demo_does_nothing_new(repository: Path, tmp_path: Path):
    arguments = ["--folder", str(tmp_path / "demo")]
    assert demo_program.main(arguments, repository) == 0
    before = (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes()
    (repository / "calls.txt").unlink()
    assert demo_program.main(arguments, repository) == 0
    assert _calls(repository) == ["make_phantom", "pack_shards", "verify_shards", "dinox_train"]
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes() == before


def test_short_form_is_interrupted_once_and_stands_apart(repository: Path, tmp_path: Path):
    assert demo_program.main(["--folder", str(tmp_path / "demo"), "--short"], repository) == 0
    assert _calls(repository).count("dinox_train") == 2
    assert _updates(tmp_path / "demo" / "short") == list(range(1, 13))
    assert not (tmp_path / "demo" / "run").exists()


def test_own_data_is_packed_with_its_own_key_in_its_own_place(repository: Path, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arguments = ["--folder", str(tmp_path / "demo"), "--short", "--data", str(tmp_path / name)]
        assert demo_program.main(arguments, repository) == 0
    calls = (repository / "calls.txt").read_text()
    assert "make_phantom" not in calls
    assert "--key-file" not in calls
    assert len(list((tmp_path / "demo").glob("own-*/short/shards"))) == 2


@pytest.mark.parametrize(
    ("program", "stage"),
    [("tools/make_phantom.py", "phantom"), ("tools/pack_shards.py", "pack"), ("tools/verify_shards.py", "verify")],
)
def test_a_failing_stage_is_named(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str, stage: str
):
    (repository / program).write_text("import sys; print('the cause', file=sys.stderr); sys.exit(1)")
    assert demo_program.main(["--folder", str(tmp_path / "demo")], repository) == 1
    said = capfd.readouterr().err
    assert "the cause" in said
    assert f"“{stage}” failed with exit code 1" in said


def test_a_trainer_that_refuses_is_shown(repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (repository / "dinox_train" / "__main__.py").write_text(
        "import sys; print('error: 7 windows, a batch has 16', file=sys.stderr); sys.exit(2)"
    )
    assert demo_program.main(["--folder", str(tmp_path / "demo")], repository) == 1
    said = capfd.readouterr().err
    assert "7 windows" in said
    assert "exit code 2" in said


def _demo(repository: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A demo in a process that leads a group of its own, as a shell starts it."""
    code = f"import sys; sys.path.insert(0, {str(Path(demo_program.__file__).parent)!r}); import demo, pathlib; "
    code += f"sys.exit(demo.main(['--folder', {str(folder)!r}], pathlib.Path({str(repository)!r})))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def _nobody_trains_on_from(folder: Path) -> list[int]:
    updates = _updates(folder)
    time.sleep(0.5)
    assert _updates(folder) == updates
    return updates


@pytest.mark.parametrize(
    ("signals", "send", "code"),
    [
        ([signal.SIGINT], os.killpg, 130),  # Ctrl-C in a terminal
        ([signal.SIGINT], os.kill, 130),
        ([signal.SIGTERM], os.kill, 143),
        ([signal.SIGTERM, signal.SIGTERM], os.killpg, 143),  # make passes on what the whole group got
        ([signal.SIGHUP], os.killpg, 129),  # the terminal was closed
    ],
)
def test_stopping_the_demo_stops_the_trainer_with_a_checkpoint(
    repository: Path, tmp_path: Path, signals: list[signal.Signals], send: Callable[[int, int], None], code: int
):
    with _demo(repository, tmp_path / "demo") as program:
        _wait_for(tmp_path / "demo" / "run" / "begun")
        for number in signals:
            send(program.pid, number)
        assert program.wait(60) == code
    updates = _nobody_trains_on_from(tmp_path / "demo")
    assert len(updates) < 8  # before the demo's own interruption
    assert (tmp_path / "demo" / "run" / "checkpoint").read_text() == str(updates[-1])


def test_ctrl_c_again_ends_a_program_that_does_not_stop(repository: Path, tmp_path: Path):
    (repository / "dinox_train" / "__main__.py").write_text(
        "import signal, time, pathlib\nsignal.signal(signal.SIGINT, lambda *_: pathlib.Path('told').touch())\n"
        "pathlib.Path('ready').touch()\nwhile True: time.sleep(0.05)"
    )
    with _demo(repository, tmp_path / "demo") as program:
        for mark in ("ready", "told"):
            _wait_for(repository / mark)
            program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130


def test_wrong_data_folder_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        demo_program.main(["--data", str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_half_a_line_is_not_read(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 1}\n{"upda')
    assert demo_program.read_lines(tmp_path / "metrics.jsonl") == [{"update": 1}]


@pytest.mark.parametrize("patients", [4, 12])
def test_the_phantoms_split_has_both_sides(patients: int):
    from dinox_io.privacy import pseudonym
    from dinox_io.split import side_of

    options = dict(zip(demo_program.PHANTOM_SPLIT[::2], demo_program.PHANTOM_SPLIT[1::2], strict=True))
    sides = [
        side_of(
            pseudonym(demo_program.PHANTOM_KEY, "patient", f"PHANTOM-0-{number:02d}\0"),
            int(options["--split-seed"]),
            float(options["--val-fraction"]),
            0.0,
        )
        for number in range(1, patients + 1)
    ]
    assert 1 <= sides.count("val") <= patients // 3
    assert set(sides) == {"train", "val"}
