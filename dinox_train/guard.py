"""The health guard: looks at the line of each update, says what is worth an event, and when a run stops or goes back.

Invariant: what it says and wants depends on the lines alone, not on where a run was stopped and resumed (`state`). The
windows of update u are global batch u - 1 + `skipped`: the order of windows stays a pure function of that number, and a
rollback (dinox_train/rollback.py) only raises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinox_train.alarms import Alarms, Said, Setting
from dinox_train.clipping import ClippingCount
from dinox_train.config import Config


def setting_of(config: Config) -> Setting:
    """What alarms depend on, of a run's configuration (prototypes settled)."""
    health, lengths = config.health, config.schedule
    return Setting(
        batch_size=config.train.batch_size,
        prototypes=config.objective.prototypes if config.objective.name == "dinov3" else None,
        updates=lengths.updates or config.train.updates,
        warmup=lengths.warmup_updates,
        grace=health.grace_updates,
        patience=health.patience_updates,
        spike=health.spike,
    )


class Guard:
    """Of one run: alarms, how many updates in a row were bad, and what was skipped by rollbacks."""

    def __init__(self, config: Config) -> None:
        self._health = config.health
        self.alarms, self._clipping = Alarms(setting_of(config)), ClippingCount()
        self.masked_in_a_row = 0
        self.bad_since, self._bad, self._stays = 0, 0, False
        """The first of the updates in a row whose loss spiked or was not finite, how many they are, and whether no
        checkpoint was found to go back to from them."""
        self.wants_back = False
        """Whether the run must go back to a checkpoint from before `bad_since`."""
        self._last = 0
        self.rollbacks = self.skipped = 0
        """How often the run went back; global batches that were left out because of it."""
        self.went_back_to: list[int] = []
        """The update that each rollback led back to (dinox_train/branch.py)."""
        self.stops: str | None = None
        """Why the run must stop; None: it may go on."""

    @property
    def is_troubled(self) -> bool:
        """Whether the last update was one that a rollback would undo: no checkpoint of now would outlive it."""
        return self.wants_back or (self._health.rollback is not None and self._bad > 0)

    def look(self, line: dict[str, Any]) -> list[Said]:
        """The complete line of the next update; `clipped_updates` is added to it. Returns what is worth an event."""
        self._last = update = line["update"]
        advice = self._clipping.add(update, line["clipped"])
        line["clipped_updates"] = self._clipping.total
        said = [Said("clipping", advice)] if advice else []
        if line["applied"]:
            self.masked_in_a_row = 0
            said += self.alarms.add(line)
        else:
            self.masked_in_a_row += 1
            said.append(Said("masked", f"update {update} had a non-finite loss or gradient and was not applied"))
        if line["applied"] and "loss_spike" not in self.alarms.on:
            self._bad, self._stays = 0, False
        else:
            self.bad_since = update if self._bad == 0 else self.bad_since
            self._bad += 1
            if self._health.rollback is not None and self._bad >= self._health.rollback and not self._stays:
                self.wants_back = True
        # On a GPU two lines may come before the run asks: a reason of the first one stands.
        self.stops = self.stops or self._reason(said)
        return said

    def _reason(self, said: list[Said]) -> str | None:
        health = self._health
        if self.masked_in_a_row >= health.max_masked_updates:
            return (
                f"{self.masked_in_a_row} updates in a row had a non-finite loss or gradient. Lower "
                "optimizer.learning_rate or look at masked_batches/ in the run folder"
            )
        begun = [one.alarm for one in said if one.event == "alarm" and one.alarm in health.stop_at]
        if health.on_alarm == "stop" and begun:
            return (
                f"health.on_alarm is stop, and the alarm {', '.join(map(str, begun))} began: the event above has advice"
            )
        return None

    # --- going back ---------------------------------------------------------------------------------------------------

    def stay(self) -> None:
        """There is nothing to go back to: go on from here as if no rollback were wanted, until all is well again."""
        self._stays, self.wants_back = True, False

    def went_back(self, state: Mapping[str, Any], update: int) -> int:
        """Be as in the checkpoint of so many updates, but leave out the global batches drawn since; how many those are.

        state: the checkpoint's.
        """
        skipped, rollbacks, dropped = self.skipped, self.rollbacks, self._last - update
        went_back_to = [*self.went_back_to, update]
        self.restore(state)
        self.skipped, self.rollbacks, self.went_back_to = skipped + dropped, rollbacks + 1, went_back_to
        return dropped

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON values, part of a checkpoint's state."""
        return {
            "masked_in_a_row": self.masked_in_a_row,
            "clipping": self._clipping.state(),
            "alarms": self.alarms.state(),
            "bad": [self.bad_since, self._bad, self.wants_back],
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "went_back_to": self.went_back_to,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be what a checkpoint's state says; what an older one lacks begins afresh."""
        self.masked_in_a_row = state["masked_in_a_row"]
        self._clipping = ClippingCount()
        self._clipping.restore(state.get("clipping"))
        self.alarms.restore(state.get("alarms"))
        self.bad_since, self._bad, self.wants_back = state.get("bad", [0, 0, False])
        self.rollbacks, self.skipped = state.get("rollbacks", 0), state.get("skipped", 0)
        self.went_back_to = list(state.get("went_back_to", ()))
        self._stays, self.stops = False, None
