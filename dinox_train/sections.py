"""The sections of a run's configuration: each key, its default, and what it means.

Invariant: a section is immutable, strict about types, and closed to unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    folder: str = "runs/run"
    """Where the run writes: config.yaml, metrics.jsonl, checkpoints/, report.html. The same folder again resumes it."""
    init_from: str | None = None
    """A folder with weights (a checkpoint, or what `dinox_model.save` wrote) that a new run starts from."""


class WeightedShards(Section):
    path: str
    """A folder that `tools/pack_shards.py` wrote."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of each batch, relative to the others'; null: 1, or what data.temperature gives."""


class DataSection(Section):
    shards: str | tuple[WeightedShards, ...] = "shards"
    """A folder that `tools/pack_shards.py` wrote (or where it was copied to, s3://bucket/prefix), or `fake`: made-up
    volumes, for trying a machine. Or several folders that share each batch: a list of {path, weight}."""
    temperature: Annotated[float, Field(ge=1)] | None = None
    """Weights of a list of sets that has none: n^(1/T) for a set of n windows. 1: by size; large: all alike."""
    depth: Positive = 3
    """Slices in a window, odd; they are the network's input channels."""
    step: Positive = 1
    """Distance of the window's slices, in slices."""
    step_mm: Annotated[float, Field(gt=0)] | None = None
    """The same in mm, in the place of `step`: each volume's nearest number of slices."""
    every: Positive = 1
    """Draw only every so many-th slice of a volume as the middle of a window; its neighbours stay true."""
    every_mm: Annotated[float, Field(gt=0)] | None = None
    """The same in mm, in the place of `every`."""
    inflation: Positive = 1
    """How often an epoch holds each window, for small sets: only the counting of epochs changes."""
    mode: Literal["runs", "random"] = "runs"
    """runs: neighbouring slices are decoded once for several batches; random: each window for itself. Both exact."""
    run_length: Positive = 8
    """Windows of a run."""
    edge: Literal["clamp", "reflect", "error"] = "clamp"
    """What a window beyond a volume's end sees: the last slice, the mirrored slices, or (error) no such window exists.
    """
    threads: Positive | None = None
    """Decoder threads; null: chosen from the number of cores."""
    prefetch_mib: Positive = 256
    """Memory for batches that are read ahead, MiB; never more than eight micro-batches are."""
    pool_mib: Positive = 2048
    """Memory for decoded runs, MiB; where not all fit that are wanted, some are decoded again."""
    cache_mib: Annotated[int, Field(ge=0)] = 0
    """Memory for decoded slices that stay from epoch to epoch, MiB: as many whole volumes as fit. For small sets."""
    max_gbps: Annotated[float, Field(gt=0)] | None = None
    """Cap on what the loader decodes, 10^9 bytes a second, to leave the rest of a shared memory bus alone."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A loader that hands out nothing for so long has stalled: the run ends with exit code 5."""

    @model_validator(mode="after")
    def _odd_depth(self) -> DataSection:
        if self.depth % 2 == 0:
            raise ValueError(f"depth must be odd (a middle slice and as many on either side), not {self.depth}")
        return self

    @model_validator(mode="after")
    def _one_say(self) -> DataSection:
        for name in ("step", "every"):
            if getattr(self, f"{name}_mm") is not None and getattr(self, name) != 1:
                raise ValueError(f"give {name} or {name}_mm, not both")
        if isinstance(self.shards, tuple) and not self.shards:
            raise ValueError("shards is an empty list: give at least one {path, weight}")
        weights = [one.weight for one in self.shards] if isinstance(self.shards, tuple) else []
        if self.temperature is not None and (not weights or any(weight is not None for weight in weights)):
            raise ValueError("temperature is for a list of sets without weights: take away one or the other")
        return self


class ModelSection(Section):
    preset: Literal["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b"] = "vit_s"
    """The size of the network."""
    layer_scale: Annotated[float, Field(gt=0)] = 1e-5
    """First value of LayerScale. 1e-5 is DINOv3's, for long runs: at first no block adds anything. Short ones: 0.1."""


