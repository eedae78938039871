"""How Hounsfield units are stored: the only place that knows the encoding, its range, its padding and its digest.

Invariant: a stored value maps to HU = slope * stored + intercept, rounded to the nearest integer (ties to even) and
saturated to int16, never wrapped; what was rounded or saturated is told to the caller.
"""

import hashlib

import numpy as np

from dinox_io.filters import add_histogram

ENCODING = "hu-int16"
"""Id of the only encoding of this version; recorded in the manifest and enforced when read."""
HU_MIN = -32768
HU_MAX = 32767
AIR_HU = -1024
"""Fills a batch beyond a slice's true size."""
HISTOGRAM_BINS = 4096
HISTOGRAM_BIN_HU = 16


def check_encoding(name: str) -> None:
    """Raise ValueError unless `name` is the encoding that this version reads."""
    if name != ENCODING:
        raise ValueError(f"pixel encoding {name!r} is unknown: this version reads {ENCODING!r} only; update dinox")


def to_hounsfield(stored: np.ndarray, slope: float, intercept: float) -> tuple[np.ndarray, int, bool]:
    """HU of stored pixel values (DICOM PS3.3 C.7.6.16.2.9 / C.8.2.1: RescaleSlope, RescaleIntercept).

    Args:
        stored: integers of any shape, already masked to the bits stored and sign-extended, at most 32 bits wide.
        slope, intercept: this slice's own rescale; finite.

    Returns:
        (hu, saturated, rounded): int16 of the same shape; how many values lay beyond int16; whether any HU within the
        image was not an integer and had to be rounded.

    Raises:
        ValueError: slope or intercept is not finite, or slope is 0.
    """
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise ValueError(f"rescale slope {slope} and intercept {intercept} must be finite, and slope not 0")
    if stored.size == 0:
        return np.empty(stored.shape, np.int16), 0, False
    low, high = int(stored.min()), int(stored.max())
    if float(slope).is_integer() and float(intercept).is_integer():
        return _integer_rescale(stored, int(slope), int(intercept), low, high)
    exact = stored.astype(np.float64)
    exact *= slope
    exact += intercept
    whole = np.rint(exact)
    # Decimal strings like 0.1 leave 1e-13 of dust on values that are integers: that is not a rounding to speak of.
    np.subtract(exact, whole, out=exact)
    rounded = bool(np.abs(exact, out=exact).max() > 1e-6)
    saturated = int(np.count_nonzero((whole < HU_MIN) | (whole > HU_MAX)))
    return np.clip(whole, HU_MIN, HU_MAX, out=whole).astype(np.int16), saturated, rounded


def _integer_rescale(
    stored: np.ndarray, slope: int, intercept: int, low: int, high: int
) -> tuple[np.ndarray, int, bool]:
    ends = (slope * low + intercept, slope * high + intercept)
    # In Python's integers first: no fixed width can overflow before we know that it fits.
    if min(ends) >= HU_MIN and max(ends) <= HU_MAX:
        if slope == 1:
            # Modulo 2**16 the sum is exact, since the true result fits int16.
            return stored.astype(np.int16) + np.int16(((intercept + 32768) % 65536) - 32768), 0, False
        return (stored.astype(np.int64) * slope + intercept).astype(np.int16), 0, False
    if max(abs(slope * low), abs(slope * high)) + abs(intercept) >= 2**62:
        raise ValueError(f"rescale slope {slope} and intercept {intercept} are beyond any HU scale")
    wide = stored.astype(np.int64) * slope + intercept
    saturated = int(np.count_nonzero((wide < HU_MIN) | (wide > HU_MAX)))
    return np.clip(wide, HU_MIN, HU_MAX, out=wide).astype(np.int16), saturated, False


def volume_digest(hu: np.ndarray) -> str:
    """sha256 (64 hex digits) of int16 HU (z, y, x) as little-endian bytes in C order."""
    if hu.dtype.kind != "i" or hu.dtype.itemsize != 2:
        raise ValueError(f"a volume's digest is that of int16 HU, not of {hu.dtype}")
    digest = hashlib.sha256()
    for slice_hu in hu if hu.ndim == 3 else hu[None]:
        digest.update(np.ascontiguousarray(slice_hu, dtype="<i2").data)
    return digest.hexdigest()


def histogram(hu: np.ndarray) -> np.ndarray:
    """Counts of int16 HU: int64 (4096,), bins of 16 HU, the first one from -32768."""
    if hu.dtype != np.int16:
        raise ValueError(f"histogram counts int16 HU, not {hu.dtype}")
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    # Slice by slice: a volume that is no contiguous array is not copied whole.
    for slice_hu in hu if hu.ndim == 3 else hu[None]:
        add_histogram(slice_hu, counts)
    return counts
