"""The alarms as a pure function of lines: when each begins and is over, what never raises one, and resumes."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.alarms import ALARMS, COLLAPSES, LEAP_WINDOW, NAMES, Alarms, Said, Setting

SETTING = Setting(batch_size=16, prototypes=128, updates=1000, warmup=20, patience=5)
SOUND: dict[str, Any] = {
    "applied": True,
    "loss": 6.0,
    "loss_dino": 4.5,
    "grad_norm": 2.0,
    "teacher_entropy": 0.7,
    "feature_std": 0.6,
    "effective_rank": 8.0,
    "prototype_use": 20 / 128,
    "patch_similarity": 0.5,
}
EVALUATED = {"knn_z": 0.6, "shortcut": 0.1}
SHORTCUT = {"shortcut": 0.9, "shortcut_name": "kernel", "shortcut_accuracy": 0.95, "shortcut_chance": 0.5}
BAD: dict[str, dict[str, Any]] = {
    "entropy_uniform": {"teacher_entropy": 0.999},
    "entropy_one_hot": {"teacher_entropy": 1e-9},
    "feature_std_low": {"feature_std": 1e-4},
    "rank_low": {"effective_rank": 1.2},
    "prototypes_few": {"prototype_use": 1 / 128},
    "patches_alike": {"patch_similarity": 0.995},
    "gradient_leap": {"grad_norm": 900.0},
    "gradient_zero": {"grad_norm": 0.0},
    "loss_spike": {"loss": 700.0},
    "loss_at_ln_k": {"loss_dino": math.log(128)},
    "knn_z_falls": {"knn_z": 0.1},
    "shortcut": SHORTCUT | {"knn_z": 0.05},
}


def line(update: int, **figures: Any) -> dict[str, Any]:
    return {"update": update, **SOUND, **figures}


def said(lines: list[dict[str, Any]], alarms: Alarms | None = None) -> list[tuple[int, str, str | None]]:
    watching = alarms or Alarms(SETTING)
    return [(one["update"], event.event, event.alarm) for one in lines for event in watching.add(one)]


def patience_of(name: str) -> int:
    return next(alarm for alarm in ALARMS if alarm.name == name).patience(SETTING)


def test_every_alarm_has_a_case_and_a_place_in_the_docs(repository: Path) -> None:
    assert set(BAD) == set(NAMES)
    assert len(NAMES) == len(ALARMS)
    assert set(COLLAPSES) <= set(NAMES)
    assert set(re.findall(r"^\| `(\w+)`", (repository / "docs/health.md").read_text("utf-8"), re.MULTILINE)) == set(
        NAMES
    )
    for alarm in ALARMS:
        assert alarm.advice.endswith(".")
        assert re.search(r"[a-z]+\.[a-z_]+", alarm.advice), f"{alarm.name}: no key to change is named"


def test_a_sound_run_raises_none() -> None:
    lines = [line(update, **(EVALUATED if update % 50 == 0 else {})) for update in range(1, 1001)]
    assert said(lines) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_begins_once_after_its_patience_and_is_over_once(name: str) -> None:
    patience, bad = patience_of(name), BAD[name] if name not in ("knn_z_falls", "shortcut") else EVALUATED | BAD[name]
    good = EVALUATED if name in ("knn_z_falls", "shortcut") else {}
    begin = 200
    lines = [line(update, **good) for update in range(1, begin)]
    lines += [line(update, **bad) for update in range(begin, begin + 30)]
    lines += [line(update, **good) for update in range(begin + 30, begin + 90)]
    found = [(update, event) for update, event, alarm in said(lines) if alarm == name]
    assert found == [(begin + patience - 1, "alarm"), (begin + 30 + patience - 1, "alarm over")]
    others = {alarm for _, _, alarm in said(lines)} - {name}
    assert others <= {"knn_z_falls"}  # a poor knn_z is part of a shortcut


@pytest.mark.parametrize("name", NAMES)
def test_one_update_less_than_the_patience_is_no_alarm(name: str) -> None:
    patience = patience_of(name)
    lines = [line(update, **EVALUATED) for update in range(1, 200)]
    lines += [line(200 + n, **EVALUATED | BAD[name]) for n in range(patience - 1)]
    lines += [line(200 + patience + n, **EVALUATED) for n in range(60)]
    assert name not in {alarm for _, _, alarm in said(lines)}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "loss_spike"])
def test_the_beginning_of_a_run_raises_none(name: str) -> None:
    lines = [line(update, **EVALUATED | BAD[name]) for update in range(1, 101)]
    assert name not in {alarm for _, _, alarm in said(lines)}
    warming = Alarms(Setting(batch_size=16, prototypes=128, updates=1000, warmup=300, patience=5))
    lines = [line(update, **EVALUATED | BAD[name]) for update in range(1, 301)]
    early = {"entropy_one_hot", "gradient_leap", "gradient_zero"}
    assert (name in {alarm for _, _, alarm in said(lines, warming)}) == (name in early - {"gradient_leap"})


def test_features_that_start_equal_have_a_tenth_of_the_run_to_part() -> None:
    """As with a LayerScale of 1e-5; features that had parted and fall back, or never part, have not."""
    parting = [line(update, feature_std=2e-6 * 1.01**update) for update in range(1, 1001)]
    found = said(parting)
    assert all(update > 100 for update, _, _ in found)
    assert [event for _, event, _ in found] == ["alarm", "alarm over"]
    assert said(parting[:100]) == []
    slow = Setting(batch_size=16, prototypes=128, updates=100_000, warmup=20, patience=5)
    assert said(parting, Alarms(slow)) == []
    still = [line(update, feature_std=2e-6) for update in range(1, 200)]
    assert said(still, Alarms(slow)) == [(105, "alarm", "feature_std_low")]
    back = parting + [line(update, feature_std=1e-4) for update in range(1001, 1020)]
    assert said(back, Alarms(slow)) == [(1005, "alarm", "feature_std_low")]


def test_what_a_fresh_network_tells_by_chance_is_no_best_to_fall_from() -> None:
    lines = [line(update, knn_z=0.9 if update <= 100 else 0.3) for update in range(10, 400, 10)]
    assert said(lines) == []
    assert said([*lines, line(400, knn_z=0.05)]) == [(400, "alarm", "knn_z_falls")]


def test_figures_that_are_missing_or_not_finite_say_nothing() -> None:
    figures: tuple[Any, ...] = (None, math.nan, math.inf)
    lines = [line(update, **dict.fromkeys(SOUND, figures[update % 3])) for update in range(1, 400)]
    assert said(lines) == []
    assert said([{"update": update} for update in range(1, 400)]) == []


def test_what_is_said_quotes_the_figures_and_the_keys() -> None:
    def text(name: str) -> str:
        alarms = Alarms(SETTING)
        lines = [line(update, **EVALUATED) for update in range(1, 200)]
        lines += [line(200 + n, **EVALUATED | BAD[name]) for n in range(patience_of(name))]
        found: list[Said] = [event for one in lines for event in alarms.add(one) if event.alarm == name]
        return found[0].text

    assert "update 200 had a loss of 700, the median of those before it is 6" in text("loss_spike")
    assert "spread over only 1 prototypes" in text("prototypes_few")
    assert "the 32 global views" in text("prototypes_few")
    assert "sits at ln K = 4.85" in text("loss_at_ln_k")
    assert "(20 updates in a row)" in text("loss_at_ln_k")
    assert "tell the kernel of a scan (95% right, 50% by chance)" in text("shortcut")
    assert "(2 evaluations in a row)" in text("shortcut")
    assert "knn_z 0.10, it was 0.60" in text("knn_z_falls")
    for name in NAMES:
        assert "{" not in text(name)


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=140))
@settings(max_examples=30, deadline=None)
def test_a_spike_is_as_the_slow_reference_says(losses: list[float]) -> None:
    high, expected = False, []
    for number, loss in enumerate(losses):
        before = losses[max(0, number - LEAP_WINDOW) : number]
        spike = len(before) >= 10 and loss > 10 * statistics.median(before)
        if spike != high:
            expected.append((number + 1, "alarm" if spike else "alarm over"))
        high = spike
    lines = [{"update": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    assert [(update, event) for update, event, _ in said(lines)] == expected


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_resume_anywhere_says_the_same(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=12))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=len(kinds), max_size=len(kinds)))
    lines: list[dict[str, Any]] = [line(update, **EVALUATED) for update in range(1, 105)]
    for kind, length in zip(kinds, lengths, strict=True):
        figures = EVALUATED | (BAD[kind] if kind else {})
        lines += [line(len(lines) + 1 + n, **figures) for n in range(length)]
    cut = data.draw(st.integers(0, len(lines)))
    first, second = Alarms(SETTING), Alarms(SETTING)
    before = said(lines[:cut], first)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    whole = Alarms(SETTING)
    assert before + said(lines[cut:], second) == said(lines, whole)
    assert second.state() == whole.state()


def test_a_checkpoint_of_before_the_alarms_is_no_obstacle() -> None:
    alarms = Alarms(SETTING)
    alarms.restore(None)
    alarms.restore({"of another release": {"on": True, "run": 0, "memory": {}}})
    assert alarms.on == ()
