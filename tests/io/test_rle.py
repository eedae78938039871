"""RLE frames: what an encoder makes comes back bit for bit, and no damage becomes a picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels.encoders import RLELosslessEncoder

from dinox_io import rle
from tests.io.random_scan import rle_frame


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_frames_of_two_encoders_come_back(rows: int, columns: int, word_bytes: int, spread: int) -> None:
    random = np.random.default_rng(rows * 1000 + columns)
    words = (random.integers(0, 1 + 3**spread, (rows, columns)) * 77).astype(f"<u{word_bytes}")
    encoded = [rle_frame(words.astype(f">u{word_bytes}"))]
    if word_bytes < 4:
        encoded.append(_by_pydicom(words))
    for data in encoded:
        assert np.array_equal(rle.decode_frame(data, words.size, word_bytes), words.ravel())


def _by_pydicom(words: np.ndarray) -> bytes:
    return RLELosslessEncoder.encode(
        words.tobytes(), rows=words.shape[0], columns=words.shape[1], number_of_frames=1, samples_per_pixel=1,
        bits_allocated=8 * words.itemsize, bits_stored=8 * words.itemsize, pixel_representation=0,
        photometric_interpretation="MONOCHROME2", encoding_plugin="pydicom",
    )  # fmt: skip


def test_a_frame_that_goes_on_is_refused_and_not_decoded() -> None:
    header = np.zeros(16, "<u4")
    header[:2] = 1, 64
    bomb = header.tobytes() + bytes([129, 7]) * 1_000_000
    with pytest.raises(ValueError, match="a segment decodes to 128 bytes, not 100"):
        rle.decode_frame(bomb, 100, 1)
    with pytest.raises(ValueError, match="a segment decodes to 256 bytes, not 256"):
        rle.decode_frame(bomb, 256, 1)


@pytest.mark.parametrize("segments", [[0], [3, 64, 70, 80], [2, 64, 60], [2, 60, 64], [2, 64, 10**6]])
def test_segments_that_lie_elsewhere_are_refused(segments: list[int]) -> None:
    header = np.zeros(16, "<u4")
    header[: len(segments)] = segments
    with pytest.raises(ValueError, match="segment"):
        rle.decode_frame(header.tobytes() + bytes(100), 10, 2)


@given(st.data())
def test_every_frame_that_ends_early_is_refused(data: st.DataObject) -> None:
    whole = rle_frame(np.arange(60, dtype=">u2").reshape(6, 10))
    cut = data.draw(st.integers(2, len(whole)))  # the last byte is padding
    with pytest.raises(ValueError, match="segment"):
        rle.decode_frame(whole[:-cut], 60, 2)
