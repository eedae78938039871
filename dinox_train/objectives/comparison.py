"""How the student's logits are compared with the teacher's: what balances the teacher's, and the two losses of it.

Targets are as large as the logits, and are made of them and one vector. Plainly they are made, of a micro-batch at a
time, where a loss is. Fused, the kernels of dinox_train/kernels read the logits as the heads leave them (bf16 under
autocast) and no target ever lies in memory. Invariant: both give the same numbers, to fp32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from dinox_train.objectives.centering import centred_targets, updated_centre
from dinox_train.objectives.dino import dino_loss
from dinox_train.objectives.ibot import ibot_loss
from dinox_train.objectives.objective import Values
from dinox_train.objectives.sinkhorn import balanced_targets, prototype_potential
from dinox_train.ranks import ALONE, AllReduce, Ranks
from dinox_train.view_batch import NUM_GLOBAL


class ComparisonSettings(Protocol):
    """What is needed of the objective's settings, which say what each means."""

    @property
    def student_temperature(self) -> float: ...
    @property
    def balance(self) -> Literal["sinkhorn", "centering"]: ...
    @property
    def sinkhorn_iterations(self) -> int: ...
    @property
    def centre_momentum(self) -> float: ...


class Comparison:
    """The comparison at given settings. `values` are the objective's: the teacher's temperature is of an update."""

    def __init__(self, settings: ComparisonSettings, *, fused: bool = False, ranks: Ranks = ALONE) -> None:
        """fused: by kernels, which need Triton and logits on a device that it runs on. ranks: over which a batch is
        balanced."""
        self.settings = settings
        self.fused, self._all_reduce = fused, ranks.all_reduce

    def balance(
        self, logits: Mapping[str, Sequence[Tensor]], values: Values, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the batch as a whole, of which this rank's teacher logits are pieces (n, K) by head: a vector (K,) for
        each head, Sinkhorn's potential or the running centre, and the objective's state after this update."""
        own = self.settings
        if own.balance == "sinkhorn":
            find = self._potential_finder()
            temperature = values["teacher_temperature"]
            return {
                name: find(parts, temperature, own.sinkhorn_iterations, all_reduce=self._all_reduce)
                for name, parts in logits.items()
            }, {}
        centres = {name: state[f"{name}_centre"].clone() for name in logits}
        after = {
            f"{name}_centre": updated_centre(centre, logits[name], own.centre_momentum, all_reduce=self._all_reduce)
            for name, centre in centres.items()
        }
        return centres, dict(state) | after

    def targets(self, logits: Tensor, balance: Tensor, values: Values) -> Tensor:
        """(n, K) of teacher logits (n, K), in fp32."""
        make = balanced_targets if self.settings.balance == "sinkhorn" else centred_targets
        return make(logits, balance, values["teacher_temperature"])

    def dino(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        balance: Tensor,
        values: Values,
        *,
        local_weight: float,
        total_images: int,
    ) -> Tensor:
        """`dino_loss` of student logits (S*b, K) and teacher logits (2b, K)."""
        num_student_views = NUM_GLOBAL * len(student_logits) // len(teacher_logits)
        temperature = self.settings.student_temperature
        if self.fused:
            from dinox_train.kernels.fused_losses import fused_dino_loss

            return fused_dino_loss(
                student_logits,
                teacher_logits,
                self._potential(balance, values),
                num_student_views=num_student_views,
                num_teacher_views=NUM_GLOBAL,
                student_temperature=temperature,
                teacher_temperature=values["teacher_temperature"],
                local_weight=local_weight,
                total_rows=total_images,
            )
        return dino_loss(
            student_logits,
            self.targets(teacher_logits, balance, values),
            num_student_views=num_student_views,
            num_teacher_views=NUM_GLOBAL,
            student_temperature=temperature,
            local_weight=local_weight,
            total_rows=total_images,
        )

    def ibot(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weights: Tensor,
        balance: Tensor,
        values: Values,
        *,
        total_images: int,
    ) -> Tensor:
        """`ibot_loss` of student and teacher logits (m, K) of masked patches with weights (m,)."""
        temperature, total_crops = self.settings.student_temperature, NUM_GLOBAL * total_images
        if self.fused:
            from dinox_train.kernels.fused_losses import fused_ibot_loss

            return fused_ibot_loss(
                student_logits,
                teacher_logits,
                self._potential(balance, values),
                weights,
                student_temperature=temperature,
                teacher_temperature=values["teacher_temperature"],
                total_crops=total_crops,
            )
        targets = self.targets(teacher_logits, balance, values)
        return ibot_loss(student_logits, targets, weights, student_temperature=temperature, total_crops=total_crops)

    def _potential_finder(self) -> _FindsPotential:
        if not self.fused:
            return prototype_potential
        from dinox_train.kernels import prototype_potential as fused

        return fused.prototype_potential

    def _potential(self, balance: Tensor, values: Values) -> Tensor:
        """What logits / temperature is reduced by before the softmax: softmax((L - c) / tau) has c / tau."""
        return balance if self.settings.balance == "sinkhorn" else balance / values["teacher_temperature"]


class _FindsPotential(Protocol):
    def __call__(
        self,
        logits: Tensor | Sequence[Tensor],
        temperature: float,
        iterations: int = 3,
        /,
        *,
        all_reduce: AllReduce | None,
    ) -> Tensor: ...
