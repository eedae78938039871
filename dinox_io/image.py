"""What is kept of a source file's header while it is packed: whose it is, its image, its slices.

Invariant: plain values only. Texts that could identify a patient are held only in `Identity`, for pseudonyms and
OUT/private, and in `Slice.origin`, which is compared and never written.
"""

from dataclasses import dataclass

from dinox_io.attributes import Numbers

CT_IMAGES = frozenset({f"1.2.840.10008.5.1.4.1.1.2{part}" for part in ("", ".1", ".2")})
"""SOP classes of CT images: single-frame, Enhanced, Legacy Converted Enhanced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who and what a file belongs to. Never leaves the packer but into OUT/private."""

    patient_id: str
    issuer: str
    study_uid: str
    series_uid: str
    likeness: str = ""
    """Orientation, matrix and kernel: groups files that name no series; "" if they do."""
    is_ct: bool = True
    """Whether its modality is CT, or absent from a CT image: a series of which no file is need not be opened again."""
    format: str = "dicom"
    """A reader of formats.py."""
    patient_from: str = "PatientID"
    """What `patient_id` was made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """Facts that all frames of one file share, and where its pixels lie."""

    path: str
    syntax: str
    sop_class: str
    sop_uid: str
    modality: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: int | None
    burned_in: str
    lossy: str
    manufacturer: str
    patient_position: str
    pixel_offset: int | None
    """Where the pixel data element begins (in the inflated file, if it is deflated); None: there is none."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one native frame."""
        return self.rows * self.columns * self.bits_allocated // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One frame: the facts by which slices of a series may differ. None: absent or unusable. mm, degrees, kV."""

    file: ImageFile
    frame: int
    stack: tuple[str, str]
    """StackID and TemporalPositionIndex of a multi-frame file (PS3.3 C.7.6.16.2.2), "" elsewhere."""
    origin: tuple[str, ...]
    """Texts that acquisitions and studies differ in: acquisition number, temporal position, study, times."""
    image_type: tuple[str, ...]
    position: tuple[float, float, float] | None
    orientation: Numbers | None
    pixel_spacing: tuple[float, float] | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    thickness: float | None
    spacing_between: float | None
    tilt: float | None
    kernel: str
    kvp: float | None
