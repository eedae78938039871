"""What became of each tensor when weights of another format were read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 12
"""Names of a list that are printed; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every tensor of ours is in one of `matched`, `renamed`, `adapted`, `missing`; every one of theirs that is in none
    of them is in `ignored`."""

    source: str
    """The folder or file."""
    format: str
    """Its title."""
    matched: tuple[str, ...] = ()
    """Ours that have the same name and shape there."""
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ours: the names that they were made of there; reshaped, joined or cut where need be."""
    adapted: Mapping[str, str] = field(default_factory=dict)
    """Ours: what was computed, as the network here has another number of slices."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Ours that are not there, as was allowed: they have their first values."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Theirs that no network here has: why."""
    notes: tuple[str, ...] = ()
    """What the files do not say, and what was taken instead; dtypes that became float32."""

    def lines(self) -> list[str]:
        """Sentences to print."""
        lines = [f"{self.source}: {self.format}"]
        lines.append(f"{len(self.matched)} tensors under the same name, {len(self.renamed)} under another")
        for word, what in (("adapted", self.adapted), ("missing", self.missing), ("ignored", self.ignored)):
            lines += [f"{word}: {line}" for line in _shortened([f"{name}: {why}" for name, why in what.items()])]
        return lines + [f"note: {note}" for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "source": self.source,
            "format": self.format,
            "matched": list(self.matched),
            "renamed": {name: list(theirs) for name, theirs in self.renamed.items()},
            "adapted": dict(self.adapted),
            "missing": dict(self.missing),
            "ignored": dict(self.ignored),
            "notes": list(self.notes),
        }


def _shortened(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"… and {len(lines) - SHOWN} more"]
