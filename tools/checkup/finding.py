"""What one check came to: well or not, what was seen, why it matters, and what mends it.

Invariant: an `ok` needs no more than what was seen; `warn` and `fail` say why and name the mend. `id` is stable: a file
that was kept a year ago has the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")
"""From good to bad."""


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    id: str
    status: Status
    seen: str
    why: str = ""
    mend: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or (self.why and self.mend), f"{self.id} says neither why nor what to do"


@dataclass(frozen=True)
class Unread:
    """What could not be looked at here, and how a person can."""

    id: str
    how: str


Outcome = Finding | Unread | None
"""None: the check does not concern this machine."""


def ok(name: str, seen: str) -> Finding:
    return Finding(name, "ok", seen)


def warn(name: str, seen: str, *, why: str, mend: str) -> Finding:
    return Finding(name, "warn", seen, why, mend)


def fail(name: str, seen: str, *, why: str, mend: str) -> Finding:
    return Finding(name, "fail", seen, why, mend)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among them; ok where there are none."""
    found = {finding.status for finding in findings}
    for status in reversed(STATUSES):
        if status in found:
            return status
    return "ok"
