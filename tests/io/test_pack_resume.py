"""A pack that was stopped is gone on with behind its last finished shard, and ends with the very same bytes."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinox_io import open_shards
from dinox_io.journal import FinishedShard, append_line, taken_over
from dinox_io.output import OutputFolder, PackError
from dinox_io.pack import find_series
from dinox_io.series import SeriesRules
from dinox_io.task import SeriesTask, mark_of
from dinox_io.verify import verify_set
from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.small_packs import Stopped, contents, disk_full_at, packed, patients, same_process, stopped_before  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("same_process")


def stop_after_shards(source: Path, out: Path, shards: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Pack until so many new shards are finished and in the journal."""
    count = 0

    def append(journal: Path, shard: FinishedShard) -> None:
        nonlocal count
        append_line(journal, shard)
        count += 1
        if count == shards:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("dinox_io.filler.append_line", append)
        with pytest.raises(Stopped):
            packed(source, out, **options)


def taken(said: io.StringIO) -> str:
    """What was said of an interrupted run."""
    lines = [line for line in said.getvalue().splitlines() if line.startswith("taken over")]
    return lines[0].removeprefix("taken over from an interrupted run: ") if lines else ""


def test_finished_shards_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, said = patients(tmp_path / "in", 7), tmp_path / "out", io.StringIO()
    packed(source, tmp_path / "whole")
    stop_after_shards(source, out, 2, monkeypatch)
    before = {name: (out / name).stat().st_ino for name in ("shard-000000.tar", "shard-000001.tar")}
    with pytest.raises(Exception, match="manifest"):
        open_shards(out)
    report = packed(source, out, said)
    assert taken(said).startswith("2 shards, ")
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert (report.exit_code, report.new_volumes) == (3, 7)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["touched", "added", "gone", "options", "damaged", "torn", "edited"])
def test_what_differs_is_packed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    source, out, said = patients(tmp_path / "in", 7), tmp_path / "out", io.StringIO()
    stop_after_shards(source, out, 3, monkeypatch)
    options = {}
    third = OutputFolder(out).interrupted()[1][2].summary.volumes[0].series
    series = {found.series: found for found in found_in(source, out)}[third]
    first_file = Path(series.files[0].path)
    journal = out / "private/packing.jsonl"
    if what == "touched":
        os.utime(first_file, ns=(1, 1))
    elif what == "added":
        write_series(first_file.parent, 6, series=series.identity.series_uid, patient=series.identity.patient_id)
    elif what == "gone":
        for path in first_file.parent.iterdir():
            path.unlink()
    elif what == "options":
        options = {"preset": "fast"}
    elif what == "damaged":
        (out / "shard-000001.tar").write_bytes((out / "shard-000001.tar").read_bytes()[:-1] + b"x")
    elif what == "torn":
        journal.write_bytes(b"\n".join(journal.read_bytes().split(b"\n")[:3])[:-20])
    else:
        lines = journal.read_text().splitlines()
        lines[2] = json.dumps({**json.loads(lines[2]), "closed_by": "another"})
        journal.write_text("\n".join(lines) + "\n")
    packed(source, out, said, **options)
    assert taken(said).split(",")[0] == ("" if what == "options" else "1 shards")
    packed(source, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def found_in(source: Path, out: Path) -> list:
    """The series of an input."""
    from dinox_io.progress import ProgressReport
    from tests.io.small_packs import KEY, SameProcess, settings

    return find_series(settings(source, out), KEY, SameProcess(1), ProgressReport(io.StringIO()))[0]  # type: ignore[arg-type]


def test_an_interrupted_addition_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, said = patients(tmp_path / "in", 7), tmp_path / "out", io.StringIO()
    for name in (out, tmp_path / "whole"):
        packed(source / "s0", name)
    packed(source, tmp_path / "whole")
    stop_after_shards(source, out, 2, monkeypatch)
    open_shards(out).close()
    packed(source, out, said)
    assert taken(said).startswith("2 shards, ")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_outcome_that_another_try_may_change_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, said = patients(tmp_path / "in", 7), tmp_path / "out", io.StringIO()
    with monkeypatch.context() as patch:
        from dinox_io import task

        def failing(*_: object, series: str, **__: object) -> None:
            raise OSError(f"no {series} now")

        readers = dict(task.READERS)
        patch.setattr(task, "READERS", {**readers, "dicom": failing})
        packed(source, tmp_path / "failed")
        assert "FILE_UNREADABLE" in (tmp_path / "failed/rejected.jsonl").read_text()
        reader, first = readers["dicom"], found_in(source, out)[0].series

        def failing_once(*arguments: object, series: str, **named: object) -> object:
            if series == first:
                raise OSError
            return reader(*arguments, series=series, **named)

        patch.setattr(task, "READERS", {**readers, "dicom": failing_once})
        stop_after_shards(source, out, 2, monkeypatch)
    packed(source, out, said)
    assert taken(said) == ""
    packed(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_nothing_is_left_of_a_pack_that_another_command_puts_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = patients(tmp_path / "in", 7), tmp_path / "out"
    stop_after_shards(source, out, 2, monkeypatch)
    with OutputFolder(out).held():
        assert not list(out.glob("shard-*"))
        assert not (out / "private/packing.jsonl").exists()


def test_a_journal_of_before_never_costs_a_shard_of_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = patients(tmp_path / "in", 7), tmp_path / "out"
    stop_after_shards(source, out, 3, monkeypatch)
    journal = (out / "private/packing.jsonl").read_bytes()
    packed(source, out)
    whole = contents(out)
    (out / "private/packing.jsonl").write_bytes(journal)
    packed(source, out)
    assert contents(out) == whole


def test_a_series_that_lies_in_two_shards_is_no_place_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, options = tmp_path / "in", tmp_path / "out", {"rules": SeriesRules(split_gaps=True), "shard_bytes": 1}
    for number in range(3):
        write_series(
            source / f"s{number}", 9, series=f"1.{number}", patient=f"P{number}",
            change=lambda z, dataset, seed=100 * number: set_pixels(dataset, stored_slice(z + seed)),
        )  # fmt: skip
        (source / f"s{number}/004.dcm").unlink()
    packed(source, tmp_path / "whole", **options)
    stop_after_shards(source, out, 3, monkeypatch, **options)
    said = io.StringIO()
    packed(source, out, said, **options)
    assert taken(said) == "2 shards, 1 series"
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:index.msgpack")  # killed before it is written, it is rebuilt by the reader
def test_stopped_before_any_change_to_the_disk_it_ends_with_the_same_bytes(  # F12
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = patients(tmp_path / "in", 4)
    for name in ("whole", "grown"):
        packed(source / "s0", tmp_path / name)
    with stopped_before(10**9, monkeypatch) as count:
        packed(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    before = contents(tmp_path / "grown")
    assert count[0] > 30
    for change in range(1, count[0] + 1, 2):
        out = tmp_path / f"out{change}"
        for name, data in before.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        (out / "private").chmod(0o700)
        with stopped_before(change, monkeypatch):
            packed(source, out)
        # Whatever stands there now is the set before or the set after.
        with open_shards(out, verify="always") as shards:
            assert len(shards.volumes) in (1, 4)
        packed(source, out)
        assert contents(out) == whole, change
    assert verify_set(out) == []


def test_a_full_disk_at_any_moment_leaves_nothing_half_written(  # F13
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = patients(tmp_path / "in", 3)
    packed(source / "s0", tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    packed(source, tmp_path / "whole")
    for change in range(1, 1000, 2):
        out = tmp_path / f"out{change}"
        shutil.copytree(tmp_path / "before", out)
        full = False
        with disk_full_at(change, monkeypatch):
            try:
                packed(source, out)
            except PackError as error:
                full = "no space left" in str(error)
        if not full:
            break
        names = [path.name for path in out.rglob(".*")]
        assert not any(name.endswith(".tmp") for name in names), change
        grown = json.loads((out / "manifest.json").read_bytes())["counts"]["volumes"] == 3
        assert grown or not any(name.endswith(".next") for name in names), change
        packed(source, out)
        assert contents(out) == contents(tmp_path / "whole"), change
    assert change > 20


def test_rows_and_manifest_change_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = patients(tmp_path / "in", 3), set()
    packed(source / "s0", tmp_path / "whole")
    with stopped_before(10**9, monkeypatch) as count:
        packed(source, tmp_path / "whole")
    for change in range(count[0] - 24, count[0] + 1):  # the commit
        out = tmp_path / f"out{change}"
        packed(source / "s0", out)
        old = (contents(out)["rejected.jsonl"], contents(out)["private/sources.jsonl"])
        with stopped_before(change, monkeypatch):
            packed(source, out)
        # Another command looks at the folder: after it, manifest and rows fit.
        with OutputFolder(out).held() as folder:
            grown = len(folder.previous["volumes"]) == 3  # type: ignore[index]
        rows = (contents(out)["rejected.jsonl"], contents(out)["private/sources.jsonl"])
        assert (rows != old) == grown
        assert not list(out.rglob(".*.next"))
        assert verify_set(out) == []
        seen.add(grown)
    assert seen == {False, True}


def test_a_damaged_set_keeps_its_rows(tmp_path: Path) -> None:
    source, out = patients(tmp_path / "in", 3), tmp_path / "out"
    packed(source / "s0", out)
    shard = out / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"kernel":"B30f"', b'"kernel":"B31f"', 1))
    before = {name: bytes_ for name, bytes_ in contents(out).items() if "shard" not in name}
    with pytest.raises(PackError, match="damaged"):
        packed(source, out)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    shard.write_bytes(data)
    said = io.StringIO()
    packed(source, out, said)
    assert taken(said)


def shard_of(series: list[str], closed_by: str | None, between_series: bool = True) -> FinishedShard:
    return FinishedShard(
        summary=None,  # type: ignore[arg-type]
        series=tuple((mark, ()) for mark in series),
        closed_by=closed_by,
        between_series=between_series,
    )


@pytest.mark.parametrize(
    ("marks", "taken_shards", "settled"),
    [
        ("abcdef", 2, 4),
        ("abcde", 2, 4),
        ("abcd", 1, 2),  # the second shard was closed by e: without it, it may go on
        ("abcxef", 1, 2),
        ("abxdef", 0, 0),
        ("xbcdef", 0, 0),
        ("", 0, 0),
    ],
)
def test_only_what_would_be_written_again_is_taken(marks: str, taken_shards: int, settled: int) -> None:
    shards = [shard_of(["a", "b"], "c"), shard_of(["c", "d"], "e")]
    assert taken_over(shards, list(marks)) == (shards[:taken_shards], settled)


def test_the_last_shard_is_taken_only_if_nothing_follows() -> None:
    shards = [shard_of(["a"], "b"), shard_of(["b"], None)]
    assert taken_over(shards, ["a", "b"]) == (shards, 2)
    assert taken_over(shards, ["a", "b", "c"]) == (shards[:1], 1)
    assert taken_over([shard_of(["a"], "b", between_series=False)], ["a", "b"]) == ([], 0)
    assert taken_over([shard_of(["a", ""], "b")], ["a", "", "b"]) == ([], 0)


def test_a_mark_changes_with_what_the_outcome_depends_on(tmp_path: Path) -> None:
    def mark(**changes: Any) -> str:
        return mark_of(replace(task, **changes))

    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "a.zip").write_bytes(b"abc")
    task = SeriesTask(
        paths=(str(tmp_path / "file"), str(tmp_path / "a.zip/member/one")), size=3, series="s", patient="p",
        patient_from="PatientID", identities=1, rules=SeriesRules(), known={},
    )  # fmt: skip
    marks = [
        mark(), mark(paths=task.paths[::-1]), mark(patient="q"), mark(identities=2), mark(encoding=("hilp", -1)),
        mark(rules=SeriesRules(min_slices=4)), mark(known={"s": "digest"}), mark(given={"spacing": 2}),
    ]  # fmt: skip
    assert mark(mark="taken") == marks[0]
    for name in ("file", "a.zip"):
        os.utime(tmp_path / name, ns=(1, 1))
        marks.append(mark())
        (tmp_path / name).write_bytes(b"abcd")
        os.utime(tmp_path / name, ns=(1, 1))
        marks.append(mark())
    (tmp_path / "file").unlink()
    marks.append(mark())
    assert len(set(marks)) == len(marks)
