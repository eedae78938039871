"""Whether a trainer that ended is started again, and when: pure, so that every case can be tested."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from supervision.ledger import DAY_S, Moment

# What the trainer says with its exit code, for which another start would be wrong.
FINAL = {
    0: "done",
    2: "the command or the configuration is refused: starting it again would not change that",
    4: "stopped by the health guard: look at report.html before going on",
    130: "it was told to stop (SIGINT) by somebody else",
    143: "it was told to stop (SIGTERM) by somebody else",
}
HUNG_EXIT_CODE = 5
SAME_ERROR_RESTARTS = 2
LONGEST_WAIT_S = 1800.0
_TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class End:
    """How a trainer ended. code: its exit code, or minus the signal's number. update: how many were done."""

    code: int
    hung: bool
    update: int
    error: str

    @property
    def why(self) -> str:
        if self.hung:
            return "hang"
        return f"signal {signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"

    @property
    def exit_code(self) -> int:
        """What the supervisor ends with after it: 128 + number for a signal, as a shell says it; 5 for a hang."""
        if self.hung:
            return HUNG_EXIT_CODE
        return 128 - self.code if self.code < 0 else self.code


@dataclass(frozen=True)
class Decision:
    """Start again after `wait_s`, or stop; `because` says why in words."""

    restarts: bool
    because: str
    wait_s: float = 0.0


def decide(end: End, earlier: list[dict[str, Any]], now: Moment, *, max_restarts: int, first_wait_s: float) -> Decision:
    """What follows on an end. `earlier`: the ends before it (`Ledger.ends`), oldest first."""
    if not end.hung and end.code in FINAL:
        return Decision(False, FINAL[end.code])
    if not end.hung and -end.code in _TOLD:
        return Decision(False, f"it was told to stop ({signal_name(-end.code)}) by somebody else")
    same = sum(_is_same(end, row) for row in earlier)
    if same >= SAME_ERROR_RESTARTS:
        return Decision(False, f"the same error at update {end.update}, {same + 1} times")
    today = sum(row.get("next") == "restart" and now.since(row) < DAY_S for row in earlier)
    if today >= max_restarts:
        return Decision(False, f"{today} restarts within 24 hours are as many as --max-restarts allows")
    futile = 0
    for row in reversed(earlier):
        if row["update"] < end.update:
            break
        futile += 1
    return Decision(True, "", min(first_wait_s * 2.0 ** min(futile, 30), LONGEST_WAIT_S))


def _is_same(end: End, row: dict[str, Any]) -> bool:
    # A GPU reports some errors an update late, and not always: one update more or less is the same place.
    return row["why"] == end.why and row["error"] == end.error and abs(row["update"] - end.update) <= 1


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
