"""Pseudonyms are the HMAC that DESIGN says; texts pass only in closed forms."""

import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io import privacy
from tests.io.dicom_factory import write_series
from tests.io.series_reading import read

KEY = bytes(range(32))


def test_a_pseudonym_is_the_documented_hmac() -> None:
    patient = hmac.new(KEY, b"patient\0MRN-7\0HOSPITAL", hashlib.sha256).hexdigest()[:32]
    assert privacy.pseudonym(KEY, "patient", "MRN-7\0HOSPITAL") == patient
    series = hmac.new(KEY, b"series\x001.2.3", hashlib.sha256).hexdigest()[:32]
    assert privacy.pseudonym(KEY, "series", "1.2.3") == series


@given(st.text(), st.text())
def test_kinds_keys_and_values_are_told_apart(a: str, b: str) -> None:
    one = privacy.pseudonym(KEY, "patient", a)
    assert len(one) == 32
    assert one != privacy.pseudonym(KEY, "series", a)
    assert one != privacy.pseudonym(KEY[::-1], "patient", a)
    assert (one == privacy.pseudonym(KEY, "patient", b)) == (a == b)


def test_a_key_file_needs_16_bytes(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"x" * 15)
    with pytest.raises(ValueError, match="15 bytes, at least 16"):
        privacy.read_key(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"x" * 16)
    assert privacy.read_key(tmp_path / "key") == b"x" * 16


def test_the_own_key_is_random_private_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    key = privacy.own_key(tmp_path / "a")
    assert len(key) == 32
    assert privacy.own_key(tmp_path / "a") == key
    assert privacy.own_key(tmp_path / "b") != key
    assert stat.S_IMODE((tmp_path / "a" / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name",
    [
        "STANDARD", "BONEPLUS", "B30f", "B70s", "Br38f\\3", "I70f\\3", "FC08", "FC51-H", "D", "YA", "SB", "SA36f",
        "CHST", "HD STANDARD", "HD LUNG", "BODY", "Smooth (B)", "Sharp (C)", "B_SHARP_B", "H_VSHARP_C",
    ],
)  # fmt: skip
def test_real_kernels_pass(name: str) -> None:
    assert privacy.kernel(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "ZZPHI", "Smith", "Sam42", "B30f Smith", "19420228", "MRN12345", "B30f\\Doe", "", "Doe^Jane", "LUNG\nX",
        "SAM36f", "SZ", "HD SMITH", "HD  STANDARD", "BODY SMITH", "Smooth (BOB)", "Smith (B)", "B_SMITH_B", "A_SHARP_B",
    ],
)  # fmt: skip
def test_no_other_text_passes_as_a_kernel(name: str) -> None:
    assert privacy.kernel(name) is None


@given(st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789^ .-", min_size=7, max_size=30))
def test_long_texts_pass_only_if_they_are_known_names(text: str) -> None:
    assert privacy.kernel(text) in (None, "STANDARD", "BONEPLUS", "HD STANDARD", "HD BONEPLUS")


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("GE MEDICAL SYSTEMS", "GE"), ("Siemens Healthineers", "SIEMENS"), ("Philips", "PHILIPS"), ("TOSHIBA", "CANON"),
        ("UIH", "UNITED_IMAGING"), ("Gerhard Mueller", None), ("ZZPHI", None), ("", None),
    ],
)  # fmt: skip
def test_a_manufacturer_is_one_of_the_known_vendors_or_nothing(text: str, vendor: str | None) -> None:
    assert privacy.manufacturer(text) == vendor


def test_numbers_pass_only_in_range() -> None:
    assert privacy.number_in_range(120.0, 1, 1000) == 120.0
    for value in (19420228.0, float("nan"), float("inf"), None):
        assert privacy.number_in_range(value, 1, 1000) is None


def test_patient_positions_are_defined_terms() -> None:
    assert privacy.patient_position("FFS") == "FFS"
    assert privacy.patient_position("ZZPHI") is None


@pytest.mark.parametrize("keyword", ["BitsAllocated", "BitsStored", "HighBit", "Rows", "Columns", "NumberOfFrames"])
def test_a_date_in_a_field_of_figures_is_not_repeated(tmp_path: Path, keyword: str) -> None:  # F44
    write_series(tmp_path, 3, change=lambda _, dataset: dataset.add_new(keyword, "LO", "19420228"))
    volumes, rows = read(tmp_path)
    assert not volumes
    assert [row.code for row in rows] in (["PIXEL_FORMAT_UNSUPPORTED"], ["SIZE_REFUSED"])
    assert "19420228" not in str(rows)
