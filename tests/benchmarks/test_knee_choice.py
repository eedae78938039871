"""The parts of the knee that need no machine: what is chosen, predicted, bounded and slowed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knee_search import chosen_set as chosen_set_module
from knee_search.axes import AxesError, Given, Machine, ahead_of, axes_of, divisors, thinned
from knee_search.bootstrap import noise_of, rate_of, ratio_of
from knee_search.bounds import COMPUTE, DECODE, IO, MEMORY_BANDWIDTH, MEMORY_SIZE, Seen, bound_of, update_bytes
from knee_search.choice import halved, in_order, knee_of, largest_that_fits, spread
from knee_search.chosen_set import chosen_set
from knee_search.prediction import Beside, MachineModel, at_threads, fit_micro_batches
from knee_search.settings import Settings, flattened, of_record
from knee_search.slow_storage import Throttle

from dinox_train.config import Config, validate
from dinox_train.sections import DataSection

ONE = Settings(
    batch_size=64,
    precision="fp32",
    micro_batch=16,
    threads=2,
    prefetch_mib=64,
    pool_mib=2048,
    pin="auto",
    compile="off",
    checkpointing="none",
)
HERE = Machine(cores=6, is_gpu=False, unified=True, can_compile=True)
some_settings = st.builds(
    lambda micro, threads, prefetch, checkpointing: replace(
        ONE, micro_batch=micro, threads=threads, prefetch_mib=prefetch, checkpointing=checkpointing
    ),
    st.sampled_from([4, 8, 16, 32, 64]),
    st.integers(1, 8),
    st.sampled_from([64, 256]),
    st.sampled_from(["none", "block"]),
)
measured = st.dictionaries(some_settings, st.floats(0.1, 1000), min_size=1, max_size=20)


def config_of(**sections: dict) -> Config:
    return validate({"train": {"batch_size": 64, "updates": 100}, **sections})


# --- bisection, halving, the knee


@given(st.integers(0, 40), st.integers(0, 40))
def test_bisection_finds_the_largest_that_fits(count: int, limit: int) -> None:
    asked: list[int] = []

    def fits(value: int) -> bool:
        asked.append(value)
        return value < limit

    values = list(range(count))
    assert largest_that_fits(values, fits) == max((value for value in values if value < limit), default=None)
    assert len(asked) == len(set(asked)) <= 2 + math.log2(max(count, 1))


@settings(max_examples=50)
@given(measured, st.floats(0.0, 0.3))
def test_the_knee_is_the_smallest_on_the_plateau(rates: dict[Settings, float], tolerance: float) -> None:
    knee, best = knee_of(rates, tolerance), max(rates.values())
    assert rates[knee] >= (1 - tolerance) * best
    assert not [one for one in rates if one.size < knee.size and rates[one] >= (1 - tolerance) * best]
    assert sorted(in_order(rates, tolerance), key=str) == sorted(rates, key=str)


@settings(max_examples=50)
@given(measured, st.floats(0.0, 0.3))
def test_halving_keeps_the_fastest_and_the_knee(rates: dict[Settings, float], tolerance: float) -> None:
    kept = halved(rates, tolerance)
    assert len(kept) == len(set(kept)) == (len(rates) + 1) // 2
    assert max(rates.values()) == max(rates[one] for one in kept)
    if len(kept) > 1:
        assert knee_of(rates, tolerance) in kept


@settings(max_examples=50)
@given(measured, st.integers(1, 30))
def test_each_value_is_tried_where_there_is_room(rates: dict[Settings, float], most: int) -> None:
    chosen = spread(list(rates), rates, 0.03, most)
    assert len(chosen) == min(most, len(rates))
    assert chosen[0] == knee_of(rates, 0.03)
    if most == 30:
        assert {one.threads for one in chosen} == {one.threads for one in rates}


def test_nothing_measured_has_no_knee() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        knee_of({}, 0.03)
    assert largest_that_fits([], lambda _: True) is None
    assert spread([], {}, 0.03, 4) == []


# --- axes


def test_axes_are_suggested_within_the_batch_and_the_machine() -> None:
    axes = axes_of(Given(), config_of(), HERE)
    assert axes.micro_batch == {64: (2, 4, 8, 16, 32, 64)}
    assert axes.threads == (1, 2, 4, 6)
    assert (axes.pin, axes.compile, axes.precision) == (("auto",), ("off",), ("fp32",))
    on_gpu = axes_of(Given(), config_of(), replace(HERE, is_gpu=True, unified=False))
    assert (on_gpu.pin, on_gpu.compile) == (("off", "on"), ("off", "blocks"))
    assert axes_of(Given(), config_of(train={"batch_size": 15, "updates": 9}), HERE).micro_batch == {15: (1, 3, 5, 15)}


def test_the_configurations_own_value_is_among_those_that_are_tried() -> None:
    own = config_of(execution={"activation_checkpointing": "selective", "compile": "full"})
    on_gpu = axes_of(Given(), own, replace(HERE, is_gpu=True, can_compile=True))
    assert (on_gpu.checkpointing, on_gpu.compile) == (("none", "selective", "block"), ("off", "blocks", "full"))
    assert axes_of(Given(), own, HERE).compile == ("full",)
    assert axes_of(Given(), config_of(), HERE).checkpointing == ("none", "block")
    assert axes_of(Given(checkpointing=("none",)), own, HERE).checkpointing == ("none",)


@pytest.mark.parametrize(
    ("given", "named", "path", "about", "said"),
    [
        ("GIVEN", "OWN", "GIVEN", "GIVEN", ""),
        (None, "OWN", "OWN", "own", "the set of the configuration is measured"),
        (None, "s3://bucket/sets/ours", "s3://bucket/sets/ours", "ours", "the set of the configuration is measured"),
        (None, [{"path": "OTHER", "weight": 1}, {"path": "OWN", "weight": 2.5}], "OWN",
         "own (of 2 sets the one with the largest weight)", "of 2 sets the one with the largest weight"),
        (None, "fake", "PHANTOM", "the phantom", "data.shards names no set (fake): a phantom is measured"),
        (None, "ABSENT", "PHANTOM", "the phantom", "and nothing lies there: a phantom is measured"),
    ],
)  # fmt: skip
def test_which_set_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, named: Any, path: str, about: str, said: str
) -> None:
    (tmp_path / "own").mkdir()
    places = {"OWN": str(tmp_path / "own"), "ABSENT": str(tmp_path / "absent"), "PHANTOM": str(tmp_path / "phantom")}
    monkeypatch.setattr(chosen_set_module, "phantom_set", lambda folder, tell: folder)
    sets = [one | {"path": places.get(one["path"], one["path"])} for one in named] if isinstance(named, list) else named
    data = DataSection.model_validate({"shards": places.get(sets, sets) if isinstance(sets, str) else tuple(sets)})
    told: list[str] = []
    found = chosen_set(given, data, tmp_path / "phantom", told.append)
    assert (found.path, found.about) == (places.get(path, path), about)
    assert said in "".join(told)


def test_mathematics_is_varied_only_where_it_was_freed() -> None:
    with pytest.raises(AxesError, match="--free-batch"):
        axes_of(Given(batch_size=(128,)), config_of(), HERE)
    with pytest.raises(AxesError, match="--free-precision"):
        axes_of(Given(precision=("bf16",)), config_of(), HERE)
    freed = axes_of(
        Given(batch_size=(64, 128), free_batch=True, precision=("bf16",), free_precision=True), config_of(), HERE
    )
    assert (list(freed.micro_batch), freed.precision) == ([64, 128], ("bf16",))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Given(micro_batch=(5, 7)), "none divides the global batch of 64 images"),
        (Given(threads=(0,)), "--threads: values must be at least 1"),
        (Given(pin=("maybe",)), "--pin maybe: there are off, auto, on"),
        (Given(compile=("all",)), "--compile all"),
        (Given(checkpointing=("some",)), "--checkpointing some"),
    ],
)
def test_a_value_that_is_none_is_refused(wrong: Given, words: str) -> None:
    with pytest.raises(AxesError, match=words):
        axes_of(wrong, config_of(), HERE)


def test_candidates_fit_and_read_ahead_differently() -> None:
    axes = axes_of(Given(prefetch_mib=(64, 128, 4096)), config_of(), HERE)
    window = 3 << 20  # 64 MiB are one micro-batch of 16, and 128 MiB two
    found = axes.candidates(lambda key: key[2] <= 16 and key[4] == "none", window)
    assert {one.micro_batch for one in found} == {2, 4, 8, 16}
    sixteen = [one for one in found if (one.micro_batch, one.threads) == (16, 1)]
    assert [(one.prefetch_mib, ahead_of(one, window)) for one in sixteen] == [(64, 1), (128, 2), (4096, 8)]
    two = [one for one in found if (one.micro_batch, one.threads) == (2, 1)]
    assert [one.prefetch_mib for one in two] == [64], "8 are ahead with all of them: the least memory is enough"


@given(st.integers(1, 400))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert found == sorted(found)
    assert [number % part for part in found] == [0] * len(found)
    assert {1, number} <= set(found)


@given(st.lists(st.integers(), unique=True, max_size=30).map(sorted), st.integers(2, 8))
def test_thinned_keeps_both_ends(values: list[int], most: int) -> None:
    found = thinned(values, most)
    assert len(found) == len(set(found)) == min(most, len(values))
    assert set(found) <= set(values)
    if values:
        assert (found[0], found[-1]) == (values[0], values[-1])


def test_settings_become_overrides_and_records() -> None:
    assert of_record(ONE.record()) == ONE
    assert "train.accumulation=4" in ONE.overrides()
    assert "train.batch_size=64" in ONE.overrides()
    names = dict(flattened(ONE.tree()))
    assert "precision" not in names
    assert "train.batch_size" not in names


# --- the model of the machine


@given(st.floats(1e-4, 10), st.floats(0, 10), st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), unique=True, min_size=2))
def test_a_fit_finds_what_it_was_made_of(a: float, b: float, sizes: list[int]) -> None:
    fitted = fit_micro_batches({size: a + b / size for size in sizes})
    assert fitted is not None
    for size in sizes:
        assert fitted[0] + fitted[1] / size == pytest.approx(a + b / size, rel=1e-4)


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(1e-4, 10), min_size=1))
def test_a_fit_is_never_negative(seconds: dict[int, float]) -> None:
    fitted = fit_micro_batches(seconds)
    assert fitted is not None
    assert min(fitted) >= 0


def test_rates_between_threads() -> None:
    rates = {2: 100.0, 4: 180.0}
    assert [at_threads(rates, threads) for threads in (1, 2, 3, 4, 8)] == [50.0, 100.0, 140.0, 180.0, 180.0]
    with pytest.raises(ValueError, match="no decoding"):
        at_threads({}, 1)


def model_of(*, cores: int, decode_s: float, compute_s: float, storage: float | None = None) -> MachineModel:
    """A processor that compute has to itself or shares fairly: a window's decoding takes decode_s of a core."""
    slowed = compute_s + decode_s / cores
    together = 1 / slowed
    return MachineModel(
        window_read_bytes=1e6,
        storage=storage,
        decode={threads: threads / decode_s for threads in (1, 2)},
        compute={ONE.compute: compute_s},
        beside={2: Beside(compute_s, slowed, together * 1.1, together)},
    )


