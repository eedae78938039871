"""`save_pretrained`: a folder that others' code loads without ours, and that we read back.

    FOLDER/model.safetensors (or FORMAT.safetensors)  their names, fp32
           config.json        where the format has one
           preprocess.json    how HU become the network's input
           README.md          the model card

Invariant: what is written computes what the network computes, or the export is refused with the option's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinox_model.convert.format import PERIODS, Format, are_formula_periods
from dinox_model.convert.source import FORMATS, OURS
from dinox_model.folders import replace_file, write_folder
from dinox_model.model_card import model_card
from dinox_model.tensor_files import WeightsError, write_tensors
from dinox_model.vit import VisionTransformer
from dinox_model.weights import CONFIG, WEIGHTS, save, write_preprocess

DROPPABLE = {
    "cls_norm": "the norm of local crops, which no inference uses",
    PERIODS: "stored periods of the rotations, in place of which the formula's are used: features change a little",
}
"""What `allow` may name, and what that means."""


def save_pretrained(
    model: VisionTransformer,
    folder: str | Path,
    *,
    format: str,
    allow: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Format | None:
    """Write `model` to a new `folder` in another format, whole or not at all; returns the format (None: ours).

    Args:
        format: one of `FORMATS`, `dinox` for our own, or `hf`: Hugging Face's that fits the network's positions.
        allow: `cls_norm`, `rope.periods`: left out where the format has no place for them.
        provenance: see `model_card`.

    Raises:
        WeightsError: the folder exists, the format is unknown, or it cannot hold the network: each option by name.
    """
    folder = Path(folder)
    if folder.exists():
        raise WeightsError(f"{folder}: exists already; an export makes a new folder")
    for name in allow:
        if name not in DROPPABLE:
            raise WeightsError(f"{name!r} cannot be left out; what can be: {', '.join(DROPPABLE)}")
    if format == OURS:
        card = model_card(model, provenance)
        write_folder(folder, lambda temporary: _write_ours(model, card, temporary))
        return None
    target = target_format(model, format)
    faults = _faults(model, target, allow)
    if faults:
        lines = [f"{option}: {why}" for option, why in faults.items()]
        droppable = [option for option in faults if option in DROPPABLE]
        way_out = f" (to leave out what it has no place for: allow {', '.join(droppable)})" if droppable else ""
        raise WeightsError(f"{target.title} cannot hold this network: " + "; ".join(lines) + way_out)
    tensors = their_tensors(model, target)
    card = model_card(model, provenance, target)
    write_folder(folder, lambda temporary: _write(model, target, tensors, card, temporary))
    return target


def target_format(model: VisionTransformer, name: str) -> Format:
    """The format of that name; `hf` and `meta` are short for those that fit. Raises WeightsError for an unknown one."""
    short = {"hf": "hf_dinov2" if model.config.positions == "learned" else "hf_dinov3", "meta": "meta_dinov3"}
    full = short.get(name, name)
    if full not in FORMATS:
        raise WeightsError(f"unknown format {name!r}; known: {', '.join((OURS, *short, *FORMATS))}")
    return FORMATS[full]


def their_tensors(model: VisionTransformer, target: Format) -> dict[str, Tensor]:
    """All tensors of the target's file, by its names, fp32, on the CPU."""
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    other = [f"{name} ({tensor.dtype})" for name, tensor in ours.items() if tensor.dtype != torch.float32]
    if other:
        raise WeightsError(f"weights are exported as float32, and {other[0]} is not: call model.float() first")
    tensors = dict(target.constants(model.config))
    for pair in target.pairs(model.config):
        tensors |= pair.write(ours)
    return tensors


def _faults(model: VisionTransformer, target: Format, allow: Sequence[str]) -> dict[str, str]:
    faults = target.cannot_hold(model.config)
    if PERIODS in faults and are_formula_periods(model.state_dict()[PERIODS].cpu(), model.config):
        del faults[PERIODS]
    return {option: why for option, why in faults.items() if option not in allow}


def _write_ours(model: VisionTransformer, card: str, folder: Path) -> None:
    save(model, folder)
    _write_card(card, folder)


def _write_card(card: str, folder: Path) -> None:
    replace_file(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def _write(model: VisionTransformer, target: Format, tensors: Mapping[str, Tensor], card: str, folder: Path) -> None:
    settings = target.settings_of(model.config)
    file = WEIGHTS if settings is not None else f"{target.name}.safetensors"
    replace_file(folder / file, lambda path: write_tensors(tensors, path))
    write_preprocess(model.preprocess, folder)
    _write_card(card, folder)
    if settings is not None:
        text = json.dumps(settings, indent=1, allow_nan=False) + "\n"
        replace_file(folder / CONFIG, lambda path: path.write_text(text))
