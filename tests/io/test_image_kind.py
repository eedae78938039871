"""What is no slice of Hounsfield units is told by its header, and what is one is not taken for anything else."""

from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dinox_io.dicom import read_identity
from dinox_io.rules import RULES
from tests.io.dicom_factory import write_series
from tests.io.series_reading import code_of, volume_of

LONG_TERMS = pytest.mark.filterwarnings("ignore::UserWarning")
"""Vendors write what pydicom warns of: code strings of more than 16 characters, brackets."""


@LONG_TERMS
@pytest.mark.parametrize(
    "image_type",
    [
        "ORIGINAL\\PRIMARY\\AXIAL",
        "ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 SPI",
        "ORIGINAL\\PRIMARY\\AXIAL\\HELIX",
        "ORIGINAL\\SECONDARY\\AXIAL",
        "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
        "DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE",
        "DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 MPR",
        "DERIVED\\SECONDARY\\AXIAL\\CT_SOM7 MONOENERGETIC 70 KEV",
        "DERIVED\\PRIMARY\\VOLUME\\VMI",
        "DERIVED\\PRIMARY\\AXIAL\\MATRIX",
        "",
    ],
)
def test_slices_in_hu_are_taken(tmp_path: Path, image_type: str) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "ImageType", image_type))
    assert volume_of(tmp_path).hu.shape[0] == 5


@LONG_TERMS
@pytest.mark.parametrize(
    ("image_type", "code"),
    [
        ("DERIVED\\SECONDARY\\AXIAL\\IODINE", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\WATER(IODINE)", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 NEURO PBV", "PARAMETRIC_MAP"),
        ("DERIVED\\PRIMARY\\AXIAL\\PERFUSION_BLOODVOLUME", "PARAMETRIC_MAP"),
        ("DERIVED\\PRIMARY\\VOLUME\\MATERIAL_SPECIFIC", "PARAMETRIC_MAP"),
        ("DERIVED\\PRIMARY\\VOLUME\\MAT_FRACTIONAL", "PARAMETRIC_MAP"),
        ("DERIVED\\PRIMARY\\VOLUME\\EFF_ATOMIC_NUM", "PARAMETRIC_MAP"),
        ("DERIVED\\PRIMARY\\VOLUME\\Z_EFF", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\CALCIUM", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\URIC ACID", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\TMAX", "PARAMETRIC_MAP"),
        ("DERIVED\\SECONDARY\\AXIAL\\MIP", "PROJECTION"),
        ("DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 MIP", "PROJECTION"),
        ("DERIVED\\SECONDARY\\AXIAL\\MINIP", "PROJECTION"),
        ("DERIVED\\PRIMARY\\VOLUME\\MAXIMUM", "PROJECTION"),
        ("DERIVED\\PRIMARY\\VOLUME\\SUBTRACTION", "PROJECTION"),
        ("DERIVED\\SECONDARY\\AXIAL\\FUSED", "PROJECTION"),
        ("DERIVED\\SECONDARY\\AXIAL\\VRT", "PROJECTION"),
        ("DERIVED\\SECONDARY\\3D", "PROJECTION"),
        ("ORIGINAL\\PRIMARY\\SCANOSCOPE", "LOCALIZER"),
        ("ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 TOPOGRAM", "LOCALIZER"),
    ],
)
def test_other_images_are_skipped_by_their_kind(tmp_path: Path, image_type: str, code: str) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "ImageType", image_type))
    assert code_of(tmp_path) == code
    assert RULES[code].kind == "skipped"


@pytest.mark.parametrize(
    ("rescale_type", "fact"),
    [("HU", "HU"), ("Hounsfield Units", "HU"), ("US", "unspecified"), ("", None), (None, None)],
)
def test_units_that_may_be_hu_are_taken_and_recorded(tmp_path: Path, rescale_type: str | None, fact: object) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.RescaleType = rescale_type
        if rescale_type is None:
            del dataset.RescaleType

    write_series(tmp_path, change=change)
    assert volume_of(tmp_path).facts["rescale_type"] == fact


@LONG_TERMS
@pytest.mark.parametrize("rescale_type", ["HU_MOD", "MGML", "Z_EFF", "ML/100G/MIN", "MG/ML", "PERCENT", "SUV"])
def test_other_units_are_no_hu(tmp_path: Path, rescale_type: str) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "RescaleType", rescale_type))
    assert code_of(tmp_path) == "NOT_HU"


def test_a_ct_image_without_modality_is_wanted_data(tmp_path: Path) -> None:
    paths = write_series(tmp_path, change=lambda _, dataset: delattr(dataset, "Modality"))
    assert read_identity(paths[0]).is_ct  # else it is not opened again
    assert code_of(tmp_path) == "NO_MODALITY"
    assert RULES["NO_MODALITY"].kind == "rejected"


def test_what_is_no_ct_image_and_has_no_modality_is_not(tmp_path: Path) -> None:
    def change(_: int, dataset: Dataset) -> None:
        del dataset.Modality
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"

    paths = write_series(tmp_path, change=change)
    assert not read_identity(paths[0]).is_ct
    assert code_of(tmp_path) == "NOT_CT"


@pytest.mark.parametrize(
    ("keyword", "size", "code"),
    [("FloatPixelData", 4, "FLOAT_PIXELS"), ("DoubleFloatPixelData", 8, "PIXEL_FORMAT_UNSUPPORTED")],
)
def test_real_numbers_for_pixels_are_told_from_damage(tmp_path: Path, keyword: str, size: int, code: str) -> None:
    def change(_: int, dataset: Dataset) -> None:
        setattr(dataset, keyword, bytes(size * dataset.Rows * dataset.Columns))
        dataset.BitsAllocated = 8 * size
        for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(dataset, name)

    write_series(tmp_path, change=change)
    assert code_of(tmp_path) == code
