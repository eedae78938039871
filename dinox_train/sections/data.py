"""The section `data`: which windows a run sees, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dinox_train.sections.section import Positive, Section


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
    after_removal: tuple[Annotated[str, Field(min_length=16)], ...] = ()
    """Digests of sets as they are now, 16 digits of each at least: a patient was taken out of them since the run began
    (`pack_shards --remove`), and the run shall go on without that patient. Else it does not go on."""
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
    limit: Positive | None = None
    """Draw only from so many windows of the training side, chosen by the seed (of several sets by their weights), with
    their true neighbours; null, or more than there are: from all."""
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
    pin: Literal["auto", "on", "off"] = "auto"
    """Pinned memory for batches on their way to a GPU: on, off, or auto, where it is measured to be faster."""
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