def test_the_smallest_part_bounds_the_prediction() -> None:
    found = model_of(cores=2, decode_s=0.01, compute_s=0.1).predict(ONE)
    assert found is not None
    assert found.by == COMPUTE
    assert found.rate == pytest.approx(1 / 0.105, rel=0.01)
    slow = model_of(cores=2, decode_s=0.01, compute_s=0.1, storage=0.002).predict(ONE)
    assert slow is not None
    assert (slow.by, slow.rate) == (IO, 2.0)
    assert model_of(cores=2, decode_s=0.01, compute_s=0.1).predict(replace(ONE, compile="full")) is None


@given(st.floats(1e-3, 1), st.floats(1e-3, 1), st.floats(1, 8))
def test_contention_is_what_a_window_costs(compute_s: float, decode_s: float, cores: float) -> None:
    slowed = compute_s + decode_s / cores
    beside = Beside(compute_s, slowed, 2 / decode_s, 1 / slowed)  # the loader loads one window for each computed one
    assert beside.kappa_s == pytest.approx(decode_s / cores, rel=1e-6)
    assert 0 <= beside.loader_keeps <= 1


# --- bounds

QUIET = Seen(
    waits=0.0,
    read_s=0.1,
    decode_s=1.0,
    shares_cores=False,
    compute_s=0.1,
    kappa_s=0.0,
    larger_would_gain=None,
    tolerance=0.03,
    bytes_s=0.1,
    operations_s=0.2,
)


