"""The collapse monitors: constructed cases with known answers, and slow references in plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train import health

MATRICES = st.tuples(st.integers(1, 12), st.integers(2, 12), st.integers(0, 2**31 - 1))


def random_matrix(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def slow_entropy(targets: np.ndarray) -> float:
    rows = [-sum(float(p) * math.log(float(p)) for p in row if p > 0) for row in targets]
    return sum(rows) / len(rows) / math.log(targets.shape[1])


def slow_feature_std(features: np.ndarray) -> float:
    n, d = features.shape
    directions = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in features]
    deviations = []
    for j in range(d):
        column = [row[j] for row in directions]
        mean = sum(column) / n
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / n))
    return sum(deviations) / d * math.sqrt(d)


def slow_effective_rank(features: np.ndarray) -> float:
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    singular = singular[singular > 1e-7 * singular.max()] if singular.max() > 0 else singular[:0]
    shares = [float(value / singular.sum()) for value in singular]
    return math.exp(-sum(p * math.log(p) for p in shares))


@given(MATRICES)
@settings(max_examples=60, deadline=None)
def test_all_figures_agree_with_the_slow_references(case: tuple[int, int, int]) -> None:
    features = random_matrix(*case)
    targets = softmax(4 * features).astype(np.float32)
    assert float(health.teacher_entropy(torch.from_numpy(targets))) == pytest.approx(slow_entropy(targets), abs=1e-5)
    assert float(health.feature_std(torch.from_numpy(features))) == pytest.approx(slow_feature_std(features), abs=1e-5)
    rank = float(health.effective_rank(torch.from_numpy(features)))
    assert rank == pytest.approx(slow_effective_rank(features), rel=1e-4)
    assert 1 - 1e-6 <= rank <= max(1, min(case[0] - 1, case[1])) + 1e-4
    distinct = len({int(row.argmax()) for row in targets})
    assert float(health.prototype_use(torch.from_numpy(targets))) == pytest.approx(distinct / case[1])


def test_entropy_of_uniform_and_one_hot_targets() -> None:
    assert float(health.teacher_entropy(torch.full((5, 64), 1 / 64))) == pytest.approx(1.0)
    assert float(health.teacher_entropy(torch.eye(64)[:5])) == 0.0
    half = torch.zeros(3, 64)
    half[:, :8] = 1 / 8
    assert float(health.teacher_entropy(half)) == pytest.approx(0.5)


def test_feature_std_is_one_when_spread_zero_when_collapsed_whatever_the_length() -> None:
    spread = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert float(health.feature_std(spread)) == pytest.approx(1.0, abs=0.02)
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(1, 33)[:, None]
    assert float(health.feature_std(direction * lengths)) == pytest.approx(0.0, abs=1e-6)
    assert float(health.feature_std(direction)) == 0.0
    few_axes = torch.zeros(4096, 64)
    few_axes[:, :4] = spread[:, :4]
    assert float(health.feature_std(few_axes)) == pytest.approx(math.sqrt(4 / 64), abs=0.02)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(9, 40), (200, 16)])
def test_effective_rank_of_r_equal_orthogonal_directions_is_r(rank: int, shape: tuple[int, int]) -> None:
    n, d = shape
    left = np.linalg.qr(np.column_stack([np.ones(n), random_matrix(n, rank, 0)]))[0][:, 1:]  # orthogonal to the mean
    right = np.linalg.qr(random_matrix(d, rank, 1))[0]
    features = torch.from_numpy((left @ right.T + 5).astype(np.float32))
    assert float(health.effective_rank(features)) == pytest.approx(rank, rel=1e-3)
    assert float(health.effective_rank(1e-20 * (features - 5))) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e-30, 1e30])
@pytest.mark.parametrize("n", [1, 7])
def test_effective_rank_of_equal_samples_is_one_and_never_nan(value: float, n: int) -> None:
    features = (torch.linspace(-1, 1, 33) * value).expand(n, 33)
    assert float(health.effective_rank(features)) == 1.0
    assert math.isfinite(float(health.feature_std(features)))


def test_non_finite_features_show_instead_of_looking_healthy() -> None:
    features = torch.ones(4, 8)
    features[2, 3] = torch.nan
    assert math.isnan(float(health.effective_rank(features)))
    assert math.isnan(float(health.feature_std(features)))


def test_prototype_use_counts_each_winner_once() -> None:
    targets = torch.zeros(6, 12)
    targets[[0, 1, 2, 3, 4, 5], [7, 7, 7, 2, 2, 0]] = 1
    assert float(health.prototype_use(targets)) == pytest.approx(3 / 12)


def slow_patch_similarity(patches: np.ndarray) -> float:
    images = []
    for image in patches.astype(np.float64):
        cosines = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for i, a in enumerate(image)
            for j, b in enumerate(image)
            if i != j
        ]
        images.append(sum(cosines) / len(cosines))
    return sum(images) / len(images)


@given(st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 8), st.integers(0, 2**31 - 1)))
@settings(max_examples=40, deadline=None)
def test_patch_similarity_agrees_with_all_pairs(case: tuple[int, int, int, int]) -> None:
    patches = np.random.default_rng(case[3]).normal(size=case[:3]).astype(np.float32)
    found = float(health.patch_similarity(torch.from_numpy(patches)))
    assert found == pytest.approx(slow_patch_similarity(patches), abs=2e-5)


def test_patch_similarity_of_equal_and_of_orthogonal_patches() -> None:
    alike = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[None, :, None]
    assert float(health.patch_similarity(alike)) == pytest.approx(1.0, abs=1e-5)
    assert float(health.patch_similarity(torch.eye(6)[None])) == 0.0
    assert float(health.patch_similarity(torch.stack([torch.eye(2), -torch.eye(2)]).sum(0)[None])) == 0.0
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert float(health.patch_similarity(opposite)) == -1.0
    with pytest.raises(ValueError, match=r"\(4, 1, 8\)"):
        health.patch_similarity(torch.ones(4, 1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_zero_dim_tensors_of_full_precision(dtype: torch.dtype) -> None:
    features = torch.from_numpy(random_matrix(6, 10, 3)).to(dtype)
    targets = features.float().softmax(1).to(dtype)
    figures = [
        health.teacher_entropy(targets),
        health.feature_std(features),
        health.effective_rank(features),
        health.prototype_use(targets),
        health.patch_similarity(features[None]),
    ]
    assert all(figure.shape == () and figure.dtype == torch.float32 for figure in figures)


@pytest.mark.parametrize("figure", [health.teacher_entropy, health.feature_std, health.effective_rank])
def test_a_wrong_shape_is_named(figure) -> None:
    with pytest.raises(ValueError, match=r"\(4,\)"):
        figure(torch.ones(4))
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        figure(torch.ones(0, 4))


@pytest.mark.gpu
def test_nothing_but_the_eigenvalues_waits_for_the_gpu() -> None:
    features = torch.from_numpy(random_matrix(64, 128, 5)).cuda()
    targets = features.softmax(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = [health.teacher_entropy(targets), health.feature_std(features), health.prototype_use(targets)]
        figures.append(health.patch_similarity(features[None]))
        gram = health.feature_gram(features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(float(figure)) for figure in figures)
    on_host = health.effective_rank(features.cpu())
    assert float(health.effective_rank_of_gram(gram.cpu())) == pytest.approx(float(on_host), rel=1e-4)
