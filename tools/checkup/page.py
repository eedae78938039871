"""The page that a person reads, and the JSON that a program reads."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from checkup.finding import STATUSES, Finding, Unread, worst
from checkup.machine import Machine

VERSION = 1
"""Of the JSON: another one where a member or an id changes its meaning."""
_WIDTH, _INDENT = 118, 22


def page(machine: Machine, findings: Sequence[Finding], unread: Sequence[Unread], seconds: float) -> list[str]:
    """The lines of the page; the last one is the verdict."""
    lines = [f"{machine.device}: {'the CPU' if machine.taken is None else machine.taken.words()}", ""]
    for finding in findings:
        lines += _wrapped(f"{finding.status:<5}{finding.id}", finding.seen)
        if finding.status != "ok":
            lines += _wrapped("", f"why: {finding.why}") + _wrapped("", f"do: {finding.mend}")
    if unread:
        lines += ["", "could not be looked at; you can:"]
        for one in unread:
            lines += _wrapped(f"     {one.id}", one.how)
    return [*lines, "", verdict(findings, seconds)]


def _wrapped(label: str, words: str) -> list[str]:
    first = label.ljust(_INDENT - 1) + " "
    return textwrap.wrap(
        first + words,
        _WIDTH,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def verdict(findings: Sequence[Finding], seconds: float) -> str:
    """One sentence."""
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    said = {
        "ok": "ready for a run",
        "warn": "a run goes; read the warnings before you leave it alone",
        "fail": "not ready: mend what failed first",
    }
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"verdict: {said[worst(findings)]} ({counted}; {seconds:.0f} s)"


def as_json(machine: Machine, findings: Sequence[Finding], unread: Sequence[Unread], seconds: float) -> dict[str, Any]:
    """The same, and the facts. No host name, no user name, no path."""
    return {
        "version": VERSION,
        "verdict": worst(findings),
        "device": machine.device,
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
        "unread": [asdict(one) for one in unread],
        "machine": asdict(machine),
    }
