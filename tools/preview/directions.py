"""Where right and left, front and back of the patient are in a picture: from the direction cosines of a volume.

Invariant: a letter is shown only where the axis of the picture lies near an axis of the patient, never by assumption.
DICOM PS3.3 C.7.6.2.1.1: x grows towards the left hand, y towards the back, z towards the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NEAR = 0.9
"""Cosine of the largest angle (26 degrees) between an axis of a picture and that of the patient."""
_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))
_SMALLEST, _SIZE = 60, 12


@dataclass(frozen=True)
class Marks:
    """Letters at the edges of a picture; empty: none."""

    left: str = ""
    right: str = ""
    top: str = ""
    bottom: str = ""


@dataclass(frozen=True)
class Directions:
    """Marks of the three kinds of pictures of a volume."""

    axial: Marks
    coronal: Marks
    sagittal: Marks


def directions(orientation: Sequence[float], facts: dict[str, object]) -> Directions:
    """Marks by the 9 direction cosines (x, y, normal); none if it is not axial or the cosines are assumed.

    The reformats are drawn with the last slice on top.
    """
    axes = np.array(orientation, float).reshape(3, 3)
    if facts.get("geometry") == "assumed" or (np.abs(axes.diagonal()) < NEAR).any():
        return Directions(Marks(), Marks(), Marks())
    (left, right), (top, bottom), (feet, head) = (
        ends if axes[axis, axis] > 0 else ends[::-1] for axis, ends in enumerate(_LETTERS)
    )
    return Directions(Marks(left, right, top, bottom), Marks(left, right, head, feet), Marks(top, bottom, head, feet))


def marked(pixels: np.ndarray, marks: Marks) -> np.ndarray:
    """A copy of a picture, uint8 (rows, columns), with its letters; as it is where it is too small for them."""
    rows, columns = pixels.shape
    image = Image.fromarray(np.ascontiguousarray(pixels))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_SIZE)
    places = []
    if rows >= _SMALLEST // 2 and columns >= _SMALLEST:
        places += [(marks.left, (3, rows // 2), "lm"), (marks.right, (columns - 4, rows // 2), "rm")]
    if rows >= _SMALLEST and columns >= _SMALLEST:
        places += [(marks.top, (columns // 2, 3), "mt"), (marks.bottom, (columns // 2, rows - 4), "mb")]
    for letter, place, anchor in places:
        draw.text(place, letter, fill=255, font=font, anchor=anchor, stroke_width=1, stroke_fill=0)
    return np.asarray(image)
