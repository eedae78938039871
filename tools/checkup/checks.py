"""All checks, in the order of the page: what is used, what breaks it, how fast it is, the host, the disk."""

from __future__ import annotations

from collections.abc import Callable

from checkup import disk_checks, gpu_checks, host_checks, software_checks, speed_checks, system_checks
from checkup.finding import Finding, Outcome, Unread
from checkup.machine import Machine

Check = Callable[[Machine], Outcome]
ALL: tuple[Check, ...] = (
    *software_checks.CHECKS,
    *system_checks.CHECKS,
    *gpu_checks.CHECKS,
    *speed_checks.CHECKS,
    *host_checks.CHECKS,
    *disk_checks.CHECKS,
)


def examine(machine: Machine) -> tuple[list[Finding], list[Unread]]:
    """What all checks find, and what could not be looked at."""
    outcomes = [check(machine) for check in ALL]
    findings = [one for one in outcomes if isinstance(one, Finding)]
    return findings, [one for one in outcomes if isinstance(one, Unread)]
