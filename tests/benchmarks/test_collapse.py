"""Forced collapses: real runs, one for each way to go wrong, and the alarm that must come; what the figures cost."""

from pathlib import Path

import collapse
import health_cost
import pytest
import result
from collapse import FAULTS

from dinox_train.alarms import NAMES
from dinox_train.metrics import read_lines

START, PATIENCE = 14, 3
LATER = ("not balanced", "indifferent", "overexcited")
"""By `make faults`."""
FAST = ("health.grace_updates=10", f"health.patience_updates={PATIENCE}")
"""Patience is short; the thresholds are those of every run."""


def test_every_alarm_has_a_fault_that_forces_it() -> None:
    assert {alarm for fault in FAULTS.values() for alarm in fault.alarms} == set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault if name in LATER else ()) for name in FAULTS]
)
def test_a_forced_collapse_is_seen(tmp_path: Path, name: str) -> None:
    asked = ["--output", str(tmp_path), "--only", name, "--start", str(START), "--after", "16", "--every", "6"]
    code = collapse.main([*asked, *FAST])
    table = (tmp_path / "table.md").read_text()
    assert code == 0, table
    for alarm in FAULTS[name].alarms:
        assert f"| `{alarm}` | {FAULTS[name].words} | " in table
    made = result.read(tmp_path / "collapse.json")
    assert len(made.targets) == len(FAULTS[name].alarms)
    events = read_lines(tmp_path / name.replace(" ", "-") / "events.jsonl")
    assert all(event["alarm"] in NAMES for event in events if event["event"].startswith("alarm"))


def test_a_table_says_what_was_not_seen() -> None:
    table = collapse.as_table([("rank_low", "a fault", 50), ("shortcut", "another", None)], 50_000)
    assert "| `rank_low` | a fault | 50 | 0.10 % |" in table
    assert "| `shortcut` | another | not seen | - |" in table


def test_the_cost_of_the_figures_is_measured(tmp_path: Path) -> None:
    assert health_cost.main(["--quick", "--output", str(tmp_path / "made.json")]) == 0
    made = result.read(tmp_path / "made.json")
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["figures, of an update"] == pytest.approx(100 * figures["figures"] / figures["update"], rel=0.5)
    assert [target.limit for target in made.targets] == [health_cost.LIMIT]
