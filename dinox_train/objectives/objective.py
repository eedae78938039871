"""What an objective is to the step, the run and the report. A new objective is one file with one class like this.

    teachers see every micro-batch  ─▶ observe     ─┐ no gradients
    the whole batch's targets, once ─▶ aim          ├ (one Sinkhorn over all images of the update)
    terms that tie images together  ─▶ couple      ─┘
    each micro-batch's losses       ─▶ losses         shares that add up to the whole batch's loss

Invariant: whatever `aim` and `couple` return, the shares of `losses` over the micro-batches of a global batch, and
their gradients, add up to those of the batch in one piece, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dinox_model import ViTConfig
from dinox_train.masking import MaskSettings
from dinox_train.network import Networks
from dinox_train.view_batch import ViewBatch

Values = Mapping[str, float]
"""Numbers of one update, by name; `weight_TERM` is the weight of a term in the loss."""
Losses = dict[str, Tensor]
"""Terms of a loss, by name; 0-dim."""
LOCAL_NORM = "backbone.cls_norm"
"""The norm that local views have of their own, where `model.untied_cls_norm` is on."""


@dataclass(frozen=True)
class Aim:
    """What the student of one update is to be measured by."""

    targets: Sequence[Any]
    """One for each micro-batch; only the objective knows what is in it."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """0-dim tensors for the line of this update."""
    features: Tensor | None = None
    """float32 (2B, d): the teacher's CLS of the global views, if it was asked; the figures of collapse come of it."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the objective keeps from update to update, as it is after this one; the step applies it, or masks it."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective wants in a ViewBatch."""

    masks: MaskSettings | None = None
    """How patches of the global views are masked; None: they are not."""
    gram: bool = False
    """Views for a Gram teacher, once it is there."""
    gram_size: int | None = None
    """Their side, pixels; None: that of the global views."""
    gram_patches: int | None = None
    """Of each global view, how many patches are compared, drawn anew in each update; None: all."""
    labels: str | None = None
    """Name of the labels (OUT/labels/NAME.jsonl) that say which slices bear a mark."""


class Objective(Protocol):
    """An objective at given settings. It has no memory of its own: what it keeps is handed in and out as `state`."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of its terms; `loss_NAME` in a run's metrics."""
        ...

    @property
    def needs(self) -> Needs:
        """What a ViewBatch must hold for it."""
        ...

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters of a student, by the beginnings of their names, that its losses never read; all others get a
        gradient in every update, which a run of several ranks relies on."""
        ...

    def heads(self, vit: ViTConfig, seed: int) -> dict[str, nn.Module]:
        """Fresh heads, a function of shape and `seed`; part of student and teacher alike."""
        ...

    def first_state(self) -> dict[str, Tensor]:
        """What `aim` gets as `state` in the first update."""
        ...

    def values(self, update: int) -> dict[str, float]:
        """The scheduled numbers of update `update` (from 1), `weight_TERM` for each term (0: off) among them."""
        ...

    def observe(self, networks: Networks, batch: ViewBatch, values: Values) -> Any:
        """What the frozen networks say of a micro-batch. Runs without gradients, for every micro-batch first."""
        ...

    def aim(self, observed: Sequence[Any], values: Values, state: Mapping[str, Tensor]) -> Aim:
        """Targets of the whole batch from what was observed of its micro-batches, in their order."""
        ...

    def couple(
        self, networks: Networks, batches: Sequence[ViewBatch], targets: Sequence[Any], values: Values
    ) -> Sequence[Any]:
        """`targets`, completed by what depends on the student's features of all micro-batches at once, if anything."""
        ...

    def losses(
        self, networks: Networks, batch: ViewBatch, targets: Any, values: Values, *, total_images: int
    ) -> Losses:
        """This micro-batch's shares of the terms whose weight is not 0, 0-dim with gradients, not yet weighted."""
        ...
