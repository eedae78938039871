"""Why a probe is not made."""

from __future__ import annotations


class ProbeError(ValueError):
    """What was given does not hold what is needed: what, where, what to do."""


class UsageError(ProbeError):
    """What was asked for cannot be meant."""


class RefusedError(ProbeError):
    """It could be computed, and the protocol forbids it."""
