"""The verdict: which figures are called good, worth a look or bad, and that early figures condemn nothing."""

import math
from pathlib import Path
from typing import Any

import pytest

from dinox_train.config import validate
from dinox_train.report.history import History
from dinox_train.report.verdict import findings, most_prototypes, summary

HEALTHY = {
    "loss": 4.0,
    "teacher_entropy": 0.7,
    "feature_std": 0.5,
    "effective_rank": 20.0,
    "prototype_use": 40 / 1024,
    "knn_z": 0.6,
    "data_wait_fraction": 0.02,
    "applied": True,
}


def history(
    updates: int = 300,
    skipped: int = 0,
    batch_size: int = 32,
    before: dict[int, dict[str, Any]] | None = None,
    **now: Any,
) -> History:
    """A run whose loss fell from 6.5, and whose other figures were always what they are now, but in lines `before`."""
    lines: list[dict[str, Any]] = [{"update": u, **HEALTHY, **now} for u in range(1, updates + 1)]
    lines[0]["loss"] = 6.5
    for line in lines[1 : 1 + skipped]:
        line |= {"applied": False, "loss": None}
    for index, figures in (before or {}).items():
        lines[index] |= figures
    config = validate({"train": {"updates": 300, "batch_size": batch_size}, "objective": {"prototypes": 1024}})
    run = History(folder=Path("run"), config=config)
    run.add_lines(lines)
    return run


def test_a_loss_near_ln_k_says_nothing_where_no_prototypes_are() -> None:
    pinned = history(loss=math.log(1024))
    assert "bad" in {finding.level for finding in findings(pinned)}
    other = History(folder=Path("run"), config=validate({"objective": {"name": "mae", "prototypes": 1024}}))
    other.add_lines([{"update": 1, "loss": 7.5}, *({"update": u, "loss": math.log(1024)} for u in range(2, 301))])
    assert most_prototypes(other) is None
    assert not [finding for finding in findings(other) if "ln K" in finding.text]


def test_a_healthy_run_is_called_healthy() -> None:
    found = findings(history())
    assert {finding.level for finding in found} == {"good"}
    assert len(found) == 7
    assert summary(history(), found).text.startswith("Healthy")


@pytest.mark.parametrize(
    ("now", "level", "words"),
    [
        ({"loss": 6.931}, "bad", "ln K = 6.93"),
        ({"loss": 6.6}, "watch", "did not fall"),
        ({"teacher_entropy": 0.999}, "bad", "close to uniform"),
        ({"teacher_entropy": 0.98}, "watch", "close to uniform"),
        ({"teacher_entropy": 0.05}, "watch", "almost certain"),
        ({"feature_std": 0.001}, "bad", "the same way"),
        ({"feature_std": 0.03}, "watch", "the same way"),
        ({"effective_rank": 1.2}, "bad", "only 1.2 directions"),
        ({"effective_rank": 5.0}, "watch", "only 5.0 directions"),
        ({"teacher_entropy": 0.01}, "bad", "almost certain"),
        ({"prototype_use": 1 / 1024}, "bad", "all on one prototype"),
        ({"prototype_use": 3 / 1024}, "watch", "spread over 3 prototypes"),
        ({"patch_similarity": 0.99}, "bad", "almost the same features"),
        ({"patch_similarity": 0.96}, "watch", "almost the same features"),
        ({"knn_z": -0.3}, "watch", "do not tell where"),
        ({"data_wait_fraction": 0.4}, "watch", "40 % of the time"),
        ({"skipped": 30}, "watch", "30 updates were not applied"),
    ],
)
def test_each_figure_alone_decides_the_verdict(now: dict[str, Any], level: str, words: str) -> None:
    found = findings(history(**now))
    assert [finding.level for finding in found[1:]].count("good") == len(found) - 1
    verdict = summary(history(**now), found)
    assert verdict.level == level
    assert words in verdict.text
    early = history(updates=20, **{**now, "skipped": min(5, now.get("skipped", 0))})
    assert summary(early, findings(early)).text.startswith("Too early to judge")
    assert "bad" not in {finding.level for finding in findings(early)}


def test_a_single_masked_update_in_many_is_no_reason_to_worry() -> None:
    found = findings(history(skipped=1))
    assert {finding.level for finding in found} == {"good"}
    assert any("1 update was not applied" in finding.text for finding in found)


def test_a_small_batch_is_not_blamed_for_its_rank() -> None:
    assert findings(history(batch_size=8, effective_rank=4.0, prototype_use=8 / 1024))[0].level == "good"


def test_features_that_start_equal_and_part_are_not_called_collapsed() -> None:
    found = findings(history(feature_std=0.004, before={0: {"feature_std": 2e-6}}))  # as with a LayerScale of 1e-5
    assert found[0].level == "watch"
    assert "they part" in found[0].text


def test_only_recent_values_count() -> None:
    run = history(before={index: {"feature_std": 0.001} for index in range(200)})
    assert findings(run)[0].level == "good"


def test_the_most_prototypes_a_batch_can_use() -> None:
    assert most_prototypes(history(batch_size=32)) == 64 / 1024
    assert most_prototypes(history(batch_size=4096)) == 1.0


def test_without_figures_nothing_is_judged() -> None:
    empty = History(folder=Path("run"))
    assert findings(empty) == []
    assert "nothing to judge" in summary(empty, []).text
