"""Phases and reconstructions between each other are refused; what scanners write from slice to slice is not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dinox_io import stacking
from dinox_io.rules import Refused
from tests.io.dicom_factory import write_series
from tests.io.series_reading import code_of, read, volume_of

DIFFERENT = {
    "AcquisitionNumber": ["1", "2", "3", "4"],
    "ConvolutionKernel": ["B30f", "B70f", "B80f", "B46f"],
    "KVP": ["80", "140", "100", "120"],
    "SliceThickness": ["1", "1.25", "2", "0.6"],
    "ImageType": [["ORIGINAL", "PRIMARY", "AXIAL", name] for name in ("A", "B", "C", "D")],
    "TemporalPositionIdentifier": ["1", "2", "3", "4"],
    "StudyInstanceUID": ["1.2.1", "1.2.2", "1.2.3", "1.2.4"],
    "AcquisitionTime": ["101500", "101530", "101600.5", "101700"],
    "ContentTime": ["101500", "101530", "101600.5", "101700"],
}


def write_order(folder: Path, keyword: str, order: list[int]) -> None:
    """A regular series whose slice i has value order[i] of the attribute."""

    def change(index: int, dataset: Dataset) -> None:
        setattr(dataset, keyword, DIFFERENT[keyword][order[index]])

    write_series(folder, len(order), change=change)


@pytest.mark.parametrize("keyword", DIFFERENT)
@pytest.mark.parametrize("order", [[0, 1, 0, 1], [1, 0, 1, 0, 1], [0, 1, 2] * 2, [3, 1, 2, 0] * 2 + [3]])
def test_values_that_take_turns_are_refused(tmp_path: Path, keyword: str, order: list[int]) -> None:  # F03
    write_order(tmp_path, keyword, order)
    assert code_of(tmp_path) == "INTERLEAVED"


@pytest.mark.parametrize("keyword", DIFFERENT)
@pytest.mark.parametrize(
    "order", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 0]]
)
def test_blocks_single_changes_and_unique_values_pass(tmp_path: Path, keyword: str, order: list[int]) -> None:
    write_order(tmp_path, keyword, order)
    assert volume_of(tmp_path).hu.shape[0] == len(order)


def test_original_beside_derived_alone_is_no_reconstruction_of_its_own(tmp_path: Path) -> None:
    def change(index: int, dataset: Dataset) -> None:
        dataset.ImageType = [["ORIGINAL", "DERIVED"][index % 2], "PRIMARY", "AXIAL"]

    write_series(tmp_path, 6, change=change)
    assert volume_of(tmp_path).hu.shape[0] == 6


def test_noise_of_the_thickness_passes(tmp_path: Path) -> None:
    def change(index: int, dataset: Dataset) -> None:
        dataset.SliceThickness = ["1.25", "1.251"][index % 2]

    write_series(tmp_path, 6, change=change)
    assert volume_of(tmp_path).hu.shape[0] == 6


def test_a_run_between_gaps_is_looked_at_by_itself(tmp_path: Path) -> None:
    """Phases that overlap in part: alone below, between each other above."""

    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [-10, -20, 2 * index if index < 4 else 3 + index]
        dataset.KVP = "80" if index < 4 else ["140", "80"][index % 2]

    write_series(tmp_path, 9, change=change)
    volumes, rows = read(tmp_path, split_gaps=True)
    assert not volumes
    assert rows[-1].code == "INTERLEAVED"


@given(st.integers(2, 4), st.integers(0, 12))
def test_turns_are_found_whatever_their_number(count: int, more: int) -> None:
    values = [index % count for index in range(2 * count + more)]
    with pytest.raises(Refused, match="INTERLEAVED"):
        stacking.check_alternating(values)
    swapped = [values[1], values[0], *values[2:]]
    stacking.check_alternating([0] * len(values), sorted(values), list(range(len(values))), swapped)


def test_levels_join_noise_only() -> None:
    assert stacking.levels([1.25, None, 1.251, 1.0, 1.249]) == [1.249, None, 1.249, 1.0, 1.249]
