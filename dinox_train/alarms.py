"""Alarms: which figure of a run means trouble, from which value on, for how long, what it means and what to do.

Thresholds stand here and nowhere else: the verdict of a report uses them too (docs/health.md explains each). An alarm
begins when its figure was beyond its threshold in so many updates in a row, and is over when it was not for as long.

Invariant: pure and host-only. What is said depends on the lines of the updates alone, not on where a run was stopped
and resumed (`state`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Teacher entropy / ln K: 1 is the same target for every image, 0 is a target that is certain.
UNIFORM_ENTROPY, BLURRED_ENTROPY = 0.995, 0.97
ONE_HOT_ENTROPY, CERTAIN_ENTROPY = 0.02, 0.1
COLLAPSED_STD, SMALL_STD = 0.01, 0.05
LOW_RANK = 10.0
ALIKE_PATCHES, SIMILAR_PATCHES = 0.98, 0.95
LOSS_PINNED = 0.005
"""Of ln K: as near to it as that is at it."""
LEAP, LEAP_WINDOW, LEAP_FEWEST = 10.0, 100, 10
"""A gradient so many times the median of so many updates before it, once there are a few, leaps."""
ZERO_GRADIENT = 1e-6
KNN_FALL = 0.2
"""R2 below the best since the start was over."""
SHORTCUT, POOR_KNN_Z = 0.5, 0.2
EARLY_UPDATES = 100
"""Before that, most figures of a sound run still look like those of a collapsed one."""
PARTED_SHARE = 0.1
"""Of the run: by then features must have parted, however slowly they began to."""

Line = Mapping[str, Any]
Memory = dict[str, Any]
"""JSON values that a rule keeps from update to update; it may also note here what its sentence quotes."""


def collapsed_rank(batch_size: int) -> float:
    """An effective rank below this is a collapse: a batch of n images cannot span more than about n directions."""
    return max(1.5, min(5.0, batch_size / 8))


def few_prototypes(batch_size: int) -> float:
    """Fewer prototypes than this for the two global views of a batch are a collapse."""
    return max(2.0, 2 * batch_size / 50)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the thresholds depend on."""

    batch_size: int
    prototypes: int | None
    """Of the DINO head; None: the objective has none."""
    updates: int
    """Length of the schedules."""
    warmup: int
    """Updates of the learning rate's warm-up."""
    grace: int | None = None
    """Updates at the start without alarms; None: EARLY_UPDATES, or the warm-up where that is normal in it."""
    patience: int = 50
    spike: float = 10.0


Rule = Callable[[float, Line, Memory, Setting], bool]
"""Whether the value of the figure in this line is beyond the threshold."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One way for a run to go wrong."""

    name: str
    figure: str
    """Key of the line; a line in which it is null says nothing."""
    rule: Rule
    says: str
    """What it means: a template of `value`, `update` and what the rule has noted."""
    advice: str
    patience: Callable[[Setting], int] = lambda setting: setting.patience
    """Updates (or evaluations) in a row, for it to begin and to be over."""
    warms_up: bool = True
    """Whether a sound run may look so while its learning rate warms up."""
    evaluated: bool = False
    """Whether its figure is of evaluations, not of updates."""
    at_once: bool = False
    """No updates at the start are excepted: the rule itself waits until it can tell."""


@dataclass(frozen=True)
class Said:
    """An event for RUN/events.jsonl; `alarm`: of which alarm, for the events `alarm` and `alarm over`."""

    event: str
    text: str
    alarm: str | None = None


# --- rules ------------------------------------------------------------------------------------------------------------


def _above(limit: float) -> Rule:
    return lambda value, line, memory, setting: value > limit


def _below(limit: float) -> Rule:
    return lambda value, line, memory, setting: value < limit


