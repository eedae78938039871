"""Schedules: their ends, their shape, and what happens beyond them."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.config import ConfigError, validate
from dinox_train.lengths import lengths_in_updates, updates_of_images
from dinox_train.schedule import (
    SHAPES,
    cosine,
    frozen_then_ramp,
    learning_rate,
    linear_ramp,
    scaled_learning_rate,
)


def learning_rates(total: int, warmup: int) -> list[float]:
    return [learning_rate(index, total, peak=2.0, final=0.5, warmup=warmup) for index in range(total)]


def test_warmup_cosine_rises_to_the_peak_and_falls_to_the_end() -> None:
    rates = learning_rates(total=100, warmup=10)
    assert rates[:10] == pytest.approx([0.2 * (index + 1) for index in range(10)])
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))
    assert rates[10 + 89] == 0.5
    assert learning_rate(10 + 44, 100, peak=2.0, final=0.5, warmup=10) == pytest.approx(1.25, abs=0.02)  # half-way
    assert learning_rate(5000, 100, peak=2.0, final=0.5, warmup=10) == 0.5


def test_without_warmup_the_first_update_is_at_the_peak() -> None:
    assert learning_rates(total=5, warmup=0)[0] == 2.0
    assert learning_rates(total=5, warmup=0)[-1] == 0.5


@pytest.mark.parametrize("warmup", [7, 8, 1000])
def test_a_warmup_longer_than_the_schedule_is_cut_to_it(warmup: int) -> None:
    assert learning_rates(total=7, warmup=warmup) == pytest.approx([2.0 * (index + 1) / 7 for index in range(7)])
    assert learning_rate(100, 7, peak=2.0, final=0.5, warmup=warmup) == 2.0


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    index=st.integers(0, 1200),
    shape=st.sampled_from(SHAPES),
)
def test_learning_rates_are_positive_and_never_above_the_peak(total: int, warmup: int, index: int, shape: str) -> None:
    rate = learning_rate(index, total, peak=3e-4, final=1e-6, warmup=warmup, shape=shape)
    assert math.isfinite(rate)
    assert 0 < rate <= 3e-4


def test_cosine_between_its_ends() -> None:
    values = [cosine(index, 101, start=0.99, final=1.0) for index in range(101)]
    assert values[0] == pytest.approx(0.99, abs=1e-15)
    assert values[100] == 1.0
    assert values[50] == pytest.approx(0.995)
    assert values[25] == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2)
    assert values == sorted(values)
    assert cosine(7000, 101, start=0.99, final=1.0) == 1.0
    assert cosine(0, 1, start=0.99, final=1.0) == 0.99


def test_linear_ramp() -> None:
    values = [linear_ramp(index, 4, start=0.04, final=0.08) for index in range(7)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])
    assert linear_ramp(0, 0, start=0.04, final=0.08) == 0.08


@pytest.mark.parametrize(("index", "total"), [(-1, 10), (0, 0)])
def test_indices_and_lengths_that_make_no_sense_are_refused(index: int, total: int) -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        learning_rate(index, total, peak=1.0, final=0.0, warmup=0)
    with pytest.raises(ValueError, match="counted from 0"):
        cosine(index, total, start=1.0, final=0.0)


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize("warmup", [0, 10])
def test_all_shapes_share_the_warmup_and_the_ends(warmup: int) -> None:
    curves = {
        shape: [learning_rate(index, 100, peak=2.0, final=0.5, warmup=warmup, shape=shape) for index in range(150)]
        for shape in SHAPES
    }
    for shape, rates in curves.items():
        assert rates[: warmup + 1] == curves["cosine"][: warmup + 1]
        assert rates[warmup] == 2.0
        assert set(rates[99:]) == {2.0 if shape == "constant" else 0.5}
    assert set(curves["constant"][warmup:]) == {2.0}
    falls = [before - after for before, after in itertools.pairwise(curves["linear"][warmup:100])]
    assert falls == pytest.approx([1.5 / (99 - warmup)] * (99 - warmup))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_whose_warmup_leaves_one_update(shape: str) -> None:
    rates = [learning_rate(index, 5, peak=2.0, final=0.5, warmup=4, shape=shape) for index in range(7)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[5:] == ([2.0, 2.0] if shape == "constant" else [0.5, 0.5])


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant, not 'step'"):
        learning_rate(0, 10, peak=1.0, final=0.0, warmup=0, shape="step")


def test_a_frozen_backbone_rises_afterwards() -> None:
    factors = [frozen_then_ramp(index, frozen=3, ramp=4) for index in range(9)]
    assert factors == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [frozen_then_ramp(index, frozen=2, ramp=0) for index in range(4)] == [0, 0, 1, 1]
    assert [frozen_then_ramp(index, frozen=0, ramp=0) for index in range(2)] == [1, 1]


def test_the_scaling_rule() -> None:
    assert scaled_learning_rate(1e-3, 64) == 1e-3
    assert scaled_learning_rate(1e-3, 2048) == pytest.approx(5.657e-3, rel=1e-3)  # DINOv3's ViT-L recipe
    assert scaled_learning_rate(5e-5, 4096) == pytest.approx(4e-4)  # and its 7B one


# ------------------------------------------------------------------ lengths in images


@pytest.mark.parametrize(
    ("text", "updates"),
    [("64 images", 1), ("65 images", 2), ("100k images", 1563), ("1.5M images", 23438), (" 0 images ", 0)],
)
def test_images_become_updates(text: str, updates: int) -> None:
    assert updates_of_images(text, 64) == updates


@pytest.mark.parametrize("text", ["100k", "images", "-5 images", "1e3 images", "5 updates", "100K images", "5images"])
def test_other_texts_are_no_lengths(text: str) -> None:
    assert updates_of_images(text, 64) is None


@given(images=st.integers(0, 10**9), batch_size=st.integers(1, 10**5))
def test_no_image_is_left_out(images: int, batch_size: int) -> None:
    updates = updates_of_images(f"{images} images", batch_size)
    assert updates is not None
    assert updates * batch_size >= images > (updates - 1) * batch_size


def test_lengths_of_a_tree() -> None:
    tree = {
        "run": {"folder": "100 images"},
        "train": {"batch_size": 50, "updates": "10k images"},
        "schedule": {"warmup_updates": "1k images", "shape": "cosine"},
        "objective": {"gram": {"start": "5k images", "refresh_every": 7}},
        "stages": ({"updates": "2k images"}, {"objective": {"gram": {"refresh_every": "100 images"}}}),
        "optimizer": {"backbone_frozen_updates": "some images"},
    }
    assert lengths_in_updates(tree, 64) == {
        "run": {"folder": "100 images"},
        "train": {"batch_size": 50, "updates": 200},
        "schedule": {"warmup_updates": 20, "shape": "cosine"},
        "objective": {"gram": {"start": 100, "refresh_every": 7}},
        "stages": ({"updates": 40}, {"objective": {"gram": {"refresh_every": 2}}}),
        "optimizer": {"backbone_frozen_updates": "some images"},
    }
    assert lengths_in_updates({"schedule": {"updates": "640 images"}}, 64) == {"schedule": {"updates": 10}}
    assert lengths_in_updates("no tree", 64) == "no tree"


def test_lengths_and_rates_of_a_configuration() -> None:
    config = validate(
        {"train": {"batch_size": 256}, "schedule": {"warmup_updates": "100k images", "shape": "constant"}}
    )
    assert config.schedule.warmup_updates == 391
    assert config.optimizer.peak_learning_rate(256) == config.optimizer.learning_rate == 2e-4
    assert config.optimizer.last_learning_rate == 1e-6
    scaled = validate({"train": {"batch_size": 256}, "optimizer": {"base_learning_rate": 1e-3}})
    assert scaled.optimizer.learning_rate is None
    assert scaled.optimizer.peak_learning_rate(256) == 2e-3
    assert scaled.optimizer.learning_rate_in_words(256) == "0.002 = base 0.001 x 4 x sqrt(256 images / 1024)"
    assert config.optimizer.learning_rate_in_words(256) == "0.0002, as given"
    assert validate(scaled.model_dump()) == scaled


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"optimizer": {"base_learning_rate": 1e-3, "learning_rate": 1e-3}}, "one of the two"),
        ({"optimizer": {"learning_rate": None}}, "one of the two"),
        ({"schedule": {"shape": "constant"}, "optimizer": {"final_learning_rate": 1e-6}}, "set it to null"),
        ({"schedule": {"warmup_updates": "100 pictures"}}, r"schedule\.warmup_updates.*given: '100 pictures'"),
        ({"schedule": {"shape": "step"}}, r"schedule\.shape"),
    ],
)
def test_contradictions_are_refused_in_words(tree: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(tree)
