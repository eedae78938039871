"""Which networks, resolutions and numbers of updates fit into so many days.

Every preset of workstations at three sizes of views, all else as the run's configuration has it (of a run in stages, as
it is without them). Memory is that of micro-batches of 8 images, or of one where 8 are too many.

Invariant: "surely" is at the lowest speed of the span, "perhaps" at the highest; what does not fit into the memory is
never offered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dinox_train.config import Config, ConfigError, validate
from dinox_train.learner import make_objective, vit_config
from dinox_train.plan import StagePlan, flops_of, memory_of
from dinox_train.plan_machines import Machine
from dinox_train.plan_speed import stage_speed
from dinox_train.prototype_counts import with_prototypes
from dinox_train.span import Span
from dinox_train.stages import Stage

PRESETS = ("vit_s", "vit_b", "vit_l", "vit_g")
SIZES = (224, 384, 512)
PIECES = (8, 1)
"""Images of a micro-batch that are tried."""


@dataclass(frozen=True)
class Offer:
    """A network at a size of views."""

    preset: str
    size: int
    piece: int | None
    """Images of its micro-batches; None: it does not fit into the memory."""
    updates: Span
    """That are done in the time."""

    def verdict(self, wanted: int) -> str:
        """Whether so many updates fit."""
        if self.piece is None:
            return "does not fit into the memory"
        if self.updates.low >= wanted:
            return "yes"
        return "perhaps" if self.updates.high >= wanted else "no"


def offers(
    config: Config, machine: Machine, days: float, room: int | None, wanted: Callable[[int], int]
) -> list[Offer]:
    """Each preset at each size. room: bytes of memory, None: not known; wanted: bytes for a plan of such a peak."""
    found = []
    for preset in dict.fromkeys((*PRESETS, config.model.preset)):
        patch = config.model.patch_size or 16
        sizes = {patch * max(round(size / patch), 1) for size in SIZES}
        found += [
            one
            for size in sorted({*sizes, config.views.global_size})
            if (one := _offer(config, preset, size, machine, days, room, wanted)) is not None
        ]
    return found


def _offer(
    config: Config,
    preset: str,
    size: int,
    machine: Machine,
    days: float,
    room: int | None,
    wanted: Callable[[int], int],
) -> Offer | None:
    there = _with(config, preset, size, 1)
    if there is None:
        return None
    fitting = _that_fits(config, preset, size, room, wanted)
    there = fitting or there
    stage = Stage(1, 1, None, there)
    objective, vit = make_objective(there), vit_config(there)
    plan = StagePlan(stage, there.train.updates, flops_of(there, vit, objective), 0, {})
    speed = stage_speed(plan, vit, machine)  # of these pieces: each starts its kernels anew
    piece = None if fitting is None else fitting.train.batch_size // fitting.train.accumulation
    return Offer(preset, size, piece, speed.update_s.under(86400 * days))


def _that_fits(config: Config, preset: str, size: int, room: int | None, wanted: Callable[[int], int]) -> Config | None:
    """With the larger micro-batch that fits."""
    for images in PIECES:
        batch = config.train.batch_size
        there = _with(config, preset, size, batch // images if batch % images == 0 else batch)
        if there is not None and (room is None or wanted(peak_of(there)) <= room):
            return there
    return None


def peak_of(config: Config) -> int:
    """Bytes at the peak of an update, from networks of 2 and of 4 blocks: the others are as large as those."""
    vit, objective = vit_config(config), make_objective(config)
    few, more = (sum(memory_of(config, replace(vit, num_layers=n), objective).values()) for n in (2, 4))
    return few + (vit.num_layers - 2) * (more - few) // 2


def _with(config: Config, preset: str, size: int, accumulation: int) -> Config | None:
    """The configuration with another network and size; None where its other keys do not allow that."""
    tree = config.model_dump(exclude={"stages"})
    tree["model"]["preset"], tree["views"]["global_size"] = preset, size
    tree["train"]["accumulation"] = accumulation
    try:
        return with_prototypes(validate(tree))
    except ConfigError:
        return None


def offers_in_words(config: Config, days: float, found: Sequence[Offer]) -> list[str]:
    """The table, and what follows from it."""
    wanted = config.train.updates
    lines = [
        f"in {days:g} days, batches of {config.train.batch_size}, updates that are done; "
        f"do {wanted:,} (train.updates) fit?"
    ]
    for one in found:
        updates = "" if one.piece is None else f"{one.updates.low:>12,.0f} to {one.updates.high:>12,.0f}"
        pieces = "" if one.piece is None else f", in micro-batches of {one.piece}"
        lines.append(f"  {one.preset:<7}{one.size:>5}{updates:>28}   {one.verdict(wanted)}{pieces}")
    sure = [one for one in found if one.verdict(wanted) == "yes"]
    if sure:
        largest = max(sure, key=lambda one: (_rank(one.preset), one.size))
        lines.append(f"  the largest that fits surely: {largest.preset} at {largest.size}")
    else:
        possible = [one for one in found if one.piece is not None]
        most = max(possible, key=lambda one: one.updates.low, default=None)
        lines.append(
            "  none fits surely"
            + (f"; {most.preset} at {most.size} does {most.updates.low:,.0f} updates at least" if most else "")
        )
    return lines


def _rank(preset: str) -> int:
    order = ("vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b")
    return order.index(preset)
