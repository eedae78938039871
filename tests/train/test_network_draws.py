"""Draws of a pass: keyed, and one choice for the whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.1, 0.4, 0.9]), st.integers(0, 5), st.data())
def test_a_batch_keeps_the_same_rows_however_it_is_cut(
    batch_size: int, num_views: int, share: float, seed: int, data: st.DataObject
) -> None:
    config = replace(VIT, drop_path=share, rope_rescale=None)
    drawn = draw_pass(config, "global", seed=seed, position=7, batch_size=batch_size, num_views=num_views)
    assert drawn is not None
    order = np.array(data.draw(st.permutations(range(batch_size))))
    cuts = sorted(data.draw(st.sets(st.integers(1, batch_size - 1))) if batch_size > 1 else [])
    whole = drawn.of_rows(np.arange(batch_size))
    wanted = max(int(num_views * batch_size * (1 - share)), 1)
    found: list[set[int]] = [set() for _ in whole.kept]
    for rows in np.split(order, cuts):
        part = drawn.of_rows(rows)
        assert part.kept_scale == whole.kept_scale == (num_views * batch_size / wanted,) * 6
        for number, kept in enumerate(part.kept):
            view, place = np.divmod(kept.numpy(), len(rows))
            found[number] |= set((view * batch_size + rows[place]).tolist())
    assert [len(rows) for rows in found] == [wanted] * 6
    assert found == [set(kept.tolist()) for kept in whole.kept]


def test_every_row_is_kept_as_often_as_any_other_and_residuals_choose_for_themselves() -> None:
    counts = np.zeros((6, 10))
    for position in range(400):
        for number, kept in enumerate(draws(position=position).of_rows(np.arange(5)).kept):
            counts[number][kept.numpy()] += 1
    assert counts.sum() == 400 * 6 * 6
    np.testing.assert_allclose(counts / 400, 0.6, atol=0.11)  # 4.5 standard deviations
    first = draws().of_rows(np.arange(5)).kept
    assert len({tuple(kept.tolist()) for kept in first}) > 1


def test_drop_path_and_moved_coordinates_are_drawn_each_for_itself() -> None:
    both = draws().of_rows(np.arange(5))
    alone = draws(replace(VIT, rope_rescale=None)).of_rows(np.arange(5))
    moved = draws(replace(VIT, drop_path=0.0)).of_rows(np.arange(5))
    assert alone.rope is None
    assert moved.kept is None
    assert all(torch.equal(one, other) for one, other in zip(both.kept, alone.kept, strict=True))
    assert torch.equal(both.rope, moved.rope)