def _not_parted(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    """Features that are almost equal. A small LayerScale lets a network start with such: they need time to part."""
    first = memory.setdefault("first", value)
    if value >= COLLAPSED_STD:
        memory["parted"] = True
        return False
    late = line["update"] > PARTED_SHARE * setting.updates
    return memory.get("parted", False) or late or value <= 2 * first


def _low_rank(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    return value < collapsed_rank(setting.batch_size)


def _few_prototypes(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    memory["used"], memory["views"] = value * (setting.prototypes or 0), 2 * setting.batch_size
    return setting.prototypes is not None and memory["used"] < few_prototypes(setting.batch_size)


def _at_ln_k(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    if setting.prototypes is None:
        return False
    memory["uniform"] = math.log(setting.prototypes)
    return abs(value - memory["uniform"]) < LOSS_PINNED * memory["uniform"]


def _leaps(value: float, memory: Memory, times: float) -> bool:
    """Whether a value is so many times the median of those before it; keeps the last of them."""
    lately = memory.setdefault("lately", [])
    memory["median"] = statistics.median(lately) if len(lately) >= LEAP_FEWEST else 0.0
    memory["lately"] = [*lately[1 - LEAP_WINDOW :], value]
    return memory["median"] > 0 and value > times * memory["median"]


def _gradient_leaps(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    return _leaps(value, memory, LEAP)


def _loss_leaps(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    return _leaps(value, memory, setting.spike)


def _falls(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    best = memory["best"] = max(value, memory.get("best", value))
    return best - value > KNN_FALL


def _shortcut(value: float, line: Line, memory: Memory, setting: Setting) -> bool:
    memory.update({key: line.get(f"shortcut_{key}") for key in ("name", "accuracy", "chance")})
    memory["knn_z"] = knn_z = line.get("knn_z")
    return value > SHORTCUT and knn_z is not None and knn_z < POOR_KNN_Z


# --- the alarms -------------------------------------------------------------------------------------------------------

_BACK = "A run that had learnt goes on from a checkpoint of before (docs/health.md says how)."

ALARMS: tuple[Alarm, ...] = (
    Alarm(
        name="entropy_uniform",
        figure="teacher_entropy",
        rule=_above(UNIFORM_ENTROPY),
        says="the teacher's targets are close to uniform (entropy {value:.4f} of 1): they teach nothing",
        advice="Lower objective.teacher_temperature or optimizer.learning_rate, or lengthen schedule.warmup_updates; "
        "look at pictures/views.png, whether the views show anything.",
    ),
    Alarm(
        name="entropy_one_hot",
        figure="teacher_entropy",
        rule=_below(ONE_HOT_ENTROPY),
        says="the teacher is certain of everything (entropy {value:.2g} of 1): its mistakes are never corrected",
        advice="Raise objective.teacher_temperature; with objective.balance centering, take sinkhorn.",
        warms_up=False,
    ),
    Alarm(
        name="feature_std_low",
        figure="feature_std",
        rule=_not_parted,
        says="the features of all images point the same way (feature_std {value:.2g}, 1 is evenly spread)",
        advice="Lower optimizer.learning_rate, raise objective.koleo.weight, and look at pictures/views.png, whether "
        "the views show anything. " + _BACK,
    ),
    Alarm(
        name="rank_low",
        figure="effective_rank",
        rule=_low_rank,
        says="the features of a whole batch span only {value:.1f} directions",
        advice="Raise objective.koleo.weight, lower optimizer.learning_rate, or take larger batches. " + _BACK,
    ),
    Alarm(
        name="prototypes_few",
        figure="prototype_use",
        rule=_few_prototypes,
        says="the {views} global views of a batch are spread over only {used:.0f} prototypes",
        advice="Set objective.balance to sinkhorn, or raise objective.sinkhorn_iterations; with centering, lower "
        "objective.centre_momentum.",
    ),
    Alarm(
        name="patches_alike",
        figure="patch_similarity",
        rule=_above(ALIKE_PATCHES),
        says="all patches of an image have the same features (mean cosine {value:.3f}): a dense collapse",
        advice="Switch Gram anchoring on (objective.gram.weight, DINOv3: 2) with objective.gram.start before it began, "
        "give objective.ibot.weight more, or lower optimizer.learning_rate. " + _BACK,
    ),
    Alarm(
        name="gradient_leap",
        figure="grad_norm",
        rule=_gradient_leaps,
        says="the gradient is {value:.3g} long, and the median of those before it {median:.3g}: training is about to "
        "diverge",
        advice="Lower optimizer.learning_rate, lengthen schedule.warmup_updates, or lower optimizer.clip_norm.",
        patience=lambda setting: 3,
        warms_up=False,
    ),
    Alarm(
        name="gradient_zero",
        figure="grad_norm",
        rule=_below(ZERO_GRADIENT),
        says="the gradient is {value:.2g} long: nothing is learnt any more",
        advice="Look at the weights of the terms and at objective.student_temperature (too high, and every answer is "
        "the same), and at pictures/views.png.",
        warms_up=False,
    ),
    Alarm(
        name="loss_spike",
        figure="loss",
        rule=_loss_leaps,
        says="update {update} had a loss of {value:.4g}, the median of those before it is {median:.4g}",
        advice="If figures stay bad, stop, delete the checkpoints after it and go on from the one before (same "
        "command), or start anew with a lower optimizer.learning_rate; health.rollback does it by itself.",
        patience=lambda setting: 1,
        at_once=True,
    ),
    Alarm(
        name="loss_at_ln_k",
        figure="loss_dino",
        rule=_at_ln_k,
        says="the DINO loss sits at ln K = {uniform:.2f}: what a network gets which says the same of every image",
        advice="Lower optimizer.learning_rate or objective.teacher_temperature, or lengthen schedule.warmup_updates.",
        patience=lambda setting: 4 * setting.patience,
    ),
    Alarm(
        name="knn_z_falls",
        figure="knn_z",
        rule=_falls,
        says="features of unseen patients tell less and less where a slice lies: knn_z {value:.2f}, it was {best:.2f}",
        advice="Lower optimizer.learning_rate or optimizer.weight_decay, or stop here and use the checkpoint of the "
        "best evaluation. " + _BACK,
        patience=lambda setting: 1,
        evaluated=True,
    ),
    Alarm(
        name="shortcut",
        figure="shortcut",
        rule=_shortcut,
        says="features tell the {name} of a scan ({accuracy:.0%} right, {chance:.0%} by chance), but hardly where in "
        "the body a slice lies (knn_z {knn_z:.2f}): a shortcut",
        advice="Widen views.level_hu, views.width_hu and views.blur_sigma so that it shows less, "
        "switch views.noise_probability on, raise model.unknown_scale where the scale is told, and mix the sets more "
        "evenly (data.temperature).",
        patience=lambda setting: 2,
        evaluated=True,
    ),
)
NAMES = tuple(alarm.name for alarm in ALARMS)
COLLAPSES = (
    *("entropy_uniform", "entropy_one_hot", "feature_std_low", "rank_low"),
    *("prototypes_few", "patches_alike", "gradient_zero", "loss_at_ln_k"),
)
"""Those after which nothing is learnt any more."""


@dataclass
class _Watch:
    """How one alarm stands. `run`: updates in a row that say the opposite of `on`."""

    on: bool
    run: int
    memory: Memory


class Alarms:
    """Looks at the line of each update that was applied, in their order."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._watches = {alarm.name: _Watch(False, 0, {}) for alarm in ALARMS}

    @property
    def on(self) -> tuple[str, ...]:
        """The alarms that have begun and are not over."""
        return tuple(name for name, watch in self._watches.items() if watch.on)

    def add(self, line: Line) -> list[Said]:
        """What begins and what is over with this line. Figures that it lacks, or that are not finite, say nothing."""
        found = (self._look(alarm, self._watches[alarm.name], line) for alarm in ALARMS)
        return [said for said in found if said is not None]

    def _look(self, alarm: Alarm, watch: _Watch, line: Line) -> Said | None:
        value = line.get(alarm.figure)
        if value is None or not math.isfinite(value):
            return None
        beyond = alarm.rule(value, line, watch.memory, self._setting)
        if line["update"] <= self._grace(alarm):
            if alarm.evaluated:
                watch.memory = {}  # what a fresh network tells by chance is no best to fall from
            return None
        patience = alarm.patience(self._setting)
        watch.run = watch.run + 1 if beyond != watch.on else 0
        if watch.run < patience:
            return None
        watch.on, watch.run = beyond, 0
        if not beyond:
            return Said("alarm over", f"{alarm.name}: {alarm.figure} is {value:.4g} again", alarm.name)
        means = alarm.says.format(value=value, update=line["update"], **watch.memory)
        lasting = f" ({patience} {'evaluations' if alarm.evaluated else 'updates'} in a row)" if patience > 1 else ""
        return Said("alarm", f"{alarm.name}: {means}{lasting}. {alarm.advice}", alarm.name)

    def _grace(self, alarm: Alarm) -> int:
        if alarm.at_once:
            return 0
        own = self._setting.grace
        if own is not None:
            return own
        return max(EARLY_UPDATES, self._setting.warmup if alarm.warms_up else 0)

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {
            name: {"on": watch.on, "run": watch.run, "memory": dict(watch.memory)}
            for name, watch in self._watches.items()
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Be what `state` gave; None, of a checkpoint older than this: no update was seen. What it does not know of
        begins afresh."""
        self._watches = {alarm.name: _Watch(False, 0, {}) for alarm in ALARMS}
        for name, kept in (state or {}).items():
            if name in self._watches:
                self._watches[name] = _Watch(kept["on"], kept["run"], dict(kept["memory"]))
