"""The device's unfilter against dinox_io's NumPy tier, bit for bit: every filter, edge sizes, any int16."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinox_io.filters import FILTERS, NUMPY, apply_filter
from dinox_model.kernels import unfilter as module
from dinox_model.kernels.unfilter import (
    HILP,
    NONE,
    PLANES,
    traffic,
    traffic_compiled,
    traffic_reference,
    unfilter,
    unfilter_reference,
)
from tests.kernels.eager_traffic import eager_traffic

AIR_HU = -1024
FORMS = {"kernel": unfilter, "reference": unfilter_reference}


def filtered_batch(
    sizes: np.ndarray, filters: np.ndarray, slice_size: tuple[int, int], *, depth: int, seed: int, spare: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 (b, depth, 2·Y·X + spare) with noise where nobody is to read, and the images that come of it."""
    chance = np.random.default_rng(seed)
    height, width = slice_size
    given = chance.integers(0, 256, (len(sizes), depth, 2 * height * width + spare), dtype=np.uint8)
    images = np.full((len(sizes), depth, height, width), AIR_HU, np.int16)
    for row, (y, x) in enumerate(sizes.tolist()):
        low, high = ((-32768, 32768), (-1100, -1000))[seed % 2]
        images[row, :, :y, :x] = chance.integers(low, high, (depth, y, x))
        for place, one in zip(given[row], images[row, :, :y, :x], strict=True):
            place[: 2 * y * x] = apply_filter(one, FILTERS[filters[row]], tier=NUMPY)
    return torch.from_numpy(given), images


@pytest.mark.parametrize("form", FORMS)
def test_every_height_of_a_few_rows(form: str) -> None:
    """Which rows have neighbours depends on the height modulo 4; widths on both sides of a program's columns (64)."""
    sizes = np.array(list(zip(range(1, 9), (65, 64, 63, 1, 2, 65, 64, 63), strict=True)))
    filters = np.full(len(sizes), HILP)
    given_bytes, expected = filtered_batch(sizes, filters, (8, 65), depth=1, seed=2)
    np.testing.assert_array_equal(FORMS[form](given_bytes, sizes, filters, (8, 65)).numpy(), expected)


@settings(max_examples=6)
@example(sizes=[(16, 32), (9, 16)], filters=[2, 0], more=(0, 0), depth=1, seed=1)  # rows in multiples of 16
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 66)), min_size=1, max_size=2),
    filters=st.lists(st.sampled_from([NONE, PLANES, HILP]), min_size=2, max_size=2),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    depth=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    sizes: list[tuple[int, int]], filters: list[int], more: tuple[int, int], depth: int, seed: int
) -> None:
    """Sizes and filters mixed in one batch; slices smaller than the batch's edges are in air."""
    true_sizes, names = np.array(sizes), np.array(filters[: len(sizes)])
    height, width = (true_sizes.max(axis=0) + more).tolist()
    spare = -2 * height * width % 16
    given_bytes, expected = filtered_batch(true_sizes, names, (height, width), depth=depth, seed=seed, spare=spare)
    for form in FORMS.values():
        np.testing.assert_array_equal(form(given_bytes, true_sizes, names, (height, width)).numpy(), expected)


def test_any_bytes_at_all() -> None:
    """Bytes that no filter made (damage that a checksum let through) give what the NumPy tier gives, not a crash."""
    sizes, filters = np.array([(13, 20)] * 3), np.array([NONE, PLANES, HILP])
    chance = np.random.default_rng(5)
    given_bytes = chance.integers(0, 256, (3, 2, 520), dtype=np.uint8)
    expected = np.empty((3, 2, 13, 20), np.int16)
    for row, name in enumerate(filters):
        for number in range(2):
            _numpy_tier(given_bytes[row, number], FILTERS[name], expected[row, number])
    for form in FORMS.values():
        found = form(torch.from_numpy(given_bytes), sizes, filters, (13, 20))
        np.testing.assert_array_equal(found.numpy(), expected)


def _numpy_tier(given_bytes: np.ndarray, name: str, out: np.ndarray) -> None:
    from dinox_io.filters import Scratch, remove_filter

    remove_filter(given_bytes, name, out, Scratch(), tier=NUMPY)


def test_no_windows_are_no_images() -> None:
    for form in FORMS.values():
        none = form(torch.zeros(0, 3, 32, dtype=torch.uint8), np.zeros((0, 2), int), np.zeros(0, int), (4, 4))
        assert none.shape == (0, 3, 4, 4)
        assert none.dtype == torch.int16


GOOD = {
    "filtered": torch.zeros(2, 1, 32, dtype=torch.uint8), "sizes": np.array([(4, 4), (2, 3)]),
    "filters": np.array([2, 0]), "slice_size": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"filtered": torch.zeros(2, 1, 32, dtype=torch.int8)}, TypeError, "uint8"),
        ({"filtered": torch.zeros(2, 32, dtype=torch.uint8)}, ValueError, "contiguous"),
        ({"filtered": torch.zeros(2, 32, 3, dtype=torch.uint8).mT}, ValueError, "contiguous"),
        ({"filtered": torch.zeros(2, 1, 31, dtype=torch.uint8)}, ValueError, "32 bytes, not 31"),
        ({"sizes": np.array([(4, 4)])}, ValueError, "sizes must be"),
        ({"sizes": np.array([(4, 5), (2, 3)])}, ValueError, "between 1 x 1 and 4 x 4"),
        ({"sizes": np.array([(4, 4), (0, 3)])}, ValueError, "between 1 x 1 and 4 x 4"),
        ({"filters": np.array([2, 3])}, ValueError, "filters must be"),
        ({"filters": np.array([2])}, ValueError, "filters"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict, error: type[Exception], words: str) -> None:
    for form in FORMS.values():
        with pytest.raises(error, match=words):
            form(**(GOOD | wrong))


def test_without_triton_on_a_device_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "can_run_on", lambda _device: False)
    with pytest.raises(RuntimeError, match=r"kernels\.unfilter"):
        unfilter(**GOOD)


def test_it_is_an_operator_of_torch() -> None:
    arguments = (GOOD["filtered"], torch.tensor([[4, 4, 2], [2, 3, 0]], dtype=torch.int32), 4, 4, False)
    torch.library.opcheck(torch.ops.dinox.unfilter.default, arguments)


def test_every_filter_of_the_format_is_here() -> None:
    assert FILTERS == ("none", "planes", "hilp")
    assert (NONE, PLANES, HILP) == (0, 1, 2)


def test_the_references_traffic_is_what_torch_moves() -> None:
    sizes, filters = np.array([(32, 48)] * 4), np.full(4, HILP)
    given_bytes, _ = filtered_batch(sizes, filters, (32, 48), depth=2, seed=0)
    counted = eager_traffic(lambda: unfilter_reference(given_bytes, sizes, filters, (32, 48)))
    shape = (4, 2, 32, 48)
    assert counted.bytes == pytest.approx(traffic_reference(*shape).bytes, rel=0.01)
    assert traffic(*shape).bytes < traffic_compiled(*shape).bytes < traffic_reference(*shape).bytes
