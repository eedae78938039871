"""Heat, power, errors and lanes of the GPUs, as their drivers tell them now: facts -> findings."""

from __future__ import annotations

from checkup.finding import Outcome, Unread, fail, ok, warn
from checkup.machine import Gpu, Machine

HOT_GPU_C, HOT_PROCESSOR_C = 85.0, 92.0
"""At rest; under load GPUs work at up to 90 °C, their hottest place at up to 110."""


def temperatures(machine: Machine) -> Outcome:
    """Of GPUs and processor, now, at rest."""
    seen = [_heat(gpu) for gpu in machine.gpus if gpu.temperature_c is not None]
    if machine.host.temperature_c is not None:
        seen.append(f"processor {machine.host.temperature_c:.0f} °C")
    if not seen:
        return Unread("temperatures", "nvidia-smi, or `sensors`; containers and virtual machines often have none")
    held = [f"{gpu.name}: {gpu.throttled}" for gpu in machine.gpus if gpu.throttled]
    hot = any((gpu.temperature_c or 0) >= HOT_GPU_C for gpu in machine.gpus)
    hot = hot or (machine.host.temperature_c or 0) >= HOT_PROCESSOR_C
    if held or hot:
        return warn(
            "temperatures",
            "; ".join([*seen, *held]),
            why="hot before the run has begun: it will slow down by itself, for two weeks",
            mend="end what else computes here; clean fans and filters, give it air; look again under load",
        )
    return ok("temperatures", "; ".join(seen))


def _heat(gpu: Gpu) -> str:
    power = "" if gpu.power_w is None else f", {gpu.power_w:.0f} W"
    limit = "" if gpu.power_limit_w is None else f" of {gpu.power_limit_w:.0f}"
    return f"{gpu.name} {gpu.temperature_c:.0f} °C{power}{limit}"


def power_limit(machine: Machine) -> Outcome:
    """A power limit below the card's own."""
    known = [gpu for gpu in machine.gpus if gpu.power_limit_w and gpu.power_default_w]
    if not known:
        return None
    seen = "; ".join(f"{gpu.name} {gpu.power_limit_w:.0f} W of {gpu.power_default_w:.0f}" for gpu in known)
    if any((gpu.power_limit_w or 0) < 0.8 * (gpu.power_default_w or 0) for gpu in known):
        return warn(
            "power-limit",
            seen,
            why="somebody has limited the power, and under load the clock gives way to it",
            mend="nvidia-smi -pl WATTS, or the card's power1_cap; leave it if heat or the supply wants it so",
        )
    return ok("power-limit", seen)


def memory_errors(machine: Machine) -> Outcome:
    """Uncorrected errors of a GPU's memory."""
    counted = [gpu for gpu in machine.gpus if gpu.uncorrected_errors is not None]
    if not counted:
        return None
    seen = "; ".join(f"{gpu.name}: {gpu.uncorrected_errors}" for gpu in counted)
    if any(gpu.uncorrected_errors for gpu in counted):
        return fail(
            "memory-errors",
            seen,
            why="the GPU's memory had errors that it could not correct: a run computes with them, or ends",
            mend="restart, so that bad rows are mapped out; if it comes back, replace the card",
        )
    return ok("memory-errors", f"none that could not be corrected ({seen})")


def link(machine: Machine) -> Outcome:
    """PCIe lanes."""
    known = [gpu for gpu in machine.gpus if gpu.link_width and gpu.link_width_most]
    if not known:
        return None
    seen = "; ".join(f"{gpu.name}: {gpu.link_width} of {gpu.link_width_most} lanes" for gpu in known)
    if any((gpu.link_width or 0) * 2 < (gpu.link_width_most or 0) for gpu in known):
        return warn(
            "link",
            seen,
            why="a quarter of the lanes, or fewer, is what a wrong slot, a riser or dirty contacts give",
            mend="the slot next to the processor; press the card in anew",
        )
    return ok("link", seen)


CHECKS = (temperatures, power_limit, memory_errors, link)
