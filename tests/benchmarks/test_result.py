"""Result files: written whole, read back equal, refused when anything in them is not as documented."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
import result
from result import Result, ResultError

Write = Callable[[Result, str], Path]


def test_written_and_read(made_result: Callable[..., Result], written: Write) -> None:
    made = made_result(1)
    made.target("as fast as the peer", made.figures[0], "at least", 1.5)
    made.target("small", made.figures[1], "at most", 2.0)
    path = written(made, "one.json")
    read = result.read(path)
    assert read == made
    assert [target.passed for target in read.targets] == [True, False]
    assert read.noise_floor is not None
    assert read.noise_floor > 0
    assert "load_after" in read.conditions
    assert [one["name"] for one in read.contenders] == ["ours", "ours (again)", "peer"]
    assert len(read.contenders[0]["seconds"]) == len(read.contenders[0]["amounts"]) == 25
    assert list(path.parent.iterdir()) == [path]
    said = "\n".join(result.lines(read))
    assert "reached: as fast as the peer" in said
    assert "MISSED: small: 2.500, should be at most 2" in said


def _changed(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_changed("schema", value="another"), "no result of a benchmark"),
        (_changed("version", value=2), "version 2"),
        (_changed("surprise", value=1), "surprise"),
        (lambda content: content.pop("commit"), "commit"),
        (lambda content: content["figures"][0].pop("gate"), "gate"),
        (_changed("figures", 0, "value", value="fast"), "no finite number"),
        (_changed("figures", 0, "value", value=True), "no finite number"),
        (_changed("figures", 0, "better", value="faster"), "none of"),
        (_changed("figures", 0, "gate", value=1), "is no bool"),
        (_changed("noise_floor", value="none"), "none of"),
        (_changed("contenders", 0, "seconds", value=[1.0]), "an amount for each"),
        (_changed("contenders", 0, "seconds", 3, value=None), "no finite number"),
        (_changed("versions", "dinox", value="1"), "is no dict"),
        (_changed("command", value="codec.py"), "is no list"),
    ],
)
def test_what_is_not_as_documented_is_refused(
    made_result: Callable[..., Result], written: Write, change: Callable[[Any], None], said: str
) -> None:
    path = written(made_result(1, rounds=6), "one.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=said):
        result.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"schema": "dinox-benchmark", "version": 1}', "null"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"other\.json"):
        result.read(path)


def test_a_figure_that_is_no_number_is_not_written(made_result: Callable[..., Result], tmp_path: Path) -> None:
    made = made_result(1, rounds=6)
    made.exact("broken", float("nan"), "×")
    with pytest.raises(ResultError, match="no finite number"):
        result.finish(made, tmp_path / "one.json")
    assert not list(tmp_path.iterdir())


def test_what_is_published_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    here = str(machine.REPOSITORY / "benchmarks" / "codec.py")
    elsewhere = str(tmp_path / "scans" / "case")
    given = [here, "--data", elsewhere, f"--output={tmp_path}/out.json", "--peers", "../peers/bin/python", "--quick"]
    shown = machine.command_line(given)
    assert shown == ["benchmarks/codec.py", "--data", "…/case", "--output=…/out.json", "--peers", "…/python", "--quick"]
    assert machine.command_line(["benchmarks/codec.py"]) == ["benchmarks/codec.py"]


def test_a_busy_machine_is_noted() -> None:
    assert not machine.busy_warning(0.2, 1.1)
    assert "busy" in machine.busy_warning(0.9, 1.1)[0]
    assert "busy" in machine.busy_warning(0.1, 2.0)[0]


def test_one_core_is_given_back() -> None:
    os = pytest.importorskip("os")
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system holds no process to a core")
    before = os.sched_getaffinity(0)
    with machine.one_core() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
