"""F36: the power fails before any of the calls that order writes; what is on the disk then resumes, and equals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dinox_train.checkpoint import newest_checkpoint, remove_leftovers
from dinox_train.metrics import LineFile, read_lines
from tests.faults.power_cut import Moment, Recorder, Tree
from tests.faults.run_outcome import assert_same_run, tensors

pytestmark = pytest.mark.usefixtures("tiny_preset")
EVERY, UPDATES = 2, 6
SETTINGS = (f"train.updates={UPDATES}", f"checkpoint.every={EVERY}", "evaluate.every=100", "schedule.updates=6")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    folder = tmp_path_factory.mktemp("power") / "run"
    folder.mkdir()
    return Recorder(folder), folder


def done_for_sure(tree: Tree) -> int:
    """Updates whose lines the disk holds whole."""
    return tree.get("metrics.jsonl", b"").count(b"\n")  # type: ignore[union-attr] # a file


def test_every_prefix_of_the_log_resumes(
    tmp_path: Path, recorded: tuple[Recorder, Path], train: Callable[..., int]
) -> None:
    recorder, folder = recorded
    with recorder.recording():
        assert train(folder, *SETTINGS, "checkpoint.keep_last=9") == 0
    expected = {update: tensors(folder / f"checkpoints/step-{update:08d}") for update in (2, 4, 6)}
    straight = {line["update"]: line["loss"] for line in read_lines(folder / "metrics.jsonl")}

    seen: set[int] = set()
    resumable: dict[int, tuple[Moment, Tree]] = {}
    for number, moment in enumerate(recorder.moments):
        done = done_for_sure(moment.whole)
        for kind, tree in enumerate(moment.variants):
            state = hash(tuple(sorted(tree.items(), key=lambda item: item[0])))
            if state in seen:
                continue
            seen.add(state)
            place = tmp_path / f"{number}-{kind}"
            moment.write(tree, place)
            update = check_one(place, expected, straight, f"{moment.call}, variant {kind}")
            assert done - update <= EVERY, moment.call
            resumable.setdefault(kind * 100 + update, (moment, tree))
            shutil.rmtree(place)
    assert {key % 100 for key in resumable} == {0, 2, 4, 6}
    assert len(seen) > 50

    for key, (moment, tree) in resumable.items():
        if key in (0, 4, 104):
            place = tmp_path / f"resumed-{key}"
            moment.write(tree, place)
            assert train(place, *SETTINGS, "checkpoint.keep_last=9") == 0
            assert_same_run(folder, place)


def check_one(place: Path, expected: dict, straight: dict, what: str) -> int:
    """The update that a run would resume from; all that it would read is what was written."""
    remove_leftovers(place / "checkpoints")
    checkpoint, damage = newest_checkpoint(place / "checkpoints")
    assert damage == [], what
    update = checkpoint.update if checkpoint else 0
    if checkpoint:
        found = tensors(checkpoint.folder)
        assert all(value.equal(expected[update][key]) for key, value in found.items()), what
        assert found.keys() == expected[update].keys()
    LineFile(place / "metrics.jsonl", update).close()
    kept = {line["update"]: line["loss"] for line in read_lines(place / "metrics.jsonl")}
    assert kept == {number: straight[number] for number in range(1, update + 1)}, what
    return update
