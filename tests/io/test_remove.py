"""--remove: nothing of a patient stays in any file, the set is whole at every moment, and it can be known again."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinox_io import open_shards, verify_set
from dinox_io.atomic import AtomicFile
from dinox_io.manifest import build_manifest, commit_set, read_manifest
from dinox_io.output import OutputFolder, PackError
from dinox_io.pack import PackSettings, pack
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.remove import Removal, remove_patient, withdrawn
from dinox_io.volume import Volume
from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)

KEY = b"a key of the tests"
REJECTED = {"code": "GAP", "reason": "r", "files": 3, "hint": "h"}


def remove(folder: Path, name: str) -> Removal:
    with OutputFolder(folder).held() as held:
        return remove_patient(held, name)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def add_rows(folder: Path, volumes: list[Volume]) -> None:
    """What a pack writes beside the shards, and labels."""
    (folder / "private").mkdir(exist_ok=True)
    sources = [
        {
            "series": v.series,
            "patient": v.patient,
            "series_uid": f"1.2.{v.series}",
            "files": [[f"/in/{v.series}.dcm", 9]],
        }
        for v in volumes
    ]
    sources.append({"code": "NOT_DICOM", "files": [["/in/readme", 3]]})
    rejected = [REJECTED | {"series": volume.series} for volume in volumes]
    marks = [{"series": volume.series, "z_mm": [1.0, 2.0], "label": "nodule"} for volume in volumes]
    (folder / "labels").mkdir(exist_ok=True)
    for path, rows in (("private/sources.jsonl", sources), ("rejected.jsonl", rejected), ("labels/a.jsonl", marks)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def volumes(make_volume) -> list[Volume]:
    """Seven volumes of five patients: 0 and 5 have one patient, 1 and 6 another."""
    return [make_volume(number, (3, 9, 8), patient=number % 5) for number in range(7)]


@pytest.fixture
def folder(tmp_path: Path, volumes, write_set) -> Path:
    """Grown twice: patient 1 came with the second manifest; its volumes stand in two shards, one of them alone."""
    path = tmp_path / "set"
    first = write_set(path, [[volumes[0], volumes[2]]])
    second = write_set(path, [[volumes[1], volumes[3], volumes[4]]], previous=first)
    write_set(path, [[volumes[6]], [volumes[5]]], previous=second)
    add_rows(path, volumes)
    return path


def test_nothing_of_a_patient_is_left_and_the_others_are_as_they_were(folder: Path, volumes) -> None:
    gone, first = [volumes[1], volumes[6]], json.loads(next(iter(sorted_manifests(folder))))
    before = read_manifest(folder)
    old = tree(folder)
    removal = remove(folder, gone[0].patient)
    new = tree(folder)
    assert (removal.series, removal.volumes, removal.emptied, removal.named_in) == (2, 2, False, ())
    assert (removal.deleted, removal.rewritten) == (
        ("shard-000001.tar", "shard-000002.tar"),
        ("shard-000004.tar",),
    )
    needles = [volume.patient for volume in gone] + [volume.series for volume in gone]
    needles += [digest["digest"] for digest in before["volumes"] if digest["id"] in needles]
    for needle in needles:
        assert [name for name, data in new.items() if needle.encode() in data] == []
        assert [name for name, data in old.items() if needle.encode() in data] != []
    for frame in frames(old, before, [volume.id for volume in gone]):
        assert [name for name, data in new.items() if frame in data] == []
    after = read_manifest(folder)
    assert after["removed"] == {"volumes": 2, "manifests": sorted(removal.manifests)}
    assert before["self"] in removal.manifests
    assert len(removal.manifests) == 2
    assert sorted(path.name for path in (folder / "manifests").iterdir()) == [f"{first['self']}.json"]
    assert after["counts"]["volumes"] == 5
    assert after["rejected"] == {"GAP": 5, "NOT_DICOM": 1} or after["rejected"] == {"GAP": 5}
    assert verify_set(folder) == []
    for path in (folder, folder / "manifests" / f"{first['self']}.json"):
        with open_shards(path) as shards:
            pixels = {volume.id: volume.hu for volume in volumes}
            for record in shards.volumes:
                np.testing.assert_array_equal(shards.read(record, 0, 3), pixels[record.id])
    kept = {volume.series for volume in volumes} - {volume.series for volume in gone}
    for name in ("rejected.jsonl", "labels/a.jsonl", "private/sources.jsonl"):
        rows = [json.loads(line) for line in new[name].splitlines()]
        assert {row["series"] for row in rows if row.get("series")} == kept
    assert any("can be found by that digest" in line for line in removal.lines())
    assert any("belong to no series" in line for line in removal.lines())


def sorted_manifests(folder: Path) -> list[str]:
    """Texts of the earlier manifests, the smallest set first."""
    return sorted((path.read_text() for path in (folder / "manifests").iterdir()), key=len)


def frames(files: dict[str, bytes], manifest: dict[str, Any], ids: list[str]) -> list[bytes]:
    """The first and last 24 bytes of the member with the pixels of each volume."""
    found = []
    for shard in manifest["shards"]:
        for member in shard["volumes"]:
            if member["id"] in ids:
                data = files[shard["name"]]
                start = data.index(f"{member['id']}.hu16.zst".encode()) + 512
                found += [data[start + 12 : start + 60], data[start + 80 : start + 120]]
    assert found
    return found


def test_one_series_of_a_patient(folder: Path, volumes) -> None:
    remove(folder, volumes[6].series)
    new = tree(folder)
    assert not any(volumes[6].series.encode() in data for data in new.values())
    assert any(volumes[1].patient.encode() in data for data in new.values())
    with OutputFolder(folder).held() as held:
        assert withdrawn(held).holds("f" * 32, volumes[6].series)
        assert not withdrawn(held).holds(volumes[1].patient, volumes[1].series)
        again = remove_patient(held, volumes[6].series)
    assert (again.series, "removed before" in again.lines()[0]) == (0, True)
    assert tree(folder) == new


def test_removing_one_after_the_other_counts_up(folder: Path, volumes) -> None:
    first = remove(folder, volumes[1].patient)
    middle = read_manifest(folder)["self"]
    second = remove(folder, volumes[3].patient)
    removed = read_manifest(folder)["removed"]
    assert removed["volumes"] == 3
    assert {*first.manifests, middle} == set(removed["manifests"]) == set(second.manifests)
    assert verify_set(folder) == []


@pytest.mark.parametrize("name", ["0" * 32, "x", "../../etc", "A" * 32])
def test_a_pseudonym_that_nobody_has_changes_nothing(folder: Path, name: str) -> None:
    before = tree(folder)
    with pytest.raises(PackError, match="pseudonym"):
        remove(folder, name)
    assert tree(folder) == before


def test_a_set_of_one_patient_is_no_set_any_more(tmp_path: Path, make_volume, write_set) -> None:
    volumes = [make_volume(number, (3, 9, 8), patient=0) for number in range(2)]
    first = write_set(tmp_path / "set", [volumes[:1]])
    write_set(tmp_path / "set", [volumes[1:]], previous=first)
    add_rows(tmp_path / "set", volumes)
    removal = remove(tmp_path / "set", volumes[0].patient)
    assert removal.emptied
    assert len(removal.manifests) == 2
    assert sorted(tree(tmp_path / "set")) == [
        "labels/a.jsonl", "private/sources.jsonl", "private/withdrawn.jsonl", "rejected.jsonl",
    ]  # fmt: skip
    assert not any(volumes[0].patient.encode() in data for data in tree(tmp_path / "set").values())
    write_set(tmp_path / "set", [[make_volume(7)]])
    with OutputFolder(tmp_path / "set").held() as held:
        assert withdrawn(held).holds(volumes[0].patient, "")


def test_a_patient_who_was_only_rejected(folder: Path, volumes) -> None:
    row = {"series": "a" * 32, "patient": "b" * 32, "files": [["/in/secret", 1]]}
    with (folder / "private/sources.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with (folder / "rejected.jsonl").open("a") as file:
        file.write(json.dumps(REJECTED | {"series": "a" * 32}) + "\n")
    shards = {name: data for name, data in tree(folder).items() if name.endswith(".tar")}
    removal = remove(folder, "b" * 32)
    assert (removal.volumes, removal.series, removal.manifests) == (0, 1, ())
    new = tree(folder)
    assert not any(b"a" * 32 in data or b"secret" in data for data in new.values())
    assert {name: data for name, data in new.items() if name.endswith(".tar")} == shards
    assert read_manifest(folder)["removed"] is None


def test_a_series_goes_whole_where_rows_do_not_agree_whose_it_is(folder: Path, volumes) -> None:
    path, gone, other = folder / "private/sources.jsonl", volumes[2], "e" * 32
    path.write_text(path.read_text().replace(gone.patient, other))
    removal = remove(folder, other)
    assert (removal.series, removal.volumes, removal.named_in) == (1, 1, ())
    for name, data in tree(folder).items():
        assert gone.series.encode() not in data, name
        assert other.encode() not in data, name
    assert verify_set(folder) == []
    with OutputFolder(folder).held() as held:  # whomever the input has it under
        assert withdrawn(held).holds(gone.patient, gone.series)
        assert withdrawn(held).holds(other, "f" * 32)
        assert not withdrawn(held).holds(gone.patient, "f" * 32)


def test_files_of_the_set_are_never_said_to_be_foreign(folder: Path, volumes) -> None:
    with (folder / "private/sources.jsonl").open("a") as file:
        file.write(json.dumps({"code": "DICOMDIR", "files": [[f"/in/{volumes[1].series}/DICOMDIR", 3]]}) + "\n")
    removal = remove(folder, volumes[1].patient)
    assert removal.named_in == ()
    assert any("private/sources.jsonl also lists" in line for line in removal.lines())


def test_a_side_that_equal_pixels_had_taken_comes_back(tmp_path: Path, make_volume, write_set) -> None:
    volumes = [make_volume(number, (3, 9, 8)) for number in range(3)]
    volumes[1].hu[:] = volumes[0].hu
    sides = dict.fromkeys((volumes[0].id, volumes[1].id), "none")
    leak = {"digest": "d", "volumes": sorted(sides), "sides": ["train", "val"]}
    manifest = write_set(tmp_path / "set", [volumes], sides=sides)
    options = {"split_seed": 0, "val_fraction": 0.0, "test_fraction": 0.0}
    again = build_manifest(
        [], sides={volume["id"]: volume["split"] for volume in manifest["volumes"]}, options=options,
        rejected_by_code={}, config_digest="c", leaks=[leak], packer="tests", sources={}, previous=manifest,
    )  # fmt: skip
    commit_set(tmp_path / "set", again)
    remove(tmp_path / "set", volumes[0].patient)
    after = read_manifest(tmp_path / "set")
    assert after["leaks"] == []
    assert {volume["split"] for volume in after["volumes"]} == {"train"}


def test_a_file_that_packing_does_not_know_is_named(folder: Path, volumes) -> None:
    (folder / "my notes.txt").write_text(f"look at {volumes[1].series}")
    removal = remove(folder, volumes[1].patient)
    assert removal.named_in == ("my notes.txt",)
    assert "my notes.txt" in removal.lines()[-2]


def test_parts_are_merged_first(folder: Path, volumes) -> None:
    (folder / "part-0-of-2").mkdir()
    with pytest.raises(PackError, match="--merge"):
        remove(folder, volumes[1].patient)


def test_a_damaged_shard_is_not_carried_over(folder: Path, volumes) -> None:
    """Its digest would vouch for the damage. The set stays, and nothing blocks other work on it."""
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(f"{volumes[3].id}.hu16.zst".encode()) + 512 + 40] ^= 1
    path.write_bytes(data)
    before = tree(folder)
    with pytest.raises(PackError, match=r"damaged.*shard-000001\.tar"):
        remove(folder, volumes[1].patient)
    assert tree(folder) == before


# --- kills -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def killed_at(step: int, patch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do `work`, but end before the `step`-th time that a file gets or loses its name; whether that came to pass."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return function(*arguments, **options)

        return call

    with patch.context() as context:
        context.setattr(Path, "unlink", counted(Path.unlink))
        context.setattr(Path, "replace", counted(Path.replace))
        context.setattr(AtomicFile, "abort", lambda file: file.file.close())  # a killed process tidies nothing up
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("emptied", [False, True])
def test_killed_before_any_step_the_same_command_ends_the_same(
    folder: Path, volumes, tmp_path: Path, write_set, monkeypatch: pytest.MonkeyPatch, emptied: bool
) -> None:
    patient = volumes[1].patient
    if emptied:
        folder = tmp_path / "one"
        write_set(folder, [[volumes[6]]], previous=write_set(folder, [[volumes[1]]]))
        add_rows(folder, [volumes[1], volumes[6]])
    whole, work = tmp_path / "whole", tmp_path / "work"
    shutil.copytree(folder, whole)
    remove(whole, patient)
    step = 0
    while True:
        step += 1
        shutil.copytree(folder, work)
        if not killed_at(step, monkeypatch, lambda: remove(work, patient)):
            break
        if (work / "manifest.json").exists():
            damages = [damage for damage in verify_set(work) if damage.file != "index.msgpack"]
            assert damages == []
            ids = {volume["patient"] for volume in read_manifest(work)["volumes"]}
            assert len(ids) in ((1,) if emptied else (4, 5))
        else:
            assert emptied
        remove(work, patient)
        assert tree(work) == tree(whole), f"killed before step {step}"
        shutil.rmtree(work)
    assert step > 12


def test_killed_and_then_packed_completes_the_removal(folder: Path, volumes, tmp_path: Path, monkeypatch) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    remove(whole, volumes[1].patient)
    assert killed_at(5, monkeypatch, lambda: remove(folder, volumes[1].patient))
    with OutputFolder(folder).held():
        pass
    assert tree(folder) == tree(whole)


def test_an_interrupted_removal_without_its_manifest_deletes_nothing(folder: Path, volumes, monkeypatch) -> None:
    assert killed_at(8, monkeypatch, lambda: remove(folder, volumes[1].patient))
    assert (folder / "private/removing.json").exists()
    (folder / "manifest.json").unlink()
    shards = [name for name in tree(folder) if name.endswith(".tar")]
    with pytest.raises(PackError, match="restore it"):
        remove(folder, volumes[1].patient)
    assert [name for name in tree(folder) if name.endswith(".tar")] == shards


# --- the whole way -----------------------------------------------------------------------------------------------


def test_from_dicom_and_out_for_good(tmp_path: Path, pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)
    source, out, key = tmp_path / "in", tmp_path / "out", tmp_path / "key"
    key.write_bytes(KEY)
    for number in range(4):
        write_series(
            source / f"SMITH{number}", 4, series=f"1.77.{number}", patient=f"SMITH{number}",
            change=lambda index, dataset, seed=100 * number: set_pixels(dataset, stored_slice(index + seed, 40, 30)),
        )  # fmt: skip
    write_series(source / "SMITH1" / "gap", 3, step_mm=1.0, series="1.78", patient="SMITH1")
    (source / "SMITH1" / "gap" / "001.dcm").unlink()

    def again() -> None:
        settings = PackSettings(inputs=(source,), output=out, key_file=key, workers=1)
        pack(settings, ProgressReport(io.StringIO()))

    again()
    before = read_manifest(out)
    mine = pseudonym(KEY, "patient", "SMITH1\0")
    needles = ["SMITH1", "1.77.1", "1.78", mine, *(pseudonym(KEY, "series", uid) for uid in ("1.77.1", "1.78"))]
    needles += [volume["digest"] for volume in before["volumes"] if volume["patient"] == mine]
    assert len(needles) == 7
    remove(out, mine)
    for _ in range(2):  # and when the same input is packed again
        for name, data in tree(out).items():
            assert [needle for needle in needles if needle.encode() in data] == [], name
        assert verify_set(out) == []
        assert read_manifest(out)["counts"]["patients"] == 3
        again()
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(row["code"], row["series"], row["files"]) for row in rows if row["code"] == "WITHDRAWN"] == [
        ("WITHDRAWN", None, 6)
    ]


@pytest.mark.fault
def test_sigkill_at_random_moments(folder: Path, volumes, tmp_path: Path, repository: Path) -> None:
    chance = random.Random(int(os.environ.get("DINOX_FAULT_SEED", "0")))
    whole, work = tmp_path / "whole", tmp_path / "work"
    shutil.copytree(folder, whole)
    code = (
        "import sys; from pathlib import Path; from dinox_io.output import OutputFolder; "
        "from dinox_io.remove import remove_patient; print('begin', flush=True)\n"
        "with OutputFolder(Path(sys.argv[1])).held() as held: remove_patient(held, sys.argv[2])"
    )

    def command(target: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-c", code, str(target), volumes[1].patient]
        process = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(repository)}, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    begin_s = time.monotonic()
    with command(whole) as process:
        assert process.wait() == 0
    took_s = time.monotonic() - begin_s
    for _ in range(int(os.environ.get("DINOX_FAULT_KILLS", "15"))):
        shutil.copytree(folder, work)
        with command(work) as process:
            time.sleep(chance.random() * took_s)
            process.kill()
        assert [damage for damage in verify_set(work) if damage.file != "index.msgpack"] == []
        with command(work) as process:
            assert process.wait() == 0
        assert tree(work) == tree(whole)
        shutil.rmtree(work)


def test_the_marks_give_nobody_away(folder: Path, volumes) -> None:
    remove(folder, volumes[1].patient)
    line = json.loads((folder / "private/withdrawn.jsonl").read_text())
    assert line == {"sha256": hashlib.sha256(b"withdrawn\0" + volumes[1].patient.encode()).hexdigest()}
    assert (folder / "private/withdrawn.jsonl").stat().st_mode & 0o777 == 0o600
