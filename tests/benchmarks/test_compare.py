"""compare.py on synthetic timings: a real loss is found, noise is not, and what cannot be compared is refused."""

from collections.abc import Callable
from pathlib import Path

import compare
import pytest
from result import Figure, Result

Make = Callable[..., Result]
Write = Callable[[Result, str], Path]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_difference(made_result: Make, seed: int) -> None:
    verdicts = {one.verdict for one in compare.compare(made_result(seed), made_result(seed + 100))}
    assert verdicts == {"same"}


@pytest.mark.parametrize("seed", range(20))
def test_ten_percent_slower_is_found(made_result: Make, seed: int) -> None:
    before, after = made_result(seed), made_result(seed + 100, slower=1.1)
    timed = compare.compare(before, after)[0]
    assert timed.verdict == "worse"
    assert timed.low < 1 / 1.1 < timed.high
    assert compare.compare(after, before)[0].verdict == "better"


def test_a_noisy_measurement_hides_what_it_must(made_result: Make) -> None:
    before, after = made_result(1, noise=0.5, rounds=9), made_result(2, noise=0.5, rounds=9, slower=1.1)
    assert compare.compare(before, after)[0].verdict == "same"


def test_a_size_is_exact(made_result: Make) -> None:
    size = compare.compare(made_result(1), made_result(2, size=2.499))[1]
    assert (size.verdict, size.floor) == ("worse", 0.0)


def figure(value: float, better: str = "higher", *, gate: bool = True, noise: float = 0.0) -> Figure:
    return Figure("f", value, value, value, "s", better, noise, gate)


def test_directions_and_floors() -> None:
    assert compare.judge(figure(1.0, "lower"), figure(1.2, "lower")).verdict == "worse"
    assert compare.judge(figure(1.0, "lower"), figure(0.8, "lower")).verdict == "better"
    assert compare.judge(figure(1.0), figure(1.2)).verdict == "better"
    assert compare.judge(figure(1.0, noise=0.3), figure(0.8)).verdict == "same"
    assert compare.judge(figure(1.0), figure(0.8, noise=0.2)).verdict == "worse"
    assert compare.judge(figure(0.0, gate=False), figure(1.0)).verdict == "no ratio"
    with pytest.raises(compare.ResultError, match="must be positive"):
        compare.judge(figure(0.0), figure(1.0))


def test_exit_codes(made_result: Make, written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(written(made_result(1), "before.json"))
    same, slow = written(made_result(2), "same.json"), written(made_result(3, slower=1.2), "slow.json")
    assert compare.main([before, str(same)]) == 0
    assert "nothing that is gated is worse" in capsys.readouterr().out
    assert compare.main([before, str(slow)]) == 1
    assert "worse beyond the noise: ours / peer" in capsys.readouterr().out
    not_gated = written(made_result(3, slower=1.2, gate=False), "not_gated.json")
    assert compare.main([before, str(not_gated)]) == 0
    assert "worse (not gated)" in capsys.readouterr().out
    assert compare.main([before, str(same.with_name("missing.json"))]) == 2
    assert "missing.json cannot be read" in capsys.readouterr().err


def test_what_cannot_be_compared(made_result: Make, written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(written(made_result(1), "before.json"))
    other = made_result(2)
    other.machine = {**other.machine, "cpu": "another"}
    path = str(written(other, "machine.json"))
    assert compare.main([before, path]) == 2
    assert "different machines (cpu)" in capsys.readouterr().err
    assert compare.main([before, path, "--across-machines"]) == 0
    for change, said in (
        ({"benchmark": "another"}, "of the benchmark"),
        ({"data": [{"name": "others"}]}, "different data"),
        ({"figures": []}, "no figure in common"),
        ({"figures": [figure(1.0)]}, "no figure in common"),
    ):
        other = made_result(2)
        vars(other).update(change)
        assert compare.main([before, str(written(other, "other.json"))]) == 2
        assert said in capsys.readouterr().err
