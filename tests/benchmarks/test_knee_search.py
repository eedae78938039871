"""The search on a made-up machine whose knee is known; what follows from it: knee.json, page, overlay, pictures."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from knee_search.axes import Given, Machine, axes_of
from knee_search.outcome import duration, outcome
from knee_search.page import page_of
from knee_search.pictures import write_pictures
from knee_search.points import CRASHED, Point, PointFile, PointsError, context_of
from knee_search.search import Found, Search
from knee_search.settings import Settings, of_record

from dinox_train.config import Config, difference, load_config, to_yaml, validate
from tests.benchmarks.knee_machine import GIB, MadeUpMachine

CONFIG = validate({"train": {"batch_size": 64, "updates": 1000}, "device": "cpu"})
ABOUT = {
    "date": "2026-11-22T04:00:00+00:00",
    "command": ["knee.py", "--minutes", "30"],
    "machine": {"cpu": "a <made-up> processor", "logical_cores": 4, "memory_bytes": 16 * GIB},
    "versions": {"torch": "2.13"},
    "config": "configs/demo.yaml",
    "overlay_name": "knee/overlay.yaml",
    "set": {"about": "the phantom", "digests": ["0" * 64], "label": "the set as it is"},
}


def searched(
    folder: Path, machine: MadeUpMachine, given: Given | None = None, *, minutes: float = 60.0, cold: bool = False
) -> Found:
    def axes(probe: Any) -> Any:
        names = ("cores", "is_gpu", "unified", "can_compile")
        return axes_of(given or Given(), CONFIG, Machine(**{name: probe[name] for name in names}))

    points = PointFile(folder / "points.jsonl", "one")
    running = Search(axes, machine, points, seconds=60 * minutes, tolerance=0.03, cold=cold, clock=machine.clock)
    try:
        return running.run()
    except KeyboardInterrupt:
        return running.found


def result_of(found: Found, config: Config = CONFIG, **freed: bool) -> dict[str, Any]:
    return outcome(found, config, ABOUT, tolerance=0.03, **{"free_batch": False, "free_precision": False, **freed})


def test_it_finds_the_knee_that_is_known(tmp_path: Path) -> None:
    found = searched(tmp_path, MadeUpMachine(noise=0.0005))
    assert found.complete
    assert found.knee is not None
    # A piece costs 0.1 s and an image 0.05 s: one of 64 takes 3.3 s an update, two of 32 take 3.4 s, four 3.6 s.
    assert (found.knee.micro_batch, found.knee.threads, found.knee.checkpointing) == (32, 1, "none")
    result = result_of(found)
    assert result["knee"]["bound"] == "compute"
    assert result["knee"]["waits"] == 0
    assert result["knee"]["confirmed"]
    assert all(abs(point["error"]) < 0.15 for point in result["points"]), "the model knows this machine"
    assert abs(result["knee"]["error"]) < 0.02


def test_memory_is_bisected_with_headroom(tmp_path: Path) -> None:
    small = MadeUpMachine(memory_bytes=2.7 * GIB)  # 1 GiB and 0.05 an image: 34 fit, 28 with a tenth free
    found = searched(tmp_path, small)
    assert found.largest[(64, "fp32", "off", "none")] == 16
    assert found.largest[(64, "fp32", "off", "block")] == 64
    result = result_of(found)
    plain = [point for point in result["points"] if point["settings"]["checkpointing"] == "none"]
    assert max(point["settings"]["micro_batch"] for point in plain) == 16
    bounds = {point["bound"] for point in plain if point["settings"]["micro_batch"] == 16}
    assert bounds == {"memory size"}
    tried = [settings["micro_batch"] for kind, settings, _ in small.asked if kind == "compute"]
    assert 64 in tried
    with pytest.raises(ValueError, match=r"no update could be computed|no micro-batch fits"):
        searched(tmp_path / "none", MadeUpMachine(memory_bytes=0.5 * GIB))


def test_a_slow_disk_moves_the_bound_to_io(tmp_path: Path) -> None:
    fast = result_of(searched(tmp_path / "fast", MadeUpMachine()))
    slow = result_of(searched(tmp_path / "slow", MadeUpMachine(storage_gbps=0.002)))
    assert (fast["knee"]["bound"], slow["knee"]["bound"]) == ("compute", "io")
    assert slow["knee"]["parts"]["by"] == "io"
    assert abs(slow["knee"]["error"]) < 0.15
    assert slow["knee"]["waits"] > 0.02
    assert any("waits for data" in note for note in slow["notes"])
    assert "io bounds it" in slow["sentence"]


def test_decoders_that_are_too_few_are_not_chosen(tmp_path: Path) -> None:
    found = searched(tmp_path, MadeUpMachine(compute_s=0.001, piece_s=0.0, decode_s=0.003, cores=4))
    assert found.knee is not None
    assert found.knee.threads > 1
    result = result_of(found)
    one = [point for point in result["points"] if point["settings"]["threads"] == 1]
    assert {point["bound"] for point in one} == {"decode"}


def test_a_crash_costs_its_point_only(tmp_path: Path) -> None:
    found = searched(tmp_path, MadeUpMachine(crashes={1}))
    assert found.complete
    assert found.knee is not None
    assert found.knee.threads == 2
    result = result_of(found)
    assert {one["settings"]["threads"] for one in result["failed"]} == {1}
    with pytest.raises(ValueError, match="no coupled run could be measured"):
        searched(tmp_path / "all", MadeUpMachine(crashes={1, 2, 4}))


def test_a_probe_that_failed_is_made_anew(tmp_path: Path) -> None:
    broken = MadeUpMachine()
    broken._probe = lambda settings, chance: (CRASHED, {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="cannot begin here"):
        searched(tmp_path, broken)
    assert searched(tmp_path, MadeUpMachine()).complete


@pytest.mark.parametrize("after", [0, 1, 3, 8, 20, 25])
def test_interrupted_it_goes_on_and_finds_the_same(tmp_path: Path, after: int) -> None:
    straight = searched(tmp_path / "straight", MadeUpMachine(noise=0.01))
    first = MadeUpMachine(noise=0.01, interrupt_after=after)
    stopped = searched(tmp_path / "stopped", first)
    assert not stopped.complete
    page_of(result_of(stopped))  # valid at any moment
    second = MadeUpMachine(noise=0.01, clock_s=first.clock_s)
    found = searched(tmp_path / "stopped", second)
    assert found.knee == straight.knee
    both = [json.dumps(one) for one in first.asked + second.asked]
    assert len(both) == len(set(both)), "something was measured twice"


def test_little_time_still_gives_a_result(tmp_path: Path) -> None:
    machine = MadeUpMachine()
    found = searched(tmp_path, machine, minutes=0.5)
    assert found.knee is not None
    assert found.confirmed is not None
    assert any("want of time" in note for note in found.notes)
    assert len(machine.asked) < 20
    assert result_of(found)["unmeasured"]


def test_the_choice_is_stable_under_noise(tmp_path: Path) -> None:
    def other(number: int) -> Settings | None:
        machine = MadeUpMachine(noise=0.01)
        machine.compute_s *= 1 + number * 1e-6  # other chances
        return searched(tmp_path / str(number), machine).knee

    chosen = [other(number) for number in range(5)]
    assert all(one is not None and one.threads == 1 and one.micro_batch in (32, 64) for one in chosen)


@pytest.mark.parametrize("freed", [False, True])
def test_the_overlay_is_taken_and_changes_no_mathematics(tmp_path: Path, freed: bool) -> None:
    given = Given(free_batch=freed, batch_size=(128,) if freed else None)
    result = result_of(searched(tmp_path, MadeUpMachine(), given), free_batch=freed)
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    (tmp_path / "overlay.yaml").write_text(result["overlay"])
    overlaid = load_config([tmp_path / "config.yaml", tmp_path / "overlay.yaml"])
    chosen = of_record(result["knee"]["settings"])
    assert (overlaid.train.accumulation, overlaid.data.threads) == (chosen.accumulation, chosen.threads)
    assert (overlaid.data.pool_mib, overlaid.data.pin) == (chosen.pool_mib, chosen.pin)
    changed = [line.partition(":")[0] for line in difference(CONFIG, overlaid)]
    assert changed == (["train.batch_size"] if freed else [])
    assert ("CHANGES WHAT IS LEARNT" in result["overlay"]) == freed


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        assert not [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("machine", [MadeUpMachine, lambda: MadeUpMachine(memory_bytes=2.7 * GIB, crashes={2})])
def test_page_and_pictures(tmp_path: Path, machine: Callable[[], MadeUpMachine]) -> None:
    result = json.loads(json.dumps(result_of(searched(tmp_path, machine())), allow_nan=False))
    checker = _Checker()
    checker.feed(page_of(result))
    assert checker.open == []
    assert result["sentence"] in checker.text
    assert "a <made-up> processor" in checker.text
    for heading in ("Coupled runs", "The parts by themselves", "Contention", "Prediction and measurement"):
        assert heading in checker.text
    for file in write_pictures(result, tmp_path):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.glob("*.png")} == {"coupled.png", "parts.png"}


def test_an_empty_search_has_a_page() -> None:
    result = result_of(Found())
    checker = _Checker()
    checker.feed(page_of(result))
    assert checker.open == []
    assert result["knee"] is None


def test_points_survive_a_torn_line_and_other_contexts(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    PointFile(path, "one").add(Point(kind="decode", settings={"threads": 1}, result={"a": 1.5}))
    PointFile(path, "two").add(Point(kind="decode", settings={"threads": 1}, result={"a": 2.5}))
    with path.open("ab") as file:
        file.write(b'{"version": 1, "kind"')
    again = PointFile(path, "one")
    assert (again.get("decode", {"threads": 1}) or Point(kind="", settings={})).result == {"a": 1.5}
    assert again.get("decode", {"threads": 2}) is None
    assert again.others == 1
    again.add(Point(kind="decode", settings={"threads": 2}))
    assert len(path.read_bytes().splitlines()) == 3
    path.write_text('{"version": 2, "context": "one"}\n')
    with pytest.raises(PointsError, match="version 2"):
        PointFile(path, "one")
    path.write_text("no point\n")
    with pytest.raises(PointsError, match="no point of a knee"):
        PointFile(path, "one")
    assert context_of({"a": 1}) != context_of({"a": 2})


def test_durations_are_said_as_people_say_them() -> None:
    assert [duration(hours) for hours in (0.001, 0.5, 3.0, 72.0)] == ["0.1 minutes", "30 minutes", "3 hours", "3 days"]
