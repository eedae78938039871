"""Every verdict that packing can pass on a series or a file: its stable code, its kind, its reason and its hint.

Invariant: codes never change their meaning, and a reason is a template filled with figures only, never with text that
came out of a file: all of it may be printed and handed to anyone.
"""

from dataclasses import dataclass
from typing import Literal

from dinox_io.volume import Rejection

Kind = Literal["rejected", "skipped", "note", "foreign"]
"""rejected: data that was wanted and cannot be trusted; skipped: by rule no CT volume; note: packed, but not whole;
foreign: files that belong to no series."""


@dataclass(frozen=True)
class Rule:
    """One verdict. `reason` is a format string over the figures given to `verdict`."""

    kind: Kind
    reason: str
    hint: str


_FIX_EXPORT = "export the series again from the source, with its original headers"
_LOOK = "private/sources.jsonl lists the files of this series"

RULES: dict[str, Rule] = {
    # Files of no series
    "NOT_DICOM": Rule(
        "foreign", "not DICOM images", "nothing to do if these are no scans; private/sources.jsonl names them"
    ),
    "DICOMDIR": Rule(
        "foreign", "DICOMDIR indexes, not images", "nothing to do: the images they list are found by themselves"
    ),
    "FILE_UNREADABLE": Rule(
        "rejected",
        "could not be opened or read",
        "it may be missing, or a link whose target is gone; else check permissions and the disk; "
        "private/sources.jsonl names the files",
    ),
    "DICOM_DAMAGED": Rule(
        "rejected",
        "begin like DICOM, but their header is damaged",
        "copy them again from the source; private/sources.jsonl names the files",
    ),
    "ARCHIVE_DAMAGED": Rule(
        "rejected",
        "zip archives, or files in them, whose directory, sizes or checksums are wrong",
        "download or copy the archive again; private/sources.jsonl names it",
    ),
    "ARCHIVE_ENCRYPTED": Rule(
        "rejected", "encrypted files in zip archives", "unpack the archive with its password, and pack the folder"
    ),
    "ARCHIVE_UNSUPPORTED": Rule(
        "rejected",
        "archives that are not opened: other than zip, packed otherwise than by deflate, or inside another archive",
        "unpack them first, if there are scans in them; private/sources.jsonl names them",
    ),
    "NIFTI_PAIR": Rule(
        "rejected",
        "NIfTI pairs (.hdr with .img), which are not read",
        "convert them to single .nii.gz files; private/sources.jsonl names them",
    ),
    # Series that are no CT volume, by rule
    "NOT_CT": Rule("skipped", "modality is not CT", "nothing to do: only CT has Hounsfield units"),
    "LOCALIZER": Rule("skipped", "a localizer (scout), not a volume", "nothing to do"),
    "SECONDARY_CAPTURE": Rule("skipped", "a secondary capture or colour picture, not HU", "nothing to do"),
    "PARAMETRIC_MAP": Rule("skipped", "a perfusion, material or other parametric map, not HU", "nothing to do"),
    "PROJECTION": Rule(
        "skipped",
        "a projection, fusion, subtraction or rendering of other images (MIP, 3D …), not measured slices",
        "pack the axial series that it was made from",
    ),
    "NOT_HU": Rule(
        "skipped",
        "values are no Hounsfield units: the rescale type says so, or in a NIfTI file none is as low as fat and air",
        "nothing to do for masks and other modalities; a CT that was shifted or rescaled needs its HU back",
    ),
    "NOT_AXIAL": Rule(
        "skipped",
        "slice normal is {degrees:.1f} degrees from the patient's z axis (30 at most): a reformat",
        "pack the axial series that it was made from",
    ),
    "WITHDRAWN": Rule("skipped", "of patients or series that were removed from this set", "nothing to do"),
    "NO_PIXELS": Rule("skipped", "no pixel data: not an image", "nothing to do"),
    # Series that were wanted and cannot be trusted
    "NO_MODALITY": Rule("rejected", "CT images by their SOP class, but without a Modality", _FIX_EXPORT),
    "MIXED_PATIENTS": Rule(
        "rejected", "{count} patient identities under one SeriesInstanceUID", "separate the patients; " + _FIX_EXPORT
    ),
    "MIXED_SERIES": Rule(
        "rejected", "CT slices mixed with {count} images of another kind (captures, maps, …)", _FIX_EXPORT
    ),
    "MIXED_STACKS": Rule(
        "rejected",
        "frames of {count} stacks or points of time in one series: put together they would interleave",
        "separate them into series of their own",
    ),
    "MIXED_MATRIX": Rule(
        "rejected",
        "slices of {count} different matrix sizes, the commonest {rows}x{columns}",
        "separate the images; " + _LOOK,
    ),
    "MIXED_ORIENTATION": Rule("rejected", "slices of different orientation", "separate the images; " + _LOOK),
    "MIXED_SPACING": Rule("rejected", "slices of different pixel spacing", "separate the images; " + _LOOK),
    "BAD_ORIENTATION": Rule("rejected", "row and column directions are not orthogonal unit vectors", _FIX_EXPORT),
    "NO_POSITION": Rule(
        "rejected",
        "no usable ImagePositionPatient or ImageOrientationPatient in {count} slices: order would be a guess",
        _FIX_EXPORT,
    ),
    "NO_PIXEL_SPACING": Rule(
        "rejected",
        "no usable PixelSpacing in {count} slices",
        _FIX_EXPORT + "; for pictures, import_png.py --spacing Z,Y,X gives it",
    ),
    "NO_RESCALE": Rule(
        "rejected", "no usable RescaleSlope and RescaleIntercept in {count} slices: HU cannot be known", _FIX_EXPORT
    ),
    "DUPLICATE_POSITION": Rule(
        "rejected",
        "positions with several different images: {count}, the first at {z_mm:.3f} mm: mixed acquisitions",
        "separate the phases (for example by AcquisitionNumber) into series of their own",
    ),
    "INTERLEAVED": Rule(
        "rejected",
        "slices of {count} acquisitions or reconstructions lie between each other",
        "separate them (for example by AcquisitionNumber, time, kernel or kV) into series of their own",
    ),
    "GANTRY_TILT": Rule(
        "rejected",
        "tilted by {degrees:.1f} degrees: the volume is sheared",
        "--allow-tilt keeps it as it is, with the tilt recorded",
    ),
    "SHIFTED_SLICES": Rule(
        "rejected",
        "slices are shifted in their plane by up to {shift_mm:.2f} mm",
        "separate the reconstructions; " + _LOOK,
    ),
    "SLICE_GAP": Rule(
        "rejected",
        "gaps: {count}, the first after {z_mm:.3f} mm: {step_mm:.3f} where slices are {usual_mm:.3f} mm apart",
        "fetch the missing slices, or --split-gaps keeps the contiguous runs as separate volumes",
    ),
    "VARIABLE_SPACING": Rule(
        "rejected",
        "steps between slices vary from {low_mm:.3f} to {high_mm:.3f} mm",
        "--split-gaps keeps the runs of equal steps as separate volumes",
    ),
    "TOO_FEW_SLICES": Rule(
        "rejected", "slices: {count}, fewer than the {minimum} asked for", "--min-slices lowers the limit"
    ),
    "BURNED_IN_ANNOTATION": Rule(
        "rejected",
        "BurnedInAnnotation is YES: pixels may show a name",
        "look at the images; --allow-burned-in keeps them",
    ),
    "PIXELS_TRUNCATED": Rule(
        "rejected",
        "pixels of {place} end early: {found} of {expected} bytes",
        "copy it again; " + _LOOK,
    ),
    "PIXELS_TOO_LONG": Rule(
        "rejected",
        "{place} has {found} bytes of pixels where its header says {expected}",
        _FIX_EXPORT + "; " + _LOOK,
    ),
    "PIXELS_DAMAGED": Rule("rejected", "pixels of {place} ({syntax}) cannot be decoded", "copy it again; " + _LOOK),
    "SIZE_REFUSED": Rule(
        "rejected",
        "sizes in the header are impossible for a CT image ({rows} rows, {columns} columns, {frames} frames)",
        _LOOK,
    ),
    "PIXEL_FORMAT_UNSUPPORTED": Rule(
        "rejected", "{allocated} bits allocated, {stored} stored, high bit {high}: not a CT pixel format", _FIX_EXPORT
    ),
    "FLOAT_PIXELS": Rule(
        "rejected",
        "pixels are real numbers (FloatPixelData or DoubleFloatPixelData), which a CT image cannot have",
        "convert them to PixelData of 16 bits with RescaleSlope and RescaleIntercept",
    ),
    "DECODER_MISSING": Rule(
        "rejected",
        "compressed as {syntax}, and no decoder for it is installed",
        "install the extra: pip install 'dinox[dicom]'",
    ),
    "SYNTAX_UNSUPPORTED": Rule(
        "rejected",
        "stored as {syntax}, which dinox[dicom] cannot decode",
        "convert the files to Explicit VR Little Endian (gdcmconv --raw, or dcmdjpeg)",
    ),
    "PNG_DAMAGED": Rule("rejected", "the picture of {place} is no whole PNG file", "write or copy it again; " + _LOOK),
    "PNG_NOT_GRAY16": Rule(
        "rejected",
        "the picture of {place} has {bits} bits a sample, PNG colour type {colour}: HU need 16 bits, gray (0)",
        "pack the source itself with pack_shards.py: a windowed or coloured picture has no HU left",
    ),
    "WRONG_ENCODING": Rule(
        "rejected",
        "read as {encoding}, its values go from {low_hu:.1f} to {high_hu:.1f} HU: that encoding does not write them",
        "import these series with the other --encoding, from an index table of their own",
    ),
    "INDEX_CONFLICT": Rule(
        "rejected",
        "pictures that the index table lists under another slice number or series too: {count}",
        "mend the index table: each file is one slice of one series",
    ),
    "NIFTI_DAMAGED": Rule("rejected", "its NIfTI header is damaged", "convert or copy it again; " + _LOOK),
    "NIFTI_VOLUMES": Rule(
        "rejected",
        "a NIfTI file of {count} volumes: which of them is the CT cannot be known",
        "split it into files of one volume each",
    ),
    "NIFTI_UNITS": Rule(
        "rejected", "its NIfTI header gives lengths in other units than mm", "write it again with lengths in mm"
    ),
    "NIFTI_TYPE": Rule(
        "rejected",
        "NIfTI values of data type {number}: not integers of at most 32 bits or real numbers of at most 64",
        "convert it to int16",
    ),
    "VALUES_NOT_FINITE": Rule(
        "rejected",
        "voxels that are no numbers (NaN or infinite): {count}",
        "convert it to int16, with a value for them",
    ),
    "NIFTI_READER_MISSING": Rule(
        "rejected", "a NIfTI file, and nibabel is not installed", "install the extra: pip install 'dinox[nifti]'"
    ),
    "SERIES_CHANGED": Rule(
        "rejected",
        "already in the set, and no longer what it was: {change}; the set keeps what it had",
        "give the options that it was packed with; or pack the new files to another folder, with the same key",
    ),
    "FILES_DAMAGED": Rule(
        "rejected", "files of the series with a damaged header: {count}", "copy them again; " + _LOOK
    ),
    "WORKER_CRASHED": Rule(
        "rejected", "a decoder crashed on it, twice", "a damaged file, or a bug of the decoder: " + _LOOK
    ),
    "WORKER_MEMORY": Rule(
        "rejected", "needs more memory than a worker may use", "fewer --workers, or a machine with more memory"
    ),
    "WORKER_TIMEOUT": Rule("rejected", "took longer than {seconds:.0f} s", "check the disk; " + _LOOK),
    "INTERNAL_ERROR": Rule(
        "rejected", "reading it failed inside dinox ({error})", "a bug of dinox: report it with this line"
    ),
    # Packed, but not whole
    "LOCALIZER_DROPPED": Rule("note", "localizer images inside the series were left out", "nothing to do"),
    "DUPLICATE_DROPPED": Rule("note", "copies with the same position and pixels were left out", "nothing to do"),
    "SPLIT_AT_GAPS": Rule(
        "note",
        "split into {count} volumes at its gaps; {dropped} slices in runs shorter than {minimum} were left out",
        "fetch the missing slices, if there are any",
    ),
}


class Refused(Exception):
    """A series is refused: its code and the figures of its reason."""

    def __init__(self, code: str, **figures: float | int | str) -> None:
        super().__init__(code)
        self.code = code
        self.figures = figures


def verdict(code: str, *, series: str | None, files: int, **figures: float | int | str) -> Rejection:
    """The row of `rejected.jsonl` for a code; `series` is a pseudonym. KeyError: unknown code or missing figure."""
    rule = RULES[code]
    return Rejection(code=code, reason=rule.reason.format(**figures), series=series, files=files, hint=rule.hint)
