"""RLE Lossless frames (DICOM PS3.5 annex G), decoded strictly.

Invariant: a frame comes out whole, with every bit of its words as written, or ValueError is raised; nothing longer than
the frame is ever decoded, whatever the data say. (A lenient decoder cuts what is too long, and so makes up a picture.)
"""

from itertools import pairwise

import numpy as np

_HEADER_BYTES = 64


def decode_frame(data: bytes, words: int, word_bytes: int) -> np.ndarray:
    """`words` unsigned integers of `word_bytes` bytes (1, 2 or 4) from an encoded frame; ValueError if damaged."""
    header = np.frombuffer(data[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), "<u4").tolist()
    if header[0] != word_bytes:
        raise ValueError(f"{header[0]} segments where words have {word_bytes} bytes")
    bounds = [*header[1 : 1 + word_bytes], len(data)]
    if bounds[0] < _HEADER_BYTES or sorted(bounds) != bounds:
        raise ValueError("segments lie outside the frame")
    # The first segment holds the highest byte of every word.
    planes = [_segment(data[start:end], words) for start, end in pairwise(bounds)]
    return np.stack(planes, axis=1).view(f">u{word_bytes}").reshape(words)


def _segment(data: bytes, size: int) -> np.ndarray:
    out = bytearray()
    at = 0
    while len(out) < size and at < len(data):
        control = data[at]
        if control < 128:
            out += data[at + 1 : at + 2 + control]
            at += 2 + control
        elif control > 128:
            out += data[at + 1 : at + 2] * (257 - control)
            at += 2
        else:
            at += 1
    # Writers that take frames of an even number of bytes add one to an odd one; behind a segment comes padding only.
    if not size <= len(out) <= size + size % 2 or at > len(data) or data[at:].strip(b"\0\x80"):
        raise ValueError(f"a segment decodes to {len(out)} bytes, not {size}")
    return np.frombuffer(out, np.uint8, size)
