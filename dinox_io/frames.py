"""The frames of one DICOM file as slices: each fact from the functional group macro, or the data set, that has it.

Invariant: a frame's own macro comes before the shared one, and both before the data set (DICOM PS3.3 C.7.6.16).
"""

from typing import Any

from dinox_io import attributes
from dinox_io.fileformat import NotDicom
from dinox_io.image import ImageFile, Slice

_ORIGIN = (
    ("FrameAcquisitionNumber", "AcquisitionNumber"), ("TemporalPositionIdentifier",), ("StudyInstanceUID",),
    ("FrameAcquisitionDateTime", "AcquisitionTime"), ("ContentTime",),
)  # fmt: skip
"""Keywords of Slice.origin, each with what multi-frame files have instead."""


def read_frames(image: ImageFile, dataset: Any) -> list[Slice]:
    """The slices of a file; `dataset` is anything with `get(keyword)`.

    Raises NotDicom if its functional groups are not those of its frames.
    """
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if per_frame and len(per_frame) != image.frames:
        raise NotDicom("DICOM_DAMAGED")
    # Without functional groups all frames have the file's own attributes: one position, refused later as such.
    groups = per_frame or [{}] * image.frames
    return [_slice(image, number, [*_macros(own), *_macros(shared), dataset]) for number, own in enumerate(groups)]


_MACROS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence", "CTReconstructionSequence", "CTXRayDetailsSequence", "CTAcquisitionDetailsSequence",
    "UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence",
    "FrameContentSequence",
)  # fmt: skip


def _macros(group: Any) -> list[Any]:
    """The items of the functional group macros (DICOM PS3.3 C.7.6.16) in which a slice's facts may lie."""
    return [item for name in _MACROS if len(item := _first(group, name))]


def _first(dataset: Any, keyword: str) -> Any:
    items = dataset.get(keyword)
    return items[0] if items else {}


def _slice(image: ImageFile, frame: int, places: list[Any]) -> Slice:
    def numbers(keyword: str, count: int) -> Any:
        return next((found for place in places if (found := attributes.numbers(place, keyword, count))), None)

    def number(keyword: str) -> float | None:
        found = numbers(keyword, 1)
        return found[0] if found else None

    def text(*keywords: str) -> str:
        return next((found for place in places for name in keywords if (found := attributes.text(place, name))), "")

    return Slice(
        file=image,
        frame=frame,
        stack=(text("StackID"), text("TemporalPositionIndex")),
        origin=tuple(text(*keywords) for keywords in _ORIGIN),
        image_type=tuple(part.strip().upper() for part in text("FrameType", "ImageType").split("\\")),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        pixel_spacing=numbers("PixelSpacing", 2),
        slope=number("RescaleSlope"),
        intercept=number("RescaleIntercept"),
        rescale_type=text("RescaleType").upper(),
        thickness=number("SliceThickness"),
        spacing_between=number("SpacingBetweenSlices"),
        tilt=number("GantryDetectorTilt"),
        kernel=text("ConvolutionKernel"),
        kvp=number("KVP"),
    )
