"""The figures of a probe beside slow references: folds, AUROC, intervals, logistic and kNN probes, tables."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probing import logistic, protocol
from probing.auroc import auroc
from probing.bootstrap import Resamples
from probing.crossfit import Split, crossfit, some_of, splits
from probing.logistic import choose_strength, fit, logistic_scores
from probing.neighbours import neighbour_scores
from probing.table import Features, make_table
from probing.tasks import Task

names = st.integers(0, 10_000).map(lambda number: hashlib.sha256(b"%d" % number).hexdigest()[:32])
people = st.sets(names, max_size=30)


def patient(number: int) -> str:
    return hashlib.sha256(b"someone %d" % number).hexdigest()[:32]


def a_task(labels: np.ndarray, patients: np.ndarray) -> Task:
    return Task(
        name="made up", selection="at random", unit="window", items=[], unit_of=np.arange(len(labels)), labels=labels,
        patients=patients,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ folds


@given(people, people, st.booleans())
def test_no_patient_is_on_two_sides(train: set[str], test: set[str], held_out: bool):
    parts = splits(train, test, held_out=held_out)
    for part in parts:
        assert not part.train & part.test
        assert part.train <= train
    tested = [one for part in parts for one in part.test]
    assert sorted(tested) == sorted(test)


@given(people, people, names)
def test_nobody_moves_when_others_come(before: set[str], after: set[str], one: str):
    def fold(everybody: set[str]) -> int:
        return next(part.number for part in splits(everybody, everybody, held_out=False) if one in part.test)

    assert fold(before | {one}) == fold(before | after | {one}) == protocol.fold_of(one)


def test_folds_are_those_of_the_page():
    """docs/evaluation.md, section Folds, written a second time."""
    for number in range(50):
        name = patient(number)
        digest = hashlib.sha256(b"probe\0fold\0" + b"0\0" + name.encode()).digest()
        assert protocol.fold_of(name) == int.from_bytes(digest[:8], "big") % 5
    counts = np.bincount([protocol.fold_of(patient(number)) for number in range(2000)])
    assert len(counts) == 5
    assert counts.min() > 330


@given(people.filter(bool), st.sampled_from(protocol.FRACTIONS), st.integers(0, 4))
def test_a_share_of_the_patients(everybody: set[str], fraction: float, draw: int):
    part = Split(0, frozenset(everybody), frozenset())
    chosen = some_of(fraction, draw, 0)(part)
    assert chosen <= everybody
    assert len(chosen) == max(1, int(np.ceil(fraction * len(everybody))))
    assert chosen == some_of(fraction, draw, 0)(part)


# ------------------------------------------------------------------------------------------ AUROC, bootstrap


def slow_auroc(scores, labels, strata, weights) -> float:
    above = pairs = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if labels[i] and not labels[j] and strata[i] == strata[j]:
                pairs += weights[i] * weights[j]
                above += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return above / pairs if pairs else np.nan


rows = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 2), st.integers(0, 3)), max_size=25)


@given(rows)
def test_auroc_is_a_count_of_pairs(found: list[tuple[int, bool, int, int]]):
    scores, labels, strata, weights = (np.array([row[place] for row in found]) for place in range(4))
    labels = labels.astype(bool)
    plain = auroc(scores.astype(float), labels, strata)
    weighted = auroc(scores.astype(float), labels, strata, weights[None].astype(float))
    np.testing.assert_allclose(plain, [slow_auroc(scores, labels, strata, np.ones(len(found)))])
    np.testing.assert_allclose(weighted, [slow_auroc(scores, labels, strata, weights)])


def test_resamples_are_of_patients():
    patients = np.array([patient(number) for number in (0, 0, 1, 2, 2, 2)])
    resamples = Resamples(patients, seed=3)
    seen = []
    resamples.of(lambda weights: seen.append(weights) or np.zeros(len(weights)))
    weights = np.concatenate(seen)
    assert weights.shape == (protocol.RESAMPLES, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert ((weights[:, 0] + weights[:, 2] + weights[:, 3]) == 3).all()
    # each patient is drawn once on average, and left out in (2/3)^3 of the draws
    assert abs(weights[:, 2].mean() - 1) < 0.1
    assert abs((weights[:, 2] == 0).mean() - (2 / 3) ** 3) < 0.05


def test_an_interval_is_that_of_rows_drawn_by_patient():
    """Beside the plain way: take the rows of each drawn patient as often as it was drawn."""
    random = np.random.default_rng(0)
    patients = np.array([patient(number % 9) for number in range(60)])
    labels, scores = random.random(60) < 0.4, random.normal(size=60)
    scores += labels
    strata = np.zeros(60, int)
    resamples = Resamples(patients, seed=0)
    fast = resamples.of(lambda weights: auroc(scores, labels, strata, weights))
    counts = []
    resamples.of(lambda weights: counts.append(weights) or np.zeros(len(weights)))
    for draw, value in zip(np.concatenate(counts)[:20], fast[:20], strict=True):
        taken = np.repeat(np.arange(60), draw.astype(int))
        assert value == pytest.approx(slow_auroc(scores[taken], labels[taken], strata[taken], np.ones(len(taken))))
    interval = resamples.interval(0.7, fast)
    assert (interval.low, interval.high) == tuple(np.round(np.percentile(fast, [2.5, 97.5]), 6))


def test_one_patient_has_no_interval():
    resamples = Resamples(np.array([patient(0)] * 4), seed=0)
    assert resamples.interval(0.9, np.full(protocol.RESAMPLES, 0.9)).json() == {"value": 0.9, "low": None, "high": None}
    assert resamples.interval(float("nan"), np.zeros(protocol.RESAMPLES)).value is None


# ------------------------------------------------------------------------------------------ probes


def newton(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Iteratively reweighted least squares on standardised features, the intercept last."""
    x = np.column_stack([(x - x.mean(axis=0)) / x.std(axis=0), np.ones(len(x))])
    penalty = np.diag([1 / strength] * (x.shape[1] - 1) + [0.0])
    w = np.zeros(x.shape[1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (chance - y) + penalty @ w
        w -= np.linalg.solve((x * (chance * (1 - chance))[:, None]).T @ x + penalty, gradient)
    return w


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("cost", [0, logistic.NEWTON_COST])
def test_the_logistic_probe_is_the_minimum(strength: float, cost: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logistic, "NEWTON_COST", cost)
    random = np.random.default_rng(1)
    x = random.normal(size=(80, 6)) * [1, 100, 0.01, 1, 1, 1] + 5
    y = (x[:, 0] + random.normal(size=80)) > 5
    [probe] = fit(x, y, (strength,))
    expected = newton(x, y, strength)
    np.testing.assert_allclose([*probe.coefficients, probe.intercept], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "features"), [(12, 40), (60, 5)])
def test_both_methods_find_it(rows: int, features: int, monkeypatch: pytest.MonkeyPatch):
    """More features than rows, too, and classes that a plane parts."""
    random = np.random.default_rng(6)
    x = random.normal(size=(rows, features))
    y = x[:, 0] > 0
    asked = random.normal(size=(20, features))
    fast = [probe.scores(asked) for probe in fit(x, y, protocol.STRENGTHS)]
    monkeypatch.setattr(logistic, "NEWTON_COST", 0)
    slow = [probe.scores(asked) for probe in fit(x, y, protocol.STRENGTHS)]
    np.testing.assert_allclose(fast, slow, atol=1e-3, rtol=1e-3)


def test_c_is_chosen_on_rows_that_were_held_out():
    random = np.random.default_rng(2)
    x, folds = random.normal(size=(90, 30)), np.arange(90) % 4
    y = x[:, 0] + 2 * random.normal(size=90) > 0
    losses = []
    for strength in protocol.STRENGTHS:
        total = 0.0
        for fold in range(4):
            known = folds != fold
            w = newton(x[known], y[known], strength)
            scaled = (x[~known] - x[known].mean(axis=0)) / x[known].std(axis=0)
            total += np.logaddexp(0, -np.where(y[~known], 1, -1) * (scaled @ w[:-1] + w[-1])).sum()
        losses.append(total)
    assert choose_strength(x, y, folds) == protocol.STRENGTHS[int(np.argmin(losses))]
    assert choose_strength(x, y, np.zeros(90)) == protocol.STRENGTH_UNCHOSEN


def test_features_that_never_vary_and_labels_of_one_class():
    x = np.column_stack([np.full(40, 3.3), np.arange(40.0)])
    y = np.arange(40) > 20
    scores = logistic_scores(x, y, np.arange(40) % 3, x)
    assert np.isfinite(scores).all()
    assert auroc(scores, y, np.zeros(40, int))[0] == 1.0
    assert not logistic_scores(x, np.ones(40, bool), np.arange(40) % 3, x).any()


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30)
def test_neighbours_are_those_of_a_loop(known: int, asked: int, seed: int):
    random = np.random.default_rng(seed)
    x, y, z = random.normal(size=(known, 4)), random.random(known) < 0.5, random.normal(size=(asked, 4))
    found = neighbour_scores(x, y, z)
    for row, value in zip(z, found, strict=True):
        cosine = x @ row / np.linalg.norm(x, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-cosine)[:20]
        weights = np.exp(cosine[nearest] / 0.07)
        assert value == pytest.approx((weights * y[nearest]).sum() / weights.sum())


