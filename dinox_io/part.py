"""A part of a pack, for array jobs: which series and files are its own, its folder, and the record that it is done.

Invariant: the N parts of an input have each series in exactly one of them, whatever else is in the input; a record is
written last, and fits what stands in the folder, or the part is not done.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinox_io.atomic import write_atomically
from dinox_io.canonical import canonical_json
from dinox_io.output import OutputFolder, PackError, explained

RECORD_NAME = "part.json"
_TEXT = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`. Numbers count from 1, or from 0: the last is the same as number 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """`3/16` -> Part(3, 16). ValueError."""
        match = _TEXT.fullmatch(text)
        if not match or not 0 <= int(match.group(1)) <= int(match.group(2)) or int(match.group(2)) < 1:
            raise ValueError(f"{text!r} is no part: write I/N, such as 1/8, with I from 1 to N (or from 0 to N - 1)")
        return cls(int(match.group(1)), int(match.group(2)))

    @property
    def residue(self) -> int:
        """0 … of - 1."""
        return self.number % self.of

    @property
    def folder(self) -> str:
        """Name of its folder in OUT."""
        return f"part-{self.number}-of-{self.of}"

    def holds(self, name: str) -> bool:
        """Whether a series (by its pseudonym) or a file of no series (by its path) is of this part."""
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.residue


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What a part says when it is done (part.json)."""

    part: int
    of: int
    options: Mapping[str, Any]
    """As in the manifest; the key's id is among them."""
    codes: Sequence[str]
    """Codes that the part's last run gave."""
    series: int
    """Series of the input that are this part's."""
    in_set: int
    """How many of them are in the part, or in the set in OUT."""
    manifest: str | None
    """`self` of its manifest; None: it has no volume."""
    rows: str
    """sha256 of rejected.jsonl and private/sources.jsonl."""

    def write(self, folder: OutputFolder) -> None:
        """Put it into the folder of the part, unless it is there. PackError."""
        path, data = folder.path / RECORD_NAME, canonical_json(asdict(self)) + b"\n"
        with explained(folder.path):
            if not path.exists() or path.read_bytes() != data:
                write_atomically(path, data)


def read_record(folder: OutputFolder) -> PartRecord | None:
    """The record of the part in a folder; None if there is none, or it is not of the set and the rows there."""
    try:
        record = PartRecord(**json.loads((folder.path / RECORD_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    if record.rows != rows_digest(folder) or folder.journal.exists() or folder.pending_commit():
        return None
    return record if f"part-{record.part}-of-{record.of}" == folder.path.name else None


def rows_digest(folder: OutputFolder) -> str:
    """sha256 of the two lists of rows in a folder. PackError if one cannot be read."""
    digest = hashlib.sha256()
    for path in (folder.rejected, folder.sources):
        digest.update(_sha256(path))
    return digest.hexdigest()


def _sha256(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}") from None
