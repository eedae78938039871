"""Which looks are of the run as it is now, against a run that remembers which checkpoints it went on from."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.branch import Branch, newest_branch, of_this_run
from dinox_train.checkpoint import checkpoint_folder


@given(st.integers(0, 2**32))
def test_a_look_stays_where_no_rollback_undid_its_checkpoint(seed: int) -> None:
    draw = random.Random(seed)
    branch, on_the_way = Branch(0), [Branch(0)]  # the reference: checkpoints that the run as it is now came by
    looks: list[tuple[Branch, int]] = []  # each checkpoint ever written, and its number
    numbers = {branch: 0}
    for number in range(1, 25):
        if draw.random() < 0.3:
            back = draw.choice(on_the_way)
            branch = Branch(back.update, (*branch.went_back_to, back.update))
            on_the_way = [one for one in on_the_way if one.update <= back.update]
        branch = Branch(branch.update + draw.randint(1, 3), branch.went_back_to)
        on_the_way.append(branch)
        looks.append((branch, number))
        numbers[branch] = number
        stays = [number for look, number in looks if look.leads_to(branch)]
        assert stays == [numbers[one] for one in on_the_way if one.update > 0]


def write(root: Path, update: int, went_back_to: list[int], digest: str) -> None:
    folder = checkpoint_folder(root, update)
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "state.json").write_text(json.dumps({"update": update, "went_back_to": went_back_to}))
    (folder / "MANIFEST.json").write_text(json.dumps({"self": digest}))


def noted(update: int, went_back_to: list[int], digest: str) -> dict[str, Any]:
    return {"update": update, "went_back_to": went_back_to, "checkpoint": {"digest": digest}}


def test_looks_at_a_run_that_went_back(tmp_path: Path) -> None:
    looks = [noted(10, [], "a"), noted(20, [], "b"), noted(30, [], "c")]
    for look in looks:
        write(tmp_path, look["update"], [], look["checkpoint"]["digest"])
    assert of_this_run(looks, tmp_path) == looks
    # Gone back to 10: newer ones are removed at once, and written anew later on.
    for update in (20, 30):
        shutil.rmtree(checkpoint_folder(tmp_path, update))
    assert of_this_run(looks, tmp_path) == looks[:1]
    write(tmp_path, 30, [10], "d")
    again = noted(30, [10], "d")
    assert of_this_run([*looks, again], tmp_path) == [looks[0], again]
    # 10 is rotated away: looks at it stay, and those at the 20 that was undone do not come back.
    shutil.rmtree(checkpoint_folder(tmp_path, 10))
    assert of_this_run([*looks, again], tmp_path) == [looks[0], again]


def test_a_folder_in_which_another_run_began(tmp_path: Path) -> None:
    write(tmp_path, 10, [], "other")
    write(tmp_path, 30, [], "other")
    unknown = {"update": 20}  # noted before went_back_to and digests were
    assert of_this_run([noted(10, [], "a"), unknown, noted(40, [], "c")], tmp_path) == [unknown]


def test_without_a_checkpoint_nothing_is_known(tmp_path: Path) -> None:
    looks = [noted(10, [3], "a")]
    assert of_this_run(looks, tmp_path / "nowhere") == looks
    write(tmp_path, 10, [], "b")
    (checkpoint_folder(tmp_path, 10) / "train" / "state.json").write_text("{")
    assert newest_branch(tmp_path) is None
    assert of_this_run(looks, tmp_path) == looks


@pytest.mark.parametrize("record", [{"update": 3}, {"update": 3, "went_back_to": []}])
def test_a_checkpoint_of_before_this_was_noted(record: dict[str, Any]) -> None:
    assert Branch.of(record) == Branch(3)
