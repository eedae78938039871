"""The sections `optimizer`, `schedule` and `teacher`: how weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dinox_train.schedule import REFERENCE_BATCH, scaled_learning_rate
from dinox_train.sections.section import Fraction, Positive, Section


class OptimizerSection(Section):
    """Lengths in updates, here and elsewhere, may be given in images too: `backbone_frozen_updates: 100k images`."""

    learning_rate: Annotated[float, Field(gt=0)] | None = 2e-4
    """The peak, as applied. null, where base_learning_rate is given."""
    base_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """In the place of learning_rate: the peak is this x 4 x sqrt(train.batch_size / 1024), DINOv3's rule, and equal to
    it for 64 images."""
    final_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Where the learning rate's decline ends, as applied; null: 1e-6. With schedule.shape constant there is none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of matrices; vectors, tokens and positions have none. At the start of a cosine."""
    final_weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Where that cosine ends."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's average of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's average of the squared gradient."""
    clip_norm: Annotated[float, Field(gt=0)] = 3.0
    """Largest norm of a gradient; longer ones are scaled down, and the update is marked `clipped`."""
    clip: Literal["parts", "whole"] = "parts"
    """parts: the backbone and each head for itself, as in DINOv3; whole: all of the gradient together."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of block i of L is times layer_decay^(L - i)."""
    patch_embed_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor on the learning rate of the patch embedding."""
    last_layer_frozen_updates: Annotated[int, Field(ge=0)] = 0
    """The heads' prototypes stay as they are for so many updates at the start."""
    backbone_frozen_updates: Annotated[int, Field(ge=0)] = 0
    """For a warm start: the backbone, but for its patch embedding, stays as it is for so many updates, while heads
    learn."""
    backbone_ramp_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line after them, from 0 to the backbone's own learning rate."""

    @model_validator(mode="before")
    @classmethod
    def _base_in_its_place(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("base_learning_rate") is not None:
            return {"learning_rate": None, **given}
        return given

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerSection:
        if (self.learning_rate is None) == (self.base_learning_rate is None):
            raise ValueError("give learning_rate or base_learning_rate, one of the two, and null for the other")
        return self

    def peak_learning_rate(self, batch_size: int) -> float:
        """The peak of the learning rate as applied, for batches of so many images."""
        if self.learning_rate is not None:
            return self.learning_rate
        assert self.base_learning_rate is not None
        return scaled_learning_rate(self.base_learning_rate, batch_size)

    def learning_rate_in_words(self, batch_size: int) -> str:
        """What stands behind the peak."""
        peak = f"{self.peak_learning_rate(batch_size):.3g}"
        if self.base_learning_rate is None:
            return f"{peak}, as given"
        return f"{peak} = base {self.base_learning_rate:g} x 4 x sqrt({batch_size} images / {REFERENCE_BATCH})"

    @property
    def last_learning_rate(self) -> float:
        """Where the learning rate's decline ends."""
        return 1e-6 if self.final_learning_rate is None else self.final_learning_rate


class ScheduleSection(Section):
    updates: Positive | None = None
    """Length of the schedules; null: the first run's train.updates, then kept by its checkpoints."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from 0 to the peak of the learning rate."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate after that: down to optimizer.final_learning_rate, or constant."""


class TeacherSection(Section):
    momentum: Fraction = 0.994
    """Share of itself that the teacher keeps in an update. At the start of a cosine."""
    final_momentum: Fraction = 1.0
    """Where that cosine ends."""
