"""What KEY.json keeps of the headers is what docs/format.md lists: these keys, from these attributes, and no others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dinox_io import dicom
from dinox_io.record import RESERVED_KEYS
from dinox_io.series import SeriesRules
from dinox_io.task import SeriesTask, pack_series
from tests.io.dicom_factory import slice_dataset, write, write_series
from tests.io.series_reading import PATIENT, SERIES, volume_of

LEAVES_NOTHING = {
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SamplesPerPixel", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "AcquisitionNumber", "TemporalPositionIdentifier",
    "StudyInstanceUID", "AcquisitionTime", "ContentTime",
}  # fmt: skip
"""Read to decide on a series or to decode its pixels; no value of theirs is kept."""


@pytest.fixture(scope="module")
def section(repository: Path) -> str:
    """The chapter on KEY.json."""
    text = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    return text.split("### KEY.json\n")[1].split("\n### ")[0]


def listed(table: str) -> set[str]:
    """Names in the first column of a table."""
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def records(folder: Path, **rules: Any) -> list[dict[str, Any]]:
    """KEY.json of each volume of the series in a folder, as a worker writes it."""
    task = SeriesTask(
        paths=tuple(map(str, sorted(folder.iterdir()))),
        size=0,
        series=SERIES,
        patient=PATIENT,
        patient_from="PatientID",
        identities=1,
        rules=SeriesRules(**rules),
        known={},
    )
    return [json.loads(volume.meta) for volume in pack_series(task).volumes]


def test_a_record_has_the_keys_of_the_tables(tmp_path: Path, section: str) -> None:
    members, facts = section.split("| fact |")
    assert listed(members) == RESERVED_KEYS
    write_series(tmp_path, 9)
    (whole,) = records(tmp_path)
    assert whole.keys() == RESERVED_KEYS | listed(facts) - {"split_at_gaps"}
    (tmp_path / "004.dcm").unlink()
    first, second = records(tmp_path, split_gaps=True)
    assert first.keys() == second.keys() == RESERVED_KEYS | listed(facts)
    assert (first["split_at_gaps"], second["split_at_gaps"]) == ({"run": 1, "runs": 2}, {"run": 2, "runs": 2})


def test_facts_marked_as_lists_are_those_that_may_differ_between_slices(tmp_path: Path, section: str) -> None:
    def change(index: int, dataset: Dataset) -> None:
        if index == 1:
            dataset.ConvolutionKernel, dataset.KVP, dataset.SliceThickness = "B31f", "100", "2"
            dataset.Manufacturer, dataset.PatientPosition = "Philips", "FFS"
            dataset.RescaleIntercept, dataset.PixelPaddingValue = "-1000", 0
            dataset.RescaleType = "US"
            dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "01"
            dataset.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path, 3, change=change)
    (record,) = records(tmp_path)
    marked = set(re.findall(r"^\| `(\w+)` \*", section, re.MULTILINE))
    lists = {name for name, value in record.items() if isinstance(value, list) and len(value) == 3}
    assert lists - RESERVED_KEYS == marked


def test_every_attribute_that_is_read_is_named_or_leaves_nothing(section: str) -> None:
    named = set(re.findall(r"`([A-Z]\w+[a-z]\w*|KVP)`", section))
    assert set(dicom._IMAGE) - named == LEAVES_NOTHING
    assert named - set(dicom._IMAGE) == {"TransferSyntaxUID"}


@pytest.mark.parametrize("padding", [19420228, -19420228])
def test_a_padding_value_that_no_ct_has_is_not_kept(tmp_path: Path, padding: int) -> None:
    write_series(tmp_path, 3, change=lambda _, dataset: dataset.add_new("PixelPaddingValue", "SL", padding))
    assert volume_of(tmp_path).facts["padding_stored"] is None


def test_a_tilt_that_no_gantry_has_is_not_kept(tmp_path: Path) -> None:
    dataset = slice_dataset(0)
    dataset.GantryDetectorTilt = "19420228"
    write(dataset, tmp_path / "one.dcm")
    assert volume_of(tmp_path, min_slices=1, allow_tilt=True).facts["tilt_degrees"] == 0