class ViewsSection(Section):
    global_size: Positive = 224
    """Side of a global crop, pixels, a multiple of the patch size (16)."""
    local_size: Positive = 96
    """Side of a local crop, pixels, a multiple of the patch size (16)."""
    num_local: Annotated[int, Field(ge=0)] = 8
    """Local crops of an image, beside its two global ones."""
    global_scale: Range = (0.32, 1.0)
    """Area of a global crop as a fraction of the slice's."""
    local_scale: Range = (0.05, 0.32)
    """Area of a local crop as a fraction of the slice's."""
    aspect: Range = (0.75, 4.0 / 3.0)
    """Width of a crop over its height, drawn log-uniformly."""
    level_hu: Range = (-500.0, 0.0)
    """Centre of a view's intensity window, HU, drawn uniformly for each view."""
    width_hu: Range = (800.0, 2000.0)
    """Width of a view's intensity window, HU, drawn log-uniformly for each view."""
    flip_probability: Fraction = 0.0
    """Left-right flips. 0 by default: the side of an organ is anatomy."""

    @model_validator(mode="after")
    def _sensible(self) -> ViewsSection:
        for name in ("global_size", "local_size"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of the patch size 16, not {getattr(self, name)}")
        for name in ("global_scale", "local_scale", "aspect", "level_hu", "width_hu"):
            low, high = getattr(self, name)
            if low > high or (name != "level_hu" and low <= 0):
                raise ValueError(f"{name} must be [low, high] with low <= high, not [{low}, {high}]")
        if max(self.global_scale[1], self.local_scale[1]) > 1.0:
            raise ValueError("a crop's scale is a fraction of the slice's area: at most 1.0")
        return self


class ObjectiveSection(Section):
    prototypes: Positive = 4096
    """Classes that teacher and student sort views into. Few for a small batch: a Sinkhorn needs samples for each."""
    head_hidden: Positive = 2048
    """Width of the two hidden layers of the head."""
    head_bottleneck: Positive = 256
    """Features between the hidden layers and the prototypes."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the student's logits."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Divides the teacher's logits after its warm-up; lower is surer, and must be below the student's."""
    teacher_temperature_start: Annotated[float, Field(gt=0)] = 0.04
    """Where its warm-up begins."""
    teacher_temperature_warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from the start to the final temperature."""
    sinkhorn_iterations: Positive = 3
    """Rounds of balancing prototypes and samples."""


class OptimizerSection(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The peak, as applied: no hidden scaling by the batch size (DINOv3's rule is base x 4 x sqrt(batch / 1024))."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of matrices; vectors and tokens have none. At the start of a cosine."""
    final_weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Where that cosine ends."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's average of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's average of the squared gradient."""
    clip_norm: Annotated[float, Field(gt=0)] = 3.0
    """Largest norm of the whole gradient."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of block i of L is times layer_decay^(L - i)."""
    patch_embed_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor on the learning rate of the patch embedding."""
    last_layer_frozen_updates: Annotated[int, Field(ge=0)] = 0
    """The head's prototypes stay as they are for so many updates at the start."""


class ScheduleSection(Section):
    updates: Positive | None = None
    """Length of the schedules; null: the first run's train.updates, then kept by its checkpoints."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from 0 to the peak of the learning rate."""


class TeacherSection(Section):
    momentum: Fraction = 0.994
    """Share of itself that the teacher keeps in an update. At the start of a cosine."""
    final_momentum: Fraction = 1.0
    """Where that cosine ends."""


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


class CheckpointSection(Section):
    every: Positive = 500
    """Updates between checkpoints. One is also written at the end and on SIGTERM or SIGINT."""
    keep_last: Positive = 2
    """Newest checkpoints that stay; the newest is never deleted."""
    keep_every: Positive | None = None
    """Checkpoints of every so many updates stay for ever; null: none."""


class EvaluateSection(Section):
    every: Positive = 500
    """Updates between evaluations on the validation split."""
    windows: Positive = 256
    """Windows of each side, training and validation, that an evaluation looks at; evenly spread over the split."""
    neighbours: Positive = 10
    """Training slices whose heights predict a validation slice's, for knn_z."""


class LogSection(Section):
    every: Positive = 10
    """Updates between lines in train.log and on the terminal; metrics.jsonl has every update."""


class HealthSection(Section):
    max_masked_updates: Positive = 10
    """So many updates in a row with a non-finite loss or gradient stop the run (exit code 4)."""
