"""Who was removed from a set and must stay out, known again without being named: private/withdrawn.jsonl.

Invariant: a line holds sha256("withdrawn" NUL pseudonym) and nothing else; a pseudonym is 128 bits of a keyed hash, so
that nobody finds it, or the patient, from there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dinox_io.output import OutputFolder

WITHDRAWN_NAME = "withdrawn.jsonl"


@dataclass(frozen=True)
class Withdrawn:
    """The marks of a set, 64 hex digits each."""

    marks: frozenset[str]

    def holds(self, patient: str, series: str) -> bool:
        """Whether this patient, or this series (pseudonyms), was removed and must stay out."""
        return mark_of_withdrawn(patient) in self.marks or mark_of_withdrawn(series) in self.marks


def withdrawn(folder: OutputFolder) -> Withdrawn:
    """Who was removed from the set in `folder`. Raises PackError if private/withdrawn.jsonl is damaged."""
    rows = folder.read_rows(folder.private / WITHDRAWN_NAME)
    return Withdrawn(frozenset(str(row.get("sha256")) for row in rows))


def mark_of_withdrawn(pseudonym: str) -> str:
    """The line's value for the pseudonym of a patient or of a series."""
    return hashlib.sha256(b"withdrawn\0" + pseudonym.encode()).hexdigest()
