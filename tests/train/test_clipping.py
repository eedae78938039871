"""Clipped updates are counted in every line, and said where they are most of a stretch; the same after a resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train import clipping
from dinox_train.clipping import STRETCH, ClippingCount
from dinox_train.metrics import VARYING, read_lines

Train = Callable[..., int]


def said(flags: list[bool]) -> list[int]:
    """The updates at whose end something is said."""
    count = ClippingCount()
    return [update for update, clipped in enumerate(flags, 1) if count.add(update, clipped)]


def test_most_of_a_stretch_is_said_once_until_it_is_better() -> None:
    bad, good = (
        [True] * (STRETCH // 2) + [False] * (STRETCH // 2),
        [True] * (STRETCH // 2 - 1) + [False] * (STRETCH // 2 + 1),
    )
    assert said(bad + bad + good + bad) == [STRETCH, 4 * STRETCH]
    assert said(good * 3) == []
    count = ClippingCount()
    advice = [count.add(update, True) for update in range(1, STRETCH + 1)][-1]
    assert advice is not None
    assert advice.startswith(f"100% of the last {STRETCH} updates")
    assert "optimizer.learning_rate" in advice


@given(st.lists(st.booleans(), max_size=3 * STRETCH), st.integers(0, 3 * STRETCH))
def test_a_resume_changes_neither_count_nor_advice(flags: list[bool], stopped: int) -> None:
    whole, first = ClippingCount(), ClippingCount()
    expected = [whole.add(update, clipped) for update, clipped in enumerate(flags, 1)]
    found = [first.add(update, clipped) for update, clipped in enumerate(flags[:stopped], 1)]
    second = ClippingCount()
    second.restore(json.loads(json.dumps(first.state())))
    found += [second.add(update, clipped) for update, clipped in enumerate(flags[stopped:], stopped + 1)][: len(flags)]
    assert found == expected
    assert second.total == whole.total == sum(flags)


@pytest.mark.usefixtures("tiny_preset")
def test_a_runs_lines_count_and_its_log_advises(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "STRETCH", 3)
    words = (
        "optimizer.clip_norm=1e-6",
        "evaluate.every=99",
        "evaluate.windows=4",
        "schedule.updates=4",
        "checkpoint.every=99",
    )
    for updates in (2, 4):
        assert train(tmp_path / "resumed", *words, f"train.updates={updates}") == 0
    assert train(tmp_path / "whole", *words, "train.updates=4") == 0
    folders = [tmp_path / "resumed", tmp_path / "whole"]
    lines = [read_lines(folder / "metrics.jsonl") for folder in folders]
    assert [line["clipped"] for line in lines[0]] == [True] * 4
    assert [line["clipped_updates"] for line in lines[0]] == [1, 2, 3, 4]
    plain = [
        [{k: v for k, v in line.items() if k not in {*VARYING, "loss_val", "knn_z"}} for line in of] for of in lines
    ]
    assert plain[0] == plain[1]
    for folder in folders:
        events = [event for event in read_lines(folder / "events.jsonl") if event["event"] == "clipping"]
        assert [event["update"] for event in events] == [3]
        assert "clipping 100% of the last 3 updates" in (folder / "train.log").read_text()
