"""Parts of an array job, united, are one pack; what does not fit together is refused, and stopping it loses nothing."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_io import open_shards
from dinox_io.output import OutputFolder, PackError
from dinox_io.part import Part
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.remove import remove_patient
from dinox_io.verify import verify_set
from tests.io.dicom_factory import slice_dataset, write, write_series
from tests.io.small_packs import (
    KEY,
    contents,
    facts,
    merged,
    packed,
    packed_in_parts,
    patients,
    same_process,  # noqa: F401 (a fixture)
    stopped_before,
)

pytestmark = pytest.mark.usefixtures("same_process")


@settings(max_examples=30)
@given(
    st.integers(1, 50).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))),
    st.text("/.abc é\udc80", max_size=40),
)
def test_each_name_is_of_one_part(part: tuple[int, int], name: str) -> None:
    number, of = part
    assert Part.parse(f"{number}/{of}") == Part(number, of)
    assert sum(Part(one, of).holds(name) for one in range(1, of + 1)) == 1
    assert sum(Part(one, of).holds(name) for one in range(of)) == 1
    assert Part(0, of).holds(name) == Part(of, of).holds(name)


@pytest.mark.parametrize("text", ["", "1", "1/0", "3/2", "-1/2", "1/2/3", "a/2", "1/1000000000000"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no part"):
        Part.parse(text)


@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_parts_united_are_one_pack(tmp_path: Path, of: int) -> None:
    source, out = patients(tmp_path / "in", 6, twins=True), tmp_path / "out"
    whole = packed(source, tmp_path / "whole", val_fraction=0.5)
    report = packed_in_parts(source, out, of, val_fraction=0.5)
    assert facts(out) == facts(tmp_path / "whole")
    assert facts(out)["leaks"] != []
    assert (report.exit_code, report.new_volumes, report.series) == (whole.exit_code, whole.new_volumes, whole.series)
    assert verify_set(out) == []
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["manifests", "private"]
    again = merged(source, out)
    assert (again.exit_code, again.new_volumes, again.series) == (whole.exit_code, 0, whole.series)
    united = contents(out)
    packed(source, out, val_fraction=0.5)
    assert contents(out) == united


@settings(max_examples=3)
@given(numbers=st.permutations([0, 1, 2]), shard_bytes=st.sampled_from([1, 24_000, 10**9]))
def test_neither_the_order_nor_the_shards_of_parts_matter(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    source = patients(folder / "in", 3)
    packed(source, folder / "whole", shard_bytes=shard_bytes)
    for number in numbers:
        packed(source, folder / "out", part=Part(number, 3), shard_bytes=shard_bytes)
    merged(source, folder / "out", shard_bytes=shard_bytes)
    assert facts(folder / "out") == facts(folder / "whole")


def test_a_part_touches_its_own_folder_only_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    source, out = patients(tmp_path / "in", 6), tmp_path / "out"
    first = packed(source, out, part=Part(1, 2))
    assert [path.name for path in out.iterdir()] == ["part-1-of-2"]
    packed(source, out, part=Part(2, 2))
    before = contents(out)
    again = packed(source, out, part=Part(1, 2))
    assert contents(out) == before
    assert (again.exit_code, again.new_volumes, again.in_set) == (first.exit_code, 0, first.in_set)
    record = json.loads(before["part-1-of-2/part.json"])
    assert (record["part"], record["of"], record["options"]["min_slices"]) == (1, 2, 3)
    assert "--merge --output" in first.lines("OUT")[-1]


def test_a_part_without_volumes_is_done_too(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 2)
    reports = [packed(source, out, part=Part(number, 2)) for number in (1, 2)]
    assert sorted(report.exit_code for report in reports) == [0, 1]  # one has the series, the other has nothing
    assert all((out / f"part-{number}-of-2/part.json").exists() for number in (1, 2))
    report = merged(source, out)
    assert (report.exit_code, report.manifest) == (1, None)
    packed(source, tmp_path / "whole")
    assert facts(out) == facts(tmp_path / "whole")
    assert merged(source, out).exit_code == 1


def test_parts_add_to_a_set_what_it_has_not(tmp_path: Path) -> None:
    source, out = patients(tmp_path / "in", 6), tmp_path / "out"
    write_series(source / "changing", 4, series="1.70", patient="P70")
    for name in (out, tmp_path / "whole"):
        packed(source / "changing", name)
    shard = contents(out)["shard-000000.tar"]
    write(slice_dataset(4, series="1.70", patient="P70"), source / "changing/later.dcm")
    packed(source, tmp_path / "whole")
    report = packed_in_parts(source, out, 3)
    assert contents(out)["shard-000000.tar"] == shard
    assert facts(out) == facts(tmp_path / "whole")
    assert "SERIES_CHANGED" in {row["code"] for row in report.rejected}
    assert (report.exit_code, report.new_volumes) == (3, 6)


def two_parts(tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    source, out = patients(tmp_path / "in", 6), tmp_path / "out"
    for number in (1, 2):
        packed(source, out, part=Part(number, 2), **options)
    return source, out


def break_off(tmp_path: Path, source: Path, out: Path, what: str) -> None:
    """Make two finished parts something that cannot be united."""
    first, second = out / "part-1-of-2", out / "part-2-of-2"
    shard = second / "shard-000000.tar"
    if what == "missing":
        shutil.rmtree(second)
    elif what == "twice":
        packed(source, out, part=Part(0, 2))
    elif what == "numbers":
        packed(source, out, part=Part(1, 3))
    elif what == "options":
        shutil.rmtree(second)
        packed(source, out, part=Part(2, 2), preset="fast")
    elif what == "key":
        shutil.rmtree(second)
        (tmp_path / "key").write_bytes(b"another key of the tests")
        packed(source, out, part=Part(2, 2))
    elif what == "unrecorded":
        (second / "part.json").unlink()
    elif what == "rows":
        (second / "rejected.jsonl").write_text("")
    elif what == "no manifest":
        (second / "manifest.json").unlink()
    elif what == "pixels":
        data = bytearray(shard.read_bytes())
        data[6000] ^= 1
        shard.write_bytes(data)
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif what == "in both":
        for name in ("in_one", "in_two"):
            packed(source, tmp_path / name)
        packed(source, out)
    elif what == "old record":
        for number, slices in ((1, 4), (2, 2)):
            write_series(tmp_path / f"earlier/s{number}", slices, series=f"1.6.{number}")  # the second is too short
        packed(tmp_path / "earlier", tmp_path / "other")
        assert (tmp_path / "other/rejected.jsonl").stat().st_size
        shutil.copy(tmp_path / "other/rejected.jsonl", first / "rejected.jsonl")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", r"lacks part 2 of 2: run --part I/2"),
        ("twice", r"part-0-of-2 and part-2-of-2 .* are the same part"),
        ("numbers", r"different numbers of parts \(2, 3\)"),
        ("options", r"different options \(level\)"),
        ("key", r"different options \(key_id\)"),
        ("unrecorded", r"part-2-of-2 is not done.*--part 2/2 again"),
        ("rows", r"part-2-of-2 is not done, or was changed since"),
        ("no manifest", r"part-2-of-2 is not done, or was changed since"),
        ("pixels", r"part-2-of-2 is damaged: shard-000000\.tar"),
        ("cut", r"part-2-of-2 is damaged: shard-000000\.tar: has \d+ bytes"),
        ("in both", r"volume \w+ of .* stands in the set"),
        ("old record", r"part-1-of-2 is not done, or was changed since"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_changed(tmp_path: Path, what: str, said: str) -> None:
    source, out = two_parts(tmp_path)
    break_off(tmp_path, source, out, what)
    before = contents(out)
    with pytest.raises(PackError, match=said):
        merged(source, out)
    assert contents(out) == before


def test_options_that_differ_from_those_of_the_parts_are_refused(tmp_path: Path) -> None:
    source, out = two_parts(tmp_path)
    with pytest.raises(PackError, match="another level"):
        merged(source, out, preset="fast")
    (tmp_path / "key2").write_bytes(b"another key of the tests")
    with pytest.raises(PackError, match="another key than"):
        merged(source, out, key_file=tmp_path / "key2")
    assert merged(source, out, key_file=None).new_volumes == 6


def test_a_part_at_work_is_waited_for_by_nobody(tmp_path: Path) -> None:
    source, out = two_parts(tmp_path)
    with (
        OutputFolder(out / "part-1-of-2").locked(),
        pytest.raises(PackError, match=r"another packer is at work on .*1-of-2"),
    ):
        merged(source, out)


def test_without_parts_there_is_nothing_to_unite(tmp_path: Path) -> None:
    source = patients(tmp_path / "in", 2)
    with pytest.raises(PackError, match="there is no"):
        merged(source, tmp_path / "nowhere")
    packed(source, tmp_path / "out")
    with pytest.raises(PackError, match="pack the parts first"):
        merged(source, tmp_path / "out")


def test_parts_need_a_key_file(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="--part needs --key-file"):
        packed(patients(tmp_path / "in", 1), tmp_path / "out", part=Part(1, 2), key_file=None)
    assert not (tmp_path / "out").exists()


def test_a_patient_who_withdrew_stays_out_of_parts_and_of_what_they_become(tmp_path: Path) -> None:
    source, out = patients(tmp_path / "in", 6), tmp_path / "out"
    packed(source, out)
    patient, series = pseudonym(KEY, "patient", "P3\0"), pseudonym(KEY, "series", "1.7.3")
    with OutputFolder(out).held() as folder:
        remove_patient(folder, patient)
    report = packed_in_parts(source, out, 2)
    assert (report.exit_code, report.new_volumes) == (3, 0)
    assert [(row["series"], row["files"]) for row in report.rejected if row["code"] == "WITHDRAWN"] == [(None, 5)]
    for name, data in contents(out).items():
        assert patient.encode() not in data, name
        assert series.encode() not in data, name
    assert packed(source, out).new_volumes == 0
    assert packed(source / "s1", out).rejected == report.rejected


def test_where_the_file_system_has_no_links_shards_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    source, out = two_parts(tmp_path)
    monkeypatch.setattr(os, "link", no_link)
    merged(source, out)
    monkeypatch.undo()
    packed_in = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        from tests.io.small_packs import SameProcess

        patch.setattr("dinox_io.pack.WorkerPool", SameProcess)
        packed(source, packed_in)
    assert facts(out) == facts(packed_in)
    assert verify_set(out) == []


def test_what_the_data_set_is_goes_from_the_parts_to_the_whole(tmp_path: Path) -> None:
    about = {"licence": "CC-BY-3.0", "name": "made up", "weights_may_be_released": "yes"}
    source, out = two_parts(tmp_path, about=about)
    assert merged(source, out).manifest["about"] == about  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:index.msgpack")
@pytest.mark.parametrize("step", [pytest.param(4, id="some"), pytest.param(1, id="all", marks=pytest.mark.fault)])
def test_a_merge_stopped_before_any_change_to_the_disk_is_completed(  # F12
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    source, ready = patients(tmp_path / "in", 4), tmp_path / "ready"
    packed(source / "s0", ready)
    for number in (1, 2):
        packed(source, ready, part=Part(number, 2))
    shutil.copytree(ready, tmp_path / "whole")
    with stopped_before(10**9, monkeypatch) as count:
        report = merged(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert count[0] > 30
    for change in range(1, count[0] + 1, step):
        out = tmp_path / f"out{change}"
        shutil.copytree(ready, out)
        with stopped_before(change, monkeypatch):
            merged(source, out)
        with open_shards(out, verify="always") as shards:
            assert len(shards.volumes) in (1, 4)
        again = merged(source, out)
        assert contents(out) == whole, change
        assert (again.exit_code, again.series, again.in_set) == (report.exit_code, report.series, report.in_set)
        shutil.rmtree(out)


def test_a_part_stopped_before_any_change_to_the_disk_is_completed(  # F12
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = patients(tmp_path / "in", 4)
    with stopped_before(10**9, monkeypatch) as count:
        packed(source, tmp_path / "whole", part=Part(1, 2))
    whole = contents(tmp_path / "whole")
    for change in range(1, count[0] + 1, 2):
        out = tmp_path / f"out{change}"
        with stopped_before(change, monkeypatch):
            packed(source, out, part=Part(1, 2))
        packed(source, out, part=Part(1, 2))
        assert contents(out) == whole, change


def test_a_part_that_a_stopped_merge_has_already_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = two_parts(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dinox_io.output.shutil.rmtree", lambda _: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(PackError, match="cannot write"):
            merged(source, out)
    with pytest.raises(PackError, match="was interrupted, and has this part already"):
        packed(source, out, part=Part(1, 2))
    assert merged(source, out).in_set == 6
    packed(source, tmp_path / "whole")
    assert facts(out) == facts(tmp_path / "whole")


def test_progress_says_what_a_merge_does(tmp_path: Path) -> None:
    from dinox_io.merge import merge
    from tests.io.small_packs import settings as settings_of

    source, out = two_parts(tmp_path)
    said = io.StringIO()
    merge(settings_of(source, out), ProgressReport(said))
    assert re.search(r"merging: \d+\.\d kB to do\n", said.getvalue())
