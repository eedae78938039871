"""The shortcut figure: a slow reference, cases with known answers, and what is read of a set."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dinox_io import open_shards
from dinox_train.fake import write_fake_set
from dinox_train.shortcut import ScannerFacts, Shortcut, strongest, told


def slow_accuracy(features: np.ndarray, patients: list[str], values: list[str], k: int) -> float:
    right = 0
    for row, feature in enumerate(features):
        others = [n for n in range(len(features)) if patients[n] != patients[row]]
        cosines = {
            n: float(feature @ features[n]) / float(np.linalg.norm(feature) * np.linalg.norm(features[n]))
            for n in others
        }
        best = sorted(others, key=lambda n: -cosines[n])[:k]
        votes = Counter(values[n] for n in best)
        most = max(votes.values())
        right += min(value for value in votes if votes[value] == most) == values[row]
    return right / len(features)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 10])
def test_agrees_with_the_slow_reference(seed: int, k: int) -> None:
    chance = np.random.default_rng(seed)
    patients = [f"p{chance.integers(7)}" for _ in range(60)]
    kernel = {patient: f"k{number % 3}" for number, patient in enumerate(sorted(set(patients)))}
    values = [kernel[patient] for patient in patients]
    features = chance.normal(size=(60, 5)) + np.array([float(value[1]) for value in values])[:, None] * 0.5
    single = {value for value, count in Counter(kernel.values()).items() if count < 2}
    kept = [row for row, value in enumerate(values) if value not in single]
    found = told("kernel", torch.from_numpy(features), patients, values, k)
    assert found is not None
    expected = slow_accuracy(features[kept], [patients[n] for n in kept], [values[n] for n in kept], k)
    assert found.accuracy == pytest.approx(expected)
    assert found.chance == max(Counter(values[n] for n in kept).values()) / len(kept)


def test_a_patient_does_not_vote_on_himself() -> None:
    """Features that know each patient, and nothing else: a neighbour is another patient's, of the other scanner."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0], [1.0, 0.1], [0.1, 1.0]])
    patients = ["a", "a", "b", "b", "c", "d"]
    values = ["x", "x", "y", "y", "y", "x"]
    found = told("kernel", features, patients, values, k=1)
    assert found is not None
    assert found.accuracy == 0.0
    assert found.share == pytest.approx(-1.0)


def test_features_that_are_the_scanner_tell_all_of_it() -> None:
    values = ["x", "y"] * 10
    features = torch.tensor([[1.0, 0.0] if value == "x" else [0.0, 1.0] for value in values])
    patients = [f"p{number}" for number in range(20)]
    found = strongest(features, patients, {"kvp": ["120.00"] * 20, "kernel": values}, k=3)
    assert found is not None
    assert found == Shortcut("kernel", 1.0, 0.5)
    assert found.share == 1.0
    assert strongest(features * torch.nan, patients, {"kernel": values}) is None


def test_what_cannot_be_told_is_none() -> None:
    features, patients = torch.randn(6, 3), ["a", "b", "c", "d", "d", "e"]
    assert told("kernel", features, patients, [None] * 6) is None
    assert told("kernel", features, patients, ["x"] * 6) is None
    # y stands for one patient only.
    assert told("kernel", features, patients, ["x", "x", "x", "y", "y", None]) is None
    assert told("kernel", features, patients, ["x", "x", "y", "y", "y", None]) is not None


def test_facts_of_a_set_without_any_are_none_and_sets_of_a_mixture_are_told_apart(tmp_path: Path) -> None:
    folders = [write_fake_set(tmp_path / name, {number: "train"}) for number, name in enumerate("ab")]
    with open_shards(folders[0]) as one, open_shards(folders[1]) as other:
        assert set(ScannerFacts([one]).of([(one, 0)])) == {"manufacturer", "kernel", "kvp", "thickness_mm"}
        found = ScannerFacts([one, other]).of([(other, 0), (one, 0), (other, 0)])
        assert found["dataset"] == ["1", "0", "1"]
        assert found["kernel"] == [None, None, None]
