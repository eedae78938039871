"""The nearest-neighbour regression of a slice's height: a slow reference and synthetic features with known answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train import nearest


def circle(heights: torch.Tensor) -> torch.Tensor:
    """Features that hold the height as a direction, each with another length."""
    angles = heights * math.pi / 2
    return torch.stack([angles.cos(), angles.sin()], dim=1) * (1 + heights[:, None])


def slow_r2(known: np.ndarray, values: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    predicted = []
    for query in queries:
        cosines = [float(query @ row) / math.sqrt(float(query @ query) * float(row @ row)) for row in known]
        best = sorted(range(len(known)), key=lambda i: -cosines[i])[:k]
        predicted.append(sum(float(values[i]) for i in best) / len(best))
    mean = sum(map(float, truth)) / len(truth)
    residual = sum((float(t) - p) ** 2 for t, p in zip(truth, predicted, strict=True))
    return 1 - residual / sum((float(t) - mean) ** 2 for t in truth)


@given(
    n=st.integers(1, 40), m=st.integers(2, 20), d=st.integers(2, 8), k=st.integers(1, 12), seed=st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_it_agrees_with_the_slow_reference_and_does_not_depend_on_the_chunk(n, m, d, k, seed) -> None:
    generator = np.random.default_rng(seed)
    known, queries = generator.normal(size=(n, d)), generator.normal(size=(m, d))
    values, truth = generator.random(n), generator.random(m)
    tensors = [torch.from_numpy(array).double() for array in (known, values, queries, truth)]
    expected = slow_r2(known, values, queries, truth, k)
    assert nearest.height_r2(*tensors, k=k) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "CHUNK_ROWS", 3)
        assert nearest.height_r2(*tensors, k=k) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_features_that_hold_the_height_score_near_one_and_noise_near_or_below_zero() -> None:
    train, val = torch.linspace(0, 1, 500), torch.linspace(0.02, 0.98, 100)
    perfect = nearest.height_r2(circle(train), train, circle(val), val)
    assert perfect is not None
    assert perfect > 0.99
    generator = torch.Generator().manual_seed(0)
    noise = nearest.height_r2(
        torch.randn(500, 16, generator=generator), train, torch.randn(100, 16, generator=generator), val
    )
    assert noise is not None
    assert noise < 0.1
    upside_down = nearest.height_r2(circle(train), 1 - train, circle(val), val)
    assert upside_down is not None
    assert upside_down < -1


def test_it_is_none_where_it_is_not_defined() -> None:
    heights = torch.linspace(0, 1, 12)
    features = circle(heights)
    nothing, no_heights = features[:0], heights[:0]
    assert nearest.height_r2(features, heights, nothing, no_heights) is None
    assert nearest.height_r2(nothing, no_heights, features, heights) is None
    assert nearest.height_r2(features, heights, features, torch.full((12,), 0.3)) is None
    assert nearest.height_r2(features * torch.nan, heights, features, heights) is None


def test_two_calls_are_equal_to_the_last_bit() -> None:
    heights = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    features = torch.randn(3000, 8, generator=torch.Generator().manual_seed(2)).sign()  # many ties
    first = nearest.height_r2(features[:2000], heights[:2000], features[2000:], heights[2000:])
    assert first is not None
    assert first == nearest.height_r2(features[:2000], heights[:2000], features[2000:], heights[2000:])


def test_sides_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match="val"):
        nearest.height_r2(torch.ones(3, 2), torch.ones(3), torch.ones(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="k is 0"):
        nearest.nearest_mean(torch.ones(3, 2), torch.ones(3), torch.ones(4, 2), k=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    scores, positive = torch.tensor([float(score) for score, _ in rows]), torch.tensor([mark for _, mark in rows])
    if positive.all() or not positive.any():
        return
    pairs = [(float(one), float(other)) for one in scores[positive] for other in scores[~positive]]
    expected = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs) / len(pairs)
    assert nearest.auroc(scores, positive) == pytest.approx(expected)


def test_mark_auroc_of_features_that_know_the_mark_of_those_that_do_not_and_of_one_kind_only() -> None:
    marked = torch.tensor([1.0, 0.0] * 20)
    knowing = torch.stack([marked, 1 - marked], dim=1)
    assert nearest.mark_auroc(knowing, marked, knowing, marked, k=3) == 1.0
    assert nearest.mark_auroc(knowing, 1 - marked, knowing, marked, k=3) == 0.0
    assert nearest.mark_auroc(torch.ones(40, 2), marked, torch.ones(40, 2), marked, k=40) == 0.5
    for known, asked in ((torch.ones(40), marked), (marked, torch.zeros(40)), (marked[:0], marked)):
        assert nearest.mark_auroc(knowing[: len(known)], known, knowing, asked) is None
    assert nearest.mark_auroc(knowing * torch.nan, marked, knowing, marked) is None
    with pytest.raises(ValueError, match="do not match"):
        nearest.mark_auroc(knowing, marked[1:], knowing, marked)
