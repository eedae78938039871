"""Weights of another training as the beginning of a run: DINOv3's, DINOv2's, or a checkpoint of our own.

The published template for a new modality (Meta's FINO, a branch of its dinov3): fresh heads learn alone first, but for
the patch embedding (`optimizer.backbone_frozen_updates`), then the backbone's learning rate rises
(`backbone_ramp_updates`), lower in lower layers (`layer_decay`). configs/warm_start.yaml has it.

Invariant: the network computes what the weights were trained to compute, or the start is refused by name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dinox_model import Preprocess, VisionTransformer, ViTConfig, build, load_pretrained

# Fields of a ViTConfig that say how a network is trained or first filled, not what its weights compute.
_OF_TRAINING = ("drop_path", "rope_shift", "rope_jitter", "rope_rescale", "zero_init_residuals")
_ADDED = "scale."
"""Parameters that the run's network may have beyond those of the weights: at first they add nothing."""


def load_backbone(
    path: str | Path, wanted: ViTConfig, preprocess: Preprocess, *, seed: int
) -> tuple[VisionTransformer, list[str]]:
    """The network `wanted` with the weights at `path`, on the CPU in fp32, and sentences that say what became of them.

    path: what `load_pretrained` reads: a folder of ours (a checkpoint's too) or of Hugging Face's, a file of Meta's.
    preprocess: the run's; the network has its intensity window, and the mean and deviation that the weights were
    trained with. seed: of what the weights do not have (scale conditioning, which begins by adding nothing).
    A window of another number of slices than the weights' channels is adapted.

    Raises ValueError that names each key of the configuration's `model` that must be another one, and what
    `load_pretrained` refuses.
    """
    source, report = load_pretrained(path, in_channels=wanted.in_channels)
    other = _differences(source.config, wanted)
    if other:
        wrong = ", ".join(f"{name} {found!r} (the run: {getattr(wanted, name)!r})" for name, found in other.items())
        keys = " ".join(f"model.{name}={_spelled(found)}" for name, found in other.items())
        raise ValueError(f"{path} holds a network with {wrong}. Choose the model.preset of its size, or give: {keys}")
    network = build(wanted, seed=seed)
    missing, unexpected = network.load_state_dict(source.state_dict(), strict=False)
    strangers = [name for name in (*missing, *unexpected) if not name.startswith(_ADDED)]
    assert not strangers, f"networks of one shape differ in {strangers}"
    network.preprocess = dataclasses.replace(preprocess, mean=source.preprocess.mean, std=source.preprocess.std)
    lines = [*report.lines(), f"mean {source.preprocess.mean:g} and std {source.preprocess.std:g} are the weights'"]
    return network.eval(), lines + ([f"{len(missing)} tensors have first values: {_ADDED}*"] if missing else [])


def _differences(source: ViTConfig, wanted: ViTConfig) -> dict[str, Any]:
    """Fields in which the weights' network is not the wanted one, with the weights' value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(ViTConfig):
        theirs, ours = getattr(source, field.name), getattr(wanted, field.name)
        same = theirs == ours or field.name in _OF_TRAINING
        if field.name == "layer_scale":  # a first value: only whether there is one
            same = (theirs is None) == (ours is None)
        if field.name == "scale_conditioning":
            same = theirs == ours or not theirs
        if not same:
            found[field.name] = theirs
    return found


def _spelled(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return "[" + ",".join(str(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()