@pytest.mark.parametrize(
    ("seen", "bound"),
    [
        (QUIET, COMPUTE),
        (replace(QUIET, waits=0.3), DECODE),
        (replace(QUIET, waits=0.3, read_s=2.0), IO),
        (replace(QUIET, larger_would_gain=0.2), MEMORY_SIZE),
        (replace(QUIET, larger_would_gain=0.01), COMPUTE),
        (replace(QUIET, shares_cores=True, kappa_s=0.2), DECODE),
        (replace(QUIET, kappa_s=0.2), COMPUTE),
        (replace(QUIET, bytes_s=0.3), MEMORY_BANDWIDTH),
        (replace(QUIET, bytes_s=None), COMPUTE),
    ],
)
def test_bounds(seen: Seen, bound: str) -> None:
    name, why = bound_of(seen)
    assert name == bound
    assert why


def test_an_update_moves_its_weights_for_each_piece() -> None:
    common = {"parameters": 1000, "activation_bytes": 0, "weight_bytes": 4}
    one, two = (update_bytes(**common, accumulation=pieces) for pieces in (1, 2))
    assert two - one == 1000 * (4 * 4 + 8)
    assert one == 1000 * (4 * 4 + 8 + 44)


# --- intervals


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_rate_lies_in_its_interval(runs: Sequence[Sequence[float]]) -> None:
    rate = rate_of(runs, 8)
    assert rate.low <= rate.value <= rate.high
    assert 8 / 1.0 * 0.999 <= rate.low <= rate.high <= 8 / 0.1 * 1.001
    assert rate == rate_of(runs, 8)