# ------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("classifier", ["logistic", "kNN"])
def test_nothing_of_the_tested_reaches_their_probe(classifier: str):
    """Other labels and other features of a fold's patients change no score of another unit of that fold."""
    random = np.random.default_rng(4)
    patients = np.array([patient(number % 12) for number in range(72)])
    x, y = random.normal(size=(72, 5)), random.random(72) < 0.5
    everybody = set(patients)
    parts = splits(everybody, everybody, held_out=False)
    before = crossfit(classifier, x, y, patients, parts)
    for part in parts:
        inside = np.isin(patients, sorted(part.test))
        first = np.flatnonzero(inside)[0]
        changed = x.copy()
        changed[inside & (np.arange(72) != first)] += 100
        after = crossfit(classifier, changed, y ^ inside, patients, [part])
        assert after.scores[after.units == first] == pytest.approx(before.scores[before.units == first], abs=1e-9)


def table_of(
    features: dict[str, np.ndarray], labels: np.ndarray, patients: np.ndarray, others: frozenset[str] = frozenset()
) -> dict:
    """others: patients of whom nothing is labelled."""
    everybody = set(patients) | others
    encoders = [Features(encoder=name, headline="all", by_kind={"all": values}) for name, values in features.items()]
    parts = splits(everybody, everybody, held_out=False)
    return make_table(a_task(labels, patients), encoders, parts, tested="unseen", compare="noise", seed=0)


