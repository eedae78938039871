"""Model FLOP utilisation: what an update's products would take at this machine's measured best, beside what it took.

(Chowdhery et al. 2022, "PaLM", appendix B: operations that the model needs, without those that are done again.)
"""

from __future__ import annotations

from dinox_train.learner import Learner
from dinox_train.plan import GRAM_LOSS, GRAM_PASS, flops_of

_AGAIN = "recomputation"
"""Of the rows of an update's operations: what checkpointing computes again, which nobody needs."""


class Utilisation:
    """Knows the operations of an update in each stage of a run."""

    def __init__(self, peak_tflops: float | None, devices: int = 1) -> None:
        """peak_tflops: the fastest product that was measured in the run's precision; None: nothing was measured.
        devices: so many as this one share an update."""
        self._peak = peak_tflops and peak_tflops * 1e12 * devices
        self._plain = self._gram = 0.0

    def enter(self, learner: Learner) -> None:
        """The learner's stage is next."""
        flops = flops_of(learner.config, learner.vit, learner.objective)
        self._gram = float(flops.of(step=GRAM_PASS) + flops.of(step=GRAM_LOSS))
        self._plain = float(flops.total - flops.of(step=_AGAIN)) - self._gram

    def of(self, seconds: float, *, gram: bool) -> float | None:
        """The share of the peak that an update of so many seconds reached, with Gram anchoring or without."""
        if not self._peak:
            return None
        return (self._plain + (self._gram if gram else 0.0)) / seconds / self._peak
