"""Sides by patient: stable, of about the right size, and free of identical volumes on two sides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.privacy import pseudonym
from dinox_io.split import Side, resolve_leaks, side_of

PATIENTS = [pseudonym(b"k" * 16, "patient", f"P{number}") for number in range(4000)]


def test_shares_are_about_what_was_asked_for() -> None:
    sides = [side_of(patient, 7, 0.2, 0.1) for patient in PATIENTS]
    assert sides.count("val") / len(sides) == pytest.approx(0.2, abs=0.02)
    assert sides.count("test") / len(sides) == pytest.approx(0.1, abs=0.02)


def test_the_seed_makes_another_split() -> None:
    first, second = ([side_of(patient, seed, 0.5, 0.0) for patient in PATIENTS] for seed in (0, 1))
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(PATIENTS)
    assert same == pytest.approx(0.5, abs=0.05)


def test_a_larger_fraction_only_adds_patients() -> None:
    small = {patient for patient in PATIENTS if side_of(patient, 0, 0.1, 0.0) == "val"}
    assert small < {patient for patient in PATIENTS if side_of(patient, 0, 0.2, 0.0) == "val"}


def test_extremes() -> None:
    assert {side_of(patient, 0, 0.0, 0.0) for patient in PATIENTS} == {"train"}
    assert {side_of(patient, 0, 0.999999, 0.0) for patient in PATIENTS} == {"val"}
    for bad in ((1.0, 0.0), (0.6, 0.4), (-0.1, 0.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="fraction"):
            side_of(PATIENTS[0], 0, *bad)


volumes = st.lists(
    st.tuples(st.uuids().map(str), st.sampled_from("abcdef"), st.sampled_from(["d1", "d2", "d3", "d4"])),
    unique_by=lambda volume: volume[0],
    max_size=12,
)


@given(volumes, st.permutations(["train", "train", "val", "val", "test", "test"]), st.randoms())
def test_no_digest_stands_on_two_sides(rows: list[tuple[str, str, str]], order: list[Side], random: object) -> None:
    sides = dict(zip("abcdef", order, strict=True))
    result, leaks = resolve_leaks(rows, sides)
    for volume, patient, digest in rows:
        others = {sides[other] for _, other, same in rows if same == digest}
        assert result[volume] == (sides[patient] if others == {sides[patient]} else "none")
    assert {leak["digest"] for leak in leaks} == {digest for volume, _, digest in rows if result[volume] == "none"}
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert resolve_leaks(shuffled, sides) == (result, leaks)
