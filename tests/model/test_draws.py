"""Draws: the rows that drop path keeps, the same however a batch is cut, and moved coordinates within their bounds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_model import ViTConfig, build
from dinox_model.draws import NUM_ROPE_UNIFORMS, Draws, draw, draw_from, keep_rows, moves_coordinates, num_residuals

CONFIG = ViTConfig(width=16, num_layers=3, num_heads=2, mlp_hidden=8, drop_path=0.4)
MOVING = dataclasses.replace(CONFIG, drop_path=0.0, rope_shift=0.25, rope_jitter=1.5, rope_rescale=2.0)
STILL = dataclasses.replace(CONFIG, drop_path=0.0)


def numbers(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, columns))


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 99))
def test_the_smallest_numbers_are_kept_and_as_many_as_said(rows: int, columns: int, rate: float, seed: int) -> None:
    uniforms = numbers(rows, columns, seed).round(1)  # so that some are equal
    kept = keep_rows(uniforms, rate)
    count = max(int(rows * (1 - rate)), 1)
    for column in range(columns):
        by_number = sorted(range(rows), key=lambda row: (uniforms[row, column], row))
        assert set(np.flatnonzero(kept[:, column])) == set(by_number[:count])


@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_cutting_the_batch_changes_nothing(rows: int, seed: int, data: st.DataObject) -> None:
    kept = keep_rows(numbers(rows, num_residuals(CONFIG), seed), CONFIG.drop_path)
    whole = draw(CONFIG, kept, None, np.arange(rows))
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(rows - 1, 1)), max_size=4)))
    parts = [part for part in np.split(np.array(order), cuts) if len(part)]
    of_parts = [draw(CONFIG, kept, None, part) for part in parts]
    assert whole.kept is not None
    for residual, kept_rows in enumerate(whole.kept):
        together: list[int] = []
        for rows_of_part, draws in zip(parts, of_parts, strict=True):
            assert draws.kept is not None
            assert draws.kept[residual].dtype == torch.int64
            together += rows_of_part[draws.kept[residual].numpy()].tolist()
            assert draws.kept_scale == whole.kept_scale, "the scale is the global batch's"
        assert sorted(together) == kept_rows.tolist()


def test_the_scale_makes_up_for_what_is_dropped() -> None:
    uniforms = numbers(10, num_residuals(CONFIG), 0)
    draws = draw(CONFIG, keep_rows(uniforms, CONFIG.drop_path), None, np.arange(10))
    assert draws.kept_scale == (10 / 6,) * 6
    times = np.zeros(10)
    for seed in range(2000):
        times += keep_rows(numbers(10, 1, seed), 0.4)[:, 0] * (10 / 6)
    assert np.abs(times / 2000 - 1).max() < 0.1, "each row's residual counts once on average"


def test_residuals_are_dropped_independently() -> None:
    kept = keep_rows(numbers(1000, 2, 0), 0.5)
    assert 200 < (kept[:, 0] & kept[:, 1]).sum() < 300


def test_a_micro_batch_may_keep_nothing() -> None:
    kept = np.zeros((4, num_residuals(CONFIG)), bool)
    kept[3] = True
    draws = draw(CONFIG, kept, None, np.array([0, 1]))
    assert draws.kept is not None
    assert [len(rows) for rows in draws.kept] == [0] * 6
    assert draws.kept_scale == (4.0,) * 6


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=5, max_size=5))
def test_moves_are_the_definition_and_bounded(uniforms: list[float]) -> None:
    moved = draw(MOVING, None, np.array(uniforms), np.arange(2)).rope
    assert moved is not None
    assert (moved.dtype, moved.shape) == (torch.float32, (2, 2))
    for axis in range(2):
        shift = 0.25 * (2 * uniforms[axis] - 1)
        factor = 1.5 ** (2 * uniforms[2 + axis] - 1) * 2.0 ** (2 * uniforms[4] - 1)
        assert moved[0, axis] == pytest.approx(shift, abs=1e-6)
        assert moved[1, axis] == pytest.approx(factor, rel=1e-6)
    assert moved[0].abs().max() <= 0.25 + 1e-6
    assert moved[1].min() >= 1 / 3 - 1e-6
    assert moved[1].max() <= 3 + 1e-6


@pytest.mark.parametrize(
    ("option", "value", "still"), [("rope_shift", 0.5, [1]), ("rope_jitter", 2.0, [0]), ("rope_rescale", 2.0, [0])]
)
def test_each_move_is_its_own(option: str, value: float, still: list[int]) -> None:
    config = dataclasses.replace(STILL, **{option: value})
    assert moves_coordinates(config)
    moved = draw(config, None, np.array([0.1, 0.3, 0.6, 0.8, 0.9]), np.arange(1)).rope
    assert moved is not None
    for part in range(2):
        assert torch.equal(moved[part], torch.full((2,), float(part))) == (part in still)
    assert (moved[1, 0] == moved[1, 1]) == (option != "rope_jitter"), "jitter is each axis' own, rescale both's"


def test_a_network_without_randomness_draws_nothing() -> None:
    assert not moves_coordinates(STILL)
    assert draw(STILL, None, None, np.arange(3)) == Draws(None, None, None)


def test_the_same_generator_gives_the_same_draws_and_nothing_else_is_touched() -> None:
    config = dataclasses.replace(CONFIG, rope_shift=0.1)
    before = torch.get_rng_state()
    one, same, other = (draw_from(config, 9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.kept is not None
    assert same.kept is not None
    assert other.kept is not None
    assert one.rope is not None
    assert same.rope is not None
    assert [len(rows) for rows in one.kept] == [5] * 6
    assert all(torch.equal(a, b) for a, b in zip(one.kept, same.kept, strict=True))
    assert torch.equal(one.rope, same.rope)
    assert any(not torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))


def test_moving_them_to_a_device_keeps_them() -> None:
    kept = keep_rows(numbers(7, num_residuals(CONFIG), 3), 0.9)
    draws = draw(dataclasses.replace(CONFIG, rope_shift=0.1), kept, numbers(1, 5, 0)[0], np.array([6, 2, 5]))
    there = draws.to("cpu")
    assert draws.kept is not None
    assert there.kept is not None
    assert all(torch.equal(a, b) for a, b in zip(draws.kept, there.kept, strict=True))
    assert there.kept_scale == draws.kept_scale
    assert there.rope is not None
    assert draws.rope is not None
    assert torch.equal(there.rope, draws.rope)
    assert Draws().to("cpu") == Draws()


@pytest.mark.gpu
def test_moving_them_to_a_gpu_waits_for_nothing() -> None:
    config = dataclasses.replace(CONFIG, rope_shift=0.1)
    draws = draw_from(config, 32, torch.Generator().manual_seed(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = draws.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert draws.kept is not None
    assert there.kept is not None
    assert all(torch.equal(a, b.cpu()) for a, b in zip(draws.kept, there.kept, strict=True))


def test_what_is_missing_or_misshapen_is_named() -> None:
    rows = np.arange(2)
    with pytest.raises(ValueError, match=r"needs kept: bool \(rows, 6\)"):
        draw(CONFIG, None, None, rows)
    with pytest.raises(ValueError, match=r"kept must be bool \(rows, 6\), not bool \(2, 5\)"):
        draw(CONFIG, np.ones((2, 5), bool), None, rows)
    with pytest.raises(ValueError, match=r"kept must be bool \(rows, 6\), not float64 \(2, 6\)"):
        draw(CONFIG, np.ones((2, 6)), None, rows)
    with pytest.raises(ValueError, match=r"needs rope_uniforms: float64 \(5\)"):
        draw(MOVING, None, None, rows)
    with pytest.raises(ValueError, match=r"rope_uniforms must be float64 \(5\), not float64 \(4,\)"):
        draw(MOVING, None, np.zeros(NUM_ROPE_UNIFORMS - 1), rows)
    with pytest.raises(ValueError, match=r"at least one row, not \(0, 6\)"):
        keep_rows(np.zeros((0, 6)), 0.1)


def test_moves_are_uniform_in_shift_and_in_the_logarithm_of_the_factor() -> None:
    jitter_only = dataclasses.replace(STILL, rope_shift=1.0, rope_jitter=math.e)
    drawn = []
    for row in numbers(4000, NUM_ROPE_UNIFORMS, 5):
        moved = draw(jitter_only, None, row, np.arange(1)).rope
        assert moved is not None
        drawn.append(moved.numpy())
    shift, log_factor = np.stack(drawn)[:, 0], np.log(np.stack(drawn)[:, 1])
    for values in (shift, log_factor):
        for quantile in (0.1, 0.5, 0.9):
            assert np.quantile(values, quantile) == pytest.approx(2 * quantile - 1, abs=0.05)


def test_a_forward_in_pieces_is_the_whole_ones() -> None:
    config = dataclasses.replace(
        CONFIG, rope_jitter=1.5, positions="rope_mm", scale_conditioning=True, layer_scale=None
    )
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x, mm = torch.randn(5, 3, 32, 48, generator=generator), 0.5 + torch.rand(5, 2, generator=generator)
    kept, move = keep_rows(numbers(5, num_residuals(config), 7), config.drop_path), numbers(1, NUM_ROPE_UNIFORMS, 8)[0]

    def forward(rows: list[int]) -> torch.Tensor:
        draws = draw(config, kept, move, np.array(rows))
        return model(x[rows], mm_per_pixel=mm[rows], draws=draws).patches

    with torch.no_grad():
        whole = forward([0, 1, 2, 3, 4])
        pieces = torch.cat([forward([0]), forward([1, 2]), forward([3, 4])])
        still = model(x, mm_per_pixel=mm).patches
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)
    assert (still - whole).abs().amax(dim=(1, 2)).min() > 1e-2, "every image was touched"
