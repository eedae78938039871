"""The light header reader gives what pydicom gives, or leaves the file to it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian

from dinox_io import dicom, elements
from dinox_io.elements import Unusual
from dinox_io.fileformat import NotDicom
from dinox_io.rules import Refused
from tests.io.dicom_factory import slice_dataset, write, write_series

READERS: tuple[Callable[[Path], Any], ...] = (dicom.read_identity, dicom.read_slices)
CHANGES: dict[str, list[Any]] = {
    "PatientID": ["P1", " P 7 ", "", "A\\B", "Müller", "x" * 64],
    "IssuerOfPatientID": ["", "HOSP "],
    "SpecificCharacterSet": [None, "ISO_IR 100", "ISO_IR 192", "ISO_IR 13"],
    "ConvolutionKernel": ["B30f", ["Br38f", "3"], "STANDARD ", None, ""],
    "Manufacturer": ["SIEMENS", "GE MEDICAL SYSTEMS ", "Dräger", None],
    "ImageType": [["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED"], None],
    "NumberOfFrames": [None, 1],
    "BurnedInAnnotation": [None, "NO", "YES"],
    "RescaleIntercept": ["-1024", " -1024.50", "1e3", None, ""],
    "ImagePositionPatient": [["-10", "-20.25", "3.000000000000049"[:16]], None],
    "GantryDetectorTilt": [None, "-20 ", "0"],
    "RescaleType": ["HU", None],
}
SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def pydicom_only() -> Iterator[None]:
    def never(*_: Any, **__: Any) -> None:
        raise Unusual

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "read_header", never)
        yield


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except (NotDicom, Refused) as answer:
        return answer.code


def is_read(path: Path) -> bool:
    """Whether the light reader takes a whole header."""
    with path.open("rb") as file:
        try:
            elements.read_header(file, file.read(elements.HEAD_BYTES), dicom._IMAGE_TAGS)
        except Unusual:
            return False
    return True


def sequence(rng: random.Random, depth: int = 2) -> Sequence:
    items = []
    for _ in range(rng.randrange(3)):
        item = Dataset()
        item.ReferencedSOPInstanceUID = "1.2.3"
        item.PatientID = "another"
        if depth and rng.randrange(2):
            item.PurposeOfReferenceCodeSequence = sequence(rng, depth - 1)
            item["PurposeOfReferenceCodeSequence"].is_undefined_length = bool(rng.randrange(2))
        item.is_undefined_length_sequence_item = bool(rng.randrange(2))
        items.append(item)
    return Sequence(items)


def random_dataset(seed: int) -> Dataset:
    """A slice with anything changed that the two readers could see differently."""
    rng = random.Random(seed)
    dataset = slice_dataset(rng.randrange(5))
    for keyword in rng.sample(sorted(CHANGES), 4):
        value = rng.choice(CHANGES[keyword])
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)
    if "ü" in str(dataset.get("PatientID")) or "ä" in str(dataset.get("Manufacturer")):
        dataset.SpecificCharacterSet = rng.choice(["ISO_IR 100", "ISO_IR 192"])
    for keyword in rng.sample(["ReferencedImageSequence", "SourceImageSequence", "RequestAttributesSequence"], 2):
        setattr(dataset, keyword, sequence(rng))
        dataset[keyword].is_undefined_length = bool(rng.randrange(2))
    if rng.randrange(2):
        dataset.add_new(0x00280120, rng.choice(["US", "SS"]), rng.choice([0, 2000, 32767]))
        dataset.PixelRepresentation = rng.randrange(2)
    if rng.randrange(2):
        dataset.private_block(0x0019, "SOME VENDOR", create=True).add_new(1, "OB", bytes(rng.choice([10, 9000, 70000])))
    if rng.randrange(3) == 0:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


@SETTINGS
@given(seed=st.integers(0, 1 << 40))
def test_it_reads_what_pydicom_reads(tmp_path: Path, seed: int) -> None:
    path = write(random_dataset(seed), tmp_path / "one.dcm")
    light = [outcome(read, path) for read in READERS]
    with pydicom_only():
        assert light == [outcome(read, path) for read in READERS]


def test_ordinary_files_are_not_left_to_pydicom(tmp_path: Path) -> None:
    assert all(is_read(path) for path in write_series(tmp_path, 2))
    taken = [is_read(write(random_dataset(seed), tmp_path / "one.dcm")) for seed in range(40)]
    assert sum(taken) > 30


def test_real_files_read_the_same(shared_data: Path) -> None:
    folders = [shared_data, *(path for path in shared_data.rglob("*") if path.is_dir())]
    paths = [path for folder in folders for path in sorted(folder.iterdir())[:2] if path.is_file()]
    light = [[outcome(read, path) for read in READERS] for path in paths]
    with pydicom_only():
        for path, found in zip(paths, light, strict=True):
            # Compared as text: not a number is not equal to itself.
            assert repr(found) == repr([outcome(read, path) for read in READERS]), path


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_never_read_more_boldly(tmp_path: Path, seed: int) -> None:
    """What pydicom refuses may only be an identity when the damage lies behind it: the series is refused later."""
    rng = random.Random(seed)
    data = write(random_dataset(seed), tmp_path / "one.dcm").read_bytes()
    end = data.index(b"\xe0\x7f\x10\x00") + 12
    path = tmp_path / "damaged.dcm"
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(132, end)] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice([len(data), rng.randrange(len(data))])])
        light = outcome(dicom.read_slices, path)
        with pydicom_only():
            assert repr(light) == repr(outcome(dicom.read_slices, path))


@pytest.mark.parametrize("depth", [4, 5000])
def test_deep_sequences_are_left_to_pydicom(tmp_path: Path, depth: int) -> None:
    path = write_series(tmp_path, 1)[0]
    data = path.read_bytes()
    opened = b"\x08\x00\x32\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    at = data.index(b"\x10\x00\x10\x00PN")  # PatientName
    path.write_bytes(data[:at] + opened * depth + closed * depth + data[at:])
    assert is_read(path) == (depth < elements._DEPTH_MAX)
