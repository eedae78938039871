"""The sections of a run as a process: where it writes, how long it goes, how often it saves, looks and speaks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dinox_model.fields import nearest
from dinox_train.alarms import COLLAPSES, NAMES
from dinox_train.sections.section import Positive, Section


class RunSection(Section):
    folder: str = "runs/run"
    """Where the run writes: config.yaml, metrics.jsonl, checkpoints/, report.html. The same folder again resumes it."""
    init_from: str | None = None
    """A folder with weights (a checkpoint, or what `dinox_model.save` wrote) that a new run starts from."""


class TrainSection(Section):
    updates: Positive = 1000
    """Where to stop, in optimizer updates."""
    batch_size: Positive = 64
    """Images (windows) per update, over all micro-batches."""
    accumulation: Positive = 1
    """In how many pieces a batch is computed. Changes memory and speed, not the mathematics."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")
        return self


class StageSection(Section):
    """A part of a run in which some keys are others. `views: {global_size: 512}` overlays that section."""

    updates: Positive | None = None
    """Its length; null, in the last stage only: to the end of the run."""
    views: dict[str, Any] = Field(default_factory=dict)
    """Keys of `views` that are others."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Of `objective`: all but what shapes the heads."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Of `optimizer`: learning rates, weight decays, clip_norm."""
    teacher: dict[str, Any] = Field(default_factory=dict)
    """Of `teacher`."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Of `train`: accumulation."""
    execution: dict[str, Any] = Field(default_factory=dict)
    """Of `execution`: for large views, say, activation_checkpointing."""


class CheckpointSection(Section):
    every: Positive = 500
    """Updates between checkpoints. One is also written at the end and on SIGTERM or SIGINT."""
    keep_last: Positive = 2
    """Newest checkpoints that stay; the newest is never deleted."""
    keep_every: Positive | None = None
    """Checkpoints of every so many updates stay for ever; null: none."""
    max_failures: Positive = 5
    """So many in a row that could not be written (a full disk, say) stop the run; fewer are told, and it goes on."""


class EvaluateSection(Section):
    every: Positive = 500
    """Updates between evaluations on the validation split."""
    windows: Positive = 256
    """Windows of each side, training and validation, that an evaluation looks at; evenly spread over the split."""
    neighbours: Positive = 10
    """Training slices whose heights predict a validation slice's, for knn_z; for knn_label and shortcut likewise."""
    labels: str | None = None
    """Name of labels (OUT/labels/NAME.jsonl of each set) for knn_label: which slices bear a mark. null: none."""


class LogSection(Section):
    every: Positive = 10
    """Updates between lines in train.log and on the terminal; metrics.jsonl has every update."""
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Programs that show the numbers of metrics.jsonl too, from RUN (the extra dinox[log]; docs/watching.md). None of
    them sends anything unless its own variables in the environment say so."""


class HealthSection(Section):
    max_masked_updates: Positive = 10
    """So many updates in a row with a non-finite loss or gradient stop the run (exit code 4)."""
    on_alarm: Literal["tell", "stop"] = "tell"
    """What an alarm does: tell, an event and no more; stop, also end the run after a checkpoint (exit code 4)."""
    stop_at: tuple[str, ...] = COLLAPSES
    """The alarms that stop it; docs/health.md lists all. By default those after which nothing is learnt any more."""
    grace_updates: Annotated[int, Field(ge=0)] | None = None
    """Updates at the start without alarms; null: 100, or schedule.warmup_updates for what is normal in a warm-up."""
    patience_updates: Positive = 50
    """A figure beyond its threshold in so many updates in a row is an alarm (a few alarms have a patience of their
    own)."""
    spike: Annotated[float, Field(gt=1)] = 10.0
    """A loss so many times the median of the last 100 is a spike."""
    rollback: Positive | None = None
    """So many updates in a row whose loss spikes or is not finite: go back to the newest checkpoint from before them,
    and on with the windows after them, which are thus left out; null: never."""
    max_rollbacks: Positive = 3
    """When one more is wanted, the run stops instead (exit code 4)."""

    @model_validator(mode="after")
    def _sensible(self) -> HealthSection:
        for name in self.stop_at:
            if name not in NAMES:
                raise ValueError(f"stop_at: there is no alarm {name!r}{nearest(name, NAMES)}")
        if self.rollback is not None and self.rollback > self.max_masked_updates:
            raise ValueError(
                f"rollback {self.rollback} never comes: max_masked_updates stops the run after "
                f"{self.max_masked_updates}. Lower the one or raise the other"
            )
        return self
