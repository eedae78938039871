"""How often gradients were clipped: a count for each line, and advice where it is most updates.

Invariant: what is said depends on the updates alone, not on where a run was stopped and resumed (`state`).
"""

from __future__ import annotations

from typing import Any

STRETCH = 100
"""Updates that are looked at together: update 1 to 100, 101 to 200 and so on."""
TOO_MANY = 0.5
"""Share of a stretch from which the limit, and not the learning rate, says how far weights move."""


class ClippingCount:
    """Counts the updates of a run whose gradient was clipped."""

    def __init__(self) -> None:
        self.total = 0
        """Of all updates so far."""
        self._lately = 0
        """Of the stretch so far."""
        self._said = False
        """Whether the stretch before had too many: said once, until it is better."""

    def add(self, update: int, clipped: bool) -> str | None:
        """Update number `update` (from 1) is done; a sentence where too many of the stretch that it ends were clipped,
        and those of the stretch before were not.
        """
        self.total += clipped
        self._lately += clipped
        if update % STRETCH:
            return None
        share, said = self._lately / STRETCH, self._said
        self._lately, self._said = 0, share >= TOO_MANY
        if not self._said or said:
            return None
        return (
            f"{share:.0%} of the last {STRETCH} updates had a gradient longer than optimizer.clip_norm, which was cut "
            "to it. In a warm-up that is usual; if it stays so, lower optimizer.learning_rate, or raise "
            "optimizer.clip_norm if grad_norm is steady"
        )

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"total": self.total, "lately": self._lately, "said": self._said}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Be what `state` gave; None, of a checkpoint older than this: nothing was counted."""
        if state is not None:
            self.total, self._lately, self._said = state["total"], state["lately"], state["said"]
