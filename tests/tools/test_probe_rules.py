"""The rules of a probe: what a finding is, who is in a task, whom pretraining saw, who opened the test side."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probing.case import SEEN, UNSEEN, labels_of, make_case, patients_to_test
from probing.errors import ProbeError, RefusedError, UsageError
from probing.features import patch_shares
from probing.findings import Finding, findings_of
from probing.opened import ledger_of, open_test
from probing.pretraining import Pretraining, pretraining_of, train_side
from probing.source import Source, open_source
from probing.tasks import count_malignancy, median_of, tasks_named
from releasing.lineage import lineage_of

import dinox_model
from dinox_io import ShardSet, open_shards
from dinox_io.labels import Mark, label_path, mark_of_mask, write_labels
from dinox_io.placed import JoinedMarks, join
from dinox_train.checkpoint import checkpoint_digest, save_checkpoint
from dinox_train.data import _sides
from tests.io.conftest import MakeVolume, WriteSet, make_volume, write_set  # noqa: F401 (fixtures)
from tests.model.foreign_weights import SMALL

Z = [-10.0 + 2.0 * z for z in range(6)]


def a_mark(series: str, masks: np.ndarray, *, first: int = 1, target: int = 1, label: str = "nodule", **ratings: float):
    return mark_of_mask(
        masks, z_mm=Z[first : first + len(masks)], corner=(4, 5), series=series, label=label, reader="r", target=target,
        ratings=ratings,
    )  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet) -> ShardSet:  # noqa: F811
    """Patients 1 and 2 to train on, 3 in val, 4 in test, 5 in none; 6 slices of 16 x 20 each."""
    volumes = [make_volume(number) for number in range(1, 6)]
    sides = {volumes[2].id: "val", volumes[3].id: "test", volumes[4].id: "none"}
    write_set(tmp_path / "set", [volumes], sides=sides)
    return open_shards(tmp_path / "set")


def by_side(shards: ShardSet, side: str) -> list[str]:
    """Series of a side."""
    return [volume.series for volume in shards.volumes if volume.split == side]


def findings_in(shards: ShardSet, marks: list[Mark]) -> list[Finding]:
    return findings_of(join(marks, shards), shards.volumes, {volume.patient for volume in shards.volumes})


# ------------------------------------------------------------------------------------------ findings


def test_a_finding_is_what_half_of_its_readers_outlined(shards: ShardSet):
    series = by_side(shards, "val")[0]
    masks = np.zeros((4, 2, 3, 4), bool)
    masks[:3, 0, 0, 0] = True  # three of four
    masks[:2, 1, 1, 1:3] = True  # two: half
    masks[0, 1, 2, 3] = True  # one
    found = findings_in(shards, [a_mark(series, one, m=float(number)) for number, one in enumerate(masks[:3])]
                        + [a_mark(series, np.ones((1, 1, 1), bool), first=1, m=9.0)])  # fmt: skip
    [finding] = found
    on = [finding.on_slice(z, (16, 20)) for z in range(6)]
    assert sorted(finding.ratings["m"]) == [0.0, 1.0, 2.0, 9.0]
    assert [int(one.sum()) for one in on] == [0, 1, 2, 0, 0, 0]
    assert on[1][4, 5]
    assert on[2][5, 6:8].all()
    assert finding.center == 2
    assert finding.is_outlined
    sizes = finding.sizes()
    assert sizes[0] == pytest.approx(3 * 2.0 * 0.7 * 0.7)
    assert sizes[3:] == pytest.approx([2 * 2.0, 2 * 0.7, 3 * 0.7])


def test_without_consensus_all_that_was_outlined_counts_and_without_outlines_the_box(shards: ShardSet):
    series = by_side(shards, "val")[0]
    three = np.eye(3, dtype=bool)[:, None, :, None]  # each reader another row
    [finding] = findings_in(shards, [a_mark(series, one) for one in three])
    assert finding.mask.sum() == 3
    boxed = dataclasses.replace(a_mark(series, np.ones((2, 2, 2), bool)), mask=None)
    [finding] = findings_in(shards, [boxed])
    assert not finding.is_outlined
    assert finding.mask.all()
    assert finding.slices.tolist() == [1, 2]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_shares_of_patches_are_those_of_a_loop(height: int, width: int, side: int, seed: int):
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    found = patch_shares(mask, side).reshape(-(-height // side), -(-width // side))
    for (y, x), share in np.ndenumerate(found):
        part = mask[y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert share == pytest.approx(part.sum() / side**2, abs=1e-6)


# ------------------------------------------------------------------------------------------ tasks


def with_ratings(shards: ShardSet, *ratings: list[float]) -> tuple[JoinedMarks, list[Finding]]:
    """A finding of each list, with a rating of malignancy by each reader."""
    series = by_side(shards, "train")[0]
    one = np.ones((1, 1, 1), bool)
    marks = [
        a_mark(series, one, target=number, malignancy=value)
        for number, values in enumerate(ratings)
        for value in values
    ]
    joined = join(marks, shards)
    return joined, findings_of(joined, shards.volumes, {volume.patient for volume in shards.volumes})


def test_malignancy_by_the_rules(shards: ShardSet):
    joined, findings = with_ratings(
        shards, [5, 5], [1, 2, 2], [3, 3, 4], [3, 4, 4, 3], [2, 3, 3, 2], [4, 4, 5], [1, 3, 5, 3], [5]
    )  # fmt: skip
    everybody = {finding.patient for finding in findings}
    without, with_three = tasks_named("malignancy", shards, joined, findings, everybody)
    # medians: - 2 3 3.5 2.5 4 3 -
    assert without.labels.tolist() == [False, True, False, True]
    assert with_three.labels.tolist() == [False, False, True, False, True, False]
    for task in (without, with_three):
        assert task.aim == 0.90
        assert task.counts["findings"] == 8
        assert task.counts["too_few_readers"] == 2
        assert [task.counts[f"median_{side}"] for side in ("below", "middle", "above")] == [2, 2, 2]
    assert without.counts["left_out"] == 4
    assert with_three.counts["left_out"] == 2


@given(st.lists(st.lists(st.integers(1, 5).map(float), max_size=5), max_size=12))
def test_counts_of_malignancy(ratings: list[list[float]]):
    counts = count_malignancy(ratings)
    read = [sorted(one) for one in ratings if len(one) >= 3]
    medians = [(one[(len(one) - 1) // 2] + one[len(one) // 2]) / 2 for one in read]
    assert counts.too_few_readers == len(ratings) - len(read)
    assert [counts.below, counts.middle, counts.above] == [
        sum(median < 3 for median in medians), medians.count(3), sum(median > 3 for median in medians)
    ]  # fmt: skip
    assert median_of([]) is None


def test_one_thing_in_two_series_is_one_unit(tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet):  # noqa: F811
    volumes = [make_volume(1, patient=7), make_volume(2, patient=7), make_volume(3)]
    write_set(tmp_path / "set", [volumes])
    shards = open_shards(tmp_path / "set")
    one = np.ones((1, 1, 1), bool)
    marks = [a_mark(volume.series, one, target=4, texture=5.0 if number < 2 else 1.0) for number, volume in
             enumerate(volumes)]  # fmt: skip
    joined = join(marks, shards)
    findings = findings_of(joined, shards.volumes, {volume.patient for volume in volumes})
    [task] = tasks_named("type", shards, joined, findings, {volume.patient for volume in volumes})
    assert len(task.items) == 3
    assert len(task.labels) == 2
    assert sorted(np.bincount(task.unit_of).tolist()) == [1, 2]
    assert task.labels.sum() == 1
    assert task.patients[task.labels].tolist() == [volumes[0].patient]


def test_presence_is_a_mark_on_the_slice(shards: ShardSet):
    series = by_side(shards, "train")
    marks = [a_mark(series[0], np.ones((3, 1, 1), bool), first=2)]
    joined = join(marks, shards)
    everybody = {volume.patient for volume in shards.volumes}
    [task] = tasks_named("presence", shards, joined, findings_in(shards, marks), everybody)
    # 2 mm slices, windows every 5 mm: every second; the other volumes have no mark and are not in it.
    assert [item.center for item in task.items] == [0, 2, 4]
    assert task.labels.tolist() == [False, True, True]
    assert task.counts == {"volumes": 1}


def test_labels_and_ratings_of_any_user(shards: ShardSet):
    series, one = by_side(shards, "train")[0], np.ones((1, 1, 1), bool)
    marks = [a_mark(series, one, target=number, label=label, score=value)
             for number, (label, value) in enumerate([("cyst", 0.2), ("cyst", 0.9), ("scar", 0.5)])]  # fmt: skip
    joined, findings = join(marks, shards), findings_in(shards, marks)
    everybody = {finding.patient for finding in findings}
    [task] = tasks_named("label:cyst", shards, joined, findings, everybody)
    assert task.labels.tolist() == [True, True, False]
    [task] = tasks_named("rating:score:0.5", shards, joined, findings, everybody)
    assert task.labels.tolist() == [False, True, False]
    for name, kind, said in (
        ("label:cyts", ProbeError, "cyst"), ("rating:scor:1", ProbeError, "score"), ("type", ProbeError, "texture"),
        ("rating:score", UsageError, "write"), ("rating:score:much", UsageError, "write"),
        ("presense", UsageError, "presence"),
    ):  # fmt: skip
        with pytest.raises(kind, match=said):
            tasks_named(name, shards, joined, findings, everybody)


# ------------------------------------------------------------------------------------------ what pretraining saw


def state_of(digest: str, shards: str, **data: Any) -> dict[str, Any]:
    config = {"data": {"shards": shards, "limit": None, **data}, "run": {"folder": "runs/x", "init_from": None}}
    return {"update": 3, "config": config, "shards": [[digest, 1.0]]}


def source_of(state: dict[str, Any] | None) -> Source:
    return Source(folder=Path("nowhere/checkpoints/step"), model=dinox_model.build(SMALL), state=state, notes=())


def test_seen_are_the_patients_of_the_train_side(shards: ShardSet, tmp_path: Path):
    found = pretraining_of(source_of(state_of(shards.digest, "moved away", limit=9)), [tmp_path / "set"])
    assert found.known
    assert found.patients == {volume.patient for volume in shards.volumes if volume.split == "train"}
    assert "9 windows" in found.notes[0]
    assert patients_to_test(shards, ("val",), found, allow_seen=False).keys() == {UNSEEN}
    with pytest.raises(RefusedError, match="saw 2 of the 3 patients"):
        patients_to_test(shards, ("train", "val"), found, allow_seen=False)
    apart = patients_to_test(shards, ("train", "val"), found, allow_seen=True)
    assert {kind: len(patients) for kind, patients in apart.items()} == {UNSEEN: 1, SEEN: 2}


def test_a_set_that_grew_is_found_as_it_was(tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet):  # noqa: F811
    folder = tmp_path / "set"
    before = write_set(folder, [[make_volume(1)]])
    write_set(folder, [[make_volume(2)]], previous=before)
    found = pretraining_of(source_of(state_of(before["self"], str(folder))), [])
    assert found.known
    assert found.patients == {make_volume(1).patient}


def test_what_the_run_before_saw_counts_too(
    shards: ShardSet, tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet  # noqa: F811
) -> None:  # fmt: skip
    other = write_set(tmp_path / "other", [[make_volume(9)]])
    model = dinox_model.build(SMALL)
    parent = save_checkpoint(
        tmp_path / "parent", 2, teacher=model, tensors={}, state=state_of(other["self"], str(tmp_path / "other"))
    )
    state = state_of(shards.digest, str(tmp_path / "set"))
    state["config"]["run"]["init_from"] = str(parent)
    child = save_checkpoint(tmp_path / "child" / "checkpoints", 3, teacher=model, tensors={}, state=state)
    found = pretraining_of(open_source(child), [])
    train = {volume.patient for volume in shards.volumes if volume.split == "train"}
    assert found.patients == train | {make_volume(9).patient}
    assert open_source(tmp_path / "child").folder == child
    assert found.notes == [f"the checkpoint that is at {parent.name} now is taken for the one that it began with"]
    gone = state_of(shards.digest, str(tmp_path / "set")) | {
        "removals": [{"began": other["self"]}, {"began": "0" * 64}]
    }
    found = pretraining_of(source_of(gone), [tmp_path / "other"])
    assert found.patients == train | {make_volume(9).patient}, "a patient who was withdrawn since was seen"
    assert "withdrawn" in found.notes[0]
    state["config"]["run"]["init_from"] = str(tmp_path / "dinov3")
    found = pretraining_of(source_of(state), [])
    assert not found.known, "nobody says whom those weights saw: they may be an export of a run on these patients"
    assert "dinov3" in found.notes[0]


def test_a_run_before_that_was_replaced_is_not_taken_for_it(
    shards: ShardSet, tmp_path: Path, make_volume: MakeVolume, write_set: WriteSet  # noqa: F811
) -> None:  # fmt: skip
    sets = [write_set(tmp_path / name, [[make_volume(number)]]) for name, number in (("one", 8), ("two", 9))]
    states = [state_of(one["self"], str(tmp_path / name)) for one, name in zip(sets, ("one", "two"), strict=True)]
    model = dinox_model.build(SMALL)
    parent = save_checkpoint(tmp_path / "parent", 2, teacher=model, tensors={}, state=states[0])
    state: dict[str, Any] = state_of(shards.digest, str(tmp_path / "set"))
    state["began_with"] = {"digest": checkpoint_digest(parent)}
    state["config"]["run"]["init_from"] = str(parent)
    places = [tmp_path / "set"]
    found = pretraining_of(source_of(state), places)
    assert (found.known, found.notes) == (True, [])
    assert make_volume(8).patient in found.patients

    shutil.rmtree(parent)
    save_checkpoint(tmp_path / "parent", 2, teacher=model, tensors={}, state=states[1])
    found = pretraining_of(source_of(state), places)
    assert not found.known
    assert make_volume(9).patient not in found.patients
    with pytest.raises(RefusedError, match=r"no longer at step-00000002: another checkpoint lies there now"):
        patients_to_test(shards, ("val",), found, allow_seen=False)
    lineage = lineage_of(source_of(state), None, places)
    assert [one.digest for one in lineage.sets] == [shards.digest]
    assert lineage.started_from == "step-00000002"

    # Weights without a checkpoint, where one lies now.
    found = pretraining_of(source_of(state | {"began_with": {"digest": None}}), places)
    assert not found.known


def test_a_circle_of_runs_ends(shards: ShardSet, tmp_path: Path) -> None:
    state = state_of(shards.digest, str(tmp_path / "set"))
    state["config"]["run"]["init_from"] = str(tmp_path / "step-00000003")
    save_checkpoint(tmp_path, 3, teacher=dinox_model.build(SMALL), tensors={}, state=state)
    with pytest.raises(RefusedError, match=r"more than 32 runs"):
        pretraining_of(source_of(state), [])


def test_a_patient_is_seen_by_its_volume_under_another_name(shards: ShardSet):
    val = next(volume for volume in shards.volumes if volume.split == "val")
    found = Pretraining(digests={val.digest})
    assert found.saw({volume.patient for volume in shards.volumes}, shards.volumes) == {val.patient}


def test_what_is_not_known_counts_as_seen(shards: ShardSet, tmp_path: Path):
    for state in (None, state_of("0" * 64, "elsewhere")):
        found = pretraining_of(source_of(state), [tmp_path / "set"])
        assert not found.known
        with pytest.raises(RefusedError, match="not known"):
            patients_to_test(shards, ("val",), found, allow_seen=False)


@given(st.sets(st.sampled_from(["train", "val", "test", "none"]), min_size=1))
def test_the_side_is_the_trainers(sides: set[str]):
    if sides <= {"test", "none"} and "test" in sides:
        return  # the trainer refuses such a set
    assert train_side(sides) == _sides(sides, [("set", None)])[0]


def test_none_and_test_volumes_are_not_in_a_probe(shards: ShardSet, tmp_path: Path):
    one = np.ones((1, 1, 1), bool)
    marks = [a_mark(volume.series, one, target=volume.index) for volume in shards.volumes]
    write_labels(label_path(tmp_path / "set", "mine"), marks)
    labels = labels_of(tmp_path / "set", None)
    sides = {volume.patient: volume.split for volume in shards.volumes}
    for held_out, expected in ((False, {"train", "val"}), (True, {"train", "val", "test"})):
        case = make_case(shards, labels, {UNSEEN: {"x"}}, held_out=held_out)
        assert {sides[finding.patient] for finding in case.findings} == expected
        assert {sides[patient] for patient in case.patients} == expected
        assert {shards.volumes[number].split for number in case.scans} == expected
        assert {sides[patient] for patient in case.learn} == {"train", "val"}


def test_labels_that_are_not_there(shards: ShardSet, tmp_path: Path):
    with pytest.raises(UsageError, match="no labels"):
        labels_of(tmp_path / "set", None)
    one = np.ones((1, 1, 1), bool)
    for name in ("a", "b"):
        write_labels(label_path(tmp_path / "set", name), [a_mark(shards.volumes[0].series, one)])
    with pytest.raises(UsageError, match="a, b"):
        labels_of(tmp_path / "set", None)
    with pytest.raises(UsageError, match="'c'"):
        labels_of(tmp_path / "set", "c")


# ------------------------------------------------------------------------------------------ the ledger


def test_openings_are_counted_and_kept(shards: ShardSet, tmp_path: Path):
    path = ledger_of(tmp_path / "set")
    assert path == tmp_path / "set.test-openings.jsonl"
    assert [open_test(path, shards, "n", ["presence"], "l") for _ in range(3)] == [0, 1, 2]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    lines[0] |= {"set": "0" * 64}  # an earlier state of the set, with the same test side
    lines[1] |= {"set": "0" * 64, "test": "1" * 64}  # another set
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert open_test(path, shards, "n", ["presence"], "l") == 2
    path.write_text(path.read_text() + '{"set": "torn')
    with pytest.raises(ProbeError, match="line 5"):
        open_test(path, shards, "n", ["presence"], "l")
    with pytest.raises(ProbeError, match="--ledger"):
        open_test(tmp_path / "no folder" / "ledger", shards, "n", ["presence"], "l")
