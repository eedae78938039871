"""Stored values to HU: exact, rounded to nearest, saturated; digest and histogram against plain loops."""

import hashlib
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io import hounsfield
from dinox_io.hounsfield import HU_MAX, HU_MIN, to_hounsfield


def reference(values: list[int], slope: Fraction, intercept: Fraction) -> tuple[list[int], int, bool]:
    """Value by value, in exact arithmetic."""
    exact = [slope * value + intercept for value in values]
    whole = [round(value) for value in exact]
    saturated = sum(not HU_MIN <= value <= HU_MAX for value in whole)
    rounded = any(value.denominator != 1 for value in exact)
    return [min(max(value, HU_MIN), HU_MAX) for value in whole], saturated, rounded


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32"])
@given(data=st.data())
def test_integer_rescale_equals_the_reference(dtype: str, data: st.DataObject) -> None:
    limits = np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(int(limits.min), int(limits.max)), min_size=1, max_size=20))
    slope = data.draw(st.integers(-40, 40).filter(bool))
    intercept = data.draw(st.integers(-70000, 70000))
    hu, saturated, rounded = to_hounsfield(np.array(values, dtype), slope, intercept)
    assert hu.dtype == np.int16
    assert (hu.tolist(), saturated, rounded) == reference(values, Fraction(slope), Fraction(intercept))


@given(
    values=st.lists(st.integers(-32768, 65535), min_size=1, max_size=20),
    quarters=st.integers(-40, 40).filter(lambda n: n % 4),
    intercept=st.integers(-8192, 8192),
)
def test_fractional_rescale_rounds_to_nearest_even(values: list[int], quarters: int, intercept: int) -> None:
    slope = Fraction(quarters, 4)  # exact in binary: ties are ties
    hu, saturated, rounded = to_hounsfield(np.array(values, np.int32), float(slope), intercept)
    assert (hu.tolist(), saturated, rounded) == reference(values, slope, Fraction(intercept))


def test_decimal_dust_is_no_rounding() -> None:
    stored = np.arange(0, 40000, 10, dtype=np.uint16)
    hu, saturated, rounded = to_hounsfield(stored, 0.1, -1000.0)
    assert np.array_equal(hu, np.arange(4000) - 1000)
    assert (saturated, rounded) == (0, False)


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 0.0), (float("nan"), 0.0), (1.0, float("inf")), (1e30, 0.0)])
def test_an_impossible_rescale_is_refused(slope: float, intercept: float) -> None:
    with pytest.raises(ValueError, match="slope"):
        to_hounsfield(np.array([1], np.uint32), slope, intercept)


def test_digest_is_of_little_endian_bytes_in_c_order() -> None:
    hu = np.random.default_rng(0).integers(-2000, 3000, (3, 4, 5)).astype(np.int16)
    packed = b"".join(struct.pack("<h", hu[z, y, x]) for z in range(3) for y in range(4) for x in range(5))
    assert hounsfield.volume_digest(hu) == hashlib.sha256(packed).hexdigest()
    assert hounsfield.volume_digest(hu.astype(">i2")) == hounsfield.volume_digest(hu)
    assert hounsfield.volume_digest(hu[:, ::-1]) != hounsfield.volume_digest(hu)
    with pytest.raises(ValueError, match="int16"):
        hounsfield.volume_digest(hu.astype(np.float32))


@given(st.lists(st.integers(HU_MIN, HU_MAX), min_size=1, max_size=50))
def test_histogram_counts_every_value(values: list[int]) -> None:
    counts = hounsfield.histogram(np.array(values, np.int16).reshape(1, 1, -1))
    expected = [0] * hounsfield.HISTOGRAM_BINS
    for value in values:
        expected[(value + 32768) // 16] += 1
    assert counts.tolist() == expected


def test_only_the_known_encoding_passes() -> None:
    hounsfield.check_encoding(hounsfield.ENCODING)
    with pytest.raises(ValueError, match="hu-uint8"):
        hounsfield.check_encoding("hu-uint8")
