"""The monitor's parts: ranks beside a count by hand, choices that do not depend on order, axes turned back, drift."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monitoring.colours import colours_of, principal_scores, turned_onto
from monitoring.kept import Reference, read_arrays, read_reference, write_arrays
from monitoring.places import Stack, choose_runs, choose_slices, deal
from monitoring.protocol import Sizes, view_settings
from monitoring.retrieval import figures, interval, rank
from monitoring.sheets import Maps, heat, save_attention_over_time, spread
from monitoring.statistics import gram_drift, of_embeddings


def stack(number: int, slices: int, patient: int | None = None, first: int = 0) -> Stack:
    owner = number if patient is None else patient
    return Stack(0, number, f"{number:032x}", f"p{owner}", range(first, first + slices), 1)


STACKS = [stack(0, 40), stack(1, 9, patient=0), stack(2, 23), stack(3, 3), stack(4, 5), stack(5, 60, first=2)]

# ------------------------------------------------------------------------------------------ places


def test_choices_do_not_depend_on_the_order_of_volumes() -> None:
    for choose in (lambda stacks: choose_slices(stacks, 9, 0), lambda stacks: choose_runs(stacks, 9, 4, 0)):
        assert choose(STACKS) == choose(STACKS[::-1])
    assert choose_slices(STACKS, 9, 0) != choose_slices(STACKS, 9, 1)
    assert choose_runs(STACKS, 9, 4, 0) != choose_runs(STACKS, 9, 4, 1)


def test_slices_are_of_different_patients_first() -> None:
    slices = choose_slices(STACKS, 5, 0)
    assert {place.stack.patient for place in slices} == {"p0", "p2", "p3", "p4", "p5"}
    more = choose_slices(STACKS, 12, 0)
    assert more[:5] == slices
    assert len(set(more)) == len(more) == 12
    assert all(place.center in place.stack.centers for place in more)


def test_fewer_slices_than_asked_for() -> None:
    found = choose_slices([stack(0, 2)], 4, 0)
    assert 1 <= len(found) <= 2
    assert len(set(found)) == len(found)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=8), st.integers(1, 20))
def test_runs_are_neighbours_and_do_not_overlap(volumes: list[tuple[int, int]], count: int) -> None:
    stacks = [stack(number, slices, patient) for number, (slices, patient) in enumerate(volumes)]
    runs = choose_runs(stacks, count, 4, 0)
    assert len(runs) == min(count, sum(slices // 4 for slices, _ in volumes))
    places = [place for run in runs for place in run]
    assert len(set(places)) == 4 * len(runs)
    for run in runs:
        assert {place.stack for place in run} == {run[0].stack}
        assert [place.center - run[0].center for place in run] == [0, 1, 2, 3]
        assert all(place.center in place.stack.centers for place in run)
    # No patient has two runs more than another one who has any left.
    number = {name: sum(run[0].stack.patient == name for run in runs) for name in {one.patient for one in stacks}}
    left = [
        name for name in number if number[name] < sum(len(one.centers) // 4 for one in stacks if one.patient == name)
    ]
    assert all(max(number.values()) - number[name] <= 1 for name in left)


def test_deal() -> None:
    assert deal([[1, 2, 3], [4], [5, 6]], 5) == [1, 4, 5, 2, 6]
    assert deal([[1], [2]], 5) == [1, 2]
    assert deal([], 2) == []


# ------------------------------------------------------------------------------------------ retrieval


def by_hand(queries: np.ndarray, gallery: np.ndarray, match: np.ndarray, run: np.ndarray) -> dict[str, list[float]]:
    """Each score as the mean over all orders of ties, one query and one order of places at a time."""
    found: dict[str, list[float]] = {"top1": [], "top5": [], "mrr": [], "near1": []}
    for row, query in enumerate(queries):
        cosine = [float(query @ one / max(np.linalg.norm(query) * np.linalg.norm(one), 1e-30)) for one in gallery]
        own = cosine[match[row]]
        before = sum(one > own + 1e-12 for one in cosine)
        tied = sum(abs(one - own) <= 1e-12 for one in cosine)
        places = [before + 1 + n for n in range(tied)]
        found["top1"].append(np.mean([place == 1 for place in places]))
        found["top5"].append(np.mean([place <= 5 for place in places]))
        found["mrr"].append(np.mean([1 / place for place in places]))
        best = [n for n, one in enumerate(cosine) if one >= max(cosine) - 1e-12]
        found["near1"].append(np.mean([run[n] == run[match[row]] for n in best]))
    return found


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.booleans())
def test_ranks_are_those_counted_by_hand(seed: int, runs: int, coarse: bool) -> None:
    chance = np.random.default_rng(seed)
    # Whole directions of few values, so that ties are many.
    draw = (lambda n: np.eye(3)[chance.integers(0, 3, n)]) if coarse else (lambda n: chance.normal(size=(n, 5)))
    queries, gallery = draw(runs), draw(4 * runs)
    match, run = 4 * np.arange(runs) + 1, np.repeat(np.arange(runs), 4)
    ranking = rank(queries, gallery, match, run)
    assert ranking is not None
    found = figures(ranking, [f"p{n % 2}" for n in range(runs)], 4, 0)
    for name, values in by_hand(queries, gallery, match, run).items():
        assert found[name]["value"] == pytest.approx(np.mean(values), abs=1e-12)
        assert found[name]["low"] <= found[name]["value"] + 1e-12
        assert found[name]["high"] >= found[name]["value"] - 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_features_give_chance_and_no_more(value: float) -> None:
    gallery = np.full((32, 6), value)
    ranking = rank(gallery[:8], gallery, 4 * np.arange(8) + 1, np.repeat(np.arange(8), 4))
    assert ranking is not None
    for one in figures(ranking, ["p"] * 8, 4, 0).values():
        assert one["value"] == pytest.approx(one["chance"], rel=1e-12)
        assert (one["low"], one["high"]) == (None, None)  # of one patient nothing can be said
    assert figures(ranking, ["p"] * 8, 4, 0)["mrr"]["chance"] == pytest.approx(sum(1 / n for n in range(1, 33)) / 32)


def test_random_features_come_out_at_chance() -> None:
    chance = np.random.default_rng(0)
    runs, sums = 64, {"top1": 0.0, "top5": 0.0, "mrr": 0.0, "near1": 0.0}
    for _ in range(60):
        ranking = rank(
            chance.normal(size=(runs, 8)), chance.normal(size=(256, 8)), 4 * np.arange(runs) + 1,
            np.repeat(np.arange(runs), 4),
        )  # fmt: skip
        assert ranking is not None
        found = figures(ranking, ["p"] * runs, 4, 0)
        for name in sums:
            sums[name] += (found[name]["value"] - found[name]["chance"]) / 60
    assert max(map(abs, sums.values())) < 0.005


def test_features_that_are_not_finite_are_no_success() -> None:
    gallery = np.eye(8)
    gallery[3] = np.nan
    assert rank(np.eye(8)[:2], gallery, np.array([1, 5]), np.repeat([0, 1], 4)) is None
    assert of_embeddings(gallery.astype(np.float32))["feature_std"] is None


def test_the_interval_is_over_patients() -> None:
    values, patients = np.array([1.0] * 10 + [0.0] * 10), ["a"] * 10 + ["b"] * 10
    assert interval(values, patients, 0) == (0.0, 1.0)  # two patients: it may be all or nothing
    many = [f"p{n}" for n in range(400)]
    low, high = interval(np.tile([1.0, 0.0], 200), many, 0)
    assert low is not None
    assert high is not None
    assert 0.43 < low < 0.47 < 0.53 < high < 0.57  # the normal one: 0.5 ± 0.049
    assert interval(np.tile([1.0, 0.0], 200), many, 0) == (low, high)


# ------------------------------------------------------------------------------------------ colours


def patches(seed: int = 0) -> np.ndarray:
    scale = np.array([9.0, 5.0, 3.0, 0.5, 0.1])
    return (np.random.default_rng(seed).normal(size=(300, 5)) * scale).astype(np.float32)


def test_scores_have_variance_one_and_are_uncorrelated() -> None:
    scores = principal_scores(patches())
    np.testing.assert_allclose(scores.T @ scores / len(scores), np.eye(3), atol=1e-9)
    assert abs(np.corrcoef(scores[:, 0], patches()[:, 0])[0, 1]) > 0.99


@given(st.integers(0, 1000))
def test_axes_that_moved_are_turned_back(seed: int) -> None:
    scores = principal_scores(patches())
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(turned_onto(scores @ turn, scores), scores, atol=1e-9)
    mirrored = principal_scores(patches() @ np.diag([1, -1, 1, 1, 1])[:, [1, 0, 2, 3, 4]].astype(np.float32))
    np.testing.assert_allclose(turned_onto(mirrored, scores), scores, atol=1e-4)


def test_of_another_number_of_patches_nothing_is_turned() -> None:
    scores = principal_scores(patches())
    assert turned_onto(scores, scores[:-1]) is scores
    assert turned_onto(scores, None) is scores


def test_colours_without_spread_are_gray() -> None:
    for features in (np.ones((50, 8), np.float32), np.full((50, 8), np.nan, np.float32)):
        assert (colours_of(principal_scores(features)) == 128).all()
    two = principal_scores(patches()[:, :2])
    assert (colours_of(two)[:, 2] == 128).all()
    assert colours_of(two)[:, :2].std() > 20


# ------------------------------------------------------------------------------------------ drift


def test_gram_drift_is_the_root_mean_square_difference_of_similarities() -> None:
    chance = np.random.default_rng(3)
    one, other = (chance.normal(size=(2, 7, 5)).astype(np.float32) for _ in range(2))
    squares = []
    for a, b in zip(one.astype(np.float64), other.astype(np.float64), strict=True):
        unit_a, unit_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        squares.append(((unit_a @ unit_a.T - unit_b @ unit_b.T) ** 2).mean())
    assert gram_drift(one, other) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    assert gram_drift(one, 3 * one) == pytest.approx(0, abs=1e-6)
    turned = one @ np.linalg.qr(chance.normal(size=(5, 5)))[0].astype(np.float32)
    assert gram_drift(one, turned) == pytest.approx(0, abs=1e-6)  # similarities, not directions
    one[0, 0] = np.nan
    assert gram_drift(one, other) is None
    with pytest.raises(ValueError, match="other networks"):
        gram_drift(one, other[..., :4])


# ------------------------------------------------------------------------------------------ what is kept


def test_kept_arrays_are_what_was_written_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "newest.safetensors"
    chance = np.random.default_rng(0)
    kept = Reference(7, "ab", chance.normal(size=(2, 4, 3)).astype(np.float32), np.zeros((8, 3), np.float32))
    kept.write(path)
    again = read_reference(path, (2, 4, 3))
    assert again is not None
    assert (again.update, again.digest) == (7, "ab")
    np.testing.assert_array_equal(again.patches, kept.patches)
    assert read_reference(path, (2, 5, 3)) is None
    before = path.read_bytes()
    kept.write(path)
    assert path.read_bytes() == before
    broken = bytearray(before)
    broken[-20] ^= 1
    path.write_bytes(broken)
    assert read_arrays(path) is None
    path.write_bytes(b"nothing")
    assert read_arrays(path) is None
    assert read_arrays(tmp_path / "absent") is None
    write_arrays(path, {"patches": kept.patches}, {"update": "1", "digest": "x"})
    assert read_arrays(path) is not None


# ------------------------------------------------------------------------------------------ pictures


def test_heat_runs_from_dark_to_light() -> None:
    shown = heat(np.linspace(0, 0.02, 50).reshape(1, 50)).sum(axis=-1)[0]
    assert (np.diff(shown) > 0).all()
    assert (heat(np.zeros((2, 2))) == heat(np.full((2, 2), np.nan))).all()


def test_pictures_over_time_have_the_first_and_the_newest(tmp_path: Path) -> None:
    assert spread(range(5)) == [0, 1, 2, 3, 4]
    assert spread(range(100))[0] == 0
    assert spread(range(100))[-1] == 99
    assert len(spread(range(100))) == len(set(spread(range(100)))) == 8
    gray = [np.zeros((32, 32), np.float32)]
    look = Maps(3, np.random.default_rng(0).random((1, 2, 2), np.float32), np.zeros((1, 2, 2, 3), np.uint8))
    save_attention_over_time(tmp_path / "a.png", gray, [look, replace(look, update=9)])
    save_attention_over_time(tmp_path / "b.png", gray, [look, replace(look, update=9)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_views_of_retrieval_are_of_one_protocol() -> None:
    sizes = Sizes.of(112)
    assert (sizes.view, sizes.picture) == (112, 224)
    settings = view_settings(112)
    assert (settings.num_global, settings.num_local, settings.noise_probability) == (2, 0, 0.0)
    assert torch.tensor(settings.blur_probability).max() == 0


# ------------------------------------------------------------------------------------------ the process


@pytest.mark.skipif(sys.platform != "linux", reason="how a process steps aside is the system's own")
def test_the_process_steps_aside(repository: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, 'tools'); from monitoring.process import step_aside\n"
        "step_aside(1); step_aside(1)\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
        "import psutil; print(os.nice(0), os.environ['OMP_NUM_THREADS'], int(psutil.Process().ionice().ioclass))\n"
        "print(open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", "1", "3", "1000"]
    assert os.nice(0) < 19
