"""Random CT scans, written as DICOM in any encoding, and their HU by another way than the packer's.

Invariant: truth is made before any file is written. HU are stored * slope + intercept in exact fractions, in the order
of the heights that the scan was made with; nothing of dinox_io is used. What is random comes from the seed alone.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.io.dicom_factory import slice_dataset, write

SYNTAXES = (
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
)  # fmt: skip

Change = Callable[[int, Dataset], None]


@dataclass(frozen=True)
class PixelFormat:
    """How stored values lie in words (PS3.5 section 8): bits allocated and stored, sign, and empty bits below them."""

    allocated: int
    stored: int
    signed: bool
    below: int = 0


FORMATS = {
    "u8": PixelFormat(8, 8, False),
    "u10 at the top of 16": PixelFormat(16, 10, False, below=6),
    "u12": PixelFormat(16, 12, False),
    "s12": PixelFormat(16, 12, True),
    "s13 from bit 1": PixelFormat(16, 13, True, below=1),
    "u16": PixelFormat(16, 16, False),
    "s16": PixelFormat(16, 16, True),
    "u32": PixelFormat(32, 32, False),
    "s20 in 32": PixelFormat(32, 20, True),
}
ORIENTATIONS = {
    "supine": (1, 0, 0, 0, 1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "decubitus": (0, 1, 0, -1, 0, 0),
    "rows bottom to top": (1, 0, 0, 0, -1, 0),
    "turned by 36.87 degrees": (0.8, 0.6, 0, -0.6, 0.8, 0),
    "nodding by 10.2 degrees": (1, 0, 0, 0, 0.984251, 0.176777),
}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A series before anything goes wrong with it: stored values (z, y, x), z ascending along the normal."""

    random: np.random.Generator
    uid: str
    patient: str
    syntax: str
    format: PixelFormat
    stored: np.ndarray
    slope: str
    intercept: str
    step_mm: float
    spacing_mm: tuple[float, float]
    origin_mm: tuple[float, float, float]
    orientation: tuple[float, ...]
    vendor: str

    @property
    def count(self) -> int:
        """Its number of slices."""
        return len(self.stored)

    @property
    def hu(self) -> np.ndarray:
        """int16 (z, y, x), slowly and exactly: to nearest, ties to even, saturated."""
        return hounsfield(self.stored, self.slope, self.intercept)

    def position(self, height_mm: float) -> list[str]:
        """ImagePositionPatient of a slice this far above the origin."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        normal = normal * (1 if normal[2] >= 0 else -1)
        return [f"{start + height_mm * part:.6f}" for start, part in zip(self.origin_mm, normal, strict=True)]

    def dataset(self, index: int, stored: np.ndarray | None = None) -> Dataset:
        """Slice `index` as a scanner writes it; `stored`: other pixels than its own."""
        dataset = slice_dataset(index, series=self.uid, patient=self.patient)
        dataset.SOPInstanceUID, dataset.StudyInstanceUID = f"{self.uid}.{index + 1}", f"{self.uid}.0"
        dataset.Manufacturer = self.vendor
        dataset.ImagePositionPatient = self.position(index * self.step_mm)
        dataset.ImageOrientationPatient = [f"{value:.6f}" for value in self.orientation]
        dataset.PixelSpacing = [f"{value:.6g}" for value in self.spacing_mm]
        dataset.RescaleSlope, dataset.RescaleIntercept = self.slope, self.intercept
        encode(dataset, self.stored[index] if stored is None else stored, self.format, self.syntax)
        return dataset

    def write(self, folder: Path, change: Change | None = None, *, slices: Iterable[int] | None = None) -> list[Path]:
        """Write slices under random names, in which nothing of their order is left; paths in the order of slices."""
        paths = []
        with config.disable_value_validation():  # what DICOM forbids is what scanners write
            for index in range(self.count) if slices is None else slices:
                dataset = self.dataset(index)
                if change is not None:
                    change(index, dataset)
                paths.append(write(dataset, folder / f"I{self.random.integers(10**9):09d}"))
        return paths

    def other_pixels(self) -> np.ndarray:
        """Another picture of the same size, (y, x)."""
        low, high = stored_range(self.format)
        return self.random.integers(low, high, self.stored.shape[1:])


def stored_range(form: PixelFormat) -> tuple[int, int]:
    """Values from, and below; of wide formats what stays within int16 as HU."""
    top = 1 << (form.stored - form.signed)
    return (-min(top, 2000) if form.signed else 0), min(top, 30000)


def make_scan(seed: str, syntax: str, form: PixelFormat | None = None) -> Scan:
    """A random scan: odd and even matrices, no square ones, any way of lying, any vendor, overlap or not."""
    number = zlib.crc32(f"{seed} {syntax}".encode())
    random = np.random.default_rng(number)
    form = form or list(FORMATS.values())[random.integers(len(FORMATS))]
    rows = int(random.integers(9, 30))
    columns = rows + int(random.integers(1, 12)) * int(random.choice([-1, 1]))
    low, high = stored_range(form)
    return Scan(
        random=random,
        uid=f"1.2.826.{number}",
        patient=f"MRN {number}",
        syntax=syntax,
        format=form,
        stored=random.integers(low, high, (int(random.integers(7, 11)), rows, max(columns, 1))),
        slope=str(random.choice(["1", "1.000000", "1e0", "+1", " 1 "])),
        intercept=str(random.integers(-1100, 100)),
        step_mm=float(random.choice([0.3, 0.625, 1, 1.25, 2.5, 5])),
        spacing_mm=(round(float(random.uniform(0.3, 1)), 6), round(float(random.uniform(0.3, 1)), 6)),
        origin_mm=(float(random.integers(-300, 0)), -200.5, float(random.integers(-1500, 1500))),
        orientation=list(ORIENTATIONS.values())[random.integers(len(ORIENTATIONS))],
        vendor=str(random.choice(["GE MEDICAL SYSTEMS", "SIEMENS", "Philips", "TOSHIBA", "an unknown one"])),
    )


def hounsfield(stored: np.ndarray, slope: str, intercept: str) -> np.ndarray:
    """int16 HU of stored values as quotients of integers: no float is involved."""
    times, plus = Fraction(slope.strip()), Fraction(intercept.strip())
    below = times.denominator * plus.denominator
    a, b = times.numerator * plus.denominator, plus.numerator * times.denominator
    values, where = np.unique(stored, return_inverse=True)
    exact = [nearest(a * value + b, below) for value in values.tolist()]
    return np.array([min(max(value, -32768), 32767) for value in exact], np.int16)[where].reshape(stored.shape)


def nearest(above: int, below: int) -> int:
    """The integer nearest to a fraction; of two, the even one."""
    whole, rest = divmod(above, below)
    return whole + (2 * rest > below or (2 * rest == below and whole % 2))


def encode(
    dataset: Dataset, stored: np.ndarray, form: PixelFormat, syntax: str, *, above: int = 0, surplus: int = 0
) -> None:
    """Give a data set these pixels, (y, x) or (frames, y, x). `above`: bits set beyond those stored; surplus bytes."""
    words = (stored.astype(np.int64) << form.below | above) & ((1 << form.allocated) - 1)
    size = form.allocated // 8
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = (
        form.allocated,
        form.stored,
        form.stored - 1 + form.below,
    )
    dataset.PixelRepresentation = int(form.signed)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    if syntax == RLELossless:
        frames = words.reshape(-1, *stored.shape[-2:])
        dataset.PixelData = encapsulate([rle_frame(frame.astype(f">u{size}")) for frame in frames])
        dataset["PixelData"].VR = "OB"
        return
    raw = words.astype(f"{'>' if syntax == ExplicitVRBigEndian else '<'}u{size}").tobytes() + bytes(surplus)
    dataset.PixelData = raw + bytes(len(raw) % 2)
    dataset["PixelData"].VR = "OB" if size == 1 else "OW"


def rle_frame(words: np.ndarray) -> bytes:
    """PS3.5 annex G: one segment a byte of the word, the highest first; runs of the same byte are not looked for."""
    planes = words.view(np.uint8).reshape(words.size, -1).T
    segments = []
    for plane in planes:
        data = plane.tobytes()
        chunks = [data[start : start + 128] for start in range(0, len(data), 128)]
        packed = b"".join(bytes([len(chunk) - 1]) + chunk for chunk in chunks)
        segments.append(packed + bytes(len(packed) % 2))
    offsets = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    header = np.zeros(16, "<u4")
    header[: 1 + len(offsets)] = [len(segments), *offsets]
    return header.tobytes() + b"".join(segments)


def first_slices(scan: Scan, count: int) -> Scan:
    """The lowest slices of a scan, as a scan."""
    return replace(scan, stored=scan.stored[:count])


def with_format(scan: Scan, form: PixelFormat) -> Scan:
    """The scan with new pixels in another format."""
    return replace(scan, format=form, stored=scan.random.integers(*stored_range(form), scan.stored.shape))
