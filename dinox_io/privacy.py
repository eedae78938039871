"""What of a patient's header may leave OUT/private: keyed pseudonyms, and values of a closed form.

Invariant: nothing that a person could have typed passes. A text passes only when it is, whole, a word of a list or of a
vendor's naming scheme; a number only inside the range its tag can physically have (a birth date is no tube voltage).
Names, dates, UIDs, institutions, descriptions, comments, private tags and the scanner's model name never pass.
"""

import hashlib
import hmac
import math
import re
import secrets
from pathlib import Path
from typing import Literal

from dinox_io.atomic import write_atomically

KEY_BYTES_MIN = 16
KEY_BYTES = 32

_VENDORS = {
    "GE": ("ge medical", "ge healthcare", "general electric", "ge"),
    "SIEMENS": ("siemens",),
    "PHILIPS": ("philips", "marconi", "picker"),
    "CANON": ("canon", "toshiba"),
    "HITACHI": ("hitachi", "fujifilm"),
    "UNITED_IMAGING": ("uih", "united imaging", "shanghai united imaging"),
    "NEUSOFT": ("neusoft",),
    "NEUROLOGICA": ("neurologica", "samsung neurologica"),
}
_KERNELS = re.compile(
    r"(?:HD )?(?:STANDARD|STND|SOFT|LUNG|BONE(?:PLUS)?|DETAIL|EDGE)|CHEST|CHST|BODY|ULTRA|SMOOTH|SHARP|"  # GE
    r"(?:[ABHIUTCDSQ][a-z]?\d{2}[a-z]?)(?:\\[1-5])?|SA\d{2}f|"  # Siemens: B30f, Br38f\3, I70f, SA36f
    r"[A-FL]|UA|UB|UC|S[A-C]|Y[A-E]|E[A-C]|"  # Philips: D, SB, YA, EB
    r"Smooth \(A\)|Smooth \(B\)|Standard \(B\)|Sharp \(C\)|Detail \(D\)|"  # Philips, Picker: names with their letter
    r"[BH]_V?(?:SOFT|SMOOTH|STANDARD|SHARP)_[A-D]|"  # United Imaging: B_SHARP_B
    r"F[CL]\d{2}(?:-[HP])?"  # Canon, Toshiba: FC08
)
_PATIENT_POSITIONS = frozenset({"HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"})


def pseudonym(key: bytes, kind: Literal["patient", "series"], value: str) -> str:
    """First 32 hex digits of HMAC-SHA256(key, kind NUL value); see DESIGN for what `value` is."""
    message = kind.encode() + b"\0" + value.encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


def key_id(key: bytes) -> str:
    """16 hex digits that tell two keys apart and give neither away; recorded with a set."""
    return hmac.new(key, b"key id", hashlib.sha256).hexdigest()[:16]


def read_key(path: Path) -> bytes:
    """The bytes of a key file, at least 16 of them; ValueError otherwise, OSError if it cannot be read."""
    key = path.read_bytes()
    if len(key) < KEY_BYTES_MIN:
        raise ValueError(
            f"the key file holds {len(key)} bytes, at least {KEY_BYTES_MIN} are needed: "
            "make one with `head -c 32 /dev/urandom > KEY`"
        )
    return key


def own_key(private: Path) -> bytes:
    """The random key of a set: private/key, made on first use (0600), and used again by later runs."""
    path = private / "key"
    if not path.exists():
        write_atomically(path, secrets.token_bytes(KEY_BYTES))
        path.chmod(0o600)
    return read_key(path)


def key_of_set(private: Path, key_id_of_set: str, key_file: Path | None) -> bytes:
    """The key that a set's pseudonyms were made with: that of `key_file`, else the one in its private folder.

    ValueError, saying what to do, if it is not there, too short, or another one than the set names (`key_id`).
    """
    path = key_file or private / "key"
    try:
        key = read_key(path)
    except OSError as error:
        missing = "the set was packed with a key file: give the same --key-file" if key_file is None else error.strerror
        raise ValueError(f"there is no key to read in {path}: {missing}") from None
    if key_id(key) != key_id_of_set:
        raise ValueError(f"the key in {path} is not the one that the set was packed with: give that --key-file")
    return key


def number_in_range(value: float | None, low: float, high: float) -> float | None:
    """The number, if it is finite and within [low, high]; else None."""
    if value is None or not math.isfinite(value) or not low <= value <= high:
        return None
    return value


def manufacturer(text: str) -> str | None:
    """One of the known vendors, or None: the text itself never passes."""
    words = re.sub(r"[^a-z]+", " ", text.lower()).strip()
    for vendor, starts in _VENDORS.items():
        if any(words == start or words.startswith(start + " ") for start in starts):
            return vendor
    return None


def kernel(text: str) -> str | None:
    r"""The kernel, if it is, whole, of a vendor's naming scheme (`STANDARD`, `B30f`, `Br38f\3`, `FC08`); else None."""
    text = text.strip()
    return text if len(text) <= 16 and _KERNELS.fullmatch(text) else None


def patient_position(text: str) -> str | None:
    """A defined term of PatientPosition (DICOM PS3.3 C.7.3.1.1.2), or None."""
    return text if text in _PATIENT_POSITIONS else None
