"""The fixed run: another curve fails, the same one passes, and the real trainer gives one that repeats."""

import math
from collections.abc import Sequence
from pathlib import Path

import fixed_run
import pytest
import result
from fixed_run import SETTINGS, Curve, FixedRunError, largest_difference, read_curve, tolerance_for, where
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.fake import write_fake_set

LOSSES = (5.0, 4.0, 3.0)
losses = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20)


@given(losses, st.floats(1e-6, 0.5), st.data())
def test_the_largest_difference_is_found_where_it_is(kept: list[float], apart: float, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(kept) - 1))
    found = [one * (1 + apart) if number == at else one for number, one in enumerate(kept)]
    worst, update = largest_difference(found, kept)
    assert worst == pytest.approx(apart, rel=1e-3)
    assert update == at + 1
    assert largest_difference(kept, kept)[0] == 0.0


def test_a_curve_that_ends_early_or_is_no_number_is_another() -> None:
    assert largest_difference(LOSSES[:2], LOSSES) == (math.inf, 3)
    assert largest_difference((5.0, math.nan, 3.0), LOSSES) == (math.inf, 2)


def test_a_kept_curve_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    with pytest.raises(FixedRunError, match="--keep writes one"):
        read_curve(path)
    Curve(LOSSES, SETTINGS, where()).write(path)
    assert read_curve(path) == Curve(LOSSES, SETTINGS, where())
    Curve(LOSSES, SETTINGS.replace("seed: 20", "seed: 21"), where()).write(path)
    with pytest.raises(FixedRunError, match="another run"):
        read_curve(path)


def test_elsewhere_the_tolerance_is_wider() -> None:
    kept = Curve(LOSSES, SETTINGS, where())
    assert tolerance_for(kept, where()) == fixed_run.TOLERANCE_HERE
    assert tolerance_for(kept, where() | {"cpu": "another"}) == fixed_run.TOLERANCE_ELSEWHERE


@pytest.mark.parametrize(("found", "code"), [(LOSSES, 0), ((5.0, 4.0, 3.2), 1), ((5.0, 4.0), 1)])
def test_faster_with_another_curve_fails(
    found: Sequence[float],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = result.begin("fixed_run", data=[], conditions={}, versions={"dinox": {}})
    made.exact("updates", 1e9, "images/s")  # as fast as can be
    monkeypatch.setattr(fixed_run, "run", lambda **_: (made, tuple(found)))
    kept = tmp_path / "curve.json"
    Curve(LOSSES, SETTINGS, where()).write(kept)
    output = tmp_path / "out.json"
    assert fixed_run.main(["--curve", str(kept), "--output", str(output)]) == code
    said = capsys.readouterr()
    assert ("MISSED" in said.out) == bool(code)
    assert ("another training" in said.err) == bool(code)
    assert result.read(output).targets[0].passed != bool(code)


def test_without_a_kept_curve_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fixed_run.main(["--curve", str(tmp_path / "none.json")]) == 2
    assert "is no kept curve" in capsys.readouterr().err


def test_the_kept_curve_is_of_these_settings() -> None:
    curve = read_curve(fixed_run.CURVE)
    assert len(curve.losses) == fixed_run.UPDATES
    assert curve.losses[-1] < curve.losses[0]


def test_the_real_run_begins_as_the_kept_curve(tmp_path: Path) -> None:
    shards = write_fake_set(tmp_path / "shards", fixed_run.SIDES)
    kept = read_curve(fixed_run.CURVE).losses
    lines = fixed_run.train_once(shards, tmp_path, ("train.updates=5",))
    assert largest_difference([line["loss"] for line in lines], kept[:5])[0] <= fixed_run.TOLERANCE_ELSEWHERE


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_run.sys, "executable", "/bin/false")
    with pytest.raises(FixedRunError, match="the run ended with 1"):
        fixed_run.train_once(tmp_path, tmp_path)
