"""Baselines by class of machine: kept, found again, and worse results found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import baseline
import pytest
from result import Result

Make = Callable[..., Result]
Write = Callable[[Result, str], Path]


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AMD EPYC, cpu family 25, model 1, stepping 1", "amd-epyc-family-25-model-1-2-cores-24-gib"),
        ("Intel(R) Core(TM) i9-14900K, cpu family 6, model 183, stepping 1",
         "intel-core-i9-14900k-family-6-model-183-2-cores-24-gib"),
        ("Apple M3", "apple-m3-2-cores-24-gib"),
    ],
)  # fmt: skip
def test_a_class_has_a_name_without_what_does_not_matter(cpu: str, expected: str) -> None:
    described = {"cpu": cpu, "logical_cores": 2, "memory_bytes": 25276510208}
    assert baseline.class_of(described) == expected
    assert baseline.class_of(described | {"memory_bytes": 25276510208 + 10**8}) == expected
    assert baseline.class_of(described, "NVIDIA H200") == f"{expected}-nvidia-h200"
    assert baseline.class_of(described | {"logical_cores": 4}) != expected


def test_another_stepping_is_the_same_class() -> None:
    one, other = (
        baseline.class_of(
            {"cpu": f"X 1, cpu family 25, model 1, stepping {n}", "logical_cores": 1, "memory_bytes": 2**33}
        )
        for n in (1, 2)
    )
    assert one == other


def run(what: str, folder: Path, baselines: Path) -> int:
    return baseline.main([what, str(folder), "--baselines", str(baselines)])


def test_keep_then_check(made_result: Make, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(made_result(1), "speed.json")
    kept = tmp_path / "baselines"
    assert run("check", tmp_path, kept) == 0
    said = capsys.readouterr().out
    assert "no baseline for this class of machines" in said
    assert "baseline.py keep" in said
    assert run("keep", tmp_path, kept) == 0
    (place,) = kept.iterdir()
    assert [path.name for path in place.iterdir()] == ["speed.json"]

    written(made_result(2), "speed.json")
    assert run("check", tmp_path, kept) == 0
    assert "nothing that is gated is worse" in capsys.readouterr().out
    written(made_result(3, slower=1.2), "speed.json")
    assert run("check", tmp_path, kept) == 1
    assert "worse beyond the noise: speed.json: ours / peer" in capsys.readouterr().out


def test_what_is_not_of_one_form_or_is_missing_is_said(made_result: Make) -> None:
    one, quick = made_result(1), made_result(2)
    quick = replace(quick, conditions=quick.conditions | {"quick": True})
    lines, worse = baseline.check({"a.json": quick, "new.json": one}, {"a.json": one, "old.json": one})
    assert not worse
    assert lines[0].startswith("a.json: not compared: one is quick")
    assert lines[1] == "new.json: no baseline yet"
    assert lines[2] == "old.json: in the baseline, and not measured now"


def test_other_data_are_not_compared(made_result: Make) -> None:
    other = replace(made_result(2), data=[{"name": "others"}])
    lines, worse = baseline.check({"a.json": other}, {"a.json": made_result(1)})
    assert not worse
    assert "different data" in lines[0]


def test_a_file_that_is_no_result_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert run("check", tmp_path, tmp_path / "none") == 2
    assert "is no result" in capsys.readouterr().err