def test_an_interval_knows_runs_that_differ() -> None:
    alike = rate_of([[1.0, 1.01, 0.99] * 4] * 3, 1)
    apart = rate_of([[1.0, 1.01, 0.99] * 4, [1.2, 1.21, 1.19] * 4, [1.1, 1.11, 1.09] * 4], 1)
    assert apart.high - apart.low > 5 * (alike.high - alike.low)
    twice = ratio_of([[0.5] * 4], 1, [[1.0] * 4], 1)
    assert (twice.low, twice.value, twice.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="no update"):
        rate_of([[]], 1)


def test_noise_is_what_the_same_differs_by() -> None:
    assert noise_of([[[1.0, 1.0]], [[2.0]]]) is None
    assert noise_of([[[1.0], [1.1]], [[2.0], [2.0]]]) == pytest.approx(0.1)


# --- a slower storage


def test_a_throttle_lets_so_many_bytes_through() -> None:
    now = [0.0]
    throttle = Throttle(100.0, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    for _ in range(10):
        throttle.read(50)
    assert now[0] == pytest.approx(5.0)
    now[0] += 100.0  # what was not asked for in the meantime is not saved up
    throttle.read(100)
    assert now[0] == pytest.approx(106.0)
    with pytest.raises(ValueError, match="above 0"):
        Throttle(0.0)
