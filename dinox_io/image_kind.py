"""What an image is by its header: a slice of Hounsfield units, or which other thing, by closed lists.

Invariant: what passes is a CT image whose words name nothing else and whose values are HU as far as anyone says.
"""

import re
from collections.abc import Sequence

from dinox_io.image import CT_IMAGES, Slice

_HU = frozenset({"HU", "HOUNSFIELD", "HOUNSFIELD UNIT", "HOUNSFIELD UNITS", "HOUNDSFIELD UNIT", "HOUNDSFIELD UNITS"})
"""RescaleType (PS3.3 C.11.1.1.2) of HU, and how GE spells it. HU_MOD is not: its values were modified."""
_UNSPECIFIED = "US"
_CAPTURES = ("1.2.840.10008.5.1.4.1.1.7.", "1.2.840.10008.5.1.4.1.1.88.", "1.2.840.10008.5.1.4.1.1.104.")
"""Secondary captures, reports, encapsulated documents; each class with its subclasses."""


def _words(words: str) -> re.Pattern[str]:
    """Finds any of the words (separated by |), whole; what is neither letter nor digit, `_` too, parts words."""
    return re.compile(rf"(?<![A-Z0-9])(?:{words})(?![A-Z0-9])")


# Defined terms of ImageType and FrameType (PS3.3 C.8.15.2, C.8.16.1, C.8.16.2), and words that vendors add behind them.
# AVERAGE, MEAN, MPR, REFORMATTED and monoenergetic images (MONO, VMI …) are in none: those values are HU.
_LOCALIZER = _words("LOCALIZER|SCOUT|TOPOGRAM|SCANOGRAM|SCANOSCOPE|SURVIEW")
_MAP = _words(
    "PERFUSION|PERMEABILITY|PARAMETRIC|R?CB[FV]|CBP|PBV|MTT|TT[PD]|TMAX|"
    "IODINE|WATER|CALCIUM|URIC|MAT|MATERIAL|Z_?EFF|EFF(?:ECTIVE)?_ATOMIC_NUM(?:BER)?|ELECTRON_DENSITY"
)
_PROJECTION = _words(
    "MIP|MIN_?IP|MAXIMUM|MINIMUM|SUBTRACTION|DIVISION|MULTIPLICATION|STD_DEVIATION|FUSED|FUSION|VRT|SSD|3D"
)


def other_kind(piece: Slice) -> str | None:
    """The code (rules.py) by which an image is no CT slice, or None."""
    image = piece.file
    words = "\\".join(piece.image_type)
    if image.modality != "CT":
        return "NO_MODALITY" if not image.modality and image.sop_class in CT_IMAGES else "NOT_CT"
    if _LOCALIZER.search(words):
        return "LOCALIZER"
    colour = image.samples != 1 or image.photometric.startswith("PALETTE") or "SCREEN SAVE" in piece.image_type
    if (image.sop_class + ".").startswith(_CAPTURES) or colour:
        return "SECONDARY_CAPTURE"
    if _MAP.search(words):
        return "PARAMETRIC_MAP"
    if _PROJECTION.search(words):
        return "PROJECTION"
    if piece.rescale_type not in {"", _UNSPECIFIED, *_HU}:
        return "NOT_HU"
    return "NO_PIXELS" if image.pixel_offset is None else None


def rescale_unit(piece: Slice) -> str | None:
    """What RescaleType says of an accepted slice: "HU", "unspecified" (the term US), or None where it is absent."""
    return {"": None, _UNSPECIFIED: "unspecified"}.get(piece.rescale_type, "HU")


def reconstruction(image_type: Sequence[str]) -> tuple[str, ...]:
    """The values of ImageType that tell reconstructions apart: not ORIGINAL or DERIVED, PRIMARY or SECONDARY."""
    return tuple(image_type[2:])