@pytest.fixture(scope="module")
def table() -> dict:
    random = np.random.default_rng(5)
    # Patients differ in how many positives they have: what pools scores over folds falls for it.
    patients = np.array([patient(number % 30) for number in range(300)])
    share = {name: random.random() for name in sorted(set(patients))}
    labels = np.array([random.random() < share[name] for name in patients])
    noise = random.normal(size=(300, 8)).astype(np.float32)
    signal = noise.copy()
    signal[:, 3] += 2.0 * labels
    return table_of({"signal": signal, "noise": noise}, labels, patients)


def test_a_planted_signal_is_found_and_its_absence_too(table: dict):
    figures = {(row["encoder"], row["probe"]): row["auroc_by_unit"] for row in table["rows"]}
    for probe in ("logistic", "kNN"):
        assert figures["signal", probe]["low"] > 0.7
        assert figures["noise", probe]["low"] < 0.5 < figures["noise", probe]["high"]
    assert table["difference"]["auroc_by_unit"]["low"] > 0.15
    assert table["counts"]["tested_units"] == 300
    assert table["counts"]["tested_patients"] == table["counts"]["training_patients"] == 30


def test_few_pairs_have_no_interval():
    """Every fold's one pair is in order, in every resample too: that is no certainty."""
    patients = np.array([patient(number) for number in range(12)])
    labels = np.arange(12) % 2 == 0
    told = (labels + np.linspace(0, 0.1, 12))[:, None].astype(np.float32)
    found = table_of({"signal": told}, labels, patients)
    folds = [protocol.fold_of(name) for name in patients]
    pairs = sum(folds[a] == folds[b] for a in range(0, 12, 2) for b in range(1, 12, 2))
    assert 0 < pairs < protocol.PAIRS
    [row] = [row for row in found["rows"] if row["is_headline"]]
    assert row["auroc_by_unit"] == {"value": 1.0, "low": None, "high": None, "pairs": pairs}


def test_the_curve_rises_to_the_figure(table: dict):
    points = {(point["encoder"], point["fraction"]): point for point in table["curve"]}
    figure = next(row for row in table["rows"] if row["encoder"] == "signal" and row["is_headline"])
    assert points["signal", 1.0]["draws"] == [figure["auroc_by_unit"]["value"]]
    assert len(points["signal", 0.1]["draws"]) == len(points["signal", 0.01]["draws"]) == 5
    assert len(set(points["signal", 0.1]["draws"])) > 1
    assert points["signal", 0.01]["mean"] < points["signal", 1.0]["mean"]


def test_a_share_of_the_labelled_patients_is_of_those_who_have_labels():
    random = np.random.default_rng(6)
    patients = np.array([patient(number % 30) for number in range(90)])
    labels = random.random(90) < 0.5
    features = {"noise": random.normal(size=(90, 4)).astype(np.float32)}
    others = frozenset(patient(number) for number in range(100, 400))
    assert table_of(features, labels, patients, others)["curve"] == table_of(features, labels, patients)["curve"]
