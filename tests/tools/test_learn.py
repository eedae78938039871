"""`make learn` in its smallest form, to its end: phantom, two runs of a seed, tables; and a session that ends early."""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import learn
import numpy as np
import pytest
from learning import program
from learning.plan import Arm, Settings, arms, data_programs
from learning.report import markdown
from learning.verdict import table_of
from probing import protocol
from probing.crossfit import Scored
from probing.tasks import Task

from tests.train.conftest import SMALL, tiny_preset  # noqa: F401 (a fixture)

QUICK = ["--patients", "6", "--size", "128", "--slices", "8", "--val-fraction", "0.5", "--seeds", "1", "--updates", "1",
         "--term", "koleo", "--task", "presence"]  # fmt: skip


def in_this_process(words: Sequence[str], log: Path, end_s: float, allowed: Sequence[int] = (0,)) -> None:
    """What `run_program` does, without the seconds that each start of Python takes."""
    del log
    if time.monotonic() >= end_s:
        raise program.OverError
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (Path(words[0]).stem, words[1:])
    module = importlib.import_module(f"{name}.__main__" if words[0] == "-m" else name)
    assert module.main(list(rest)) in allowed


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_preset: None) -> list[str]:  # noqa: F811
    """Words of a learn that takes seconds."""
    monkeypatch.setattr(learn, "run_program", in_this_process)
    monkeypatch.setattr(protocol, "RESAMPLES", 50)
    monkeypatch.setattr(protocol, "STRENGTHS", (0.01, 1.0))
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    overrides = ["schedule.warmup_updates=1", "evaluate.every=1", "evaluate.windows=4", "data.threads=1"]
    return ["--folder", str(tmp_path / "learn"), *QUICK, "--config", str(config), *overrides]


def test_the_smallest_form_runs_to_its_end(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert learn.main([*quick, "--minutes", "1e-9"]) == learn.EXIT_UNFINISHED
    assert learn.main(quick) == learn.EXIT_DONE
    root = tmp_path / "learn"
    report = json.loads((root / "learn.json").read_text())
    [table] = report["tables"]
    names = ["all terms", "without koleo", "random initialisation", "raw pixels", "size and intensity"]
    assert [row["network"] for row in table["rows"]] == names
    assert [run["name"] for run in report["runs"]] == names[:2]
    values = {row["network"]: row["auroc"]["value"] for row in table["rows"]}
    gain = table["gain"]["auroc"]["value"]
    assert gain == pytest.approx(values["all terms"] - values["random initialisation"], abs=1e-5)
    [share] = table["terms"]
    assert share["auroc"]["value"] == pytest.approx(values["all terms"] - values["without koleo"], abs=1e-5)
    page = (root / "learn.md").read_text()
    assert page == markdown(report)
    assert "The aim is" in page
    before = {path: path.stat().st_mtime_ns for path in root.glob("s*/**/*") if path.is_file()}
    assert learn.main(quick) == learn.EXIT_DONE  # nothing is left to train, nor to score
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("s*/**/*") if path.is_file()}
    assert json.loads((root / "learn.json").read_text()) == report
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        learn.main([*quick, "--updates", "2"])
    assert "has other settings" in capsys.readouterr().err


def test_a_program_is_stopped_when_the_minutes_are_over(tmp_path: Path):
    log = tmp_path / "log"
    stops = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
    script = tmp_path / "slow.py"
    script.write_text(stops + "print('up', flush=True)\ntime.sleep(60)\n")
    began = time.monotonic()
    with pytest.raises(program.OverError):
        program.run_program([str(script)], log, time.monotonic() + 1.5)
    assert time.monotonic() - began < 30
    assert log.read_text().splitlines() == ["up", "saved"]
    script.write_text("import sys\nprint('no space')\nsys.exit(5)\n")
    with pytest.raises(program.FailedError, match=r"exit code 5: .*no space"):
        program.run_program([str(script)], log, float("inf"))
    program.run_program([str(script)], log, float("inf"), allowed=(0, 5))


def scored(scores: np.ndarray) -> Scored:
    return Scored(np.arange(len(scores)), scores, np.zeros(len(scores), np.int64), 0)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_gain_is_above_its_interval_only_where_there_is_one(strength: float):
    random = np.random.default_rng(0)
    labels = np.arange(200) % 2 == 0
    patients = np.repeat([f"patient {number}" for number in range(20)], 10)
    task = Task(name="made up", selection="all", unit="window", items=[], unit_of=np.arange(200), labels=labels,
                patients=patients)  # fmt: skip

    def kept(signal: float) -> dict[str, Scored]:
        return {"made up": scored(random.normal(size=200) + signal * labels)}

    names = ("without dino", "random initialisation", "raw pixels", "size and intensity")
    by_seed = [{"all terms": kept(strength), **{name: kept(0.0) for name in names}} for _ in range(3)]
    table = table_of(task, by_seed, ["dino"])
    assert table["is_above_its_interval"] == (strength > 0)
    gain = table["gain"]
    assert gain["auroc"]["value"] == pytest.approx(np.mean([one["value"] for one in gain["seeds"]]), abs=1e-5)
    assert gain["auroc"]["low"] < gain["auroc"]["value"] < gain["auroc"]["high"]
    if not strength:
        assert gain["auroc"]["low"] < 0 < gain["auroc"]["high"]


def test_every_seed_has_a_run_with_all_terms_and_one_without_each(tmp_path: Path):
    settings = Settings(patients=4, size=64, slices=8, val_fraction=0.5, seeds=2, updates=3, terms=["dino", "ibot"],
                        tasks=["type"], config="c", overrides=[])  # fmt: skip
    found = arms(settings)
    assert found == [Arm(seed, term) for seed in (0, 1) for term in (None, "dino", "ibot")]
    assert len({arm.folder(tmp_path) for arm in found}) == 6
    assert [name for name, _ in data_programs(settings, tmp_path)] == ["phantom", "pack", "labels"]
    assert sys.modules["learn"] is learn
