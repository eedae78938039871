"""monitor.py that follows a run: to its end, until it is silent, and over trouble."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from monitoring import following
from monitoring.observer import Observer

from tests.tools.test_monitor import SMALL, STEPS, Monitor, run, trained, watch  # noqa: F401 (fixtures)
from tests.train.conftest import small_config, small_set, tiny_preset  # noqa: F401 (fixtures)


def test_a_run_is_followed_to_its_end(run: Path, watch: Monitor, tmp_path: Path) -> None:  # noqa: F811
    later = [run / "checkpoints" / f"step-{step:08d}" for step in (6, 9)]
    for folder in later:
        folder.rename(tmp_path / folder.name)

    def arrive() -> None:
        for folder, before in zip(later, STEPS, strict=False):
            while not (run / "monitor" / f"step-{before:08d}" / "figures.json").exists():
                time.sleep(0.02)
            (tmp_path / folder.name).rename(folder)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    code, said = watch(run, "--every", "0.05", *SMALL)
    arriving.join()
    assert code == 0
    assert said.count("mrr ") == 3
    assert "the run is done: 9 updates" in said
    assert watch(run, "--every", "0.05") == (0, "the run is done: 9 updates\n")


def test_a_run_that_is_silent_is_left(run: Path, watch: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").unlink()
    code, said = watch(run, "--every", "0.05", "--patience-minutes", "0.005")
    assert (code, said) == (0, "the run has been silent for 0 minutes: no longer followed\n")
    (run / "events.jsonl").write_text('{"version": 1, "update": 3, "event": "ended", "text": "by signal 15"}\n')
    monkeypatch.setattr(following, "ENDED_S", 0.1)
    assert watch(run, "--every", "0.05") == (0, "the run has ended\n")


def test_trouble_is_told_once_and_tried_again(run: Path, watch: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    look, troubles = Observer.look, iter([OSError(28, "No space left on device", "monitor")] * 3)

    def troubled(self: Observer, opened: Any) -> dict[str, Any]:
        for trouble in troubles:
            raise trouble
        return look(self, opened)

    monkeypatch.setattr(Observer, "look", troubled)
    code, said = watch(run, "--every", "0.05", *SMALL)
    assert code == 0
    assert said.count("cannot look just now: No space left on device") == 1
    assert said.count("mrr ") == 3
