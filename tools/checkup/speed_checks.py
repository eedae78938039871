"""Attention, matrix products and copies as tried, beside what the maker of the device publishes: facts -> findings."""

from __future__ import annotations

from checkup.finding import Outcome, fail, ok, warn
from checkup.machine import Machine
from dinox_train.plan_machines import MACHINES, Published
from dinox_train.platform.facts import Facts

KNOWN_BY = {
    "strix_halo": "gfx1151",
    "rtx_4090": "RTX 4090",
    "rx_7900_xtx": "7900 XTX",
    "mi300x": "MI300X",
    "h200": "H200",
    "h100": "H100",
}
"""Part of a device's name, or its architecture, by the name that the plan has for it."""
SLOW_BUS = 4.0
"""10^9 bytes a second of pinned memory to a GPU of its own: PCIe 3.0 with four lanes has less."""
UNEVEN = 3.0
"""How many times as fast as the slowest layout the fastest may be."""


def published(facts: Facts) -> Published | None:
    """What the maker publishes of this device; None: it is none that we know."""
    for name, part in KNOWN_BY.items():
        if part in (facts.name, facts.architecture) or part in facts.name:
            return MACHINES[name]
    return None


def attention(machine: Machine) -> Outcome:
    """Which backend attention really takes, forward and backward."""
    trials = machine.trials
    if trials is None:
        return None
    if trials.attention_error is not None or trials.attention is None:
        return fail(
            "attention",
            "it does not run",
            why=trials.attention_error or "nothing came out of the trial",
            mend="see torch, rocm and kernel above; kernels={attention: math} shows whether plain products run",
        )
    seen = f"{trials.attention} ({trials.attention_reason})"
    if trials.attention_warning is not None:
        about, _, mend = trials.attention_warning.rpartition(": ")
        return fail("attention", seen, why=about or trials.attention_warning, mend=mend)
    return ok("attention", seen)


def products(machine: Machine) -> Outcome:
    """Matrix products in the three layouts of a Linear."""
    trials = machine.trials
    if trials is None or not trials.tflops:
        return None
    seen = f"{'; '.join(line.removeprefix('products, ') for line in trials.layouts)}; routing {trials.routing}"
    if not trials.facts.is_gpu:
        return ok("products", seen)
    known, slowest = published(trials.facts), min(trials.tflops, key=lambda layout: trials.tflops[layout])
    mend = (
        "leave kernels.linear at auto and ROCBLAS_USE_HIPBLASLT at 0, so that products can be routed; take ROCm 7.2 "
        "or later; python -m dinox_train.platform tune --config C.yaml tries every solution"
        if trials.facts.kind == "amd"
        else "end what else computes there; see temperatures and power-limit; is the build of torch for this GPU?"
    )
    if known is not None:
        low = known.reached["bf16"].low * known.tflops["bf16"]
        if trials.tflops[slowest] < low:
            return warn(
                "products",
                seen,
                why=f"{slowest} runs at {trials.tflops[slowest]:.3g} TFLOP/s; {low:.3g} is the least that was seen "
                f"of a {known.words} (dinox_train/plan_machines.py)",
                mend=mend,
            )
    elif max(trials.tflops.values()) > UNEVEN * trials.tflops[slowest]:
        return warn("products", seen, why=f"{slowest} is more than {UNEVEN:g} times as slow as the others", mend=mend)
    return ok("products", seen)


def copies(machine: Machine) -> Outcome:
    """Copies within and between memories."""
    trials = machine.trials
    if trials is None or trials.copies is None:
        return None
    found, facts = trials.copies, trials.facts
    seen = found.words().removeprefix("copies, ")
    if not facts.is_gpu:
        return ok("copies", seen)
    known = published(facts)
    if known is not None and found.device is not None and found.device < known.copied.low * known.gb_per_s:
        return warn(
            "copies",
            seen,
            why=f"copies within a {known.words} reach {known.copied.low * known.gb_per_s:.0f} GB/s and more",
            mend="end what else uses that memory"
            + ("; tuned-adm profile accelerator-performance; memory in all channels" if facts.unified else ""),
        )
    fastest = max(found.to_device or 0.0, found.to_device_pinned or 0.0)
    if not facts.unified and fastest < SLOW_BUS:
        return warn(
            "copies",
            seen,
            why="windows reach the GPU over a bus with few or slow lanes",
            mend="another slot, no riser of one lane, PCIe at its full generation in the BIOS",
        )
    return ok("copies", seen)


CHECKS = (attention, products, copies)
