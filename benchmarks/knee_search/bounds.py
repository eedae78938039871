"""What bounds a coupled run: io, decode, compute, memory bandwidth or memory size. The rule, in order:

1. It waits for data for `WAITS` of its time or more: **io** where the loader's threads spent more time reading than
   decoding, else **decode**.
2. The next larger micro-batch would be faster by more than the tolerance, but does not fit: **memory size**.
3. Decoders and compute share the cores, and the decoders take more than half of a window's time: **decode**.
4. Its bytes at the measured bandwidth take longer than its operations at the measured peak: **memory bandwidth**.
5. Else **compute**.

Bytes of an update are what cannot be avoided: weights, read by each pass of each micro-batch; gradients; the
optimizer's and the teacher's pass over all of them; activations, written once and read once. What is read again because
a cache was too small is not known, so rule 4 errs towards compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from knee_search.prediction import COMPUTE as COMPUTE
from knee_search.prediction import DECODE, IO

WAITS = 0.02
MEMORY_BANDWIDTH, MEMORY_SIZE = "memory bandwidth", "memory size"
PASSES_OVER_WEIGHTS = 4
"""Of each micro-batch: teacher, student, twice in the backward (gradients of inputs, gradients of weights)."""
GRADIENT_BYTES = 8
"""Of each micro-batch and parameter: read and written where gradients add up."""
OPTIMIZER_BYTES = 44
"""Of each update and parameter (docs/decisions.md: the one-pass update)."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the rule looks at."""

    waits: float
    """Share of the time."""
    read_s: float
    decode_s: float
    """Of the loader's threads, decoding and undoing the filter."""
    shares_cores: bool
    compute_s: float
    """Of a window, nothing beside."""
    kappa_s: float
    """That loading a window costs the compute."""
    larger_would_gain: float | None
    """The gain of the next larger micro-batch, as a fraction, where it does not fit; None where it fits or is none."""
    tolerance: float
    bytes_s: float | None
    """An update's bytes at the measured bandwidth; None: not measured."""
    operations_s: float | None
    """Its operations at the measured peak."""


def bound_of(seen: Seen) -> tuple[str, str]:
    """The bound, and why, in a sentence."""
    if seen.waits >= WAITS:
        name = IO if seen.read_s > seen.decode_s else DECODE
        busy = "reading" if name == IO else "decoding"
        return (
            name,
            f"waits for data {seen.waits:.0%} of the time, and the loader's threads spend most of theirs {busy}",
        )
    if seen.larger_would_gain is not None and seen.larger_would_gain > seen.tolerance:
        gain = f"{seen.larger_would_gain:.0%}"
        return MEMORY_SIZE, f"the next larger micro-batch would be {gain} faster, and does not fit"
    if seen.shares_cores and seen.kappa_s > seen.compute_s:
        return DECODE, "decoding takes more of the cores' time than compute"
    if seen.bytes_s is not None and seen.operations_s is not None and seen.bytes_s > seen.operations_s:
        return MEMORY_BANDWIDTH, "its bytes take longer at the measured bandwidth than its operations at the peak"
    return COMPUTE, "the data are there in time, and its operations take the longest"


def update_bytes(*, parameters: int, activation_bytes: int, accumulation: int, weight_bytes: int) -> int:
    """Bytes that an update moves at least. activation_bytes: that a micro-batch keeps for its backward; weight_bytes:
    of a weight as products read it."""
    of_micro_batch = parameters * (PASSES_OVER_WEIGHTS * weight_bytes + GRADIENT_BYTES) + 2 * activation_bytes
    return accumulation * of_micro_batch + OPTIMIZER_BYTES * parameters
