"""Draws of a pass: keyed, and one choice for the whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinox_model import ViTConfig
from dinox_train.network_draws import draw_pass, draw_unknown_scale

VIT = ViTConfig(width=32, num_layers=3, num_heads=2, mlp_hidden=64, drop_path=0.4, rope_rescale=2.0)


def draws(config: ViTConfig = VIT, name: str = "global", *, seed: int = 1, position: int = 2, num_views: int = 2):
    return draw_pass(config, name, seed=seed, position=position, batch_size=5, num_views=num_views)


def test_the_number_of_kept_rows_is_that_of_the_whole_batch() -> None:
    whole = draws().of_rows(np.arange(5))
    assert [len(kept) for kept in whole.kept] == [6] * 6
    counts = np.array([[len(kept) for kept in draws().of_rows(np.array([row])).kept] for row in range(5)])
    assert counts.sum(axis=0).tolist() == [6] * 6
    assert counts.min() == 0  # a micro-batch may keep nothing at all


def test_each_coordinate_of_the_key_counts() -> None:
    first = draws().of_rows(np.arange(5))
    again = draws().of_rows(np.arange(5))
    assert all(torch.equal(a, b) for a, b in zip(first.kept, again.kept, strict=True))
    assert torch.equal(first.rope, again.rope)
    for other in (draws(seed=2), draws(position=3), draws(name="local")):
        assert not torch.equal(other.of_rows(np.arange(5)).rope, first.rope)


def test_moved_coordinates_are_the_same_in_every_micro_batch() -> None:
    assert torch.equal(draws().of_rows(np.array([0])).rope, draws().of_rows(np.array([3, 4])).rope)


@pytest.mark.parametrize("config", [replace(VIT, drop_path=0.0, rope_rescale=None), VIT])
def test_nothing_is_drawn_where_nothing_is_random(config: ViTConfig) -> None:
    assert (draws(config) is None) == (config.drop_path == 0)
    assert draws(config, num_views=0) is None


def test_unknown_scales_are_keyed_and_as_many_as_asked() -> None:
    def drawn(share: float, rows: np.ndarray, position: int = 0) -> np.ndarray:
        return draw_unknown_scale(share, seed=1, position=position, rows=rows, num_views=4)

    whole = drawn(0.25, np.arange(500))
    assert whole.mean() == pytest.approx(0.25, abs=0.05)
    assert np.array_equal(drawn(0.25, np.array([7, 3])), whole[[7, 3]])
    assert not np.array_equal(drawn(0.25, np.arange(500), position=1), whole)
    assert not drawn(0.0, np.arange(50)).any()
    assert drawn(1.0, np.arange(50)).all()
